"""Rows of papers' tables beside ours: `python -m benchmarks published --data DIR --only 'split_mnist_*'`.

Each row is an experiment of `conf/experiment`, run by `cl-run` for three seeds; what is finished under `--out` is not
run again. A mean of ours that is off by more than the standard deviation over its seeds is marked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.process import matches

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
        return " ".join([self.experiment, *(option.removeprefix("strategy=") for option in self.options)])


def _der(name: str, in_class: float, in_task: float, *options: str) -> Row:
    return Row(f"split_mnist{name}", {"class": in_class, "task": in_task}, options=options)


def _three(name: str, published: tuple[float | None, ...], *options: str, weights: tuple[str, ...] = ()) -> list[Row]:
    found = []
    for i, (scenario, figure) in enumerate(zip(("task", "domain", "class"), published, strict=True)):
        more = *options, *filter(None, weights[i : i + 1])
        if scenario == "class" and name != "icarl":
            more = *more, "train_mask=domain"  # all ten outputs, as released
        if figure is not None:
            chosen = f"strategy={name}", f"scenario={scenario}", *more
            found.append(Row("three_scenarios", {scenario: figure}, options=chosen))
    return found


# Buzzega et al. 2020, supplementary table of S-MNIST (means of ten runs), class- and task-incremental; settings of the
# released code. Not yet checked against print: all but the class-incremental figures of the rows that have a file.
DER_PAPER = [
    _der("_finetune", 19.60, 94.94),
    _der("", 20.46, 98.39, "strategy=online_ewc", "strategy.online_ewc.weight=180", "strategy.online_ewc.gamma=1"),
    _der("", 19.27, 96.00, "strategy=si", "optimizer.lr=0.1", "strategy.si.weight=1", "strategy.si.damping=0.9"),
    _der(
        "", 19.62, 94.11, "strategy=lwf", "strategy.lwf.scaled=false", "optimizer.weight_decay=1e-3", "train_mask=class"
    ),
    _der("_er200", 80.43, 97.86),
    _der("_er500", 86.12, 99.04),
    _der("", 80.11, 97.78, "strategy=gem", "optimizer.lr=0.01", "strategy.gem.margin=1"),
    _der("", 85.99, 98.71, "strategy=gem", "strategy.gem.memory_size=500"),
    _der("", 45.72, 98.61, "strategy=agem", "optimizer.lr=0.1", "strategy.agem.batch_size=128"),
    _der("_icarl200", 70.51, 98.28),
    _der("_der200", 84.55, 98.80),
    _der("_der500", 90.54, 98.84),
    _der("_derpp500", 91.00, 98.94),
    _der("_joint", 95.57, 99.51),
]
# Prabhu et al. 2020, table 8.
GDUMB_PAPER = [
    Row("split_mnist_gdumb300", {"class": 89.1}),
    Row("split_mnist_gdumb300", {"class": 90.2}, options=("strategy.gdumb.memory_size=500",)),
]
# Van de Ven, Tuytelaars and Tolias 2022, table 2: task-, domain- and class-incremental; weights of the released code.
# Not yet checked against print.
_MEMORY = "strategy.{}.memory_size=1000"
THREE_SCENARIOS = [
    *_three("finetune", (84.32, 60.13, 19.89)),
    *_three("ewc", (99.06, 63.03, 20.64), weights=tuple(f"strategy.ewc.weight={w}" for w in ("1e5", "1e10", "1e9"))),
    *_three("si", (99.20, 66.94, 21.20), weights=tuple(f"strategy.si.weight={w}" for w in ("10", "5e4", "5e3"))),
    *_three("lwf", (99.60, 71.02, 21.89), "strategy.lwf.scaled=false", weights=("", "strategy.lwf.per_task=true", "")),
    *_three("er", (98.98, 93.75, 88.79), _MEMORY.format("er"), "strategy.er.policy=class_balanced"),
    *_three("agem", (98.54, 87.67, 65.10), _MEMORY.format("agem"), "strategy.agem.batch_size=128"),
    *_three("icarl", (None, None, 92.49), _MEMORY.format("icarl")),
    *_three("joint", (99.67, 98.59, 98.17)),
]
# Saha et al. 2021, table 1; TRGP and CUBER, which are told the task at test: Lin et al. 2022a and 2022b, tables 1. Of
# SGP there is no figure.
GPM_PAPER = [
    Row("permuted_mnist_gpm", {"domain": 93.91}, -3.0),
    Row("permuted_mnist_sgp", {"domain": None}),
    Row("permuted_mnist_trgp", {"task": 96.34}, -0.8),
    Row("permuted_mnist_cuber", {"task": 97.25}, -0.02),
    Row("permuted_mnist_ewc", {"domain": 89.97}, -4.0),
    Row("permuted_mnist_agem", {"domain": 83.56}, -14.0),
    Row("permuted_mnist_er", {"domain": 87.24}, -11.0),
]
# The same papers' CIFAR-100 in ten tasks, at their full length, which these rows do not train.
ALEXNET = [
    Row("cifar100_alexnet_finetune", {"task": None}),
    Row("cifar100_alexnet_gpm", {"task": 72.48}, -0.9),
    Row("cifar100_alexnet_trgp", {"task": 74.46}, -0.9),
    Row("cifar100_alexnet_cuber", {"task": 75.54}, 0.13),
    Row("cifar100_alexnet_ewc", {"task": 68.80}, -2.0),
    Row("cifar100_alexnet_agem", {"task": 63.98}, -15.0),
    Row("cifar100_alexnet_hat", {"task": 72.06}, 0.0),
    Row("ol_cifar100_gpm", {"task": None}),
    Row("ol_cifar100_trgp", {"task": 74.33}, -0.18),
    Row("ol_cifar100_cuber", {"task": 74.94}, 0.28),
]
# Malviya et al. 2022, CIFAR-100 in twenty tasks, as a plotting script of its code has them; for BWT its forgetting, the
# same where no task gains later.
TAG = [
    Row("cifar100_20tasks_rmsprop", {"task": 48.91}, -20.0),
    Row("cifar100_20tasks_tag", {"task": 62.79}, -10.0),
]
# Nobody's figures: online replay on the DER paper's protocol; the control of pcr, hpcr, dvc, ocm and onpro is er_views.
_ONLINE = ("er", "er_views", "uer", "pcr", "hpcr", "dvc", "ocm", "onpro")
ONLINE = [Row(f"split_mnist_online_{name}", {"class": None}) for name in _ONLINE]
# Nobody's figures: a small ViT of our own.
_PROMPTS = (
    *("l2p", "dualprompt", "coda_prompt", "s_prompts", "ncm", "simplecil", "ranpac", "linear", "finetune", "joint"),
    *("lora", "o_lora", "inflora", "sd_lora", "aper", "ease", "lst", "slca"),
)
VIT = [Row(f"cifar100_vit_{name}", {"class": None}) for name in _PROMPTS]
_ON_FEATURES = (
    *("joint", "fecam", "slda", "acil", "ranpac", "knn", "linear", "ncm", "er", "derpp", "finetune"),
    *("slca", "aper", "latent_replay"),
)
EFFICIENTNET = [Row(f"cifar100_efficientnet_{name}", {"class": None, "task": None}) for name in _ON_FEATURES]
ROWS = [*DER_PAPER, *GDUMB_PAPER, *THREE_SCENARIOS, *GPM_PAPER, *ALEXNET, *TAG, *ONLINE, *VIT, *EFFICIENTNET]


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the rows that are chosen, and print each beside what is published."""
    rows = [row for row in ROWS if matches(row.name, args.only)]
    if not rows or not args.data:
        raise SystemExit(f"published needs --data, and --only of: {', '.join(row.name for row in ROWS)}")
    table = Table()
    for column in ("experiment", "mask", "ours, %", "published", "BWT", "published", "as learned"):
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
                _beside([run[mask].get("learning_accuracy_riemer") for run in runs], None),
            )
    console.print(table)
    return {"workload": "published", "seeds": SEEDS, "rows": found}


def _run(row: Row, args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Run an experiment for every seed; return each one's scalars by mask."""
    place = args.out / re.sub(r"[^\w.-]+", "-", row.name)
    more = row.options
    if row in VIT:
        more = *more, f"weights={_pretrained(args, console).resolve()}"
    options = f"experiment={row.experiment}", *more, f"hydra.sweep.dir={place}"
    _cl_run(["-m", *options, f"seed={','.join(map(str, SEEDS))}"], row, args, console)
    runs = [json.loads(path.read_text()) for path in sorted(place.glob("*/transfer.json"))]
    return [{mask: _values(part["scalars"]) for mask, part in run["masks"].items()} for run in runs]


def _pretrained(args: argparse.Namespace, console: Console) -> Path:
    """Return the checkpoint of the small ViT, trained on the base classes once."""
    row, place = Row("cifar100_vit_pretrain", {}), args.out / "cifar100_vit_pretrain"
    _cl_run([f"experiment={row.experiment}", f"hydra.run.dir={place}"], row, args, console)
    found: Path = max((place / "checkpoints").glob("after_task_*.ckpt"))
    return found


def _cl_run(options: list[str], row: Row, args: argparse.Namespace, console: Console) -> None:
    root = Path(args.data) / "cifar100" if row.experiment.startswith("cifar100") else Path(args.data)
    command = [sys.executable, "-m", "cl", *options, f"dataset.root={root}", "report=quiet", "trainer.accelerator=cpu"]
    console.print(f"cl-run {' '.join(command[3:])}", style="dim", soft_wrap=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    if subprocess.run(command, env=environment).returncode:
        raise SystemExit(f"{row.name} did not finish: what it says stands above.")


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
