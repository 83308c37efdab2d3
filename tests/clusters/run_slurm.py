"""A sweep on a Slurm of one machine, with two jobs stopped in the middle and queued again.

On a fresh Debian or Ubuntu machine, from the checkout's root (no systemd, no root needed after the first line):

    apt-get install -y --no-install-recommends slurm-wlm munge
    pip install -e '.[slurm]'
    python tests/clusters/run_slurm.py

It starts munged, slurmctld and slurmd in a temporary folder, runs `cl-run -m launcher=submitit_slurm` with four jobs,
of which two diverge, stops the other two after their second task (one by `scontrol requeue`, one by the signal that
Slurm sends before a job's time is over), and checks that both finish, that they went on from their checkpoints, and
that their transfer.csv is that of the same sweep run in one process.
"""

from __future__ import annotations

import getpass
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import common
from common import say, wait

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
CONFIG = """\
ClusterName=clsim
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
SchedulerParameters=batch_sched_delay=1,sched_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return what this machine lacks, in a sentence."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"no {', '.join(lacking)} (apt-get install slurm-wlm munge)"
    if importlib.util.find_spec("submitit") is None:
        return "no hydra-submitit-launcher (pip install -e '.[slurm]')"
    return None


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Slurm:
    """A Slurm of this machine alone, with two processors, in a folder of its own."""

    def __init__(self, place: Path) -> None:
        self.place, self.daemons = place, []
        for name in ("munge", "state", "spool"):
            (place / name).mkdir(mode=0o700)
        host = socket.gethostname().split(".")[0]
        ports = {"controller": _port(), "daemon": _port()}
        config = place / "slurm.conf"
        config.write_text(CONFIG.format(place=place, host=host, user=getpass.getuser(), **ports))
        os.environ["SLURM_CONF"] = str(config)

    def __enter__(self) -> Slurm:
        munge = self.place / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        files = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed", "socket": "socket"}
        self._start("munged", "-F", "--force", *(f"--{option}={munge / name}" for option, name in files.items()))
        wait("munged listens", (munge / "socket").exists, 20)
        self._start("slurmctld", "-D", "-c")
        wait("slurmctld answers", lambda: subprocess.run(["scontrol", "ping"], capture_output=True).returncode == 0, 30)
        self._start("slurmd", "-D")
        wait("the node is idle", lambda: ask("sinfo", "-h", "-o", "%T") == "idle", 60)
        return self

    def _start(self, *command: str) -> None:
        log = (self.place / f"{command[0]}.out").open("w")
        self.daemons.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))

    def __exit__(self, *error: object) -> None:
        subprocess.run(["scancel", "--user", getpass.getuser()], capture_output=True)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(30)


def ask(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def number(job: Path) -> str:
    """Return Slurm's number of a job, which Hydra wrote into its directory."""
    from omegaconf import OmegaConf

    return str(OmegaConf.load(job / ".hydra" / "hydra.yaml").hydra.job.id)


def disturb(process: subprocess.Popen[str], sweep: Path) -> dict[Path, float]:
    """Stop the two jobs that do not diverge after their second task; return when each wrote its first checkpoint."""
    first = {}
    for seed, way in enumerate((["scontrol", "requeue"], ["scancel", "--signal=USR2"])):
        job = common.job(process, sweep, seed)
        first[job], name = common.written(job), number(job)
        subprocess.run([*way, name], check=True)
        say(f"{' '.join(way)} {name} after two tasks of {job.name}")
        wait(f"{name} is queued again", lambda n=name: "Restarts=1" in ask("scontrol", "show", "job", n))
    return first


def main() -> None:
    """Run the check."""
    lacking = missing()
    if lacking is not None:
        say(f"skipped, this machine has {lacking}")
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    place = Path(tempfile.mkdtemp(prefix="clsim-slurm-"))
    with Slurm(place):
        began = time.monotonic()
        with common.started(place, "launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1") as process:
            first = disturb(process, place / "sweep")
        say(f"the sweep took {time.monotonic() - began:.0f} s")
    common.check_not_again(first)
    common.check_same(place / "sweep", common.undisturbed(place))
    say("two jobs were stopped and queued again, went on from their checkpoints, and end as those never stopped")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
