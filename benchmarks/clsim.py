"""This framework, through its Python interface."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.workloads import MEAN, STD, Arrays, Workload
from cl.data.augment import Normalize, RandomCropFlip
from cl.data.task import Stream, Task, TaskData
from cl.engine.experiment import Experiment
from cl.engine.instrument import Instrument
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.measure.learning_curves import LearningCurves
from cl.measure.probes import Probes
from cl.strategies.er import ER

Watch = Callable[[Stream], Instrument]


def stream(workload: Workload, tasks: list[Arrays], scenario: str | None = None) -> Stream:
    """Return a workload's tasks as a stream, under its own scenario or another one."""
    return Stream(
        [Task(t, TaskData(x, y, t), TaskData(v, w, t)) for t, (x, y, v, w) in enumerate(tasks)],
        num_classes=workload.num_classes,
        scenario=scenario or ("class" if workload.split else "domain"),
        augment=RandomCropFlip(padding=4) if workload.augment else None,
        normalize=Normalize(MEAN[workload.dataset], STD[workload.dataset]),
    )


def learner(workload: Workload, tasks: Stream, strategies: dict[str, Strategy], **options: Any) -> Learner:
    """Return a learner with the workload's model, cut into backbone and head."""
    model: Any = workload.model()
    backbone = model[:-1]
    backbone.num_features = model[-1].in_features
    optimizer = partial(torch.optim.SGD, lr=workload.lr)
    options = {"batch_size": workload.batch_size, "train_mask": "domain", "seed": torch.initial_seed(), **options}
    return Learner(tasks, backbone, strategies, optimizer, head=model[-1], **options)


def run(workload: Workload, tasks: list[Arrays], watch: Watch | None = None, **options: Any) -> tuple[list[float], int]:
    """Learn every task, watched or not; return the last row of accuracies and the number of steps."""
    there = stream(workload, tasks)
    if watch is not None:
        options["instruments"] = {"watch": watch(there)}
    replay: dict[str, Strategy] = {"er": ER(workload.memory, workload.replay)} if workload.replay else {}
    module = learner(workload, there, replay)
    job = Experiment(module, there, partial(pl.Trainer, accelerator="cpu"), epochs=1, **options)
    matrices: Any = module.matrices
    if workload.name == "evaluate":
        for report in job.reports:
            report.start(job.run_view, -1)
        for _ in range(5):
            for matrix in (*matrices.values(), *module.calibration.values()):
                matrix.reset(0)
            job.evaluate()
    else:
        job.run()
    return matrices["class" if workload.split else "domain"].R[module.tasks_learned].tolist(), module.total_steps


def run_with_probes(workload: Workload, tasks: list[Arrays]) -> tuple[list[float], int]:
    """Do as `run`, and fit a ridge probe on every task's features for each row of R."""
    return run(workload, tasks, lambda there: Probes(there, ["ridge"]))


def run_with_curves(workload: Workload, tasks: list[Arrays]) -> tuple[list[float], int]:
    """Do as `run`, and evaluate ten times inside every task."""
    return run(workload, tasks, lambda there: LearningCurves(there, points=10))


def run_with_reports(workload: Workload, tasks: list[Arrays]) -> tuple[list[float], int]:
    """Do as `run` with all that the command line has on: bar, curves, files, picture, terminal, checkpoints."""
    from rich.console import Console

    from cl.report.picture import PictureReport
    from cl.report.progress import ProgressBar
    from cl.report.tables import FileReport
    from cl.report.terminal import TerminalReport
    from cl.report.training import TrainingReport

    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "terminal").open("w") as screen:
        training = TrainingReport()
        console = Console(file=screen, force_terminal=True, force_interactive=True, width=120)
        return run(
            workload,
            tasks,
            directory=Path(folder) / "run",
            reports=[FileReport(), PictureReport(), TerminalReport(console), training],
            callbacks=[ProgressBar(console)],
            logger=[training.logger],
        )
