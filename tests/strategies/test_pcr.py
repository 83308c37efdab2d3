"""Proxy-based contrastive replay: the worked example, the pairwise form, and a step written by hand."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.backbones.networks import MLP
from cl.data.augment import ContrastiveView
from cl.data.sources import digits
from cl.data.task import Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies.hpcr import HPCR
from cl.strategies.pcr import PCR
from cl.streams.split import split
from cl.testing import toy_stream
from cl.testing.toys import Normed
from cl.toolkit.proxies import cosine_logits, proxy_contrast
from cl.toolkit.views import another_view, with_another_view
from draws import normal, quick, seeds
from toys import build, learn, toy


def slow_contrast(z, w, y, temperature) -> list[float]:
    """Each row's loss, as it is printed, with a proxy for every row."""
    u = [w[c] / w[c].norm() for c in y.tolist()]
    z = [row / row.norm() for row in z]
    rows = []
    for i in range(len(z)):
        below = math.log(sum(math.exp(float(z[i] @ proxy) / temperature) for proxy in u))
        logs = [float(z[i] @ u[p]) / temperature - below for p in range(len(z)) if y[p] == y[i]]
        rows.append(-sum(logs) / len(logs))
    return rows


def test_worked_example():
    w = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    z, y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1, 0])
    assert slow_contrast(z, w, y, 0.5) == pytest.approx([0.895814, 0.339178, 0.895814], abs=1e-6)
    assert float(proxy_contrast(cosine_logits(z, w, 2.0), y)) == pytest.approx(0.710269, abs=1e-6)


@quick
@given(seeds, st.integers(1, 12), st.integers(1, 6), st.floats(0.05, 2))
def test_the_form_by_counts_is_the_pairwise_one(seed, size, num_classes, temperature):
    z, w = normal(seed, size, 4), normal(seed + 1, num_classes, 4)
    y = torch.randint(num_classes, (size,), generator=torch.Generator().manual_seed(seed))
    logits = cosine_logits(z, w, 1 / temperature).requires_grad_()
    loss = proxy_contrast(logits, y)
    assert float(loss.detach()) == pytest.approx(np.mean(slow_contrast(z, w, y, temperature)), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    absent = [c for c in range(num_classes) if c not in y.tolist()]
    assert bool(gradient.isfinite().all()) and not gradient[:, absent].any(), "an absent class is not pushed away"
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(proxy_contrast(logits[order], y[order]), loss)


def test_rows_of_one_class_have_the_logarithm_of_their_number():
    logits = normal(0, 5, 3)
    assert float(proxy_contrast(logits, torch.full((5,), 2))) == pytest.approx(math.log(5))
    torch.testing.assert_close(
        proxy_contrast(logits[:3], torch.arange(3)), F.cross_entropy(logits[:3], torch.arange(3))
    )


def test_a_second_view_has_the_type_of_the_first():
    x = torch.randint(256, (5, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = ContrastiveView()
    view = another_view(x, augment, np.random.default_rng(3))
    expected = augment(x, np.random.default_rng(3))
    assert view.dtype == torch.uint8 and float((view / 255 - expected).abs().max()) <= 0.5 / 255 + 1e-6
    floats = x / 255
    assert torch.equal(
        another_view(floats, augment, np.random.default_rng(3)), augment(floats, np.random.default_rng(3))
    )
    batch = with_another_view(Batch(x, torch.arange(5), torch.ones(5).long()), augment, np.random.default_rng(3))
    assert torch.equal(batch.x, torch.cat([x, view])) and batch.num_incoming == 5
    assert batch.y.tolist() == [*range(5), *range(5)] and bool((batch.task == 1).all())


def a_step(strategy: PCR, backbone: nn.Module):
    """Return a learner in its second task with a memory of the first, a batch in two views, logits and the loss."""
    stream = toy_stream(3)
    learner = build(stream, backbone, strategy)
    learner.before_task(stream[1])
    strategy.memory.insert(Batch(*(column[:6] for column in stream[0].train.tensors())))
    learner.train()
    batch = strategy.extend_batch(learner, Batch(*(column[:5] for column in stream[1].train.tensors())))
    batch.view = learner.prepare(batch.x)
    logits = learner(batch.view, batch.task)
    strategy.random.seed(9)
    strategy.memory.random.seed(4)
    return learner, batch, logits, strategy.criterion(learner, batch, logits)


def test_a_step_of_pcr_by_hand_with_batch_norm_over_each_of_two_passes():
    strategy = PCR(memory_size=20)
    learner, batch, _, loss = a_step(strategy, Normed())
    old = strategy.memory.rows().take(
        torch.from_numpy(np.random.Generator(np.random.PCG64(4)).choice(6, 5, replace=False, shuffle=False))
    )
    second = another_view(old.x, strategy.augment, np.random.Generator(np.random.PCG64(9)))
    new_views, old_views = batch.x.float() / 255, torch.cat([old.x, second]).float() / 255
    y = torch.cat([batch.y, old.y, old.y])
    assert len(new_views) == len(old_views) == 10 and set(old.y.tolist()) == {0, 1}
    apart = torch.cat([learner.backbone(new_views), learner.backbone(old_views)]).detach()
    joint = learner.backbone(torch.cat([new_views, old_views])).detach()
    w = learner.head.weight.detach()
    assert float(loss.detach()) == pytest.approx(np.mean(slow_contrast(apart, w, y, 0.09)), rel=1e-4)
    assert abs(np.mean(slow_contrast(joint, w, y, 0.09)) / float(loss.detach()) - 1) > 0.005
    loss.backward()
    moved = learner.head.weight.grad.any(1).tolist()
    assert moved == [True] * 4 + [False] * 2, "of classes to come nothing is learned"
    assert learner.head.bias.grad is None


@pytest.mark.parametrize("kind", [PCR, HPCR])
def test_as_many_are_replayed_as_are_asked_for(kind):
    for size, expected in ((3, 3), (None, 5)):
        learner, stream = toy(kind(memory_size=12, batch_size=size), [0])
        strategy, passed = learner.strategies["method"], []
        learner.backbone.register_forward_hook(lambda module, x, y, passed=passed: passed.append(len(y)))
        batch = strategy.extend_batch(learner, Batch(*(column[:5] for column in stream[1].train.tensors())))
        strategy.criterion(learner, batch, learner(learner.prepare(batch.x), batch.task))
        assert passed == [10, 2 * expected], "incoming and replayed examples, each in two views"


@pytest.mark.parametrize("kind", [PCR, HPCR])
def test_with_an_empty_memory_nothing_is_learned(kind):
    learner, stream = toy(kind(memory_size=20))
    learner.before_task(stream[0])
    strategy = learner.strategies["method"]
    batch = strategy.extend_batch(learner, Batch(*(column[:5] for column in stream[0].train.tensors())))
    loss = strategy.criterion(learner, batch, learner(learner.prepare(batch.x), batch.task))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not any(p.grad.any() for p in learner.trunk().parameters() if p.grad is not None)


def test_pcr_predicts_by_cosines_and_stores_each_row_once():
    learner, stream = toy(PCR(memory_size=30), range(3), epochs=2)
    view = learner.prepare(stream[0].test.x)
    h, w, strategy = learner.backbone(view), learner.head.weight, learner.strategies["method"]
    expected = F.cosine_similarity(h[:, None], w[None], dim=2) / 0.09
    torch.testing.assert_close(strategy.predict(learner, view), expected, rtol=1e-4, atol=1e-4)
    assert len(strategy.memory) == 30 and strategy.memory.num_seen == 3 * 48, "no view of them, no later epoch"


def test_pcr_learns_five_tasks_in_one_pass():
    stream = split(digits(), num_tasks=5, scenario="class")
    strategies = {"pcr": PCR(memory_size=100, flip=False)}
    learner = Learner(stream, MLP, strategies, partial(torch.optim.SGD, lr=0.1), batch_size=10)
    learn(learner, stream).eval()
    right = []
    for task in stream:
        x, y, label = task.test.tensors()
        right.append((learner.predict(Batch(x, y, label)).argmax(1) == y).float().mean())
    assert float(torch.stack(right).mean()) > 0.8


def test_pcr_refuses_what_is_no_image_and_several_processes():
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    stream = Stream([Task(0, TaskData(x, y), TaskData(x, y))], num_classes=2, name="flat")
    backbone = nn.Linear(3, 3)
    backbone.num_features = 3
    with pytest.raises(InputError, match=r"PCR crops images, but the inputs of 'flat' are \(3,\): choose another"):
        Learner(stream, backbone, {"method": PCR()}, partial(torch.optim.SGD, lr=0.1))
    assert not PCR.distributed
