"""Find run directories, and read their files; a file that cannot be read is reported in one sentence."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cl import rundir
from cl.errors import InputError
from cl.report.config_file import read_config
from cl.rundir import LEARNING_CURVES, RECORD, RESOURCES, TRAINING, TRANSFER, Cell, read_json, unreadable

Array = npt.NDArray[np.float64]
LOWER_IS_BETTER = {"ece"}  # metrics of cells; the files of runs have the direction of a scalar
_SUMMED = ("seconds", "measuring_seconds", "steps", "rows", "flops", "pass_flops")  # over the tasks of a run
COSTS = ("trials", "seconds", "steps", "flops")  # costs of a search, stored together with the values that it found
PROBES = {"ridge", "knn", "cka"}  # matrices of features have one of these in place of a mask


@dataclass(frozen=True)
class Entry:
    """A scalar of a run with its definition.

    Attributes:
        value: Its value, NaN if it is undefined.
        definition: Its formula, with the divisor.
        source: The paper that defines it.
        scale: Its unit and range, such as "fraction, [0, 1]".
        higher_is_better: Its direction.
        caveat: A remark that a reader of the value must know, or None.
        own: Whether it is a user's own scalar.
    """

    value: float
    definition: str = ""
    source: str = ""
    scale: str = "fraction"
    higher_is_better: bool = True
    caveat: str | None = None
    own: bool = False


@dataclass(frozen=True)
class Curve:
    """A number during training, such as the metric on one task: the steps of the run, and the values there."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Forecast:
    """An estimator's estimate for each task before it was learned, and the forward transfer that was measured.

    Attributes:
        estimate: The estimates (T,), NaN where there is none.
        forward_transfer: Forward transfer (T,), NaN for the first task.
        against: How forward transfer was measured, "experts" or "zero-shot".
    """

    estimate: tuple[float, ...]
    forward_transfer: tuple[float, ...]
    against: str


@dataclass
class RunFiles:
    """The content of the files of one run's directory; numbers that were not measured are absent.

    Attributes:
        directory: The run's directory.
        config: The resolved configuration, flat, with keys such as "strategy.er.memory_size".
        scenario: "class", "task" or "domain"; "" before the run has written a summary.
        num_tasks: Number of tasks, T.
        tasks_learned: Number of the last row of R, -1 before the first.
        task_names: Names of the tasks, in the order of the stream.
        order: Positions of the tasks in the order of learning.
        matrices: R (T + 1, T) by (mask, metric), NaN where unmeasured.
        scalars: Scalars by mask and name. The first mask is that of the scenario; scalars without a mask are under "".
        absent: For each scalar that could not be computed, the reason.
        curves: Learning curves by (mask, metric, task tested).
        records: The numbers that strategies and instruments recorded during training, by name.
        starts: Step of the run at which each task begins, if there are learning curves.
        forecasts: Forecasts by estimator.
        tuning: The protocol of tuning, the values that a search found by key, and its known costs; {} without a
            protocol.
        resources: Resources of the run: sums of seconds, steps, examples and FLOPs over the tasks, the largest peak of
            memory, and of others the value after the last task.
        notes: Notes of the run, a sentence each.
        versions: Versions of the software that it ran on.
        format: Version of the format of its files.
        stream: Name of the stream; "" before the run has written a summary.
        device: The device that it was trained on, such as "cuda"; "" if unknown.
        bound: "upper" or "lower" if it is a bound for the runs that it is compared with; else "".
    """

    directory: Path
    config: dict[str, Any]
    scenario: str = ""
    num_tasks: int = 0
    tasks_learned: int = -1
    task_names: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    matrices: dict[tuple[str, str], Array] = field(default_factory=dict)
    scalars: dict[str, dict[str, Entry]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    curves: dict[tuple[str, str, int], Curve] = field(default_factory=dict)
    records: dict[str, Curve] = field(default_factory=dict)
    starts: tuple[int, ...] = ()
    forecasts: dict[str, Forecast] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    format: int = rundir.FORMAT
    stream: str = ""
    device: str = ""
    bound: str = ""

    @property
    def seed(self) -> str:
        """The seed as text, "" without one."""
        return str(self.config.get("seed", ""))

    @property
    def finished(self) -> bool:
        """Whether all tasks have been learned and evaluated."""
        return 0 < self.num_tasks <= self.tasks_learned and bool(self.scalars)


def find_runs(directories: Sequence[str | Path]) -> list[Path]:
    """Return the run directories among the given ones and inside them, each once, in natural order of their names.

    Hidden folders are skipped.

    Raises:
        InputError: If a directory does not exist, or holds no run.
    """
    found: dict[Path, Path] = {}
    for given in map(Path, directories):
        if not given.is_dir():
            raise InputError(f"There is no directory {given}: give a run directory, or a folder that contains some.")
        here = [path for path in _walk(given) if rundir.is_run(path)]
        if not here:
            names = f"{rundir.CONFIG} and {TRANSFER.name}"
            raise InputError(f"No run was found in {given}: a run directory holds {names}.")
        found |= {path.resolve(): path for path in here if path.resolve() not in found}
    return list(found.values())


def _walk(top: Path) -> Iterator[Path]:
    for folder, below, _ in os.walk(top):
        below[:] = sorted((name for name in below if not name.startswith(".")), key=_natural)
        yield Path(folder)


def _natural(name: str) -> tuple[float, str]:
    """Return a sort key that puts "10_b" after "9_a", and names that do not begin with a number last."""
    head = name[: len(name) - len(name.lstrip("0123456789"))]
    return (int(head) if head else math.inf, name)


def read_run(directory: Path) -> RunFiles:
    """Return the content of the files in one run directory.

    Raises:
        InputError: If a file in it cannot be read, or a later version of clsim has written it.
    """
    rundir.refuse_later(directory)
    config = read_config(directory / rundir.CONFIG, "mend the file, or leave its run out")
    run = RunFiles(directory, flatten(config), format=rundir.format_of(directory))
    for name, read in (  # the summary first: it says how many tasks there are
        (rundir.SUMMARY, _read_summary),
        (TRANSFER.name, _read_matrices),
        (LEARNING_CURVES.name, _read_curves),
        (TRAINING.name, _read_records),
        (RESOURCES.name, _read_resources),
        (rundir.MANIFEST, _read_manifest),
    ):
        if (directory / name).exists():
            read(run, directory / name)
    return run


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration as one level with dotted keys; a list is one value.

    Example:
        >>> flatten({"seed": 0, "strategy": {"er": {"memory_size": 200}}})
        {'seed': 0, 'strategy.er.memory_size': 200}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _entry(raw: dict[str, Any]) -> Entry:
    divisor = raw.get("divisor")
    return Entry(
        value=_value(raw.get("value")),
        definition=str(raw.get("definition") or "") + (f", divided by {divisor}" if divisor not in (None, "1") else ""),
        source=str(raw.get("source") or ""),
        scale=str(raw.get("scale") or "fraction"),
        higher_is_better=bool(raw.get("higher_is_better", True)),
        caveat=raw.get("caveat"),
        own="defined_in" in raw,
    )


def _value(raw: Any) -> float:
    return math.nan if raw is None else float(raw)


def _forecast(name: str, raw: dict[str, Any]) -> Forecast:
    guess, gain = (tuple(map(_value, raw[key])) for key in ("estimate", "forward_transfer"))
    if len(guess) != len(gain):
        raise ValueError(f"{name} has {len(guess)} estimates beside the forward transfer of {len(gain)} tasks")
    return Forecast(guess, gain, str(raw["against"]))


def _tuning(raw: dict[str, Any]) -> dict[str, Any]:
    costs = {name: float(raw[name]) for name in COSTS if raw.get(name) is not None}
    return {str(key): value for key, value in raw.items() if key not in COSTS} | costs


def _read_summary(run: RunFiles, path: Path) -> None:
    content = read_json(path)
    try:
        run.scenario = str(content["scenario"])
        run.stream, run.device, run.bound = (str(content.get(key) or "") for key in ("stream", "device", "bound"))
        run.num_tasks, run.tasks_learned = int(content["num_tasks"]), int(content["tasks_learned"])
        run.task_names = tuple(map(str, content["task_names"]))
        run.order = tuple(map(int, content.get("order") or ()))
        run.notes = tuple(map(str, content.get("notes") or ()))
        for mask, body in content["masks"].items():
            run.scalars[mask] = {name: _entry(raw) for name, raw in body["scalars"].items()}
        if content.get("measures"):
            run.scalars[""] = {name: _entry(raw) for name, raw in content["measures"].items()}
        run.forecasts = {str(name): _forecast(name, raw) for name, raw in (content.get("forecasts") or {}).items()}
        run.tuning = _tuning(content.get("tuning") or {})
        run.absent = {str(name): str(why) for name, why in (content.get("absent") or {}).items()}
    except KeyError as error:
        raise unreadable(path, f"it lacks {error.args[0]!r}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise unreadable(path, error) from error


def _read_matrices(run: RunFiles, path: Path) -> None:
    cells: dict[tuple[str, str], list[Cell]] = {}
    for cell in TRANSFER.read(path):
        outside = run.num_tasks and max(cell.after_task, cell.task) > run.num_tasks
        if cell.after_task < 0 or cell.task < 1 or outside:
            where = f"({cell.after_task}, {cell.task})"
            raise unreadable(path, f"it has a cell {where} in a stream of {run.num_tasks} tasks")
        cells.setdefault((cell.mask, cell.metric), []).append(cell)
    if cells and not run.num_tasks:  # no scalars yet: R is as wide as what was tested
        run.num_tasks = max(cell.task for part in cells.values() for cell in part)
        run.tasks_learned = max(cell.after_task for part in cells.values() for cell in part)
    for key, part in cells.items():
        run.matrices[key] = np.full((run.num_tasks + 1, run.num_tasks), math.nan)
        for cell in part:
            run.matrices[key][cell.after_task, cell.task - 1] = cell.value


def _read_curves(run: RunFiles, path: Path) -> None:
    points: dict[tuple[str, str, int], dict[int, float]] = {}
    starts: dict[int, int] = {}
    for point in LEARNING_CURVES.read(path):
        starts.setdefault(point.task, point.total_step)
        # a task's last point and step 0 of the next task have the same step of the run: the later line is kept
        points.setdefault((point.mask, point.metric, point.tested), {})[point.total_step] = point.value
    run.starts = tuple(starts[task] for task in sorted(starts))
    for key, curve in points.items():
        steps = sorted(curve)
        run.curves[key] = Curve(tuple(steps), tuple(curve[step] for step in steps))


def _read_records(run: RunFiles, path: Path) -> None:
    points: dict[str, dict[int, float]] = {}
    for point in TRAINING.read(path):
        if point.name.startswith(RECORD) and math.isfinite(point.value):
            points.setdefault(point.name.removeprefix(RECORD), {})[point.step] = point.value
    run.records = {name: Curve(tuple(curve), tuple(curve.values())) for name, curve in points.items()}


def _read_resources(run: RunFiles, path: Path) -> None:
    tasks = list(RESOURCES.read(path))
    for name in RESOURCES.columns[1:]:
        values = [value for task in tasks if not math.isnan(value := getattr(task, name))]
        if values and name in _SUMMED:
            run.resources[name] = math.fsum(values)
        elif values:
            run.resources[name] = max(values) if name.startswith("peak") else values[-1]


def _read_manifest(run: RunFiles, path: Path) -> None:
    run.versions = {key: str(value) for key, value in (read_json(path).get("versions") or {}).items()}
