"""A copy of the run on Weights & Biases: offline unless told otherwise, and never a reason for a run to die."""

import functools
import logging
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

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
        tags: list[str] | None = None,
    ):
        if mode not in MODES:
            raise ValueError(f"tracking.mode={mode!r} is not known. Write one of {', '.join(MODES)}.")
        self.project, self.mode, self.group, self.name = project, mode, group, name
        self.tags = list(tags or [])
        self.broken = False
        self.run = None
        self.run_id: str | None = None

    @_never_fatal
    def start(self, folder: Path, config: dict, tags: list[str], run_id: str | None, past: list) -> None:
        """Opens the run. run_id: of the run that is resumed; past: its epochs as (metrics, levels), replayed offline.

        Offline, a resumed run writes its past again, since a kill may have lost what wandb had not yet written; the
        cut-off copy moves to wandb/superseded so that a sync does not send both.
        """
        import wandb

        if run_id and self.mode == "offline":
            for partial in folder.glob(f"wandb/offline-run-*-{run_id}"):
                (folder / "wandb" / "superseded").mkdir(exist_ok=True)
                shutil.move(partial, folder / "wandb" / "superseded" / partial.name)
        self.run = wandb.init(
            project=self.project,
            group=self.group,
            name=self.name,
            tags=[*self.tags, *tags],
            config=config,
            dir=folder,
            id=run_id or secrets.token_hex(4),
            mode=self.mode,
            resume="allow",
            reinit="finish_previous",  # several runs in one process are several runs, not one that grows
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )
        self.run_id = self.run.id
        self.run.define_metric("epoch")
        self.run.define_metric("*", step_metric="epoch")
        if self.mode == "offline":
            for metrics, levels in past:
                self.run.log(_flat(metrics, levels))

    @_never_fatal
    def add_epoch(self, metrics: dict, levels: list[dict], histograms: dict[str, np.ndarray]) -> None:
        """histograms: arrays as in histograms.npz, SITE@EPOCH and SITE@edges."""
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
    """The scalars of an epoch under one name each: sites/SITE/FIGURE for a site's."""
    row = {key: value for key, value in metrics.items() if value is not None}
    for site in levels:
        for key, value in site.items():
            if key != "epoch" and isinstance(value, (int, float)) and not isinstance(value, bool):
                row[f"sites/{site['site']}/{key}"] = value
    return row
