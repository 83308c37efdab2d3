"""ACIL and G-ACIL: worked examples, and equality with the ridge regression on all examples."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cl.data.task import TaskData
from cl.errors import InputError
from cl.strategies.acil import ACIL, recursion
from cl.testing import ToyBackbone, toy_stream
from draws import normal, quick, seeds
from prompted import all_rows, assert_rows_are_independent
from toys import build, float_stream, learn, same, toy, trunk


def start(M, C, gamma=1.0):
    return torch.eye(M, dtype=torch.float64) / gamma, torch.zeros(M, C, dtype=torch.float64)


def test_a_worked_example():
    """h = (1, 0), y = 3: R = diag(1/2, 1), W = (3/2, 0).

    Then h = (1, 1), y = 1: G = [[2, 1], [1, 1]] and (G + I)^-1 = [[2, -1], [-1, 3]] / 5.
    """
    R, W = start(2, 1)
    recursion(R, W, torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[3.0]]).double())
    torch.testing.assert_close(R, torch.tensor([[0.5, 0.0], [0.0, 1.0]]).double())
    torch.testing.assert_close(W, torch.tensor([[1.5], [0.0]]).double())
    recursion(R, W, torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[1.0]]).double())
    torch.testing.assert_close(R, torch.tensor([[0.4, -0.2], [-0.2, 0.6]]).double())
    torch.testing.assert_close(W, torch.tensor([[1.4], [-0.2]]).double())


@quick
@given(seeds, st.integers(1, 20), st.integers(1, 8), st.lists(st.integers(1, 19), max_size=4), st.floats(-2, 2))
def test_the_recursion_is_the_ridge_regression_however_examples_are_split(seed, N, M, cuts, exponent):
    H, Y, gamma = normal(seed, N, M), normal(seed + 1, N, 3), 10.0**exponent
    R, W = start(M, 3, gamma)
    edges = sorted({0, N, *(cut for cut in cuts if cut < N)})
    for a, b in pairwise(edges):
        recursion(R, W, H[a:b], Y[a:b])
    G = H.T @ H + gamma * torch.eye(M, dtype=H.dtype)
    torch.testing.assert_close(W, torch.linalg.solve(G, H.T @ Y), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(R, torch.linalg.inv(G), rtol=1e-6, atol=1e-6)


def joint(learner, stream, gamma):
    """The ridge regression on all examples at once, by elimination."""
    x, y, _ = TaskData.concat([task.train for task in stream]).tensors()
    h = F.relu(learner.backbone(learner.prepare(x)).detach().double() @ learner.strategies["method"].expansion)
    G = h.T @ h + gamma * torch.eye(h.shape[1], dtype=h.dtype)
    return torch.linalg.solve(G, h.T @ F.one_hot(y, stream.num_classes).double())


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_a_run_ends_with_the_regression_on_all_its_examples(scenario):
    """In "domain" all classes come again in each task, which is G-ACIL's case."""
    learner, stream = toy(ACIL(40, gamma=0.01), range(3), scenario=scenario, eval_batch_size=7)
    strategy, expected = learner.strategies["method"], joint(learner, stream, 0.01)
    torch.testing.assert_close(strategy.W, expected, rtol=1e-6, atol=1e-6)
    view = all_rows(learner, stream)
    h = F.relu(learner.backbone(view).double() @ strategy.expansion)
    torch.testing.assert_close(strategy.predict(learner, view).double(), h @ expected, rtol=1e-4, atol=1e-5)
    assert same(trunk(learner), trunk(toy(None, scenario=scenario)[0])), "nothing is trained"
    assert_rows_are_independent(learner, stream)


def test_the_order_of_tasks_makes_no_difference():
    base, found = toy_stream(3), []
    for order in permutations(range(3)):
        parts = [base[i].train.tensors() for i in order]
        stream = float_stream([p[0] for p in parts], [p[1] for p in parts])
        torch.manual_seed(0)
        found.append(learn(build(stream, ToyBackbone(), ACIL(30)), stream).strategies["method"])
    for other in found[1:]:
        torch.testing.assert_close(other.W, found[0].W, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other.R, found[0].R, rtol=1e-6, atol=1e-6)


def test_the_random_layer_is_uniform_and_differs_by_seed():
    one, other = (toy(ACIL(2000), seed=seed)[0].strategies["method"].expansion for seed in (0, 1))
    assert float(one.abs().max()) <= 0.25 and not torch.equal(one, other)  # D = 16
    assert abs(float(one.var()) - 0.25**2 / 3) < 1e-3


def test_the_outputs_of_classes_to_come_are_zero_and_what_cannot_be_is_refused():
    learner, stream = toy(ACIL(20), [0])
    out = learner.strategies["method"].predict(learner, all_rows(learner, stream))
    assert not out[:, 2:].any() and bool(out[:, :2].any())
    with pytest.raises(InputError, match=r"acil\.gamma=0\.0 must be above 0"):
        ACIL(gamma=0.0)
    with pytest.raises(InputError, match=r"acil\.num_expanded=0 must be 1 or more"):
        ACIL(num_expanded=0)
