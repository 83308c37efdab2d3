"""The memory's step, insert and sample 64 images, as the capacity grows from a thousand to a million."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.process import hand_over, take_turns

CAPACITIES = (10**3, 10**4, 10**5, 10**6)
POLICIES = ("bare", "reservoir", "class_balanced", "ring")  # bare: the same rows read and written, nothing decided
ROWS, STEPS = 64, 2000


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every policy at every capacity, and print microseconds a step."""
    cases = [(policy, capacity) for policy in POLICIES for capacity in CAPACITIES]
    runs = take_turns("memory", cases, lambda case, _: ["benchmarks.memory", *map(str, case)], args, console)
    times = {case: [result["us"] for result in results] for case, results in runs.items()}
    table = Table(title=f"insert {ROWS} and sample {ROWS} images of 1x28x28, processor us a step, full memory")
    for column in ("policy", *(f"{c:,}" for c in CAPACITIES), "last / first"):
        table.add_column(column, justify="right")
    for policy in POLICIES:
        middle = [median(times[policy, c]) for c in CAPACITIES]
        table.add_row(policy, *(f"{m:.0f}" for m in middle), f"{middle[-1] / middle[0]:.2f}")
    console.print(table)
    return {"workload": "memory", "us": {f"{p} {c}": v for (p, c), v in times.items()}}


def main(policy: str, capacity: str) -> None:
    """Fill a memory and time steps on it."""
    size = int(capacity)
    x = torch.randint(256, (10_000, 1, 28, 28), dtype=torch.uint8)
    y = torch.arange(10_000) % 100
    step = _bare(size, x, y) if policy == "bare" else _step(policy, size, x, y)
    for k in range(20):
        step(k)
    start = time.process_time()
    for k in range(STEPS):
        step(k)
    result = {
        "us": (time.process_time() - start) / STEPS * 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    hand_over(result)


def _step(policy: str, size: int, x: Tensor, y: Tensor) -> Callable[[int], object]:
    from cl.data.task import Stream, Task, TaskData
    from cl.engine.batch import Batch
    from cl.toolkit.memory import Memory

    task = torch.zeros(len(y), dtype=torch.int64)
    data = TaskData(x, y)
    memory = Memory(size, Stream([Task(0, data, data)], num_classes=100), policy)
    for _ in range(max(1, size // len(y))):
        memory.insert(Batch(x, y, task))
    starts = range(0, len(y) - ROWS, ROWS)
    batches = [Batch(x[i : i + ROWS], y[i : i + ROWS], task[:ROWS]) for i in starts]

    def step(k: int) -> None:
        if k % 16 == 0:
            memory.num_seen = 10 * size  # so that a reservoir of any size takes about one row in ten
        memory.insert(batches[k % len(batches)])
        memory.sample(ROWS)

    return step


def _bare(size: int, x: Tensor, y: Tensor) -> Callable[[int], object]:
    rows, labels = torch.zeros(size, *x.shape[1:], dtype=x.dtype), torch.zeros(size, dtype=torch.int64)
    rows += 1  # else all rows are one page of zeros

    def step(k: int) -> tuple[Tensor, Tensor]:
        slots = torch.randint(size, (ROWS // 10,))
        rows[slots], labels[slots] = x[: ROWS // 10], y[: ROWS // 10]
        drawn = torch.randint(size, (ROWS,))
        return rows[drawn], labels[drawn]

    return step


if __name__ == "__main__":
    main(*sys.argv[1:])
