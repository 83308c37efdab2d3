"""The checks for authors of instruments and scalars: each catches what it is there for."""

from __future__ import annotations

import math
import random

import pytest
import torch

from cl.engine.instrument import Instrument, watching
from cl.measure.estimators import Estimates
from cl.measure.learning_curves import LearningCurves
from cl.measure.probes import Probes
from cl.measure.resources import Resources
from cl.metrics.scalar import scalar
from cl.testing import check_instrument, check_scalar, toy_stream


class Online(Instrument):
    """Well made: a record a step, a running sum in a buffer."""

    file, columns = "online", ("step", "right")
    right: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("right", torch.zeros(()))

    def after_step(self, learner, batch, logits):
        self.right += (logits.argmax(1) == batch.y).sum()
        self.add((learner.total_steps, float(self.right)))

    def row(self, learner, after_task):
        with watching(learner):
            learner(torch.zeros(2, 1, 4, 4))


class Forgets(Online):
    """Its sum is lost by a kill."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = 0.0

    def after_step(self, learner, batch, logits):
        self.sum += float((logits.argmax(1) == batch.y).sum())
        self.add((learner.total_steps, self.sum))


class Draws(Online):
    def row(self, learner, after_task):
        torch.rand(1)


class DrawsInPython(Online):
    def after_task(self, learner, task):
        random.random()


class Evaluates(Online):
    def after_task(self, learner, task):
        learner.eval()


class Trains(Online):
    """A forward pass in training mode moves batch norm's statistics."""

    def after_step(self, learner, batch, logits):
        with torch.random.fork_rng(), torch.no_grad():
            learner(batch.view)


class Nudges(Online):
    def after_step(self, learner, batch, logits):
        with torch.no_grad():
            next(learner.head.parameters()).add_(1e-6)


class Stores(Online):
    def begin(self, learner):
        self.__dict__["learner"] = learner


class Ragged(Online):
    def records(self, start=0):
        yield from ((1.0,) for _ in self._records[start:])


class Misspelt(Online):
    def after_tasks(self, learner, task):
        pass


class Unplain(Online):
    """Keeps what no checkpoint loads."""

    def get_extra_state(self):
        return {"records": list(self._records), "what": Misspelt}


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Forgets, "other records after a kill"),
        (Draws, "Draws.row changes torch's global generator"),
        (DrawsInPython, "DrawsInPython.after_task changes Python's global generator"),
        (Evaluates, "Evaluates.after_task changes the modes"),
        (Trains, "Trains.after_step changes the state backbone.*running_mean"),
        (Nudges, "Nudges.after_step changes the state head"),
        (Stores, "keeps a reference to the learner"),
        (Ragged, "Ragged has the record"),
        (Misspelt, "no hook called after_tasks"),
        (Unplain, "cannot be kept as plain data"),
    ],
)
def test_a_broken_instrument_is_caught(kind, sentence):
    with pytest.raises(AssertionError, match=sentence):
        check_instrument(kind)


def test_good_instruments_pass():
    check_instrument(Online)
    stream = toy_stream(2)
    check_instrument(LearningCurves, stream=stream, points=3)
    check_instrument(Probes, stream=stream, kinds=["ridge", "cka"])
    check_instrument(Estimates, stream=stream, kinds=["vci"])
    clocks = ("seconds", "measuring_seconds", "peak_memory_bytes")
    check_instrument(Resources, ignore=clocks)


def spread(evidence):
    return evidence.R[-1].max() - evidence.R[-1].min()


def zero_for_unmeasured(evidence):
    return evidence.R[-1].nan_to_num(0.0).mean()


def doubled(evidence):
    return 2 + evidence.R[-1].mean()


def careless(evidence):
    evidence.R[0] = 0.0
    return evidence.R[-1].mean()


def drawn(evidence):
    return random.random()


def undefined(evidence):
    return math.nan


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (zero_for_unmeasured, "is 0 where R is unmeasured"),
        (doubled, r"is outside of its range, fraction, \[0, 1\]"),
        (careless, "careless changes R"),
        (drawn, "another number for the same run"),
        (undefined, "undefined for these numbers"),
    ],
)
def test_a_broken_scalar_is_caught(function, sentence):
    with pytest.raises(AssertionError, match=sentence):
        check_scalar(scalar(formula="f", source="a test")(function))


def test_good_scalars_pass():
    check_scalar(scalar(formula="max_j R[T,j] - min_j R[T,j]", source="a test")(spread))

    @scalar(formula="n", source="a test", scale="steps", needs=("instrument:online",))
    def online_steps(evidence):
        return len(evidence.records("online"))

    check_scalar(online_steps, instruments={"online": Online()})
    with pytest.raises(AssertionError, match="no instrument called online"):
        check_scalar(online_steps)
    with pytest.raises(AssertionError, match=r"spread.*is no scalar"):
        check_scalar(spread)
