"""The wandb workspace and report: every name in them is one that a run wrote, and wandb-workspaces reads them back."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from pydantic import BaseModel, ValidationError
from runs import REPO, SYNTHETIC, records, train

from multirun_analysis import dashboard

wr = pytest.importorskip("wandb_workspaces.reports.v2", reason="pip install 'brqat[dashboard]'")
from wandb_workspaces import workspaces as ws  # noqa: E402
from wandb_workspaces.reports.v2 import internal as models  # noqa: E402
from wandb_workspaces.workspaces.internal import View  # noqa: E402

GROUP = "it's 1<2 & b=c 🚀"  # none of which wandb-workspaces' language of filters or names of views take as they are
MODELS = {"workspace": View, "report": models.ReportViewspec}
# An interpreter without brqat's modules in it that stops at whatever leads to a network: sockets, and wandb-core.
SEALED = """
import sys
def refuse(event, args):
    if event.startswith("socket.") or event in ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec"):
        raise RuntimeError(event)
sys.addaudithook(refuse)
from multirun_analysis.dashboard import main
assert main(sys.argv[1:]) == 0
assert not {"brqat", "torch", "hydra"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The names that a short run gave to wandb, by section."""
    folder = tmp_path_factory.mktemp("run")
    given = (*SYNTHETIC, "tracking=wandb", "tracking.mode=offline", f'tracking.group="{GROUP}"')
    found = records(folder, train(folder, folder / "cache", *given)["wandb_run_id"])
    run, *_ = [record["run"] for record in found if record["type"] == "run"]
    assert (run["project"], run["run_group"]) == ("brqat", GROUP)
    axes = [record["metric"] for record in found if record["type"] == "metric"]
    assert [axis["step_metric"] for axis in axes if axis.get("glob_name") == "*"] == ["epoch"]
    history = [record["history"]["item"].items() for record in found if record["type"] == "history"]
    return {
        "history": {key for items in history for key, value in items if isinstance(value, (int, float))},
        "summary": {key for record in found if record["type"] == "summary" for key in record["summary"]["update"]},
        "config": set(flat(run["config"]["update"])),
        "run": {"displayName", "group"},
    }


@pytest.fixture
def sealed(monkeypatch, tmp_path):
    """No network, no process, no account."""

    def refuse(*args, **kwargs):
        raise AssertionError("network")

    for place, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (subprocess.Popen, "__init__")):
        monkeypatch.setattr(place, name, refuse)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def specs(sealed, tmp_path):
    """What the two files hold."""
    assert dashboard.main(["--entity", "me", "--group", GROUP, "--out", str(tmp_path / "out")]) == 0
    return {name: json.loads((tmp_path / f"out/{name}.json").read_text(encoding="utf-8")) for name in MODELS}


def flat(tree, prefix=""):
    for key, value in tree.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]


def having(key, tree):
    """Every object in a JSON tree that has the key."""
    if isinstance(tree, dict):
        if key in tree:
            yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from having(key, branch)


def not_written(spec, written):
    """The names in a spec that the run did not write."""
    accessors, metrics, regexes = set(), {"epoch"}, set()
    for panel in having("viewType", spec):
        config = panel["config"]
        match panel["viewType"]:
            case "Run History Line Plot":
                assert config["xAxis"] == "epoch" and bool(config["metrics"]) != ("metricRegex" in config)
                metrics.update(config["metrics"])
                regexes.update({config.get("metricRegex")} - {None})
            case "Scatter Plot":
                accessors |= {config["xAxis"], config["yAxis"]}
            case "Parallel Coordinates Plot":
                accessors |= {column["accessor"] for column in config["columns"]}
            case "Parameter Importance":
                accessors.add(f"summary:{config['targetKey']}")
            case other:
                assert other == "Run Comparer"
    for runs in having("runFeed", spec):
        accessors |= {*runs["runFeed"]["columnOrder"], *runs["runFeed"]["columnPinned"]}
        keys = [part["key"] for part in (*runs["sort"]["keys"], *runs["filters"]["filters"])]
        accessors |= {f"{key['section']}:{key['name']}" for key in keys}
    assert len(metrics) > 30 and len(accessors) > 12 and len(regexes) == 4
    plain = {accessor: re.sub(r"^(config:[^.]+)[.]value", r"\1", accessor).split(":", 1) for accessor in accessors}
    return (
        {accessor for accessor, (section, name) in plain.items() if name not in written[section]}
        | {regex for regex in regexes if not any(re.search(regex, key) for key in written["history"])}
        | (metrics - written["history"])
    )


def reread(name, spec):
    """The model that wandb-workspaces loads. What it does not understand it would keep instead of refusing it."""
    model = MODELS[name].model_validate(spec)
    assert not list(unread(model))
    return model


def unread(value):
    if isinstance(value, (models.UnknownPanel, models.UnknownBlock)):
        yield value
    elif isinstance(value, BaseModel):
        value = list(value.__dict__.values())
    if isinstance(value, list):
        for part in value:
            yield from unread(part)


def dumped(model):
    """As it is sent, but for the empty list of comments that a heading has after it was loaded."""
    return json.loads(model.model_dump_json(by_alias=True, exclude_none=True).replace(',"inlineComments":[]', ""))


def test_every_metric_and_setting_is_one_that_a_run_wrote(written, specs):
    for spec in specs.values():
        assert not_written(spec, written) == set()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("levels/act/effectiveness/mean", "levels/act/effectivity/mean"),
        ("config:regularizer.value.lambda_br", "config:regularizer.lambda_br.value"),
        ("config:alpha_policy.value.act", "config:alpha_policy.value.activation"),
        ("weight/alpha$", "weight/alphas$"),
        ('"targetKey": "val_acc"', '"targetKey": "val/accuracy"'),
    ],
)
def test_a_name_that_no_run_wrote_is_found(written, specs, old, new):
    for spec in specs.values():
        text = json.dumps(spec)
        assert old in text and len(not_written(json.loads(text.replace(old, new)), written)) >= 1


@pytest.mark.parametrize("name", MODELS)
def test_wandb_workspaces_reads_back_what_was_written(specs, name):
    model = reread(name, specs[name])
    assert dumped(model) == specs[name]
    if name == "workspace":
        again = ws.Workspace._from_model(model)
    else:
        again = wr.Report._from_model(model)
        again.width = "fluid"  # which its loader forgets
    assert dumped(again._to_model()) == specs[name]


@pytest.mark.filterwarnings("ignore:Failed to validate block")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"xAxisLogScale": true', '"xAxisLogScale": "often"'),
        ('"xAxisLogScale": true', '"logX": true'),
        ('"viewType": "Run Comparer"', '"viewType": "Run Compare"'),
        ('"runSets": [{', '"runSets": [7, {'),
        ('"ascending": false', '"ascending": "down"'),
    ],
)
def test_a_spec_that_wandb_workspaces_does_not_know_is_found(specs, name, old, new):
    text = json.dumps(specs[name])
    assert old in text
    changed = json.loads(text.replace(old, new))
    with pytest.raises((ValidationError, AssertionError)):
        assert dumped(reread(name, changed)) == changed


def test_a_group_is_filtered_by_whatever_its_name(specs, sealed, tmp_path):
    of_group = {"key": {"section": "run", "name": "group"}, "op": "=", "value": GROUP, "disabled": False}
    for spec in specs.values():
        found = [runs["filters"]["filters"] for runs in having("runFeed", spec)]
        assert found and all(filters == [of_group] for filters in found)
    assert dashboard.main(["--out", str(tmp_path)]) == 0
    for name in MODELS:
        runs = list(having("runFeed", json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))))
        assert runs and all(part["filters"]["filters"] == [] for part in runs)


def test_no_panel_of_the_report_lies_on_another(specs):
    for grid in having("panelBankSectionConfig", specs["report"]):
        places = [panel["layout"] for panel in grid["panelBankSectionConfig"]["panels"]]
        cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
        assert places and len(set(cells)) == len(cells) and max(x for x, _ in cells) < dashboard.WIDTH


def test_files_are_written_without_network_account_or_brqat(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "WANDB_API_KEY"} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", SEALED, "--out", "here"]
    done = subprocess.run(command, cwd=tmp_path, env=env | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line.split()[1] for line in said[:2]] == [str(Path("here", f"{name}.json")) for name in MODELS]
    assert "wandb login" in said[2] and "--online" in said[2]
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["report.json", "workspace.json"]


def test_a_file_is_whole_or_what_it_was(sealed, tmp_path, monkeypatch):
    (tmp_path / "workspace.json").write_text("what it was")

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        dashboard.main(["--out", str(tmp_path)])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("workspace.json", "what it was")]


def test_online_sends_what_the_files_hold_and_prints_where_it_is(specs, monkeypatch, capsys):
    sent, made = [], []

    class Api:
        default_entity, app_url = "me", "https://wandb.test/"

        def __init__(self):
            self._service_api = self  # through which wandb-workspaces sends

        def projects(self, entity):
            return []

        def create_project(self, name, entity):
            made.append((entity, name))

        def execute_graphql(self, query, variables):
            sent.append(variables)
            return {"upsertView": {"view": {"id": "Vmlldzox", "name": "nw-abc-v"}}}

    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(wandb, "Api", Api)
    capsys.readouterr()
    assert dashboard.main(["--online", "--group", GROUP]) == 0
    assert made == [("me", "brqat")]
    assert [(view["entityName"], view["projectName"], view["type"]) for view in sent] == [
        ("me", "brqat", "runs"),
        ("me", "brqat", "project-view"),
    ]
    for view, name in zip(sent, ("report", "workspace"), strict=True):
        assert view["displayName"] == specs[name]["displayName"]
        assert nameless(json.loads(view["spec"])) == nameless(specs[name]["spec"])
    urls = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert (
        urls[0].startswith("https://wandb.test/me/brqat/reports/") and urls[1] == "https://wandb.test/me/brqat?nw=abc"
    )


def nameless(spec):
    """Without the random names of panels and sets of runs."""
    for key in ("__id__", "id"):
        for part in having(key, spec):
            del part[key]
    return spec


def test_online_without_a_login_is_refused_in_a_sentence(sealed, capsys):
    assert dashboard.main(["--online"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].count("`wandb login`") == 1


def test_online_with_a_login_that_is_not_accepted_is_refused_in_a_sentence(sealed, capsys, monkeypatch):
    def login(prompt):
        raise wandb.errors.AuthenticationError("invalid key")

    monkeypatch.setattr(wandb, "login", login)
    assert dashboard.main(["--online"]) == 2
    assert capsys.readouterr().err == "wandb did not accept the login: invalid key.\n"


def test_without_wandb_workspaces_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delitem(sys.modules, "wandb_workspaces.workspaces")
    assert dashboard.main(["--out", str(tmp_path / "out")]) == 2
    assert "pip install 'brqat[dashboard]'" in capsys.readouterr().err and not (tmp_path / "out").exists()
