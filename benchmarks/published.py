"""Rows of papers' tables beside ours: `python -m benchmarks published --data DIR --only 'split_mnist_*'`.

Each row is an experiment of `conf/experiment`, run by `cl-run` for three seeds; what is finished under `--out` is not
run again. A mean of ours that is off by more than the standard deviation over its seeds is marked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """A row of a table: an experiment, and what is published of it in %.

    Args:
        experiment: Of `conf/experiment`.
        accuracy: Average accuracy by mask ("class", "task", "domain"), None where there is no figure.
        bwt: Backward transfer of the GEM paper, under the first of the masks.
        options: More of the command, such as another scenario.
    """

    experiment: str
    accuracy: dict[str, float | None]
    bwt: float | None = None
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The experiment and what is different from it."""
        return " ".join([self.experiment, *self.options])


def _der(name: str, in_class: float | None, in_task: float | None) -> Row:
    return Row(f"split_mnist_{name}", {"class": in_class, "task": in_task})


# Buzzega et al. 2020, supplementary table of S-MNIST (means of ten runs); class- and task-incremental.
DER_PAPER = [
    _der("finetune", 19.60, 94.94),
    _der("er200", 80.43, 97.86),
    _der("er500", 86.12, 99.04),
    _der("derpp500", 91.00, 98.94),
    _der("joint", 95.57, 99.51),
]
# Saha et al. 2021, table 1, and Lin et al. 2022, table 1.
GPM_PAPER = [
    Row("permuted_mnist_gpm", {"domain": 93.91}, -3.0),
    Row("permuted_mnist_ewc", {"domain": 89.97}, -4.0),
    Row("permuted_mnist_agem", {"domain": 83.56}, -14.0),
    Row("permuted_mnist_er", {"domain": 87.24}, -11.0),
]
VIT = [Row(f"cifar100_vit_{name}", {"class": None}) for name in ("finetune", "linear", "ncm", "l2p")]
ROWS = [*DER_PAPER, *GPM_PAPER, *VIT]


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the rows that are chosen, and print each beside what is published."""
    rows = [row for row in ROWS if fnmatch(row.name, args.only)]
    if not rows or not args.data:
        raise SystemExit(f"published needs --data, and --only of: {', '.join(row.name for row in ROWS)}")
    table = Table()
    for column in ("experiment", "mask", "ours, %", "published", "BWT", "published"):
        table.add_column(column, justify="left" if column in ("experiment", "mask") else "right")
    found = {}
    for row in rows:
        found[row.name] = runs = _run(row, args, console)
        for mask, figure in row.accuracy.items():
            first = mask == next(iter(row.accuracy))
            table.add_row(
                row.name if first else "",
                mask,
                _beside([run[mask]["average_accuracy"] for run in runs], figure),
                "" if figure is None else f"{figure:.2f}",
                _beside([run[mask].get("bwt_gem") for run in runs], row.bwt if first else None, digits=1),
                "" if row.bwt is None or not first else f"{row.bwt:g}",
            )
    console.print(table)
    return {"workload": "published", "seeds": SEEDS, "rows": found}


def _run(row: Row, args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Run an experiment for every seed; return each one's scalars by mask."""
    root = Path(args.data) / "cifar100" if row.experiment.startswith("cifar100") else Path(args.data)
    place = args.out / row.name.replace(" ", ",")
    command = [sys.executable, "-m", "cl", "-m", f"experiment={row.experiment}", *row.options, f"dataset.root={root}"]
    seeds = ",".join(map(str, SEEDS))
    command += [f"seed={seeds}", "report=quiet", "trainer.accelerator=cpu", f"hydra.sweep.dir={place}"]
    console.print(f"cl-run {' '.join(command[3:])}", style="dim", soft_wrap=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    if subprocess.run(command, env=environment).returncode:
        raise SystemExit(f"{row.name} did not finish: what it says stands above.")
    runs = [json.loads(path.read_text()) for path in sorted(place.glob("*/transfer.json"))]
    return [{mask: _values(part["scalars"]) for mask, part in run["masks"].items()} for run in runs]


def _values(scalars: dict[str, Any]) -> dict[str, float]:
    return {name: entry["value"] for name, entry in scalars.items()}


def _beside(values: list[float | None], published: float | None, digits: int = 2) -> str:
    """Return mean and standard deviation in %, marked where they are far from the published figure."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    spread = stdev(known) if len(known) > 1 else 0.0
    far = published is not None and abs(mean(known) - published) > spread
    return f"{mean(known):.{digits}f} ± {spread:.{digits}f}{' *' if far else ''}"
