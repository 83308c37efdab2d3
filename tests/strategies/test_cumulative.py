"""Cumulative training: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

import pytest
import torch

from cl.strategies.cumulative import Cumulative
from toys import same, toy, trunk


@pytest.mark.parametrize("restart", [False, True])
def test_cumulative_trains_on_the_union_so_far(restart):
    learner, stream = toy(Cumulative(restart=restart))
    for t, task in enumerate(stream):
        x, y, label = learner.strategies["method"].training_data(learner, task).tensors()
        parts = [stream[i].train.tensors() for i in range(t + 1)]
        for got, columns in zip((x, y, label), zip(*parts, strict=True), strict=True):
            assert torch.equal(got, torch.cat(columns))


def test_cumulative_starts_from_the_last_weights_or_again_from_the_first():
    only_last = trunk(toy(Cumulative(restart=True), [2])[0])
    assert same(trunk(toy(Cumulative(restart=True), range(3))[0]), only_last), "earlier tasks leave no trace"
    assert not same(trunk(toy(Cumulative(), range(3))[0]), only_last)
