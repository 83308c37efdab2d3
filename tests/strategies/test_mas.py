"""Memory Aware Synapses: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

from cl.data.task import Task, TaskData
from cl.engine.learner import Learner
from cl.strategies.mas import MAS, sensitivity
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.weights import flat
from draws import quick, seeds
from toys import learn, toy, vector


class Times(nn.Module):
    """Outputs w x, side by side."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        return x * self.w


def test_worked_example_18():
    """d (1.5 x)^2 / dw = 3 x^2: the mean over x in {1, -2} is 7.5, and signs do not cancel."""
    x = torch.tensor([[1.0], [-2.0]])
    assert float(sensitivity(Times(1.5), x, torch.tensor([0]))) == pytest.approx(7.5)
    assert float(sensitivity(Times(-1.5), x, torch.tensor([0]))) == pytest.approx(7.5)


def test_only_outputs_that_compete_count():
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert sensitivity(Times(1.0, 1.0, 1.0), x, torch.tensor([0, 2])).tolist() == [2.0, 0.0, 18.0]


@pytest.mark.parametrize("held", [1, 1000, 10**9])
def test_the_sensitivity_is_that_of_gradients_taken_one_by_one(held, monkeypatch):
    monkeypatch.setattr("cl.toolkit.fisher._HELD_AT_ONCE", held)
    torch.manual_seed(0)
    net, x = nn.Sequential(ToyBackbone(), nn.Linear(16, 4)), torch.randn(7, 1, 4, 4)
    parameters, expected, batch = list(net.parameters()), 0.0, 0.0
    for one in x:
        gradient = flat(torch.autograd.grad(net(one[None])[0, :3].square().sum(), parameters))
        expected, batch = expected + gradient.abs() / 7, batch + gradient / 7
    got = sensitivity(net, x, torch.arange(3))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(got, batch.abs(), rtol=1e-2), "of single examples, not of the batch's mean gradient"


@quick
@given(seeds)
def test_the_sensitivity_grows_with_the_square_of_a_linear_output(seed):
    draw = torch.Generator().manual_seed(seed)
    x, w = torch.randn(5, 2, generator=draw), torch.randn(2, generator=draw)
    single, double = (sensitivity(Times(*(factor * w).tolist()), x, torch.arange(2)) for factor in (1, 2))
    torch.testing.assert_close(double, 2 * single, rtol=1e-4, atol=1e-6)


def test_mas_sums_over_tasks_and_holds_the_last_weights():
    learner, stream = toy(MAS(weight=0.7, num_samples=None))
    strategy, total = learner.strategies["method"], 0.0
    for task in stream:
        learn(learner, stream, [task.index])
        module = nn.Sequential(learner.backbone, learner.head)
        view = learner.prepare(task.train.tensors()[0])
        total = total + sensitivity(module, view, torch.arange(2 * task.index + 2))
        torch.testing.assert_close(strategy.importance, total, rtol=1e-3, atol=1e-6)
        assert torch.equal(strategy.anchor, vector(learner))
    with torch.no_grad():
        for p in learner.trunk().parameters():
            p += 0.1
    expected = 0.7 * 0.01 * total.sum()
    assert float(strategy.loss(learner, None, None).detach()) == pytest.approx(float(expected), rel=1e-3)


def test_mas_needs_no_labels_and_measures_plain_examples_in_evaluation_mode():
    class Noisy(ToyBackbone):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    found = []
    for body in (ToyBackbone, Noisy):
        stream = toy_stream()
        torch.manual_seed(0)
        learner = Learner(stream, body(), {"method": MAS()}, partial(torch.optim.SGD, lr=0.1), batch_size=8)
        task = stream[0]
        shuffled = Task(0, TaskData(task.train.x, task.train.y.flip(0)), task.test)
        learner.before_task(task)
        learner.strategies["method"].after_task(learner, shuffled if body is Noisy else task)
        found.append(learner.strategies["method"].importance.clone())
        assert learner.backbone.training
    assert torch.equal(*found) and float(found[0].max()) > 0
