"""Transferability estimators: worked numbers, independent implementations, invariances, and what is undefined."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl.errors import InputError
from cl.metrics.transferability import (
    ESTIMATORS,
    covariance_similarity,
    knn_score,
    log_me,
    ped,
    ped_features,
    tmi,
    vci,
)
from draws import normal, orthogonal

NAN = float("nan")
quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)


def problem(seed: int, n: int = 40, dim: int = 5, num_classes: int = 4, gap: float = 1.0) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % num_classes
    return normal(seed, n, dim) + gap * normal(seed + 1, num_classes, dim)[y] + 1, y


# ------------------------------------------------------------------ worked numbers

LINES = torch.tensor([0, 10, 20, 40, 0, 0.1, 0.2, 0.3])[:, None], torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
SQUARES = torch.tensor([[0.0, 0], [2, 0], [0, 1], [2, 1], [4, 0], [6, 0], [4, 1], [6, 1]]), LINES[1]
BALLS = torch.tensor([[-1.0], [1.0], [0.0], [2.0]]), torch.tensor([0, 0, 1, 1])
UNIT = torch.tensor([[-1.0], [1.0]])  # mean 0, deviation 1


def test_tmi_published() -> None:
    Z, y = LINES
    assert abs(tmi(Z[y == 0], y[y == 0]) - 4.470153) < 1e-6
    assert abs(tmi(Z[y == 1], y[y == 1]) - 1.026481) < 1e-6  # all distances clipped
    assert abs(tmi(Z, y) - 2.748317) < 1e-6
    assert abs(tmi(Z, y, aggregation="released") - 1.374158) < 1e-6


def test_ped_published() -> None:
    moved = ped_features(*BALLS, source=UNIT, reach=0.6, max_steps=1)
    torch.testing.assert_close(moved - BALLS[0], 0.001 * torch.tensor([[-1.0], [-1], [1], [1]]).double())
    # each step parts the means by .01 of what overlaps: .2 .99^k
    moved = ped_features(*BALLS, source=UNIT, reach=0.6)
    assert moved[2:].mean() - moved[:2].mean() == pytest.approx(1 + 0.2 * (1 - 0.99**6), abs=1e-12)


def test_vci_published() -> None:
    Z, y = SQUARES
    assert abs(vci(Z, y) - 0.2) < 1e-12
    assert abs(vci(Z @ torch.tensor([[2.0, 1.0], [0.0, 3.0]]).T, y) - 0.2) < 1e-12


def test_covariance_similarity_published() -> None:
    eye, line = torch.eye(2), torch.tensor([[2.0, 0.0]])
    assert abs(covariance_similarity(eye, line) - 0.707107) < 1e-6
    assert abs(covariance_similarity(eye, eye) - 0.707107) < 1e-6
    assert abs(covariance_similarity(line, line) - 1) < 1e-12
    assert abs(covariance_similarity(eye, eye, normalise=True) - 1) < 1e-12
    assert abs(covariance_similarity(eye, line, normalise=True) - 0.5**0.25) < 1e-12


# ------------------------------------------------------------------ what holds for every estimator


@pytest.mark.parametrize("name", ESTIMATORS)
@quick
@given(seeds)
def test_the_order_of_rows_and_the_names_of_classes_do_not_matter(name: str, seed: int) -> None:
    Z, y = problem(seed)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    function = ESTIMATORS[name].function
    torch.testing.assert_close(function(Z[rows], 7 * y[rows] - 9), function(Z, y), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_features_that_are_not_finite_give_nan(name: str, bad: float) -> None:
    Z, y = problem(0)
    assert not ESTIMATORS[name].function(Z, y).isnan()
    Z[3, 1] = bad
    assert ESTIMATORS[name].function(Z, y).isnan()


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computed_in_float64_on_the_cpu_without_a_graph(name: str, dtype: torch.dtype) -> None:
    Z, y = problem(1)
    low = Z.to(dtype).requires_grad_()
    before = low.detach().clone()
    value = ESTIMATORS[name].function(low, y.int())
    assert value.shape == () and value.dtype == torch.float64 and not value.requires_grad
    assert value == ESTIMATORS[name].function(low.detach().double(), y)
    assert torch.equal(low, before)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("shapes", [((4,), (4,)), ((4, 2), (3,)), ((4, 2), (4, 1)), ((0, 2), (0,)), ((4, 0), (4,))])
def test_shapes_are_refused(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="give \\(n, D\\) and \\(n,\\)"):
        ESTIMATORS[name].function(torch.zeros(shapes[0]), torch.zeros(shapes[1], dtype=torch.int64))


@pytest.mark.parametrize("name", ["log_me", "ped", "knn"])
def test_higher_where_the_classes_are_apart(name: str) -> None:
    noise, y = normal(0, 60, 4), torch.arange(60) % 3
    means = 3 * torch.eye(4).double()[y]
    scores = [ESTIMATORS[name].function(noise + gap * means, y) for gap in (0.0, 0.5, 1.0)]
    assert scores[0] < scores[1] < scores[2]
    assert vci(noise, y) > vci(noise + 0.5 * means, y) > vci(noise + means, y)
    assert tmi(4 * noise, y) > tmi(2 * noise, y)


# ------------------------------------------------------------------ TMI


def test_tmi_is_the_entropy_of_a_known_density() -> None:
    # A Gaussian has H = D/2 ln(2 pi e s^2). The variance of the estimate is about (D/2 + psi'(3)) / n, D/2 that of the
    # log density and psi'(3) = .395 that of the k-th neighbour's; 4.5 deviations are exceeded once in 147 000.
    n, size = 3000, 1e5  # far above the clip
    for dim, bias in ((1, 0.01), (2, 0.02)):
        value = tmi(size * normal(dim, n, dim), torch.zeros(n, dtype=torch.int64))
        exact = dim / 2 * math.log(2 * math.pi * math.e * size**2)
        assert abs(value - exact) < 4.5 * ((dim / 2 + 0.395) / n) ** 0.5 + bias


@quick
@given(seeds, st.floats(1, 50))
def test_tmi_depends_on_scale_until_all_is_clipped(seed: int, scale: float) -> None:
    Z, y = problem(seed)
    Z = 1000 * Z  # far above the clip
    assert tmi(scale * Z, y).item() == pytest.approx(tmi(Z, y).item() + 5 * math.log(scale), abs=1e-9)
    torch.testing.assert_close(tmi(Z + 5e3, y), tmi(Z, y), rtol=1e-9, atol=0)
    # psi(10) - psi(3) + D ln 2, whatever the features
    flat = sum(1 / j for j in range(3, 10)) + 5 * math.log(2)
    assert tmi(1e-6 * Z, y).item() == pytest.approx(flat) == tmi(torch.zeros(40, 5), y).item()


def test_tmi_against_a_loop_over_unequal_classes() -> None:
    from scipy.special import digamma

    Z, y = problem(3, n=30)
    y[(y == 3) & (torch.arange(30) < 12)] = 0
    sizes, expected = [], []
    for c in range(4):
        rows = Z[y == c].numpy()
        near = [sorted(np.abs(rows - row).max(1))[2 + 1] for row in rows]
        entropy = digamma(len(rows)) - digamma(3) + 5 * np.mean(np.log(2 * np.maximum(near, 0.5)))
        sizes.append(len(rows))
        expected.append(len(rows) / 30 * entropy)
    assert len(set(sizes)) > 1
    assert tmi(Z, y, clip=0.5).item() == pytest.approx(sum(expected))
    assert tmi(Z, y, "released", clip=0.5).item() == pytest.approx(sum(expected) / 4)


def test_tmi_of_small_classes_is_undefined_and_released_code_drops_or_zeroes_them() -> None:
    Z, y = LINES
    small = torch.cat([Z, torch.tensor([[5.0], [6.0], [7.0]])])
    three = torch.cat([y, torch.tensor([2, 2, 2])])
    assert tmi(small, three).isnan()
    assert tmi(small, three, "released").item() == pytest.approx(4 / 11 * (4.470153 + 1.026481) / 2, abs=1e-6)
    one, label = torch.cat([Z, torch.tensor([[5.0]])]), torch.cat([y, torch.tensor([2])])
    assert tmi(one, label).isnan()
    assert tmi(one, label, "released").item() == pytest.approx(4 / 9 * (4.470153 + 1.026481) / 3, abs=1e-6)
    assert tmi(Z[:3], y[:3]).isnan() and tmi(Z[:3], y[:3], "released").isnan()
    assert not tmi(Z[:3], y[:3], k=2).isnan()


def test_tmi_refuses_unknown_options() -> None:
    with pytest.raises(InputError, match="'mean' is unknown"):
        tmi(*LINES, aggregation="mean")
    with pytest.raises(InputError, match="k=0"):
        tmi(*LINES, k=0)
    with pytest.raises(InputError, match="clip=-1"):
        tmi(*LINES, clip=-1.0)


# ------------------------------------------------------------------ VCI


def plain_vci(Z: Tensor, y: Tensor) -> float:
    x, labels = Z.numpy(), y.numpy()
    classes = [x[labels == c] for c in np.unique(labels)]
    means = np.stack([rows.mean(0) for rows in classes])
    between = np.cov(means.T, bias=True)
    within = np.mean([np.cov(rows.T, bias=True) for rows in classes], 0)
    overlap = np.trace(np.linalg.pinv(between + within) @ between)
    return float(1 - overlap / min(x.shape[1], len(classes) - 1))


@quick
@given(seeds, st.integers(2, 7), st.integers(2, 6))
def test_vci_is_its_definition_and_within_its_range(seed: int, dim: int, num_classes: int) -> None:
    Z, y = problem(seed, dim=dim, num_classes=num_classes)
    y[:7] = 0  # unequal classes
    value = vci(Z, y).item()
    assert value == pytest.approx(plain_vci(Z, y), abs=1e-8) and 0 <= value <= 1


@quick
@given(seeds)
def test_vci_is_invariant_to_invertible_affine_maps(seed: int) -> None:
    Z, y = problem(seed)
    stretch = orthogonal(seed + 2, 5) @ torch.diag(normal(seed + 3, 5).exp()) @ orthogonal(seed + 4, 5)
    torch.testing.assert_close(vci(Z @ stretch + normal(seed + 5, 5), y), vci(Z, y), rtol=1e-7, atol=1e-9)
    # and to a feature that adds nothing, or a copy
    torch.testing.assert_close(vci(torch.cat([Z, Z[:, :2], torch.full((40, 1), 1 / 3)], 1), y), vci(Z, y))


def test_vci_ends_of_its_range() -> None:
    y = torch.arange(12) % 3
    assert abs(vci(normal(0, 3, 4)[y], y)) < 1e-12  # full collapse
    signs = torch.tensor([-1.0, -1, -1, 1, 1, 1, -2, -2, -2, 2, 2, 2])[:, None]
    assert abs(vci(signs, y) - 1) < 1e-12  # equal means


def test_vci_of_equal_copies_of_a_class_does_not_change() -> None:
    Z, y = problem(2)
    extra = y == 1
    torch.testing.assert_close(vci(torch.cat([Z, Z[extra], Z[extra]]), torch.cat([y, y[extra], y[extra]])), vci(Z, y))


def test_vci_undefined() -> None:
    Z, y = problem(0)
    assert vci(Z, torch.zeros_like(y)).isnan()
    for value in (0.1, 0.7, 1.1):  # the mean of 7 of them is off by rounding
        assert vci(torch.full((21, 3), value, dtype=torch.float64), torch.arange(21) % 3).isnan()
    wide = normal(0, 40, 60)
    assert vci(wide, y).isnan() and vci(wide[:, :39], y).isnan()  # 40 examples in general position: any labels give 0
    assert not vci(wide[:, :38], y).isnan()
    assert vci(Z[:4], y[:4]).isnan()  # one example of each class


# ------------------------------------------------------------------ k-NN


def test_knn_score_is_a_leave_one_out_loop_of_scikit_learn() -> None:
    from sklearn.model_selection import LeaveOneOut, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import normalize

    values = set()
    for seed in range(3):
        Z, y = problem(seed, n=30)
        x = normalize(Z.numpy())
        expected = cross_val_score(KNeighborsClassifier(5), x, y.numpy(), cv=LeaveOneOut()).mean()
        assert knn_score(Z, y).item() == pytest.approx(expected)
        values.add(round(expected, 6))
    assert len(values) > 1


def test_knn_score_ignores_rotation_and_length() -> None:
    Z, y = problem(0)
    assert knn_score(Z @ orthogonal(1, 5), y) == knn_score(Z * normal(2, 40, 1).exp(), y) == knn_score(Z, y)


def test_knn_score_of_one_or_two_examples() -> None:
    Z = normal(0, 2, 3)
    assert knn_score(Z[:1], torch.tensor([0])).isnan()
    assert knn_score(Z, torch.tensor([0, 1])) == 0 and knn_score(Z, torch.tensor([1, 1])) == 1


# ------------------------------------------------------------------ LogME


def plain_log_me(Z: Tensor, y: Tensor) -> float:
    """Algorithm 1 with explicit D x D matrices, one class at a time, until nothing moves."""
    F, (n, d), values = Z.numpy(), Z.shape, []
    for c in y.unique():
        target, alpha, beta = (y == c).double().numpy(), 1.0, 1.0
        for _ in range(2000):
            A = alpha * np.eye(d) + beta * F.T @ F
            m = beta * np.linalg.solve(A, F.T @ target)
            gamma = d - alpha * np.trace(np.linalg.inv(A))
            alpha, beta = gamma / (m @ m), (n - gamma) / (((F @ m - target) ** 2).sum() + 1e-5)
        A = alpha * np.eye(d) + beta * F.T @ F
        m = beta * np.linalg.solve(A, F.T @ target)
        fit = beta * ((F @ m - target) ** 2).sum() + alpha * m @ m
        value = d * np.log(alpha) + n * np.log(beta) - n * np.log(2 * np.pi) - fit - np.linalg.slogdet(A)[1]
        values.append(value / 2 / n)
    return float(np.mean(values))


@pytest.mark.parametrize(("n", "dim"), [(40, 3), (24, 15), (20, 33)])
@pytest.mark.parametrize("seed", range(3))
def test_log_me_is_algorithm_1(n: int, dim: int, seed: int) -> None:
    Z, y = problem(seed, n=n, dim=dim, gap=2.0)
    assert log_me(Z, y).item() == pytest.approx(plain_log_me(Z, y), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_log_me_is_the_largest_density_of_the_labels(seed: int) -> None:
    from scipy.optimize import minimize
    from scipy.stats import multivariate_normal

    Z, y = problem(seed, n=30, dim=4, gap=2.0)
    gram, best = (Z @ Z.T).numpy(), []
    for c in range(4):
        target = (y == c).double().numpy()

        def loss(logs: np.ndarray, target: np.ndarray = target) -> float:
            covariance = np.exp(-logs[1]) * np.eye(30) + np.exp(-logs[0]) * gram
            return float(-multivariate_normal(np.zeros(30), covariance).logpdf(target) / 30)

        starts = [(a, b) for a in (0.0, 4.0) for b in (0.0, 3.0)]
        best.append(-min(minimize(loss, start, method="Nelder-Mead").fun for start in starts))
    assert log_me(Z, y).item() == pytest.approx(np.mean(best), abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_log_me_invariances(seed: int) -> None:
    Z, y = problem(seed, gap=2.0)
    value = log_me(Z, y)
    torch.testing.assert_close(log_me(Z @ orthogonal(seed + 1, 5), y), value, rtol=1e-6, atol=1e-8)
    for scale in (1e-3, 1e3):
        torch.testing.assert_close(log_me(scale * Z, y), value, rtol=1e-6, atol=1e-6)
    # a second copy of the features is a scale of sqrt 2, and features of zeros are none
    torch.testing.assert_close(log_me(torch.cat([Z, Z, torch.zeros(40, 90)], 1), y), value, rtol=1e-6, atol=1e-6)
    assert abs(log_me(Z + 10, y) - value) > 1e-3


def test_log_me_stays_finite_at_both_ends() -> None:
    y = torch.arange(20) % 2
    # No signal: the evidence of N(0, 1/beta) with beta = n / |t|^2 = 2, which is (ln(2 / 2 pi) - 1) / 2.
    null = (math.log(1 / math.pi) - 1) / 2
    assert log_me(torch.zeros(20, 3), y).item() == pytest.approx(null, abs=1e-5)
    orthogonal_to_both = torch.tensor([1.0, 1, -1, -1]).repeat(5)[:, None]
    assert log_me(orthogonal_to_both, y).item() == pytest.approx(null, abs=1e-5)
    # Exact prediction: unbounded but for the 1e-5 beside the residual.
    exact = log_me(torch.eye(2)[y], y)
    assert exact.isfinite() and exact > 5


# ------------------------------------------------------------------ PED


def plain_ped(Z: Tensor, y: Tensor, source: Tensor, reach: float) -> tuple[Tensor, int]:
    mean, std = source.mean(0), source.std(0, correction=0)
    rows, totals = (Z - mean) / std, []
    for _ in range(6):
        means = [rows[y == c].mean(0) for c in y.unique()]
        radii = [rows[y == c].var(0, correction=0).sum().sqrt() for c in y.unique()]
        motion = [torch.zeros_like(mean) for _ in means]
        for a in range(len(means)):
            for b in range(a + 1, len(means)):
                line = means[a] - means[b]
                overlap = max(float(reach * (radii[a] + radii[b]) - line.norm()), 0.0)
                push = min(0.5 * 0.1**2 * overlap, overlap) * line / line.norm()
                motion[a], motion[b] = motion[a] + push, motion[b] - push
        totals.append(sum(float(m.abs().sum()) for m in motion))
        if not totals[-1] > 0.5 * totals[0]:
            break
        rows = rows + torch.stack(motion)[y]
    return rows * std + mean, len(totals)


@quick
@given(seeds, st.sampled_from([0.3, 0.6]), st.floats(0.2, 2))
def test_ped_features_against_a_loop(seed: int, reach: float, gap: float) -> None:
    (Z, y), source = problem(seed, gap=gap), 2 * normal(seed + 3, 50, 5) - 1
    moved, _ = plain_ped(Z, y, source, reach)
    torch.testing.assert_close(ped_features(Z, y, source, reach), moved, rtol=1e-9, atol=1e-10)
    assert ped(Z, y, source=source, reach=reach) == log_me(ped_features(Z, y, source, reach), y)


def test_the_last_step_is_dropped_once_it_is_small() -> None:
    # A strong force parts two classes at once: .2 overlap, each moved by .2, and nothing is left for the second step.
    moved = ped_features(*BALLS, source=UNIT, constant=1e6)
    torch.testing.assert_close(moved - BALLS[0], 0.2 * torch.tensor([[-1.0], [-1], [1], [1]]).double())
    # .2 of it leaves .6 of the overlap (a step), then .36, which is less than half: not taken
    moved = ped_features(*BALLS, source=UNIT, constant=40.0)
    assert moved[2:].mean() - moved[:2].mean() == pytest.approx(1 + 0.2 * (0.4 + 0.4 * 0.6), abs=1e-12)


@quick
@given(seeds)
def test_ped_moves_classes_as_wholes_and_keeps_their_balance(seed: int) -> None:
    Z, y = problem(seed, gap=0.3)
    motion = ped_features(Z, y) - Z
    means = torch.stack([motion[y == c].mean(0) for c in range(4)])
    torch.testing.assert_close(motion, means[y], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(means.sum(0), torch.zeros(5).double(), atol=1e-10, rtol=0)  # action and reaction
    assert means.abs().max() > 1e-4
    # the force knows directions, not axes, and with own statistics no unit either
    torch.testing.assert_close(ped_features(3 * Z + 8, y), 3 * (Z + motion) + 8, rtol=1e-9, atol=1e-9)
    turn, white = orthogonal(seed + 2, 5), torch.cat([torch.eye(5), -torch.eye(5)])
    turned = ped_features(Z @ turn, y, source=white)
    torch.testing.assert_close(turned, ped_features(Z, y, source=white) @ turn, rtol=1e-8, atol=1e-9)


def test_ped_leaves_classes_that_are_apart_alone() -> None:
    Z, y = problem(0)
    far = Z + 100 * torch.eye(5).double()[y]
    assert torch.allclose(ped_features(far, y), far, rtol=0, atol=1e-10)
    assert ped(far, y).item() == pytest.approx(log_me(far, y).item())
    assert ped(Z, y, score=lambda moved, labels: (moved - Z).abs().sum()) > 0


def test_ped_without_a_direction_is_nan() -> None:
    Z, y = torch.tensor([[-1.0], [1.0], [-2.0], [2.0], [9.0], [9.5]]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert ped(Z, y).isnan() and ped_features(Z, y)[:4].isnan().all()
    assert ped(Z.double() / 3 + 1 / 7, y).isnan()  # up to rounding
    assert not ped(Z + torch.tensor([0.0, 0, 0.1, 0.1, 0, 0])[:, None], y).isnan()
    point = torch.zeros(4, 1)  # balls of radius 0 do not overlap
    assert torch.equal(ped_features(point, torch.tensor([0, 0, 1, 1])), point.double())


def test_ped_refuses_a_wrong_source_or_option() -> None:
    with pytest.raises(InputError, match=r"source has shape \(2, 3\): give \(m, 1\)"):
        ped(*BALLS, source=torch.zeros(2, 3))
    options: list[Callable[[], Tensor]] = [
        lambda: ped(*BALLS, reach=-1.0),
        lambda: ped(*BALLS, time_step=NAN),
        lambda: ped_features(*BALLS, max_steps=-1),
    ]
    for call in options:
        with pytest.raises(InputError, match="must not be negative"):
            call()


# ------------------------------------------------------------------ covariance similarity


def plain_similarity(X1: Tensor, X2: Tensor, energy: float) -> float:
    roots = []
    for X in (X1, X2):
        values, vectors = np.linalg.eigh((X.T @ X).numpy())
        values, vectors = values[::-1], vectors[:, ::-1]
        rank = int(np.searchsorted(np.cumsum(values) / values.sum(), energy)) + 1
        roots.append(vectors[:, :rank] * np.sqrt(np.maximum(values[:rank], 0)))
    return float(np.linalg.norm(roots[0].T @ roots[1]) / (np.linalg.norm(roots[0]) * np.linalg.norm(roots[1])))


@quick
@given(seeds, st.sampled_from([0.5, 0.8, 0.99]), st.sampled_from([3, 9]))
def test_similarity_is_its_definition_and_its_invariances(seed: int, energy: float, dim: int) -> None:
    X1, X2 = normal(seed, 12, dim), normal(seed + 1, 7, dim)
    value = covariance_similarity(X1, X2, energy)
    assert value.item() == pytest.approx(plain_similarity(X1, X2, energy), abs=1e-9) and 0 <= value <= 1 + 1e-12
    turn = orthogonal(seed + 2, dim)
    for a, b in [(X2, X1), (X1.flip(0), X2), (1e-90 * X1, 1e90 * X2), (X1 @ turn, X2 @ turn)]:
        torch.testing.assert_close(covariance_similarity(a, b, energy), value, rtol=1e-8, atol=1e-10)
    unit = covariance_similarity(X1, X2, energy, normalise=True)
    assert value - 1e-12 <= unit <= 1 + 1e-12
    assert covariance_similarity(X1, -3 * X1, energy, normalise=True).item() == pytest.approx(1)


def test_similarity_from_a_stored_covariance() -> None:
    X1, X2 = normal(0, 30, 4), normal(1, 30, 4)
    root = torch.linalg.cholesky(X1.T @ X1).T
    torch.testing.assert_close(covariance_similarity(root, X2), covariance_similarity(X1, X2))


def test_energy_cuts_directions() -> None:
    X1, X2 = torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[0.0, 1.0]])
    assert abs(covariance_similarity(X1, X2, energy=0.9)) < 1e-12  # 9 of 10 is enough for one direction
    assert covariance_similarity(X1, X2, energy=0.91).item() == pytest.approx(0.1**0.5)
    assert covariance_similarity(torch.eye(10), torch.eye(10), energy=1.0).item() == pytest.approx(0.1**0.5)


def test_similarity_undefined_and_refused() -> None:
    X = normal(0, 6, 3)
    assert covariance_similarity(X, torch.zeros(2, 3)).isnan()
    assert covariance_similarity(X, torch.zeros(2, 3), normalise=True).isnan()
    assert covariance_similarity(X, torch.tensor([[1.0, NAN, 0.0]])).isnan()
    with pytest.raises(InputError, match=r"\(6, 3\) and \(6, 2\)"):
        covariance_similarity(X, X[:, :2])
    for energy in (0.0, 1.5, NAN):
        with pytest.raises(InputError, match="outside"):
            covariance_similarity(X, X, energy=energy)
