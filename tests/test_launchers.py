"""Studies whose trials run in jobs of Slurm, Ray and joblib have each trial once, whatever is killed."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import postgresql
import pytest
import slurm
import yaml
from runs import BASE, REPO, SYNTHETIC, rows, summary

from brqat.study.storage import open_storage

pytestmark = pytest.mark.slow  # each starts several processes that import torch

PATIENCE_S = 240
EPOCHS = 2
MANY_EPOCHS = 30  # enough to be caught in training


def needs(plugin: str, extra: str) -> None:
    if importlib.util.find_spec(f"hydra_plugins.{plugin}") is None:
        pytest.skip(f"no {plugin}: pip install 'brqat[{extra}]'")


class Controller:
    """A study in a folder, and the commands that this test starts for it, all the same but for what is given."""

    def __init__(self, folder: Path, env: dict[str, str], *overrides: str):
        self.folder, self.started = folder / "sweep", []
        given = (
            *BASE,
            *SYNTHETIC,
            f"epochs={EPOCHS}",
            "sweep=lambda_only",
            "pretrained=none",
            f"hydra.sweep.dir={self.folder}",
            "hydra.sweeper.heartbeat_s=1",
            "hydra.sweeper.n_jobs=2",
            *overrides,
        )
        self.overrides = list({override.partition("=")[0]: override for override in given}.values())
        self.env = env | {"OMP_NUM_THREADS": "1", "BRQAT_CACHE": str(folder / "cache")}

    def start(self, *more: str) -> subprocess.Popen:
        log = self.folder.parent / f"{len(self.started)}.log"
        words = [sys.executable, "-m", "brqat.train", "-m", *self.overrides, *more]
        with open(log, "w") as out:
            process = subprocess.Popen(words, cwd=REPO, env=self.env, stdout=out, stderr=subprocess.STDOUT)
        process.log = log
        self.started.append(process)
        return process

    def ends(self, process: subprocess.Popen) -> str:
        """Its output, once it has ended well."""
        code = process.wait(PATIENCE_S)
        assert code == 0, process.log.read_text()[-4000:]
        return process.log.read_text()

    def stop(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        storage = open_storage(None, self.folder, create=False).optuna
        return storage.get_all_trials(storage.get_study_id_from_name("lambda_only"))

    def lease(self, number: int) -> dict:
        return self.trials()[number].user_attrs["lease"]

    def pids(self) -> set[int]:
        """Of the processes that ran the trials."""
        return {trial.user_attrs["lease"]["pid"] for trial in self.trials()}

    def lines(self, number: int) -> int:
        """Epochs that a trial has written."""
        path = self.folder / f"{number}" / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for(self, holds, what: str) -> None:
        until = time.monotonic() + PATIENCE_S
        while not holds():
            for process in self.started:
                assert process.poll() in (None, -signal.SIGKILL), process.log.read_text()[-4000:]
            assert time.monotonic() < until, f"never came: {what}\n{self.started[-1].log.read_text()[-4000:]}"
            time.sleep(0.05)

    def in_training(self, number: int) -> None:
        """Waits until a trial has a checkpoint to go on from: it comes after the epoch's line."""
        self.wait_for((self.folder / f"{number}" / "last.pt").exists, f"a checkpoint of trial {number}")
        assert self.lines(number) < MANY_EPOCHS, "the trial was too fast to be caught in training"

    def times_resumed(self, number: int) -> int:
        return (self.folder / f"{number}" / "train.log").read_text().count("resumed after epoch")


def assert_whole(study: Controller, n_trials: int, epochs: int = EPOCHS) -> None:
    """Each trial once: its row, its folder and its run agree."""
    trials = study.trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * n_trials
    folders = sorted(int(path.name) for path in study.folder.glob("*") if path.name.isdigit())
    assert [trial.number for trial in trials] == list(range(n_trials)) == folders
    assert len({tuple(sorted(trial.user_attrs["setting"].items())) for trial in trials}) == n_trials
    for trial in trials:
        folder = study.folder / f"{trial.number}"
        left = summary(folder)
        assert (left["status"], left["study_name"], left["trial_number"]) == ("completed", "lambda_only", trial.number)
        assert [left["objective"]] == trial.values
        assert trial.user_attrs["run"]["config_hash"] == left["config_hash"]
        assert trial.user_attrs["run"]["folder"] == trial.user_attrs["lease"]["folder"] == str(folder)
        assert [row["epoch"] for row in rows(folder / "metrics.jsonl")] == list(range(1, epochs + 1))
    assert len({trial.user_attrs["run"]["config_hash"] for trial in trials}) == n_trials
    assert len((study.folder / "trials.csv").read_text().splitlines()) == n_trials + 1


@pytest.fixture
def study_of(tmp_path):
    """Makes a study; its controllers are killed when the test ends."""
    made = []

    def study_of(*overrides: str, env: dict[str, str] | None = None) -> Controller:
        made.append(Controller(tmp_path, env or dict(os.environ), *overrides))
        return made[-1]

    yield study_of
    for study in made:
        study.stop()


# ---- Slurm


@pytest.fixture(scope="module")
def cluster():
    needs("hydra_submitit_launcher", "slurm")
    with slurm.cluster() as conf:
        yield conf


@pytest.fixture
def slurm_study_of(cluster, study_of):
    """Makes a study on the cluster; it leaves no jobs there."""

    def slurm_study_of(*overrides: str) -> Controller:
        given = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", *overrides)
        return study_of(*given, env=slurm.environment(cluster))

    yield slurm_study_of
    slurm.cancel_all(cluster)


def job_of(study: Controller, number: int) -> str:
    """The id of the job that runs a trial."""
    return yaml.safe_load((study.folder / f"{number}" / ".hydra/hydra.yaml").read_text())["hydra"]["job"]["id"]


def test_slurm_runs_each_trial_once_in_a_job_of_its_own(slurm_study_of):
    study = slurm_study_of("hydra.sweeper.n_trials=4")
    study.ends(study.start())
    assert_whole(study, 4)
    assert len(study.pids()) == 4 and study.started[0].pid not in study.pids()
    assert [study.lease(number)["retries"] for number in range(4)] == [0] * 4


def test_trial_of_a_cancelled_job_goes_on_in_another(cluster, slurm_study_of):
    study = slurm_study_of("hydra.sweeper.n_trials=4", f"epochs={MANY_EPOCHS}")
    controller = study.start()
    study.in_training(0)
    before = study.lease(0)
    assert not slurm.ask(cluster, "scancel", job_of(study, 0))
    study.ends(controller)
    assert_whole(study, 4, MANY_EPOCHS)
    assert study.lease(0)["token"] != before["token"] and study.lease(0)["pid"] != before["pid"]
    assert study.times_resumed(0) == 1


def test_trial_whose_job_is_killed_outright_goes_on_in_another_and_counts_it(cluster, slurm_study_of):
    study = slurm_study_of("hydra.sweeper.n_trials=3", f"epochs={MANY_EPOCHS}")
    controller = study.start()
    study.in_training(1)
    os.kill(study.lease(1)["pid"], signal.SIGKILL)
    study.ends(controller)
    assert_whole(study, 3, MANY_EPOCHS)
    assert [study.lease(number)["retries"] for number in range(3)] == [0, 1, 0]
    assert study.times_resumed(1) == 1


@pytest.mark.parametrize("how", ["by the administrator", "by itself, out of time"])
def test_requeued_job_leaves_each_trial_once(cluster, slurm_study_of, how):
    study = slurm_study_of("hydra.sweeper.n_trials=4", f"epochs={MANY_EPOCHS}")
    controller = study.start()
    study.in_training(0)
    job = job_of(study, 0)
    words = ["scontrol", "requeue", job] if how == "by the administrator" else ["scancel", "--signal=USR2", job]
    slurm.ask(cluster, *words)
    study.wait_for(lambda: "Restarts=1" in slurm.ask(cluster, "scontrol", "show", "job", job), "the job's requeue")
    study.ends(controller)
    assert_whole(study, 4, MANY_EPOCHS)
    assert study.times_resumed(0) == 1


def test_requeued_job_goes_on_with_its_trial_without_a_controller(cluster, slurm_study_of):
    study = slurm_study_of("hydra.sweeper.n_trials=2", f"epochs={MANY_EPOCHS}")
    controller = study.start()
    study.in_training(0)
    before, job = study.lease(0), job_of(study, 0)
    controller.kill()
    controller.wait()
    slurm.ask(cluster, "scancel", "--signal=USR2", job)
    study.wait_for(lambda: study.trials()[0].state.name == "COMPLETE", "the end of the requeued job")
    assert study.lease(0)["token"] == before["token"] and study.lease(0)["pid"] != before["pid"]
    study.ends(study.start())
    assert_whole(study, 2, MANY_EPOCHS)
    assert study.times_resumed(0) == 1


def test_job_that_may_not_be_queued_again_gives_its_trial_back(cluster, slurm_study_of):
    study = slurm_study_of(
        "hydra.sweeper.n_trials=2",
        f"epochs={MANY_EPOCHS}",
        "hydra.launcher.max_num_timeout=0",
        "hydra.launcher.timeout_min=5",  # submitit calls every signal a timeout where it is this short
    )
    controller = study.start()
    study.in_training(0)
    slurm.ask(cluster, "scancel", "--signal=USR2", job_of(study, 0))
    study.ends(controller)
    assert_whole(study, 2, MANY_EPOCHS)
    assert study.lease(0)["retries"] == 1 and study.times_resumed(0) == 1
    assert "timed-out too many times" in (study.folder / "0" / "train.log").read_text()


def test_jobs_tell_the_study_after_their_controller_was_killed(cluster, slurm_study_of):
    study = slurm_study_of("hydra.sweeper.n_trials=6", f"epochs={MANY_EPOCHS}")
    controller = study.start()
    study.in_training(0)
    controller.kill()
    controller.wait()
    out = [trial.number for trial in study.trials() if trial.state.name == "RUNNING"]
    assert 0 in out and len(study.trials()) < 6
    study.wait_for(lambda: not slurm.ask(cluster, "squeue", "--noheader"), "the end of the jobs")
    assert {study.trials()[number].state.name for number in out} == {"COMPLETE"}
    tokens = {number: study.lease(number)["token"] for number in out}
    study.ends(study.start())
    assert_whole(study, 6, MANY_EPOCHS)
    assert {number: study.lease(number)["token"] for number in out} == tokens  # none of them ran again


def test_jobs_that_slurm_refuses_end_the_command_and_cost_no_trial(slurm_study_of):
    study = slurm_study_of("hydra.sweeper.n_trials=3")
    refused = study.start("hydra.launcher.partition=nowhere")
    assert refused.wait(PATIENCE_S) == 1
    assert "no job can be submitted" in refused.log.read_text() and "partition" in refused.log.read_text()
    assert {trial.state.name for trial in study.trials()} <= {"WAITING", "RUNNING"}
    study.started.clear()
    study.ends(study.start())
    assert_whole(study, 3)


# ---- joblib


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_joblib_runs_each_trial_once_in_two_processes(study_of, storage):
    needs("hydra_joblib_launcher", "joblib")
    study = study_of("hydra/launcher=joblib", "hydra.sweeper.n_trials=6", f"hydra.sweeper.storage={storage}")
    text = study.ends(study.start())
    study.trials = lambda: reopened(study, storage)
    assert_whole(study, 6)
    assert len(study.pids()) == 2 and study.started[0].pid not in study.pids()
    assert text.count("is launching 2 jobs") == 3


def reopened(study: Controller, storage: str) -> list[optuna.trial.FrozenTrial]:
    opened = open_storage(storage, study.folder, create=False).optuna
    return opened.get_all_trials(opened.get_study_id_from_name("lambda_only"))


def test_joblib_gives_each_trial_a_wandb_run_of_its_own(study_of):
    needs("hydra_joblib_launcher", "joblib")
    study = study_of("hydra/launcher=joblib", "hydra.sweeper.n_trials=4", "tracking=wandb", "tracking.mode=offline")
    study.ends(study.start())
    assert_whole(study, 4)
    ids = [trial.user_attrs["run"]["wandb_run_id"] for trial in study.trials()]
    assert len(set(ids)) == 4
    for number, run_id in enumerate(ids):
        assert run_id.endswith(f"-{number}") and summary(study.folder / f"{number}")["wandb_run_id"] == run_id
        assert len(list((study.folder / f"{number}").glob(f"wandb/offline-run-*-{run_id}"))) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_trial_whose_joblib_process_is_killed_goes_on(study_of, number):
    needs("hydra_joblib_launcher", "joblib")
    study = study_of("hydra/launcher=joblib", "hydra.sweeper.n_trials=4", f"epochs={MANY_EPOCHS}")
    controller = study.start()
    study.in_training(1)
    os.kill(study.lease(1)["pid"], number)
    study.ends(controller)
    assert_whole(study, 4, MANY_EPOCHS)
    assert study.times_resumed(1) == 1


def test_controller_that_is_told_to_end_gives_its_joblib_trials_back(study_of):
    needs("hydra_joblib_launcher", "joblib")
    study = study_of("hydra/launcher=joblib", "hydra.sweeper.n_trials=4", f"epochs={MANY_EPOCHS}")
    controller = study.start()
    study.in_training(0)
    controller.send_signal(signal.SIGTERM)
    assert controller.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert [trial.state.name for trial in study.trials()] == ["WAITING"] * 2
    study.started.clear()
    study.ends(study.start())
    assert_whole(study, 4, MANY_EPOCHS)
    assert [study.lease(number)["retries"] for number in range(4)] == [0] * 4
    assert study.times_resumed(0) == 1


# ---- Ray


@pytest.fixture
def ray_study_of(study_of):
    """Makes a study on a cluster of its own, whose files and processes carry the name of a folder."""
    needs("hydra_ray_launcher", "ray")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short path, since sockets lie in it

        def ray_study_of(*overrides: str) -> Controller:
            env = os.environ | {"HOME": folder, "RAY_USAGE_STATS_ENABLED": "0"}
            given = ("hydra/launcher=ray", f"+hydra.launcher.ray.init._temp_dir={folder}", *overrides)
            study = study_of(*given, env=env)
            study.ray_folder = folder
            return study

        yield ray_study_of


def processes_of(folder: str) -> list[str]:
    """Command lines that name a folder, but for controllers of ours."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if folder in words and "brqat.train" not in words:
            found.append(words)
    return found


def test_ray_runs_each_trial_once_in_two_processes_and_leaves_no_cluster(ray_study_of):
    study = ray_study_of("hydra.sweeper.n_trials=4")
    controller = study.start()
    study.wait_for(lambda: processes_of(study.ray_folder), "the cluster")
    study.ends(controller)
    assert_whole(study, 4)
    assert len(study.pids()) >= 2 and controller.pid not in study.pids()
    until = time.monotonic() + PATIENCE_S
    while left := processes_of(study.ray_folder):
        assert time.monotonic() < until, left
        time.sleep(0.2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_trial_whose_ray_process_is_killed_goes_on_and_the_other_is_left_alone(ray_study_of, number):
    study = ray_study_of("hydra.sweeper.n_trials=2", f"epochs={MANY_EPOCHS}")
    controller = study.start()
    study.in_training(1)
    other = study.lease(0)
    os.kill(study.lease(1)["pid"], number)
    study.ends(controller)
    assert_whole(study, 2, MANY_EPOCHS)
    assert study.times_resumed(1) == 1
    assert study.lease(0)["token"] == other["token"]


# ---- docs/launchers.md

BLOCKS = {
    title: block
    for title, block in re.findall(
        r"^## (.+?)\n.*?```bash\n(.*?)```", (REPO / "docs/launchers.md").read_text(), re.S | re.M
    )
}


def test_every_chapter_of_the_page_on_launchers_has_its_commands():
    text = (REPO / "docs/launchers.md").read_text()
    assert list(BLOCKS) == re.findall(r"^## (.+)$", text, re.M) and text.count("```bash") == len(BLOCKS)


@pytest.mark.parametrize("title", BLOCKS)
def test_commands_of_the_page_on_launchers_run_a_study(request, tmp_path, title):
    """As they stand there, with a small data set and few trials; they run one after the other in a shell."""
    env, text = dict(os.environ), BLOCKS[title]
    if title == "Several hosts":
        address = postgresql.database(request.getfixturevalue("server"), "launchers")
        text = text.replace("postgresql://USER:PASSWORD@HOST/DATABASE", address).replace("SHARED", "multirun")
    elif title == "Slurm":
        env = slurm.environment(request.getfixturevalue("cluster"))
    elif title == "Ray":
        needs("hydra_ray_launcher", "ray")
        env |= {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    elif title == "joblib":
        needs("hydra_joblib_launcher", "joblib")
    short = (*SYNTHETIC, "tracking=files", "epochs=1", "warmup_epochs=0", "pretrained=none", "hydra.sweeper.n_trials=4")
    text = re.sub(
        r"(brqat -m [^&\n]+?)( &)?$", lambda found: " ".join((found[1], *short)) + (found[2] or ""), text, flags=re.M
    )
    env |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}",
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "BRQAT_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        ["bash", "-c", text], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    folder = tmp_path / "multirun/lambda_bits"
    assert sorted(path.parent.name for path in folder.glob("*/summary.json")) == ["0", "1", "2", "3"]
    assert {summary(folder / name)["status"] for name in "0123"} == {"completed"}
    assert "4 of 4 trials ended" in done.stdout


@pytest.fixture(scope="module")
def server():
    with postgresql.server() as address:
        yield address


# ---- without a plugin


def test_launcher_whose_plugin_is_absent_says_what_to_install(study_of):
    study = study_of("hydra.launcher._target_=hydra_plugins.hydra_absent_launcher.Launcher")
    assert study.start().wait(PATIENCE_S) == 2
    assert "need brqat[slurm], brqat[ray] and brqat[joblib]" in study.started[0].log.read_text()
