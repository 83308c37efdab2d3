"""What the sweeps on Slurm and on Ray share: how runs are started, watched and compared."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Long enough to be stopped in the middle: some ten seconds a job. With the second learning rate a job diverges at once.
SWEEP = (
    *("strategy=er", "optimizer.lr=0.1,1e25", "seed=0,1", "epochs=20", "trainer.accelerator=cpu"),
    *("report=quiet", "logger=none"),
)


def command(*arguments: str) -> list[str]:
    """Return the command line of `cl-run` in this Python."""
    return [sys.executable, "-m", "cl", *arguments]


def wait(what: str, ready: Callable[[], bool], seconds: float = 180, ended: Callable[[], Any] = lambda: None) -> None:
    """Wait until something is so, or end the script with a sentence."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end or ended() is not None:
            sys.exit(f"Waited in vain: {what}.")
        time.sleep(0.2)


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def learned(job: Path, tasks: int) -> bool:
    """Return whether a job has written its checkpoint after a task."""
    return (job / "checkpoints" / f"after_task_{tasks:03d}.ckpt").exists()


def jobs(sweep: Path) -> dict[str, Path]:
    """Return the job directories of a sweep by name."""
    return {path.name: path for path in sorted(sweep.iterdir()) if path.is_dir() and not path.name.startswith(".")}


@contextmanager
def started(place: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Start the sweep in the folder `place`; then wait for its end, and check it."""
    line = command("-m", *options, *SWEEP, "hydra.sweep.dir=sweep")
    sweep = subprocess.Popen(line, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield sweep
        out, err = sweep.communicate(timeout=600)
    except BaseException:
        sweep.kill()
        say("".join(stream[-3000:] for stream in sweep.communicate()))
        raise
    check_verdict(subprocess.CompletedProcess([], sweep.returncode, out, err))


def written(job: Path) -> float:
    """Return when a job wrote the checkpoint after its first task: later, where it began again."""
    return (job / "checkpoints" / "after_task_001.ckpt").stat().st_mtime


def check_not_again(first: dict[Path, float]) -> None:
    """Check that jobs that were stopped went on from their checkpoints."""
    for job, time_before in first.items():
        if written(job) != time_before:
            sys.exit(f"{job} began again, instead of going on from its checkpoints.")


def job(process: subprocess.Popen[str], sweep: Path, seed: int) -> Path:
    """Wait until a job that does not diverge has learned two tasks, and return its directory."""
    wait(f"the job of seed {seed} starts", lambda: any(sweep.glob(f"*lr=0.1,*seed={seed},*")), ended=process.poll)
    found = next(sweep.glob(f"*lr=0.1,*seed={seed},*"))
    wait(f"{found} learns two tasks", lambda: learned(found, 2), ended=process.poll)
    if learned(found, 5):
        sys.exit(f"{found} finished before it could be stopped: give it more epochs.")
    return found


def undisturbed(place: Path) -> Path:
    """Run the sweep in this process' children, one job after the other, and return its directory."""
    out = place / "undisturbed"
    done = subprocess.run(command("-m", *SWEEP, f"hydra.sweep.dir={out}"), cwd=place, capture_output=True, text=True)
    check_verdict(done)
    return out


def check_verdict(done: subprocess.CompletedProcess[str]) -> None:
    """Check that the two jobs that diverge are told, and that they alone are lost."""
    verdict = [line for line in done.stderr.splitlines() if line.startswith("2 of 4 jobs failed:")]
    if done.returncode != 1 or len(verdict) != 1 or "Traceback" in done.stderr:
        sys.exit(f"Wrong end (status {done.returncode}):\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    say(verdict[0])


def check_same(sweep: Path, expected: Path) -> None:
    """Check that the jobs of a sweep have the directories, and those that did not fail the R, of another one."""
    here, there = jobs(sweep), jobs(expected)
    if here.keys() != there.keys():
        sys.exit(f"Other directories: {sorted(here)} and {sorted(there)}.")
    whole = [name for name in there if learned(there[name], 5)]
    if len(whole) != 2:
        sys.exit(f"{len(whole)} of the 2 jobs that can finish did.")
    for name in whole:
        if (here[name] / "transfer.csv").read_bytes() != (there[name] / "transfer.csv").read_bytes():
            sys.exit(f"{here[name]}/transfer.csv is not that of the undisturbed run.")
    for argument in ("", "--unfinished"):
        call = "from cl.compare.command import main; main()"
        compare = [sys.executable, "-c", call, str(sweep), "--out", str(sweep), *argument.split()]
        done = subprocess.run(compare, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"cl-compare {sweep} {argument}: {done.stderr[-2000:]}")
