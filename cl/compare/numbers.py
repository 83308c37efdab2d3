"""All numbers of a comparison: the metrics of each run first, then their aggregates over runs.

The tables, the page and `comparison.csv` read the same list, so every number that is shown is in the file.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from typing import Any, TypeAlias

import numpy as np

from cl.compare.align import Comparison, Stage, Unit
from cl.compare.read import COSTS, Array, Curve, Entry, RunFiles
from cl.metrics.scalar import range_of_metric, range_of_scale
from cl.metrics.statistics import bounded, cell_intervals, t_interval
from cl.rundir import RECORD

Key: TypeAlias = tuple[str, str, str, str, str, str, str]


@dataclass(frozen=True)
class Number:
    """One row of `comparison.csv`.

    Attributes:
        kind: "group" (over the runs of a group), "run" (one run), "difference" (from the base, over shared units),
            "test" (against the best group), "rank" (over streams) or "forecast" (Kendall's tau over tasks and runs).
        stream: Name of the stream; "" for ranks.
        layout: Order of the tasks, if a stream has several; "" if the number is over all of them.
        group: Name of the group.
        base: The group that is subtracted or tested against; for a forward transfer, "experts" or "zero-shot".
        seed: The seed of a single run; else "".
        mask: The mask of competing classes; "" for quantities that depend on none.
        quantity: Name of a scalar, resource or metric.
        after_task: Number of tasks learned; None means all.
        task: Number of the task that is tested, from 1; None means all.
        step: Step of the run, for learning curves.
        mean: Mean over runs; for a single run, its value.
        sd: Standard deviation over runs (divisor n - 1).
        low: Lower end of the t interval.
        high: Upper end of the t interval.
        num: Number of runs, pairs, streams or points.
        p: p-value of the paired test, adjusted by Holm; or of tau.
    """

    kind: str
    stream: str
    layout: str
    group: str
    base: str
    seed: str
    mask: str
    quantity: str
    after_task: int | None = None
    task: int | None = None
    step: int | None = None
    mean: float = math.nan
    sd: float = math.nan
    low: float = math.nan
    high: float = math.nan
    num: int = 1
    p: float = math.nan


@dataclass
class Numbers:
    """All numbers of a comparison, found by stream, group, mask and quantity.

    Attributes:
        level: Confidence level of the intervals.
        rows: The numbers, in the order of `comparison.csv`.

    Example:
        >>> numbers = Numbers(level=0.95)
        >>> key = ("digits", "", "er", "", "", "class", "average_accuracy")
        >>> _ = numbers.add(Number("group", *key, mean=0.84, num=3))
        >>> numbers.one("digits", "er", "average_accuracy", "class").mean
        0.84
        >>> print(numbers.csv().splitlines()[1])
        group,digits,,er,,,class,average_accuracy,,,,0.84,,,,3,
    """

    level: float
    rows: list[Number] = field(default_factory=list)
    _index: dict[Key, list[Number]] = field(default_factory=dict)
    _runs: dict[tuple[str, str, str, str], list[Number]] = field(default_factory=dict)

    def add(self, number: Number) -> Number:
        """Add a number, and return it."""
        n = number
        self.rows.append(n)
        self._index.setdefault((n.kind, n.stream, n.layout, n.group, n.base, n.mask, n.quantity), []).append(n)
        if n.kind == "run":
            self._runs.setdefault((n.stream, n.group, n.mask, n.quantity), []).append(n)
        return n

    def runs(self, stream: str, group: str, quantity: str, mask: str) -> list[Number]:
        """Return the values of the single runs of a group, of all orders of tasks."""
        return self._runs.get((stream, group, mask, quantity), [])

    def find(
        self,
        stream: str,
        group: str,
        quantity: str,
        mask: str = "",
        kind: str = "group",
        layout: str = "",
        base: str = "",
    ) -> list[Number]:
        """Return all numbers of a quantity, in the order in which they were added."""
        return self._index.get((kind, stream, layout, group, base, mask, quantity), [])

    def one(self, stream: str, group: str, quantity: str, mask: str = "", **more: str) -> Number | None:
        """Return the number of a quantity over the whole stream, or None if it was not measured."""
        rows = self.find(stream, group, quantity, mask, **more)
        return next((n for n in rows if n.after_task is None and n.task is None and n.step is None), None)

    def csv(self) -> str:
        """Return the text of `comparison.csv`, in which unknown values are empty cells."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(column.name for column in fields(Number))
        for number in self.rows:
            table.writerow(_cell(value) for value in astuple(number))
        return text.getvalue()


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def summarise(comparison: Comparison, level: float, bases: Sequence[str]) -> Numbers:
    """Return scalars, resources, cells, curves and differences of every group on every stream.

    Args:
        comparison: The aligned runs, from `align`.
        level: Confidence level of the intervals, in (0, 1).
        bases: The groups whose matrices are subtracted from the others, cell by cell.
    """
    numbers = Numbers(level)
    for stage in comparison.stages:
        for group, units in stage.runs.items():
            _scalars(numbers, stage.name, group, units)
            _over_tasks(numbers, stage.name, group, units)
            for layout in stage.layouts:
                runs = list(stage.of(group, layout).values())
                _cells(numbers, stage.name, layout, group, runs)
                _curves(numbers, stage.name, layout, group, runs)
                _records(numbers, stage.name, layout, group, runs)
        for base in bases:
            for group in stage.runs:
                for layout in stage.layouts:
                    if group != base:
                        _differences(numbers, stage, layout, group, base)
    return numbers


def entries(run: RunFiles) -> dict[tuple[str, str], Entry]:
    """Return all scalars of a run by (mask, name), with its resources and the cost of its search."""
    found = {(mask, name): entry for mask, part in run.scalars.items() for name, entry in part.items()}
    more = {("", name): _resource(name, value) for name, value in run.resources.items() if ("", name) not in found}
    budget = {f"tuning_{name}": run.tuning[name] for name in COSTS if name in run.tuning}
    return found | more | {("", name): _resource(name, value) for name, value in budget.items()}


_RESOURCES = {
    "seconds": "seconds of training, summed over the tasks",
    "measuring_seconds": "seconds of evaluation, summed over the tasks",
    "rows": "examples trained on, counted once a pass, summed over the tasks",
    "pass_flops": "operations of one pass over each task's training data, summed over the tasks",
    "steps": "optimiser steps, summed over the tasks",
    "flops": "floating-point operations of training, summed over the tasks",
    "parameters": "parameters at the end",
    "state_bytes": "bytes of state other than parameters at the end",
    "memory_bytes": "bytes of the exemplar memory at the end",
    "stored_examples": "exemplars stored at the end",
    "peak_memory_bytes": "most bytes of memory in use at once",
    "tuning_trials": "trials of the search that chose the hyper-parameters, counted once for all runs that use them",
    "tuning_seconds": "seconds of training in all trials of that search",
    "tuning_steps": "optimiser steps in all trials of that search",
    "tuning_flops": "floating-point operations of training in all trials of that search",
}


def _resource(name: str, value: float) -> Entry:
    return Entry(value, _RESOURCES.get(name, f"{name} of the run"), "", "count", higher_is_better=False)


def order_of(run: RunFiles, units: Mapping[Unit, RunFiles]) -> str:
    """Return the order of a run's tasks if the runs of its group have several orders, else ""."""
    several = any(other.order != run.order for other in units.values())
    return "order " + ", ".join(str(i + 1) for i in run.order) if several else ""


def _scalars(numbers: Numbers, stream: str, group: str, units: Mapping[Unit, RunFiles]) -> None:
    values: dict[tuple[str, str], list[float]] = {}
    scales: dict[str, str] = {}
    for run in units.values():
        layout = order_of(run, units)
        for (mask, name), entry in entries(run).items():
            if math.isfinite(entry.value):
                values.setdefault((mask, name), []).append(entry.value)
                numbers.add(Number("run", stream, layout, group, "", run.seed, mask, name, mean=entry.value))
                scales[name] = entry.scale
    for (mask, name), part in values.items():
        found = vars(t_interval(part, numbers.level, *range_of_scale(scales[name])))
        numbers.add(Number("group", stream, "", group, "", "", mask, name, **found))


def _over_tasks(numbers: Numbers, stream: str, group: str, units: Mapping[Unit, RunFiles]) -> None:
    """Add the mean over the tasks learned, after each task; as one number of a run, it is averaged over orders."""
    values: dict[tuple[str, str, int], list[float]] = {}
    for run in units.values():
        for (mask, metric), R in run.matrices.items():
            for k in range(1, len(R)):
                mean = float(R[k, :k].mean())
                if math.isfinite(mean):
                    values.setdefault((mask, metric, k), []).append(mean)
    for (mask, metric, k), part in values.items():
        found = vars(t_interval(part, numbers.level, *range_of_metric(metric)))
        numbers.add(Number("group", stream, "", group, "", "", mask, f"average_{metric}", k, **found))


def _cells(numbers: Numbers, stream: str, layout: str, group: str, runs: Sequence[RunFiles]) -> None:
    for mask, metric in dict.fromkeys(key for run in runs for key in run.matrices):
        stack = [run.matrices[mask, metric] for run in runs if (mask, metric) in run.matrices]
        for after, column, found in _by_cell(stack, numbers.level, *range_of_metric(metric)):
            numbers.add(Number("group", stream, layout, group, "", "", mask, metric, after, column + 1, **found))


def _differences(numbers: Numbers, stage: Stage, layout: str, group: str, base: str) -> None:
    runs, others = stage.of(group, layout), stage.of(base, layout)
    pairs = [(runs[unit], others[unit]) for unit in runs if unit in others]
    for mask, metric in dict.fromkeys(key for run, _ in pairs for key in run.matrices):
        key = (mask, metric)
        stack = [a.matrices[key] - b.matrices[key] for a, b in pairs if key in a.matrices and key in b.matrices]
        least, most = range_of_metric(metric)
        for after, column, found in _by_cell(stack, numbers.level, least - most, most - least):
            of = (stage.name, layout, group, base, "", mask, metric, after, column + 1)
            numbers.add(Number("difference", *of, **found))


def _by_cell(
    stack: Sequence[Array], level: float, low: float, high: float
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield row, column and interval of each measured cell, from the matrices of the runs."""
    if not stack:
        return
    cells = vars(bounded(cell_intervals(np.stack(stack), level), low, high))
    for after, column in np.argwhere(cells["num"] > 0).tolist():
        yield after, column, {name: values[after, column].item() for name, values in cells.items()}


def _curves(numbers: Numbers, stream: str, layout: str, group: str, runs: Sequence[RunFiles]) -> None:
    """Add learning curves."""
    for key in dict.fromkeys(key for run in runs for key in run.curves):
        mask, metric, task = key
        curves = [run.curves[key] for run in runs if key in run.curves]
        for step, found in _by_step(curves, numbers.level, *range_of_metric(metric)):
            of = (stream, layout, group, "", "", mask, f"{metric}_curve", None, task, step)
            numbers.add(Number("group", *of, **found))


def _records(numbers: Numbers, stream: str, layout: str, group: str, runs: Sequence[RunFiles]) -> None:
    """Add the numbers that strategies and instruments recorded during training."""
    for name in dict.fromkeys(name for run in runs for name in run.records):
        curves = [run.records[name] for run in runs if name in run.records]
        for step, found in _by_step(curves, numbers.level, -math.inf, math.inf):
            numbers.add(Number("group", stream, layout, group, "", "", "", RECORD + name, None, None, step, **found))


def _by_step(curves: Sequence[Curve], level: float, low: float, high: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the steps that all curves have, so that all points are over the same runs, and the interval at each."""
    points = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    steps = sorted(set.intersection(*map(set, points)))
    cells = vars(bounded(cell_intervals([[curve[step] for step in steps] for curve in points], level), low, high))
    for i, step in enumerate(steps):
        yield step, {name: values[i].item() for name, values in cells.items()}
