"""Holistic proxy-based contrastive replay: worked examples, PCR as a special case, and a step written by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cl.data.task import SCENARIOS
from cl.engine.batch import Batch
from cl.errors import InputError
from cl.strategies.hpcr import HPCR, factor, structure_distillation
from cl.strategies.pcr import PCR
from cl.toolkit.proxies import proxy_contrast
from cl.toolkit.views import with_another_view
from draws import normal, quick, seeds
from toys import Identity, build, float_stream, same, toy, trunk

OLD, NEW = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])


def test_worked_examples():
    assert factor(125, 0.5625, 1.8) == pytest.approx(1.18125)
    assert [factor(i, 0.5625, 1.8) for i in (0, 250, 500)] == pytest.approx([0.5625, 1.8, 0.5625])
    assert float(structure_distillation(NEW, OLD, 0.09)) == pytest.approx(0.707155, abs=1e-6)
    assert float(structure_distillation(OLD, OLD, 0.09)) == pytest.approx(0.110423, abs=1e-6)


def test_a_constant_factor_of_one_is_one():
    assert {factor(i, 1.0, 1.0) for i in range(700)} == {1.0}


@quick
@given(seeds, st.integers(2, 8), st.floats(0.05, 2))
def test_structures_are_distilled_as_printed(seed, size, temperature):
    new, old = normal(seed, size, 4).requires_grad_(), normal(seed + 1, size, 4)

    def slow(z, i):
        z = z / z.norm(dim=1, keepdim=True)
        below = sum(math.exp(float(z[i] @ z[k]) / temperature) for k in range(size) if k != i)
        return {j: math.exp(float(z[i] @ z[j]) / temperature) / below for j in range(size) if j != i}

    loss = structure_distillation(new, old, temperature)
    now, then = [[slow(z, i) for i in range(size)] for z in (new.detach(), old)]
    expected = -sum(then[i][j] * math.log(now[i][j]) for i in range(size) for j in then[i]) / size
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    entropy = -sum(then[i][j] * math.log(then[i][j]) for i in range(size) for j in then[i]) / size
    assert expected >= entropy - 1e-9
    torch.testing.assert_close(structure_distillation(3 * new, 0.5 * old, temperature), loss)
    (at_rest,) = torch.autograd.grad(structure_distillation(new, new.detach(), temperature), new)
    assert float(at_rest.abs().max()) < 1e-9, "there is nothing to distil where nothing has moved"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_distillation_and_with_a_factor_of_one_it_is_pcr_to_the_bit(scenario):
    plain = HPCR(memory_size=12, a=0.0, b=0.0, t_min=1.0, t_max=1.0)
    one, _ = toy(plain, range(3), epochs=2, scenario=scenario)
    other, _ = toy(PCR(memory_size=12), range(3), epochs=2, scenario=scenario)
    assert same(trunk(one), trunk(other))
    full, _ = toy(HPCR(memory_size=12), range(3), epochs=2, scenario=scenario)
    assert not same(trunk(full), trunk(other))


@pytest.mark.parametrize(
    ("task", "a", "b"), [(0, 0.1, 0.5), (1, 0.0, 0.0), (1, 0.3, 0.0), (1, 0.0, 0.7), (1, 0.1, 0.5)]
)
def test_a_step_of_hpcr_by_hand(task, a, b):
    learner, stream = toy(HPCR(memory_size=12, a=a, b=b), [0])
    learner.before_task(stream[task])
    strategy, x = learner.strategies["method"], stream[1].train.x[:4]
    learner.step = 125
    held = strategy.memory.rows()
    batch = strategy.extend_batch(learner, Batch(*(column[:4] for column in stream[1].train.tensors())))
    logits = learner(learner.prepare(batch.x), batch.task)
    strategy.random.seed(9)
    strategy.memory.random.seed(4)
    loss = strategy.criterion(learner, batch, logits)
    strategy.random.seed(9)
    strategy.memory.random.seed(4)
    drawn = strategy.memory.sample(4)
    old = with_another_view(drawn, strategy.augment, strategy.random.generator)
    features = learner.backbone(learner.prepare(old.x))
    again = strategy.classify(learner, features)
    y = torch.cat([batch.y, old.y])
    expected = 1.18125 * proxy_contrast(torch.cat([logits, again]), y)
    if task:
        stored = torch.cat([drawn.extras["logits"]] * 2)
        gaps = [(again[i, c] - stored[i, c]) ** 2 for i in range(8) for c in y.tolist()]
        expected = expected + a * torch.stack(gaps).mean()
        expected = expected + b * structure_distillation(features, torch.cat([drawn.extras["features"]] * 2), 0.09)
    torch.testing.assert_close(loss, expected)
    assert len(held) == 12 and torch.equal(strategy._incoming, learner.backbone(learner.prepare(x)).detach())


def test_logits_and_features_are_those_of_the_plain_view_before_the_step():
    before = {}

    class Watch(HPCR):
        def criterion(self, learner, batch, logits):
            n = batch.num_incoming
            for row, (logit, feature) in enumerate(zip(logits[:n], learner.backbone(batch.view[:n]), strict=True)):
                before[batch.x[row].numpy().tobytes()] = logit.detach(), feature.detach()
            return super().criterion(learner, batch, logits)

    learner, _ = toy(Watch(memory_size=100), [0, 1])
    held = learner.strategies["method"].memory.rows()
    assert len(held) == 96
    for x, logits, features in zip(held.x, held.extras["logits"], held.extras["features"], strict=True):
        expected = before[x.numpy().tobytes()]
        torch.testing.assert_close(logits, expected[0])
        torch.testing.assert_close(features, expected[1])
    cosines = F.cosine_similarity(held.extras["features"][:, None], learner.head.weight[None].detach(), dim=2) / 0.09
    assert not torch.allclose(cosines[:48], held.extras["logits"][:48]), "the weights have moved since"


def test_hpcr_is_of_one_process_and_refuses_what_is_no_image():
    assert not HPCR.distributed
    with pytest.raises(InputError, match=r"HPCR crops images, but the inputs of .* are \(3,\): choose another"):
        build(float_stream([torch.zeros(4, 3)], [torch.arange(4) % 2]), Identity(3), HPCR())


def test_each_row_is_offered_in_the_first_epoch_alone():
    learner, _ = toy(HPCR(memory_size=12), [0, 1], epochs=2)
    assert learner.strategies["method"].memory.num_seen == 2 * 48
