"""A long run, 200 tasks: what the first tasks cost beside what the last ones cost, and how every file grows.

    python tests/harness/soak.py                    some minutes
    python tests/harness/soak.py --tasks 50
    python tests/harness/soak.py --resumes 10       kill it inside a task ten times first, and look at the directory

ER and GPM together on permuted tasks, all reports, two checkpoints kept, one every 5 steps. Tables grow by a row a task
and column; R, and what is drawn of it, is T x T by nature, and with --points so are the evaluations inside tasks, which
look at all tasks so far; nothing else may grow.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from attempt import Attempt, run, warm


def arguments(tasks: int, points: str) -> list[str]:
    """Return the command."""
    return [
        *("stream=permuted", f"stream.num_tasks={tasks}", "dataset=synthetic", "dataset.num_train=200"),
        *("dataset.num_test=40", "dataset.num_classes=4", "epochs=2", "batch_size=10", "backbone.hidden=[32]"),
        *("strategy=[er,gpm]", "strategy.er.memory_size=200", "strategy.gpm.num_samples=20", "log_every=10"),
        *("report.subset=20", "report.columns=10", "report.flops=true", f"report.points={points}"),
        *("trainer.accelerator=cpu", "checkpoint.keep=2", "checkpoint.every=5", "chunk_size=5", "hydra.run.dir=out"),
    ]


def resident() -> float:
    """Return the resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def watch(say: Any) -> None:
    """Have every saved checkpoint tell time, memory and the sizes of all files."""
    from cl.engine import checkpoint

    save, state = checkpoint.save, {"at": time.perf_counter(), "cpu": time.process_time()}

    def told(learner: Any, folder: Path, *rest: Any) -> Path:
        path = save(learner, folder, *rest)
        now, cpu = time.perf_counter(), time.process_time()
        sizes: dict[str, int] = {}
        for file in folder.parent.rglob("*"):
            if file.is_file():
                name = str(file.relative_to(folder.parent))
                name = name.rpartition("_")[0] + "_*" if name.endswith(".ckpt") else name
                sizes[name] = max(sizes.get(name, 0), file.stat().st_size)
        files = sum(1 for file in folder.parent.rglob("*") if file.is_file())
        spent, used = now - state["at"], cpu - state["cpu"]
        say((learner.tasks_learned, spent, used, resident(), files, sizes))
        state["at"], state["cpu"] = time.perf_counter(), time.process_time()
        return path

    checkpoint.save = told  # type: ignore[assignment]


def mean(rows: list[Any], place: int) -> float:
    """Return the mean of one column."""
    return sum(row[place] for row in rows) / len(rows)


def show(rows: list[Any], tasks: int) -> None:
    """Print the first ten tasks (but for the very first, which loads what it needs) beside the last ten."""
    first, last = rows[2:12], rows[-10:]
    print(f"{'':28}{'tasks 2-11':>14}{f'tasks {tasks - 9}-{tasks}':>16}")
    columns = ("seconds a task", 1, "s"), ("processor time a task", 2, "s"), ("resident memory", 3, "MB")
    for name, place, unit in columns:
        print(f"{name:28}{mean(first, place):11.3f} {unit:3}{mean(last, place):12.3f} {unit}")
    marks = sorted({11, *range(50, tasks, 50), tasks})
    print("resident memory in MB after", ", ".join(f"{k}: {rows[k][3]:.0f}" for k in marks if k < len(rows)))
    print(f"{'files':28}{rows[2][4]:14d}{rows[-1][4]:16d}")
    print(f"{'size in bytes':28}{'after 2':>14}{f'after {tasks}':>16}")
    for name, size in sorted(rows[-1][5].items()):
        print(f"  {name:26}{rows[2][5].get(name, 0):14d}{size:16d}")


def resumes(place: Path, command: list[str], times: int) -> None:
    """Kill the run after some checkpoints inside a task, over and over; print the files and bytes of its directory."""
    for number in range(times):
        attempt = Attempt(place, command, at=f"step_{(5 * (number % 7 + 1)):08d}")
        assert attempt.wait() == -signal.SIGKILL, attempt.log.read_text()
        files = [file for file in (place / "out").rglob("*") if file.is_file()]
        left = [file.name for file in files if file.name.endswith(".tmp")]
        print(f"kill {number + 1}: {len(files)} files, {sum(f.stat().st_size for f in files)} bytes, temporary: {left}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--resumes", type=int, default=0)
    parser.add_argument("--points", default="null", help="evaluations inside a task: each looks at all tasks so far")
    options = parser.parse_args()
    warm()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        os.chdir(folder)
        command = arguments(options.tasks, options.points)
        resumes(Path(folder), command, options.resumes)
        rows: list[Any] = []
        watch(rows.append)
        sys.stdout.flush()
        output = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = run(command)
        sys.stdout.flush()
        os.dup2(output, 1)
        if status != 0:
            sys.exit(status)
        show(rows, options.tasks)


if __name__ == "__main__":
    main()
