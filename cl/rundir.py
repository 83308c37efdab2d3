"""The run directory: the names of its files, the columns of its tables, and the version of its format.

Whoever writes or reads one of these files takes its name and its columns from here.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

from cl.errors import InputError

FORMAT = 2  # version of what is described here; stands in the manifest from 2 on

CONFIG = "config.yaml"  # the resolved configuration
COMMAND = "command.json"  # the overrides that the run was begun with
HYDRA = ".hydra"  # the same, where those who know Hydra look
PROVENANCE = "provenance.json"  # digests of data and code
MANIFEST = "manifest.json"  # format, versions and hardware, sitting by sitting
SUMMARY = "transfer.json"  # every scalar with its definition
REFERENCES = "references.json"  # what the run is compared with, one of each kind a task
RESULT = "result.json"  # the final averages; by this file a finished run is known
PICTURE = "transfer.png"  # accuracy, backward transfer, forward transfer and step effect
CURVES_PICTURE = "learning_curves.png"  # accuracy inside tasks
CHECKPOINTS = "checkpoints"  # directory: the states that a run goes on from
L2_LOG = "l2log"  # directory: the log files of l2metrics
LOCK = ".lock"  # held while the run is in progress, so that nobody else writes here
WANDB = "wandb"  # directory: what Weights & Biases is sent
WANDB_POINTS = "points.jsonl"  # in wandb: every point, a line each
WANDB_ID = "run_id.txt"  # in wandb: the name under which the run goes on there

_CHECKPOINT = re.compile(r"after_task_(\d+)\.ckpt|in_task_(\d+)_step_(\d+)\.ckpt")


class Cell(NamedTuple):
    """An entry of R: the metric on a task after so many tasks (0: the untrained learner)."""

    after_task: int
    task: int
    mask: str
    metric: str
    value: float


class TrainingPoint(NamedTuple):
    """A point of a training curve: steps over the stream, number of the task, name of the curve."""

    step: int
    task: int
    name: str
    value: float


class CurvePoint(NamedTuple):
    """The metric on a task tested while another is trained: steps into that task, and over the stream."""

    task: int
    step: int
    total_step: int
    tested: int
    mask: str
    metric: str
    value: float


class Estimate(NamedTuple):
    """What an estimator says of a task before it is trained."""

    task: int
    estimator: str
    value: float


class TaskCosts(NamedTuple):
    """What a task took, see `cl.measure.resources`; a run of an earlier version may lack columns."""

    task: int
    seconds: float = math.nan
    steps: float = math.nan
    flops: float = math.nan
    parameters: float = math.nan
    state_bytes: float = math.nan
    memory_bytes: float = math.nan
    stored_examples: float = math.nan
    peak_memory_bytes: float = math.nan
    measuring_seconds: float = math.nan
    rows: float = math.nan
    pass_flops: float = math.nan


Row = TypeVar("Row", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Table(Generic[Row]):
    """A CSV file with a header.

    Attributes:
        name: Of the file.
        row: A NamedTuple of int, float and str: one field a column. Columns with a default may be absent.

    Example:
        >>> TRANSFER.columns
        ('after_task', 'task', 'mask', 'metric', 'value')
        >>> TRANSFER.parse("3,1,class,accuracy,0.5").value
        0.5
    """

    name: str
    row: type[Row]

    @property
    def stem(self) -> str:
        """The name of the file without its ending."""
        return self.name.removesuffix(".csv")

    @cached_property
    def kinds(self) -> dict[str, type]:
        """The columns, and what stands in them."""
        return get_type_hints(self.row)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self.kinds)

    @property
    def header(self) -> str:
        """The first line."""
        return csv_text([self.columns])

    def parse(self, line: str) -> Row:
        """Return a row of text that has every column.

        Raises:
            ValueError: If it is no such row.
        """
        try:
            cells = next(csv.reader([line]), [])
        except csv.Error as error:
            raise ValueError(str(error)) from error
        return self._make([_value(kind, cell) for kind, cell in zip(self.kinds.values(), cells, strict=True)])

    def read(self, path: Path) -> Iterator[Row]:
        """Yield the rows of a file; a last line that is still being written is left out.

        Raises:
            InputError: If the file cannot be read, lacks a column, or a cell holds no number where one is due.
        """
        try:
            text = path.read_text(encoding="utf-8")
            lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
        except (OSError, ValueError, csv.Error) as error:
            raise unreadable(path, error) from error
        header = lines[0] if lines else []
        defaults: dict[str, Any] = getattr(self.row, "_field_defaults", {})
        absent = [name for name in self.columns if name not in header and name not in defaults]
        if absent:
            raise unreadable(path, f"it has no column {absent[0]!r}")
        for number, cells in enumerate(lines[1:], start=2):
            if len(cells) != len(header):
                raise unreadable(path, f"line {number} has not as many cells as the header")
            yield self._row(path, dict(zip(header, cells, strict=True)), defaults)

    def _row(self, path: Path, cells: dict[str, str], defaults: dict[str, Any]) -> Row:
        values = []
        for name, kind in self.kinds.items():
            try:
                values.append(_value(kind, cells[name]) if name in cells else defaults[name])
            except ValueError as error:
                raise unreadable(path, f"{cells[name]!r} stands in the column {name!r} instead of a number") from error
        return self._make(values)

    def _make(self, values: Sequence[Any]) -> Row:
        make: Any = self.row
        row: Row = make(*values)
        return row


TRANSFER = Table("transfer.csv", Cell)
TRAINING = Table("training.csv", TrainingPoint)
LEARNING_CURVES = Table("learning_curves.csv", CurvePoint)
ESTIMATES = Table("estimates.csv", Estimate)
RESOURCES = Table("resources.csv", TaskCosts)


def _value(kind: Any, text: str) -> Any:
    return math.nan if kind is float and not text else kind(text)


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    r"""Return rows as lines of CSV; floats are exact, a cell that is NaN is empty.

    Example:
        >>> csv_text([(1, 0.5), (2, math.nan)])
        '1,0.5\n2,\n'
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    for row in rows:
        # str of a float32 of numpy is the shortest decimal that reads back as the same float32
        table.writerow(["" if value != value else str(value) for value in row])
    return text.getvalue()


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file of JSON holds.

    Raises:
        InputError: If it cannot be read, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not isinstance(content, dict):
        raise unreadable(path, "it holds no object")
    return content


def unreadable(path: Path, error: object) -> InputError:
    """Return the sentence on a file of a run that cannot be read."""
    reason = " ".join(str(error).split()).rstrip(".")
    return InputError(f"{path} cannot be read: {reason}. Mend the file, or leave its run out.")


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def checkpoint_after(task: int) -> str:
    """Return the name of the checkpoint after so many tasks.

    Example:
        >>> checkpoint_after(3)
        'after_task_003.ckpt'
    """
    return f"after_task_{task:03d}.ckpt"


def checkpoint_inside(task: int, step: int) -> str:
    """Return the name of the checkpoint so many steps into the task of a number, from 1."""
    return f"in_task_{task:03d}_step_{step:08d}.ckpt"


def numbers_in(name: str) -> tuple[int, ...]:
    """Return the tasks, and inside one the steps, in the name of a checkpoint; nothing where it is none.

    Example:
        >>> numbers_in(checkpoint_after(3)), numbers_in(checkpoint_inside(4, 50)), numbers_in("best.ckpt")
        ((3,), (4, 50), ())
    """
    found = _CHECKPOINT.fullmatch(name)
    return () if found is None else tuple(int(number) for number in found.groups() if number is not None)


# ---- the directory --------------------------------------------------------------------------------------------------


def is_run(directory: Path) -> bool:
    """Say whether a directory holds a run: its configuration beside any other file that every run has."""
    return (directory / CONFIG).is_file() and _has_files(directory)


def _has_files(directory: Path) -> bool:
    return any((directory / name).exists() for name in (SUMMARY, TRANSFER.name, MANIFEST, CHECKPOINTS, RESULT))


def is_begun(directory: Path) -> bool:
    """Say whether a run that is started in a directory goes on with one that is there."""
    return any((directory / name).exists() for name in (CHECKPOINTS, RESULT))


def format_of(directory: Path) -> int:
    """Return the version of the format of a run's files: 1 where they do not say it, the present one without a run.

    Example:
        >>> format_of(Path("no such place")) == FORMAT
        True
    """
    path = directory / MANIFEST
    if not path.is_file():
        return 1 if _has_files(directory) else FORMAT
    try:
        return int(read_json(path).get("format", 1))
    except (InputError, TypeError, ValueError):  # a damaged one says nothing, and is written anew
        return FORMAT


def refuse_later(directory: Path) -> None:
    """Refuse a run that a later version of clsim has written.

    Raises:
        InputError: If its format is not known here.
    """
    found = format_of(directory)
    if found > FORMAT:
        raise InputError(
            f"{directory} was written by a later version of clsim (format {found} of a run's files; this version reads "
            f"up to {FORMAT}): upgrade clsim."
        )


def earlier_version(directory: Path) -> str:
    """Return by what version a run was begun, as words of a sentence; empty where by the present one.

    Example:
        >>> earlier_version(Path("no such place"))
        ''
    """
    found = format_of(directory)
    return f"an earlier version of clsim (format {found} of a run's files, now {FORMAT})" if found < FORMAT else ""
