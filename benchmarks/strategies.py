"""What each strategy costs: processor time of a short job as a multiple of fine-tuning's."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.process import hand_over, take_turns
from benchmarks.workloads import WORKLOADS, load

NAMES = ("finetune", "er", "derpp", "ewc", "lwf", "agem", "gpm", "ncm", "cumulative", "joint")


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every strategy, and print multiples of the first."""
    times = take_turns("strategies", NAMES, lambda name, _: ["benchmarks.strategies", name, args.data], args, console)
    table = Table(title="online_mlp's stream under each strategy with its defaults")
    for column in ("strategy", "processor, s", "/ finetune", "us a step"):
        table.add_column(column, justify="right" if column != "strategy" else "left")
    for name, turns in times.items():
        middle = median(turn["processor"] for turn in turns)
        base = median(t["processor"] / f["processor"] for t, f in zip(turns, times["finetune"], strict=True))
        steps = turns[0]["steps"]
        table.add_row(name, f"{middle:.2f}", f"{base:.2f}", f"{1e6 * middle / steps:.0f}" if steps else "-")
    console.print(table)
    return {"workload": "strategies", "runs": times}


def main(name: str, data: str) -> None:
    """Time one strategy, made from its configuration."""
    import pytorch_lightning as pl
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    from benchmarks import clsim
    from cl.experiment import Experiment

    workload = WORKLOADS["online_mlp"]
    tasks, _ = load(workload, Path(data) if data else None)
    stream = clsim.stream(workload, tasks)
    with initialize_config_module("cl.conf", version_base="1.3"):
        config = compose("config", overrides=[f"strategy={name}"]).strategy
    learner = clsim.learner(workload, stream, {key: instantiate(value) for key, value in (config or {}).items()})
    start = time.process_time()
    Experiment(learner, stream, partial(pl.Trainer, accelerator="cpu"), epochs=1).run()
    result = {"processor": time.process_time() - start, "steps": learner.total_steps}
    hand_over(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
