"""`Score`: a row of R of a saved learner on the test sets of some stream, and the files that keep it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl import rundir
from cl.errors import InputError
from cl.files import expand_path, write_text
from cl.report.caption import shorten
from cl.report.tables import strict_json
from cl.report.wording import percent
from cl.rundir import csv_text

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor


@dataclass(frozen=True, repr=False, eq=False)
class Score:
    """The row of R of a saved learner on the test sets of a stream: `run.score` and `cl-run score=DIR` return it.

    Attributes:
        rows: The metric on each of the T' test sets, float32 (T',), by mask; the first is that of the scenario.
        calibration: The expected calibration errors (T',) by mask; empty unless targets are labels.
        masks: For each key of `rows`, the mask and the metric.
        task_names: The names of the T' test sets.
        after_task: After how many tasks the learner was saved, which is the number of the row in R.
        learner: The caption of the run in which it was trained.
        stream: The name of the stream that it is scored on.
        options: The options of its strategies that differ from those of the run, by "NAME.option".
        about: What else `score.json` holds: checkpoint, digests, versions and command.
        directory: The directory of its files; None if none are written.

    Example:
        >>> import torch
        >>> rows = {"class": torch.tensor([0.5, 0.75])}
        >>> Score(rows, masks={"class": ("class", "accuracy")}, task_names=["a", "b"], after_task=2, stream="pairs")
        Score(after task 2, on 2 test sets of pairs; class: average accuracy 62.5)
    """

    rows: dict[str, Tensor]
    calibration: dict[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    task_names: list[str] = field(default_factory=list)
    after_task: int = 0
    learner: str = ""
    stream: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    directory: Path | None = None

    def __getitem__(self, mask: str) -> Tensor:
        return self.rows[mask]

    @property
    def averages(self) -> dict[str, float]:
        """The mean over the test sets, by mask."""
        return {key: float(row.double().mean()) for key, row in self.rows.items()}

    def __repr__(self) -> str:
        with_ = "".join(f", {name}={value}" for name, value in self.options.items())
        what = f"after task {self.after_task}{with_}, on {len(self.task_names)} test sets of {shorten(self.stream)}"
        return f"Score({what}; {'; '.join(self.headlines())})"

    def headlines(self) -> list[str]:
        """Return the average under each mask in words, such as "class: average accuracy 62.5"."""
        metrics = {key: self.masks[key][1] if key in self.masks else "metric" for key in self.rows}
        return [f"{key}: average {metrics[key]} {percent(value)}" for key, value in self.averages.items()]

    def table(self) -> str:
        """Return the content of `score.csv`: the cells of the row, exact to the last bit."""
        cells = [
            rundir.Cell(self.after_task, task, mask, metric, value)
            for key, row in self.rows.items()
            for mask, metric in [self.masks[key]]
            for task, value in enumerate(row.numpy(), start=1)
        ]
        cells += [
            rundir.Cell(self.after_task, task, key, "ece", value)
            for key, row in self.calibration.items()
            for task, value in enumerate(row.numpy(), start=1)
        ]
        return rundir.SCORED.header + csv_text(cell for cell in cells if not math.isnan(cell.value))

    def write(self) -> None:
        """Write `score.csv` and then `score.json` to the directory."""
        assert self.directory is not None
        content = {
            **{"learner": self.learner, "after_task": self.after_task, "options": dict(self.options)},
            **{"stream": self.stream, "task_names": self.task_names, "averages": self.averages, **self.about},
        }
        write_text(self.directory / rundir.SCORED.name, self.table())
        write_text(self.directory / rundir.SCORE, strict_json(content))

    def show(self, console: Console | None = None) -> None:
        """Print the row under each mask, as a run prints its rows: coloured on a terminal, else as plain lines."""
        import rich

        from cl.report.terminal import MAX_TASKS, row_grid

        label = f"after {self.after_task}" if self.after_task else "untrained"
        console = console or rich.get_console()

        def put(text: Any) -> None:
            if isinstance(text, str):  # replace characters that the encoding of a log file lacks
                text = text.encode(console.encoding, "replace").decode(console.encoding)
            console.print(text, soft_wrap=True, highlight=False, markup=False)

        put(self.learner)
        names = [f"{i}: {shorten(name)}" for i, name in enumerate(self.task_names[:MAX_TASKS], start=1)]
        more = len(self.task_names) - len(names)
        put(f"scored on {shorten(self.stream)}: {', '.join(names)}{f' and {more} more' if more else ''}")
        for name, value in self.options.items():
            put(f"with {name}={value}")
        for key, row in self.rows.items():
            drawn = row_grid(row, label, console) if console.is_terminal else None
            if drawn is not None:
                put(f"\n{self.masks[key][1]} in %, column: test set, {key} mask")
                put(drawn)
            elif len(row) > MAX_TASKS:
                put(f"{label} ({key}): lowest {percent(float(row.min()))} on test set {int(row.argmin()) + 1}")
            else:
                put(f"{label} ({key}):" + "".join(f"{percent(value):>7}" for value in row.tolist()))
        for line in [*self.headlines(), *self.about.get("notes", ())]:
            put(line)
        if self.directory is not None:
            put(f"files: {self.directory}")


def directory_for(score: str | Path, run: Path | None) -> Path:
    """Return the directory for the files of a score; refuse one that is taken.

    Args:
        score: The directory that is asked for.
        run: The directory of the run whose learner is scored; None for a run in memory.

    Raises:
        InputError: If it lies in the directory of the run, or holds a run or a score.
    """
    directory = expand_path(score).resolve()
    if run is not None and run.resolve() in (directory, *directory.parents):
        raise InputError(f"{directory} lies in the directory of the run that is scored: name one outside of it.")
    if rundir.is_taken(directory):
        raise InputError(f"{directory} holds a run or a score already: name another directory for the score.")
    return directory
