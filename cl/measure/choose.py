"""The instruments of a run: the built-in ones that the settings ask for, and the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cl.data.task import Stream
from cl.engine.instrument import Instrument
from cl.errors import InputError
from cl.measure.learning_curves import LearningCurves
from cl.measure.resources import Resources
from cl.rundir import ESTIMATES, LEARNING_CURVES, RESOURCES, TRAINING, TRANSFER

_NAMES = ("resources", "curves", "probes", "estimates")  # reports find the built-in instruments by these names
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
    """Return the instruments of a run by name; that of the costs, `resources`, is always among them.

    Args:
        stream: The stream to learn.
        probes: Probes to fit on the frozen features after each task: "ridge", "knn", "cka".
        estimators: Estimators of transferability to compute before each task, see `cl.metrics.transferability`.
        every: Steps between two evaluations inside a task; give this or `points`, or none for no evaluations.
        points: The number of evaluations inside a task.
        subset: The most examples of each task for these evaluations, the probes and the estimators.
        flops: Whether to count operations.
        own: The user's own instruments, by name, which come last.

    Raises:
        InputError: If a probe or an estimator is unknown, or one of the user's instruments has the name or file of a
            built-in one.

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
