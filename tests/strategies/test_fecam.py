"""FeCAM: worked examples, a loop written by hand after the paper, and invariants."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl.data.task import TaskData
from cl.errors import InputError
from cl.strategies.fecam import FeCAM, correlations, shrink
from cl.testing import ToyBackbone, toy_stream
from draws import normal, quick, seeds
from prompted import all_rows, assert_rows_are_independent
from toys import Identity, build, float_stream, learn, same, toy, trunk


def test_worked_examples():
    """V1 = 3, V2 = 1. Shrunk by (1, 1/2): [[7, 1.5], [1.5, 5]], whose correlation is 1.5 / sqrt(35)."""
    S = shrink(torch.tensor([[4.0, 1.0], [1.0, 2.0]]), 1.0, 0.5)
    torch.testing.assert_close(S, torch.tensor([[7.0, 1.5], [1.5, 5.0]]))
    torch.testing.assert_close(correlations(S)[0, 1], torch.tensor(0.253546), rtol=0, atol=1e-6)


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 8), st.floats(0.1, 3), st.floats(0, 1))
def test_with_alpha2_up_to_alpha1_the_matrix_is_positive_definite(seed, N, D, alpha1, share):
    """Also if there are fewer examples than features, and some features never vary."""
    x = normal(seed, N + 1, D)
    x[:, D // 2 + 1 :] = 0
    S = torch.from_numpy(np.atleast_2d(np.cov(x.numpy().T)))
    for _ in range(2):
        S = shrink(S, alpha1, share * alpha1)
    assert float(torch.linalg.eigvalsh(correlations(S)).min()) > 1e-9
    torch.testing.assert_close(correlations(S).diagonal(), torch.ones(D, dtype=S.dtype))


def by_hand(features, y, query, *, tukey=0.5, alpha1=1.0, alpha2=1.0, normalize=True, common=False):
    """The equations of the header in numpy, class by class and entry by entry."""
    x, y = features.double().numpy(), y.numpy()
    classes = sorted(set(y.tolist()))
    within = [np.cov((x[y == c] ** tukey).T) for c in classes]
    if common:
        free = [(y == c).sum() - 1 for c in classes]
        within = [sum(n * S for n, S in zip(free, within, strict=True)) / sum(free)] * len(classes)
    scores = []
    for c, S in zip(classes, within, strict=True):
        D = len(S)
        for _ in range(2):
            V1 = np.mean([S[i, i] for i in range(D)])
            V2 = np.mean([S[i, j] for i in range(D) for j in range(D) if i != j])
            S = np.array([[S[i, j] + (alpha1 * V1 if i == j else alpha2 * V2) for j in range(D)] for i in range(D)])
        if normalize:
            S = np.array([[S[i, j] / np.sqrt(S[i, i] * S[j, j]) for j in range(D)] for i in range(D)])
        inverse, mean = np.linalg.pinv(S), x[y == c].mean(0) ** tukey
        row = []
        for q in query.double().numpy() ** tukey:
            d = q / np.linalg.norm(q) - mean / np.linalg.norm(mean)
            row.append(-d @ inverse @ d)
        scores.append(row)
    return torch.tensor(np.array(scores).T)


OPTIONS = [
    {},
    {"tukey": 1.0},
    {"alpha1": 2.0, "alpha2": 0.0},
    {"normalize": False},
    {"common": True},
    {"common": True, "normalize": False, "tukey": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fecam_is_the_loop_written_by_hand(options):
    learner, stream = toy(FeCAM(**options), range(3), eval_batch_size=13)
    x, y, _ = TaskData.concat([task.train for task in stream]).tensors()
    view = all_rows(learner, stream)
    features, query = (learner.backbone(v).detach() for v in (learner.prepare(x), view))
    ours = learner.strategies["method"].predict(learner, view)
    expected = by_hand(features, y, query, **options).float()
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(ours.argmax(1), expected.argmax(1))
    assert same(trunk(learner), trunk(toy(None)[0])), "nothing is trained"
    if not options:
        assert_rows_are_independent(learner, stream)


@pytest.mark.parametrize("common", [False, True])
def test_neither_batches_nor_the_order_of_tasks_matter_also_if_classes_come_again(common):
    base, found = toy_stream(3, "domain"), []
    for order, size in zip(permutations(range(3)), (None, 1, 2, 5, 7, 100), strict=True):
        parts = [base[i].train.tensors() for i in order]
        stream = float_stream([p[0] for p in parts], [p[1] for p in parts], "domain")
        torch.manual_seed(0)
        learner = learn(build(stream, ToyBackbone(), FeCAM(common=common), eval_batch_size=size), stream)
        found.append(learner.strategies["method"].state_dict())
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_new_sums_or_loaded_ones_give_new_inverses():
    learner, stream = toy(FeCAM(), [0])
    strategy = learner.strategies["method"]
    first = strategy.inverses()
    assert strategy.inverses() is first and sorted(first) == [0, 1]
    learn(learner, stream, [1])
    assert sorted(strategy.inverses()) == [0, 1, 2, 3]
    other = toy(FeCAM(), [2])[0].strategies["method"]
    strategy.load_state_dict(other.state_dict())
    assert sorted(strategy.inverses()) == [4, 5]
    torch.testing.assert_close(strategy.inverses()[4], other.inverses()[4])


def test_a_covariance_of_its_own_tells_apart_classes_that_means_do_not():
    """Two classes with nearly one mean: one varies along the first feature, the other along the second."""
    spread, y = 0.3 * normal(0, 4000, 3).float(), torch.arange(4000) % 2
    x = torch.ones(4000, 3) + spread * torch.tensor([[1.0, 0.05, 0.3], [0.05, 1.0, 0.3]])[y]
    x = x.abs() + 0.05
    stream = float_stream([x], [y])
    rate = {}
    for common in (False, True):
        learner = learn(
            build(stream, Identity(3), FeCAM(alpha1=0.01, alpha2=0.0, normalize=False, common=common)), stream
        )
        rate[common] = float((learner.strategies["method"].predict(learner, x).argmax(1) == y).float().mean())
    assert rate[False] > 0.75 and rate[True] < 0.6


def test_signs_stay_a_lone_example_is_enough_and_what_cannot_be_is_refused():
    strategy = FeCAM()
    torch.testing.assert_close(strategy.power(torch.tensor([-4.0, 0.0, 9.0])), torch.tensor([-2.0, 0.0, 3.0]))
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    stream = float_stream([x], [y], num_classes=3)
    learner = learn(build(stream, Identity(2), strategy), stream)
    out = strategy.predict(learner, x)
    torch.testing.assert_close(out[:, :2], torch.tensor([[0.0, -2.0], [-2.0, 0.0]]))  # Euclidean, squared
    assert bool((out[:, 2] == -1e9).all()), "a class without examples is farthest"
    with pytest.raises(InputError, match=r"fecam\.alpha1=0\.0 must be above 0"):
        FeCAM(alpha1=0.0)
    with pytest.raises(InputError, match=r"fecam\.tukey=2\.0 must be"):
        FeCAM(tukey=2.0)


def test_features_keep_their_direction_when_inputs_are_scaled():
    """Scores use lengths of 1, so that a feature vector twice as long is classified alike."""
    learner, stream = toy(FeCAM(), range(3))
    z = learner.backbone(all_rows(learner, stream)).detach()
    flat = float_stream([z], [torch.arange(len(z)) % 2])
    one = learn(build(flat, Identity(16), FeCAM()), flat)
    predict = one.strategies["method"].predict
    torch.testing.assert_close(predict(one, 2 * z), predict(one, z), rtol=1e-3, atol=1e-5)
