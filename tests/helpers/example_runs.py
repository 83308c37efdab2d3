"""Runs with numbers that are known, without training."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console
from rich.style import Style

from cl.metrics.transfer import (
    TransferMatrix,
    worked_example,
)
from cl.report.run import Run


def make_run(num_tasks: int, scenario: str = "class", rows: int | None = None, directory: Path = Path("run")) -> Run:
    """Return a run whose first `rows` rows (default: all) are measured with random numbers."""
    generator = torch.Generator().manual_seed(num_tasks)
    masks = {"class": ["class", "task"], "task": ["task", "class"], "domain": ["domain"]}[scenario]
    matrices = {mask: TransferMatrix(num_tasks, mask) for mask in masks}
    for matrix in matrices.values():
        for i in range(num_tasks + 1 if rows is None else rows):
            matrix.record(i, torch.rand(num_tasks, generator=generator))
    return Run(directory, {}, [f"part-{j}" for j in range(num_tasks)], scenario, matrices, ["A note."])


def example_run(directory: Path = Path("run"), mask: str = "task") -> Run:
    run = Run(directory, {}, ["a", "b", "c"], mask, {mask: TransferMatrix(3, mask)})
    for i, row in enumerate(worked_example()):
        run.primary.record(i, row)
    return run


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


def plain(width: int = 80) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=False, width=width), text


def coloured(width: int = 100) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    Style.parse.cache_clear()  # a style keeps the codes of the console that printed it first
    Style._add.cache_clear()
    return Console(file=text, force_terminal=True, color_system="truecolor", width=width), text
