"""`Run`: the measurements of a run, for Python, for reports and as read from a run directory."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cl import rundir
from cl.errors import InputError, unknown
from cl.files import expand_path
from cl.report.config_file import write_config

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from torch import Tensor

    from cl.data.task import Stream
    from cl.metrics.scalar import AnyScalar
    from cl.metrics.transfer import TransferMatrix
    from cl.report.scored import Score


class Curves(Protocol):
    """The evaluations inside tasks as reports read them, `run.instruments["curves"]`.

    Attributes:
        at: For each evaluation, the task in training (from 1), the step in the task, and the step of the run.
    """

    at: list[tuple[int, int, int]]

    def values(self, mask: int = 0) -> Tensor:
        """Return the metric under the mask of an index: float32 (evaluations, T), NaN for tasks not seen yet."""

    def own(self, mask: int = 0) -> list[list[float]]:
        """Return the curve of each task while it is trained."""


@dataclass(frozen=True, repr=False, eq=False)
class LabelledMatrix:
    """A transfer matrix with named rows and columns; it is indexed like a tensor, as `matrix[i, j]`.

    Attributes:
        values: R as float32 (T + 1, T), a copy on the CPU, NaN where unmeasured; row 0 is the untrained learner.
        rows: T + 1 labels.
        columns: The names of the T tasks.
        metric: What an entry is, such as "accuracy".

    Example:
        >>> import torch
        >>> LabelledMatrix(torch.tensor([[0.5], [0.875]]), ("untrained", "after cats"), ("cats",), "accuracy")
        accuracy      cats
        untrained    50.0%
        after cats   87.5%
    """

    values: Tensor
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    metric: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.values[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(T + 1, T)."""
        return tuple(self.values.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.values.numpy()
        return array.astype(dtype) if dtype is not None else array.copy()

    def _texts(self) -> list[list[str]]:
        return [["-" if math.isnan(v) else f"{v:.1%}" for v in row] for row in self.values.tolist()]

    def __repr__(self) -> str:
        first = max(map(len, (self.metric, *self.rows)))
        widths = [max(8, len(name) + 2) for name in self.columns]
        lines = [(self.metric, self.columns), *zip(self.rows, self._texts(), strict=True)]
        return "\n".join(
            label.ljust(first) + "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
            for label, cells in lines
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        rows = (
            f"<tr><th>{escape(label)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
            for label, cells in zip(self.rows, self._texts(), strict=True)
        )
        return f"<table><tr><th>{escape(self.metric)}</th>{head}</tr>{''.join(rows)}</table>"


@dataclass(repr=False)
class Run:
    """The measurements of a run so far: `cl.run` returns it, `cl.load` reads it, and every report receives it.

    Attributes:
        directory: The run directory; `Path()` for a run in memory.
        config: The resolved configuration.
        task_names: The names of the tasks, in the order of the stream.
        scenario: "class", "task" or "domain".
        stream: The name of the stream.
        device: The training device, such as "cuda"; "" before the run has started.
        bound: "upper" or "lower" if the strategies bound the results of the compared methods; else "".
        matrices: Transfer matrices by mask; the first key is the mask of the scenario.
        notes: Sentences that reports show beside the results.
        order: The original positions of the tasks, in the order in which they are learned.
        boundaries: Whether a row of R is measured at the end of a task; else at a point of a stream that drifts.
        calibration: Matrices of expected calibration errors by mask.
        instruments: The instruments, which hold the measurements beside R, by name.
        own_scalars: The user's own scalars, by name.
        references: By kind, one reference for each task; see `cl.measure.references`.
        tuning: How hyper-parameters were chosen, and the cost of that; see `cl.app.protocol`.
        total_steps: The step over the stream from which the run resumes; 0 for a new run.
        flushed: The results of the reports' `flush` in the checkpoint from which the run resumes.
        test_rows: The size of each task's test set, in the order of learning.
        learner: The learner with its weights; None for a run that was read from its directory.
        scorer: Scores the saved learner, see `score`; None for a run that neither `cl.run` nor `cl.load` made.

    Example:
        >>> from cl.metrics.transfer import TransferMatrix
        >>> run = Run(Path("."), {}, ["cats", "dogs"], "class", {"class": TransferMatrix(2, "class")})
        >>> run.primary.num_tasks, run.tasks_learned
        (2, -1)
        >>> run
        Run(class-incremental, 2 tasks; 0 learned)
    """

    directory: Path
    config: dict[str, Any]
    task_names: list[str]
    scenario: str
    matrices: dict[str, TransferMatrix]
    notes: list[str] = field(default_factory=list)
    order: tuple[int, ...] = ()
    boundaries: bool = True
    calibration: Mapping[str, TransferMatrix] = field(default_factory=dict)
    instruments: Mapping[str, Any] = field(default_factory=dict)
    own_scalars: Mapping[str, AnyScalar] = field(default_factory=dict)
    references: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    total_steps: int = 0
    flushed: dict[str, Any] = field(default_factory=dict)
    test_rows: tuple[int, ...] = ()
    stream: str = ""
    device: str = ""
    bound: str = ""
    learner: Any = None
    scorer: Any = None

    def __post_init__(self) -> None:
        self._scalars: dict[tuple[str, int], dict[str, float]] = {}
        self.measures: dict[
            tuple[int, int], tuple[dict[str, float], dict[str, str]]
        ] = {}  # the cache of `cl.report.scalars`

    @property
    def num_tasks(self) -> int:
        """The number of tasks of the stream."""
        return len(self.task_names)

    @property
    def rows(self) -> str:
        """What the row number of R counts, in words."""
        return "tasks learned" if self.boundaries else "evaluation points passed"

    @property
    def primary(self) -> TransferMatrix:
        """The matrix under the mask of the scenario."""
        return next(iter(self.matrices.values()))

    @property
    def zero_shot(self) -> TransferMatrix:
        """The matrix to read zero-shot transfer from: that under the mask "task" if there is one, else `primary`."""
        return self.matrices.get("task", self.primary)

    @property
    def tasks_learned(self) -> int:
        """The last measured row of R, -1 before the first."""
        return max(self.primary.measured_rows, default=-1)

    def scalars(self, mask: str | None = None) -> dict[str, float]:
        """Return the scalars of R over the tasks learned so far; all are NaN before the first task.

        Args:
            mask: The mask of the matrix; None means that of the scenario.

        Raises:
            InputError: If there is no such matrix.
        """
        from cl.metrics.transfer import SCALARS

        mask = mask or next(iter(self.matrices))
        if mask not in self.matrices:
            raise unknown("matrix", mask, self.matrices)
        if self.tasks_learned < 1:
            return dict.fromkeys(SCALARS, math.nan)
        key = mask, self.tasks_learned
        if key not in self._scalars:
            self._scalars = {k: v for k, v in self._scalars.items() if k[1] == key[1]}
            self._scalars[key] = self.matrices[mask].scalars(after_task=self.tasks_learned)
        return dict(self._scalars[key])

    def measured(self) -> dict[str, float]:
        """Return the scalars that need more than R, the user's own included; those without a value are left out.

        `transfer.json` and `cl.report.scalars.measure` give the reason for each that is left out.
        """
        from cl.report.scalars import measure

        return dict(measure(self)[0])

    @property
    def stored(self) -> bool:
        """Whether the run has a directory on the disk; else it exists in memory alone."""
        return self.directory != Path() and (self.directory / rundir.CONFIG).is_file()

    @property
    def R(self) -> dict[str, LabelledMatrix]:
        """The transfer matrices with the names of the tasks, by mask; the first is that of the scenario."""
        rows = "untrained", *(f"after {name}" for name in self.task_names)
        return {
            mask: LabelledMatrix(matrix.R.detach().cpu().clone(), rows, tuple(self.task_names), matrix.metric)
            for mask, matrix in self.matrices.items()
        }

    def plot(self) -> Figure:
        """Return accuracy, backward transfer, forward transfer and step effect as one picture of matplotlib."""
        from cl.report.picture import draw, png

        figure = draw(self)
        vars(figure)["_repr_png_"] = lambda: png(figure)  # notebooks show it, though pyplot was not imported
        return figure

    def to_frame(self) -> pandas.DataFrame:
        """Return a pandas table with a row for every measured cell of R and of the calibration errors.

        The columns are those of `cl.rundir.Cell`, and the name of the task.

        Raises:
            InputError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError("A table of a run needs pandas: run `pip install pandas`, or read run.R.") from error
        from cl.metrics.transfer import to_records

        cells = [
            (*rundir.Cell(after_task, task, matrix.mask, matrix.metric, value), self.task_names[task - 1])
            for matrix in (*self.matrices.values(), *self.calibration.values())
            for after_task, task, value in to_records(matrix.R)
            if not math.isnan(value)
        ]
        return pandas.DataFrame(cells, columns=[*rundir.TRANSFER.columns, "name"])

    def score(
        self,
        stream: Stream | None = None,
        task: int | None = None,
        options: Mapping[str, Any] | None = None,
        directory: str | Path | None = None,
        *,
        learner: Any = None,
        allow_changed: bool = False,
    ) -> Score:
        """Score the saved learner again, without training: on the run's own test sets, or on those of another stream.

        A run that was read by `cl.load` builds its learner from its configuration and loads a checkpoint. Nothing is
        written to the directory of the run, and a learner in memory stays as it is.

        Args:
            stream: The stream whose test sets are scored; None means that of the run, which gives row `task` of R to
                the bit. Its inputs and classes must be those of the learner.
            task: The number of tasks after which the learner was saved, 0 for the untrained one; None means all.
            options: Test options of the strategies that differ from those of the run, by "NAME.option"; a strategy
                declares them in `test_options`.
            directory: A new directory for `score.csv` and `score.json`; None writes nothing.
            learner: A `cl.Learner` built as that of the run was: for a run whose configuration cannot build it again,
                because it was made from Python objects.
            allow_changed: Whether to score although the run's test sets or the user's code have changed since.

        Raises:
            InputError: If the run is not finished and `task` is None, there is no such checkpoint, the stream does not
                fit, there is no such option, or the directory is taken.
        """
        if self.scorer is None:
            raise InputError("This run cannot be scored again: read it from its directory, by cl.load(directory).")
        score: Score = self.scorer(self, stream, task, options or {}, directory, learner, allow_changed)
        return score

    def save(self, directory: str | Path) -> Path:
        """Write the run as a directory that `cl.load`, `cl.compare` and `cl-compare` read; return its path.

        If the run has a directory, all of it is copied, checkpoints included; else configuration, tables and picture
        are written.

        Args:
            directory: A new or an empty directory.

        Raises:
            InputError: If the directory is not empty, or lies inside that of the run.
        """
        target = expand_path(directory)
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise InputError(f"{target} is there already and not empty: name a new directory to save the run in.")
        if self.stored and self.directory.resolve() in target.resolve().parents:
            raise InputError(f"{target} lies in the directory of the run itself: name one outside of it.")
        if self.stored:
            shutil.copytree(self.directory, target, ignore=shutil.ignore_patterns(rundir.LOCK), dirs_exist_ok=True)
        else:
            _write(replace(self, directory=target))
        return target

    def __repr__(self) -> str:
        from cl.report.caption import caption
        from cl.report.wording import headline

        about = f"{caption(self)}; {max(self.tasks_learned, 0)} learned"
        return f"Run({about}; {headline(self, self.primary.mask)})" if self.tasks_learned > 0 else f"Run({about})"

    def _repr_html_(self) -> str:
        tables = (
            f"<h4>{escape(self.matrices[mask].mask)} mask, row: {escape(self.rows)}</h4>{table._repr_html_()}"
            for mask, table in self.R.items()
        )
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return f"<p>{escape(repr(self))}</p>{''.join(tables)}" + (f"<ul>{notes}</ul>" if notes else "")


def _write(run: Run) -> None:
    """Write the files of a run in memory, as a run with a directory writes them row by row."""
    from cl.report.manifest import write_manifest
    from cl.report.picture import PictureReport
    from cl.report.result import write_result
    from cl.report.tables import FileReport

    write_config(run.config, run.directory)
    write_manifest(run, -1)
    reports = FileReport(), PictureReport()
    for report in reports:
        report.start(run, -1)
        for after_task in run.primary.measured_rows:
            report.row(run, after_task)
        report.finish(run)
    if run.tasks_learned == len(run.task_names):
        write_result(run)
