"""Synaptic Intelligence: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.data.task import SCENARIOS, Stream, Task, TaskData
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.random import derive
from cl.strategies.si import SI
from cl.testing import ToyBackbone, toy_learner, toy_stream
from cl.toolkit.weights import flat
from draws import quick, seeds
from toys import Quadratic, Weights, learn, toy, trainer, vector


def quadratic(strategy: Strategy, start, h, goal, steps: int, lr: float = 0.1, **optimizer) -> tuple[Learner, Stream]:
    """A learner of weights with a quadratic loss, whose tasks have so many steps; the head gets no gradient."""
    y = torch.arange(steps) % 2
    data = TaskData(torch.zeros(steps, 1), y)
    tasks = [Task(t, TaskData(data.x, y, t), TaskData(data.x.clone(), y, t)) for t in range(3)]
    stream = Stream(tasks, scenario="domain", num_classes=2)
    strategies = {"method": strategy, "task": Quadratic(h, goal)}
    sgd = partial(torch.optim.SGD, lr=lr, **optimizer)
    return Learner(stream, Weights(start), strategies, sgd, batch_size=1), stream


def steps_by_hand(stream: Stream, task: Task, epochs: int, batch_size: int = 8):
    """The minibatches of a task of the toy, as the engine orders them."""
    x, y, _ = task.train.tensors()
    for epoch in range(epochs):
        order = np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch)).permutation(len(y))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield x[rows].float() / 255, y[rows]


def test_si_takes_the_whole_penalty_off_a_group_of_minibatches_that_is_cut_short() -> None:
    h, goal, accumulate = torch.tensor([1.0, 3.0]), torch.tensor([2.0, -1.0]), 4
    found = []

    class Watched(SI):
        def project_gradients(self, learner: Learner) -> None:
            super().project_gradients(learner)
            found.append((self.gradient.clone(), learner.backbone.theta.detach().clone()))

    learner, stream = quadratic(Watched(weight=5.0), [0.0, 0.0], h.tolist(), goal.tolist(), steps=6)
    Experiment(learner, stream, partial(trainer, accumulate_grad_batches=accumulate)).run()
    assert len(found) == 3 * 2 and learner.strategies["method"].importance.sum() > 0
    for gradient, theta in found:
        torch.testing.assert_close(gradient[:2], h * (theta - goal))  # the head has none


def test_worked_example_17():
    """Two steps of 0.1 on th^2 / 2 from 1: omega 0.181, and the importance with xi = 0.1."""
    learner, stream = quadratic(SI(damping=0.1), [1.0], [1.0], [0.0], steps=2)
    learn(learner, stream, [0])
    strategy = learner.strategies["method"]
    assert float(learner.backbone.theta.detach()) == pytest.approx(0.81)
    assert float(strategy.path[0]) == pytest.approx(0.181)
    assert float(strategy.importance[0]) == pytest.approx(1.329904, abs=1e-5)


@pytest.mark.parametrize("h", [[1.0, 3.0], [0.5, 2.0]])
def test_the_path_integral_is_the_fall_of_the_loss(h):
    """Check 6: within O(learning rate), weight by weight; half the rate, half the error."""
    start, goal = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0])
    curve, errors = torch.tensor(h), []
    for lr, steps in ((0.01, 50), (0.005, 100)):
        learner, stream = quadratic(SI(), start.tolist(), h, goal.tolist(), steps, lr)
        learn(learner, stream, [0])
        fall = 0.5 * curve * ((start - goal) ** 2 - (learner.backbone.theta.detach() - goal) ** 2)
        errors.append((learner.strategies["method"].path[:2] - fall).abs() / fall)
        assert (errors[-1] < 2 * lr * curve).all()
    torch.testing.assert_close(errors[1], errors[0] / 2, rtol=0.1, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_si_is_the_loop_written_by_hand(momentum):
    """Three tasks; the gradient of the path is autograd's, of the loss without the penalty."""
    c, xi, stream = 2.0, 0.05, toy_stream(3)
    torch.manual_seed(0)
    net = nn.Sequential(ToyBackbone(), nn.Linear(16, 6))
    parameters = list(net.parameters())
    Omega, anchor = [torch.zeros_like(p) for p in parameters], [p.detach().clone() for p in parameters]
    for task in stream:
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=momentum)
        omega = [torch.zeros_like(p) for p in parameters]
        for x, y in steps_by_hand(stream, task, epochs=2):
            loss = F.cross_entropy(net(x)[:, : 2 * task.index + 2], y)
            g = torch.autograd.grad(loss, parameters, retain_graph=True)
            total = loss + c * sum((w * (p - a) ** 2).sum() for w, p, a in zip(Omega, parameters, anchor, strict=True))
            before = [p.detach().clone() for p in parameters]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            omega = [w - d * (p.detach() - b) for w, d, p, b in zip(omega, g, parameters, before, strict=True)]
        for i, p in enumerate(parameters):
            Omega[i] = (Omega[i] + omega[i] / ((p.detach() - anchor[i]) ** 2 + xi)).clamp(min=0)
            anchor[i] = p.detach().clone()
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=momentum)
    torch.manual_seed(0)
    learner = Learner(stream, ToyBackbone(), {"method": SI(weight=c, damping=xi)}, sgd, batch_size=8)
    learn(learner, stream, epochs=2)
    torch.testing.assert_close(vector(learner), flat([p.detach() for p in parameters]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learner.strategies["method"].importance, flat(Omega), rtol=1e-3, atol=1e-5)
    assert float(flat(Omega).max()) > 0


def test_importance_never_falls_below_zero():
    """A path that raised the loss takes importance away, down to none."""
    learner, stream = quadratic(SI(damping=0.5), [1.0, 1.0], [1.0, 1.0], [0.0, 0.0], steps=1)
    strategy = learner.strategies["method"]
    strategy.before_task(learner, stream[0])
    strategy.importance[:2], strategy.path[:2] = 3.0, torch.tensor([-1.0, -2.0])
    strategy.after_task(learner, stream[0])
    assert strategy.importance[:2].tolist() == [1.0, 0.0]


@quick
@given(seeds, st.floats(0.1, 100))
def test_the_penalty_has_no_half(seed, weight):
    draw = torch.Generator().manual_seed(seed)
    learner, _ = toy(SI(weight=weight))
    strategy = learner.strategies["method"]
    strategy.importance.copy_(torch.rand(614, generator=draw))
    strategy.anchor.copy_(torch.randn(614, generator=draw))
    assert strategy.loss(learner, None, None) is None, "nothing to hold in the first task"
    learner.tasks_learned = 1
    expected = weight * (strategy.importance * (vector(learner) - strategy.anchor) ** 2).sum()
    assert float(strategy.loss(learner, None, None).detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_large_weight_holds_what_moved_and_none_is_finetuning(scenario):
    torch.testing.assert_close(
        vector(toy(SI(weight=0.0), range(3), scenario=scenario)[0]), vector(toy(None, range(3), scenario=scenario)[0])
    )
    drift = []
    for share in (0.0, 0.9):
        learner, stream = toy(SI(damping=0.01), [0], scenario=scenario)
        strategy, before = learner.strategies["method"], vector(learner)
        importance = strategy.importance.clone()
        strategy.weight = share / (0.1 * 2 * float(importance.max()))  # under 1 each step draws a weight nearer
        learn(learner, stream, [1], epochs=3)
        drift.append(float((importance * (vector(learner) - before) ** 2).sum()))
    assert drift[1] < 0.9 * drift[0]


def test_the_path_does_not_depend_on_clipping_or_accumulating_minibatches():
    """The gradient of two minibatches at once is that of their union; clipping moves weights less, g stays."""
    paths = []
    for batch_size, accumulate in ((16, 1), (8, 2)):
        learner, stream = toy_learner({"method": SI()})
        learner.batch_size = batch_size
        make = partial(trainer, accumulate_grad_batches=accumulate)
        for index in range(2):
            Experiment(learner, stream, make, epochs=2).learn(stream[index])
        paths.append(learner.strategies["method"].path)
    torch.testing.assert_close(*paths, rtol=1e-3, atol=1e-6)
    learner, stream = quadratic(SI(), [1.0], [1.0], [0.0], steps=1)
    learner.gradient_clip = 0.5
    learn(learner, stream, [0])
    assert float(learner.strategies["method"].path[0]) == pytest.approx(1.0 * 0.05, rel=1e-3)


def test_si_refuses_no_damping():
    with pytest.raises(InputError, match=r"si\.damping=0 must be above 0"):
        SI(damping=0)
