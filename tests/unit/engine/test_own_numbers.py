"""`learner.record`: a method's own numbers, averaged in steps and exact between them, whole after any interruption."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from cl.engine.experiment import Experiment
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.report.training import TrainingReport
from cl.rundir import TRAINING
from cl.testing import toy_learner
from cl.testing.toys import Halt, Halted, trainer


class Recorder(Strategy):
    """Records from every hook numbers that are known."""

    def before_task(self, learner, task):
        learner.record("begun", 10.0 * task.index)

    def loss(self, learner, batch, logits):
        learner.record("step", torch.tensor(float(learner.step)))
        return None

    def after_step(self, learner, batch, logits):
        if learner.step == 1:
            learner.record("first", 7)

    def after_epoch(self, learner, task, epoch):
        learner.record("epoch", epoch)

    def after_task(self, learner, task):
        learner.record("drift/sum", 0.25 + task.index)


def learned(directory: Path, *, halted: bool = False, epochs: int = 2, **options: Any) -> list[tuple[Any, ...]]:
    """Return what a run of two tasks records, in the order of the file."""

    def experiment(**more: Any) -> Experiment:
        learner, stream = toy_learner({"recorder": Recorder()}, num_tasks=2, chunk_size=1, log_every=4, **options)
        report = TrainingReport()
        return Experiment(
            learner,
            stream,
            trainer,
            epochs=epochs,
            directory=directory,
            reports=[report],
            logger=[report.logger],
            **more,
        )

    if halted:
        with suppress(Halted):
            experiment(every=1, callbacks=[Halt()]).run()
    experiment().run()
    points = [tuple(point) for point in TRAINING.read(directory / "training.csv")]
    return [point for point in points if point[2].startswith("record/")]


def test_every_number_is_written_where_it_belongs(tmp_path: Path):
    found = learned(tmp_path)  # 6 steps an epoch, 12 a task; a point of a curve is the mean of 4 steps
    for name, expected in {
        "record/begun": [(0, 1, 0.0), (12, 2, 10.0)],
        "record/step": [
            *((4, 1, 1.5), (8, 1, 5.5), (12, 1, 9.5)),  # the means of 0..3, 4..7, 8..11
            *((16, 2, 1.5), (20, 2, 5.5), (24, 2, 9.5)),
        ],
        "record/first": [(4, 1, 7.0), (16, 2, 7.0)],  # the mean over the steps that recorded it
        "record/epoch": [(6, 1, 0.0), (12, 1, 1.0), (18, 2, 0.0), (24, 2, 1.0)],
        "record/drift/sum": [(12, 1, 0.25), (24, 2, 1.25)],
    }.items():
        assert [(step, task, value) for step, task, at, value in found if at == name] == expected, name
    assert [step for step, *_ in found] == sorted(step for step, *_ in found)


def test_it_is_whole_after_a_run_that_was_stopped_inside_a_task(tmp_path: Path):
    assert learned(tmp_path / "stopped", halted=True) == learned(tmp_path / "whole")


def test_a_task_without_training_is_recorded_too(tmp_path: Path):
    found = learned(tmp_path, epochs=0)
    assert [(name, value) for _, _, name, value in found] == [
        *(("record/begun", 0.0), ("record/drift/sum", 0.25)),
        *(("record/begun", 10.0), ("record/drift/sum", 1.25)),
    ]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("two words", 1.0, "choose a name of letters"),
        ("alpha", torch.zeros(2), r"takes one number, not a tensor \(2,\)"),
        ("alpha", "high", "give a number"),
        ("alpha", True, "give a number"),
    ],
)
def test_what_is_no_number_is_refused(name, value, sentence):
    learner, _ = toy_learner()
    with pytest.raises(InputError, match=sentence):
        learner.record(name, value)
