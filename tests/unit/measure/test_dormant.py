"""Dormant units, counted by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import cl
from cl.backbones.networks import MLP, SimpleCNN
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.measure.dormant import Dormant
from cl.testing import toy_stream
from cl.testing.toys import trainer


def measured(body, lr: float = 0.0, **options: float) -> list[tuple[float | int | str, ...]]:
    stream = toy_stream(2)
    learner = Learner(stream, body, {}, partial(torch.optim.SGD, lr=lr), batch_size=8)
    made = Experiment(learner, stream, trainer, epochs=1, instruments={"dormant": Dormant(**options)})
    made.run()
    return list(made.instruments["dormant"].records())


def test_units_that_never_react_are_dormant():
    body = MLP((1, 4, 4), [10, 4])
    with torch.no_grad():
        body[1].weight.fill_(1.0)
        body[1].bias.zero_()
        body[1].weight[:3].fill_(-1.0)  # inputs are positive: three of ten never react
        body[1].weight[3].fill_(0.01)  # s = 0.01 / (6.01 / 10): dormant at 0.025, not at 0
        body[3].weight.fill_(1.0)
    expected = [(1, 0, 14, 4 / 14), (1, 1, 10, 0.4), (1, 2, 4, 0.0)]
    found = measured(body)
    assert found[:3] == [pytest.approx(record) for record in expected] and len(found) == 6
    assert measured(body, threshold=0.0)[1][3] == pytest.approx(0.3)


def test_channels_are_averaged_over_positions_and_a_dead_layer_is_all_dormant():
    body = SimpleCNN((1, 4, 4), (5, 3), 4)
    with torch.no_grad():
        body[0].weight[1] = 0.0
        body[0].bias[1] = -1.0
        body[3].weight.zero_()
        body[3].bias.fill_(-1.0)
    found = measured(body)
    assert [record[2] for record in found[:4]] == [12, 5, 3, 4]
    assert found[1][3] >= 0.2 and found[2][3] == 1.0


def test_it_only_looks():
    cl.check_instrument(Dormant)
