"""A Slurm cluster of the tests' own: munged, slurmctld and slurmd on this host, in a folder that goes when they end."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE_S = 60
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
CONF = """
ClusterName=brqat
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1
JobRequeue=1
KillWait=20
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire: a requeued job is not started again before it. Without accounting there is no sacct, so that nobody but
# the job's row in the study tells that a job was cancelled.


@contextlib.contextmanager
def cluster() -> Iterator[Path]:
    """SLURM_CONF of a cluster with one node and two CPUs. Skips where it cannot be had."""
    absent = [name for name in COMMANDS if shutil.which(name, path=_path()) is None]
    if absent:
        pytest.skip(f"no Slurm: {', '.join(absent)} not found")
    if os.geteuid() != 0:
        pytest.skip("slurmd runs jobs as their user, for which it must be root")
    folder = Path(tempfile.mkdtemp(prefix="brqat-slurm-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o711)  # munged's clients reach the socket, and nothing else
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir(mode=0o700)
        (folder / "munge/key").write_bytes(os.urandom(1024))
        (folder / "munge/key").chmod(0o400)
        (folder / "plugstack.conf").touch()
        conf = folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        conf.write_text(CONF.format(host=host, folder=folder, ports=_free_ports(2)))
        files = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder}/munge/{name}" for option, name in files.items()]
        munged = ["munged", "--foreground", f"--socket={folder}/munge.socket", *options]
        _daemon(stack, folder, munged)
        _wait_for((folder / "munge.socket").exists, folder)
        _daemon(stack, folder, ["slurmctld", "-D", "-f", conf])
        _daemon(stack, folder, ["slurmd", "-D", "-f", conf])
        stack.callback(cancel_all, conf)
        _wait_for(lambda: "idle" in ask(conf, "sinfo", "--noheader", "-o", "%T"), folder)
        yield conf


def ask(conf: Path, *words: str) -> str:
    """What a command of Slurm prints, "" if it fails."""
    return subprocess.run(words, env=environment(conf), capture_output=True, text=True).stdout


def environment(conf: Path) -> dict[str, str]:
    """For a process that is to see this cluster and no other."""
    outer = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SUBMITIT_"))}
    return outer | {"SLURM_CONF": str(conf), "PATH": _path()}


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def _daemon(stack: contextlib.ExitStack, folder: Path, words: list) -> None:
    env = environment(folder / "slurm.conf")
    with open(folder / f"{words[0]}.log", "w") as log:
        process = subprocess.Popen(words, env=env, cwd=folder, stdout=log, stderr=log)
    stack.callback(_stop, process)


def _stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def cancel_all(conf: Path) -> None:
    """Ends the jobs, which would outlive the daemons."""
    ask(conf, "scancel", "--signal=KILL", "--full", "--user=root")
    ask(conf, "scancel", "--user=root")
    until = time.monotonic() + PATIENCE_S
    while ask(conf, "squeue", "--noheader") and time.monotonic() < until:
        time.sleep(0.2)


def _wait_for(holds, folder: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while not holds():
        said = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
        assert time.monotonic() < until, f"the cluster does not start:\n{said}"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
