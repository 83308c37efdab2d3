"""RanPAC: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.data.task import Stream, Task, TaskData
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies.l2p import L2P
from cl.strategies.ranpac import RanPAC, ridge_regression
from cl.testing import ToyBackbone, toy_learner, toy_stream
from draws import quick, seeds
from prompted import all_rows, assert_rows_are_independent
from toys import learn, same, toy, weights


def test_worked_example_33():
    H, Y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    expected = torch.tensor([[0.352941, 0.176471], [-0.058824, 0.470588]], dtype=torch.float64)
    torch.testing.assert_close(ridge_regression(H.T @ H, H.T @ Y, torch.tensor([1.0]))[0], expected, rtol=0, atol=1e-6)


@quick
@given(seeds, st.integers(1, 12), st.integers(1, 8), st.floats(-2, 4))
def test_the_regression_is_scikit_learns(seed, num_rows, size, exponent):
    from sklearn.linear_model import Ridge

    draw = np.random.default_rng(seed)
    H, Y = draw.standard_normal((num_rows, size)), draw.standard_normal((num_rows, 3))
    theirs = Ridge(alpha=10.0**exponent, fit_intercept=False).fit(H, Y).coef_
    h, y = torch.from_numpy(H), torch.from_numpy(Y)
    ours = ridge_regression(h.T @ h, h.T @ y, torch.tensor([10.0**exponent]))[0]
    np.testing.assert_allclose(ours.numpy(), np.reshape(theirs, (3, size)).T, rtol=1e-5, atol=1e-7)


def ranpac_by_hand(learner: Learner, stream: Stream) -> tuple[torch.Tensor, list[float]]:
    """Keep all features, split them as the strategy does, solve anew for each lambda by elimination."""
    projection = learner.strategies["method"].projection.double()
    draws = np.random.Generator(np.random.PCG64())
    draws.bit_generator.state = learner.strategies["method"].random.generator.bit_generator.state
    G = Q = 0.0
    chosen, strengths = [], [10.0**k for k in range(-8, 9)]

    def solve(h, y, strength):
        return torch.linalg.solve(h.T @ h + strength * torch.eye(h.shape[1], dtype=h.dtype), h.T @ y)

    for task in stream:
        x, labels, _ = task.train.tensors()
        h = F.relu(learner.backbone(learner.prepare(x)).double() @ projection).detach()
        y = F.one_hot(labels, stream.num_classes).double()
        order = torch.from_numpy(draws.permutation(len(y)))
        fit, held = order[: int(0.8 * len(y))], order[int(0.8 * len(y)) :]
        errors = [float((h[held] @ solve(h[fit], y[fit], s) - y[held]).square().mean()) for s in strengths]
        chosen.append(strengths[int(np.argmin(errors))])
        G, Q = G + h.T @ h, Q + h.T @ y
    return torch.linalg.solve(G + chosen[-1] * torch.eye(len(G), dtype=G.dtype), Q), chosen


@pytest.mark.parametrize("seed", range(4))
def test_ranpac_is_the_regression_written_by_hand(seed):
    learner, stream = toy(RanPAC(num_projections=40), seed=seed)
    expected, chosen = ranpac_by_hand(learner, stream)
    learn(learner, stream)
    strategy, view = learner.strategies["method"], all_rows(learner, stream)
    h = F.relu(learner.backbone(view) @ strategy.projection).detach()
    torch.testing.assert_close(strategy.predict(learner, view).double(), h.double() @ expected, rtol=1e-3, atol=1e-3)
    assert 1e-8 < chosen[-1] < 1e8, "a lambda in the middle, or the choice shows nothing"


def test_ranpac_does_not_depend_on_the_order_of_tasks():
    base, results = toy_stream(3), []
    for order in permutations(range(3)):
        tasks = [Task(t, base[i].train, base[i].test) for t, i in enumerate(order)]
        torch.manual_seed(0)
        stream = Stream(tasks, num_classes=6)
        learner = Learner(
            stream, ToyBackbone(), {"method": RanPAC(30, ridge=1.0)}, partial(torch.optim.SGD, lr=0.1), batch_size=8
        )
        results.append(weights(learn(learner, stream).strategies["method"]))
    for result in results[1:]:
        for name in ("G", "Q", "weight"):
            torch.testing.assert_close(result[name], results[0][name], rtol=1e-4, atol=1e-4)


def test_without_projections_ranpac_regresses_on_the_features_themselves():
    learner, stream = toy(RanPAC(num_projections=0, ridge=0.5), range(3))
    x = TaskData.concat([task.train for task in stream]).tensors()[0]
    f = learner.backbone(learner.prepare(x)).detach()
    torch.testing.assert_close(learner.strategies["method"].G, f.T @ f, rtol=1e-4, atol=1e-4)
    assert learner.strategies["method"].weight.shape == (16, 6)


def test_ranpac_trains_nothing_unless_it_adapts_and_then_in_the_first_task_only():
    plain = weights(toy_learner()[0].trunk())
    assert same(weights(toy(RanPAC(20), range(3))[0].trunk()), plain)
    first = weights(toy(RanPAC(20, adapt=True), range(1))[0].trunk())
    assert not same(first, plain)
    assert same(weights(toy(RanPAC(20, adapt=True), range(3))[0].trunk()), first)


class Same(nn.Module):
    num_features = 2

    def forward(self, x):
        return x


def test_random_projections_separate_what_the_features_do_not():
    """Two classes as XOR of two features: no linear rule tells them apart, one on projections does."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=draw)
    y = (x.prod(1) > 0).long()

    found = []
    for size in (0, 200):
        stream = Stream([Task(0, TaskData(x, y), TaskData(x, y))], num_classes=2)
        learner = Learner(stream, Same(), {"method": RanPAC(size)}, partial(torch.optim.SGD, lr=0.1))
        learn(learner, stream)
        found.append(float((learner.strategies["method"].predict(learner, x).argmax(1) == y).float().mean()))
    assert found[0] < 0.65 and found[1] > 0.95


def test_half_precision_is_the_backbones_alone():
    x, y = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    stream = Stream([Task(0, TaskData(x, y), TaskData(x, y))], num_classes=2)
    learner = Learner(stream, Same(), {"method": RanPAC(30)}, partial(torch.optim.SGD, lr=0.1))
    strategy = learn(learner, stream).strategies["method"]
    plain = strategy.predict(learner, x)
    with torch.autocast("cpu", torch.bfloat16):  # as Lightning does around a test step
        torch.testing.assert_close(strategy.predict(learner, x), plain)


def test_a_class_that_was_never_seen_scores_zero_and_rows_are_independent():
    learner, stream = toy(RanPAC(20), [0])
    out = learner.strategies["method"].predict(learner, all_rows(learner, stream))
    assert not out[:, 2:].any() and bool(out[:, :2].any())
    assert_rows_are_independent(learner, stream)


def test_ranpac_refuses_a_lambda_of_zero_and_anothers_features():
    with pytest.raises(InputError, match=r"ranpac\.ridge=0\.0 must be above 0"):
        RanPAC(ridge=0.0)
    with pytest.raises(InputError, match=r"ranpac\.num_projections=-1 must be 0 or more"):
        RanPAC(num_projections=-1)
    with pytest.raises(InputError, match="RanPAC sums the backbone's features, but another strategy owns encode"):
        toy_learner({"ranpac": RanPAC(20), "l2p": L2P(4, 2, 2)}, backbone="vit")
