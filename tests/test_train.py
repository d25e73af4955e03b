"""Whole runs: every option trains, what a run leaves is true, and what cannot work is said before it costs anything."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
import wandb
from runs import REPO, SYNTHETIC, by_site, config, make, records, rows, same_tensors, summary, timeless, train
from test_dataset import write_cifar, write_mnist, write_pictures

from brqat import checkpoint
from brqat.dataset.pixels import Pixels
from brqat.layers import calibrate, quantize, sites

GROUPS = ("quantizer", "regularizer", "alpha_policy", "model", "optimizer", "tracking")
FROM_FILES = ("mnist", "fashion_mnist", "cifar10", "cifar100", "image_folder")


def options(group):
    return sorted(path.stem for path in (REPO / "conf" / group).glob("*.yaml"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where float baselines are shared by the runs of this file."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def digits(tmp_path_factory, cache):
    """A run on the digits of four epochs, two of them warmup, with a float baseline."""
    folder = tmp_path_factory.mktemp("digits")
    train(folder, cache, *DIGITS)
    return folder


DIGITS = ("epochs=4", "warmup_epochs=2", "histogram_every=3")


# ---- every option


@pytest.mark.parametrize(
    ("group", "option"),
    [pytest.param(group, option, id=f"{group}={option}") for group in GROUPS for option in options(group)],
)
def test_option_trains(tmp_path, cache, group, option):
    small = (*SYNTHETIC, "dataset.images=80", "batch_size=16", "bn_batches=2", "calibration_batches=2")
    # Learned levels under the full lambda of conf/regularizer are what the stability index refuses.
    calm = ("regularizer.lambda_br=0.01", "regularizer.lambda_br_act=0.001") if option == "backprop" else ()
    if group == "model":
        small = (*small, "pretrained=none", "optimizer.lr=0.001")
    done = train(tmp_path, cache, *small, *calm, "epochs=1", "warmup_epochs=0", f"{group}={option}")
    assert done["status"] == "completed" and done["last_epoch"] == 1
    assert len(rows(tmp_path / "metrics.jsonl")) == 1


def write_set(option, folder, monkeypatch):
    """Files in the format of a data set; what a run must be told beside their place."""
    if option.startswith("cifar"):
        write_cifar(folder, monkeypatch, option.upper())
        return ("dataset.val_fraction=0.5",)
    if option == "mnist":
        checksums = write_mnist(folder, "MNIST", compress=True)
        monkeypatch.setattr(torchvision.datasets.MNIST, "resources", checksums)
        return ("dataset.val_fraction=0.25",)
    if option == "fashion_mnist":
        write_mnist(folder, "FashionMNIST")
        return ("dataset.val_fraction=0.25",)
    write_pictures(folder / "train", 10)
    write_pictures(folder / "test", 4, seed=50)
    return ("dataset.pad=1", "dataset.workers=0")


@pytest.mark.parametrize("option", options("dataset"))
def test_dataset_trains(tmp_path, cache, monkeypatch, option):
    given = ()
    if option in FROM_FILES:
        given = (f"dataset.root={tmp_path / 'set'}", *write_set(option, tmp_path / "set", monkeypatch))
    elif option == "synthetic":
        given = SYNTHETIC
    given = (*given, "batch_size=10", "model.width=4", "pretrained=none", "bn_batches=2", "calibration_batches=2")
    done = train(tmp_path / "run", cache, f"dataset={option}", *given, "epochs=1", "warmup_epochs=0")
    assert done["status"] == "completed" and done["last_epoch"] == 1


def test_streamed_pictures_train_to_the_figures_of_pictures_in_memory(tmp_path, cache):
    given = (
        "dataset=image_folder",
        f"dataset.root={tmp_path / 'set'}",
        *write_set("image_folder", tmp_path / "set", 0),
    )
    given = (*given, "batch_size=6", "model.width=4", "pretrained=none")
    train(tmp_path / "memory", cache, *given)
    train(tmp_path / "stream", cache, *given, "dataset.in_memory_limit=0")
    assert timeless(tmp_path / "memory" / "metrics.jsonl") == timeless(tmp_path / "stream" / "metrics.jsonl")


@pytest.mark.parametrize("option", options("experiment"))
def test_experiment_composes_and_trains(tmp_path, cache, option):
    whole = config(f"+experiment={option}")
    small = SYNTHETIC if whole.dataset.get("root", "") is None or "root" in whole.dataset else ()
    small = (*small, "epochs=1", "warmup_epochs=0", "pretrain_epochs=1")
    done = train(tmp_path, cache, f"+experiment={option}", *small)
    assert done["status"] == "completed"
    assert done["weight_bits"] == whole.quantizer.get("bits", done["weight_bits"])


# ---- what a run leaves


def test_run_leaves_the_files_of_the_contract(digits):
    for name in ("metrics.jsonl", "levels.jsonl", "histograms.npz", "summary.json", "last.pt", "best.pt"):
        assert (digits / name).stat().st_size > 0, name
    assert not list(digits.glob("*.tmp")) and not list(digits.glob(".*.tmp"))


def test_summary_holds_the_contract(digits):
    found = summary(digits)
    wanted = """status objective val_acc test_acc float_test_acc best_epoch epochs seconds weight_bits act_bits
        weight_bytes bops seed config_hash git_sha versions device study_name trial_number wandb_run_id"""
    assert not set(wanted.split()) - set(found)
    assert found["status"] == "completed" and found["objective"] == found["val_acc"]
    accuracies = [value for key, value in found.items() if "acc" in key and key != "objective"]
    assert len(accuracies) >= 8 and all(0 <= value <= 1 for value in accuracies)
    assert found["test_acc"] > 0.8 and found["float_test_acc"] > 0.8
    assert (found["epochs"], found["seed"], found["device"]) == (4, 0, "cpu")
    assert (found["weight_bits"], found["act_bits"]) == (2, 2)
    assert found["wandb_run_id"] is None and found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in rows(digits / "metrics.jsonl")))


def test_weight_bytes_and_bops_follow_from_the_layers(digits):
    model = make(config(*DIGITS).model, num_classes=10, in_channels=1)
    macs = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(lambda layer, _, out, name=name: macs.update({name: (layer, out)}))
    model.eval()(torch.zeros(1, 1, 8, 8))
    layers = list(macs.values())
    bits = [8, *[2] * (len(layers) - 2), 8]
    size = sum(layer.weight.numel() * b // 8 for (layer, _), b in zip(layers, bits, strict=True))
    work = sum(layer.weight.numel() * out[0, 0].numel() * b * b for (layer, out), b in zip(layers, bits, strict=True))
    assert (summary(digits)["weight_bytes"], summary(digits)["bops"]) == (size, work)


def test_metrics_have_a_line_per_epoch_from_one(digits):
    found = rows(digits / "metrics.jsonl")
    assert [row["epoch"] for row in found] == [1, 2, 3, 4]
    keys = ("train/loss", "train/ce", "train/br", "train/br_act", "val/acc", "val/loss", "lr", "seconds")
    for row in found:
        assert not set(keys) - set(row)
        assert {key.split("/")[1] for key in row if key.startswith("levels/")} == {"weight", "act"}
        acts = row["epoch"] > 2
        assert (row["train/br"] is not None) == (row["train/br_act"] is not None) == acts
        assert 0 <= row["val/acc"] <= 1
        penalty = 10 * row["train/br"] + 0.1 * row["train/br_act"] if acts else 0
        assert row["train/loss"] == pytest.approx(row["train/ce"] + penalty, rel=1e-4)
    assert [row["lr"] for row in found] == sorted((row["lr"] for row in found), reverse=True)


def test_levels_have_a_line_per_site_and_epoch(digits):
    model = make(config(*DIGITS).model, num_classes=10, in_channels=1)
    layers = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    wanted = {f"{layer}.{side}" for layer in layers for side in ("weight", "input")}
    found = rows(digits / "levels.jsonl")
    pairs = [(row["epoch"], row["site"]) for row in found]
    assert sorted(pairs) == sorted((epoch, site) for epoch in (1, 2, 3, 4) for site in wanted)
    assert all(row["kind"] == ("weight" if row["site"].endswith("weight") else "act") for row in found)
    ends = {layers[0], layers[-1]}
    assert all((row["bits"] == 8) == row["exempt"] == (row["site"].rpartition(".")[0] in ends) for row in found)
    for row in found:
        assert sum(row["occupancy"]) == pytest.approx(1)


def test_histograms_are_of_the_due_epochs_and_count_every_weight(digits):
    with np.load(digits / "histograms.npz") as stored:
        arrays = dict(stored)
    names = {row["site"] for row in rows(digits / "levels.jsonl")}
    due = ("2", "3", "4")  # the end of warmup, every third, the last
    assert set(arrays) == {f"{name}@{which}" for name in names for which in (*due, "edges")}
    for row in rows(digits / "levels.jsonl"):
        if row["epoch"] in (2, 3, 4) and row["kind"] == "weight":
            counts = arrays[f"{row['site']}@{row['epoch']}"]
            assert counts.sum() == row["numel"] and len(arrays[f"{row['site']}@edges"]) == len(counts) + 1


def test_best_epoch_is_the_best_on_validation_after_warmup(digits):
    found = summary(digits)
    eligible = [row for row in rows(digits / "metrics.jsonl") if row["epoch"] > 2]
    best = max(eligible, key=lambda row: (row["val/acc"], -row["val/loss"]))
    assert found["best_epoch"] == best["epoch"] > 2
    assert (found["val_acc"], found["val_loss"]) == (best["val/acc"], best["val/loss"])
    assert found["last_val_acc"] == pytest.approx(rows(digits / "metrics.jsonl")[-1]["val/acc"], abs=1e-9)


def test_a_better_epoch_of_warmup_is_not_chosen(tmp_path, cache):
    # A penalty that ruins the network: warmup's epoch is the best by far, and is not what the run is about.
    ruin = ("regularizer.lambda_br_act=1000", "epochs=3")
    done = train(tmp_path, cache, *ruin)
    accuracy = [row["val/acc"] for row in rows(tmp_path / "metrics.jsonl")]
    assert accuracy[0] > max(accuracy[1:]) and done["best_epoch"] > 1
    assert done["val_acc"] == max(accuracy[1:])


def test_test_accuracy_is_that_of_best_pt(digits):
    """Evaluated by this test from the file alone."""
    cfg = config(*DIGITS)
    splits, model = make(cfg.dataset), make(cfg.model, num_classes=10, in_channels=1)
    batch = next(splits.train.epoch(64, seed=1))[0]
    quantize(model, batch, make(cfg.quantizer))
    calibrate(model, [batch])
    best = torch.load(digits / "best.pt", weights_only=True)
    model.load_state_dict(best["model"])
    model = model.to(memory_format=torch.channels_last).eval()
    for part, key in ((splits.test, "test_acc"), (splits.val, "val_acc")):
        images, labels = next(part.in_order(10_000))
        with torch.no_grad():
            right = (model(images).argmax(1) == labels).double().mean().item()
        assert right == pytest.approx(summary(digits)[key], abs=1e-12)
    assert best["epoch"] == summary(digits)["best_epoch"]


def test_bf16_figures_are_those_of_best_pt(tmp_path, cache, monkeypatch):
    """Not of a mixture with the last epoch, which autocast's copies of weights once made of them."""
    save = checkpoint.save

    def negate_best(path, state):
        """Makes the chosen network as different from the last one as can be."""
        if "best" in path.name:
            state = state | {"model": {k: -v if v.dim() > 1 else v for k, v in state["model"].items()}}
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", negate_best)
    done = train(tmp_path, cache, "precision=bf16", "quantizer.bits=float", "pretrained=none", "epochs=2")
    cfg = config(*DIGITS)
    splits, model = make(cfg.dataset), make(cfg.model, num_classes=10, in_channels=1)
    model.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True)["model"])
    images, labels = next(splits.test.in_order(10_000))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model.to(memory_format=torch.channels_last).eval()(images).float()
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(done["test_loss"], rel=0.05)


def test_test_set_is_read_once_training_has_ended(tmp_path, cache, monkeypatch):
    read, in_order = [], Pixels.in_order

    def spy(self, *args, **kwargs):
        lines = len(rows(tmp_path / "metrics.jsonl")) if (tmp_path / "metrics.jsonl").exists() else 0
        read.append((len(self), lines))
        return in_order(self, *args, **kwargs)

    drawn, epoch = [], Pixels.epoch
    monkeypatch.setattr(Pixels, "in_order", spy)
    monkeypatch.setattr(Pixels, "epoch", lambda self, *args: drawn.append(len(self)) or epoch(self, *args))
    train(tmp_path, cache, "pretrained=none", "epochs=3")
    assert {lines for size, lines in read if size == 450} == {3}
    assert {lines for size, lines in read if size == 201} == {0, 1, 2, 3}  # validation: the spy sees what is read
    assert set(drawn) == {1146}


def test_files_are_identical_from_run_to_run_and_differ_by_seed(tmp_path, cache, digits):
    train(tmp_path / "again", cache, *DIGITS)
    train(tmp_path / "seed", cache, *DIGITS, "seed=1", "pretrained=none")
    for name in ("metrics.jsonl", "levels.jsonl"):
        assert timeless(tmp_path / "again" / name) == timeless(digits / name)
        assert timeless(tmp_path / "seed" / name) != timeless(digits / name)
    again, first = summary(tmp_path / "again"), summary(digits)
    assert {key for key in first if first[key] != again[key]} == {"seconds"}
    assert summary(tmp_path / "seed")["config_hash"] != first["config_hash"]


def test_run_does_not_depend_on_whether_the_baseline_was_in_the_cache(tmp_path, digits):
    train(tmp_path / "run", tmp_path / "cache", *DIGITS)
    assert timeless(tmp_path / "run" / "metrics.jsonl") == timeless(digits / "metrics.jsonl")


# ---- the science


def test_frozen_alpha_does_not_move_by_a_bit_after_warmup(tmp_path, cache):
    given = ("epochs=4", "alpha_policy=frozen", "regularizer.lambda_br_act=1", "optimizer.weight_decay=0.1")
    train(tmp_path, cache, *given)
    stored = by_site(tmp_path)
    for epochs in stored.values():
        assert len({row["alpha"] for row in epochs}) == 1
        assert all(row[key] == 0 for row in epochs for key in ("alpha_drift", "alpha_path"))
        assert all(row["flip_grid"] == 0 for row in epochs[1:])
        assert all(row["alpha_grad_ce"] == row["alpha_grad_br"] == 0 for row in epochs[1:])
        assert epochs[0]["alpha_grad_ce"] > 0
    weights = [epochs for site, epochs in stored.items() if epochs[0]["kind"] == "weight"]
    assert all(len({row["sqnr_db"] for row in epochs}) == 4 for epochs in weights)  # the weights do move


@pytest.mark.parametrize("policy", ["learnable", "backprop"])
def test_alpha_moves_after_warmup_unless_frozen(tmp_path, cache, policy):
    train(tmp_path, cache, "epochs=3", f"alpha_policy={policy}", "regularizer.lambda_br=0.01")
    for epochs in by_site(tmp_path).values():
        assert len({row["alpha"] for row in epochs}) == 3
        assert epochs[-1]["alpha_path"] > 0
        reaches = policy == "backprop" and not epochs[0]["exempt"]
        assert [row["alpha_grad_br"] > 0 for row in epochs] == [False, reaches, reaches]


def test_weights_and_activations_have_policies_apart(tmp_path, cache):
    train(tmp_path, cache, "epochs=3", "alpha_policy.weight=frozen", "alpha_policy.act=learnable")
    for epochs in by_site(tmp_path).values():
        assert (epochs[1]["alpha"] == epochs[2]["alpha"] == epochs[0]["alpha"]) == (epochs[0]["kind"] == "weight")


def test_bin_regularization_gathers_weights_at_their_levels(tmp_path, cache):
    reached = {}
    for strength in (0, 1):
        given = ("regularizer.normalize=element", f"regularizer.lambda_br={strength}", "regularizer.lambda_br_act=0")
        train(tmp_path / str(strength), cache, "epochs=3", *given)
        reached[strength] = [
            r["levels/weight/effectiveness/mean"] for r in rows(tmp_path / f"{strength}/metrics.jsonl")
        ]
    assert reached[0][0] == reached[1][0]  # warmup is the same
    assert reached[1][2] > 90 > 60 > reached[0][2]


# ---- other ways to run


def test_post_training_quantization_writes_epoch_zero(tmp_path, cache):
    done = train(tmp_path, cache, "epochs=0", "pretrain_epochs=2", "quantizer.bits=4")
    (line,) = rows(tmp_path / "metrics.jsonl")
    assert line["epoch"] == done["best_epoch"] == 0 and done["status"] == "completed"
    assert done["val_acc"] == line["val/acc"] > 0.8 and done["test_acc"] > 0.8
    assert {row["epoch"] for row in rows(tmp_path / "levels.jsonl")} == {0}


def test_pretrained_path_starts_as_the_baseline_it_came_from(tmp_path, cache):
    train(tmp_path / "auto", tmp_path / "cache")
    (path,) = (tmp_path / "cache" / "float").glob("*/best.pt")
    done = train(tmp_path / "path", cache, f"pretrained={path}")
    assert timeless(tmp_path / "path" / "metrics.jsonl") == timeless(tmp_path / "auto" / "metrics.jsonl")
    assert done["float_test_acc"] is None


def test_pretrained_none_trains_no_baseline(tmp_path):
    assert train(tmp_path / "run", tmp_path / "cache", "pretrained=none")["status"] == "completed"
    assert not (tmp_path / "cache").exists()


def test_float_run_has_no_sites_and_32_bits(tmp_path, cache):
    done = train(tmp_path, cache, "quantizer.bits=float")
    assert (done["weight_bits"], done["act_bits"], done["status"]) == (32, 32, "completed")
    assert (tmp_path / "levels.jsonl").read_text() == ""
    weights = sum(v.numel() for k, v in torch.load(tmp_path / "best.pt")["model"].items() if v.dim() in (2, 4))
    assert done["weight_bytes"] == 4 * weights


def bits_of(folder):
    return {site: epochs[0]["bits"] for site, epochs in by_site(folder).items()}


@pytest.mark.parametrize(
    ("given", "inner", "outer"),
    [
        (["quantizer.weight.bits=4", "quantizer.act.bits=float"], {"weight": 4}, {"weight": 8, "act": 8}),
        (["quantizer.weight.bits=float", "quantizer.act.bits=3"], {"act": 3}, {"weight": 8, "act": 8}),
        (["quantizer.first_last_bits=same"], {"weight": 2, "act": 2}, {"weight": 2, "act": 2}),
        (["quantizer.first_last_bits=float"], {"weight": 2, "act": 2}, {}),
        (["quantizer=sign", "quantizer.bits=4"], {"weight": 1, "act": 4}, {"weight": 8, "act": 8}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_site_has_the_bits_it_was_given(tmp_path, cache, given, inner, outer):
    done = train(tmp_path, cache, *given, "epochs=2")
    assert (done["weight_bits"], done["act_bits"]) == (inner.get("weight", 32), inner.get("act", 32))
    found = by_site(tmp_path)
    layers = list(dict.fromkeys(k.rpartition(".")[0] for k in torch.load(tmp_path / "best.pt")["model"] if "conv" in k))
    layers = [name.removesuffix(".weight_quantizer").removesuffix(".input_quantizer") for name in layers]
    layers = [*dict.fromkeys(layers), "fc"]
    wanted = {}
    for position, layer in enumerate(layers):
        bits = outer if position in (0, len(layers) - 1) else inner
        wanted |= {
            f"{layer}.{side}": bits[kind] for kind, side in (("weight", "weight"), ("act", "input")) if kind in bits
        }
    assert {site: epochs[0]["bits"] for site, epochs in found.items()} == wanted


def test_per_channel_gives_each_output_channel_an_alpha(tmp_path, cache):
    train(tmp_path, cache, "quantizer.per_channel=true")
    state = torch.load(tmp_path / "best.pt", weights_only=True)["model"]
    alphas = {key: value for key, value in state.items() if key.endswith("weight_quantizer.alpha")}
    for key, alpha in alphas.items():
        assert alpha.numel() == state[key.replace("weight_quantizer.alpha", "weight")].shape[0]
        assert len(alpha.unique()) > 1
    assert all(v.numel() == 1 for k, v in state.items() if k.endswith("input_quantizer.alpha"))


def test_mse_start_quantizes_with_less_error_than_lsq_start(tmp_path, cache):
    noise = {}
    for start in ("lsq", "mse"):
        train(tmp_path / start, cache, "epochs=0", "pretrain_epochs=2", f"quantizer.start={start}")
        noise[start] = {s: e[0]["sqnr_db"] for s, e in by_site(tmp_path / start).items() if e[0]["kind"] == "weight"}
    assert all(noise["mse"][site] >= noise["lsq"][site] for site in noise["lsq"])
    assert sum(noise["mse"].values()) > sum(noise["lsq"].values())


def test_bf16_trains_to_other_figures_and_float32_weights(tmp_path, cache):
    done = train(tmp_path / "bf16", cache, *SYNTHETIC, "precision=bf16", "pretrained=none")
    train(tmp_path / "fp32", cache, *SYNTHETIC, "pretrained=none")
    assert done["status"] == "completed"
    assert timeless(tmp_path / "bf16" / "metrics.jsonl") != timeless(tmp_path / "fp32" / "metrics.jsonl")
    state = torch.load(tmp_path / "bf16" / "last.pt", weights_only=True)["model"]
    assert {v.dtype for v in state.values() if isinstance(v, torch.Tensor) and v.is_floating_point()} == {torch.float32}


def test_val_loss_can_be_the_objective(tmp_path, cache):
    done = train(tmp_path, cache, "objective=val_loss")
    assert done["objective"] == done["val_loss"] > 0


# ---- what cannot work


def cannot(tmp_path, match, *given):
    """The run is refused with this message, before anything is trained, and its summary says so."""
    with pytest.raises(ValueError, match=match):
        train(tmp_path / "run", tmp_path / "cache", *given)
    assert not list(tmp_path.rglob("metrics.jsonl")) and not list(tmp_path.rglob("*.pt"))
    found = summary(tmp_path / "run")
    assert found["status"] == "failed" and found["objective"] == (1e9 if "objective=val_loss" in given else 0)
    assert "ValueError" in found["error"]


@pytest.mark.parametrize(
    ("match", "given"),
    [
        ("quantizer=sign", ["quantizer.bits=1"]),
        ("(?s)bits=9 .*to 8", ["quantizer.bits=9"]),
        ("quantizer.*first_last", ["quantizer.first_last_bits=1"]),
        ("force=true", ["alpha_policy=backprop", "regularizer.lambda_br=1e6"]),
        ("dataset.root=FOLDER", ["dataset=image_folder"]),
        ("val_fraction", ["dataset.val_fraction=0"]),
        ("epoch is no key.*Did you mean epochs", ["+epoch=3"]),
        ("foo.*conf/quantizer/", ["+quantizer.foo=1"]),
        ("foo.*conf/regularizer/", ["+regularizer.foo=1"]),
        ("foo.*conf/model/", ["+model.foo=1"]),
        ("foo.*conf/dataset/", ["+dataset.foo=1"]),
        ("foo.*conf/tracking/", ["tracking=wandb", "+tracking.foo=1"]),
        ("(?s)foo.*conf/optimizer/", ["+optimizer.foo=1"]),
        ("batch_size from 1 to 1146", ["batch_size=1147"]),
        ("pretrained=/nowhere.pt does not exist", ["pretrained=/nowhere.pt"]),
        ("device=auto or cpu", ["device=cuda:99"]),
        ("epochs='many'", ["epochs=many"]),
        ("Write one of", ["objective=test_acc"]),
        ("alpha_policy.weight='still'", ["alpha_policy.weight=still", "objective=val_loss"]),
        ("lr=0 would train nothing", ["optimizer.lr=0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_setting_is_refused_before_training(tmp_path, match, given):
    cannot(tmp_path, match, *given)


def test_unstable_backprop_trains_when_forced(tmp_path):
    given = ("alpha_policy=backprop", "regularizer.lambda_br=1e6", "alpha_policy.force=true", "pretrained=none")
    assert train(tmp_path / "run", tmp_path / "cache", *given)["status"] in ("completed", "diverged")
    assert rows(tmp_path / "run" / "metrics.jsonl")


def test_only_whitelisted_targets_are_instantiated(tmp_path):
    marker = tmp_path / "marker"
    with pytest.raises(Exception, match=r"os\.mkdir|os.mkdir|whitelist"):
        train(tmp_path / "run", tmp_path, "regularizer._target_=os.mkdir", f"+regularizer.path={marker}")
    assert not marker.exists() and summary(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("epochs", [0, 1])
def test_alphas_that_could_run_away_are_no_matter_where_the_regularizer_never_acts(tmp_path, epochs):
    given = ("alpha_policy=backprop", "regularizer.lambda_br=1e6", "pretrained=none", "warmup_epochs=1")
    assert train(tmp_path / "run", tmp_path / "cache", *SYNTHETIC, *given, f"epochs={epochs}")["status"] == "completed"


def test_weights_of_another_network_are_refused_whole(tmp_path, digits):
    cannot(tmp_path, "of another shape", f"pretrained={digits / 'best.pt'}", "model.width=8")


def test_folder_that_holds_a_run_is_left_alone(digits, cache):
    before = {path.name: path.read_bytes() for path in digits.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="resume=true"):
        train(digits, cache, *DIGITS)
    with pytest.raises(ValueError, match="another configuration"):
        train(digits, cache, *DIGITS, "regularizer.lambda_br=3", "resume=true")
    assert {path.name: path.read_bytes() for path in digits.iterdir() if path.is_file()} == before


def test_command_line_says_a_mistake_in_a_sentence(tmp_path):
    command = [sys.executable, "-m", "brqat.train", f"hydra.run.dir={tmp_path}", "+epoch=3"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean epochs?" in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert "Did you mean epochs?" in (tmp_path / "train.log").read_text()


# ---- divergence


@pytest.mark.parametrize(("objective", "worst"), [("val_acc", 0.0), ("val_loss", 1e9)])
def test_diverged_run_ends_with_the_worst_objective(tmp_path, cache, objective, worst):
    done = train(tmp_path, cache, "optimizer.lr=1e6", "pretrained=none", f"objective={objective}")
    assert done["status"] == "diverged" and done["objective"] == worst
    stored = summary(tmp_path)
    assert (stored["status"], stored["objective"], stored["last_epoch"]) == ("diverged", worst, 0)


def test_divergence_after_an_epoch_keeps_that_epochs_checkpoint(tmp_path, cache):
    done = train(tmp_path, cache, "regularizer.lambda_br=1e38", "epochs=3")
    assert (done["status"], done["last_epoch"]) == ("diverged", 1)
    assert [row["epoch"] for row in rows(tmp_path / "metrics.jsonl")] == [1]
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["epoch"] == 1
    assert all(torch.isfinite(v).all() for v in last["model"].values() if isinstance(v, torch.Tensor))


def test_diverged_float_baseline_makes_a_diverged_run_with_advice(tmp_path):
    done = train(tmp_path / "run", tmp_path / "cache", "optimizer.lr=1e6")
    assert done["status"] == summary(tmp_path / "run")["status"] == "diverged" and done["objective"] == 0.0
    assert "float baseline" in done["error"] and "Lower optimizer.lr" in done["error"]
    assert not list((tmp_path / "cache").rglob("summary.json"))


# ---- wandb


def test_wandb_holds_every_level_metric_of_every_site_and_epoch(tmp_path, cache):
    done = [train(tmp_path / name, cache, "tracking=wandb", "tracking.tags=[mine]") for name in ("a", "b")]
    assert done[0]["wandb_run_id"] != done[1]["wandb_run_id"]
    for folder, run_id in zip((tmp_path / "a", tmp_path / "b"), (d["wandb_run_id"] for d in done), strict=True):
        assert summary(folder)["wandb_run_id"] == run_id
        assert len(list(folder.glob("wandb/offline-run-*"))) == 1
        found = records(folder, run_id)
        run = next(record["run"] for record in found if record["type"] == "run")
        assert run["run_id"] == run_id and {"mine", "W2A2"} <= set(run["tags"])
        history = {r["history"]["item"]["epoch"]: r["history"]["item"] for r in found if r["type"] == "history"}
        assert sorted(history) == [1, 2]
        for row in rows(folder / "levels.jsonl"):
            figures = {k: v for k, v in row.items() if type(v) in (int, float) and k != "epoch"}
            assert len(figures) > 15
            for key, value in figures.items():
                assert history[row["epoch"]][f"sites/{row['site']}/{key}"] == pytest.approx(value, rel=1e-12)
        for row in rows(folder / "metrics.jsonl"):
            for key, value in row.items():
                assert value is None or history[row["epoch"]][key] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_wandb_that_fails_is_warned_of_once_and_kills_nothing(tmp_path, cache, monkeypatch, caplog, where):
    def broken(*args, **kwargs):
        raise wandb.errors.CommError("no such luck")

    class Run:
        summary = {}  # noqa: RUF012
        id = "abc"

        def define_metric(self, *args, **kwargs): ...
        def log(self, row): ...
        def finish(self, exit_code): ...

    if where != "init":
        monkeypatch.setattr(Run, where, broken)
    monkeypatch.setattr(wandb, "init", broken if where == "init" else lambda **kwargs: Run())
    done = train(tmp_path, cache, "tracking=wandb", "epochs=3")
    assert done["status"] == "completed" and len(rows(tmp_path / "metrics.jsonl")) == 3
    assert caplog.text.count("wandb failed in") == 1 and "no such luck" in caplog.text


def test_tracking_changes_no_figure(tmp_path, cache, digits):
    train(tmp_path, cache, *DIGITS, "tracking=wandb", "tracking.mode=disabled")
    assert timeless(tmp_path / "metrics.jsonl") == timeless(digits / "metrics.jsonl")
    assert summary(tmp_path)["config_hash"] == summary(digits)["config_hash"]


def test_alpha_sites_of_best_pt_are_those_of_the_levels(digits):
    cfg = config(*DIGITS)
    model = make(cfg.model, num_classes=10, in_channels=1)
    quantize(model, torch.randn(4, 1, 8, 8), make(cfg.quantizer))
    best = torch.load(digits / "best.pt", weights_only=True)
    model.load_state_dict(best["model"])
    assert same_tensors(
        {k: v for k, v in model.state_dict().items() if "alpha" in k},
        {k: v for k, v in best["model"].items() if "alpha" in k},
    )
    for name, site in sites(model).items():
        (row,) = [row for row in by_site(digits)[name] if row["epoch"] == best["epoch"]]
        assert site.alpha.item() == pytest.approx(row["alpha"], rel=1e-6)


def test_an_evaluation_that_does_not_fit_is_halved_until_it_does(tmp_path, cache, monkeypatch, caplog):
    """On a device whose memory holds 20 pictures at once; a size that was asked for is not changed."""
    from brqat import fit

    sizes, evaluate = [], fit.evaluate

    def small_device(model, batches):
        def seen(batches):
            for images, labels in batches:
                sizes.append(len(images))
                if len(images) > 20:
                    raise torch.OutOfMemoryError("no room")
                yield images, labels

        return evaluate(model, seen(batches))

    monkeypatch.setattr(fit, "evaluate", small_device)
    caplog.set_level("INFO")
    train(tmp_path / "run", cache, *SYNTHETIC, "pretrained=none")
    assert sizes[0] > 20 and 10 < max(sizes[-3:]) <= 20
    assert caplog.text.count("more do not fit") == len([size for size in sizes if size > 20])
    with pytest.raises(torch.OutOfMemoryError):
        train(tmp_path / "asked", cache, *SYNTHETIC, "pretrained=none", "eval_batch_size=21")
