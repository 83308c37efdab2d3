"""Tasks that hide their labels: no hook can read them, instruments and R can."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import cl
from cl.compose import hide_labels, permute
from cl.data.task import Task, TaskData
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.measure.prequential import Prequential
from cl.strategies.er import ER
from cl.testing import check_strategy, toy_learner, toy_stream
from cl.testing.toys import trainer


class Entropy(Strategy):
    """Learns where labels are given, and lowers the entropy of its predictions where they are not."""

    needs_labels = False
    scenarios = ("domain",)

    def criterion(self, learner, batch, logits):
        if bool((batch.y >= 0).all()):
            return learner.criterion(logits, batch)
        log_p = learner.mask(logits, batch.task).log_softmax(1)
        return -(log_p.exp() * log_p.clamp_min(-100)).sum(1).mean()


def hidden_stream(tasks=(1,)):
    return hide_labels(toy_stream(3, "domain"), tasks)


def learner_on(stream, strategies):
    body = toy_learner(num_tasks=3, scenario="domain")[0].backbone
    return Learner(stream, body, strategies, partial(torch.optim.SGD, lr=0.1), batch_size=8)


class Spy(Strategy):
    """Collects all labels that any hook can read."""

    needs_labels = False
    scenarios = ("domain",)

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}

    def see(self, task: int, y) -> None:
        self.seen[task] |= set(y.tolist())

    def setup(self, learner, stream):
        for task in stream:
            self.see(task.index, task.train.labels)
            assert task.classes == (0, 1), "which classes there are is no secret"

    def before_task(self, learner, task):
        self.see(task.index, task.train.labels)

    def after_task(self, learner, task):
        self.see(task.index, task.train.labels)

    def training_data(self, learner, task):
        self.see(task.index, task.train.labels)
        return task.train

    def after_epoch(self, learner, task, epoch):
        self.see(task.index, task.train.labels)

    def extend_batch(self, learner, batch):
        self.see(learner.task_index, batch.y)
        if batch.host is not None:
            self.see(learner.task_index, batch.host[0])
        return batch

    def criterion(self, learner, batch, logits):
        self.see(learner.task_index, batch.y)
        return logits.square().mean()

    def after_step(self, learner, batch, logits):
        self.see(learner.task_index, batch.y)


def test_no_hook_can_read_them():
    spy, stream = Spy(), hidden_stream()
    Experiment(learner_on(stream, {"spy": spy}), stream, trainer, epochs=1).run()
    assert spy.seen == {0: {0, 1}, 1: {-1}, 2: {0, 1}}


def test_instruments_and_R_see_the_truth():
    truth: list[int] = []

    class Sees(cl.Instrument):
        def before_step(self, learner, batch):
            truth.extend(batch.y.tolist())

        def after_step(self, learner, batch, logits):
            rows = learner.task.train.labels[torch.from_numpy(batch.rows)]
            assert batch.y.equal(rows)

    stream = hidden_stream()
    own = {"sees": Sees(), "prequential": Prequential()}
    experiment = Experiment(learner_on(stream, {"entropy": Entropy()}), stream, trainer, epochs=1, instruments=own)
    experiment.run()
    assert set(truth) == {0, 1} and len(truth) == 3 * 48
    shares = [record[5] for record in own["prequential"].records()]
    assert len(shares) == 3 and shares[1] > 0.2, "counted against the labels, not against -1"
    assert torch.isfinite(experiment.run_view.primary.R).all()


def test_the_result_depends_on_no_hidden_label():
    found = []
    for turned in (False, True):
        stream = hidden_stream()
        if turned:
            data = stream[1].train
            other = TaskData(data.x, 1 - data.y, data.task, data.index)
            task = Task(1, other, stream[1].test, hidden=True)
            whole = stream
            stream = whole.derive(lambda t, whole=whole, task=task: task if t == 1 else whole[t])
        learner = learner_on(stream, {"entropy": Entropy()})
        Experiment(learner, stream, trainer, epochs=1).run()
        found.append(torch.cat([p.detach().flatten() for p in learner.parameters()]))
    assert torch.equal(*found)


def test_the_entropy_falls_on_the_task_without_labels():
    """The mean entropy after the task is below that before it, on the same examples."""
    values: list[float] = []

    class Mean(Entropy):
        def before_task(self, learner, task):
            self.note(learner, task)

        def after_task(self, learner, task):
            self.note(learner, task)

        def note(self, learner, task):
            if task.index == 1:
                with torch.no_grad(), learner.evaluating():
                    p = learner(learner.prepare(task.train.tensors()[0])).softmax(1)
                values.append(float(-(p * p.log()).sum(1).mean()))

    stream = hidden_stream()
    Experiment(learner_on(stream, {"mean": Mean()}), stream, trainer, epochs=2).run()
    assert values[1] < values[0]


def test_methods_that_learn_from_labels_are_refused_before_anything_is_written(tmp_path: Path):
    for strategies, name in (([], "fine-tuning"), ([ER()], "ER"), ([Entropy(), ER()], "ER")):
        with pytest.raises(InputError, match=f"Task 2 of .* hides its labels, and {name} learns from labels"):
            cl.run(hidden_stream(), strategies, epochs=1, progress=False, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_strategy_that_would_look_is_caught():
    class Looks(Entropy):
        def criterion(self, learner, batch, logits):
            y = learner.task.train.labels[torch.from_numpy(batch.rows)]
            return torch.nn.functional.cross_entropy(logits[: len(y)], y)

    check_strategy(Entropy)
    with pytest.raises(AssertionError, match="depend on labels that the task hides"):
        check_strategy(Looks)


def test_the_tasks_are_chosen_by_position():
    stream = toy_stream(3, "domain")
    assert [t.hidden for t in hide_labels(stream)] == [False, True, True]
    assert [t.hidden for t in hide_labels(stream, [0])] == [True, False, False]
    assert [t.hidden for t in permute(hide_labels(stream))] == [False, True, True]
    with pytest.raises(InputError, match="there is no task 3"):
        hide_labels(stream, [3])


def test_references_see_the_labels(tmp_path: Path):
    body = toy_learner(num_tasks=3, scenario="domain")[0].backbone
    options = {"epochs": 1, "progress": False, "trainer": {"accelerator": "cpu"}, "references": ["experts", "joint"]}
    run, shown = (
        cl.run(stream, Entropy(), body, reference_dir=tmp_path / folder, **options)
        for folder, stream in (("hidden", hidden_stream()), ("shown", toy_stream(3, "domain")))
    )
    for kind in ("experts", "joint"):
        assert [one["value"] for one in run.references[kind]] == [one["value"] for one in shown.references[kind]]


def test_tasks_that_blend_cannot_hide_labels():
    with pytest.raises(InputError, match="hides the labels of some tasks"):
        cl.streams.boundary_free(hidden_stream())
