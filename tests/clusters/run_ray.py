"""A sweep on a Ray cluster of two workers on one machine, with a job killed in the middle.

On a fresh machine, from the checkout's root:

    pip install -e '.[ray]'
    python tests/clusters/run_ray.py

It starts a head and two workers of one processor each, runs `cl-run -m launcher=ray` with four jobs, of which two
diverge, kills (SIGKILL) the process of one of the others after its second task, so that Ray starts the job again, and
checks that both finish, that they went on from their checkpoints, and that their transfer.csv is that of the same
sweep run in one process. The workers are started in another folder than the sweep: its paths mean the same there.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
from common import say, wait


class Cluster:
    """A head without a processor, and workers with one each."""

    def __init__(self, place: Path, num_workers: int = 2) -> None:
        self.place, self.num_workers, self.nodes = place, num_workers, []
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{found.getsockname()[1]}"

    def __enter__(self) -> Cluster:
        port = self.address.partition(":")[2]
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self.place / 'r'}"]
        self._start(*head, "--num-cpus=0")
        for _ in range(self.num_workers):
            self._start(f"--address={self.address}", "--num-cpus=1")
        return self

    def _start(self, *options: str) -> None:
        ray = Path(sys.executable).with_name("ray")
        elsewhere = self.place / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        log = (self.place / f"node_{len(self.nodes)}.log").open("w")
        common_options = ["--block", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
        line = [str(ray), "start", *common_options, *options]
        node = subprocess.Popen(line, cwd=elsewhere, stdout=log, stderr=subprocess.STDOUT)
        self.nodes.append(node)
        wait(
            f"{log.name} says that it has started",
            lambda: "runtime started" in Path(log.name).read_text(),
            90,
            node.poll,
        )

    def __exit__(self, *error: object) -> None:
        for node in reversed(self.nodes):
            node.terminate()
            node.wait(60)

    def jobs(self) -> set[int]:
        """Return the processes in which jobs run, of this cluster alone."""
        mine = {node.pid for node in self.nodes}
        parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
        return {pid for pid in parents if _title(pid).startswith("ray::_run_job") and mine & _line(pid, parents)}


def _parent(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return 0


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _line(pid: int, parents: dict[int, int]) -> set[int]:
    found = set()
    while pid in parents and pid not in found:
        found.add(pid)
        pid = parents[pid]
    return found


def disturb(process: subprocess.Popen[str], cluster: Cluster, sweep: Path) -> dict[Path, float]:
    """Kill a job after its second task; return when each of the two wrote its first checkpoint."""
    first = {job: common.written(job) for job in (common.job(process, sweep, seed) for seed in (0, 1))}
    old = cluster.jobs()
    killed = min(old)
    os.kill(killed, signal.SIGKILL)
    say(f"killed process {killed}, one of {len(old)} jobs")
    wait("Ray starts the job again", lambda: bool(cluster.jobs() - old), 60)
    return first


def main() -> None:
    """Run the check."""
    if importlib.util.find_spec("ray") is None:
        say("skipped, this machine has no hydra-ray-launcher (pip install -e '.[ray]')")
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    place = Path(tempfile.mkdtemp(prefix="clsim-ray-"))
    with Cluster(place) as cluster:
        began = time.monotonic()
        with common.started(place, "launcher=ray", f"hydra.launcher.ray.init.address={cluster.address}") as process:
            first = disturb(process, cluster, place / "sweep")
        say(f"the sweep took {time.monotonic() - began:.0f} s")
    common.check_not_again(first)
    common.check_same(place / "sweep", common.undisturbed(place))
    say("one job was killed, started again by Ray, went on from its checkpoints, and ends as if never stopped")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
