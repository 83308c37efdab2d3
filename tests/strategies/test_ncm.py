"""Nearest class mean on features: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cl.data.task import TaskData
from cl.engine.learner import Learner
from cl.strategies.ncm import NCM
from cl.testing import ToyBackbone, toy_stream
from prompted import all_rows, assert_rows_are_independent
from toys import build, float_stream, learn, same, toy, trunk


def test_ncm_does_not_depend_on_the_order_of_tasks():
    base = toy_stream(3)
    results = []
    for order in permutations(range(3)):
        parts = [base[i].train.tensors() for i in order]
        stream = float_stream([p[0] for p in parts], [p[1] for p in parts])
        torch.manual_seed(0)
        learner = learn(build(stream, ToyBackbone(), NCM()), stream)
        results.append((learner.strategies["method"].total, learner.strategies["method"].count))
    for total, count in results[1:]:
        torch.testing.assert_close(total, results[0][0])
        assert torch.equal(count, results[0][1])


def test_ncm_is_the_nearest_centroid_in_angle():
    from sklearn.neighbors import NearestCentroid

    learner, stream = toy(NCM(), range(3))
    x, y, _ = TaskData.concat([t.train for t in stream]).tensors()
    test = TaskData.concat([t.test for t in stream]).tensors()
    features = learner.backbone(learner.prepare(x)).detach().numpy()
    varied = features.std(0) > 0  # scikit-learn warns of the others, which are 0 and add nothing to a cosine
    features = features[:, varied]
    queries = learner.backbone(learner.prepare(test[0])).detach().numpy()
    assert not queries[:, ~varied].any()
    queries = queries[:, varied]
    # The nearest unit-length centroid to a unit-length query is the one of largest cosine.
    centres = NearestCentroid().fit(features, y.numpy())
    centroids = centres.centroids_ / np.linalg.norm(centres.centroids_, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    distances = ((queries[:, None] - centroids[None]) ** 2).sum(2)
    ours = learner.strategies["method"].predict(learner, learner.prepare(test[0])).detach()
    np.testing.assert_allclose(ours, 1 - distances / 2, atol=1e-5)
    assert (ours.argmax(1).numpy() == distances.argmin(1)).all()


def test_ncm_trains_nothing_unless_asked_and_ignores_batch_sizes():
    learner, stream = toy(NCM(), range(3))
    assert same(trunk(learner), trunk(toy(None)[0]))
    torch.manual_seed(0)
    other = Learner(stream, ToyBackbone(), {"method": NCM()}, partial(torch.optim.SGD, lr=0.1), eval_batch_size=7)
    learn(other, stream)
    torch.testing.assert_close(other.strategies["method"].total, learner.strategies["method"].total)
    assert same(trunk(toy(NCM(freeze=False), range(3))[0]), trunk(toy(None, range(3))[0]))


def test_the_means_are_taken_in_evaluation_mode():
    class Noisy(ToyBackbone):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    stream = toy_stream()
    torch.manual_seed(0)
    noisy = learn(build(stream, Noisy(), NCM(freeze=False)), stream, [0], epochs=0)
    torch.manual_seed(0)
    plain = learn(build(stream, ToyBackbone(), NCM(freeze=False)), stream, [0], epochs=0)
    torch.testing.assert_close(noisy.strategies["method"].total, plain.strategies["method"].total)
    assert noisy.backbone.training


def test_a_class_without_a_mean_is_farthest():
    learner, stream = toy(NCM(), [0])
    out = learner.strategies["method"].predict(learner, learner.prepare(stream[2].test.x))
    assert bool((out[:, 2:] == -1).all()) and bool((out[:, :2] >= -1).all())


def test_ncm_is_simplecils_cosine_classifier():
    """A linear layer whose weights are replaced by class means, both sides of the product normalised, scale 1."""
    learner, stream = toy(NCM(), backbone="vit")
    layer = nn.Linear(16, 6, bias=False)
    nn.init.constant_(layer.weight, -1.0)
    for task in stream:
        x, y, _ = task.train.tensors()
        features = learner.backbone(learner.prepare(x)).detach()
        for c in task.classes:
            layer.weight.data[c] = features[y == c].mean(0)
        learn(learner, stream, [task.index])
        view = all_rows(learner, stream)
        theirs = F.linear(F.normalize(learner.backbone(view), dim=1), F.normalize(layer.weight, dim=1))
        ours = learner.strategies["method"].predict(learner, view)
        seen = slice(0, 2 * task.index + 2)
        torch.testing.assert_close(ours[:, seen], theirs[:, seen], rtol=1e-4, atol=1e-5)
    assert_rows_are_independent(learner, stream)


def test_the_mean_of_a_class_that_returns_is_that_of_all_its_examples():
    learner, stream = toy(NCM(), range(3), scenario="domain")
    x, y, _ = TaskData.concat([task.train for task in stream]).tensors()
    features = learner.backbone(learner.prepare(x)).detach()
    means = torch.stack([features[y == c].mean(0) for c in range(2)])
    view = all_rows(learner, stream)
    expected = F.cosine_similarity(learner.backbone(view)[:, None], means[None], dim=2)
    torch.testing.assert_close(learner.strategies["method"].predict(learner, view), expected, rtol=1e-4, atol=1e-5)
