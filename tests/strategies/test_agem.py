"""Averaged Gradient Episodic Memory: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cl.data.task import SCENARIOS
from cl.errors import InputError
from cl.strategies import agem
from cl.strategies.agem import AGEM
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.memory import Memory
from draws import ALPHA, quick, seeds
from toys import build, toy


def vectors(seed: int, size: int, count: int):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(count)]


def test_worked_example_1():
    projected = agem.project(torch.tensor([1.0, -2.0, 0.0]), torch.ones(3))
    torch.testing.assert_close(projected, torch.tensor([4 / 3, -5 / 3, 1 / 3]))


@quick
@given(seeds, st.integers(1, 12), st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_projection_is_the_nearest_point_without_a_violation(seed, size, scale):
    g, reference, other = vectors(seed, size, 3)
    reference = reference * scale
    projected = agem.project(g, reference)
    assert float(projected @ reference) >= -1e-6 * scale
    if g @ reference >= 0:
        assert torch.equal(projected, g)
    # Karush, Kuhn and Tucker: the step is a non-negative multiple of the constraint's normal, zero where it is slack.
    step = projected - g
    multiplier = step @ reference / (reference @ reference)
    torch.testing.assert_close(step, multiplier * reference)
    assert float(multiplier) >= -1e-12 and abs(float(multiplier * (projected @ reference))) < 1e-9
    feasible = other if other @ reference >= 0 else -other
    assert (projected - g).norm() <= (feasible - g).norm() + 1e-9


def test_a_vanishing_reference_changes_nothing():
    g = torch.tensor([1.0, -2.0])
    assert torch.equal(agem.project(g, torch.zeros(2)), g)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_learners_gradients_are_projected_as_one_vector(scenario):
    learner, stream = toy(AGEM(memory_size=12, batch_size=64), [0, 1], scenario=scenario)
    learner.before_task(stream[2])
    memory: Memory = learner.strategies["method"].memory
    assert len(memory) == 8
    batch = memory.sample(64)  # all of it, so that the draw does not matter
    loss = learner.criterion(learner(learner.prepare(batch.x)), batch)
    parameters = list(learner.parameters())
    reference = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    draw = torch.Generator().manual_seed(1)
    g = torch.randn(len(reference), generator=draw)
    g -= (0.5 + g @ reference) / (reference @ reference) * reference  # a violation: the product is -0.5
    for sign in (1, -1):
        for p, part in zip(parameters, (sign * g).split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p).clone()
        learner.strategies["method"].project_gradients(learner)
        result = torch.cat([p.grad.flatten() for p in parameters])
        expected = g + 0.5 / (reference @ reference) * reference if sign == 1 else -g
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def test_agem_remembers_the_same_number_of_each_class_drawn_at_random():
    learner, stream = toy(AGEM(memory_size=20), range(3))
    batch = learner.strategies["method"].memory.sample(20)
    assert torch.bincount(batch.y).tolist() == [4, 4, 3, 3, 3, 3]
    for task in stream:
        known = {(x.numpy().tobytes(), int(y)) for x, y in zip(task.train.x, task.train.y, strict=True)}
        stored = {
            (x.numpy().tobytes(), int(y))
            for x, y, t in zip(batch.x, batch.y, batch.task, strict=True)
            if t == task.index
        }
        assert stored <= known and len(stored) == (8, 6, 6)[task.index]

    counts, strategy = np.zeros(48), learner.strategies["method"]
    position = {x.numpy().tobytes(): i for i, x in enumerate(stream[0].train.x)}
    for seed in range(300):
        strategy.memory = Memory(20, stream, policy="ring")
        strategy.memory.random.seed(seed)
        strategy.after_task(learner, stream[0])
        counts[[position[x.numpy().tobytes()] for x in strategy.memory.sample(20).x]] += 1
    expected = 300 * 4 / 24
    for part in (counts[::2], counts[1::2]):  # the two classes; four of 24 rows each
        square = ((part - expected) ** 2).sum() / (expected * (20 / 24) * 24 / 23)
        assert stats.chi2.sf(square, 23) > ALPHA


def test_agem_refuses_less_than_one_exemplar_a_class():
    with pytest.raises(InputError, match="memory_size=5 is smaller than the 6 groups"):
        build(toy_stream(), ToyBackbone(), AGEM(memory_size=5))
