"""What the tests of strategies share: learners that learn a toy stream, and weights to compare."""

from __future__ import annotations

from functools import partial

import pytorch_lightning as pl
import torch
from torch import nn

from cl.data.task import Stream, Task, TaskData
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.testing import toy_learner
from cl.toolkit.weights import flat

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)


def learn(learner: Learner, stream: Stream, tasks=None, epochs: int = 1) -> Learner:
    experiment = Experiment(learner, stream, trainer, epochs=epochs)
    for index in range(len(stream)) if tasks is None else tasks:
        experiment.learn(stream[index])
    return learner


def toy(strategy: Strategy | dict[str, Strategy] | None = None, tasks=(), epochs: int = 1, **options):
    strategies = strategy if isinstance(strategy, dict) else {"method": strategy} if strategy else {}
    learner, stream = toy_learner(strategies, **options)
    return learn(learner, stream, tasks, epochs), stream


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def trunk(learner: Learner) -> dict[str, torch.Tensor]:
    return weights(learner.trunk())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def build(
    stream: Stream, backbone: nn.Module, strategy: Strategy, lr: float = 0.1, optimizer=None, **options
) -> Learner:
    optimizer = optimizer or partial(torch.optim.SGD, lr=lr)
    return Learner(stream, backbone, {"method": strategy}, optimizer, **{"batch_size": 8, **options})


def float_stream(xs, ys, scenario="class", num_classes=None) -> Stream:
    tasks = [Task(t, TaskData(x, y, t), TaskData(x.clone(), y, t)) for t, (x, y) in enumerate(zip(xs, ys, strict=True))]
    return Stream(tasks, scenario=scenario, num_classes=num_classes or int(torch.cat(list(ys)).max()) + 1)


def queries(learner: Learner, view: torch.Tensor) -> torch.Tensor:
    learner.backbone.eval()
    with torch.no_grad():
        return learner.backbone(view)


def vector(learner: Learner) -> torch.Tensor:
    return flat([p.detach() for p in learner.trunk().parameters()]).clone()


class Identity(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


class Weights(nn.Module):
    """Features that are the weights."""

    def __init__(self, start) -> None:
        super().__init__()
        self.num_features = len(start)
        self.theta = nn.Parameter(torch.tensor(start))

    def forward(self, x):
        return self.theta.expand(len(x), self.num_features)


class Quadratic(Strategy):
    """A task loss of 1/2 sum h (theta - goal)^2 in place of the cross-entropy."""

    def __init__(self, h, goal) -> None:
        super().__init__()
        self.h, self.goal = torch.tensor(h), torch.tensor(goal)

    def criterion(self, learner, batch, logits):
        return 0.5 * (self.h * (learner.backbone.theta - self.goal) ** 2).sum() + 0 * logits.sum()
