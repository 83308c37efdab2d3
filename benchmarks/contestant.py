"""One contestant, one workload, one process: hands over what it measured."""

from __future__ import annotations

import importlib
import resource
import sys
import time
from pathlib import Path

import torch

from benchmarks.process import hand_over
from benchmarks.workloads import WORKLOADS, load

CONTESTANTS = {
    "bare": ("benchmarks.bare", "run"),
    "clsim": ("benchmarks.clsim", "run"),
    "clsim+reports": ("benchmarks.clsim", "run_with_reports"),
    "clsim+probes": ("benchmarks.clsim", "run_with_probes"),
    "clsim+curves": ("benchmarks.clsim", "run_with_curves"),
    "lightning": ("benchmarks.lightning", "run"),
    "avalanche": ("benchmarks.avalanche", "run"),
}


def main(name: str, workload: str, data: str, seed: str) -> None:
    """Measure one run; importing and loading the data stand outside the clock."""
    job = WORKLOADS[workload]
    tasks, about = load(job, Path(data) if data else None)
    module, function = CONTESTANTS[name]
    run = getattr(importlib.import_module(module), function)
    torch.manual_seed(int(seed))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall, processor = time.perf_counter(), time.process_time()
    row, steps = run(job, tasks)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = {
        "wall": wall,
        "processor": processor,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "steps": steps,
        "accuracy": 100 * sum(row) / len(row),
        "data": about,
    }
    hand_over(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
