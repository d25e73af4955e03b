"""The files a run leaves in its folder. They are the truth; a dashboard gets a copy.

metrics.jsonl    a line per epoch
levels.jsonl     a line per site and epoch
histograms.npz   counts of v / alpha per site: SITE@EPOCH, with the edges under SITE@edges
summary.json     written last
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brqat.files import append_jsonl, read_jsonl, write_json, write_whole


class Identity(NamedTuple):
    """How a dashboard is to know a run; None leaves it to the config and the dashboard."""

    run_id: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None


class RunFiles:
    """Reads and writes the files of one run folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        self.levels = folder / "levels.jsonl"
        self.histograms = folder / "histograms.npz"
        self.summary = folder / "summary.json"
        self.last = folder / "last.pt"
        self.best = folder / "best.pt"
        self.next_best = folder / ".best.next.pt"

    def add_epoch(self, metrics: dict, levels: list[dict], histograms: dict[str, np.ndarray]) -> None:
        append_jsonl(self.levels, levels)
        self.add_histograms(histograms)
        append_jsonl(self.metrics, [metrics])

    def add_histograms(self, arrays: dict[str, np.ndarray]) -> None:
        if arrays:
            arrays = self.read_histograms() | arrays
            write_whole(self.histograms, lambda file: np.savez_compressed(file, **arrays))

    def read_histograms(self) -> dict[str, np.ndarray]:
        if not self.histograms.exists():
            return {}
        with np.load(self.histograms) as stored:
            return dict(stored)

    def cut_after(self, epoch: int) -> None:
        """Drops what was written after the checkpoint of this epoch, and what a kill left half-written."""
        for path in self.folder.glob(".*.tmp"):  # write_whole's; only one process is in the folder
            path.unlink(missing_ok=True)
        for path in (self.metrics, self.levels):
            if path.exists():
                rows = [row for row in read_jsonl(path) if row["epoch"] <= epoch]
                write_whole(
                    path,
                    lambda file, rows=rows: file.write("".join(json.dumps(r) + "\n" for r in rows).encode()),
                )
        kept = {
            key: array
            for key, array in self.read_histograms().items()
            if key.endswith("@edges") or int(key.rpartition("@")[2]) <= epoch
        }
        if kept:
            write_whole(self.histograms, lambda file: np.savez_compressed(file, **kept))

    def clear(self) -> None:
        """Removes the run."""
        for path in (self.summary, self.last, self.best, self.next_best, self.metrics, self.levels, self.histograms):
            path.unlink(missing_ok=True)

    def epochs(self) -> list[tuple[dict, list[dict], dict[str, np.ndarray]]]:
        """What add_epoch was given, epoch by epoch."""
        histograms = self.read_histograms()
        levels: dict[int, list[dict]] = {}
        for row in read_jsonl(self.levels):
            levels.setdefault(row["epoch"], []).append(row)
        return [
            (row, levels.get(row["epoch"], []), of_epoch(histograms, row["epoch"])) for row in read_jsonl(self.metrics)
        ]

    def write_summary(self, summary: dict) -> None:
        write_json(self.summary, summary)

    def read_summary(self) -> dict | None:
        """The summary, or None where there is none."""
        return json.loads(self.summary.read_text()) if self.summary.exists() else None


def of_epoch(histograms: dict[str, np.ndarray], epoch: int) -> dict[str, np.ndarray]:
    """The arrays of one epoch, with their edges."""
    sites = [key.rpartition("@")[0] for key in histograms if key.endswith(f"@{epoch}")]
    return {f"{site}@{which}": histograms[f"{site}@{which}"] for site in sites for which in (epoch, "edges")}


class NoDashboard:
    """tracking=files: the run's own files and nothing else."""

    run_id = None

    def start(self, folder: Path, config: dict, tags: list[str], identity: Identity, past: list) -> None: ...

    def add_epoch(self, metrics: dict, levels: list[dict], histograms: dict[str, np.ndarray]) -> None: ...

    def finish(self, summary: dict[str, Any]) -> None: ...
