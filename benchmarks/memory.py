"""The memory's step, insert and sample 64 images, as the capacity grows from a thousand to a million."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

CAPACITIES = (10**3, 10**4, 10**5, 10**6)
POLICIES = ("reservoir", "class_balanced", "ring")
ROWS, STEPS = 64, 2000


def measure(args: argparse.Namespace, run: Callable[[list[str], int], dict[str, Any]], console: Console) -> Any:
    """Measure every policy at every capacity, in turn, and print microseconds a step."""
    cases = [(policy, capacity) for policy in POLICIES for capacity in CAPACITIES]
    times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for turn in range(args.repeat):
        for policy, capacity in cases:
            console.print(f"memory: turn {turn + 1} of {args.repeat}, {policy}, {capacity}", style="dim")
            times[policy, capacity].append(run(["benchmarks.memory", policy, str(capacity)], args.threads)["us"])
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
    from cl.memory import Memory
    from cl.strategy import Batch
    from cl.task import Stream, Task, TaskData

    size = int(capacity)
    x = torch.randint(256, (10_000, 1, 28, 28), dtype=torch.uint8)
    y = torch.arange(10_000) % 100
    task = torch.zeros(10_000, dtype=torch.int64)
    data = TaskData(x, y)
    memory = Memory(size, Stream([Task(0, data, data)], num_classes=100), policy)
    for _ in range(max(1, size // 10_000)):
        memory.insert(Batch(x, y, task))
    batches = [Batch(x[i : i + ROWS], y[i : i + ROWS], task[:ROWS]) for i in range(0, 9_000, ROWS)]
    for batch in batches[:20]:
        memory.insert(batch)
        memory.sample(ROWS)
    start = time.process_time()
    for step in range(STEPS):
        memory.insert(batches[step % len(batches)])
        memory.sample(ROWS)
    result = {
        "us": (time.process_time() - start) / STEPS * 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    os.write(int(os.environ["RESULT_FD"]), json.dumps(result).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
