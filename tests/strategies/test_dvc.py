"""Dual view consistency: worked numbers, the gradients that choose, and the loop written by hand."""

from __future__ import annotations

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from by_hand import by_hand, close
from cl.data.augment import ContrastiveView
from cl.engine.batch import Batch
from cl.errors import InputError
from cl.random import derive
from cl.strategies.dvc import DVC, distance_loss, gradient_length, information_loss
from cl.testing import toy_stream
from cl.testing.toys import Normed
from draws import normal, quick, seeds
from toys import Identity, build, float_stream, learn, toy

P = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
Q = torch.tensor([[0.6, 0.4], [0.2, 0.8]])
R = torch.tensor([[0.5, 0.5], [0.5, 0.5]])


def entropy(*p: float) -> float:
    return -sum(x * math.log(x) for x in p if x)


def test_worked_numbers():
    # The mean predictions are (.6, .4), (.4, .6) and (.5, .5).
    assert entropy(0.6, 0.4) == pytest.approx(0.673012, abs=1e-6)
    assert float(information_loss(P, Q, R)) == pytest.approx(-(2 * 0.673012 + math.log(2)) / 3, abs=1e-6)
    # |r - p| = .4 .4 .2 .2, |r - q| = .1 .1 .3 .3
    assert float(distance_loss(P, Q, R)) == pytest.approx((0.3 + 0.2) / 2)
    assert float(distance_loss(P, P, P)) == 0
    # p = (.25, .75) for class 0: the gradient is (-.75, .75) times the features (1, -2).
    logits, features = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1.0, -2.0]])
    assert gradient_length(logits, torch.tensor([0]), features).item() == pytest.approx(1.5 * 3)
    assert gradient_length(logits, torch.tensor([1]), features).item() == pytest.approx(0.5 * 3)


def test_predictions_that_spread_and_agree_have_the_least_loss():
    sure = torch.eye(4)
    assert float(information_loss(sure, sure, sure)) == pytest.approx(-math.log(4), abs=1e-6)
    one = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(4, 1).requires_grad_()
    loss = information_loss(one)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert bool(one.grad.isfinite().all()), "a class that nobody predicts has a logarithm"


@quick
@given(seeds, st.integers(1, 6), st.integers(2, 5))
def test_the_length_is_that_of_the_gradient_of_a_linear_head(seed, size, num_classes):
    head, features = nn.Linear(4, num_classes, dtype=torch.float64), normal(seed, size, 4)
    y = torch.randint(num_classes, (size,), generator=torch.Generator().manual_seed(seed))
    lengths = gradient_length(head(features), y, features).detach()
    for row in range(size):
        loss = F.cross_entropy(head(features[row : row + 1]), y[row : row + 1])
        (gradient,) = torch.autograd.grad(loss, head.weight)
        assert float(lengths[row]) == pytest.approx(float(gradient.abs().sum()), rel=1e-9)


def loop(information: float, distance: float, candidates: int = 10, size: int = 4):
    """Return the loss of `by_hand` and what it keeps: Q with its optimizer, which steps before the next loss."""
    draw, augment, kept = np.random.Generator(np.random.PCG64(derive(0, "method", "random"))), ContrastiveView(), {}

    def both_views(net, x, y, seen):
        second = (augment((255 * x).round().to(torch.uint8), draw) * 255).round() / 255
        z = [net(x), net(second)]
        z.append(kept["q"](torch.cat(z, 1)))
        p = [part[:, :seen].softmax(1) for part in z]
        loss = (F.cross_entropy(z[0][:, :seen], y) + F.cross_entropy(z[1][:, :seen], y)) / 2
        for part in p:
            mean = part.sum(0) / len(part)
            loss = loss + information * (mean * mean.log()).sum() / 3
        apart = (p[2] - p[0]).abs().sum() + (p[2] - p[1]).abs().sum()
        return loss + distance * apart / (2 * 6 * len(x)), z[0]

    def gradient(net, x, y, seen):
        loss = F.cross_entropy(net(x[None])[:, :seen], y[None])
        return float(torch.autograd.grad(loss, net[1].weight)[0].abs().sum())

    def loss_of(net, x, y, memory, seen):
        if not kept:
            kept["q"] = nn.Sequential(nn.Linear(12, 128), nn.ReLU(), nn.Linear(128, 6))
            kept["optimizer"] = torch.optim.SGD(kept["q"].parameters(), lr=0.1)
        kept["optimizer"].step()
        kept["optimizer"].zero_grad()
        loss, logits = both_views(net, x, y, seen)
        if memory.rows:
            old_x, old_y, _ = memory.some(candidates)
            virtual = deepcopy(net)
            moves = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            with torch.no_grad():
                for p, g in zip(virtual.parameters(), moves, strict=True):
                    p -= 0.1 * g
            rows = list(zip(old_x, old_y, strict=True))
            rises = [gradient(virtual, *row, seen) - gradient(net, *row, seen) for row in rows]
            most = sorted(range(len(rows)), key=lambda i: -rises[i])[:size]
            loss = loss + both_views(net, old_x[most], old_y[most], seen)[0]
        return loss, logits

    return loss_of


@pytest.mark.parametrize(("information", "distance"), [(1.0, 4.0), (0.0, 0.0), (0.5, 2.0)])
def test_dvc_is_the_loop_written_by_hand(information, distance):
    options = {"information": information, "distance": distance}
    learner, _ = toy(DVC(memory_size=12, batch_size=4, num_candidates=10, **options), range(3), epochs=2)
    net = by_hand(loop(**options))
    close(learner, net)
    for ours, theirs in zip(learner.trunk().parameters(), net.parameters(), strict=True):
        assert float((ours - theirs).detach().abs().max()) < 36 * 1e-6, "1e-6 for each of 36 steps"


def test_scores_leave_no_trace_in_batch_norm():
    learner = build(toy_stream(3), Normed(), DVC(memory_size=20, num_candidates=10))
    passed = []
    learner.backbone.register_forward_hook(lambda module, x, y: passed.append(len(y)))
    learn(learner, toy_stream(3), [0])
    # Two views of the incoming rows; the candidates before and after; two views of the chosen ones.
    assert passed[:2] == [8, 8] and passed[2:8] == [8, 8, 8, 8, 8, 8] and passed[8:14] == [8, 8, 10, 10, 8, 8]
    assert int(learner.backbone.layers[-1].num_batches_tracked) == 2 + 5 * 4


def test_each_scenario_has_its_classes_and_absent_ones_are_not_learned():
    learner, stream = toy(DVC(memory_size=20, num_candidates=10), [0], scenario="task")
    learner.before_task(stream[1])
    batch = Batch(*(column[:5] for column in stream[1].train.tensors()))
    strategy = learner.strategies["method"]
    learner.zero_grad()
    loss = strategy._of_both_views(learner, batch, learner(learner.prepare(batch.x), batch.task))
    loss.backward()
    assert strategy.joint[2].weight.grad.any(1).tolist() == [False, False, True, True, False, False]


def test_each_row_is_offered_in_the_first_epoch_alone():
    learner, _ = toy(DVC(memory_size=12), [0, 1], epochs=2)
    assert learner.strategies["method"].memory.num_seen == 2 * 48


def test_dvc_refuses_what_it_cannot_learn():
    assert not DVC.distributed
    with pytest.raises(InputError, match=r"DVC crops images, but the inputs of .* are \(3,\): choose another"):
        build(float_stream([torch.zeros(4, 3)], [torch.arange(4) % 2]), Identity(3), DVC())
    with pytest.raises(InputError, match=r"dvc\.num_candidates=4 is less than the 8 examples to replay: raise it"):
        toy(DVC(num_candidates=4))
    with pytest.raises(InputError, match=r"dvc\.distance=-1"):
        DVC(distance=-1.0)
