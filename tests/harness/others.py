"""Runs that the harness kills and that are not plain commands: from Python, and with data and code of one's own."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path


def from_python() -> None:
    """Run what a script of one's own would: objects, an `Experiment` in a directory, no Hydra."""
    from functools import partial

    import pytorch_lightning as pl

    from cl.engine.experiment import Experiment
    from cl.measure.choose import chosen
    from cl.report.tables import FileReport
    from cl.report.training import TrainingReport
    from cl.report.wandb import WandbReport
    from cl.strategies.er import ER
    from cl.testing import toy_learner

    learner, stream = toy_learner({"er": ER(memory_size=10)}, chunk_size=1, log_every=1)
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
        instruments=chosen(stream),
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
