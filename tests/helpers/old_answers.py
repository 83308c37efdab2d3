"""Networks for methods that keep the answers to old tasks, and how far those drift."""

from __future__ import annotations

from functools import partial

import torch

import toys
from cl.backbones.networks import MLP, ResNet18, SimpleCNN
from cl.data.task import Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.testing import toy_stream

learn = partial(toys.learn, epochs=2)


SGD = partial(torch.optim.SGD, lr=0.1)


def build(strategy, backbone=None, optimizer=SGD, stream=None, **options) -> tuple[Learner, Stream]:
    torch.manual_seed(0)
    stream = stream or toy_stream(3, "task")
    strategies = strategy if isinstance(strategy, dict) else {"method": strategy}
    body = backbone() if backbone else MLP((1, 4, 4), hidden=[16, 12])
    return Learner(stream, body, strategies, optimizer, batch_size=8, **options), stream


def images(num_tasks: int = 3, size: int = 8) -> Stream:
    draw = torch.Generator().manual_seed(1)
    tasks = []
    for t in range(num_tasks):
        y = torch.arange(24) % 2 + 2 * t
        x = torch.randint(0, 256, (24, 3, size, size), generator=draw, dtype=torch.uint8)
        tasks.append(Task(t, TaskData(x, y, t), TaskData(255 - x, y, t)))
    return Stream(tasks, scenario="task", num_classes=2 * num_tasks)


def answers(learner: Learner, task: Task) -> torch.Tensor:
    """The logits of a task's own classes on its test set, in the present state."""
    with torch.no_grad(), learner.evaluating():
        return learner.predict(Batch(*task.test.tensors()))[:, list(task.classes)]


def drift(learner: Learner, stream: Stream, epochs: int = 2) -> list[float]:
    """Learn the tasks; return for each how far its answers moved after it was learned."""
    first = []
    for task in stream:
        learn(learner, stream, [task.index], epochs=epochs)
        first.append(answers(learner, task))
    return [float((answers(learner, task) - old).abs().max()) for task, old in zip(stream, first, strict=True)]


NETS = {
    "mlp": (lambda: MLP((1, 4, 4), hidden=[16, 12]), None),
    "cnn": (lambda: SimpleCNN((3, 8, 8), channels=(4, 6), hidden=10), images),
    "residual": (lambda: ResNet18((3, 8, 8), width=2, norm="group"), images),
    "batch norm": (lambda: ResNet18((3, 8, 8), width=2, norm="batch_no_stats"), images),
}


OPTIMIZERS = {
    "sgd": SGD,
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.01),
}
