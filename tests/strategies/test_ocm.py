"""Mutual information maximization: worked numbers, the losses as printed, and the loop written by hand."""

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
from cl.data.task import Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.errors import InputError
from cl.random import derive
from cl.strategies.ocm import OCM, new_information, old_information
from cl.testing import ToyBackbone
from cl.toolkit.views import turned, with_turned_copies
from draws import normal, quick, seeds
from toys import Identity, build, float_stream, toy


def test_worked_numbers():
    # Two classes, each with one direction for both views. Another has similarity 2 once, and 0 twice.
    z, y = torch.eye(2)[[0, 1, 0, 1]], torch.tensor([0, 1, 0, 1])
    log_p = 2 - math.log(math.e**2 + 2)
    assert log_p == pytest.approx(-0.239545, abs=1e-6)
    assert float(new_information(z, y, 0.5)) == pytest.approx(-(2 / 2 * log_p + log_p), abs=1e-6)
    # With itself it has similarity 2 twice, and 0 twice.
    log_q = 2 - math.log(2 * math.e**2 + 2)
    assert float(old_information(z, z, y, 0.5)) == pytest.approx(-log_q, abs=1e-6) == pytest.approx(0.820075, abs=1e-6)
    # Two vectors that have not moved, and that have changed places.
    assert float(old_information(z[:2], z[:2], y[:2], 0.5)) == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)
    assert float(old_information(z[:2], z[[1, 0]], y[:2], 0.5)) == pytest.approx(math.log(1 + math.exp(2)), abs=1e-6)


@quick
@given(seeds, st.integers(1, 6), st.floats(0.1, 2))
def test_the_losses_are_as_printed(seed, half, temperature):
    z, v = (F.normalize(normal(seed + i, 2 * half, 4), dim=1) for i in range(2))
    y = torch.randint(3, (half,), generator=torch.Generator().manual_seed(seed)).repeat(2)
    size, rows = 2 * half, range(2 * half)

    def share(i, j, others, without=()):
        below = sum(math.exp(float(z[i] @ others[k]) / temperature) for k in rows if k not in without)
        return float(z[i] @ others[j]) / temperature - math.log(below)

    same = [[j for j in rows if y[j] == y[i]] for i in rows]
    new = [
        2 / len(same[i]) * sum(share(i, j, z, (i,)) for j in same[i] if j != i) + share(i, (i + half) % size, z, (i,))
        for i in rows
    ]
    assert float(new_information(z, y, temperature)) == pytest.approx(-sum(new) / size, rel=1e-9)
    for others in (z, v):
        old = [sum(share(i, j, others) for j in same[i]) / len(same[i]) for i in rows]
        assert float(old_information(z, others, y, temperature)) == pytest.approx(-sum(old) / size, rel=1e-9)


def test_the_gradients_are_finite_though_no_vector_is_contrasted_with_itself():
    z = F.normalize(normal(0, 6, 4), dim=1).requires_grad_()
    new_information(z, torch.tensor([0, 1, 2] * 2), 0.07).backward()
    assert bool(z.grad.isfinite().all()) and bool(z.grad.any())


def test_turned_copies_have_labels_of_their_own():
    batch = Batch(torch.arange(32).view(2, 1, 4, 4), torch.tensor([0, 2]), torch.tensor([0, 1]))
    copies = with_turned_copies(batch, 3)
    assert torch.equal(copies.x, turned(batch.x)) and len(set(copies.y.tolist())) == 32
    assert (copies.y % 3).tolist() == [0, 2] * 16 and copies.task.tolist() == [0, 1] * 16


def loop(distil: float, temperature: float = 0.5):
    """Return the loss of `by_hand`; the projection has an optimizer of its own, which steps before the next loss."""
    draw = np.random.Generator(np.random.PCG64(derive(0, "method", "random")))
    augment, kept = ContrastiveView(scale=0.3), {}

    def view(x):
        return (augment((255 * x).round().to(torch.uint8), draw) * 255).round() / 255

    def copies(x):
        left, right = x[..., :2], x[..., 2:]
        halves = [torch.cat([a, b], 3) for b in (right, right.flip(2, 3)) for a in (left, left.flip(2, 3))]
        return torch.cat([half.rot90(k, (2, 3)) for k in range(4) for half in halves])

    def project(net, projection, x):
        z = projection(net[0](x))
        return z / z.norm(dim=1, keepdim=True)

    def contrast(z, others, labels, itself):
        total = 0.0
        for i in range(len(z)):
            products = z[i] @ others.T / temperature
            rest = torch.tensor([itself or j != i for j in range(len(others))])
            shares = products - products[rest].logsumexp(0)
            same = labels == labels[i]
            total = total + shares[same & rest].sum() / same.sum() * (1 if itself else 2)
            total = total if itself else total + shares[(i + len(z) // 2) % len(z)]
        return -total / len(z)

    def loss_of(net, x, y, memory, seen):
        if not kept:
            kept["projection"] = nn.Linear(16, 8)
            kept["optimizer"] = torch.optim.SGD(kept["projection"].parameters(), lr=0.1)
        kept["optimizer"].step()
        kept["optimizer"].zero_grad()
        if kept.get("seen") != seen:
            kept.update(seen=seen, net=deepcopy(net), before=deepcopy(kept["projection"]))
        labels = torch.cat([y + 6 * k for k in range(16)])
        x16 = copies(x)
        z = project(net, kept["projection"], torch.cat([x16, view(x16)]))
        loss, logits = contrast(z, z, labels.repeat(2), itself=False), net(x)
        if seen == 2:
            return loss + F.cross_entropy(net(view(x))[:, :seen], y), logits
        old_x, old_y, _ = memory.some(6)
        labels, x16 = torch.cat([old_y + 6 * k for k in range(16)]), copies(old_x)
        z = project(net, kept["projection"], torch.cat([x16, view(x16)]))
        loss = loss + contrast(z, z, labels.repeat(2), itself=True)
        with torch.no_grad():
            then = project(kept["net"], kept["before"], x16)
        loss = loss + contrast(z[: len(then)], then, labels, itself=True)
        now = net(view(old_x))
        loss = loss + F.cross_entropy(now[:, :seen], old_y)
        if distil:
            gap = now[:, : seen - 2] - kept["net"](view(old_x)).detach()[:, : seen - 2]
            loss = loss + distil * (gap**2).mean()
        return loss, logits

    return loss_of


@pytest.mark.parametrize("distil", [0.0, 0.7])
def test_ocm_is_the_loop_written_by_hand(distil):
    learner, _ = toy(OCM(memory_size=12, batch_size=6, dim=8, distil=distil, temperature=0.5), range(3))
    net = by_hand(loop(distil), epochs=1)
    close(learner, net)
    for ours, theirs in zip(learner.trunk().parameters(), net.parameters(), strict=True):
        assert float((ours - theirs).detach().abs().max()) < 18 * 1e-6, "1e-6 for each of 18 steps"


def test_as_many_are_replayed_as_the_batch_and_the_classes_seen_allow():
    for task, per_class, expected in ((1, 1, [4]), (2, 1, [6]), (2, 7, [8]), (0, 7, [])):
        learner, stream = toy(OCM(memory_size=20, batch_size=8, per_class=per_class, dim=8), range(task))
        learner.before_task(stream[task])
        strategy, drawn = learner.strategies["method"], []
        batch = Batch(*(column[:5] for column in stream[task].train.tensors()))
        strategy.memory.insert(batch)
        sample = strategy.memory.sample
        strategy.memory.sample = lambda size, sample=sample, drawn=drawn: drawn.append(size) or sample(size)
        strategy.criterion(learner, batch, torch.zeros(0))
        assert drawn == expected


def test_without_turns_a_step_has_two_views_of_each():
    learner, stream = toy(OCM(memory_size=20, batch_size=8, rotate=False, distil=0.0), [0])
    learner.before_task(stream[1])
    passed = []
    learner.backbone.register_forward_hook(lambda module, x, y: passed.append(len(y)))
    strategy = learner.strategies["method"]
    strategy.criterion(learner, Batch(*(column[:5] for column in stream[1].train.tensors())), torch.zeros(0))
    assert passed == [10, 16, 8]


def test_the_network_before_the_task_stands_still_within_it():
    learner, stream = toy(OCM(memory_size=20, batch_size=8, dim=8), [0])
    strategy = learner.strategies["method"]
    assert not torch.equal(strategy.projection.weight, strategy.projection_before.weight)
    learner.before_task(stream[1])
    assert torch.equal(strategy.projection.weight, strategy.projection_before.weight)
    assert torch.equal(learner.head.weight, strategy.before["head"].weight)
    assert not any(p.requires_grad for part in (strategy.before, strategy.projection_before) for p in part.parameters())


def test_each_row_is_offered_in_the_first_epoch_alone():
    learner, _ = toy(OCM(memory_size=12, batch_size=4, rotate=False), [0, 1], epochs=2)
    assert learner.strategies["method"].memory.num_seen == 2 * 48


def test_ocm_refuses_what_it_cannot_turn():
    assert not OCM.distributed
    with pytest.raises(InputError, match=r"OCM crops images, but the inputs of .* are \(3,\): choose another"):
        build(float_stream([torch.zeros(4, 3)], [torch.arange(4) % 2]), Identity(3), OCM())
    x, y = torch.randn(4, 1, 2, 8), torch.tensor([0, 1, 0, 1])
    oblong = Stream([Task(0, TaskData(x, y), TaskData(x, y))], num_classes=2, name="wide")
    with pytest.raises(InputError, match=r"those of 'wide' are oblong: set ocm\.rotate=false"):
        build(oblong, ToyBackbone(), OCM())
    build(oblong, ToyBackbone(), OCM(rotate=False))
