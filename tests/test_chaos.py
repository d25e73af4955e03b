"""Studies whose workers are killed, stopped or run out of disk end with the trials that they were to have.

python tests/test_chaos.py --repeat 5      # the three chaos tests, five times each
"""

import argparse
import contextlib
import csv
import itertools
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import optuna
import postgresql
import pytest
from nursery import Nursery, Worker
from optuna.trial import TrialState
from runs import BASE, REPO, SYNTHETIC, rows, summary

from brqat.study.ledger import Ledger, Rules, Space
from brqat.study.storage import open_storage

PATIENCE_S = 120
KINDS = ("sqlite", "journal", "postgresql")
N_CHAOS, EPOCHS = 30, 6
MOST_KILLS = 20
FULL = "Nothing is lost: make room and give the same command again."


class Sweep:
    """A study in a folder, and the workers that this test has started in it."""

    def __init__(self, nursery: Nursery, folder: Path, storage: str, *overrides: str):
        self.nursery, self.folder, self.storage = nursery, folder, storage
        self.started: list[Worker] = []
        self.ended: list[Worker] = []  # as they should
        self.name = "lambda_only"
        given = (
            *BASE,
            *SYNTHETIC,
            "sweep=lambda_only",
            "pretrained=none",
            f"hydra.sweep.dir={folder}",
            f"hydra.sweeper.storage={storage}",
            "hydra.sweeper.heartbeat_s=1",
            "hydra.sweeper.max_retry=1000",
            *overrides,
        )
        self.overrides = list({override.partition("=")[0]: override for override in given}.values())
        # Not in the study's folder, whose disk a test may fill.
        self.logs = Path(tempfile.mkdtemp(prefix="workers-", dir=folder.parent.parent))
        self.env = {"OMP_NUM_THREADS": "1", "BRQAT_CACHE": str(self.logs / "cache")}

    def start(self, *more: str, hook: tuple[str, int] | None = None) -> Worker:
        """A worker: the same command each time, but for more. hook: where it kills itself, see nursery.py."""
        log = self.logs / f"{len(self.started)}.log"
        self.started.append(self.nursery.start(log, ["-m", *self.overrides, *more], self.env, hook))
        return self.started[-1]

    def killed(self, name: str, counts) -> None:
        """Workers one after the other, of which each dies where its hook says."""
        for count in counts:
            self.ends(self.start(hook=(name, count)), -signal.SIGKILL)

    def ends(self, worker: Worker, code: int) -> str:
        """Its output, once it has ended with this code."""
        found, text = worker.wait(), worker.log.read_text()
        assert found == code, text[-4000:]
        self.ended.append(worker)
        return text

    def stop(self) -> None:
        for worker in self.started:
            worker.kill()
            worker.wait()

    # ---- what the study holds

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """Read with a connection of its own, as another machine would."""
        storage = open_storage(self.storage, self.folder, create=False).optuna
        return storage.get_all_trials(storage.get_study_id_from_name(self.name))

    def owner(self, number: int) -> int | None:
        """The pid of the process that runs a trial, None if none does."""
        trial = self.trials()[number]
        return trial.user_attrs.get("lease", {}).get("pid") if trial.state == TrialState.RUNNING else None

    def retries(self, number: int) -> int:
        return self.trials()[number].user_attrs["lease"]["retries"]

    def folders(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdigit())

    def unfinished(self) -> list[int]:
        """Trials that have a checkpoint and no summary."""
        return [
            number
            for number in self.folders()
            if (self.folder / f"{number}" / "last.pt").exists()
            and not (self.folder / f"{number}" / "summary.json").exists()
        ]

    def lines(self, number: int) -> int:
        """Epochs that a trial has written."""
        path = self.folder / f"{number}" / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def resumed(self, number: int) -> int:
        return (self.folder / f"{number}" / "train.log").read_text().count("resumed after epoch")

    # ---- waiting

    def wait_for(self, holds, what: str) -> None:
        """Until holds() is true; whoever was started must not have failed."""
        until = time.monotonic() + PATIENCE_S
        while not holds():
            for worker in self.started:
                known = worker in self.ended or worker.poll() in (None, 0, -signal.SIGKILL)
                assert known, worker.log.read_text()[-4000:]
            assert time.monotonic() < until, f"never came: {what}"
            time.sleep(0.005)

    def wait_for_epoch(self, number: int, epochs: int = 1) -> None:
        self.wait_for(lambda: self.lines(number) >= epochs, f"epoch {epochs} of trial {number}")


def assert_whole(sweep: Sweep, n_trials: int, epochs: int) -> None:
    """The study is what it would have been had nothing been killed."""
    trials = sweep.trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * n_trials
    assert [trial.number for trial in trials] == list(range(n_trials)) == sweep.folders()
    settings = [tuple(sorted(trial.user_attrs["setting"].items())) for trial in trials]
    assert len(set(settings)) == n_trials
    hashes = set()
    for trial in trials:
        folder = sweep.folder / f"{trial.number}"
        left = summary(folder)
        assert left["status"] == "completed"
        assert (left["study_name"], left["trial_number"]) == (sweep.name, trial.number)
        assert [left["objective"]] == trial.values and trial.user_attrs["run"]["val_acc"] == left["val_acc"]
        assert trial.user_attrs["run"]["folder"] == str(folder)
        assert [row["epoch"] for row in rows(folder / "metrics.jsonl")] == list(range(1, epochs + 1))
        hashes.add(left["config_hash"])
        assert not list(folder.glob("*.tmp")) and not (folder / ".best.next.pt").exists()
    assert len(hashes) == n_trials
    written = (sweep.folder / "trials.csv").read_text().splitlines()
    assert len(written) == n_trials + 1 and "unfinished: 0" in (sweep.folder / "optimization_results.yaml").read_text()


@pytest.fixture(scope="module")
def nursery():
    with contextlib.closing(Nursery(REPO)) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def server():
    with postgresql.server() as address:
        yield address


@pytest.fixture
def storage_of(request, tmp_path):
    """From a kind to what hydra.sweeper.storage is to be."""

    def storage_of(kind: str) -> str:
        if kind != "postgresql":
            return kind
        return postgresql.database(request.getfixturevalue("server"), f"{tmp_path.name}")

    return storage_of


@pytest.fixture
def sweep_of(tmp_path, nursery, storage_of):
    """Makes a sweep; its workers are killed when the test ends."""
    made = []

    def sweep_of(kind: str, *overrides: str, folder: Path | None = None) -> Sweep:
        made.append(Sweep(nursery, folder or tmp_path / "study" / "sweep", storage_of(kind), *overrides))
        return made[-1]

    (tmp_path / "study").mkdir()
    yield sweep_of
    for sweep in made:
        sweep.stop()


# ---- chaos


def chaos(sweep: Sweep, seed: int) -> dict[str, int]:
    """Three workers, of which one after the other, or all, are killed at a moment drawn, and replaced."""
    draw = random.Random(seed)
    count = dict.fromkeys(("kills", "in training", "between", "whenever"), 0)
    workers = [sweep.start() for _ in range(3)]
    cut: set[int] = set()  # trials killed after their first checkpoint

    def over() -> bool:
        return any(worker.poll() == 0 for worker in workers)

    def grown(glob: str) -> int | None:
        """Waits for a file of the glob to be written to; the trial it is of."""
        before = {path: path.stat().st_size for path in sweep.folder.glob(glob)}
        until = time.monotonic() + PATIENCE_S
        while not over():
            for path in sweep.folder.glob(glob):
                with contextlib.suppress(FileNotFoundError):  # renamed under our eyes
                    if path.stat().st_size != before.get(path):
                        return int(path.parent.name)
            assert time.monotonic() < until, f"nothing is written to {glob}"
            time.sleep(0.002)
        return None

    while count["kills"] < MOST_KILLS and not over():
        time.sleep(draw.uniform(0.2, 2.0))
        moment = draw.choice(["in training", "in training", "between", "whenever"])
        if moment == "in training":  # about where the checkpoint is written
            number, delay = grown("*/metrics.jsonl"), draw.uniform(0, 0.04)
        elif moment == "between":  # told, asking, claiming
            number, delay = grown("*/summary.json"), draw.uniform(0, 0.25)
        else:
            number, delay = None, draw.uniform(0, 1)
        pid = sweep.owner(number) if number is not None else None
        time.sleep(delay)
        victims = [worker for worker in workers if worker.pid == pid] or [draw.choice(workers)]
        if draw.random() < 0.15:
            victims = workers
        for worker in victims:
            worker.kill()
        for worker in victims:
            if worker.wait() != 0:
                count["kills"] += 1
                count[moment] += 1
                cut |= {number for number in sweep.unfinished() if sweep.owner(number) == worker.pid}
        workers = [sweep.start() if worker in victims else worker for worker in workers]
    for worker in workers:
        sweep.ends(worker, 0)
    assert_whole(sweep, N_CHAOS, EPOCHS)
    given_back = [number for number in sweep.folders() if sweep.retries(number) > 0]
    count["given back"] = len(given_back)
    count["resumed"] = sum(sweep.resumed(number) > 0 for number in sweep.folders())
    assert count["kills"] > 5 and given_back, count
    assert cut and cut <= set(given_back)
    assert all(sweep.resumed(number) for number in cut), f"of {cut} some began anew"
    return count


def chaos_overrides() -> tuple[str, ...]:
    return (f"hydra.sweeper.n_trials={N_CHAOS}", f"epochs={EPOCHS}", f"warmup_epochs={EPOCHS // 3}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_study_whose_workers_are_killed_again_and_again_has_each_trial_once(sweep_of, kind):
    seed = int(os.environ.get("CHAOS_SEED", "0"))
    print(f"CHAOS_SEED={seed}")  # pytest shows it if the test fails
    print(chaos(sweep_of(kind, *chaos_overrides()), seed))


def main() -> None:
    """Chaos again and again, with a line for each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the first repetition")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        nursery = stack.enter_context(contextlib.closing(Nursery(REPO)))
        address = stack.enter_context(postgresql.server()) if "postgresql" in given.kinds else None
        for seed, kind in itertools.product(range(given.seed, given.seed + given.repeat), given.kinds):
            top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="brqat-chaos-")))
            (top / "study").mkdir()
            storage = postgresql.database(address, f"chaos{seed}") if kind == "postgresql" else kind
            sweep, started = Sweep(nursery, top / "study" / "sweep", storage, *chaos_overrides()), time.monotonic()
            try:
                count = chaos(sweep, seed)
            finally:
                sweep.stop()
            print(f"{kind} seed {seed}: {count}, {time.monotonic() - started:.0f} s", flush=True)


# ---- killed at a certain place


@pytest.mark.slow
def test_study_killed_between_trials_goes_on_where_it_was(sweep_of):
    sweep = sweep_of("sqlite", "hydra.sweeper.n_trials=4")
    sweep.killed("between_trials", [1, 2, 3])
    assert [trial.state.name for trial in sweep.trials()] == ["COMPLETE"] * 3
    sweep.ends(sweep.start(), 0)
    assert_whole(sweep, 4, 2)
    assert [sweep.retries(number) for number in range(4)] == [0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["checkpoint_half", "checkpoint_whole"])
def test_study_killed_while_writing_checkpoints_has_each_trial_once(sweep_of, hook):
    sweep = sweep_of("sqlite", "hydra.sweeper.n_trials=3", "epochs=4")
    counts = [1, 2, 3, 4, 5, 6]
    sweep.killed(hook, counts)
    sweep.ends(sweep.start(), 0)
    assert_whole(sweep, 3, 4)
    assert sum(sweep.retries(number) for number in range(3)) == len(counts)
    assert sweep.resumed(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_study_killed_at_every_write_to_its_storage_has_each_trial_once(sweep_of, kind):
    sweep = sweep_of(kind, "hydra.sweeper.n_trials=30", "epochs=1")
    counts = range(1, 25) if kind == "journal" else range(1, 80, 3)  # SQL: a statement, its commit, the next
    sweep.killed("storage", counts)
    sweep.ends(sweep.start(), 0)
    assert_whole(sweep, 30, 1)


def test_trial_is_not_told_while_another_worker_looks_for_the_dead(tmp_path):
    """It would see a row that runs, then that its process has let go of it, and make the finished row wait."""
    storage = open_storage(None, tmp_path)
    ledger = Ledger(storage, optuna.create_study(storage=storage.optuna).study_name, Rules(1, 1, 0, 0))
    asked = ledger.next_trial(Space({}, []), lambda number: optuna.samplers.RandomSampler())
    (tmp_path / "0").mkdir()

    def run() -> None:
        with ledger.claimed(asked.number, asked.token, tmp_path / "0"):
            running.set()
            locked.wait(PATIENCE_S)
            ledger.tell(0, asked.token, {}, TrialState.COMPLETE, [1.0], {}, optuna.samplers.RandomSampler())

    running, locked, thread = threading.Event(), threading.Event(), threading.Thread(target=run)
    thread.start()
    assert running.wait(PATIENCE_S)
    with storage.exclusive():
        (row,) = ledger.trials()
        locked.set()
        thread.join(0.5)
        assert thread.is_alive() and row.state == TrialState.RUNNING and ledger._dead(row) is None
    thread.join(PATIENCE_S)
    assert ledger.row(0).state == TrialState.COMPLETE


@pytest.mark.slow
def test_float_baseline_of_a_killed_worker_is_gone_on_with_by_the_other(sweep_of):
    given = ("hydra.sweeper.n_trials=4", "pretrained=auto", "pretrain_epochs=12", "model.width=32")
    sweep = sweep_of("sqlite", *given)
    both = [sweep.start(), sweep.start()]
    cache = Path(sweep.env["BRQAT_CACHE"])

    def epochs() -> list[dict]:
        return [row for path in cache.glob("float/*/metrics.jsonl") for row in rows(path)]

    def trains(worker: Worker) -> bool:
        return "training the float baseline, once" in worker.log.read_text()

    sweep.wait_for(lambda: len(epochs()) >= 3, "the baseline's third epoch")
    (trainer,) = [worker for worker in both if trains(worker)]
    (other,) = [worker for worker in both if worker is not trainer]
    trainer.kill()
    assert trainer.wait() == -signal.SIGKILL
    before = epochs()
    sweep.ends(other, 0)
    assert trains(other)
    after = epochs()
    assert [row["epoch"] for row in after] == list(range(1, 13)) and 3 <= len(before) < 12
    assert after[: len(before) - 1] == before[:-1]  # seconds too: they were not trained again
    assert_whole(sweep, 4, 2)
    assert all(summary(sweep.folder / f"{number}")["float_test_acc"] is not None for number in range(4))


@pytest.mark.slow
def test_batch_jobs_go_on_when_their_controller_is_killed(sweep_of):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="no launcher: pip install brqat[slurm]")
    given = ("hydra/launcher=submitit_local", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=4", "epochs=30")
    sweep = sweep_of("sqlite", *given)
    controller = sweep.start()
    sweep.wait_for_epoch(0)
    sweep.wait_for_epoch(1)
    controller.kill()
    assert controller.wait() == -signal.SIGKILL
    sweep.ends(sweep.start(), 0)
    assert_whole(sweep, 4, 30)
    assert [sweep.retries(number) for number in range(4)] == [0] * 4
    assert [sweep.resumed(number) for number in range(4)] == [0] * 4


# ---- stopped

LONG = ("hydra.sweeper.n_trials=2", "epochs=40")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_worker_gives_its_trial_back_and_writes_what_the_study_has(sweep_of, number, code):
    sweep = sweep_of("sqlite", *LONG)
    worker = sweep.start()
    sweep.wait_for_epoch(1, 2)
    worker.send_signal(number)
    output = sweep.ends(worker, code)
    assert "Traceback" not in output and output.endswith("trial 1 waits for a worker again: interrupted\n")
    assert [trial.state.name for trial in sweep.trials()] == ["COMPLETE", "WAITING"]
    assert [sweep.retries(number) for number in (0, 1)] == [0, 0]
    assert summary(sweep.folder / "1")["status"] == "interrupted"
    assert "unfinished: 1" in (sweep.folder / "optimization_results.yaml").read_text()
    table = list(csv.DictReader((sweep.folder / "trials.csv").open()))
    assert [(row["number"], row["state"]) for row in table] == [("0", "COMPLETE"), ("1", "WAITING")]
    sweep.ends(sweep.start(), 0)
    assert_whole(sweep, 2, 40)
    assert sweep.resumed(1) == 1 and sweep.resumed(0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("pause_s", [0.001, 0.02, 0.2])
def test_worker_stopped_twice_ends_at_once_and_loses_nothing(sweep_of, pause_s):
    sweep = sweep_of("sqlite", *LONG)
    worker = sweep.start()
    sweep.wait_for_epoch(1, 2)
    worker.send_signal(signal.SIGINT)
    time.sleep(pause_s)
    worker.send_signal(signal.SIGINT)
    assert worker.wait() in (130, 1, -signal.SIGINT), worker.log.read_text()
    assert sweep.lines(1) < 40 and sweep.trials()[0].state == TrialState.COMPLETE
    sweep.ends(sweep.start(), 0)
    assert_whole(sweep, 2, 40)
    assert sweep.resumed(1) == 1 and sweep.retries(1) <= 1


@pytest.mark.slow
def test_worker_that_waits_for_another_is_stopped_by_sigterm(sweep_of):
    sweep = sweep_of("sqlite", *LONG)
    busy = sweep.start()
    sweep.wait_for_epoch(1)
    idle = sweep.start()
    sweep.wait_for(lambda: "waiting for trial 1 of other workers" in idle.log.read_text(), "an idle worker")
    idle.send_signal(signal.SIGTERM)
    assert "Traceback" not in sweep.ends(idle, 143)
    assert (sweep.folder / "trials.csv").exists()
    sweep.ends(busy, 0)
    assert_whole(sweep, 2, 40)
    assert sweep.retries(1) == 0


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, of 32 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True, text=True
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip(f"no small disk without the right to mount one: {mounted and mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Takes all room but for `leave` bytes; the file that holds it."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    os.truncate(filler, max(0, filler.stat().st_size - leave))
    return filler


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_full_disk_stops_the_worker_with_a_sentence_and_fails_no_trial(sweep_of, small_disk, kind):
    """Each round another write is the first that finds no room."""
    given = ("hydra.sweeper.n_trials=8", "epochs=12")
    sweep = sweep_of(kind, *given, folder=small_disk / "sweep")
    for number, leave in enumerate((0, 1 << 12, 1 << 14, 1 << 16, 1 << 18)):
        worker = sweep.start()
        sweep.wait_for_epoch(number, 2)
        filler = fill(small_disk, leave)
        output = sweep.ends(worker, 1)
        assert FULL in output.splitlines()[-1], output[-4000:]
        filler.unlink()
        assert not [trial.number for trial in sweep.trials() if trial.state == TrialState.FAIL]
    filler = fill(small_disk, 0)
    output = sweep.ends(sweep.start(), 1)  # full from the start
    assert FULL in output.splitlines()[-1], output[-4000:]
    filler.unlink()
    sweep.ends(sweep.start(), 0)
    assert_whole(sweep, 8, 12)


if __name__ == "__main__":
    main()
