"""The instruments of a run, by what is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from cl.data.task import Stream
from cl.engine.instrument import Instrument
from cl.measure.learning_curves import LearningCurves
from cl.measure.resources import Resources


def chosen(
    stream: Stream,
    *,
    probes: Sequence[str] = (),
    estimators: Sequence[str] = (),
    every: int | None = None,
    points: int | None = None,
    subset: int = 1000,
    flops: bool = False,
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

    Raises:
        InputError: If there is no such probe or estimator.

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
    return found
