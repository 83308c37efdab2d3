"""The curriculum designer: distances of classes, designed orders, scores of orders and what they were worth."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl.compose.curriculum import METRICS, class_distances, design_orders, effectiveness, order_score, rank_orders
from cl.errors import InputError

SEEDS = st.integers(0, 2**32 - 1)
close = pytest.approx


def draw_features(seed: int, num_classes: int = 5, num_features: int = 4, per_class: int = 12) -> tuple[Tensor, Tensor]:
    """Classes with means, shapes and sizes of their own."""
    draw = np.random.default_rng(seed)
    parts = [
        draw.normal(size=(per_class + c, num_features)) @ draw.normal(size=(num_features, num_features))
        + draw.normal(1, 2, size=num_features)
        for c in range(num_classes)
    ]
    labels = np.repeat(np.arange(num_classes), [len(part) for part in parts])
    shuffle = draw.permutation(len(labels))
    return torch.from_numpy(np.concatenate(parts)[shuffle]), torch.from_numpy(labels[shuffle])


def draw_distances(seed: int, num_classes: int) -> Tensor:
    return class_distances(*draw_features(seed, num_classes), metric="euclidean")


def rotation(seed: int, size: int) -> Tensor:
    return torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed).normal(size=(size, size)))).Q


def on_a_line(*positions: float) -> Tensor:
    """Distances of classes of one example each, on a line."""
    return class_distances(torch.tensor(positions)[:, None], torch.arange(len(positions)), metric="euclidean")


def shares(table: np.ndarray) -> np.ndarray:
    return table / table.sum(1, keepdims=True)


@pytest.mark.parametrize("metric", METRICS)
@given(seed=SEEDS, num_classes=st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_each_row_is_a_distribution_over_the_other_classes(metric, seed, num_classes):
    distances = class_distances(*draw_features(seed, num_classes), metric=metric)
    assert distances.shape == (num_classes, num_classes) and distances.dtype == torch.float64
    assert torch.equal(distances.diagonal(), torch.zeros(num_classes, dtype=torch.float64))
    assert (distances + torch.eye(num_classes) > 0).all()
    assert distances.sum(1).tolist() == close([1.0] * num_classes, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@given(seed=SEEDS, scale=st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_distances_do_not_see_rotation_and_scale(metric, seed, scale):
    x, y = draw_features(seed)
    torch.testing.assert_close(
        class_distances(scale * x @ rotation(seed, 4), y, metric=metric),
        class_distances(x, y, metric=metric),
        atol=1e-9,
        rtol=1e-7,
    )


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_only_cosine_ignores_the_length_of_a_mean_and_only_it_sees_the_origin(seed):
    x, y = draw_features(seed)
    longer, moved = torch.where(y[:, None] == 2, 3 * x, x), x + torch.tensor([5.0, -7.0, 0.0, 1.0])
    for metric in METRICS:
        plain = class_distances(x, y, metric=metric)
        assert torch.allclose(class_distances(longer, y, metric=metric), plain, atol=1e-9) == (metric == "cosine")
        assert torch.allclose(class_distances(moved, y, metric=metric), plain, atol=1e-9) == (metric != "cosine")


def test_distances_of_means_against_scipy():
    from scipy.spatial import distance

    x, y = draw_features(3)
    means = np.stack([x[y == c].numpy().mean(0) for c in range(5)])
    for metric in ("cosine", "euclidean"):
        expected = shares(distance.cdist(means, means, metric))
        np.testing.assert_allclose(class_distances(x, y, metric=metric).numpy(), expected, atol=1e-12)


def test_otdd_against_scipy_matrix_roots():
    from scipy.linalg import sqrtm

    x, y = draw_features(4)
    parts = [x[y == c].numpy() for c in range(5)]
    mean, cov = [p.mean(0) for p in parts], [np.cov(p.T, bias=True) for p in parts]
    table = np.zeros((5, 5))
    for i, j in permutations(range(5), 2):
        root = sqrtm(cov[i])
        bures = np.trace(cov[i] + cov[j] - 2 * np.real(sqrtm(root @ cov[j] @ root)))
        table[i, j] = math.sqrt(((mean[i] - mean[j]) ** 2).sum() + bures)
    np.testing.assert_allclose(class_distances(x, y, metric="otdd").numpy(), shares(table), atol=1e-9)


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_otdd_in_one_dimension_is_the_distance_of_mean_and_deviation(seed):
    """W_2^2 = (m_i - m_j)^2 + (s_i - s_j)^2."""
    x, y = draw_features(seed, num_features=1)
    moments = np.array([[float(x[y == c].mean()), float(x[y == c].std(correction=0))] for c in range(5)])
    expected = shares(np.linalg.norm(moments[:, None] - moments[None], axis=2))
    np.testing.assert_allclose(class_distances(x, y, metric="otdd").numpy(), expected, atol=1e-9)


def test_otdd_with_fewer_examples_than_features():
    """Zero features appended change no distance; the covariances then have no full rank."""
    x, y = draw_features(5, num_features=3, per_class=4)
    wide = torch.nn.functional.pad(x, (0, 40)) @ rotation(0, 43)
    expected = class_distances(x, y, metric="otdd")
    torch.testing.assert_close(class_distances(wide, y, metric="otdd"), expected, atol=1e-7, rtol=0)


def test_otdd_of_translated_copies_is_the_translation():
    cloud = torch.from_numpy(np.random.default_rng(6).normal(size=(20, 3)))
    shift = torch.tensor([[0.0, 0, 0], [3, 4, 0], [0, 0, 2]], dtype=torch.float64)
    x, y = (cloud + shift[:, None]).flatten(0, 1), torch.arange(3).repeat_interleave(20)
    other = math.sqrt(29)  # |(3, 4, -2)|
    expected = [[0, 5 / 7, 2 / 7], [5 / (5 + other), 0, other / (5 + other)], [2 / (2 + other), other / (2 + other), 0]]
    np.testing.assert_allclose(class_distances(x, y, metric="otdd").numpy(), expected, atol=1e-9)


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_otdd_tells_equal_gaussians_from_near_ones(seed):
    """Examples in another order are the same Gaussian up to rounding."""
    draw = np.random.default_rng(seed)
    cloud = torch.from_numpy(draw.normal(size=(30, 6)))
    same, y = cloud[torch.from_numpy(draw.permutation(30))], torch.arange(3).repeat_interleave(30)
    distances = class_distances(torch.cat([cloud, same, cloud + 1e-4]), y, metric="otdd")
    assert distances[0, 1] == 0 and distances[0, 2] == 1
    assert distances[2].tolist() == close([0.5, 0.5, 0], abs=1e-6)
    with pytest.raises(InputError, match="Class 0 lies at otdd distance 0 from every other"):
        class_distances(torch.cat([cloud, same, cloud.flip(0)]), y, metric="otdd")


def test_designed_orders_worked_by_hand():
    """Classes at 0, 1, 3, 7: rows (0 1 3 7)/11, (1 0 2 6)/9, (3 2 0 4)/9, (7 6 4 0)/17.

    Their sums of squares, .4876, .5062, .3580, .3495, rank the variances: 3, 2, 0, 1.
    """
    distances = on_a_line(0, 1, 3, 7)
    assert design_orders(distances) == [(3, 0, 1, 2), (2, 3, 0, 1)]
    assert design_orders(distances, top_k=4) == [(3, 0, 1, 2), (2, 3, 0, 1), (0, 3, 2, 1), (1, 3, 2, 0)]


def test_scores_worked_by_hand():
    distances = on_a_line(0, 1, 3, 7)
    variance = Fraction(101, 17**2) / 4 - Fraction(1, 16)  # of (7 6 4 0)/17
    # 3: its mirror 2, its next 0; then 0: its mirror 1, its next 1.
    score = 1 - variance + (1 - Fraction(4, 17) + Fraction(7, 17)) + (1 - Fraction(1, 11) + Fraction(1, 11))
    assert order_score((3, 0, 1, 2), distances) == close(float(score), abs=1e-12)

    # Five classes, at 0, 1, 3, 7, 15: from 3 (row 7 6 4 0 8) mirror 4, next 0; from 0 (0 1 3 7 15) mirror 2, next 1.
    variance = Fraction(49 + 36 + 16 + 64, 25**2) / 5 - Fraction(1, 25)
    score = 1 - variance + (1 - Fraction(8, 25) + Fraction(7, 25)) + (1 - Fraction(3, 26) + Fraction(1, 26))
    assert order_score([3, 0, 1, 2, 4], on_a_line(0, 1, 3, 7, 15)) == close(float(score), abs=1e-12)
    assert order_score((0, 1), on_a_line(0, 1)) == close(1.75)


@given(seed=SEEDS, num_classes=st.integers(2, 9))
@settings(max_examples=40, deadline=None)
def test_designed_orders_walk_inward_from_the_steadiest_rows(seed, num_classes):
    distances = draw_distances(seed, num_classes)
    table = distances.numpy()
    orders = design_orders(distances, top_k=num_classes)
    starts = [order[0] for order in orders]
    spread = table.var(1)[starts]
    assert (np.diff(spread) >= -1e-15).all() and spread[0] == close(table.var(1).min())
    assert design_orders(distances, top_k=1) == orders[:1]
    for start, order in zip(starts, orders, strict=True):
        left, front, back = set(range(num_classes)) - {start}, [start], []
        while left:
            front.append(max(left, key=table[start].__getitem__))
            left.remove(front[-1])
            if left:
                back.append(min(left, key=table[start].__getitem__))
                left.remove(back[-1])
        assert order == (*front, *reversed(back))
        assert sorted(order) == list(range(num_classes))


@given(seed=SEEDS, num_classes=st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_up_to_four_classes_no_order_with_its_start_beats_the_designed_one(seed, num_classes):
    """One step then decides, and the middle class of four adds 1 whatever it is."""
    distances = draw_distances(seed, num_classes)
    ranked = rank_orders(distances)
    for order in design_orders(distances, top_k=num_classes):
        best = max(score for score, other in ranked if other[0] == order[0])
        assert order_score(order, distances) == close(best, abs=1e-12)


@given(seed=SEEDS, num_classes=st.integers(2, 7))
@settings(max_examples=40, deadline=None)
def test_scores_and_designs_do_not_see_the_names_of_classes(seed, num_classes):
    x, y = draw_features(seed, num_classes)
    name = np.random.default_rng(seed).permutation(num_classes)  # class c is called name[c]
    one, other = class_distances(x, y, "otdd"), class_distances(x, torch.from_numpy(name)[y], "otdd")
    for order in (range(num_classes), np.random.default_rng(seed + 1).permutation(num_classes)):
        assert order_score(name[list(order)], other) == close(order_score(order, one), abs=1e-9)
    if num_classes > 2:  # two rows vary equally
        assert design_orders(other) == [tuple(name[list(order)].tolist()) for order in design_orders(one)]


def test_all_orders_are_ranked_best_first():
    distances = draw_distances(7, 4)
    ranked = rank_orders(distances)
    assert {order for _, order in ranked} == set(permutations(range(4))) and len(ranked) == 24
    scores = [score for score, _ in ranked]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
    assert all(score == order_score(order, distances) for score, order in ranked)
    some = [(3, 1, 2, 0), (0, 1, 2, 3), (2, 0, 1, 3)]
    assert rank_orders(distances, iter(some)) == [pair for pair in ranked if pair[1] in some]
    assert rank_orders(distances, []) == []


def test_equal_scores_keep_lexicographic_order():
    """Where all classes are equally far, every order is worth the same."""
    distances = class_distances(torch.eye(4), torch.arange(4), metric="euclidean")
    assert [order for _, order in rank_orders(distances)] == list(permutations(range(4)))
    assert design_orders(distances) == [(0, 3, 2, 1), (1, 3, 2, 0)]


def test_more_than_eight_classes_are_ranked_only_from_a_list():
    nine = draw_distances(8, 9)
    with pytest.raises(InputError, match="9 classes have too many orders"):
        rank_orders(nine)
    assert len(rank_orders(nine, design_orders(nine, top_k=3))) == 3
    assert len(rank_orders(draw_distances(8, 6))) == 720


@pytest.mark.parametrize(
    ("accuracy", "drop", "expected"),
    [(0.6, 0.3, 1.2 / 1.18), (0.6, 0.6, 1.2 / 1.36), (0.84, 0.06, 1.599391), (0.7, 0.0, 1.4), (0.0, 0.5, 0.0)],
)
def test_effectiveness_worked_numbers(accuracy, drop, expected):
    assert effectiveness(accuracy, drop) == close(expected, abs=5e-7)


@given(st.floats(0.01, 1), st.floats(0.01, 1))
def test_effectiveness_is_the_harmonic_mean_of_accuracy_and_inverse_drop(accuracy, drop):
    assert effectiveness(accuracy, drop) == close(2 / (1 / accuracy + drop))
    assert effectiveness(accuracy, drop) < effectiveness(accuracy, 0) < effectiveness(accuracy, -drop)


def test_effectiveness_of_the_unmeasured_and_at_its_pole():
    assert math.isnan(effectiveness(math.nan, 0.1)) and math.isnan(effectiveness(0.5, math.nan))
    assert math.isnan(effectiveness(math.nan, math.nan))
    assert effectiveness(1.0, -1.0) == math.inf


@pytest.mark.parametrize(
    ("accuracy", "drop", "sentence"),
    [(84, 0.06, "accuracy=84 is"), (-0.1, 0, "accuracy=-0.1"), (0.8, 6, "drop=6"), (0.8, -1.1, "drop=-1.1")],
)
def test_effectiveness_refuses_percentages(accuracy, drop, sentence):
    with pytest.raises(InputError, match=sentence):
        effectiveness(accuracy, drop)


@pytest.mark.parametrize(
    ("features", "labels", "metric", "sentence"),
    [
        ([[1.0], [2.0]], [0, 1], "cosin", "no metric called 'cosin': did you mean 'cosine'"),
        ([[1.0], [2.0]], [0, 1, 1], "cosine", r"shape \(2, 1\) and labels \(3,\)"),
        ([1.0, 2.0], [0, 1], "cosine", r"shape \(2,\)"),
        ([[1.0], [math.nan]], [0, 1], "otdd", "example 1 are not finite"),
        ([[1.0], [2.0]], [0, 0], "otdd", r"classes \[0\]"),
        ([[1.0], [2.0]], [0, 2], "euclidean", r"classes \[0, 2\]"),
        ([[1.0], [2.0]], [-1, 0], "euclidean", r"classes \[-1, 0\]"),
        ([[1.0], [0.0]], [0, 1], "cosine", "Class 1 has mean feature 0"),
        ([[1.0], [3.0]], [0, 1], "cosine", "Class 0 lies at cosine distance 0"),
        ([[0.1], [0.2], [0.3], [0.2]], [0, 0, 0, 1], "euclidean", "Class 0 lies at euclidean distance 0"),
        ([[0.1], [0.3], [0.3], [0.1]], [0, 0, 1, 1], "otdd", "Class 0 lies at otdd distance 0"),
    ],
)
def test_distances_refuse_in_one_sentence(features, labels, metric, sentence):
    with pytest.raises(InputError, match=sentence):
        class_distances(torch.tensor(features, dtype=torch.float64), torch.tensor(labels), metric=metric)


@pytest.mark.parametrize(
    ("distances", "sentence"),
    [
        ([[0.0, 1.0]], r"shape \(1, 2\)"),
        ([[0.0]], r"shape \(1, 1\)"),
        ([[0.0, 1.0], [2.0, 0.0]], r"Row 1 of distances is \[2.0, 0.0\]"),
        ([[0.0, 1.0], [0.5, 0.5]], "Row 1"),
        ([[0.0, 2.0, -1.0], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]], "Row 0"),
        ([[0.0, math.nan], [1.0, 0.0]], "Row 0"),
    ],
)
def test_a_matrix_that_is_not_of_class_distances_is_refused(distances, sentence):
    table = torch.tensor(distances)
    for use in (design_orders, rank_orders, lambda d: order_score(range(len(d)), d)):
        with pytest.raises(InputError, match=sentence):
            use(table)


def test_orders_and_counts_are_refused_in_one_sentence():
    distances = on_a_line(0, 1, 3)
    for order in [(0, 1), (0, 1, 1), (0, 1, 3), (0, 1, 2, 2)]:
        with pytest.raises(InputError, match=r"is not a permutation of 0\.\.2"):
            order_score(order, distances)
        with pytest.raises(InputError, match=r"is not a permutation of 0\.\.2"):
            rank_orders(distances, [(0, 1, 2), order])
    for top_k in (0, 4):
        with pytest.raises(InputError, match=f"top_k={top_k} is outside 1..3"):
            design_orders(distances, top_k=top_k)
