"""Prequential accuracy: every example is scored once, by the prediction before the step that learns it."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import cl
from cl.data.task import Stream, Task, TaskData
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.measure.prequential import Prequential
from cl.testing import toy_learner
from cl.testing.toys import Halt, Halted, trainer

quick = partial(cl.run, [], progress=False, trainer={"accelerator": "cpu"}, epochs=1)


class Plain(nn.Module):
    num_features = 2

    def forward(self, x):
        return x


def two_examples(same: bool) -> tuple[Learner, Stream]:
    """Two examples on the two axes, of class 0 and of class 1 (or both of class 0); logits begin at zero."""
    data = TaskData(torch.eye(2), torch.tensor([0, 0 if same else 1]))
    both = TaskData(torch.eye(2), torch.tensor([0, 1]))
    stream = Stream([Task(0, data, both if not same else data)], num_classes=2, boundaries=False, scenario="domain")
    head = nn.Linear(2, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return Learner(stream, Plain(), {}, partial(torch.optim.SGD, lr=1.0), head=head, batch_size=1), stream


@pytest.mark.parametrize("same", [True, False])
def test_two_examples_by_hand(same):
    """Without boundaries the order is that of the data.

    Logits (0, 0) predict class 0, which is right. The step moves the biases by (1/2, -1/2), so that class 0 is
    predicted for the second example: right if both are of class 0, wrong else. A prediction after its own step would
    be right in both cases.
    """
    learner, stream = two_examples(same)
    experiment = Experiment(learner, stream, trainer, epochs=1, instruments={"prequential": Prequential(every=1)})
    experiment.run()
    second = 1.0 if same else 0.0
    assert list(experiment.instruments["prequential"].records()) == [
        (1, 1, 1, 1, 1.0, 1.0, 1.0),
        (1, 2, 2, 1, second, (1 + second) / 2, (1 + second) / 2),
    ]
    assert experiment.run_view.measured()["prequential_accuracy"] == (1 + second) / 2


class Anticipates(Strategy):
    """Predicts by the head with its signs turned, which the training logits do not show."""

    def predict(self, learner, view):
        return -learner(view)


@pytest.mark.parametrize(
    ("options", "strategy"), [({}, None), ({"evaluation": True}, None), ({}, Anticipates)], ids=str
)
def test_it_agrees_with_predictions_of_our_own_before_each_step(options, strategy):
    """An independent count: `predict` on the incoming batch in `extend_batch`, before any step on it."""
    right: list[int] = []

    class Count(Strategy):
        def extend_batch(self, learner, batch):
            if learner.current_epoch == 0:
                with torch.no_grad():
                    logits = learner.predict(batch)
                right.extend((learner.mask(logits, batch.task).argmax(1) == batch.y).int().tolist())
            return batch

    strategies = {"count": Count(), **({"own": strategy()} if strategy else {})}
    learner, stream = toy_learner(strategies, num_tasks=3)
    experiment = Experiment(
        learner, stream, trainer, epochs=2, instruments={"prequential": Prequential(every=4, **options)}
    )
    experiment.run()
    rows = list(experiment.instruments["prequential"].records())
    assert [row[:4] for row in rows] == [
        (t, s, 12 * (t - 1) + s, 8 * n) for t in (1, 2, 3) for s, n in ((4, 4), (6, 2))
    ]
    spans = [(a + 48 * t, b + 48 * t) for t in range(3) for a, b in ((0, 32), (32, 48))]
    for row, (begin, end) in zip(rows, spans, strict=True):
        start = 48 * (row[0] - 1)
        means = [sum(part) / len(part) for part in (right[begin:end], right[start:end], right[:end])]
        assert row[4:] == pytest.approx(means, abs=1e-12)
    scalars = experiment.run_view.measured()
    assert scalars["prequential_accuracy"] == pytest.approx(sum(right) / len(right))
    assert scalars["prequential_accuracy_by_task"] == pytest.approx(
        sum(sum(right[48 * t : 48 * t + 48]) / 48 for t in range(3)) / 3
    )


def test_measuring_it_changes_nothing_of_the_run():
    weights = []
    for own in ({}, {"prequential": Prequential()}, {"prequential": Prequential(evaluation=True)}):
        learner, stream = toy_learner(backbone="restless", num_tasks=2)
        Experiment(learner, stream, trainer, epochs=1, instruments=own).run()
        weights.append(torch.cat([p.flatten() for p in learner.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_its_counts_survive_a_stop_inside_a_task(tmp_path: Path):
    found = []
    for name in ("whole", "stopped"):
        for halted in [True, False] if name == "stopped" else [False]:
            learner, stream = toy_learner(num_tasks=2, chunk_size=1)
            options = {"every": 1, "callbacks": [Halt()]} if halted else {}
            own = {"prequential": Prequential(every=5)}
            experiment = Experiment(
                learner, stream, trainer, epochs=2, directory=tmp_path / name, instruments=own, **options
            )
            with suppress(Halted):
                experiment.run()
        found.append(list(experiment.instruments["prequential"].records()))
    assert found[0] == found[1] and len(found[0]) == 4


def test_several_updates_on_a_batch_count_it_once():
    learner, stream = toy_learner(num_tasks=2, updates_per_batch=3)
    experiment = Experiment(learner, stream, trainer, epochs=1, instruments={"prequential": Prequential(every=6)})
    experiment.run()
    assert [row[3] for row in experiment.instruments["prequential"].records()] == [48, 48]


def test_targets_that_are_no_labels_are_refused():
    x, y = torch.zeros(8, 3), torch.zeros(8, 2)
    stream = Stream([Task(0, TaskData(x, y), TaskData(x, y))], num_classes=2, target="regression", scenario="domain")
    with pytest.raises(InputError, match="prequential counts right labels"):
        cl.run(stream, [], epochs=1, progress=False, instruments={"prequential": Prequential()})
