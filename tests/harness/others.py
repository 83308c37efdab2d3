"""Runs that the harness kills and that are not plain commands: from Python, and with data and code of one's own."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any


def from_python() -> None:
    """Run what a script of one's own would: objects, an `Experiment` in a directory, no Hydra.

    Its strategy has a phase of its own in each task, records numbers, and learns a task whose labels are hidden.
    """
    from functools import partial

    import pytorch_lightning as pl
    import torch

    from cl.compose import hide_labels
    from cl.engine.experiment import Experiment
    from cl.engine.learner import Learner
    from cl.engine.strategy import Strategy
    from cl.measure.choose import chosen
    from cl.measure.prequential import Prequential
    from cl.report.tables import FileReport
    from cl.report.training import TrainingReport
    from cl.report.wandb import WandbReport
    from cl.testing import toy_learner, toy_stream

    class Phases(Strategy):
        needs_labels = False

        def more_epochs(self, epochs: int) -> int:
            return 1

        def before_task(self, learner: Any, task: Any) -> None:
            learner.backbone.requires_grad_(True)
            learner.record("hidden", float((task.train.labels < 0).float().mean()))

        def criterion(self, learner: Any, batch: Any, logits: Any) -> Any:
            learner.record("largest", logits.max())
            if bool((batch.y >= 0).all()):
                return learner.criterion(logits, batch)
            return -logits.softmax(1).square().sum(1).mean()

        def after_epoch(self, learner: Any, task: Any, epoch: int) -> None:
            learner.record("epoch", epoch)
            if epoch == 0:
                learner.restart_optimizer()
            if epoch == learner.epochs - 2:
                learner.backbone.requires_grad_(False)

    stream = hide_labels(toy_stream(3, "domain"), [1])
    body = toy_learner(scenario="domain")[0].backbone
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR
    learner = Learner(stream, body, {"phases": Phases()}, optimizer, schedule, batch_size=8, chunk_size=1, log_every=1)
    curves, w_and_b = TrainingReport(), WandbReport(mode="offline")
    Experiment(
        learner,
        stream,
        partial(pl.Trainer, accelerator="cpu", devices=1),
        epochs=3,
        directory=Path("out"),
        reports=[curves, FileReport(), w_and_b],
        logger=[curves.logger, w_and_b.logger],
        every=4,
        instruments=chosen(stream, own={"prequential": Prequential(every=3)}),
    ).run()


OWN = [
    *("stream=from_arrays", *(f"stream.{name}={name}.npy" for name in ("train_x", "train_y", "test_x", "test_y"))),
    *("strategy=[er]", "strategy.er.memory_size=20", "+strategy.shrink._target_=mine.Shrink"),
]
_STRATEGY = """from cl.engine.strategy import Strategy

class Shrink(Strategy):
    def loss(self, learner, batch, logits):
        return 0.1 * logits.square().mean()
"""


def write_own(place: Path) -> None:
    """Write the data and the code that `OWN` names."""
    import numpy as np

    draw = np.random.default_rng(0)
    for name, count in (("train", 96), ("test", 48)):
        np.save(place / f"{name}_x.npy", draw.normal(size=(count, 5)).astype(np.float32))
        np.save(place / f"{name}_y.npy", np.arange(count) % 6)
    (place / "mine.py").write_text(_STRATEGY)


def _pixels(place: Path) -> None:
    import numpy as np

    name = random.choice(["train_x.npy", "test_x.npy"])
    x = np.load(place / name)
    x[random.randrange(len(x)), 0] += 0.5
    np.save(place / name, x)


def _labels(place: Path) -> None:
    import numpy as np

    y = np.load(place / "train_y.npy")
    np.save(place / "train_y.npy", np.roll(y, 1))


def _fewer(place: Path) -> None:
    import numpy as np

    for name in ("train_x.npy", "train_y.npy"):
        np.save(place / name, np.load(place / name)[:-6])


def _code(place: Path) -> None:
    (place / "mine.py").write_text(_STRATEGY.replace("0.1 *", "0.25 *"))


CHANGES: dict[str, Callable[[Path], None]] = {
    "pixels": _pixels,
    "labels": _labels,
    "fewer rows": _fewer,
    "code": _code,
}
