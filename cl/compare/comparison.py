"""`cl.compare`: compare runs, from Python and for `cl-compare`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cl.compare.align import Comparison, align
from cl.compare.forecasts import forecasts
from cl.compare.html import leaderboard_table, page
from cl.compare.leaderboard import Board, Ranks, caveats, column, leaderboard, ranks, terminal_tables
from cl.compare.markup import text
from cl.compare.numbers import Numbers, summarise
from cl.compare.read import RunFiles, find_runs, read_run
from cl.errors import InputError, unknown
from cl.files import expand_path, write_text
from cl.report.run import Run

# Parts of a table that need the definitions and the style sheet of the page, which a notebook does not have.
_OF_THE_PAGE = re.compile(r'</?a\b[^>]*>|<span class="hidden">.*?</span>')
MAX_NUMBERS = 100_000  # the page offers every group as a base up to this number of cells of differences


@dataclass(repr=False)
class Compared:
    """A comparison of runs, with everything that `cl-compare` prints and writes.

    Attributes:
        comparison: The runs in their groups, and sentences on their differences.
        boards: A leaderboard for each stream.
        over: Average ranks over several streams, or None.
        numbers: All numbers, with their spread, interval and test.
        bases: The groups that the page can subtract from the others.
    """

    comparison: Comparison
    boards: list[Board]
    over: Ranks | None
    numbers: Numbers
    bases: list[str]

    @property
    def notes(self) -> list[str]:
        """Sentences that a reader of the numbers must know."""
        return [*caveats(self.boards), *self.comparison.notes]

    def save(self, directory: str | Path) -> Path:
        """Write `comparison.html`, a single file, and `comparison.csv` to a directory; return the path of the page."""
        out = expand_path(directory)
        found = {stage.name: forecasts(stage, self.numbers) for stage in self.comparison.stages}
        write_text(out / "comparison.csv", self.numbers.csv())
        html = page(self.comparison, self.boards, self.over, self.numbers, self.bases, found)
        write_text(out / "comparison.html", html)
        return out / "comparison.html"

    def show(self, console: Any = None) -> None:
        """Print leaderboards, ranks and notes.

        Args:
            console: A console of rich; None is that of the terminal, or one of 200 columns where there is no terminal.
        """
        from rich.console import Console

        console = console or Console(soft_wrap=False)
        if not console.is_terminal:
            console.width = 200
        for board in self.boards:
            for table in terminal_tables(board, console.width):
                console.print(table)
        if self.over:
            line = ", ".join(f"{name} {number.mean:.2f}" for name, number in self.over.groups.items())
            line += f"; critical difference {self.over.critical.mean:.2f}"
            console.print(f"average rank over {self.over.num_streams} streams: {line}", markup=False, highlight=False)
        for note in self.notes:
            console.print(note, markup=False, highlight=False)

    def __repr__(self) -> str:
        from io import StringIO

        from rich.console import Console

        printed = StringIO()
        self.show(Console(file=printed, force_jupyter=False))
        return printed.getvalue().rstrip()

    def _repr_html_(self) -> str:
        boards = "".join(
            f"<h4>{text(board.stream)}</h4><p>{text(board.caption)}</p>{leaderboard_table(board, self.numbers)}"
            for board in self.boards
        )
        notes = "".join(f"<li>{text(note)}</li>" for note in self.notes)
        return _OF_THE_PAGE.sub("", boards) + (f"<ul>{notes}</ul>" if notes else "")


def compare(
    *runs: Run | str | Path,
    by: Sequence[str] = (),
    scalar: str = "average_accuracy",
    level: float = 0.95,
    base: str | None = None,
    unfinished: bool = False,
) -> Compared:
    """Compare runs as `cl-compare` does: leaderboards with intervals, paired tests over shared seeds, ranks, a page.

    Args:
        runs: Runs, as `cl.run` and `cl.load` return them; or directories, of a run each or with runs inside.
        by: Parts of the configuration, such as "strategy"; runs that agree in them form a group. Empty means the whole
            configuration.
        scalar: The scalar that ranks the groups.
        level: Confidence level of the intervals, in (0, 1).
        base: The group whose matrices are subtracted from the others; None means the lower bound (fine-tuning), or the
            first group if there is none.
        unfinished: Whether runs with tasks left to learn take part, as groups of their own.

    Returns:
        The comparison, which is printed as tables; `.save(directory)` writes the page.

    Raises:
        InputError: If there is no finished run, or a group, scalar or part of the configuration does not exist.

    Example:
        >>> compare("no such place")
        Traceback (most recent call last):
        cl.errors.InputError: There is no directory no such place: give a run directory, or a folder that contains some.
    """
    if not 0 < level < 1:
        raise InputError(f"level={level} is not between 0 and 1: give, say, 0.95.")
    if not runs:
        raise InputError("There is nothing to compare: give runs, or directories with runs.")
    comparison = align(_read(runs), by, unfinished)
    first = base or _base(comparison)
    if first not in comparison.groups:
        raise unknown("group", first, comparison.groups)
    layouts = [part[0] for stage in comparison.stages for part in stage.layouts.values()]
    cells = len(comparison.groups) ** 2 * sum(R.size for run in layouts for R in run.matrices.values())
    bases = [first, *(name for name in comparison.groups if name != first and cells <= MAX_NUMBERS)]
    numbers = summarise(comparison, level, bases)
    boards = _boards(comparison, numbers, scalar)
    return Compared(comparison, boards, ranks(comparison, boards, numbers), numbers, bases)


def _read(runs: Sequence[Run | str | Path]) -> list[RunFiles]:
    """Return the content of the files of runs; a run without files is written to a temporary folder first."""
    given = [
        run.directory if isinstance(run, Run) else expand_path(run) for run in runs if getattr(run, "stored", True)
    ]
    found = [read_run(path) for path in (find_runs(given) if given else ())]
    for number, run in enumerate(runs, start=1):
        if isinstance(run, Run) and not run.stored:
            with TemporaryDirectory() as folder:
                files = read_run(run.save(Path(folder) / "run"))
            files.directory = Path(f"run {number}")
            found.append(files)
    return found


def _boards(comparison: Comparison, numbers: Numbers, scalar: str) -> list[Board]:
    """Return the leaderboards of the streams whose runs have the scalar, and add a note on the other streams."""
    having = [stage for stage in comparison.stages if column(stage, scalar)]
    comparison.notes += [f"No run on {s.name} has {scalar}." for s in comparison.stages if having and s not in having]
    return [leaderboard(comparison, stage, numbers, scalar) for stage in having or comparison.stages]


def _base(comparison: Comparison) -> str:
    """Return the group to subtract: the lower bound, or the first group if there is none."""
    bounds = [name for name, group in comparison.groups.items() if group.bound == "lower bound"]
    return next(iter([*bounds, *comparison.groups]))
