"""Gradient Episodic Memory: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl.data.task import SCENARIOS
from cl.errors import InputError
from cl.strategies import gem
from cl.strategies.gem import GEM
from cl.testing import ToyBackbone, toy_learner, toy_stream
from cl.toolkit.memory import Memory
from draws import normal, quick, seeds
from subspaces import build
from toys import learn


@pytest.mark.parametrize(
    ("G", "g", "margin", "ridge", "expected"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [-1.0, -2.0], 0.0, 1e-3, [-0.001, -0.002]),
        ([[1.0, 0.0], [1.0, 1.0]], [-1.0, 0.5], 0.0, 1e-12, [0.0, 0.5]),
        ([[1.0, 0.0], [1.0, 1.0]], [-1.0, 0.5], 0.5, 1e-3, [0.0, 1.0]),
        ([[1.0, 0.0], [1.0, 1.0]], [1.0, 0.5], 0.5, 1e-3, [1.0, 0.5]),
    ],
    ids=["example 2", "example 3", "example 4", "nothing violated"],
)
def test_worked_examples_of_gem(G, g, margin, ridge, expected):
    projected = gem.project(torch.tensor(g), torch.tensor(G), margin, ridge)
    torch.testing.assert_close(projected, torch.tensor(expected), atol=2e-6, rtol=0)


problems = (seeds, st.integers(1, 12), st.integers(1, 15), st.sampled_from([0.0, 0.5]), st.sampled_from([1e-3, 1, 1e3]))


def problem(seed: int, count: int, size: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    G = (normal(seed, count, size) * scale * normal(seed + 2, count, 1).exp()).numpy()
    return G @ G.T + 1e-3 * np.eye(count), G @ normal(seed + 1, size).numpy()


@quick
@given(*problems)
def test_the_dual_problem_is_solved_as_karush_kuhn_and_tucker_say(seed, count, size, low, scale):
    A, b = problem(seed, count, size, scale)
    v = gem.bounded_minimum(A, b, low)
    slope = (A @ v + b) / np.sqrt(np.diag(A))
    assert (v >= low - 1e-12).all()
    tolerance = 1e-9 * (1 + np.abs(A @ v).max() + np.abs(b).max()) / np.sqrt(np.diag(A)).min()
    assert (slope >= -tolerance).all()
    assert (np.abs(slope[v > low + 1e-9]) <= tolerance).all()


@quick
@given(*problems)
def test_the_dual_problem_is_solved_as_scipy_solves_it(seed, count, size, low, scale):
    from scipy.optimize import nnls

    A, b = problem(seed, count, size, scale)
    root = np.linalg.cholesky(A)  # v = low + u: the least squares of root' u and -root^-1 (b + A low)
    u, _ = nnls(root.T, np.linalg.solve(root, -(b + A.sum(1) * low)))
    v = gem.bounded_minimum(A, b, low)

    def value(v):
        return v @ A @ v / 2 + b @ v

    rounding = 1e-12 * (np.abs(v) @ np.abs(A) @ np.abs(v) + np.abs(b) @ np.abs(v) + 1)
    assert value(v) <= value(low + u) + rounding
    np.testing.assert_allclose(A @ v, A @ (low + u), rtol=1e-5, atol=1e-9 * (np.abs(A) @ np.abs(v) + 1).max())


@quick
@given(seeds, st.integers(1, 6), st.integers(7, 20))
def test_no_earlier_task_is_violated_and_gem_of_one_task_is_agem(seed, count, size):
    from cl.strategies import agem

    g, G = normal(seed, size), normal(seed + 1, count, size)
    projected = gem.project(g, G, 0.0, 1e-10)
    assert (G @ projected >= -1e-6).all()
    if (G @ g >= 0).all():
        assert torch.equal(projected, g)
    other = projected + 0.1 * normal(seed + 2, size)
    if (G @ other >= 0).all():
        assert (projected - g).norm() <= (other - g).norm() + 1e-6, "it is the nearest such vector"
    torch.testing.assert_close(gem.project(g, G[:1], 0.0, 1e-10), agem.project(g, G[0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gem_projects_the_learners_gradient_against_each_earlier_task(scenario):
    learner, stream = toy_learner({"method": GEM(memory_size=30, margin=0.3)}, scenario=scenario)
    learn(learner, stream, [0, 1])
    learner.before_task(stream[2])
    memories: list[Memory] = list(learner.strategies["method"].memories)
    assert [len(memory) for memory in memories] == [10, 10]
    parameters, rows = list(learner.parameters()), []
    for t, memory in enumerate(memories):
        batch = memory.sample(10)
        known = {(x.numpy().tobytes(), int(y)) for x, y in zip(stream[t].train.x, stream[t].train.y, strict=True)}
        assert {(x.numpy().tobytes(), int(y)) for x, y in zip(batch.x, batch.y, strict=True)} <= known
        loss = learner.criterion(learner(learner.prepare(batch.x)), batch)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    G = torch.stack(rows)
    g = torch.randn(G.shape[1], generator=torch.Generator().manual_seed(1)) - 0.5 * G[0] / G[0].norm()
    g = g - ((g @ G[0]) / (G[0] @ G[0]) + 1) * G[0]
    for p, part in zip(parameters, g.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).clone()
    learner.strategies["method"].project_gradients(learner)
    result = torch.cat([p.grad.flatten() for p in parameters])
    v = gem.bounded_minimum((G @ G.T + 1e-3 * torch.eye(2)).double().numpy(), (G @ g).double().numpy(), 0.3)
    torch.testing.assert_close(result, g + (torch.from_numpy(v).float() @ G), rtol=1e-4, atol=1e-5)
    assert float(result @ G[0]) > -1e-2 and (v >= 0.3).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_size": 2}, r"gem\.memory_size=2 is less than one exemplar for each of 3 tasks: set it to 3"),
        ({"margin": -0.1}, r"gem\.margin=-0\.1 must be 0 or more"),
        ({"ridge": 0.0}, r"gem\.ridge=0\.0 must be above 0"),
    ],
)
def test_gem_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        build(toy_stream(), ToyBackbone(), GEM(**arguments))
