"""Herding: the printed algorithm, nearest means, and the features of exemplars."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from by_hand import slow_herding
from cl.engine.learner import Learner
from cl.testing import toy_stream
from cl.testing.toys import Normed
from cl.toolkit.herding import class_means, herding, nearness, unit_features
from draws import normal, orthogonal, quick, seeds
from toys import same


def test_worked_example_23():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.96, 0.28]])
    assert herding(features, 3).tolist() == [2, 3, 1]
    order, gaps = zip(*slow_herding(features.double().numpy(), 3), strict=True)
    assert order == (2, 3, 1) and gaps == pytest.approx((0.2828, 0.1414, 0.2108), abs=1e-4)


@quick
@given(seeds, st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_herding_is_the_printed_algorithm_and_a_prefix_of_itself(seed, size, dim, unit):
    features = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    features = F.normalize(features, dim=1) if unit and dim > 1 else features
    order = herding(features, 99).tolist()
    assert sorted(order) == list(range(size))
    for k in range(1, size + 1):  # each is a nearest one; of two alike, as two unit vectors are, either
        total = features[order[: k - 1]].sum(0)
        gaps = [float((features.mean(0) - (features[i] + total) / k).norm()) for i in order[k - 1 :]]
        assert gaps[0] <= min(gaps) + 1e-9
    assert all(herding(features, m).tolist() == order[:m] for m in range(size + 1))


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 300))
def test_of_equally_near_examples_the_first_is_chosen_whatever_the_rounding(seed, pairs, dim):
    """Two examples are as far from their mean as each other; so are those of mirrored pairs."""
    two = normal(seed, 2, dim).float()
    for size in (1, 2):
        assert herding(two, size).tolist() == [0, 1][:size]
    half = orthogonal(seed, dim)[:pairs].float()  # so that none but its mirror image is opposite to a row
    order = herding(torch.cat([half, -half]), 2 * pairs).tolist()
    assert order == [i for k in range(len(half)) for i in (k, len(half) + k)]


def test_herded_means_are_nearer_than_means_of_a_random_draw():
    features = F.normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) + 1, dim=1)
    rng = np.random.default_rng(0)
    for size in (5, 20, 60):
        herded = float((features[herding(features, size)].mean(0) - features.mean(0)).norm())
        drawn = [features[rng.choice(200, size, replace=False)].mean(0) - features.mean(0) for _ in range(100)]
        assert herded < min(float(gap.norm()) for gap in drawn)


@quick
@given(seeds, st.integers(1, 20), st.integers(1, 5))
def test_the_nearest_mean_is_the_nearest_centroid_on_the_sphere(seed, size, num_classes):
    draw = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(size, 3, generator=draw), dim=1)
    y = torch.randint(num_classes, (size,), generator=draw)
    query = torch.randn(4, 3, generator=draw) * 5
    near = nearness(query, class_means(features, y, num_classes))
    for c in range(num_classes):
        if (y == c).any():
            mean = features[y == c].mean(0)
            gap = (query / query.norm(dim=1, keepdim=True) - mean / mean.norm()).square().sum(1)
            torch.testing.assert_close(near[:, c], -gap, atol=1e-4, rtol=1e-4)
        else:
            assert bool((near[:, c] == -4).all())
    assert bool((near >= -4 - 1e-5).all() & (near <= 1e-5).all())


def test_features_of_exemplars_are_taken_in_evaluation_mode_and_unaugmented():
    stream = toy_stream()
    stream.augment = lambda x, rng: x * 0
    learner = Learner(stream, Normed(), {}, partial(torch.optim.SGD, lr=0.1), eval_batch_size=7)
    kept = {name: value.clone() for name, value in learner.backbone.state_dict().items()}
    features = unit_features(learner, stream[0].train)
    assert same(learner.backbone.state_dict(), kept) and learner.backbone.training
    learner.backbone.eval()
    expected = F.normalize(learner.backbone(learner.prepare(stream[0].train.x)), dim=1)
    torch.testing.assert_close(features, expected)
