"""The transfer matrix in the terminal: R as a heat map after each task, and at the end the three transfer matrices.

On a terminal the cells are coloured; elsewhere (a log file, a pipe) the same numbers are printed as plain lines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from cl import rundir
from cl.report.caption import caption, shorten
from cl.report.contract import Report
from cl.report.run import Run
from cl.report.wording import headline, named, percent, remarks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from torch import Tensor

MAX_TASKS = 20
_LABEL = 10  # columns of the label "untrained" and a gap
_CELLS = ((7, 1), (5, 0), (4, 0), (3, 0))  # (columns, decimals); with 3 columns, only colour separates "100" cells

# Colour-blind safe: dark blue to yellow (after cividis) and orange over white to purple (after ColorBrewer's PuOr).
SEQUENTIAL = ((0, 34, 78), (65, 77, 107), (124, 123, 120), (188, 175, 111), (254, 232, 56))
DIVERGING = ((179, 88, 6), (253, 184, 99), (247, 247, 247), (178, 171, 210), (84, 39, 136))


def colour(share: float, palette: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Return the RGB colour at `share` of a palette, interpolated linearly; `share` is clamped to [0, 1].

    Example:
        >>> colour(0.0, SEQUENTIAL), colour(1.0, SEQUENTIAL), colour(0.125, DIVERGING)
        ((0, 34, 78), (254, 232, 56), (216, 136, 52))
    """
    position = min(1.0, max(0.0, share)) * (len(palette) - 1)
    left = min(int(position), len(palette) - 2)
    red, green, blue = (
        round(a + (b - a) * (position - left)) for a, b in zip(palette[left], palette[left + 1], strict=True)
    )
    return red, green, blue


def _style(share: float, palette: Sequence[tuple[int, int, int]]) -> str:
    red, green, blue = colour(share, palette)
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "white"
    return f"{ink} on rgb({red},{green},{blue})"


def grid(
    values: Tensor,
    labels: Sequence[str],
    width: int,
    show: Callable[[float], str],
    style: Callable[[float], str],
    current: int | None = None,
) -> Text:
    """Return a matrix as text: a header of task numbers, then one line for each row.

    Args:
        values: (rows, T) fractions, NaN where there is nothing to show.
        labels: The label of each row.
        width: Columns of a cell.
        show: Returns the text of a value.
        style: Returns the rich style of a value.
        current: The row to print in bold.
    """
    from rich.text import Text

    text = Text(" " * (_LABEL + 2))
    text.append("".join(f"{j:>{width}}" for j in range(1, values.shape[1] + 1)), style="dim")
    for i, (label, row) in enumerate(zip(labels, values.tolist(), strict=True)):
        text.append("\n> " if i == current else "\n  ", style="bold")
        text.append(f"{label:<{_LABEL}}", style="bold" if i == current else "")
        for value in row:
            bold = "bold " if i == current else ""
            text.append(f"{show(value):>{width}}", style="dim" if math.isnan(value) else bold + style(value))
    return text


def layout(console: Console, num_tasks: int, narrowest: int) -> tuple[int, int] | None:
    """Return (columns of a cell, decimals) of the widest cells that fit the console, or None if none do.

    Args:
        console: The console; its width is a limit only if it is a terminal.
        num_tasks: Cells in a line; more than `MAX_TASKS` never fit.
        narrowest: The fewest columns of a cell.
    """
    room = console.width if console.is_terminal else 10**6
    if num_tasks > MAX_TASKS:
        return None
    fitting = ((w, d) for w, d in _CELLS if w >= narrowest and _LABEL + 2 + num_tasks * w <= room)
    return next(fitting, None)


def accuracy_grid(run: Run, mask: str, console: Console, current: int | None = None) -> Text | None:
    """Return R under one mask as text, or None if it does not fit on the console."""
    R = run.matrices[mask].R.cpu()
    cell = layout(console, R.shape[1], narrowest=3)
    if cell is None:
        return None
    labels = ["untrained", *(f"after {i}" for i in range(1, len(R)))]
    show = partial(percent, digits=cell[1])
    return grid(R, labels, cell[0], show, lambda value: _style(value, SEQUENTIAL), current)


def row_grid(row: Tensor, label: str, console: Console) -> Text | None:
    """Return one row (T,) of a metric as text with a header, or None if it does not fit on the console."""
    cell = layout(console, len(row), narrowest=3)
    if cell is None:
        return None
    show = partial(percent, digits=cell[1])
    return grid(row[None], [label], cell[0], show, lambda value: _style(value, SEQUENTIAL))


def difference_grid(matrix: Tensor, console: Console) -> Text | None:
    """Return a (T, T) matrix of differences as text, orange below zero and purple above, or None if it does not fit."""
    cell = layout(console, matrix.shape[1], narrowest=4)
    if cell is None:
        return None
    labels = [f"after {i}" for i in range(1, len(matrix) + 1)]
    limit = max(float(matrix.nan_to_num().abs().max()), 0.01)

    def show(value: float) -> str:
        return "" if math.isnan(value) else percent(value, signed=True, digits=cell[1])

    return grid(matrix, labels, cell[0], show, lambda value: _style(0.5 + value / limit / 2, DIVERGING))


def summary(run: Run, mask: str, after_task: int) -> str:
    """Return one row of R in words, for streams that are too long to print."""
    row = run.matrices[mask].R[after_task].cpu()
    seen = row[: after_task or len(row)]
    measured = seen[seen.isfinite()]
    label = f"after {after_task}/{len(row)}" if after_task else "untrained"
    if not len(measured):
        return f"{label} ({mask}): unmeasured"
    low = int(seen.nan_to_num(math.inf).argmin())
    text = f"{label} ({mask}): mean {percent(float(measured.mean()))}, lowest {percent(float(seen[low]))} on task "
    text += str(low + 1)
    return text + (f", newest task {percent(float(seen[-1]))}" if after_task else "")


class TerminalReport(Report):
    """Prints R after every row, and the transfer matrices at the end.

    Args:
        console: The console to print to; by default rich's own, which the progress bar shares.

    Example:
        >>> from pathlib import Path
        >>> from rich.console import Console
        >>> from cl.metrics.transfer import TransferMatrix, worked_example
        >>> run = Run(Path("run"), {}, ["a", "b", "c"], "task", {"task": TransferMatrix(3, "task")})
        >>> run.primary.record(0, worked_example()[0])
        >>> TerminalReport(Console(force_terminal=False)).row(run, after_task=0)
        untrained (task):   10.0   20.0   25.0
    """

    brief = False  # whether to print one line for the run, as it is one of many

    def __init__(self, console: Console | None = None) -> None:
        import rich

        self._console = console or rich.get_console()
        self._drawn = False  # whether all of R was printed with the last row
        self._began = time.monotonic()

    def _print(self, text: Text | str) -> None:
        if isinstance(text, str):  # replace characters that the encoding of a log file lacks
            text = text.encode(self._console.encoding, "replace").decode(self._console.encoding)
        # soft_wrap: neither wrapped nor cropped, so that a log file holds whole rows
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def start(self, run: Run, after_task: int) -> None:
        """Print the caption and the tasks, and after how many tasks a resumed run continues."""
        if self.brief:
            return
        self._print(caption(run))
        names = [f"{i}: {shorten(name)}" for i, name in enumerate(run.task_names[:MAX_TASKS], start=1)]
        more = len(run.task_names) - len(names)
        self._print(f"tasks: {', '.join(names)}{f' and {more} more' if more else ''}")
        if after_task >= 0:
            self._print(f"continued after {after_task} of {len(run.task_names)} tasks")

    def row(self, run: Run, after_task: int) -> None:
        """Print R so far (on a terminal), or its new row."""
        self._drawn = False
        if self.brief:
            return
        for mask, matrix in run.matrices.items():
            whole = accuracy_grid(run, mask, self._console, after_task) if self._console.is_terminal else None
            if whole is None:
                self._print(self._line(run, mask, after_task))
            elif matrix is run.primary:
                self._block(f"{matrix.metric} in %, row: {run.rows}, column: task tested, {mask} mask", whole)
                self._drawn = True
        if after_task and len(run.task_names) <= MAX_TASKS:  # the scalars of a long stream are slow to compute
            for mask in run.matrices:
                self._print(headline(run, mask))

    def say(self, text: str) -> None:
        """Print a message."""
        self._print(text)

    def _line(self, run: Run, mask: str, after_task: int) -> str:
        row = run.matrices[mask].R[after_task].tolist()
        if len(row) > MAX_TASKS or self._console.is_terminal:
            return summary(run, mask, after_task)
        label = f"after {after_task}" if after_task else "untrained"
        return f"{label} ({mask}):" + "".join(f"{percent(value):>7}" for value in row)

    def finish(self, run: Run) -> None:
        """Print every R, the three transfer matrices, the scalars, and the path of the files."""
        if self.brief:
            seconds = time.monotonic() - self._began
            self._print(f"{run.directory.name}: {headline(run, run.primary.mask)}, in {seconds:.0f} s")
            return
        from cl.metrics.transfer import backward_transfer, forward_transfer, step_effect
        from cl.report.scalars import beside

        old, new, step = run.primary, run.zero_shot, run.primary
        for mask, matrix in run.matrices.items():
            if not (self._drawn and matrix is run.primary):
                self._block(f"{matrix.metric} in %, {named(run, mask)}", accuracy_grid(run, mask, self._console))
        for title, matrix, values in (
            ("backward transfer: change of a task (column) since it was learned", old, backward_transfer(old.R)),
            ("forward transfer: a task to come (column) against the untrained learner", new, forward_transfer(new.R)),
            ("step effect: what learning one task (row) alone changed", step, step_effect(step.R)),
        ):
            self._block(f"{title}, in points, {matrix.mask} mask", difference_grid(values, self._console))
        self._print("")
        for line in [
            caption(run),
            *(headline(run, mask) for mask in run.matrices),
            *filter(None, [beside(run)]),
            *remarks(run),
        ]:
            self._print(line)
        picture = run.directory / rundir.PICTURE
        self._print(f"picture: {picture}" if picture.exists() else f"files: {run.directory}")

    def _block(self, title: str, text: Text | None) -> None:
        if text is not None:
            self._print(f"\n{title}")
            self._print(text)
