"""Run folders as brqat leaves them, with figures that a test has chosen."""

import json
from pathlib import Path

import numpy as np
import yaml


def edges_of(qn: int, qp: int, bars_per_step: int) -> np.ndarray:
    """From one step below qn to one above qp, every level in the middle of a bar: brqat.metrics' edges."""
    half = 0.5 / bars_per_step
    return np.linspace(qn - 1 - half, qp + 1 + half, (qp - qn + 2) * bars_per_step + 2)


def write_run(
    folder: Path, *, lambda_br=1.0, bits=2, policy="learnable", seed=0, epochs=6, warmup=2, summary=None, **settings
) -> Path:
    """A run as brqat leaves it: two layers of few bits and an 8-bit one, values that gather after warmup."""
    config = {
        "quantizer": {"bits": bits, "first_last_bits": 8},
        "alpha_policy": {"weight": policy, "act": policy},
        "regularizer": {
            "_target_": "brqat.regularizer.binreg.BinReg",
            "lambda_br": lambda_br,
            "normalize": "paper",
        },
        "seed": seed,
        "epochs": epochs,
        "warmup_epochs": warmup,
        "wandb": {"name": folder.name},
        "trial": {"number": seed, "lease": folder.name},
        "resume": str(folder),
    }
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/config.yaml").write_text(yaml.safe_dump(config | settings, sort_keys=False))
    rng = np.random.default_rng(seed)
    metrics, levels, histograms = [], [], {}
    sites = [
        (f"{layer}.{part}", width)
        for layer, width in {"conv1": 8, "layer1.0.conv1": bits, "layer1.0.conv2": bits}.items()
        for part in ("weight", "input")
    ]
    for epoch in range(epochs + 1):
        gathered = max(0, epoch - warmup) / epochs * min(lambda_br, 1)
        if epoch:
            metrics.append({
                "epoch": epoch, "train/loss": 2 / epoch, "train/ce": 2 / epoch + 0.05 * rng.random(),
                "train/br": 0.0 if epoch <= warmup else 9 * (1 - gathered) ** 2,
                "val/acc": 1 - 0.5 / epoch + 0.01 * rng.random(), "seconds": 1.5,
            })  # fmt: skip
        for site, width in sites:
            act = site.endswith("input")
            levels.append({
                "epoch": epoch, "site": site, "kind": "act" if act else "weight", "bits": width,
                "effectiveness": 50 + 45 * gathered - 4 * rng.random() if width == bits else 50.0,
                "clip_fraction": 0.04 * (1 - gathered) + 0.01 * rng.random(),
                "flip_rate": 0.2 / epoch if epoch else None,
                "alpha_drift": 0.1 * gathered * rng.random() if epoch >= warmup else None,
                "alpha_path": 0.2 * gathered if epoch >= warmup else None,
                "oscillation_share": None if act else 0.01 * rng.random(),
            })  # fmt: skip
            if epoch in (0, warmup, epochs):
                u = rng.normal(0, 1.2, 4000)
                u = np.maximum(u, 0) if act else u
                qn, qp = (0, 2**width - 1) if act else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
                u += gathered * (np.clip(np.round(u), qn, qp) - u)
                edges = edges_of(qn, qp, 32 if width < 8 else 1)
                histograms[f"{site}@edges"] = edges
                histograms[f"{site}@{epoch}"] = np.histogram(np.clip(u, edges[0], edges[-1]), edges)[0]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "levels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in levels))
    np.savez(folder / "histograms.npz", **histograms)
    if summary is not None:
        whole = {
            "status": "completed",
            "test_acc": 0.9,
            "val_acc": 0.91,
            "float_test_acc": 0.99,
            "seconds": 10.0,
        }
        whole |= {"objective": 0.91, "seed": seed, "versions": {"torch": "2.9"}, "weight_bits": bits, "act_bits": bits}
        whole |= {"weight_bytes": 1000 * bits, "bops": 10000 * bits**2, "best_epoch": epochs}
        (folder / "summary.json").write_text(json.dumps(whole | summary))
    return folder
