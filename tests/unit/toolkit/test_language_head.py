"""A head of fixed class vectors: its logits, its floors, what it refuses, and how it takes the place of another."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.testing import toy_learner
from cl.toolkit.language_head import LanguageHead, nearest_pair, orthogonal, use_language_head
from draws import normal, quick, seeds


@pytest.mark.parametrize(("num_classes", "at_one"), [(100, 3.6222), (10, 1.4612)])
def test_floors_of_the_cross_entropy_on_orthogonal_vectors(num_classes, at_one):
    """An example that points at its class has eta in its own logit and 0 in the others."""
    vectors, y = orthogonal(num_classes, num_classes).double(), torch.arange(num_classes)

    @torch.no_grad()
    def entropy(eta):
        return float(F.cross_entropy(LanguageHead(num_classes, vectors, eta).double()(3 * vectors), y))

    assert entropy(1.0) == pytest.approx(at_one, abs=1e-4)
    assert entropy(1 / 0.07) == pytest.approx(math.log1p((num_classes - 1) * math.exp(-1 / 0.07)), rel=1e-3)
    assert entropy(1 / 0.07) < 1e-4


@quick
@given(seeds, st.integers(1, 5), st.integers(2, 6), st.integers(2, 8), st.floats(0.1, 20))
def test_logits_are_scaled_cosines_whatever_the_lengths(seed, rows, num_classes, dim, eta):
    f, e = normal(seed, rows, dim), normal(seed + 1, num_classes, dim)
    head = LanguageHead(dim, 5 * e, eta).double()
    expected = eta * (f @ e.T) / (f.norm(dim=1)[:, None] * e.norm(dim=1))
    torch.testing.assert_close(head(7 * f), expected, check_dtype=False)


def test_gradients_reach_the_projection_and_eta_and_no_row():
    head = LanguageHead(3, torch.eye(4), eta=2.0)
    assert {name for name, _ in head.named_parameters()} == {"projection.weight", "eta"}
    head(torch.randn(5, 3)).sum().backward()
    assert head.rows.grad is None and not head.rows.requires_grad and head.eta.grad is not None
    assert isinstance(LanguageHead(4, torch.eye(4)).projection, nn.Identity)
    assert isinstance(LanguageHead(4, torch.eye(4), projects=True).projection, nn.Linear)


def test_the_sentence_on_near_synonyms():
    rows = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]]), dim=1)
    said = nearest_pair(rows, ["couch", "sofa", "van"])
    assert said.startswith("Of the class vectors those of 'couch' and 'sofa' are nearest: cosine 1.00, distance 0.10.")
    assert said.endswith("Pairs above 0.95, which can hardly be told apart: 1.")
    assert "Pairs" not in nearest_pair(torch.eye(3), ["a", "b", "c"])
    assert "one class" in nearest_pair(torch.eye(1), ["a"])


def put(vectors, names=("a", "b", "c", "d", "e", "f"), frozen=False):
    learner, stream = toy_learner()
    stream.class_names = tuple(names)
    learner.backbone.requires_grad_(not frozen)
    return learner, use_language_head(learner, stream, Strategy(), vectors, 1.0, True)


def test_it_takes_the_place_of_the_head_everywhere():
    learner, head = put({name: [1.0, float(i)] for i, name in enumerate("fedcba")})
    assert learner.head is head is learner.trunk()["head"]
    assert sum(p is head.eta for p in learner.parameters()) == 1
    torch.testing.assert_close(head.rows[0], F.normalize(torch.tensor([1.0, 5.0]), dim=0))
    assert isinstance(put("orthogonal")[1].projection, nn.Identity)
    assert isinstance(put("orthogonal", frozen=True)[1].projection, nn.Linear)


def test_orthogonal_vectors_of_more_classes_than_features_are_longer():
    rows = orthogonal(20, 3)
    assert rows.shape == (20, 20)
    torch.testing.assert_close(rows @ rows.T, torch.eye(20), atol=1e-5, rtol=0)


def test_what_it_refuses():
    vectors = {name: [1.0, 2.0] for name in "abcdef"}
    with pytest.raises(InputError, match="the vector of 'c' is 0"):
        put({**vectors, "c": [0.0, 0.0]})
    with pytest.raises(InputError, match="no vector for 1 of the 6 classes, the first of them 'g'"):
        put(vectors, "abcdeg")
    with pytest.raises(InputError, match="have no names to look vectors up by"):
        put(vectors, ())
    learner, _ = put(vectors)
    with pytest.raises(InputError, match="as another strategy does: drop one"):
        use_language_head(learner, toy_learner()[1], Strategy(), vectors, 1.0, True)
