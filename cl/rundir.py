"""The run directory: the names of its files, the columns of its tables, and the version of its format.

All code that writes or reads one of these files takes its name and its columns from this module.
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

FORMAT = 2  # version of the format described in this module; the manifest holds it from version 2 on

CONFIG = "config.yaml"  # the resolved configuration
COMMAND = "command.json"  # the overrides that the run was started with
HYDRA = ".hydra"  # configuration and overrides, as Hydra writes them
PROVENANCE = "provenance.json"  # digests of data and code
MANIFEST = "manifest.json"  # format, versions and hardware, for each session of the run
SUMMARY = "transfer.json"  # every scalar with its definition
REFERENCES = "references.json"  # the references of the run, one of each kind for every task
RESULT = "result.json"  # the final averages; a run with this file is finished
SCORE = "score.json"  # in the directory of a score of a saved learner: what was scored, with digests and the command
PICTURE = "transfer.png"  # accuracy, backward transfer, forward transfer and step effect
CURVES_PICTURE = "learning_curves.png"  # accuracy inside tasks
CHECKPOINTS = "checkpoints"  # directory: the checkpoints that a run resumes from
L2_LOG = "l2log"  # directory: the log files of l2metrics
LOCK = ".lock"  # locked while the run is in progress, so that no other process writes here
WANDB = "wandb"  # directory: the files of Weights & Biases
WANDB_POINTS = "points.jsonl"  # in wandb: every point of the history, one per line
WANDB_ID = "run_id.txt"  # in wandb: the id of the run in Weights & Biases

_CHECKPOINT = re.compile(r"after_task_(\d+)\.ckpt|in_task_(\d+)_step_(\d+)\.ckpt")


class Cell(NamedTuple):
    """An entry of R: the metric on a task, from 1, after `after_task` tasks (0: the untrained learner)."""

    after_task: int
    task: int
    mask: str
    metric: str
    value: float


class TrainingPoint(NamedTuple):
    """A point of a training curve: steps over the stream, number of the task, name and value of the curve."""

    step: int
    task: int
    name: str
    value: float


RECORD = "record/"  # prefix of the curves that strategies and instruments record, see `LearnerLike.record`


class CurvePoint(NamedTuple):
    """The metric on task `tested` while `task` is trained, after `step` steps of it and `total_step` of the stream."""

    task: int
    step: int
    total_step: int
    tested: int
    mask: str
    metric: str
    value: float


class Estimate(NamedTuple):
    """The value of an estimator of transferability for a task, before the task is trained."""

    task: int
    estimator: str
    value: float


class TaskCosts(NamedTuple):
    """The costs of a task, see `cl.measure.resources`; a run of an earlier version may lack columns, which are NaN."""

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
        name: The name of the file.
        row: A NamedTuple of int, float and str, with one field for each column. Columns with a default may be absent.

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
        """The type of each column, by name."""
        return get_type_hints(self.row)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self.kinds)

    @property
    def header(self) -> str:
        """The first line of the file."""
        return csv_text([self.columns])

    def parse(self, line: str) -> Row:
        """Return the row in a line of text that has every column, in order.

        Raises:
            ValueError: If the number of cells or the type of one is wrong.
        """
        try:
            cells = next(csv.reader([line]), [])
        except csv.Error as error:
            raise ValueError(str(error)) from error
        return self._make([_value(kind, cell) for kind, cell in zip(self.kinds.values(), cells, strict=True)])

    def read(self, path: Path) -> Iterator[Row]:
        """Yield the rows of a file; a last line without its end, which is still being written, is left out.

        Raises:
            InputError: If the file cannot be read, lacks a column, or a cell of a numeric column holds no number.
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
SCORED = Table("score.csv", Cell)  # a row of R of a saved learner, on the test sets of any stream


def _value(kind: Any, text: str) -> Any:
    return math.nan if kind is float and not text else kind(text)


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    r"""Return rows as lines of CSV; floats are written exactly, and NaN as an empty cell.

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
    """Return the content of a JSON file that holds an object.

    Raises:
        InputError: If the file cannot be read, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not isinstance(content, dict):
        raise unreadable(path, "it holds no object")
    return content


def unreadable(path: Path, error: object) -> InputError:
    """Return the error for a file of a run that cannot be read."""
    reason = " ".join(str(error).split()).rstrip(".")
    return InputError(f"{path} cannot be read: {reason}. Mend the file, or leave its run out.")


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def checkpoint_after(task: int) -> str:
    """Return the name of the checkpoint after `task` tasks.

    Example:
        >>> checkpoint_after(3)
        'after_task_003.ckpt'
    """
    return f"after_task_{task:03d}.ckpt"


def checkpoint_inside(task: int, step: int) -> str:
    """Return the name of the checkpoint after `step` steps of a task, which is counted from 1."""
    return f"in_task_{task:03d}_step_{step:08d}.ckpt"


def numbers_in(name: str) -> tuple[int, ...]:
    """Return the numbers in the name of a checkpoint: (task,), or (task, step) inside one; () for other files.

    Example:
        >>> numbers_in(checkpoint_after(3)), numbers_in(checkpoint_inside(4, 50)), numbers_in("best.ckpt")
        ((3,), (4, 50), ())
    """
    found = _CHECKPOINT.fullmatch(name)
    return () if found is None else tuple(int(number) for number in found.groups() if number is not None)


# ---- the directory --------------------------------------------------------------------------------------------------


def is_run(directory: Path) -> bool:
    """Say whether a directory holds a run: a configuration and any other file that runs write."""
    return (directory / CONFIG).is_file() and _has_files(directory)


def _has_files(directory: Path) -> bool:
    return any((directory / name).exists() for name in (SUMMARY, TRANSFER.name, MANIFEST, CHECKPOINTS, RESULT))


def is_taken(directory: Path) -> bool:
    """Say whether a directory holds a run, begun or finished, or the score of a saved learner.

    Example:
        >>> is_taken(Path("no such place"))
        False
    """
    return _has_files(directory) or any((directory / name).exists() for name in (CONFIG, COMMAND, SCORE, SCORED.name))


def is_begun(directory: Path) -> bool:
    """Say whether a run that is started in a directory resumes one that is there."""
    return any((directory / name).exists() for name in (CHECKPOINTS, RESULT))


def format_of(directory: Path) -> int:
    """Return the version of the format of a run's files: 1 if they do not name it, the present one without a run.

    Example:
        >>> format_of(Path("no such place")) == FORMAT
        True
    """
    path = directory / MANIFEST
    if not path.is_file():
        return 1 if _has_files(directory) else FORMAT
    try:
        return int(read_json(path).get("format", 1))
    except (InputError, TypeError, ValueError):  # a damaged manifest is ignored, and written again
        return FORMAT


def refuse_later(directory: Path) -> None:
    """Refuse a run that a later version of clsim has written.

    Raises:
        InputError: If the format is later than `FORMAT`.
    """
    found = format_of(directory)
    if found > FORMAT:
        raise InputError(
            f"{directory} was written by a later version of clsim (format {found} of a run's files; this version reads "
            f"up to {FORMAT}): upgrade clsim."
        )


def earlier_version(directory: Path) -> str:
    """Return words for a note if an earlier version of clsim has written a run's files; else "".

    Example:
        >>> earlier_version(Path("no such place"))
        ''
    """
    found = format_of(directory)
    return f"an earlier version of clsim (format {found} of a run's files, now {FORMAT})" if found < FORMAT else ""
