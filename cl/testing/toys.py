"""Small streams, learners and runs for checks and examples, and a replay and a kill to test strategies with."""

from __future__ import annotations

import gc
import types
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from cl.data.task import Scenario, Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import LearnerLike, Strategy
from cl.report.run import Run

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False, barebones=False)


class ToyBackbone(nn.Module):
    """Two small layers without biases, (B, 1, 4, 4) -> (B, 16), which every strategy can train."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, 16)."""
        return self.layers(x).relu()  # type: ignore[no-any-return]


class Normed(ToyBackbone):
    """The same network with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.append(nn.BatchNorm1d(16))


class Restless(Normed):
    """The same network with batch norm and dropout, which reveal an evaluation in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.append(nn.Dropout(0.3))


def toy_stream(num_tasks: int = 3, scenario: Scenario = "class", num_rows: int = 48, seed: int = 0) -> Stream:
    """Return a stream of separable uint8 images (1, 4, 4) with two classes per task.

    Args:
        num_tasks: T.
        scenario: "class", "task" or "domain".
        num_rows: Training examples of a task; it has 24 test examples.
        seed: Seed of the images.

    Example:
        >>> [task.classes for task in toy_stream(2)]
        [(0, 1), (2, 3)]
    """
    draw = torch.Generator().manual_seed(seed)
    tasks = []
    for t in range(num_tasks):
        centres = torch.randint(30, 220, (2, 1, 4, 4), generator=draw)
        parts = []
        for n in (num_rows, 24):
            y = torch.arange(n) % 2
            noise = torch.randn(n, 1, 4, 4, generator=draw) * 20
            x = (centres[y] + noise).clamp(0, 255).to(torch.uint8)
            parts.append(TaskData(x, y if scenario == "domain" else y + 2 * t, t))
        tasks.append(Task(t, train=parts[0], test=parts[1]))
    return Stream(tasks, scenario=scenario, num_classes=2 if scenario == "domain" else 2 * num_tasks)


def toy_learner(
    strategies: Mapping[str, Strategy] | None = None,
    num_tasks: int = 3,
    scenario: Scenario = "class",
    backbone: str = "mlp",
    seed: int = 0,
    lr: float = 0.1,
    **options: Any,
) -> tuple[Learner, Stream]:
    """Return a small learner and its stream, the same for the same arguments.

    Args:
        strategies: By name; None means fine-tuning.
        num_tasks: T.
        scenario: "class", "task" or "domain".
        backbone: "mlp"; "vit" for strategies that need a transformer; "normed", with batch norm; "restless", with
            dropout as well.
        seed: Seed of weights and draws.
        lr: Learning rate of SGD.
        options: Further arguments of `Learner`.

    Example:
        >>> learner, stream = toy_learner(num_tasks=2)
        >>> len(stream), learner.num_classes
        (2, 4)
    """
    stream = toy_stream(num_tasks, scenario)
    torch.manual_seed(seed)
    if backbone == "vit":
        from cl.backbones.vit import ViT

        body: nn.Module = ViT((1, 4, 4), patch_size=2, dim=16, depth=1, heads=2)
    else:
        body = {"restless": Restless, "normed": Normed}.get(backbone, ToyBackbone)()
    optimizer = partial(torch.optim.SGD, lr=lr)
    return Learner(stream, body, strategies or {}, optimizer, batch_size=8, seed=seed, **options), stream


def toy_run(*strategies: Strategy, epochs: int = 2, **options: Any) -> Run:
    """Run a small experiment on the CPU; the options are those of `toy_learner`.

    Example:
        >>> R = toy_run(epochs=10).matrices["task"].R
        >>> bool(R.diagonal(-1).mean() > 0.8)
        True
    """
    learner, stream = toy_learner({type(s).__name__.lower(): s for s in strategies}, **options)
    return Experiment(learner, stream, trainer, epochs=epochs).run()


class Replay(Strategy):
    """A replay to combine with any strategy: appends four examples of the last batch."""

    x: Tensor
    y: Tensor
    task: Tensor
    full: Tensor

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate four examples."""
        self.register_buffer("x", torch.zeros(4, *stream.input_shape, dtype=stream.input_dtype))
        self.register_buffer("y", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("task", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("full", torch.zeros((), dtype=torch.bool))

    def extend_batch(self, learner: LearnerLike, batch: Batch) -> Batch:
        """Append the stored examples."""
        return batch.append(Batch(self.x, self.y, self.task)) if bool(self.full) else batch

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Store the first four incoming examples."""
        for old, new in ((self.x, batch.x), (self.y, batch.y), (self.task, batch.task)):
            old.copy_(new[:4])
        self.full.fill_(True)


class Halted(Exception):
    """Raised by `Halt`."""


class Halt(pl.Callback):
    """Ends a run inside its second task by an exception."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Raise at the ninth step of the second task."""
        if pl_module.task_index == 1 and pl_module.step == 8:
            raise Halted


def reaches(strategy: nn.Module, learner: Learner) -> bool:
    """Say whether a strategy holds the learner: in attributes, containers, objects, closures or bound methods."""
    seen: set[int] = set()
    frontier: list[Any] = [value for module in strategy.modules() for value in vars(module).values()]
    while frontier:
        item = frontier.pop()
        if item is learner:
            return True
        if id(item) in seen or isinstance(item, Tensor | nn.Module | type | types.ModuleType):
            continue
        seen.add(id(item))
        if isinstance(item, types.FunctionType):  # without its globals
            frontier.extend((item.__closure__, item.__defaults__))
        else:
            frontier.extend(gc.get_referents(item))
    return False
