"""A thousand small tasks: time and memory a task at the beginning and at the end of the stream."""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.process import hand_over, take_turns

TASKS, SPAN = 1000, 100
COLUMNS = ("all", "10")


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure with all columns of R and with the ten newest, and print milliseconds a task."""
    runs = take_turns("many_tasks", COLUMNS, lambda columns, _: ["benchmarks.many_tasks", columns], args, console)
    table = Table(title=f"{TASKS} tasks of two classes, 40 + 10 rows, ER, all reports, two checkpoints kept")
    heads = (f"tasks 1-{SPAN}, ms", f"tasks {TASKS - SPAN + 1}-{TASKS}, ms", "last / first", "MB grown since task 100")
    for column in ("columns of R", *heads):
        table.add_column(column, justify="right")
    for columns, results in runs.items():
        first, last, grown = (median(r[k] for r in results) for k in ("first", "last", "grown"))
        ratio = median(r["last"] / r["first"] for r in results)
        table.add_row(columns, f"{1e3 * first:.1f}", f"{1e3 * last:.1f}", f"{ratio:.2f}", f"{grown:.0f}")
    console.print(table)
    return {"workload": "many_tasks", "runs": runs}


def main(columns: str) -> None:
    """Learn the stream with all that the command line has on, and hand over medians of the time a task."""
    from rich.console import Console

    from cl.backbones.networks import MLP
    from cl.data.sources import synthetic
    from cl.engine.experiment import Experiment
    from cl.engine.learner import Learner
    from cl.report.contract import Report
    from cl.report.picture import PictureReport
    from cl.report.progress import ProgressBar
    from cl.report.run import Run
    from cl.report.tables import FileReport
    from cl.report.terminal import TerminalReport
    from cl.strategies.er import ER
    from cl.streams.split import split

    ends, memory = [], []

    class Clock(Report):
        def row(self, run: Run, after_task: int) -> None:
            ends.append(time.perf_counter())
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    classes = 2 * TASKS
    data = synthetic(num_classes=classes, num_train=20 * classes, num_test=5 * classes)
    stream = split(data, num_tasks=TASKS, scenario="task")
    optimizer = partial(torch.optim.SGD, lr=0.05)
    learner = Learner(stream, MLP(stream.input_shape, [64]), {"er": ER(500)}, optimizer, batch_size=10)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "terminal").open("w") as screen:
        console = Console(file=screen, force_terminal=True, force_interactive=True, width=120)
        Experiment(
            learner,
            stream,
            partial(pl.Trainer, accelerator="cpu"),
            directory=Path(folder) / "run",
            reports=[FileReport(), PictureReport(), TerminalReport(console), Clock()],
            callbacks=[ProgressBar(console)],
            columns=columns if columns == "all" else int(columns),
            keep=2,
        ).run()
    times = [b - a for a, b in pairwise(ends)]
    first, last = median(times[:SPAN]), median(times[-SPAN:])
    hand_over({"first": first, "last": last, "grown": memory[-1] - memory[SPAN]})


if __name__ == "__main__":
    main(*sys.argv[1:])
