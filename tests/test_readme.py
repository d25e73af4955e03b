"""Every command in README.md is run: the two that set themselves up on a fresh clone, the others cut short."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line.strip()
]
SETUP = [command for command in COMMANDS if command.startswith("python3 -m venv")]
OTHERS = [command for command in COMMANDS if command not in SETUP]
# Cut short: one epoch instead of the run's own, no dashboard, few trials. A later override wins.
SHORT = " epochs=1 warmup_epochs=0 tracking=files"
FEW = " hydra.sweeper.n_trials=5"


def environment(tmp_path):
    bin_folder = Path(sys.executable).parent
    return os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "BRQAT_CACHE": str(tmp_path / "cache"),
        "PYTEST_ADDOPTS": "-n 0",  # the pytest around this one has work for both cores
    }


def shell(command, cwd, env):
    done = subprocess.run(["bash", "-c", command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_readme_leads_with_two_commands_that_set_themselves_up():
    assert len(SETUP) == 2 and COMMANDS[:2] == SETUP
    assert SETUP[1] in (ROOT / ".ci" / "run").read_text()


def test_the_table_is_what_the_stored_runs_give(tmp_path):
    command = "python -m multirun_analysis docs/runs/digits --out " + str(tmp_path)
    printed = [line for line in shell(command, ROOT, environment(tmp_path)).splitlines() if line.startswith("|")]
    assert len(printed) > 2 and "\n".join(printed) in README


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which README's commands run one after the other, with pictures of two classes in FOLDER."""
    folder = tmp_path_factory.mktemp("readme")
    for part in ("train", "test"):
        for shade, name in ((40, "dark"), (200, "light")):
            (folder / "FOLDER" / part / name).mkdir(parents=True)
            for number in range(80):
                picture = Image.new("RGB", (16, 16), (shade, (shade + 3 * number) % 256, number))
                picture.save(folder / "FOLDER" / part / name / f"{number}.png")
    return folder


def studies_served(command, folder):
    """Names of the studies that a dashboard shows; it runs until it is stopped, here once it has answered."""
    words = shlex.split(command)
    if shutil.which(words[0], path=environment(folder)["PATH"]) is None:
        pytest.skip(f"no {words[0]}: pip install 'brqat[dashboard]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [*words, "--port", str(port)], cwd=folder, env=environment(folder), stdout=out, stderr=out
        )
    try:
        until = time.monotonic() + 60
        while True:
            assert server.poll() is None and time.monotonic() < until, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=60) as answer:
                    return [study["study_name"] for study in json.load(answer)["study_summaries"]]
            except urllib.error.URLError:
                time.sleep(0.2)
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("command", OTHERS)
def test_command(command, workplace):
    if command.startswith("optuna-dashboard "):
        assert studies_served(command, workplace) == ["lambda_bits"]
        return
    if command.startswith("brqat ") and "--help" not in command:
        # A data set that would be downloaded is composed, not trained.
        command += " --cfg job" if "dataset=cifar10" in command else SHORT
        if "sweep=" in command or "hydra/sweeper=" in command:
            command += FEW
        if " epochs=0" in command:  # no epoch to cut short, but the float network's
            command = command.replace(" epochs=1", " pretrain_epochs=1").replace(" warmup_epochs=0", "")
    out = shell(command, workplace, environment(workplace))
    assert out.strip()


@pytest.mark.slow
def test_the_first_command_on_a_fresh_clone(tmp_path):
    """Its own environment, the real run, and a last line that says where the results are."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    env = {k: v for k, v in environment(tmp_path).items() if k != "PYTHONPATH"}
    env["PATH"] = os.environ["PATH"]
    try:
        out = shell(SETUP[0], clone, env)
        folder = Path(re.search(r"results in (\S+)", out.splitlines()[-1])[1])
        assert (folder / "summary.json").is_file()
        installed = shell(".venv/bin/pip install -q . && cd / && " + str(clone) + "/.venv/bin/brqat --help", clone, env)
        assert "quantizer: lsq, sign" in installed  # conf/ travels in the wheel
    finally:
        shutil.rmtree(clone / ".venv", ignore_errors=True)
