"""One big run: every strategy on the default stream in one process and in two, three seeds each."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.process import matches
from benchmarks.strategies import NAMES, TOLD

ONE_PROCESS = ("scr", "pcr", "hpcr", "dvc", "ocm", "onpro")  # refuse several
PROMPTS = "l2p", "dualprompt", "coda_prompt", "s_prompts", "multilane"
STRATEGIES = *(name for name in NAMES if name not in ONE_PROCESS), *PROMPTS
SEEDS = (0, 1, 2)
Jobs = list[tuple[str, int]]


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Print mean and standard deviation of the average accuracy over the seeds, and seconds a run."""
    from cl.app.instantiate import instantiate
    from cl.trainer.processes import run

    strategies = [name for name in STRATEGIES if matches(name, args.only)]
    jobs = [(strategy, seed) for strategy in strategies for seed in SEEDS]
    found = {1: learn_all(jobs, 1), 2: run(instantiate(_compose("finetune", 0, 2).trainer), learn_all, jobs, 2)}
    about = f"Split-Digits, class-incremental ({', '.join(TOLD)}: task-incremental), 5 epochs"
    table = Table(title=f"{about}; average accuracy, %, {len(SEEDS)} seeds")
    for column in ("strategy", "one process", "two processes", "difference", "s a run", "s a run of two"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for strategy in strategies:
        one, two = ([found[n][strategy, seed] for seed in SEEDS] for n in (1, 2))
        first, second = ([100 * accuracy for accuracy, _ in runs] for runs in (one, two))
        table.add_row(
            strategy,
            *(f"{mean(values):.2f} ± {stdev(values):.2f}" for values in (first, second)),
            f"{mean(second) - mean(first):+.2f}",
            *(f"{mean(seconds for _, seconds in runs):.1f}" for runs in (one, two)),
        )
    console.print(table)
    rows = [[n, *job, *values] for n, runs in found.items() for job, values in runs.items()]
    return {"workload": "processes", "columns": ["processes", "strategy", "seed", "accuracy", "seconds"], "rows": rows}


def learn_all(jobs: Jobs, processes: int) -> dict[tuple[str, int], tuple[float, float]]:
    """Run each strategy and seed; return final average accuracy and seconds."""
    from cl.app.build import build
    from cl.distributed import from_first

    found = {}
    for job in jobs:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            done = build(_compose(*job, processes), Path(from_first(lambda folder=folder: folder))).run()  # type: ignore[misc]
            found[job] = float(done.scalars(_scenario(job[0]))["average_accuracy"]), time.perf_counter() - began
    return found


def _scenario(strategy: str) -> str:
    return "task" if strategy in TOLD else "class"


def _compose(strategy: str, seed: int, processes: int) -> Any:
    from hydra import compose, initialize_config_module

    trainer = ["trainer=ddp", f"trainer.devices={processes}"] if processes > 1 else []
    with initialize_config_module("cl.conf", version_base="1.3"):
        own = [f"strategy={strategy}", f"scenario={_scenario(strategy)}", f"seed={seed}"]
        cfg = compose("config", [*own, "logger=none", "report=quiet", *trainer])
    cfg.report, cfg.trainer.accelerator = None, "cpu"
    return cfg
