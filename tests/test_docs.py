"""The guides in docs/: every command is run, cut short as README's are, and every example in a copy of the project."""

import csv
import json
import re
import shlex
import shutil
import statistics
import tomllib
from importlib.util import find_spec

import optuna
import pytest
import yaml
from optuna.storages.journal import JournalFileBackend
from runs import SYNTHETIC, rows, train
from test_readme import FEW, ROOT, SETUP, SHORT, environment, shell, studies_served

DOCS = ROOT / "docs"
GUIDES = ("quick_start", "alpha_control", "level_metrics", "extending")
LAUNCHERS = "launchers"  # its commands are those of test_launchers.py
EXAMPLE = re.compile(r"^`([\w/]+\.(?:py|yaml))`\n\n```(?:python|yaml)\n(.*?)```", re.M | re.S)


def text(guide):
    return (DOCS / f"{guide}.md").read_text()


def commands(guide):
    blocks = re.findall(r"```bash\n(.*?)```", text(guide), re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def examples():
    """Path in the project -> content, as docs/extending.md gives them."""
    return dict(EXAMPLE.findall(text("extending")))


# ---- what costs nothing


@pytest.mark.parametrize("guide", [*GUIDES, LAUNCHERS])
def test_relative_links_resolve(guide):
    links = re.findall(r"\]\(([^)#\s]+)", text(guide))
    broken = [link for link in links if "://" not in link and not (DOCS / link).exists()]
    assert links and not broken


@pytest.mark.parametrize("guide", GUIDES)
def test_lines_fit(guide):
    """Tables and commands cannot be wrapped."""
    prose = re.sub(r"```.*?```", "", text(guide), flags=re.S).splitlines()
    assert not [line for line in prose if len(line) > 120 and not line.startswith("|")]


def test_every_code_block_of_an_example_names_its_file():
    blocks = re.findall(r"```(?:python|yaml)\n", text("extending"))
    assert len(blocks) == len(EXAMPLE.findall(text("extending"))) == len(examples()) == 9


def test_the_examples_are_lint_free(workplaces):
    folder = workplaces["extending"]
    ruff = program("ruff", environment(folder), "pip install -e '.[dev]'")
    code = " ".join(path for path in examples() if path.endswith(".py"))
    for check in ("check", "format --check"):
        shell(f"{ruff} {check} {code}", folder, environment(folder))


def test_every_level_figure_is_explained(tmp_path):
    """And the row that docs/level_metrics.md reads from is one that a run writes."""
    train(tmp_path / "run", tmp_path / "cache", *SYNTHETIC, "pretrained=none")
    row = rows(tmp_path / "run" / "levels.jsonl")[-1]
    guide = text("level_metrics")
    missing = [key for key in row if f"`{key}`" not in guide]
    assert not missing
    shown = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", guide, re.S)]
    assert shown and all(set(one) <= set(row) for one in shown)


def test_the_table_of_policies_is_what_the_stored_runs_give():
    """Accuracy from the summaries; the level figures from levels.csv, which has a line per run."""
    runs = {}
    with (DOCS / "runs/alpha_control/levels.csv").open() as file:
        levels = {row["run"]: row for row in csv.DictReader(file)}
    for path in (DOCS / "runs/alpha_control").rglob("summary.json"):
        config = yaml.safe_load((path.parent / ".hydra/config.yaml").read_text())
        strength = config["regularizer"]["lambda_br"], config["regularizer"]["lambda_br_act"]
        key = config["quantizer"]["bits"], strength, config["alpha_policy"]["weight"]
        folder = str(path.parent.relative_to(DOCS / "runs/alpha_control"))
        runs.setdefault(key, []).append((json.loads(path.read_text()), levels[folder]))
    table = text("alpha_control").partition("| bits | lambdas")[2]
    lines = [line for line in table.partition("\n\n")[0].splitlines() if re.match(r"\| \d", line)]
    assert len(lines) == 22
    for line in lines:
        bits, lambdas, policy, accuracy, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        found = runs[int(bits), tuple(float(word) for word in lambdas.split(",")), policy]
        assert len(found) == 3
        if accuracy.startswith("diverged"):
            assert all(summary["status"] == "diverged" for summary, _ in found)
            continue
        columns = ("weight/effectiveness", "act/effectiveness_nonzero", "weight/alpha_drift", "act/alpha_drift")
        measured = [[100 * summary["test_acc"] for summary, _ in found]]
        measured += [[float(row[f"levels/{column}/mean"]) for _, row in found] for column in columns]
        for cell, values in zip([accuracy, *figures[:4]], measured, strict=True):
            mean, _, spread = cell.partition(" +- ")
            digits = len(mean.partition(".")[2])
            assert float(mean) == pytest.approx(statistics.mean(values), abs=0.51 * 10**-digits), line
            if spread:
                assert float(spread) == pytest.approx(statistics.stdev(values), abs=0.51 * 10**-digits), line


# ---- the commands


def put_examples(folder):
    for path, content in examples().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)


@pytest.fixture(scope="module")
def workplaces(tmp_path_factory):
    """For each guide a folder in which its commands run one after the other, and the project they run with."""
    folders = {guide: tmp_path_factory.mktemp(guide) for guide in GUIDES}
    copy = folders["extending"]
    for name in ("brqat", "conf", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    put_examples(copy)
    return folders


def cut_short(command):
    """A command of brqat for one epoch, one seed and few trials."""
    if not command.startswith("brqat "):
        return command
    command = command.replace("seed=0,1,2", "seed=0") + SHORT
    return command + FEW if "sweep=" in command or "hydra/sweeper=" in command else command


def program(name, env, needs):
    found = shutil.which(name, path=env["PATH"])
    if found is None:
        pytest.skip(f"{name} is not installed: {needs}")
    return found


def opens_the_study(command, folder, env):
    where = shlex.split(command)[1]
    if not (folder / "multirun" / "lambda_bits").exists():
        shell(cut_short("brqat -m sweep=lambda_bits threads=1"), folder, env)
    if where.endswith(".journal"):
        backend = JournalFileBackend(str(folder / where))
        optuna.create_study(study_name="lambda_bits", storage=optuna.storages.JournalStorage(backend))
    assert studies_served(command, folder) == ["lambda_bits"]


def reads_an_offline_run(command, folder, env):
    """On a run of its own, since those that are cut short have no dashboard; without the network."""
    program("wandb", env, "it is a dependency of brqat")
    if not list(folder.glob("runs/first/wandb/offline-run-*")):
        shutil.rmtree(folder / "runs" / "first", ignore_errors=True)
        shell("brqat hydra.run.dir=runs/first epochs=1 warmup_epochs=0 threads=1", folder, env)
    if command.startswith("wandb sync "):
        said = shell(f"{command} --dry-run 2>&1", folder, env)
        assert re.search(r"Would sync \d+ run", said)
    elif "inspect" in command:
        assert "val/acc" in shell(command, folder, env)
    else:  # a terminal's program: that it is there, and that what it is to open is
        shell(" ".join(command.split()[:2]) + " --help", folder, env)
        assert shell(f"ls {command.split()[-1]}", folder, env).strip()


@pytest.mark.slow
@pytest.mark.parametrize(("guide", "command"), [(guide, command) for guide in GUIDES for command in commands(guide)])
def test_command(guide, command, workplaces):
    folder = workplaces[guide]
    env = environment(folder) | ({"PYTHONPATH": str(folder)} if guide == "extending" else {})
    if command.startswith("python3 -m venv"):
        assert any(setup.startswith(command) for setup in SETUP)  # test_readme.py runs those
    elif match := re.fullmatch(r"pip install -e '\.\[(\w+)\]'", command):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert match[1] in extras
    elif command.startswith("optuna-dashboard "):
        opens_the_study(command, folder, env)
    elif command.startswith("wandb "):
        reads_an_offline_run(command, folder, env)
    elif command.startswith("python -m multirun_analysis.dashboard") and not find_spec("wandb_workspaces"):
        pytest.skip("wandb-workspaces is not installed: pip install -e '.[dashboard]'")
    else:
        shell(cut_short(command), folder, env)
