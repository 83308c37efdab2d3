"""k nearest neighbours on frozen features: a worked example, scikit-learn's classifier, and what is stored."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cl.data.task import TaskData
from cl.engine.experiment import Experiment
from cl.errors import InputError
from cl.measure.resources import Resources
from cl.strategies.knn import KNN, votes
from cl.testing import toy_learner
from draws import normal, quick, seeds
from prompted import all_rows, assert_rows_are_independent
from toys import same, toy, trainer, trunk


def test_a_worked_example():
    """Two of the three nearest are of class 0; the nearest ones of classes 0, 1, 2 have the cosines 0.6, 0.9, -0.3."""
    cosines = torch.tensor([[0.9, 0.6, 0.5, -0.3]])
    found = votes(cosines, torch.tensor([1, 0, 0, 2]), k=3, num_classes=4)
    torch.testing.assert_close(found, torch.tensor([[2.2, 1.3, -0.1, -1 / 3]]))
    tie = votes(cosines, torch.tensor([1, 0, 0, 2]), k=2, num_classes=4)
    assert int(tie.argmax()) == 1, "a tie is decided by the nearest"
    assert int(tie[:, 2:].argmax()) == 0, "as is a choice between classes without a vote"


@quick
@given(seeds, st.integers(1, 30), st.integers(1, 9))
def test_votes_are_those_of_a_loop_and_of_scikit_learn(seed, N, k):
    from sklearn.neighbors import KNeighborsClassifier

    x, query = F.normalize(normal(seed, N, 3), dim=1), F.normalize(normal(seed + 1, 5, 3), dim=1)
    y = torch.randint(0, 4, (N,), generator=torch.Generator().manual_seed(seed))
    found = votes(query @ x.T, y, k, 4)
    for row, scores in zip(query, found, strict=True):
        ranked = sorted(range(N), key=lambda i: -float(row @ x[i]))
        for c in range(4):
            nearest = max((float(row @ x[i]) for i in range(N) if y[i] == c), default=-1.0)
            assert float(scores[c]) == pytest.approx(sum(int(y[i]) == c for i in ranked[:k]) + nearest / 3)
    theirs = KNeighborsClassifier(min(k, N), metric="cosine").fit(x.numpy(), y.numpy())
    shares = torch.from_numpy(theirs.predict_proba(query.numpy()))
    clear = shares.sort(1).values[:, -2:].diff()[:, 0] > 1e-9 if shares.shape[1] > 1 else torch.ones(5).bool()
    best = torch.from_numpy(theirs.predict(query.numpy()))
    assert torch.equal(found.argmax(1)[clear], best[clear])


def test_all_features_are_stored_and_each_is_its_own_nearest_neighbour():
    learner, stream = toy(KNN(k=1), range(3))
    strategy = learner.strategies["method"]
    x, y, _ = TaskData.concat([task.train for task in stream]).tensors()
    expected = F.normalize(learner.backbone(learner.prepare(x)), dim=1)
    torch.testing.assert_close(strategy.features, expected)
    assert torch.equal(strategy.labels, y) and int(strategy.stored) == 3 * 48
    assert torch.equal(strategy.predict(learner, learner.prepare(x)).argmax(1), y)
    assert same(trunk(learner), trunk(toy(None)[0])), "nothing is trained"
    assert_rows_are_independent(learner, stream)


def test_only_what_was_stored_so_far_votes():
    learner, stream = toy(KNN(k=1000), [0])
    out = learner.strategies["method"].predict(learner, all_rows(learner, stream))
    assert bool((out[:, 2:] == torch.tensor(-1 / 3)).all())
    assert bool((out[:, :2].floor() == 24).all()), "k is cut to the number of stored examples"


def test_sixteen_bits_halve_what_resources_count_and_change_little():
    bytes_of = {}
    for float16 in (True, False):
        (learner, stream), resources = toy_learner({"method": KNN(float16=float16)}), Resources()
        Experiment(learner, stream, trainer, instruments={"resources": resources}).run()
        bytes_of[float16] = resources.column("state_bytes")[-1]
    assert bytes_of[True] == 3 * 48 * (16 * 2 + 8) + 8, "features of 16 numbers, a label each, and their number"
    assert bytes_of[False] - bytes_of[True] == 3 * 48 * 16 * 2
    (half, stream), (full, _) = (toy(KNN(float16=float16), range(3)) for float16 in (True, False))
    view = all_rows(half, stream)
    one, other = (run.strategies["method"].predict(run, view) for run in (half, full))
    assert float((one.argmax(1) == other.argmax(1)).float().mean()) > 0.95


def test_knn_refuses_no_neighbours():
    with pytest.raises(InputError, match=r"knn\.k=0 must be 1 or more"):
        KNN(k=0)
