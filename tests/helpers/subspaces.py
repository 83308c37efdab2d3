"""Networks and streams for methods that project gradients, and what leaks into old inputs."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from cl.data.task import Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.toolkit.subspace import protected_layers
from toys import learn


def build(stream: Stream, backbone: nn.Module, strategy: Strategy, lr: float = 0.05, optimizer=None, **options):
    optimizer = optimizer or partial(torch.optim.SGD, lr=lr)
    return Learner(stream, backbone, {"method": strategy}, optimizer, **{"batch_size": 4, **options})


def random_stream(
    shape=(30,), num_rows: int = 4, scenario: str = "class", num_tasks: int = 2, shared: bool | None = None
) -> Stream:
    """Random inputs, few enough that they do not span a layer."""
    shared = scenario == "domain" if shared is None else shared
    draw = torch.Generator().manual_seed(3)
    tasks = []
    for t in range(num_tasks):
        x = torch.randn(num_rows, *shape, generator=draw)
        y = torch.arange(num_rows) % 2 + (0 if shared else 2 * t)
        tasks.append(Task(t, TaskData(x, y, t), TaskData(x.clone(), y, t)))
    return Stream(tasks, scenario=scenario, num_classes=2 if shared else 2 * num_tasks, repeats=shared)


class WideNet(nn.Module):
    """Three linear layers with biases, 30 -> 24, the middle one on tokens."""

    num_features = 24

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tokens, self.last = nn.Linear(30, 48), nn.Linear(24, 24), nn.Linear(48, 24)

    def forward(self, x):
        return self.last(self.tokens(self.first(x).relu().view(-1, 2, 24)).relu().flatten(1)).relu()


class ConvNet(nn.Module):
    """Two convolutions and a linear layer with biases, (16, 5, 5) -> 24; wide, so that few inputs do not span it."""

    num_features = 24

    def __init__(self, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 12, **{"kernel_size": 3, **options})
        size = self.conv(torch.zeros(1, 16, 5, 5)).shape[2:]
        self.second = nn.Conv2d(12, 40, tuple(size))
        self.linear = nn.Linear(40, 24)

    def forward(self, x):
        return self.linear(self.second(self.conv(x).relu()).flatten(1).relu()).relu()


def moved(layer: nn.Module, x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """What a change of the weight makes of inputs that were kept."""
    if isinstance(layer, nn.Linear):
        return x @ change.T
    return F.conv2d(x, change, None, layer.stride, layer.padding, layer.dilation)


def leak(learner: Learner, stream: Stream, epochs: int = 20) -> tuple[float, float, float]:
    """Learn two tasks; return the largest ||(W2 - W1) x|| / ||x||, the least ||W2 - W1||, and the drift of logits."""
    batch = Batch(*stream[0].train.tensors())
    learn(learner, stream, [0], epochs)
    layers = protected_layers(learner)
    seen: dict[nn.Module, torch.Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0].detach())) for m in layers]
    with torch.no_grad():
        before = learner.predict(batch)[:, list(stream[0].classes)]
    for hook in hooks:
        hook.remove()
    weights = [layer.weight.detach().clone() for layer in layers]
    learn(learner, stream, [1], epochs)
    change = [layer.weight.detach() - old for layer, old in zip(layers, weights, strict=True)]
    worst = max(float(moved(m, seen[m], c).norm() / seen[m].norm()) for m, c in zip(layers, change, strict=True))
    with torch.no_grad():
        drift = (learner.predict(batch)[:, list(stream[0].classes)] - before).abs().max()
    return worst, min(float(c.norm()) for c in change), float(drift)


class TwoLayers(nn.Module):
    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(10, 12, bias=False), nn.Linear(12, 8, bias=False)

    def forward(self, x):
        return self.two(self.one(x).relu()).relu()
