"""Every option of conf/model: shapes, parameter counts, the ceiling of ReLU, and what is refused."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from brqat.model.activation import ClippedReLU, clip_relu
from brqat.model.from_torchvision import from_torchvision
from brqat.model.resnet_cifar import ResNetCIFAR, padded_identity
from brqat.model.small_cnn import SmallCNN

CONF = Path(__file__).parents[1] / "conf" / "model"
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))
CALL_EACH_RELU_ONCE = ["small_cnn", "resnet8", "resnet20", "resnet32", "resnet56"]
PICTURES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]


def build(option: str, *, num_classes: int = 10, in_channels: int = 3, **overrides) -> nn.Module:
    cfg = OmegaConf.merge(OmegaConf.load(CONF / f"{option}.yaml"), overrides)
    # Hydra checks the class of what a target returns, too, if it can be called.
    allowed = ["brqat.*", "torchvision.models.*"]
    return instantiate(cfg, num_classes=num_classes, in_channels=in_channels, _execution_whitelist_=allowed)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def relus(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.ReLU | nn.ReLU6 | ClippedReLU)]


@pytest.mark.parametrize("picture", PICTURES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_gives_logits_and_a_gradient_to_every_parameter(option, picture):
    torch.manual_seed(0)
    model = build(option, num_classes=7, in_channels=picture[0])
    logits = model(torch.randn(4, *picture))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 6])).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


@pytest.mark.parametrize("option", OPTIONS)
def test_one_seed_builds_one_model(option):
    def state() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return build(option).state_dict()

    torch.testing.assert_close(state(), state(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("option", "count"),
    [
        ("resnet8", 75_290),
        ("resnet20", 269_722),  # the paper's table 6: 0.27M
        ("resnet32", 464_154),  # 0.46M
        ("resnet56", 853_018),  # 0.85M
        ("resnet18", 11_173_962),
        ("torchvision", 2_236_682),
    ],
)
def test_parameter_count_for_ten_classes(option, count):
    assert num_parameters(build(option)) == count


def test_small_cnn_parameter_count_follows_width():
    w = 24
    convs = 9 * (1 * w + w * 2 * w + 2 * w * 2 * w + 2 * w * 4 * w + 4 * w * 4 * w)
    bns = 2 * (w + 2 * w + 2 * w + 4 * w + 4 * w)
    assert num_parameters(build("small_cnn", in_channels=1, width=w)) == convs + bns + 4 * w * 10 + 10


@pytest.mark.parametrize("clip_value", ["none", 6])
@pytest.mark.parametrize("option", CALL_EACH_RELU_ONCE)
def test_each_relu_module_is_called_once_a_forward(option, clip_value):
    model = build(option, clip_value=clip_value)
    calls = Counter()
    for relu in relus(model):
        relu.register_forward_hook(lambda module, args, output: calls.update([id(module)]))
    model(torch.randn(2, 3, 32, 32))
    assert calls == {id(relu): 1 for relu in relus(model)}


@pytest.mark.parametrize("size", [8, 7])
def test_padded_identity_is_a_convolution_with_a_frozen_eye(size):
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    eye = torch.eye(5, 3, dtype=torch.float64)[:, :, None, None]
    torch.testing.assert_close(padded_identity(x, channels=5, stride=2), F.conv2d(x, eye, stride=2))


def test_resnet_cifar_convolutions_start_as_he_et_al_say():
    torch.manual_seed(0)
    weight = build("resnet8").stage3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("depth", [2, 18, 21, -4])
def test_resnet_depth_other_than_6n_plus_2_is_refused(depth):
    with pytest.raises(ValueError, match=rf"depth={depth} is not 6n \+ 2"):
        ResNetCIFAR(num_classes=10, in_channels=3, depth=depth, clip_value="none")


def test_small_cnn_without_channels_is_refused():
    with pytest.raises(ValueError, match="width=0"):
        SmallCNN(num_classes=10, in_channels=1, width=0, clip_value="none")


@pytest.mark.parametrize("clip_value", [1, 6, 0.5])
@pytest.mark.parametrize("option", OPTIONS)
def test_clip_value_caps_every_relu(option, clip_value):
    torch.manual_seed(0)
    model = build(option, clip_value=clip_value)
    assert relus(model)
    assert all(type(relu) is ClippedReLU for relu in relus(model))
    highest, lowest = [], []

    def watch(module, args, output):
        highest.append(output.max().item())
        lowest.append(output.min().item())

    for relu in relus(model):
        relu.register_forward_hook(watch)
    model(50 * torch.randn(4, 3, 32, 32))
    assert max(highest) <= clip_value
    assert min(lowest) == 0


@pytest.mark.parametrize("nothing", ["none", None])
def test_clip_value_none_leaves_the_model_as_it_is(nothing):
    net = nn.Sequential(nn.ReLU(), nn.ReLU6())
    before = list(net)
    assert list(clip_relu(net, nothing)) == before


def test_clip_value_changes_no_weight():
    torch.manual_seed(0)
    plain = build("resnet8").state_dict()
    torch.manual_seed(0)
    torch.testing.assert_close(build("resnet8", clip_value=6).state_dict(), plain, rtol=0, atol=0)


def test_clipped_relu_is_relu_below_its_ceiling_and_flat_above():
    x = torch.tensor([-1.0, 0.5, 1.9, 2.1, 9.0], dtype=torch.float64, requires_grad=True)
    y = ClippedReLU(2.0)(x)
    y.sum().backward()
    assert y.tolist() == [0, 0.5, 1.9, 2, 2]
    assert x.grad.tolist() == [0, 1, 1, 0, 0]


def test_clip_relu_reaches_shared_and_already_clipped_relus():
    shared = nn.ReLU(inplace=True)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, shared), "c": ClippedReLU(6.0)})
    clip_relu(net, 1)
    assert [m.max_val for m in (net["a"], *net["b"], net["c"])] == [1, 1, 1, 1]
    assert net["b"][1].inplace and not net["c"].inplace


@pytest.mark.parametrize("clip_value", ["six", "6", 0, -1, True, False, float("inf"), float("nan"), [6]])
def test_other_clip_values_are_refused_with_advice(clip_value):
    with pytest.raises(ValueError, match=r"clip_value=.* cannot be .* Write clip_value=1"):
        clip_relu(nn.Sequential(nn.ReLU()), clip_value)


def test_a_ceiling_for_a_model_without_relu_is_refused():
    with pytest.raises(ValueError, match="no ReLU module to clip in EfficientNet"):
        from_torchvision("efficientnet_b0", num_classes=10, in_channels=3, clip_value=6)


TORCHVISION = {  # a name -> the keys it needs at 32x32
    "densenet121": {},
    "efficientnet_b0": {},
    "googlenet": {},
    "resnet18": {},
    "shufflenet_v2_x0_5": {},
    "squeezenet1_1": {},
    "vit_b_32": {"image_size": 32},
}


@pytest.mark.parametrize("in_channels", [1, 3, 4])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_classifiers_by_name(name, in_channels):
    with torch.device("meta"):  # shapes alone, at no cost
        model = build("torchvision", name=name, num_classes=7, in_channels=in_channels, **TORCHVISION[name])
        assert model(torch.randn(2, in_channels, 32, 32)).shape == (2, 7)


def test_vgg11_bn_computes_at_32_pixels():
    with torch.device("meta"):
        model = build("torchvision", name="vgg11_bn", in_channels=1, clip_value=1)
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert len(relus(model)) == 10


def test_densenet_computes_torchvisions_logits():
    from torchvision.models import densenet121

    torch.manual_seed(0)
    ours = from_torchvision("densenet121", num_classes=3, in_channels=3, clip_value="none").eval()
    theirs = densenet121(num_classes=3).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mobilenetv2", "is not a model of torchvision. Write model.name=.*mobilenet_v2"),
        ("ResNet18", "is not a model of torchvision. Write model.name=resnet18"),
        ("zzz", "is not a model of torchvision. Write model.name=mobilenet_v2"),
        ("fasterrcnn_mobilenet_v3_large_fpn", "is not an image classifier"),
        ("deeplabv3_resnet50", "is not an image classifier"),
        ("r3d_18", "is not an image classifier"),
        ("quantized_resnet18", "is not an image classifier. Write model.name=.*resnet18"),
    ],
)
def test_other_torchvision_names_are_refused_with_close_matches(name, message):
    with pytest.raises(ValueError, match=message):
        from_torchvision(name, num_classes=10, in_channels=3, clip_value="none")
