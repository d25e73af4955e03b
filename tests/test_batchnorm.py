"""BatchNorm's statistics inside and outside of the two context managers, against plain averages."""

import numpy as np
import pytest
import torch
from conftest import TinyNet
from torch import nn

from brqat.batchnorm import batch_statistics, norms, reestimated


def used_net(momentum=0.1):
    """A network whose statistics are those of some training, and nobody's defaults."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum), nn.ReLU(), nn.Dropout(0.5))
    for seed in range(3):
        model(batch(seed, 4) * 2 - 1)
    return model


def batch(seed, size):
    return torch.randn(size, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * (seed + 1) + seed


BATCHES = [batch(10, 4), batch(11, 9), batch(12, 2)]


def by_hand(batches):
    """Plain average over batches of each batch's mean and unbiased variance, channel by channel, float64."""
    means, variances = [], []
    for images in batches:
        rows = images.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1)
        means.append([row.sum() / len(row) for row in rows])
        variances.append([((row - m) ** 2).sum() / (len(row) - 1) for row, m in zip(rows, means[-1], strict=True)])
    return np.mean(means, axis=0), np.mean(variances, axis=0)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(before, model):
    now = model.state_dict()
    return before.keys() == now.keys() and all(torch.equal(before[key], now[key]) for key in before)


def test_reestimated_is_the_plain_average_over_the_batches():
    model = used_net()
    mean, variance = by_hand(BATCHES)
    with reestimated(model, iter(BATCHES)):
        np.testing.assert_allclose(model[0].running_mean.numpy(), mean, rtol=1e-5)
        np.testing.assert_allclose(model[0].running_var.numpy(), variance, rtol=1e-5)
        assert not any(m.training for m in model.modules())
        x = batch(13, 6)
        normal = (x.double().numpy() - mean[:, None, None]) / np.sqrt(variance[:, None, None] + model[0].eps)
        np.testing.assert_allclose(model(x).detach().numpy(), np.maximum(normal, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
def test_reestimated_gives_everything_back_to_the_bit(momentum, training):
    model = used_net(momentum).train(training)
    before = snapshot(model)
    with reestimated(model, BATCHES):
        assert not torch.equal(before["0.running_mean"], model[0].running_mean)
        assert model[0].momentum == momentum
    assert same(before, model)
    assert model[0].momentum == momentum
    assert {m.training for m in model.modules()} == {training}


def test_reestimated_gives_everything_back_when_the_body_raises():
    model = used_net()
    before = snapshot(model)
    with pytest.raises(KeyError), reestimated(model, BATCHES):
        raise KeyError("evaluation failed")
    assert same(before, model) and model.training


def test_evaluating_inside_reestimated_does_not_move_the_statistics():
    model = used_net()
    with reestimated(model, BATCHES):
        inside = snapshot(model)
        model(batch(20, 8))
        assert same(inside, model)


def test_reestimated_leaves_a_model_without_batchnorm_untouched():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout(0.5))
    before = snapshot(model)

    def must_not_be_read():
        raise AssertionError("a model without BatchNorm needs no forward")
        yield

    with reestimated(model, must_not_be_read()):
        assert same(before, model) and not model.training
    assert same(before, model) and model.training and model[1].training


def test_reestimated_on_a_quantized_network_touches_nothing_but_statistics(quantized, pictures):
    parameters = {name: p.detach().clone() for name, p in quantized.named_parameters()}
    buffers = {name: b.clone() for name, b in quantized.named_buffers()}
    with reestimated(quantized, [pictures, pictures * 2]):
        assert not torch.equal(buffers["bn1.running_var"], quantized.bn1.running_var)
        quantized(pictures)
    assert all(torch.equal(parameters[name], p) for name, p in quantized.named_parameters())
    assert all(torch.equal(buffers[name], b) for name, b in quantized.named_buffers())
    assert all(p.grad is None for p in quantized.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_batch_statistics_normalise_by_the_batch_and_give_everything_back(training):
    model = used_net().train(training)
    before = snapshot(model)
    with batch_statistics(model):
        assert [m.training for m in model] == [True, False, False]
        for x in BATCHES:
            mean, variance = by_hand([x])
            count = x.numel() // 3
            biased = variance * (count - 1) / count
            normal = (x.double().numpy() - mean[:, None, None]) / np.sqrt(biased[:, None, None] + model[0].eps)
            np.testing.assert_allclose(model(x).detach().numpy(), np.maximum(normal, 0), rtol=1e-4, atol=1e-5)
        assert not same(before, model)  # the body did feed them
    assert same(before, model) and model[0].momentum == 0.1
    assert {m.training for m in model.modules()} == {training}


def test_batch_statistics_give_everything_back_when_the_body_raises():
    model = used_net()
    before = snapshot(model)
    with pytest.raises(KeyError), batch_statistics(model):
        model(BATCHES[0])
        raise KeyError("forward failed")
    assert same(before, model) and model.training


def test_batch_statistics_leave_a_model_without_batchnorm_untouched():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout(0.5))
    before = snapshot(model)
    with batch_statistics(model):
        assert not any(m.training for m in model.modules())
    assert same(before, model) and model[1].training


def test_norms_are_those_that_keep_running_statistics():
    model = TinyNet()
    model.without = nn.BatchNorm2d(8, track_running_stats=False)
    model.one_dimensional = nn.BatchNorm1d(4)
    assert list(norms(model)) == ["bn1", "one_dimensional"]


def test_a_batch_that_fails_leaves_nothing_behind():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    model.train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def batches():
        yield torch.randn(4, 3, 2, 2)
        raise OSError("the disk is gone")

    with pytest.raises(OSError), reestimated(model, batches()):
        pass
    assert model[0].momentum == 0.1 and model[0].training and not model[1].training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
