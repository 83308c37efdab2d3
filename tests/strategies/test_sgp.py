"""Scaled Gradient Projection: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl.data.task import Stream, Task, TaskData
from cl.errors import InputError
from cl.strategies import sgp
from cl.strategies.gpm import GPM
from cl.strategies.sgp import SGP
from cl.testing import ToyBackbone, toy_stream
from draws import normal, quick, seeds
from subspaces import WideNet, build, leak, random_stream
from toys import Identity, learn


def test_worked_example_9():
    expected = torch.tensor([1, 0.956522, 0.846154])
    torch.testing.assert_close(sgp.importance(torch.tensor([3.0, 2.0, 1.0]), 10), expected, atol=1e-6, rtol=0)
    assert sgp.importance(torch.tensor([3.0, 2.0, 1.0]), 1e9).min() > 0.9999
    torch.testing.assert_close(sgp.importance(torch.tensor([4.0, 2.0, 1.0]), 0), torch.tensor([1.0, 0.5, 0.25]))


def test_worked_example_10():
    """A basis of e1 and an input along (0, 1, 1): sigma is 2 and 2 ** .5, and what was .3 becomes 1."""
    x = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    y = torch.tensor([0, 1])
    stream = Stream(
        [Task(t, TaskData(x, y, t), TaskData(x.clone(), y, t)) for t in range(2)], scenario="domain", num_classes=2
    )
    learner = build(stream, Identity(3), SGP(threshold=1.0, increment=0.0))
    strategy = learner.strategies["method"]
    strategy.basis_0[0, 0], strategy.importance_0[0] = 1, 0.3
    strategy.after_task(learner, stream[1])
    torch.testing.assert_close(strategy.importance_0, torch.tensor([1, 0.963711, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(strategy.basis_0[:, 1].abs(), torch.tensor([0, 0.5, 0.5]).sqrt())


def sgp_by_hand(R: list[torch.Tensor], threshold: float, scale: float):
    """The reference's procedure on one layer's representations, with the criterion's rank at the first task."""
    M, weight = R[0].new_zeros(len(R[0]), 0), R[0].new_zeros(0)
    for some in R:
        inside = M @ M.T @ some
        U, S, _ = torch.linalg.svd(inside, full_matrices=False)
        old = ((M.T @ U) ** 2 @ S**2).sqrt()
        U, S, _ = torch.linalg.svd(some - inside, full_matrices=False)
        have, rank = inside.square().sum(), 0
        while have < (threshold - 1e-9) * some.square().sum():
            have, rank = have + S[rank] ** 2, rank + 1
        M, sigma = torch.cat([M, U[:, :rank]], 1), torch.cat([old, S[:rank]])
        new = (scale + 1) * sigma / (scale * sigma + sigma.max())
        weight = torch.cat([(new[: len(weight)] + weight).clamp(0, 1), new[len(weight) :]])
    return M @ torch.diag(weight) @ M.T, weight


@quick
@given(seeds, st.sampled_from([0.5, 0.9, 0.99]), st.sampled_from([0.0, 3.0, 10.0]))
def test_sgp_projects_as_the_loop_written_by_hand(seed, threshold, scale):
    xs = [(normal(seed + t, 6, 8) * normal(seed + 9 + t, 1, 8).exp()).float() for t in range(3)]
    y = torch.arange(6) % 2
    tasks = [Task(t, TaskData(x, y, t), TaskData(x.clone(), y, t)) for t, x in enumerate(xs)]
    stream = Stream(tasks, scenario="domain", num_classes=2)
    learner = build(stream, Identity(8), SGP(threshold, 0.0, scale))
    strategy = learner.strategies["method"]
    for task in stream:
        strategy.after_task(learner, task)
    learner.tasks_learned = 1
    strategy.before_task(learner, stream[1])
    projector, weight = sgp_by_hand([x.double().T for x in xs], threshold, scale)
    assert int((strategy.importance_0 > 0).sum()) == len(weight) and float(strategy.importance_0.max()) <= 1
    gradient = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
    learner.head.weight.grad, learner.head.bias.grad = gradient.clone(), torch.ones(2)
    strategy.project_gradients(learner)
    expected = gradient - gradient @ projector.float()
    torch.testing.assert_close(learner.head.weight.grad, expected, atol=1e-4, rtol=1e-3)
    assert learner.head.bias.grad is None


def test_sgp_of_a_large_scale_is_gpm_and_of_a_small_one_moves_what_gpm_closes():
    stream = random_stream(num_tasks=3)
    weights, leaks = [], []
    for make in (GPM, partial(SGP, scale=1e9), partial(SGP, scale=1.0)):
        torch.manual_seed(0)
        learner = learn(build(stream, WideNet(), make(threshold=0.9)), stream, epochs=5)
        weights.append(torch.cat([p.detach().flatten() for p in learner.parameters()]))
        torch.manual_seed(0)
        leaks.append(leak(build(stream, WideNet(), make(threshold=1.0)), stream, epochs=5)[0])
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=0)
    assert (weights[2] - weights[0]).abs().max() > 1e-3 and leaks[2] > 100 * leaks[0]


@pytest.mark.parametrize(
    ("arguments", "optimizer", "message"),
    [
        ({}, partial(torch.optim.Adam, lr=0.1), "SGP needs plain SGD.*Adam"),
        ({"threshold": [0.9, 0.9]}, None, r"sgp\.threshold has 2 values for 3 layers"),
        ({"threshold": 1.1}, None, r"sgp\.threshold=1\.1 must be between 0 and 1"),
        ({"scale": -1.0}, None, r"sgp\.scale=-1\.0 must be 0 or more"),
    ],
)
def test_sgp_refuses(arguments, optimizer, message):
    with pytest.raises(InputError, match=message):
        build(toy_stream(), ToyBackbone(), SGP(**arguments), optimizer=optimizer)
