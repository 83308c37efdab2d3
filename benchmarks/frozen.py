"""A linear head on a frozen EfficientNet-Lite0: an epoch with the network run on each batch, or on kept outputs."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.process import hand_over, take_turns

ROWS, EPOCHS = 1000, 4
CASES = {
    "features": "its outputs, kept before",
    "vectors": "random vectors of that length, without a network",
    "images": "the network on every batch, 128 pixels",
}


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure each case, and print seconds an epoch and the share of that on images."""
    runs = take_turns("frozen", CASES, lambda case, _: ["benchmarks.frozen", case], args, console)
    table = Table(title=f"A linear head, {ROWS} images of 32x32, batches of 64; {args.threads} thread(s)")
    for column in ("input of the head", "s an epoch", "/ images, %", "s for 50,000 images"):
        table.add_column(column, justify="left" if column.startswith("input") else "right")
    for case, results in runs.items():
        seconds = median(r["epoch"] for r in results)
        share = median(r["epoch"] / other["epoch"] for r, other in zip(results, runs["images"], strict=True))
        table.add_row(CASES[case], f"{seconds:.3f}", f"{100 * share:.2f}", f"{seconds * 50_000 / ROWS:.1f}")
    console.print(table)
    return {"workload": "frozen", "runs": runs}


def main(case: str) -> None:
    """Learn one task, and hand over the median seconds of an epoch after the first."""
    import cl
    from cl.backbones.efficientnet import EfficientNetLite0
    from cl.backbones.networks import MLP
    from cl.data.task import Stream, Task, TaskData
    from cl.engine.strategy import LearnerLike, Strategy

    ends: list[float] = []

    class Clock(Strategy):
        def before_task(self, learner: LearnerLike, task: Task) -> None:
            ends.append(time.perf_counter())

        def after_epoch(self, learner: LearnerLike, task: Task, epoch: int) -> None:
            ends.append(time.perf_counter())

    draw, y = torch.Generator().manual_seed(0), torch.arange(ROWS) % 100
    if case == "vectors":
        x, backbone = torch.rand(ROWS, 1280, generator=draw), partial(MLP, hidden=[])
    else:
        x = torch.randint(0, 256, (ROWS, 3, 32, 32), generator=draw, dtype=torch.uint8)
        network = EfficientNetLite0((3, 32, 32), image_size=128, pretrained=False)
        backbone = network.requires_grad_(False).eval()
    stream = Stream([Task(0, TaskData(x, y), TaskData(x[:100], y[:100]))], num_classes=100)
    with tempfile.TemporaryDirectory() as folder:
        cl.run(
            stream,
            Clock(),
            backbone,
            epochs=EPOCHS if case != "images" else 2,
            batch_size=64,
            progress=False,
            trainer={"accelerator": "cpu"},
            feature_dir=folder if case == "features" else None,
        )
    hand_over({"epoch": median(b - a for a, b in pairwise(ends[1:]))})


if __name__ == "__main__":
    main(sys.argv[1])
