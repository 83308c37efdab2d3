"""What each strategy costs: processor time of a short job as a multiple of fine-tuning's.

Beside it stands the multiple of the operations (torch's counter, over the whole job: training, what is computed between
tasks, evaluations), which is what the extra forward and backward passes explain, and the quotient of the two. Counting
is slow, so they are counted on the first rows of each task, twice, and drawn out to all: they grow in a straight line.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.process import hand_over, matches, take_turns
from benchmarks.workloads import WORKLOADS, Arrays, load

if TYPE_CHECKING:
    from cl.data.task import Stream
    from cl.engine.learner import Learner

NAMES = (
    *("finetune", "joint", "cumulative", "er", "er_ace", "uer", "der", "derpp", "mir", "scr", "pcr", "hpcr"),
    *("dvc", "ocm", "onpro", "icarl", "wa", "bic", "lucir", "podnet", "gdumb"),
    *("agem", "gem", "ogd", "gpm", "sgp", "trgp", "cuber", "adam_nscl", "tag", "ewc", "online_ewc", "si", "mas", "lwf"),
    *("packnet", "hat", "supsup", "ncm", "ranpac", "slda", "fecam", "knn", "acil"),
    *("lora", "o_lora", "inflora", "sd_lora", "aper", "ease", "scalearn", "slca", "lst", "lingocl", "zscl"),
    *("gss", "aser", "er_las", "xder", "rwalk", "mer", "generative_replay", "cbp"),
)
FEW = 1000, 2000  # rows a task; no strategy's default samples more for what it computes between tasks
TOLD = ("trgp", "cuber", "packnet", "hat", "scalearn")  # the task, at test


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every strategy, and print multiples of the first."""

    def command(name: str, *more: str) -> list[str]:
        return ["benchmarks.strategies", name, args.data, *more]

    names = [name for name in NAMES if name == "finetune" or matches(name, args.only)]
    once = argparse.Namespace(**{**vars(args), "repeat": 1})

    def count(rows: int) -> dict[str, list[dict[str, Any]]]:
        return take_turns(
            f"operations of {rows} rows a task", names, lambda name, _: command(name, str(rows)), once, console
        )

    few, more = map(count, FEW)
    counts = {name: whole(few[name][0], more[name][0]) for name in names}
    times = take_turns("strategies", names, lambda name, _: command(name), args, console)
    table = Table(title="online_mlp's stream under each strategy with its defaults")
    for column in ("strategy", "processor, s", "/ finetune", "operations / finetune", "quotient", "us a step"):
        table.add_column(column, justify="right" if column != "strategy" else "left")
    for name, turns in times.items():
        middle = median(turn["processor"] for turn in turns)
        ratio = median(t["processor"] / f["processor"] for t, f in zip(turns, times["finetune"], strict=True))
        explained = counts[name] / counts["finetune"]
        each = f"{1e6 * middle / turns[0]['steps']:.0f}" if turns[0]["steps"] else "-"
        table.add_row(name, f"{middle:.2f}", f"{ratio:.2f}", f"{explained:.2f}", f"{ratio / explained:.2f}", each)
    console.print(table)
    return {"workload": "strategies", "runs": times, "operations": counts}


def whole(few: dict[str, float], more: dict[str, float], rows: tuple[int, int] = FEW) -> float:
    """Return the operations on all rows of a task from those on a few and on more of them."""
    slope = (more["operations"] - few["operations"]) / (rows[1] - rows[0])
    return few["operations"] + slope * (few["rows"] - rows[0])


def job(name: str, tasks: list[Arrays]) -> tuple[Learner, Stream]:
    """Return a learner with a strategy made from its configuration, and online_mlp's tasks as its stream."""
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    from benchmarks import clsim

    workload = WORKLOADS["online_mlp"]
    stream = clsim.stream(workload, tasks, "task" if name in TOLD else None)
    with initialize_config_module("cl.conf", version_base="1.3"):
        config = compose("config", overrides=[f"strategy={name}"]).strategy
    strategies = {key: instantiate(value) for key, value in (config or {}).items()}
    return clsim.learner(workload, stream, strategies, train_mask=stream.scenario), stream


def main(name: str, data: str, rows: str = "") -> None:
    """Time one strategy, or count its operations on the first rows of each task."""
    import pytorch_lightning as pl

    from cl.engine.experiment import Experiment

    tasks, _ = load(WORKLOADS["online_mlp"], Path(data) if data else None)
    mean = sum(len(task[0]) for task in tasks) / len(tasks)
    tasks = [(x[: int(rows)], y[: int(rows)], v, w) for x, y, v, w in tasks] if rows else tasks
    learner, stream = job(name, tasks)
    experiment = Experiment(learner, stream, partial(pl.Trainer, accelerator="cpu"), epochs=1)
    if rows:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            experiment.run()
        hand_over({"operations": counter.get_total_flops(), "rows": mean})
        return
    start = time.process_time()
    experiment.run()
    hand_over({"processor": time.process_time() - start, "steps": learner.total_steps})


if __name__ == "__main__":
    main(*sys.argv[1:])
