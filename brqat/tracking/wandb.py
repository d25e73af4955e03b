"""A copy of the run on Weights & Biases: offline unless told otherwise, and never a reason for a run to die."""

import functools
import logging
import math
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from brqat.tracking.files import Identity

log = logging.getLogger(__name__)

PER_BIN_UP_TO = 4  # bits
MODES = ("offline", "online", "disabled")


def _never_fatal(method: Callable) -> Callable:
    """A dashboard that fails is reported once and then left alone: training goes on, the files hold everything."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        if self.broken:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.broken = True
            log.warning(
                "wandb failed in %s and is off for the rest of this run (%s: %s). Nothing is lost: the run's folder "
                "holds every figure.",
                method.__name__,
                type(error).__name__,
                error,
            )

    return call


class WandbRun:
    """tracking=wandb. mode offline needs no account and no network; `wandb sync` sends the run later."""

    def __init__(
        self,
        project: str,
        mode: str = "offline",
        group: str | None = None,
        name: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
    ):
        if mode not in MODES:
            raise ValueError(f"tracking.mode={mode!r} is not known. Write one of {', '.join(MODES)}.")
        if isinstance(tags, str):
            raise ValueError(f"tracking.tags={tags!r} is one text, not a list. Write tracking.tags=[{tags}].")
        self.project, self.mode, self.group, self.name, self.job_type = project, mode, group, name, job_type
        self.tags = list(tags or [])
        self.broken = False
        self.run = None
        self.run_id: str | None = None

    @_never_fatal
    def start(self, folder: Path, config: dict, tags: list[str], identity: Identity, past: list) -> None:
        """Opens the run. identity: with the id of a run that is resumed; past: what add_epoch was given before.

        Offline, a resumed run writes its past again, since a kill may have lost what wandb had not yet written; the
        cut-off copy moves to wandb/superseded so that a sync does not send both.
        """
        import wandb

        if self.mode == "offline":
            for partial in folder.glob("wandb/offline-run-*"):
                (folder / "wandb" / "superseded").mkdir(exist_ok=True)
                shutil.move(partial, folder / "wandb" / "superseded" / partial.name)
        self.run = wandb.init(
            project=self.project,
            group=self.group or identity.group,
            name=identity.name or self.name,
            job_type=identity.job_type or self.job_type,
            tags=[*self.tags, *tags],
            config=config,
            dir=folder,
            id=identity.run_id or secrets.token_hex(4),
            mode=self.mode,
            resume="allow",
            reinit="finish_previous",  # several runs in one process are several runs, not one that grows
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )
        self.run_id = self.run.id if self.mode != "disabled" else None
        self.run.define_metric("epoch")
        self.run.define_metric("*", step_metric="epoch")
        if self.mode == "offline":
            for epoch in past:
                self._log(*epoch)

    @_never_fatal
    def add_epoch(self, metrics: dict, levels: list[dict], histograms: dict[str, np.ndarray]) -> None:
        """histograms: arrays as in histograms.npz, SITE@EPOCH and SITE@edges."""
        self._log(metrics, levels, histograms)

    def _log(self, metrics: dict, levels: list[dict], histograms: dict[str, np.ndarray]) -> None:
        import wandb

        row = _flat(metrics, levels)
        for key, counts in histograms.items():
            site, _, which = key.rpartition("@")
            if which != "edges":
                row[f"histogram/{site}"] = wandb.Histogram(np_histogram=(counts, histograms[f"{site}@edges"]))
        self.run.log(row)

    @_never_fatal
    def finish(self, summary: dict[str, Any]) -> None:
        if self.run is None:
            return
        self.run.summary.update({key: value for key, value in summary.items() if key != "versions"})
        self.run.finish(exit_code=0 if summary["status"] in ("completed", "pruned") else 1)
        self.run = None


def _flat(metrics: dict, levels: list[dict]) -> dict[str, float]:
    """The figures of an epoch under one name each: sites/SITE/FIGURE, and sites/SITE/FIGURE/CODE per bin.

    Bins of 8-bit sites stay in levels.jsonl: 256 of them a figure make no chart.
    """
    row = {key: value for key, value in metrics.items() if value is not None}
    for site in levels:
        for key, value in site.items():
            if key != "epoch" and isinstance(value, (int, float)) and not isinstance(value, bool):
                row[f"sites/{site['site']}/{key}"] = value
            elif isinstance(value, list) and site["bits"] <= PER_BIN_UP_TO:
                for code, entry in zip(site["codes"], value, strict=True):
                    if key != "codes" and entry is not None and math.isfinite(entry):
                        row[f"sites/{site['site']}/{key}/{code}"] = entry
    return row
