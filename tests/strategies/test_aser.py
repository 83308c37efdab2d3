"""ASER: exact Shapley values, what is replayed, and what is stored."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl.engine.batch import Batch
from cl.errors import InputError
from cl.random import Random
from cl.strategies.aser import ASER
from cl.toolkit.shapley import knn_shapley, some_of_each
from draws import quick, seeds
from toys import toy


def by_definition(x, y, candidates, labels, k):
    """The average gain over all subsets of the others, of the worth as it is defined."""
    m = len(labels)

    def worth(some):
        nearest = sorted(some, key=lambda i: abs(float(candidates[i] - x)))[:k]
        return sum(int(labels[i]) == int(y) for i in nearest) / k

    return [
        sum(
            (worth([*some, i]) - worth(some)) / (m * comb(m - 1, size))
            for size in range(m)
            for some in combinations([j for j in range(m) if j != i], size)
        )
        for i in range(m)
    ]


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 5))
def test_shapley_values_are_those_of_the_definition(seed, m, k):
    draw = torch.Generator().manual_seed(seed)
    x, candidates = torch.randn(2, 1, generator=draw), torch.randn(m, 1, generator=draw)
    y, labels = (torch.randint(2, (n,), generator=draw) for n in (2, m))
    found = knn_shapley(x, y, candidates, labels, k)
    expected = [by_definition(x[j], y[j], candidates, labels, k) for j in range(2)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=1e-5)


@quick
@given(seeds, st.integers(1, 3))
def test_some_of_each_class_are_drawn_once(seed, size):
    random = Random()
    random.seed(seed)
    labels = np.array([0, 2, 2, 0, 2, 5, 2])
    first = some_of_each(labels, size, random)
    second = some_of_each(labels, size, random, without=first)
    assert len({*first, *second}) == len(first) + len(second)
    for c, number in ((0, 2), (2, 4), (5, 1)):
        assert (labels[first] == c).sum() == min(size, number)
        assert (labels[second] == c).sum() == min(size, max(number - size, 0))


def full(**options):
    """A learner of two tasks whose memory is full, and minibatches of the third."""
    learner, stream = toy(ASER(12, **options), range(2))
    learner.before_task(stream[2])
    return learner, learner.strategies["method"], Batch(*stream[2].train.tensors()).take(slice(6))


def features(learner, x):
    with torch.no_grad():
        return learner.backbone(x.float() / 255)


@pytest.mark.parametrize("score", ["mean", "extreme"])
def test_replayed_are_those_of_the_largest_adversarial_value(score):
    learner, method, batch = full(batch_size=3, score=score)
    draws = Random()
    draws.load_state_dict(method.random.state_dict())
    labels = method.memory.column("y").numpy()
    among = some_of_each(labels, 2, draws)
    others = some_of_each(labels, 2, draws, without=among)
    cand, rest = method.memory.at(among), method.memory.at(others)
    cooperative = knn_shapley(features(learner, rest.x), rest.y, features(learner, cand.x), cand.y, 3)
    adversarial = knn_shapley(features(learner, batch.x), batch.y, features(learner, cand.x), cand.y, 3)
    if score == "mean":
        value = cooperative.mean(0) - adversarial.mean(0)
    else:
        value = cooperative.max(0).values - adversarial.min(0).values
    found = method.extend_batch(learner, batch)
    expected = cand.x[value.argsort(descending=True, stable=True)[:3]]
    assert found.num_incoming == 6 and torch.equal(found.x[6:], expected)


def test_an_example_that_is_stored_was_worth_more_than_the_one_it_replaces():
    learner, method, batch = full()
    before = method.memory.rows()
    worth, judge = [], method._worth
    method._worth = lambda *args: worth.append((args[1:], judge(*args))) or worth[-1][1]
    slots = method._slots(learner, batch)
    ((judges, candidates), values), total = worth[0], worth[0][1].sum(0)
    n = len(candidates) - 6
    new = np.flatnonzero(slots >= 0)
    assert len(new) and len(set(slots[new])) == len(new)
    gone = [next(i for i in range(n) if torch.equal(candidates.x[i], before.x[s])) for s in slots[new]]
    assert float(total[n + torch.from_numpy(new)].min()) >= float(total[gone].max())
    kept = [i for i in range(n) if i not in gone]
    left = [n + i for i in range(6) if i not in new]
    assert not kept or not left or float(total[kept].min()) >= float(total[left].max())
    assert len(judges) >= 8 - 4 and values.shape == (len(judges), len(candidates))


def test_all_is_stored_while_there_is_room_and_new_classes_come_in_later():
    learner, stream = toy(ASER(40), [0])
    memory = learner.strategies["method"].memory
    assert len(memory) == 40 and set(memory.column("y").tolist()) == {0, 1}
    rows = {x.numpy().tobytes() for x in stream[0].train.tensors()[0]}
    assert len({x.numpy().tobytes() for x in memory.rows().x} & rows) == 40
    learner, _ = toy(ASER(20), range(3), epochs=2)
    memory = learner.strategies["method"].memory
    assert len(set(memory.column("y").tolist())) >= 4 and len(memory) == 20


def test_aser_refuses_a_score_that_it_does_not_know():
    with pytest.raises(InputError, match="score"):
        ASER(score="median")
