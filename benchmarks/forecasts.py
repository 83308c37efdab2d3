"""Do estimators of transferability foresee transfer? On streams whose tasks help, hurt or leave alone by design."""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

SEEDS, ROWS = 8, (20, 50, 100)
DESIGNS = ("positive", "negative", "neutral", "mixed")


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Pool each design's target task over seeds and sizes, and print Kendall's tau of every estimator."""
    from cl.metrics.statistics import kendall_tau

    jobs = [(design, rows, seed) for design in DESIGNS for rows in ROWS for seed in range(SEEDS)]
    points = [_run(*job) for job in track(jobs, "forecasts", console=console, transient=True)]
    table = Table(title=f"{len(points)} targets: {', '.join(DESIGNS)}; {ROWS} training rows; {SEEDS} seeds; MLP")
    for column in ("estimator", "tau with forward transfer", "95 % bootstrap interval", "p"):
        table.add_column(column, justify="left" if column == "estimator" else "right")
    found = {}
    for kind in points[0]["estimates"]:
        tau = kendall_tau([p["estimates"][kind] for p in points], [p["gain"] for p in points])
        found[kind] = tau._asdict() if hasattr(tau, "_asdict") else vars(tau)
        table.add_row(kind, f"{tau.tau:+.2f}", f"[{tau.low:+.2f}, {tau.high:+.2f}]", f"{tau.p:.2g}")
    console.print(table)
    return {"workload": "forecasts", "points": points, "tau": found}


def _run(design: str, rows: int, seed: int) -> dict[str, Any]:
    """Learn a designed stream by fine-tuning; return the forecasts for its target and what it gained over an expert."""
    from cl.backbones.networks import MLP
    from cl.data.sources import digits
    from cl.engine.experiment import Experiment
    from cl.engine.learner import Learner
    from cl.measure.estimators import COVARIANCE, Estimates
    from cl.measure.references import References
    from cl.metrics.transferability import ESTIMATORS
    from cl.streams.transfer_by_design import transfer_by_design

    def make(stream: Any, strategies: Any) -> Experiment:
        torch.manual_seed(seed)
        body = MLP(stream.input_shape, [100, 100])
        learner = Learner(stream, body, strategies, partial(torch.optim.SGD, lr=0.05), batch_size=10, seed=seed)
        return Experiment(learner, stream, partial(pl.Trainer, accelerator="cpu"), epochs=5)

    stream = transfer_by_design(digits(), design, target_rows=rows, seed=seed)
    experiment = make(stream, {})
    estimates = Estimates(stream, [*ESTIMATORS, COVARIANCE])
    experiment.instruments["estimates"] = estimates
    R = experiment.run().primary.R
    with tempfile.TemporaryDirectory() as folder:
        only = stream.derive([stream[-1].each(lambda part: part.renumbered(0), index=0)].__getitem__, num_tasks=1)
        expert = References(["experts"], make, Path(folder), {}).measure(only)["experts"][0]
    return {
        "design": design,
        "rows": rows,
        "seed": seed,
        "gain": float(R[-1, -1]) - expert["value"],
        "estimates": {kind: estimates.column(kind)[-1] for kind in estimates.kinds},
    }
