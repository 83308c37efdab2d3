"""Learning without Forgetting: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.strategies import lwf
from cl.strategies.lwf import LwF
from cl.testing import ToyBackbone, toy_stream
from draws import quick, seeds
from toys import learn, same, toy, trunk


def test_worked_example_19():
    teacher, student = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    assert float(lwf.distillation(student, teacher, 2.0)) == pytest.approx(0.385120, abs=1e-5)
    assert float(lwf.distillation(student, teacher, 2.0)) / 4 == pytest.approx(0.096280, abs=1e-5)
    assert float(F.cross_entropy(student / 2, (teacher / 2).softmax(1))) == pytest.approx(1.002239, abs=1e-5)


@quick
@given(seeds, st.integers(1, 5), st.integers(2, 6), st.floats(0.5, 8))
def test_distillation_has_the_gradient_of_the_softened_cross_entropy(seed, num_rows, num_classes, temperature):
    draw = torch.Generator().manual_seed(seed)
    teacher = torch.randn(num_rows, num_classes, generator=draw)
    student = torch.randn(num_rows, num_classes, generator=draw).requires_grad_()
    soft = F.cross_entropy(student / temperature, (teacher / temperature).softmax(1)) * temperature**2
    (expected,) = torch.autograd.grad(soft, student)
    value = lwf.distillation(student, teacher, temperature)
    (got,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
    entropy = -((teacher / temperature).softmax(1) * (teacher / temperature).log_softmax(1)).sum(1).mean()
    assert float(value.detach()) == pytest.approx(float((soft - temperature**2 * entropy).detach()), abs=1e-3)
    assert float(value.detach()) >= -1e-5 and float(lwf.distillation(teacher, teacher, temperature)) == pytest.approx(
        0, abs=1e-5
    )


@pytest.mark.parametrize(
    ("scenario", "groups"),
    [("class", [[0, 1, 2, 3]]), ("task", [[0, 1], [2, 3]]), ("domain", [[0, 1]])],
)
def test_what_is_distilled_in_each_scenario(scenario, groups):
    learner, stream = toy(LwF(alpha=0.7, temperature=3.0), [0, 1], scenario=scenario)
    strategy = learner.strategies["method"]
    learner.before_task(stream[2])
    learner.tasks_learned = 2
    x, y, task = (column[:10] for column in stream[2].train.tensors())
    batch = Batch(x, y, task, num_incoming=6, view=learner.prepare(x))  # four replayed rows are not distilled
    with torch.no_grad():
        taught = learner(batch.view)
        for p in learner.trunk().parameters():
            p += 0.1
        logits = learner(batch.view)
        got = strategy.loss(learner, batch, logits)
    expected = sum(
        0.7 * 9 * F.kl_div((logits[:6, g] / 3).log_softmax(1), (taught[:6, g] / 3).softmax(1), reduction="batchmean")
        for g in groups
    )
    assert float(got) == pytest.approx(float(expected), rel=1e-4) and float(got) > 0


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    ("train_mask", "per_task", "times"), [("domain", True, 2), ("domain", False, 1), ("task", True, 1)]
)
def test_lwf_as_in_released_codes(scaled, train_mask, per_task, times):
    """All outputs where all competed when the teacher was trained; without T^2; once for each old task."""
    method = LwF(alpha=0.7, temperature=3.0, scaled=scaled, per_task=per_task)
    learner, stream = toy(method, [0, 1], train_mask=train_mask)
    learner.before_task(stream[2])
    learner.tasks_learned = 2
    x, y, task = (column[:10] for column in stream[2].train.tensors())
    batch = Batch(x, y, task, view=learner.prepare(x))
    with torch.no_grad():
        taught = learner(batch.view)
        for p in learner.trunk().parameters():
            p += 0.1
        logits = learner(batch.view)
        got = method.loss(learner, batch, logits)
    groups = [range(6)] if train_mask == "domain" else [[0, 1], [2, 3]]
    soft = [((logits[:, g] / 3).log_softmax(1), (taught[:, g] / 3).softmax(1)) for g in groups]
    expected = 0.7 * (9 if scaled else 1) * times * sum(float((q * (q.log() - p)).sum(1).mean()) for p, q in soft)
    assert float(got) == pytest.approx(expected, rel=1e-4) and expected > 0


def test_the_teacher_is_the_network_of_before_the_task_all_through_it():
    class Noisy(ToyBackbone):
        def __init__(self) -> None:
            super().__init__()
            self.layers.append(nn.BatchNorm1d(16))
            self.layers.append(nn.Dropout(0.5))

    class Watch(Strategy):
        def after_step(self, learner, batch, logits):
            teacher = learner.strategies["lwf"].teacher
            assert not any(m.training for m in teacher.modules())
            self.steps = getattr(self, "steps", 0) + 1
            self.kept = [t.clone() for t in teacher.state_dict().values()]

    stream, watch = toy_stream(), Watch()
    strategies = {"lwf": LwF(), "watch": watch}
    learner = Learner(stream, Noisy(), strategies, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    learn(learner, stream, [0])
    before = trunk(learner)
    learn(learner, stream, [1], epochs=2)
    assert watch.steps == 18 and same(dict(zip(before, watch.kept, strict=True)), before)
    assert not same(trunk(learner), before)
    assert not any(p.requires_grad for p in learner.strategies["lwf"].parameters())


def test_lwf_without_weight_is_finetuning():
    with_term, without = toy(LwF(alpha=0.0), range(3))[0], toy(None, range(3))[0]
    for a, b in zip(trunk(with_term).values(), trunk(without).values(), strict=True):
        torch.testing.assert_close(a, b)
    assert not same(trunk(toy(LwF(), range(3))[0]), trunk(without))
