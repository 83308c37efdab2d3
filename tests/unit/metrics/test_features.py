"""Probes, CKA and representation transfer: worked numbers, parity with scikit-learn, invariances, statistics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl.errors import InputError
from cl.metrics.features import (
    knn_probe,
    knn_votes,
    linear_cka,
    rep_bwt,
    rep_fwt,
    ridge_probe,
    ridge_scores,
)
from draws import normal, orthogonal

NAN = float("nan")
quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)


def problem(seed: int, n: int = 30, m: int = 40, dim: int = 6, num_classes: int = 4) -> tuple[Tensor, ...]:
    """Overlapping classes with labels 10, 20, ..., so that an accuracy is neither 0 nor 1."""
    x, y = normal(seed, n + m, dim), torch.arange(n + m) % num_classes
    x = x + 2 * dim**-0.5 * normal(seed + 1, num_classes, dim)[y] + 3
    y = 10 * (y + 1)
    return x[:n], y[:n], x[n:], y[n:]


# ------------------------------------------------------------------ worked numbers

P = torch.tensor([[0.30, 0.35, 0.32], [0.92, 0.60, 0.50], [0.90, 0.88, 0.58], [0.89, 0.86, 0.85]])
X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])


def test_published_numbers() -> None:
    assert abs(rep_bwt(P) - -0.025) < 1e-6 and abs(rep_fwt(P) - 0.255) < 1e-6
    turned = 2 * torch.stack([-X[:, 1], X[:, 0]], 1)
    assert abs(linear_cka(X, turned) - 1.0) < 1e-12
    assert abs(linear_cka(X, torch.tensor([[1.0], [0.0], [1.0], [0.0]])) - 0.117041) < 5e-7


def test_an_unmeasured_probe_is_nan_where_it_is_read() -> None:
    row0, last = P.clone(), P.clone()
    row0[0], last[3, 0] = NAN, NAN
    assert rep_fwt(row0).isnan() and abs(rep_bwt(row0) - -0.025) < 1e-6
    assert rep_bwt(last).isnan() and abs(rep_fwt(last) - 0.255) < 1e-6


def test_ridge_by_hand() -> None:
    # one feature, standardised to -1 and 1: slope = (1 + 1) / 2 / (2 + 2 penalty)
    x, y = torch.tensor([[3.0], [7.0]]), torch.tensor([0, 1])
    scores = ridge_scores(x, y, torch.tensor([[7.0], [5.0]]), penalty=0.25)
    torch.testing.assert_close(scores, torch.tensor([[0.1, 0.9], [0.5, 0.5]], dtype=torch.float64))


# ------------------------------------------------------------------ parity with scikit-learn


@pytest.mark.parametrize("dim", [3, 30, 31, 90])
@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_ridge_scores_are_those_of_scikit_learn(dim: int, penalty: float) -> None:
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    x, y, test_x, test_y = problem(dim, dim=dim)
    x[:, 1], test_x[:, 1] = 0.7, torch.arange(40.0)  # constant where it is fitted
    scaler = StandardScaler().fit(x.numpy())
    targets = OneHotEncoder(sparse_output=False).fit_transform(y[:, None].numpy())
    model = Ridge(alpha=penalty * len(x), solver="svd").fit(scaler.transform(x.numpy()), targets)
    # StandardScaler leaves a constant feature unscaled; at test ours stays at zero, and its weight is zero anyway
    expected = model.predict(scaler.transform(test_x.numpy()))
    np.testing.assert_allclose(ridge_scores(x, y, test_x, penalty=penalty).numpy(), expected, atol=1e-9)
    accuracy = (np.array([10, 20, 30, 40])[expected.argmax(1)] == test_y.numpy()).mean()
    assert ridge_probe(x, y, test_x, test_y, penalty=penalty).item() == pytest.approx(accuracy)


@quick
@given(seeds, st.integers(1, 25), st.integers(1, 25), st.sampled_from([1e-3, 0.1, 5.0]))
def test_dual_equals_primal(seed: int, n: int, dim: int, penalty: float) -> None:
    # Features that repeat have the same Gram matrix up to a factor but pass through the other system: (a, b, a, b)
    # with a penalty twice as large is (a, b).
    x, test, y = normal(seed, n, dim), normal(seed + 1, 7, dim), torch.arange(n) % 3
    times = n // dim + 1
    wide = ridge_scores(x.repeat(1, times), y, test.repeat(1, times), penalty=penalty * times)
    torch.testing.assert_close(ridge_scores(x, y, test, penalty=penalty), wide, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dim", [2, 8, 40])  # a k-d tree, then brute force in scikit-learn
@pytest.mark.parametrize("k", [1, 2, 4, 5, 30])
def test_knn_is_that_of_scikit_learn(dim: int, k: int) -> None:
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import normalize

    ties = 0
    for seed in range(5):
        x, y, test_x, test_y = problem(seed, dim=dim)
        model = KNeighborsClassifier(n_neighbors=k).fit(normalize(x.numpy()), y.numpy())
        votes = knn_votes(x, y, test_x, k=k)
        np.testing.assert_allclose(votes / k, model.predict_proba(normalize(test_x.numpy())), atol=1e-12)
        predicted = torch.tensor([10, 20, 30, 40])[votes.argmax(1)]
        np.testing.assert_array_equal(predicted, model.predict(normalize(test_x.numpy())))
        expected = model.score(normalize(test_x.numpy()), test_y.numpy())
        assert knn_probe(x, y, test_x, test_y, k=k).item() == pytest.approx(expected)
        ties += int((votes == votes.amax(1, keepdim=True)).sum(1).gt(1).sum())
    assert ties > 0 or k == 1, "no vote was tied, so the rule was not tested"


@quick
@given(seeds, st.integers(1, 12), st.integers(1, 14))
def test_votes_against_sorted_distances(seed: int, n: int, k: int) -> None:
    # Signs of four axes: distances tie exactly, and the earlier row wins.
    draw = np.random.default_rng(seed)
    axes = torch.cat([torch.eye(4), -torch.eye(4), torch.zeros(1, 4)]).double()
    x, test = axes[draw.integers(0, 9, n)], axes[draw.integers(0, 9, 6)]
    y = torch.from_numpy(draw.integers(0, 3, n))
    votes = knn_votes(x, y, test, classes=[0, 1, 2], k=k)
    for i, row in enumerate(test):
        order = sorted(range(n), key=lambda j: (float((x[j] - row).square().sum()), j))[:k]
        assert votes[i].tolist() == [sum(y[j] == c for j in order) for c in range(3)]


def test_k_is_cut_to_what_there_is() -> None:
    x, y = normal(0, 3, 2), torch.tensor([0, 1, 1])
    assert knn_votes(x, y, normal(1, 4, 2), k=50).tolist() == [[1.0, 2.0]] * 4
    assert knn_votes(x, y, k=50).tolist() == [[0.0, 2.0], [1.0, 1.0], [1.0, 1.0]]
    assert knn_votes(x[:1], y[:1]).tolist() == [[0.0]]


@pytest.mark.parametrize("alone", [False, True])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    x, y, test, _ = problem(3)
    query = None if alone else test
    whole = knn_votes(x, y, query)
    monkeypatch.setattr("cl.metrics.features._BLOCK", 7 * len(x))  # seven rows at once, and a rest
    assert torch.equal(knn_votes(x, y, query), whole)


def test_leave_one_out_is_a_loop() -> None:
    x, y, _, _ = problem(4)
    for i, votes in enumerate(knn_votes(x, y)):
        rest = torch.arange(len(x)) != i
        assert torch.equal(votes, knn_votes(x[rest], y[rest], x[i : i + 1], classes=[10, 20, 30, 40])[0])


# ------------------------------------------------------------------ invariances of the probes

PROBES: list[Callable[..., Tensor]] = [ridge_probe, knn_probe]


@pytest.mark.parametrize("probe", PROBES)
@quick
@given(seeds)
def test_the_order_of_rows_and_features_does_not_matter(probe: Callable[..., Tensor], seed: int) -> None:
    x, y, test_x, test_y = problem(seed)
    draw = torch.Generator().manual_seed(seed)
    rows, other, columns = (torch.randperm(s, generator=draw) for s in (30, 40, 6))
    moved = probe(x[rows][:, columns], y[rows], test_x[other][:, columns], test_y[other])
    assert torch.equal(moved, probe(x, y, test_x, test_y))


@quick
@given(seeds, st.sampled_from([4, 50]))
def test_ridge_scores_ignore_the_unit_of_a_feature(seed: int, dim: int) -> None:
    x, y, test, _ = problem(seed, dim=dim)
    scale, shift = normal(seed + 5, dim).sign() * normal(seed + 6, dim).exp(), 10 * normal(seed + 7, dim)
    moved = ridge_scores(x * scale + shift, y, test * scale + shift)
    torch.testing.assert_close(moved, ridge_scores(x, y, test), rtol=1e-7, atol=1e-8)


@quick
@given(seeds)
def test_ridge_scores_turn_only_with_whitened_features(seed: int) -> None:
    x, y, test, _ = problem(seed, n=50)
    turn = orthogonal(seed + 2, 6)
    # Standardising depends on the axes, so a rotation of correlated features changes the scores ...
    skewed, skew = x * torch.tensor([9.0, 1, 1, 1, 1, 1]), test * torch.tensor([9.0, 1, 1, 1, 1, 1])
    change = ridge_scores(skewed @ turn, y, skew @ turn, penalty=0.5) - ridge_scores(skewed, y, skew, penalty=0.5)
    assert change.abs().max() > 1e-4
    # ... and of white ones does not.
    x = x - x.mean(0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / len(x))).T
    x, test = x @ whiten, test @ whiten
    torch.testing.assert_close(ridge_scores(x @ turn, y, test @ turn), ridge_scores(x, y, test), rtol=1e-7, atol=1e-9)


@quick
@given(seeds)
def test_knn_votes_ignore_rotation_and_length_but_not_translation(seed: int) -> None:
    x, y, test, _ = problem(seed)
    votes = knn_votes(x, y, test)
    turn = orthogonal(seed + 2, 6)
    assert torch.equal(knn_votes(x @ turn, y, test @ turn), votes)
    lengths = normal(seed + 3, 70, 1).exp()
    assert torch.equal(knn_votes(x * lengths[:30], y, test * lengths[30:]), votes)
    assert not torch.equal(knn_votes(x - 3, y, test - 3), votes)


@pytest.mark.parametrize("probe", PROBES)
def test_renaming_the_classes_renames_the_predictions(probe: Callable[..., Tensor]) -> None:
    x, y, test_x, test_y = problem(8)
    assert torch.equal(probe(x, y + 100, test_x, test_y + 100), probe(x, y, test_x, test_y))
    assert torch.equal(probe(x, y, test_x, test_y, classes=[40, 10, 30, 20]), probe(x, y, test_x, test_y))
    assert torch.equal(probe(x, y, test_x, test_y, classes=torch.tensor([40, 10, 30, 20])), probe(x, y, test_x, test_y))


@pytest.mark.parametrize("probe", PROBES)
def test_only_the_given_classes_compete(probe: Callable[..., Tensor]) -> None:
    x, y, test_x, test_y = problem(9)
    easy = probe(x, y, test_x, test_y, classes=[10, 20])
    right = torch.isin(test_y, torch.tensor([10, 20]))
    assert easy <= right.double().mean()  # the other test labels are never hit
    assert probe(x, y, test_x[right], test_y[right], classes=[10, 20]) >= probe(x, y, test_x[right], test_y[right])
    assert probe(x, y, test_x, test_y, classes=[77]) == 0


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("dim", [1, 200])
def test_separated_classes_are_told_apart_and_noise_is_not(probe: Callable[..., Tensor], dim: int) -> None:
    y = torch.arange(60) % 2
    x = 0.1 * normal(0, 60, dim) + torch.where(y == 1, 1.0, -1.0)[:, None]
    assert probe(x[:20], y[:20], x[20:], y[20:]) == 1
    # Noise: 2000 fair coins, wrong by more than 4.5 standard deviations once in 147 000 such tests.
    y, x = torch.arange(2400) % 2, normal(1, 2400, dim)
    assert abs(probe(x[:400], y[:400], x[400:], y[400:]) - 0.5) < 4.5 * 0.5 / 2000**0.5


# ------------------------------------------------------------------ CKA


def plain_cka(x: Tensor, y: Tensor, debiased: bool) -> float:
    """Both estimators from the definitions on Gram matrices: HSIC, and Song et al.'s three terms."""
    k, m, n = x @ x.T, y @ y.T, len(x)

    def hsic(k: Tensor, m: Tensor) -> float:
        if not debiased:
            centring = torch.eye(n, dtype=k.dtype) - 1 / n
            return float((k @ centring @ m @ centring).trace())
        k, m = (a - a.diagonal().diag() for a in (k, m))
        middle = k.sum() * m.sum() / ((n - 1) * (n - 2))
        return float(((k @ m).trace() + middle - 2 / (n - 2) * (k @ m).sum()) / (n * (n - 3)))

    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize("debiased", [False, True])
@quick
@given(seeds, st.integers(4, 20), st.integers(1, 20), st.integers(1, 20))
def test_cka_in_either_space_is_its_definition(debiased: bool, seed: int, n: int, d: int, e: int) -> None:
    x, y = normal(seed, n, d) + 1, normal(seed + 1, n, e) - 2
    y[:, 0] += x[:, 0]
    expected = plain_cka(x, y, debiased)
    assert linear_cka(x, y, debiased).item() == pytest.approx(expected, rel=1e-6, abs=1e-8)
    assert (-1 if debiased else 0) - 1e-9 <= expected <= 1 + 1e-9


@pytest.mark.parametrize("debiased", [False, True])
@quick
@given(seeds, st.sampled_from([(12, 3, 4), (6, 20, 9)]))
def test_cka_invariances(debiased: bool, seed: int, shape: tuple[int, int, int]) -> None:
    n, d, e = shape
    x, y = normal(seed, n, d), normal(seed + 1, n, e)
    value = linear_cka(x, y, debiased)
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(linear_cka(a, b, debiased), value, rtol=1e-8, atol=1e-10)

    assert same(y, x)
    assert same(x[rows], y[rows])
    assert same(x @ orthogonal(seed + 2, d), y @ orthogonal(seed + 3, e))
    assert same(1e-9 * x, 1e9 * y)
    assert same(x + 5, y - normal(seed + 4, e))
    assert torch.allclose(linear_cka(x, 3 * x @ orthogonal(seed + 2, d), debiased), torch.tensor(1.0).double())


def test_cka_is_not_invariant_to_other_linear_maps_or_to_one_order() -> None:
    x, y = normal(0, 50, 3), normal(0, 50, 3) + normal(1, 50, 3)
    value = linear_cka(x, y)
    assert abs(linear_cka(x * torch.tensor([5.0, 1.0, 1.0]), y) - value) > 0.01
    assert abs(linear_cka(x.flip(0), y) - value) > 0.1


def test_huge_and_tiny_features_do_not_overflow() -> None:
    x, y = normal(0, 10, 3), normal(1, 10, 3)
    for debiased in (False, True):
        assert torch.allclose(linear_cka(1e200 * x, 1e-200 * y, debiased), linear_cka(x, y, debiased))


def test_biased_cka_tends_to_1_for_few_rows_and_the_debiased_one_does_not() -> None:
    x, y = normal(0, 10, 5000), normal(1, 10, 5000)
    assert linear_cka(x, y) > 0.99 and abs(linear_cka(x, y, debiased=True)) < 0.5


def test_debiased_cka_of_independent_features_has_mean_zero() -> None:
    # Rows are exchangeable, so the mean is exactly 0 for every n; 4.5 standard errors are exceeded once in 147 000.
    values = torch.stack([linear_cka(normal(2 * s, 12, 60), normal(2 * s + 1, 12, 90), True) for s in range(800)])
    assert abs(values.mean()) < 4.5 * values.std() / len(values) ** 0.5
    assert 0 < values.std() < 0.5
    biased = torch.stack([linear_cka(normal(2 * s, 12, 60), normal(2 * s + 1, 12, 90)) for s in range(20)])
    assert biased.min() > 0.7


def test_debiased_cka_averages_to_zero_over_all_orders() -> None:
    x, y = normal(3, 5, 2), normal(4, 5, 7)
    values = torch.stack([linear_cka(x, y[list(order)], True) for order in itertools.permutations(range(5))])
    assert abs(values.mean()) < 1e-12 and values.std() > 0.1
    plain = torch.stack([linear_cka(x, y[list(order)]) for order in itertools.permutations(range(5))])
    assert plain.mean() > 0.1


# ------------------------------------------------------------------ what is undefined, refused, or elsewhere


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_features_that_are_not_finite_give_nan(probe: Callable[..., Tensor], bad: float) -> None:
    x, y, test_x, test_y = problem(5)
    for broken in (x, test_x):
        broken[3, 2], kept = bad, broken[3, 2].item()
        assert probe(x, y, test_x, test_y).isnan()
        broken[3, 2] = kept
    assert not probe(x, y, test_x, test_y).isnan()


@pytest.mark.parametrize("probe", PROBES)
def test_no_test_example_is_nan(probe: Callable[..., Tensor]) -> None:
    x, y, test_x, test_y = problem(5)
    assert probe(x, y, test_x[:0], test_y[:0]).isnan()


@pytest.mark.parametrize("probe", PROBES)
def test_features_without_variance_predict_the_commonest_class(probe: Callable[..., Tensor]) -> None:
    x, y = torch.full((9, 3), 0.1), torch.tensor([4, 7, 7, 4, 7, 7, 7, 4, 7])
    assert (
        probe(x, y, torch.full((4, 3), 0.1), torch.tensor([7, 7, 7, 4]), **({} if probe is ridge_probe else {"k": 9}))
        == 0.75
    )


def test_constant_features_have_no_cka() -> None:
    x = torch.full((7, 2), 0.7, dtype=torch.float64)
    assert (x.mean(0) != x[0]).all(), "the mean is off by rounding, and what is left must not count"
    assert linear_cka(x, normal(0, 7, 2)).isnan() and linear_cka(normal(0, 7, 2), x, True).isnan()
    for bad in (NAN, math.inf):
        x = normal(1, 7, 2)
        x[0, 0] = bad
        assert linear_cka(x, normal(0, 7, 2)).isnan() and linear_cka(normal(0, 7, 2), x, True).isnan()


def test_debiased_cka_needs_four_rows_and_distances_that_differ() -> None:
    for n in (1, 2, 3):
        assert linear_cka(normal(0, n, 5), normal(1, n, 5), debiased=True).isnan()
    assert not linear_cka(normal(0, 4, 5), normal(1, 4, 5), debiased=True).isnan()
    assert linear_cka(torch.eye(8), normal(0, 8, 3), debiased=True).isnan()


def test_shapes_and_options_are_refused_in_one_sentence() -> None:
    x, y, test_x, test_y = problem(5)
    for probe in PROBES:
        for arguments in [
            (x[0], y, test_x, test_y),
            (x, y[:-1], test_x, test_y),
            (x, y, test_x[:, :-1], test_y),
            (x, y, test_x, test_y[:-1]),
            (x[:0], y[:0], test_x, test_y),
            (x[:, :0], y, test_x[:, :0], test_y),
        ]:
            with pytest.raises(InputError, match="give \\(n, D\\), \\(n,\\)"):
                probe(*arguments)
        with pytest.raises(InputError, match="names no class"):
            probe(x, y, test_x, test_y, classes=[])
    for penalty in (0.0, -1.0, NAN):
        with pytest.raises(InputError, match="must be above 0"):
            ridge_probe(x, y, test_x, test_y, penalty=penalty)
    with pytest.raises(InputError, match="k=0 must be at least 1"):
        knn_probe(x, y, test_x, test_y, k=0)
    for a, b in [(x, x[:-1]), (x[0], x[0]), (x[:0], x[:0])]:
        with pytest.raises(InputError, match="one row for each input"):
            linear_cka(a, b)


def test_nothing_reads_the_device() -> None:
    # a meta tensor has no values, so any read raises
    x, y, test_x, test_y = (t.to("meta") for t in problem(5))
    for probe in PROBES:
        value = probe(x, y, test_x, test_y, classes=(10, 20, 30, 40))
        assert value.shape == () and value.device.type == "meta"
    assert ridge_probe(x[:3], y[:3], test_x, test_y, classes=(10, 20)).shape == ()
    assert linear_cka(x, x, True).shape == linear_cka(x[:3], x[:3]).shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_computed_in_float64_without_a_graph(dtype: torch.dtype) -> None:
    x, y, test_x, test_y = problem(5)
    x, test_x = (4 * x).to(dtype), (4 * test_x).to(dtype)
    if dtype.is_floating_point:
        x.requires_grad_()
    for probe in PROBES:
        value = probe(x, y, test_x, test_y)
        assert value.dtype == torch.float64 and not value.requires_grad
        assert torch.equal(value, probe(x.detach().double(), y, test_x.double(), test_y))
    assert linear_cka(x, x.detach().flip(0)).dtype == torch.float64
