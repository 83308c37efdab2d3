"""Riemannian Walk: a worked example, the loop written by hand, and EWC++."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.data.task import Stream, Task, TaskData
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.random import derive
from cl.strategies.online_ewc import OnlineEWC
from cl.strategies.rwalk import RWalk, unit_range
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.weights import flat
from draws import quick, seeds
from toys import Quadratic, Weights, learn, toy, vector


def test_two_steps_on_a_parabola():
    """Steps of 0.1 on th^2 / 2 from 1, an interval of one step each: F = 1, then 0.9 * 0.81 + 0.1 * 1.

    The first step moves -0.1 with g = 1: dL = 0.1, s' = 0.1 / (0.005 + e). The second moves -0.09 with g = 0.9:
    dL = 0.081, F is still 1: s' += 0.081 / (0.00405 + e).
    """
    y = torch.arange(2) % 2
    tasks = [Task(t, TaskData(torch.zeros(2, 1), y, t), TaskData(torch.zeros(2, 1), y, t)) for t in range(2)]
    stream = Stream(tasks, scenario="domain", num_classes=2)
    method = RWalk(interval=1, damping=0.01)
    sgd = partial(torch.optim.SGD, lr=0.1)
    strategies = {"method": method, "task": Quadratic([1.0], [0.0])}
    learner = learn(Learner(stream, Weights([1.0]), strategies, sgd, batch_size=1), stream, [0])
    assert float(learner.backbone.theta.detach()) == pytest.approx(0.81)
    assert float(method.score[0]) == pytest.approx(0.1 / 0.015 + 0.081 / 0.01405, rel=1e-4)
    assert float(method.fisher[0]) == pytest.approx(0.9 * 0.81 + 0.1 * 1.0, rel=1e-4)
    assert float(method.importance[0]) == pytest.approx(2.0), "the largest of both"
    assert (method.importance[1:] == 0).all(), "the head has no gradient"


@pytest.mark.parametrize("scores", [True, False])
def test_rwalk_is_the_loop_written_by_hand(scores):
    """Three tasks of twelve steps, intervals of five: two whole ones and one of two steps."""
    lam, alpha, xi, stream = 2.0, 0.7, 1e-2, toy_stream(3)
    torch.manual_seed(0)
    net = nn.Sequential(ToyBackbone(), nn.Linear(16, 6))
    parameters = list(net.parameters())

    def theta():
        return flat([p.detach() for p in parameters]).clone()

    def unit(x):
        return (x - x.min()) / (x.max() - x.min())

    fisher, score, importance = None, None, 0.0
    for task in stream:
        optimizer, anchor = torch.optim.SGD(parameters, lr=0.1, momentum=0.5), theta()
        x, y, _ = task.train.tensors()
        orders = [
            np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch)).permutation(len(y))
            for epoch in range(2)
        ]
        batches = np.concatenate(orders).reshape(-1, 8)
        fresh, at = torch.zeros_like(anchor), 0
        while at < len(batches):
            start, fall, squares = theta(), 0.0, []
            for rows in batches[at : at + 5]:
                loss = F.cross_entropy(net(x[rows].float() / 255)[:, : 2 * task.index + 2], y[rows])
                g, before = flat(torch.autograd.grad(loss, parameters, retain_graph=True)), theta()
                fisher = g**2 if fisher is None else fisher
                penalty = lam * (importance * (flat(parameters) - anchor) ** 2).sum()
                optimizer.zero_grad()
                (loss + penalty).backward()
                optimizer.step()
                fall = fall - g * (theta() - before)
                squares.append(g**2)
            fresh += (fall / (0.5 * fisher * (theta() - start) ** 2 + xi)).clamp(min=0)
            fisher = alpha * torch.stack(squares).mean(0) + (1 - alpha) * fisher
            at += 5
        score = fresh if score is None else (score + fresh) / 2
        importance = unit(fisher) + (unit(score) if scores else 0)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.5)
    torch.manual_seed(0)
    method = RWalk(lam, alpha, 5, xi, scores)
    learner = Learner(stream, ToyBackbone(), {"method": method}, sgd, batch_size=8)
    learn(learner, stream, epochs=2)
    torch.testing.assert_close(vector(learner), theta(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(method.importance, importance, rtol=1e-2, atol=1e-3)


@quick
@given(seeds, st.floats(0.1, 100))
def test_without_scores_the_penalty_is_that_of_online_ewc(seed, weight):
    """Online EWC has lambda / 2 and multiplies its precision by gamma; F here is scaled to [0, 1]."""
    draw = torch.Generator().manual_seed(seed)
    ours, theirs = toy(RWalk(weight / 2, scores=False))[0], toy(OnlineEWC(weight, gamma=1.0))[0]
    walk, ewc = ours.strategies["method"], theirs.strategies["method"]
    walk.fisher.copy_(torch.rand(614, generator=draw) + 0.1)
    walk.score.copy_(torch.rand(614, generator=draw))
    ours.tasks_learned = theirs.tasks_learned = 1
    walk.before.copy_(vector(ours))
    walk.after_task(ours, None)
    walk.anchor.copy_(torch.randn(614, generator=draw))
    ewc.precision.copy_(unit_range(walk.fisher))
    ewc.mean.copy_(walk.anchor)
    penalties = [float(m.loss(one, None, None).detach()) for m, one in ((walk, ours), (ewc, theirs))]
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-4) and penalties[0] > 0


def test_no_weight_is_finetuning():
    torch.testing.assert_close(vector(toy(RWalk(weight=0.0), range(3))[0]), vector(toy(None, range(3))[0]))


def test_rwalk_refuses_what_has_no_meaning():
    with pytest.raises(InputError, match=r"rwalk\.damping=0 must be above 0"):
        RWalk(damping=0)
    with pytest.raises(InputError, match=r"rwalk\.interval=0"):
        RWalk(interval=0)
