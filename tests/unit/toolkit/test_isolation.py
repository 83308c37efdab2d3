"""Weights of each task's own: which rows they encode, and what would change old answers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from cl.backbones.networks import MLP, ResNet18
from cl.compose import repeat
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies.hat import HAT
from cl.strategies.packnet import PackNet
from cl.strategies.supsup import SupSup
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.by_task import run_by_task
from cl.toolkit.isolation import chained_layers
from old_answers import build, images


def test_each_row_is_encoded_with_the_weights_of_its_task():
    learner, stream = build(Strategy(), ToyBackbone)
    view = learner.prepare(stream[0].train.x[:7])
    labels = torch.tensor([2, 0, 1, 2, 2, 0, 1])
    own = learner.backbone.layers[1].weight
    learner.strategies["other"] = Strategy()  # alone, a strategy meets no rows of other tasks in training

    def weights(task: int):
        return {"layers.1.weight": own * (task + 1)}

    learner.task_labels = labels
    got = run_by_task(learner, learner.backbone, view, weights)
    expected = torch.stack([learner.backbone(view[i : i + 1] * float(labels[i] + 1))[0] for i in range(7)])
    torch.testing.assert_close(got, expected)
    learner.task_labels, learner.task = None, stream[1]
    torch.testing.assert_close(run_by_task(learner, learner.backbone, view, weights), learner.backbone(view * 2))
    del learner.strategies["other"]
    learner.task_labels = labels
    torch.testing.assert_close(run_by_task(learner, learner.backbone, view, weights), learner.backbone(view * 2))
    learner.eval()
    torch.testing.assert_close(run_by_task(learner, learner.backbone, view, weights), expected)


METHODS = [PackNet, HAT]


@pytest.mark.parametrize("method", METHODS)
def test_what_would_change_old_answers_is_refused(method):
    name = method.__name__
    for scenario in ("class", "domain"):
        with pytest.raises(
            InputError,
            match=f"{name} works with scenario=task, but .*={scenario}, where .* is not told: use scenario=task",
        ):
            build(method(), stream=toy_stream(3, scenario))
    with pytest.raises(InputError, match=f"{name} keeps the weights .* weight_decay=0.01 .*weight_decay=0"):
        build(method(), optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.01))
    deep = nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 6))
    with pytest.raises(InputError, match=f"{name} .* Sequential has weights that belong to no class: use head=linear"):
        build(method(), head=deep)
    again = repeat(toy_stream(2, "task"), visits=[0, 1, 0])
    with pytest.raises(InputError, match=f"{name} gives each task outputs of its own, .* tasks share classes"):
        build(method(), stream=again)


@pytest.mark.parametrize("method", [PackNet, SupSup])
def test_running_statistics_are_refused(method):
    with pytest.raises(InputError, match=rf"{method.__name__} cannot protect the running statistics of backbone\."):
        build(method(), partial(ResNet18, (3, 8, 8), width=2), stream=images())


@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_that_moves_weights_without_a_gradient_is_refused(method):
    """By what it does: ASGD calls its decay lambd, and has no argument that is known for one."""

    class Drifting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p *= 0.999

    for factory in (partial(torch.optim.ASGD, lr=0.1), partial(Drifting, lr=0.1)):
        with pytest.raises(InputError, match=r"by gradients of 0, but (ASGD|Drifting) moves them anyway"):
            build(method(), optimizer=factory)
    for factory in (partial(torch.optim.Adam, lr=0.01), partial(torch.optim.SGD, lr=0.1, momentum=0.9)):
        with pytest.raises(InputError, match=r"from the task before moves them .* use optimizer_state=reset"):
            build(method(), optimizer=factory, optimizer_state="keep")
    build(method(), optimizer=partial(torch.optim.SGD, lr=0.1), optimizer_state="keep")


@pytest.mark.parametrize("hidden", [[50, 50], [150, 150], [250, 250], [300, 200, 100], [33]])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28)])
def test_the_rounding_of_a_matrix_product_is_no_path_past_a_layer(hidden, shape):
    """A row's features can differ in their last bits with its place in the batch."""
    for seed in range(3):
        torch.manual_seed(seed)
        assert len(chained_layers(MLP(shape, hidden), shape)) == len(hidden)


def test_layers_are_chained_in_the_order_of_their_calls():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(3, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.second(self.first(x).relu())

    assert list(chained_layers(Backwards(), (4,))) == ["first", "second"]
