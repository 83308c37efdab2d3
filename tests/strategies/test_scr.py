"""Supervised contrastive replay: worked examples, closed forms, and loops written by hand."""

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

from cl.data.task import SCENARIOS, Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies import scr
from cl.strategies.scr import SCR
from draws import quick, seeds
from toys import learn, same, toy, trunk


def slow_contrast(z, y, temperature) -> list[float]:
    """Each row's loss, as it is printed."""
    rows = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        below = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in others)
        positive = [p for p in others if y[p] == y[i]]
        logs = [math.log(math.exp(float(z[i] @ z[p]) / temperature) / below) for p in positive]
        rows.append(-sum(logs) / len(logs) if logs else 0.0)
    return rows


def test_worked_example_22():
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    y = torch.tensor([0, 0, 1, 1])
    assert slow_contrast(z, y, 0.5) == pytest.approx([0.460373, 0.460373, 0.339178, 0.850424], abs=1e-5)
    assert float(scr.supervised_contrastive(z, y, 0.5)) == pytest.approx(0.527587, abs=1e-5)


@quick
@given(seeds, st.integers(2, 9), st.integers(1, 3), st.floats(0.05, 2))
def test_the_contrastive_loss_is_the_printed_one(seed, size, num_classes, temperature):
    draw = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(size, 4, generator=draw, dtype=torch.float64), dim=1).requires_grad_()
    y = torch.randint(num_classes, (size,), generator=draw)
    loss = scr.supervised_contrastive(z, y, temperature)
    assert float(loss.detach()) == pytest.approx(np.mean(slow_contrast(z.detach(), y, temperature)), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, z)
    assert bool(gradient.isfinite().all())
    order = torch.randperm(size, generator=draw)
    torch.testing.assert_close(scr.supervised_contrastive(z[order], y[order], temperature), loss)


def test_a_step_of_scr_by_hand():
    learner, stream = toy(SCR(memory_size=20, batch_size=7), [0])
    strategy = learner.strategies["method"]
    learner.before_task(stream[1])
    incoming = Batch(*(column[:5] for column in stream[1].train.tensors()))
    batch = strategy.extend_batch(learner, incoming)
    assert len(batch) == 12 and set(batch.y[5:].tolist()) <= {0, 1}
    batch.view = learner.prepare(batch.x)
    logits = learner(batch.view)
    strategy.random.seed(9)
    loss = strategy.criterion(learner, batch, logits)
    rng = np.random.Generator(np.random.PCG64(9))
    views = torch.cat([batch.x.float() / 255, strategy.augment(batch.x, rng)])
    z = strategy.projection(learner.backbone(views))
    z = z / z.norm(dim=1, keepdim=True)
    labels = [*batch.y.tolist(), *batch.y.tolist()]
    assert float(loss.detach()) == pytest.approx(np.mean(slow_contrast(z.detach(), labels, 0.07)), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in (*learner.backbone.parameters(), *strategy.projection.parameters()))
    assert all(p.grad is None for p in learner.head.parameters())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scr_predicts_by_the_means_of_its_memory(scenario):
    learner, stream = toy(SCR(memory_size=30), range(3), epochs=3, scenario=scenario)
    strategy = learner.strategies["method"]
    held = strategy.memory.rows()
    features = learner.backbone(learner.prepare(held.x)).detach()
    features = features / features.norm(dim=1, keepdim=True)
    means = torch.stack([features[held.y == c].mean(0) for c in range(learner.num_classes)])
    means = means / means.norm(dim=1, keepdim=True)
    torch.testing.assert_close(strategy.means, means)
    test = TaskData.concat([task.test for task in stream])
    query = learner.backbone(learner.prepare(test.tensors()[0])).detach()
    gaps = ((query / query.norm(dim=1, keepdim=True))[:, None] - means[None]).square().sum(2)
    shown = strategy.predict(learner, learner.prepare(test.tensors()[0]))
    torch.testing.assert_close(shown, -gaps, rtol=1e-4, atol=1e-4)
    if scenario == "class":
        assert float((shown.argmax(1) == test.labels).float().mean()) > 0.6


def test_scr_leaves_the_head_alone_and_starts_without_a_memory():
    learner, stream = toy(SCR(memory_size=30))
    head = {name: value.clone() for name, value in learner.head.state_dict().items()}
    before = trunk(learner)
    learn(learner, stream, [0])
    assert same(learner.head.state_dict(), head) and not same(trunk(learner), before)
    x = learner.prepare(stream[2].test.x)
    shown = learner.strategies["method"].predict(learner, x)
    assert bool((shown[:, 2:] == -4).all())


def test_scr_refuses_what_is_no_image():
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    stream = Stream([Task(0, TaskData(x, y), TaskData(x, y))], num_classes=2, name="flat")
    backbone = nn.Linear(3, 3)
    backbone.num_features = 3
    with pytest.raises(InputError, match=r"SCR crops images, but the inputs of 'flat' are \(3,\): use er"):
        Learner(stream, backbone, {"method": SCR()}, partial(torch.optim.SGD, lr=0.1))
    assert not SCR.distributed
