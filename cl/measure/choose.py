"""The instruments of a run, by what is asked for, and those of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cl.data.task import Stream
from cl.engine.instrument import Instrument
from cl.errors import InputError
from cl.measure.learning_curves import LearningCurves
from cl.measure.resources import Resources
from cl.rundir import ESTIMATES, LEARNING_CURVES, RESOURCES, TRAINING, TRANSFER

_NAMES = ("resources", "curves", "probes", "estimates")  # under which reports look for those below
_FILES = {table.stem for table in (TRANSFER, TRAINING, LEARNING_CURVES, ESTIMATES, RESOURCES)}


def chosen(
    stream: Stream,
    *,
    probes: Sequence[str] = (),
    estimators: Sequence[str] = (),
    every: int | None = None,
    points: int | None = None,
    subset: int = 1000,
    flops: bool = False,
    own: Mapping[str, Instrument] | None = None,
) -> dict[str, Instrument]:
    """Return what is measured beside R, by name; what a task costs always is.

    Args:
        stream: What is learned.
        probes: Fitted anew on the frozen features after each task: "ridge", "knn", "cka".
        estimators: Forecasts of transfer before each task, see `cl.metrics.transferability`.
        every: Steps between two evaluations inside a task; or
        points: How many evaluations a task has.
        subset: Rows of each task that those, the probes and the estimators look at.
        flops: Whether operations are counted.
        own: Instruments of the user's own, by name, which come last.

    Raises:
        InputError: If there is no such probe or estimator, or an own instrument has the name or file of another.

    Example:
        >>> from cl.testing import toy_stream
        >>> list(chosen(toy_stream(), probes=["knn"], points=3))
        ['resources', 'curves', 'probes']
    """
    found: dict[str, Instrument] = {"resources": Resources(flops=flops)}
    if every is not None or points is not None:
        found["curves"] = LearningCurves(stream, every, points, subset)
    if probes:
        from cl.measure.probes import Probes

        found["probes"] = Probes(stream, probes, subset)
    if estimators:
        from cl.measure.estimators import Estimates

        found["estimates"] = Estimates(stream, estimators, subset)
    for name, instrument in (own or {}).items():
        _refuse_taken(name, instrument)
    return found | dict(own or {})


def _refuse_taken(name: str, instrument: Any) -> None:
    if name in _NAMES:
        raise InputError(f"An instrument cannot be called {name!r}, as a built-in one is: choose another name.")
    file = getattr(instrument, "file", "")
    if file in _FILES:
        raise InputError(
            f"The instrument {name!r} cannot write {file}.csv, which every run has or may have: give its class another "
            "`file`."
        )
