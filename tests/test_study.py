"""The rules of a study on its storage: whose a trial is, what a sampler may see, and what must not change.

A dead process is one whose lock in the trial's folder is free, or that is silent on another machine; both are made
here without a process.
"""

import errno
import io
import itertools
import json
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from filelock import FileLock, Timeout
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import HyperbandPruner, NopPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rich.console import Console
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError

import brqat.study.ledger
from brqat.files import config_dir
from brqat.study import commands, results, storage, trial
from brqat.study.board import best_first, standing, table
from brqat.study.ledger import Ledger, NotOurs, Rules, Space, run_of
from brqat.study.rehearsal import rehearse
from brqat.study.space import controls_of, description, difference, overrides_of
from brqat.study.storage import is_away, is_full, open_storage, patiently

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

RULES = {"n_trials": 4, "heartbeat_s": 10, "max_retry": 2, "max_failures": 10}
DISTRIBUTIONS = {"bits": IntDistribution(2, 4), "strength": FloatDistribution(0.1, 100, log=True)}
SPACE = Space(DISTRIBUTIONS, [])
CONTROLS = [{"bits": bits, "strength": 0} for bits in (2, 3, 4)]
PROCESS = itertools.count(-1, -1)  # numbers of processes that are none
PRUNERS = sorted(path.stem for path in Path(config_dir()).glob("hydra/sweeper/pruner/*.yaml"))


def sampler(number):
    return TPESampler(seed=number, n_startup_trials=2)


class Hopeless(optuna.pruners.BasePruner):
    """Gives up everything that it is asked about."""

    def prune(self, study, trial):
        return True


@pytest.fixture(autouse=True)
def unsynced():
    """SQLite need not wait for the disk here."""

    def connected(connection, record):
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", connected)
    yield
    event.remove(Engine, "connect", connected)


@pytest.fixture(params=["sqlite", "journal"])
def opened(tmp_path, request):
    """Opens the study as another process would: nothing is shared but its files."""

    def opened(pruner=None, directions=("maximize",), **rules):
        make = {"sqlite": storage._sqlite, "journal": storage._journal}[request.param]
        there = make(tmp_path / f"study.{request.param}", next(PROCESS))
        with there.exclusive():
            optuna.create_study(study_name="s", storage=there.optuna, directions=list(directions), load_if_exists=True)
        return Ledger(there, "s", Rules(**(RULES | rules)), pruner or NopPruner())

    return opened


def ask(ledger, space=SPACE, make=sampler):
    return ledger.next_trial(space, make)


def end(ledger, asked, value=0.5, state=TrialState.COMPLETE, constraints=None, **run):
    values = None if state != TrialState.COMPLETE else value if isinstance(value, list) else [value]
    run = {"status": "completed"} | run
    ledger.tell(asked.number, asked.token, run, state, values, constraints or {}, sampler(asked.number))


def start_and_die(ledger, asked, folder):
    """The trial's process claims its row, and its lock falls."""
    folder = folder / str(asked.number)
    folder.mkdir(exist_ok=True)
    with ledger.claimed(asked.number, asked.token, folder):
        pass


# ---- whose a row is


def test_n_trials_is_the_total_of_all_workers(opened):
    one, other = opened(), opened()
    asked = [ask(worker) for worker in (one, other, other, one, one, other)]
    assert [a and a.number for a in asked] == [0, 1, 2, 3, None, None]
    more = opened(n_trials=6)
    assert [a and a.number for a in (ask(more), ask(more), ask(more))] == [4, 5, None]


def test_row_of_a_dead_process_waits_in_place_and_goes_on_as_it_was(opened, tmp_path):
    one, other = opened(), opened()
    ask(one)
    first = ask(one)
    start_and_die(one, first, tmp_path)
    before = other.row(1)
    other.requeue_dead()
    assert [row.state for row in other.trials()] == [TrialState.RUNNING, TrialState.WAITING]
    again = ask(other)
    after = one.row(1)
    assert (again.number, again.setting, again.token != first.token) == (1, first.setting, True)
    assert (after.params, after.number, after.state) == (before.params, 1, TrialState.RUNNING)
    assert after.user_attrs["lease"]["retries"] == 1 and len(one.trials()) == 2


def test_row_killed_more_often_than_max_retry_fails_and_says_why(opened, tmp_path):
    ledger = opened(max_retry=2, n_trials=1)
    for killed in range(3):
        asked = ask(ledger)
        assert asked.number == 0 and ledger.row(0).user_attrs["lease"]["retries"] == killed
        start_and_die(ledger, asked, tmp_path)
    assert ask(ledger) is None
    assert ledger.row(0).state == TrialState.FAIL
    assert run_of(ledger.row(0))["status"] == "failed"
    assert "killed 3 times, more than hydra.sweeper.max_retry=2" in run_of(ledger.row(0))["error"]


def test_worker_that_dies_while_it_gives_a_row_back_does_not_count_the_death_twice(opened, tmp_path, monkeypatch):
    ledger = opened(max_retry=1, n_trials=1)
    start_and_die(ledger, ask(ledger), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(ledger.storage.optuna), "set_trial_state_values", killed)
        with pytest.raises(KeyboardInterrupt):
            ledger.requeue_dead()
    assert ledger.row(0).state == TrialState.RUNNING and ledger.row(0).user_attrs["lease"]["retries"] == 1
    asked = ask(ledger)
    assert asked.number == 0 and ledger.row(0).user_attrs["lease"]["retries"] == 1
    start_and_die(ledger, asked, tmp_path)
    assert ask(ledger) is None and ledger.row(0).state == TrialState.FAIL  # the second death counts


def test_row_whose_asking_kills_the_worker_each_time_fails_in_the_end(opened):
    ledger = opened(max_retry=2, n_trials=1)

    class Deadly(RandomSampler):
        def sample_independent(self, *_):
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            opened(max_retry=2, n_trials=1).next_trial(SPACE, lambda number: Deadly())
    assert ask(ledger) is None and ledger.row(0).state == TrialState.FAIL
    assert "killed 3 times" in run_of(ledger.row(0))["error"]


def killed(*_):
    raise KeyboardInterrupt


def test_table_follows_a_running_trial_and_shows_no_more_rows_than_fit(opened, tmp_path):
    ledger = opened(n_trials=9)
    for _ in range(7):
        end(ledger, ask(ledger), 0.25)
    running = [ask(ledger), ask(ledger)]
    ledger.beat(8, running[1].token, {"epoch": 3, "epochs": 20, "value": 0.625})
    assert lines(table(ledger))[-1].split()[:4] == ["8", "running", "0.625", "3/20"]
    assert [line.split()[0] for line in lines(table(ledger))[2:]] == [str(number) for number in range(9)]
    assert [line.split()[0] for line in lines(table(ledger, 20))[2:]] == ["1", "2", "3", "4", "5", "6", "7", "8"]
    assert [line.split()[0] for line in lines(table(ledger, 3))[2:]] == ["6", "7", "8"]


def lines(printed):
    console = Console(width=200, file=io.StringIO())
    console.print(printed)
    return console.file.getvalue().rstrip().splitlines()


def test_giving_a_row_back_counts_only_where_it_is_a_failure(opened):
    ledger = opened(max_retry=0, n_trials=1)
    for _ in range(3):
        asked = ask(ledger)
        ledger.requeue(0, asked.token, "interrupted", counts=False)
        assert ledger.row(0).state == TrialState.WAITING
    asked = ask(ledger)
    ledger.requeue(0, "somebody else's", "gone", counts=True)
    assert ledger.row(0).state == TrialState.RUNNING
    ledger.requeue(0, asked.token, "gone", counts=True)
    assert ledger.row(0).state == TrialState.FAIL


def test_old_owner_of_a_retaken_row_can_do_nothing_with_it(opened, tmp_path):
    one, other = opened(), opened()
    old = ask(one)
    start_and_die(one, old, tmp_path)
    new = ask(other)
    for move in (
        lambda: one.beat(0, old.token),
        lambda: one.report(0, old.token, 1, 0.5),
        lambda: end(one, old),
        lambda: start_and_die(one, old, tmp_path),
    ):
        with pytest.raises(NotOurs, match="another worker"):
            move()
    one.requeue(0, old.token, "its job ended without a word", counts=True)
    row = other.row(0)
    assert row.state == TrialState.RUNNING and row.user_attrs["lease"]["token"] == new.token
    assert not row.intermediate_values and not run_of(row) and "beat" not in row.user_attrs
    end(other, new, 0.7)
    assert one.row(0).values == [0.7]


def test_row_that_is_over_is_nobodys(opened):
    ledger = opened()
    asked = ask(ledger)
    end(ledger, asked)
    with pytest.raises(NotOurs):
        end(ledger, asked, 0.9)
    assert ledger.row(0).values == [0.5]


class Dies(RandomSampler):
    """Its process dies as the second parameter is drawn."""

    def sample_independent(self, study, trial, name, distribution):
        if name == "strength":
            raise KeyboardInterrupt
        return super().sample_independent(study, trial, name, distribution)


@pytest.mark.parametrize("where", ["while it draws", "before its lease"])
def test_row_of_a_worker_that_died_while_it_asked_is_taken_at_once(opened, monkeypatch, where):
    one, other = opened(), opened()
    with monkeypatch.context() as patch:
        if where == "before its lease":
            patch.setattr(one, "_lease", lambda *_: Dies().sample_independent(None, None, "strength", None))
        with pytest.raises(KeyboardInterrupt):
            ask(one, make=Dies if where == "while it draws" else sampler)
    left = other.row(0)
    assert left.state == TrialState.RUNNING and "lease" not in left.user_attrs
    asked = ask(other)
    assert asked.number == 0 and len(other.trials()) == 1
    assert left.params.items() <= asked.setting.items() and left.params
    assert asked.setting == other.row(0).params and asked.setting.keys() == DISTRIBUTIONS.keys()


def test_process_on_another_machine_is_dead_after_three_silent_beats_by_our_own_clock(opened, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=5000.0)
    owner, observer = opened(heartbeat_s=10), opened(heartbeat_s=10)
    with monkeypatch.context() as patch:
        patch.setattr(brqat.study.ledger, "host", lambda: "elsewhere/1")
        asked = ask(owner)
        start_and_die(owner, asked, tmp_path)
    monkeypatch.setattr(brqat.study.ledger, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def state_at(second, ledger=observer):
        clock.now = 5000.0 + second
        ledger.requeue_dead()
        return ledger.row(0).state

    assert [state_at(second) for second in (0, 15, 29)] == [TrialState.RUNNING] * 3
    owner.beat(0, asked.token)
    assert [state_at(second) for second in (35, 64)] == [TrialState.RUNNING] * 2
    late = opened(heartbeat_s=10)
    assert state_at(65, late) == TrialState.RUNNING  # the first that it sees of it
    assert state_at(66) == TrialState.WAITING
    assert "silent for 31 s" in observer.row(0).user_attrs["lease"]["reason"]


def test_on_one_machine_the_lock_in_the_folder_decides_however_long_the_silence(opened, tmp_path, monkeypatch):
    owner, observer = opened(), opened()
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr(brqat.study.ledger, "time", SimpleNamespace(monotonic=lambda: clock.now))
    asked = ask(owner)
    with owner.claimed(0, asked.token, tmp_path):
        for clock.now in (0, 10_000):
            observer.requeue_dead()
            assert observer.row(0).state == TrialState.RUNNING
    observer.requeue_dead()
    assert observer.row(0).state == TrialState.WAITING
    assert "is gone" in observer.row(0).user_attrs["lease"]["reason"]


def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_trial_whose_worker_died_before_it_started_is_taken_at_once(opened, monkeypatch):
    owner, observer = opened(), opened()
    alive = ask(owner)
    with monkeypatch.context() as patch:
        patch.setattr(owner, "requeue_dead", lambda: None)
        patch.setattr(brqat.study.ledger, "os", SimpleNamespace(getpid=gone))
        dead = ask(owner)
    observer.requeue_dead()
    assert observer.row(alive.number).state == TrialState.RUNNING
    assert observer.row(dead.number).state == TrialState.WAITING


def test_job_that_waits_in_a_queue_is_lost_after_three_silent_beats_whoever_queued_it(opened, monkeypatch):
    owner, observer = opened(), opened()
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr(brqat.study.ledger, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with monkeypatch.context() as patch:
        patch.setattr(brqat.study.ledger, "os", SimpleNamespace(getpid=gone))
        owner.next_trial(SPACE, sampler, queued=True)
    for clock.now, state in ((0, TrialState.RUNNING), (30, TrialState.RUNNING), (31, TrialState.WAITING)):
        observer.requeue_dead()
        assert observer.row(0).state == state


def test_second_process_in_a_trials_folder_is_turned_away(opened, tmp_path):
    ledger = opened(heartbeat_s=0.05)
    asked = ask(ledger)
    with (
        ledger.claimed(0, asked.token, tmp_path),
        pytest.raises(NotOurs, match="another process holds"),
        opened(heartbeat_s=0.05).claimed(0, asked.token, tmp_path),
    ):
        pass


def test_requeued_batch_job_takes_up_the_row_that_it_gave_back(opened, tmp_path):
    ledger = opened()
    asked = ask(ledger)
    ledger.requeue(0, asked.token, "interrupted", counts=False)
    with ledger.claimed(0, asked.token, tmp_path) as row:
        assert row.state == TrialState.RUNNING
        end(ledger, asked)
    assert ledger.row(0).state == TrialState.COMPLETE


ASKER = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_study import RULES, Ledger, NopPruner, Rules, ask, open_storage

folder, name = Path(sys.argv[2]), sys.argv[4]
ledger = Ledger(open_storage(sys.argv[3], folder), "s", Rules(**(RULES | {"n_trials": 12})), NopPruner())
(folder / f"ready-{name}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
found = []
while asked := ask(ledger):
    found.append([asked.number, asked.setting])
    time.sleep(0.1)  # the lock is not fair
print(json.dumps(found))
"""


@pytest.mark.slow  # two processes, each of which imports Optuna and torch
@pytest.mark.parametrize("where", ["sqlite", "journal"])
def test_two_processes_that_ask_at_once_never_get_the_same(tmp_path, where):
    there = open_storage(where, tmp_path)
    optuna.create_study(study_name="s", storage=there.optuna, direction="maximize")
    words = [sys.executable, "-c", ASKER, str(Path(__file__).parent), str(tmp_path), where]
    both = [subprocess.Popen([*words, name], stdout=subprocess.PIPE, text=True) for name in "ab"]
    try:
        while not all((tmp_path / f"ready-{name}").exists() for name in "ab"):
            assert all(process.poll() is None for process in both)
        (tmp_path / "go").touch()
        found = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert min(map(len, found)) > 1  # each had its share, or nothing was tested
    rows = sorted(found[0] + found[1], key=lambda row: row[0])
    assert [number for number, _ in rows] == list(range(12))
    assert len({json.dumps(setting) for _, setting in rows}) == 12


# ---- what a sampler draws, and what it may see


def test_study_goes_on_where_it_stood_without_repeating_itself(opened, tmp_path):
    first = opened(n_trials=5)
    settings = []
    for _ in range(5):
        asked = ask(first)
        settings.append(asked.setting)
        end(first, asked, asked.setting["strength"])
    second = opened(n_trials=10)
    while asked := ask(second):
        settings.append(asked.setting)
        end(second, asked, asked.setting["strength"])
    assert len(settings) == len({setting["strength"] for setting in settings}) == 10


class Spy(TPESampler):
    """Notes what it is shown."""

    seen: list = []  # noqa: RUF012

    def infer_relative_search_space(self, study, trial):
        self.seen.append(study.get_trials(deepcopy=False))
        return super().infer_relative_search_space(study, trial)

    def after_trial(self, study, trial, state, values):
        self.seen.append(study.get_trials(deepcopy=False))
        super().after_trial(study, trial, state, values)


@pytest.mark.parametrize("pruner", [NopPruner(), HyperbandPruner(min_resource=1, max_resource=9)], ids=["nop", "band"])
def test_controls_come_first_and_no_sampler_ever_sees_them(opened, pruner):
    ledger = opened(pruner, n_trials=8)
    for _ in range(2):  # every worker enqueues them
        ledger.enqueue(CONTROLS, control=True)
    assert [row.state for row in ledger.trials()] == [TrialState.WAITING] * 3
    Spy.seen = []
    asked = []
    while one := ask(ledger, make=lambda number: Spy(seed=number, n_startup_trials=1)):
        asked.append(one)
        ledger.tell(one.number, one.token, {}, TrialState.COMPLETE, [one.number], {}, Spy(seed=0, n_startup_trials=1))
    assert [one.setting for one in asked[:3]] == CONTROLS and len(asked) == 8
    assert all(0.1 <= one.setting["strength"] <= 100 for one in asked[3:])
    assert len(Spy.seen) > 8 and not any(row.user_attrs.get("control") for rows in Spy.seen for row in rows)
    assert max(map(len, Spy.seen)) > 1 or isinstance(pruner, HyperbandPruner)  # it does see the others
    assert [row.params for row in ledger.trials()[:3]] == [{"bits": bits} for bits in (2, 3, 4)]


def test_more_controls_than_trials_are_cut(opened):
    ledger = opened(n_trials=2)
    ledger.enqueue(CONTROLS, control=True)
    assert [row.user_attrs["setting"] for row in ledger.trials()] == CONTROLS[:2]


def test_control_is_never_pruned_and_others_are(opened):
    ledger = opened(Hopeless())
    ledger.enqueue(CONTROLS[:1], control=True)
    control, other = ask(ledger), ask(ledger)
    assert not ledger.report(control.number, control.token, 1, 0.1)
    assert ledger.report(other.number, other.token, 1, 0.1)
    assert [row.intermediate_values for row in ledger.trials()] == [{1: 0.1}, {1: 0.1}]


def test_value_that_a_killed_process_reported_stands(opened):
    ledger = opened()
    asked = ask(ledger)
    ledger.report(0, asked.token, 1, 0.1)
    ledger.report(0, asked.token, 1, 0.9)
    assert ledger.row(0).intermediate_values == {1: 0.1}


def test_each_point_of_a_grid_is_run_once_by_two_workers_of_which_one_dies(opened, tmp_path):
    grid = [{"bits": bits, "strength": strength} for bits in (2, 3, 4) for strength in (1.0, 10.0)]
    space = Space(DISTRIBUTIONS, [], grid)
    one, other = opened(n_trials=len(grid)), opened(n_trials=len(grid))
    for ledger in (one, other):
        ledger.enqueue(grid)
    run = []
    start_and_die(one, ask(one, space), tmp_path)
    while asked := ask(other if len(run) % 2 else one, space):
        run.append(asked.setting)
        end(one, asked)
    assert sorted(map(str, run)) == sorted(map(str, grid))


# ---- ends


def test_best_is_within_its_constraints_and_was_measured(opened):
    ledger = opened(n_trials=9)
    for value, loss, beyond, status in (
        (0.5, 0.9, -1.0, "completed"),
        (0.9, 0.1, 1.0, "completed"),
        (0.7, 0.5, -1.0, "completed"),
        (1.0, 0.0, -1.0, "diverged"),
        (0.7, 0.4, 0.0, "completed"),
    ):
        end(ledger, ask(ledger), value, constraints={"bops max": beyond}, status=status, val_loss=loss)
    end(ledger, ask(ledger), state=TrialState.PRUNED, status="pruned")
    assert [row.number for row in best_first(ledger)] == [4, 2, 0]
    assert standing(ledger).best.number == results.summary(ledger)["best_trial"] == 4
    assert "best 0.7000 (trial 4)" in standing(ledger).in_words()


def test_best_of_a_minimized_objective_is_the_least(opened):
    ledger = opened(directions=["minimize"])
    for value in (0.5, 0.2, 0.9):
        end(ledger, ask(ledger), value)
    assert [row.number for row in best_first(ledger)] == [1, 0, 2]


def test_pareto_front_holds_what_no_other_dominates(opened):
    ledger = opened(directions=["maximize", "minimize"], n_trials=9)
    values = [[0.5, 10], [0.9, 30], [0.7, 20], [0.7, 25], [0.9, 30], [0.4, 10], [0.8, 40]]
    for pair in values:
        end(ledger, ask(ledger), pair)
    end(ledger, ask(ledger), [1.0, 1], status="diverged")
    assert {row.number for row in best_first(ledger)} == {0, 1, 2, 4}
    assert standing(ledger).best is None and standing(ledger).front == 4
    assert {one["trial"] for one in results.summary(ledger)["solutions"]} == {0, 1, 2, 4}


def test_constraint_is_how_far_a_figure_lies_beyond_its_bound():
    bounds = {"bops": {"max": 100}, "val_acc": {"min": 0.5, "max": 0.9}}
    assert trial.constraint_values(bounds, {"bops": 150, "val_acc": 0.75}) == {
        "bops max": 50,
        "val_acc min": -0.25,
        "val_acc max": pytest.approx(-0.15),
    }
    assert trial.constraint_values(OmegaConf.create(bounds), {"bops": 1, "val_acc": 1}).keys() == {
        "bops max",
        "val_acc min",
        "val_acc max",
    }
    assert trial.constraint_values(None, {}) == {}


@pytest.mark.parametrize("figure", [None, float("nan"), float("inf")])
def test_constraint_on_a_figure_that_is_missing_is_not_met(figure):
    assert trial.constraint_values({"bops": {"max": 100}}, {"bops": figure})["bops max"] > 0
    assert trial.constraint_values({"bops": {"min": 100}}, {"bops": figure})["bops min"] > 0


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"bops": 5}, "has no bound"),
        ({"bops": {}}, "has no bound"),
        ({"bops": {"below": 5}}, "has no bound"),
        ({"bops": {"max": "few"}}, "bops.max='few' cannot be"),
        ({"bops": {"max": True}}, "bops.max=True cannot be"),
        ({"size": {"max": 5}}, "size: no figure of a run. Known: .*weight_bytes"),
        ({"status": {"max": 5}}, "status: no figure of a run"),
    ],
)
def test_constraint_that_says_nothing_is_refused(bounds, said):
    with pytest.raises(ValueError, match=said):
        trial.constraint_values(bounds, {})


BEGAN = datetime.now() - timedelta(days=1)


def fail(ledger, error):
    end(ledger, ask(ledger), state=TrialState.FAIL, status="failed", error=error)


def test_three_trials_that_fail_the_same_way_end_a_study_whatever_numbers_they_name(opened):
    ledger = opened(n_trials=9)
    for number in (1, 22):
        fail(ledger, f"ValueError: bits={number} is too much")
        assert ledger.failure(BEGAN) is None
    fail(ledger, "ValueError: bits=333 is too much")
    assert "every trial fails the same way, 3 of 3: ValueError: bits=333" in ledger.failure(BEGAN)
    assert ledger.failure(datetime.now() + timedelta(seconds=1)) is None  # a later command begins to count anew


def test_trials_that_fail_in_different_ways_go_on_until_max_failures(opened):
    ledger = opened(n_trials=9, max_failures=3)
    for error in ("ValueError: a", "ValueError: b", "KeyError: a"):
        fail(ledger, error)
        assert ledger.failure(BEGAN) is None
    fail(ledger, "KeyError: b")
    assert ledger.failure(BEGAN) == "4 trials failed, more than hydra.sweeper.max_failures=3"


def test_one_trial_that_completes_makes_the_same_failure_three_times_bearable(opened):
    ledger = opened(n_trials=9)
    end(ledger, ask(ledger))
    for _ in range(3):
        fail(ledger, "ValueError: a")
    assert ledger.failure(BEGAN) is None


def test_share_of_failures_is_bounded_by_max_failure_rate(opened):
    ledger = opened(n_trials=9, max_failure_rate=0.5)
    end(ledger, ask(ledger))
    fail(ledger, "ValueError: a")
    assert ledger.failure(BEGAN) is None
    fail(ledger, "ValueError: b")
    assert "2 of 3 trials failed" in ledger.failure(BEGAN)


def test_failures_that_were_warned_of_count_for_nothing(opened):
    ledger = opened(n_trials=20, max_failures=2)
    ledger.study.set_user_attr("doubts", ["width 3 does not go with it"])
    for _ in range(6):
        end(
            ledger, ask(ledger), state=TrialState.FAIL, status="failed", error="ValueError: width 5 does not go with it"
        )
    assert ledger.failure(datetime.min) is None
    for _ in range(3):
        end(ledger, ask(ledger), state=TrialState.FAIL, status="failed", error="another")
    assert "3 trials failed" in ledger.failure(datetime.min)


def test_confirm_takes_the_control_of_the_same_widths_and_says_where_there_is_none(opened, capsys):
    ledger = opened(n_trials=6)
    ledger.study.set_user_attr("description", {"control": json.dumps(CONTROLS)})
    ledger.enqueue(CONTROLS, control=True)
    for bits in (2, 3, 4):
        asked = ask(ledger)
        diverged = bits != 3
        end(ledger, asked, 0.5, status="diverged" if diverged else "completed")
    best = SimpleNamespace(number=9, user_attrs={"setting": {"bits": 2, "strength": 1.0}})
    assert commands._controls_of(ledger, [best]) == []
    assert "trial 9 has no completed control" in capsys.readouterr().err
    best.user_attrs["setting"]["bits"] = 3
    assert [trial.number for trial in commands._controls_of(ledger, [best])] == [1]


def test_diverged_trials_are_results_and_no_failures(opened):
    ledger = opened(n_trials=9, max_failures=0, max_failure_rate=0.0)
    end(ledger, ask(ledger))
    for epoch in range(4):
        error = f"the training loss is not finite in epoch {epoch}"
        end(ledger, ask(ledger), 0.0, status="diverged", error=error)
        assert ledger.failure(BEGAN) is None


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"n_trials": 0}, "n_trials=0"),
        ({"n_trials": True}, "n_trials=True"),
        ({"n_trials": 2.5}, "n_trials=2.5"),
        ({"max_retry": -1}, "max_retry=-1"),
        ({"max_failures": "many"}, "max_failures='many'"),
        ({"heartbeat_s": 0}, "heartbeat_s=0"),
        ({"heartbeat_s": "often"}, "heartbeat_s='often'"),
        ({"max_failure_rate": 1.5}, "max_failure_rate=1.5"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, said):
    with pytest.raises(ValueError, match=f"hydra.sweeper.{said} cannot be"):
        Rules(**(RULES | rules))


# ---- the space


def test_controls_cross_their_setting_with_every_value_in_over():
    over = {"bits": IntDistribution(2, 6, step=2), "policy": CategoricalDistribution(["a", "b"])}
    found = controls_of({"set": {"strength": 0}, "over": ["bits", "policy"]}, DISTRIBUTIONS | over, set())
    assert found == [{"bits": b, "policy": p, "strength": 0} for b in (2, 4, 6) for p in ("a", "b")]
    assert controls_of({"set": {"strength": 0}}, DISTRIBUTIONS, set()) == [{"strength": 0}]
    assert controls_of({"set": {"strength": 0}, "over": ["bits"]}, {}, {"bits"}) == [{"strength": 0}]
    assert controls_of(None, DISTRIBUTIONS, set()) == []


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ("width", "names width, which the study does not search"),
        ("strength", "names strength, which is no choice and no range of whole numbers"),
        ("wide", "makes 100 controls: name fewer"),
    ],
)
def test_controls_over_what_has_no_few_values_are_refused(over, said):
    with pytest.raises(ValueError, match=said):
        controls_of({"set": {}, "over": [over]}, DISTRIBUTIONS | {"wide": IntDistribution(1, 100)}, set())


def test_description_leaves_out_what_is_swept_and_the_difference_names_the_rest():
    config = {
        "bits": 2,
        "seed": 0,
        "objective": "val_acc",
        "model": {"width": 16, "more": {}},
        "quantizer": {"bits": 4, "start": "lsq"},
    }
    distributions = {"quantizer.bits": IntDistribution(2, 4), "bits": FloatDistribution(0.1, 1)}
    bounds = {"bops": {"max": 9}}
    there = description(distributions, [{"seed": 0}], bounds, {"val_acc": "maximize"}, config)
    assert there == {
        "search quantizer.bits": 'int {"log": false, "step": 1, "low": 2, "high": 4}',
        "search bits": 'float {"step": null, "low": 0.1, "high": 1.0, "log": false}',
        "control": '[{"seed": 0}]',
        "constraints": '{"bops": {"max": 9}}',
        "objective": "val_acc (maximize)",
        "model.width": "16",
        "model.more": "{}",
        "quantizer.start": '"lsq"',
    }
    here = {key: value for key, value in there.items() if key != "model.more"} | {"model.width": "32", "new": "1"}
    assert difference(there, here) == ["  - model.more: {}", "  - model.width: 16", "  + model.width: 32", "  + new: 1"]
    assert difference(there, dict(there)) == []


WORDS = 'choice(2,1.5,1e-05,-3,true,"a b","1",plain,"it\'s","true","a,b","x=1/y",[1,2])'


WIDE = {
    "quantizer": CategoricalDistribution(["lsq", "sign"]),
    "weight": CategoricalDistribution([1, 2]),
    "act": CategoricalDistribution([2, 3, 4, 8]),
    **{key: FloatDistribution(0.1, 10, log=True) for key in ("strength", "strength_act", "lr")},
}


def only(broken):
    """Why a setting cannot be: a predicate's."""
    return lambda setting: "it cannot be" if broken(setting) else None


@pytest.mark.parametrize(
    ("broken", "refused"),
    [
        (lambda s: True, "it cannot be"),
        (lambda s: False, None),
        (lambda s: s["lr"] in (0.1, 10.0), None),  # the very ends are hardly ever drawn
    ],
    ids=["whatever is searched", "nothing", "an end"],
)
def test_rehearsal_of_a_wide_space_refuses_it_only_if_nothing_works(broken, refused):
    found = rehearse(WIDE, [], only(broken))
    assert found.refused == refused and not found.doubtful


def test_rehearsal_refuses_values_that_never_work_and_blames_no_others():
    narrow = {key: WIDE[key] for key in ("quantizer", "weight", "act")}
    assert (
        rehearse(narrow, [], only(lambda s: s["act"] == 8)).refused == "act=8 is in the search space, but it cannot be"
    )
    found = rehearse(narrow, [], only(lambda s: s["weight"] == 1))
    assert found.refused == "weight=1 is in the search space, but it cannot be"
    # With so many others a value is not known to work with none.
    assert rehearse(WIDE, [], only(lambda s: s["act"] == 8)).doubtful


@pytest.mark.parametrize("order", [[1, 2], [2, 1]])
def test_rehearsal_doubts_a_combination_in_whatever_order_its_values_are_written(order):
    space = {"quantizer": WIDE["quantizer"], "weight": CategoricalDistribution(order)}
    found = rehearse(space, [], only(lambda s: s == {"quantizer": "lsq", "weight": 1}))
    assert found.refused is None and found.doubtful == [("quantizer=lsq weight=1", "it cannot be")]


def test_rehearsal_tries_what_lies_within_a_range():
    space = {"quantizer": WIDE["quantizer"], "bits": IntDistribution(1, 4)}
    found = rehearse(space, [], only(lambda s: s["quantizer"] == "sign" and s["bits"] != 2))
    assert found.refused is None and len(found.doubtful) == 3


def test_rehearsal_doubts_values_that_do_not_go_together_however_many_others_there_are():
    found = rehearse(WIDE, [], only(lambda s: (s["quantizer"] == "lsq") == (s["weight"] == 1)))
    assert found.refused is None and found.doubtful
    assert all("quantizer=lsq weight=1" in said or "quantizer=sign weight=2" in said for said, _ in found.doubtful)


def test_rehearsal_refuses_a_control_that_never_works_and_doubts_one_that_sometimes_does():
    broken = only(lambda s: s.get("strength") == 0)
    assert rehearse(DISTRIBUTIONS, CONTROLS, broken).refused == "bits=2 strength=0 is the control, but it cannot be"
    found = rehearse(DISTRIBUTIONS, CONTROLS, only(lambda s: s.get("strength") == 0 and s["bits"] == 2))
    assert found.refused is None and found.doubtful == [("bits=2 strength=0", "it cannot be")]


def test_setting_goes_through_the_command_line_unchanged():
    distributions = create_params_from_overrides([f"key={WORDS}"])[0]
    wanted = [2, 1.5, 1e-05, -3, True, "a b", "1", "plain", "it's", "true", "a,b", "x=1/y", [1, 2], None]
    parser = OverridesParser.create()
    values = []
    for choice in (*distributions["key"].choices, None):
        (text,) = overrides_of({"key": choice})
        values.append(parser.parse_override(text).value())
    found = [v.text if hasattr(v, "text") else v for v in values]
    assert [(type(v), v) for v in found] == [(type(w), w) for w in wanted]
    assert overrides_of({"a": 0.1 + 0.2, "b": 1e22}) == ["a=0.30000000000000004", "b=1e+22"]


# ---- storage


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("redis", "storage=redis is not known. Write null"),
        ("mysql://u:secret@h/d", r"storage=mysql://\*\*\*@h/d is not known. Write null .*postgresql://USER"),
        ("study.db", "not known. Write null"),
        ("postgresql+nosuch://u@h/d", "no database address"),
    ],
)
def test_address_that_is_none_is_refused_in_a_sentence(tmp_path, where, said):
    with pytest.raises(ValueError, match=said):
        open_storage(where, tmp_path)
    assert not list(tmp_path.iterdir())


def test_address_without_a_driver_names_what_to_install_and_no_password(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ValueError, match=r"Install brqat\[postgresql\]") as error:
        open_storage("postgresql://user:secret@host/base", tmp_path)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("where", [None, "journal", "sqlite:///{}/a.db", "journal:///{}/a.journal"])
def test_storage_that_is_absent_is_created_only_if_wanted(tmp_path, where):
    where = where and where.format(tmp_path)
    with pytest.raises(ValueError, match="there is no study at"):
        open_storage(where, tmp_path, create=False)
    assert not list(tmp_path.iterdir())
    open_storage(where, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix in (".db", ".journal")]
    assert open_storage(where, tmp_path, create=False) is open_storage(where, tmp_path)


@pytest.mark.parametrize("torn", [b'{"op_code": 4, "wor', b"\x00\x00", b"{"])
def test_half_a_line_at_the_end_of_a_journal_is_cut(tmp_path, torn):
    file = tmp_path / "study.journal"
    first = storage._journal(file, next(PROCESS))
    optuna.create_study(study_name="s", storage=first.optuna, direction="maximize")
    whole = file.read_bytes()
    with open(file, "ab") as out:
        out.write(torn)
    first.optuna.create_new_trial(0)  # the process that has it open
    with open(file, "ab") as out:
        out.write(torn)
    second = storage._journal(file, next(PROCESS))  # and one that opens it
    second.optuna.create_new_trial(0)
    text = file.read_bytes()
    assert text.startswith(whole) and torn + b"\n" not in text and all(map(json.loads, text.splitlines()))
    plain = JournalStorage(JournalFileBackend(str(file)))
    assert len(plain.get_all_trials(0)) == 2


def test_write_that_a_full_disk_breaks_off_leaves_a_whole_journal(tmp_path, monkeypatch):
    file = tmp_path / "study.journal"
    there = storage._journal(file, next(PROCESS))
    optuna.create_study(study_name="s", storage=there.optuna, direction="maximize")
    whole = file.read_bytes()

    def half(self, logs):
        with open(self._file_path, "ab") as out:
            out.write(json.dumps(logs[0]).encode()[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", half)
        with pytest.raises(OSError):
            there.optuna.create_new_trial(0)
    assert file.read_bytes() == whole


def test_full_disk_is_told_from_other_errors_through_what_caused_them():
    def caused(cause):
        try:
            try:
                raise cause
            except Exception as error:
                raise RuntimeError("the run failed") from error
        except RuntimeError as error:
            return error

    assert is_full(caused(OSError(errno.ENOSPC, "no")))
    assert is_full(OSError(errno.EDQUOT, "no"))
    assert is_full(caused(RuntimeError("database or disk is full")))
    assert not is_full(caused(OSError(errno.ENOENT, "no")))
    assert not is_full(ValueError("bits=9")) and not is_full(None)


def test_database_that_is_away_is_told_from_one_that_refuses_and_is_waited_for(monkeypatch):
    away = OperationalError("SELECT 1", {}, Exception("connection refused"))
    assert is_away(away) and not is_away(ValueError("bits=9")) and not is_away(None)
    assert not is_away(OperationalError("INSERT", {}, Exception("database or disk is full")))
    calls = []

    @patiently
    def method(times, error):
        calls.append(error)
        if len(calls) <= times:
            raise error
        return len(calls)

    monkeypatch.setattr(storage, "time", SimpleNamespace(monotonic=lambda: 25.0 * len(calls), sleep=lambda _: None))
    assert method(2, away) == 3
    calls.clear()
    with pytest.raises(OperationalError):
        method(9, away)
    assert len(calls) == 3  # 60 s have passed
    calls.clear()
    with pytest.raises(ValueError):
        method(1, ValueError("bits=9"))
    assert len(calls) == 1


def test_file_that_is_no_study_is_refused(tmp_path):
    (tmp_path / "study.db").write_text("not a database, but long enough to be taken for one" * 20)
    with pytest.raises(ValueError, match="is no SQLite database"):
        open_storage(None, tmp_path, create=False)


@pytest.mark.parametrize("where", ["sqlite", "journal"])
def test_two_do_not_hold_the_studys_lock_at_once(tmp_path, where):
    there = open_storage(where, tmp_path)
    other = FileLock(there.lock_file)
    with there.exclusive(), pytest.raises(Timeout):
        other.acquire(timeout=0)
    other.acquire(timeout=0)
    other.release()


# ---- samplers and pruners from conf


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_is_made_from_its_file_and_by_its_name(name):
    with initialize_config_dir(config_dir()):
        given = ["hydra/sweeper=study", f"hydra/sweeper/pruner={name}"]
        node = compose("train", given, return_hydra_config=True).hydra.sweeper.pruner
    made, named = trial.pruner_of(node), trial.pruner_of(name)
    assert type(made) is type(named) and isinstance(made, optuna.pruners.BasePruner)
    assert node._target_.endswith(type(made).__name__)


def test_unknown_pruner_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=f"pruner=medium is not known. Write one of {', '.join(PRUNERS)}"):
        trial.pruner_of("medium")


def test_pruner_from_elsewhere_is_not_instantiated(tmp_path):
    with pytest.raises(Exception, match=r"os\.mkdir|whitelist"):
        trial.pruner_of(OmegaConf.create({"_target_": "os.mkdir", "path": str(tmp_path / "made")}))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["tpe", "random", "nsgaii", "nsgaiii", "qmc", "grid"])
def test_every_sampler_of_hydra_optuna_sweeper_is_made(name):
    with initialize_config_dir(config_dir()):
        given = ["hydra/sweeper=study", f"hydra/sweeper/sampler={name}", "hydra.sweeper.sampler.seed=3"]
        node = compose("train", given, return_hydra_config=True).hydra.sweeper.sampler
    assert isinstance(trial.sampler_of(node, 2), optuna.samplers.BaseSampler)


def draws(node, number):
    return trial.sampler_of(OmegaConf.create(node), number)._rng.rng.random(3).tolist()


def test_seed_of_a_sampler_is_made_of_the_configs_and_the_number_of_the_trial():
    node = {"_target_": "optuna.samplers.RandomSampler", "seed": 5}
    assert draws(node, 3) == draws(node, 3)
    others = [draws(node | {"seed": seed}, number) for seed in (5, 6) for number in range(20)]
    assert len({str(one) for one in others}) == 40  # no study repeats another one's, a trial late
    unseeded = node | {"seed": None}
    assert draws(unseeded, 3) != draws(unseeded, 3)


def test_quasi_random_sequence_keeps_its_seed_and_a_grid_needs_no_sampler():
    quasi = OmegaConf.create({"_target_": "optuna.samplers.QMCSampler", "seed": 5, "scramble": True})
    assert [trial.sampler_of(quasi, number)._seed for number in (0, 7)] == [5, 5]
    grid = OmegaConf.create({"_target_": "optuna.samplers.GridSampler", "_partial_": True, "seed": None})
    assert isinstance(trial.sampler_of(grid, 0), RandomSampler)
