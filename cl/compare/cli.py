"""`cl-compare`: reads run directories, prints a leaderboard, writes `comparison.csv` and `comparison.html`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cl.compare.align import Comparison, align
from cl.compare.forecasts import forecasts
from cl.compare.html import page
from cl.compare.numbers import Numbers, summarise
from cl.compare.read import find_runs, read_run
from cl.compare.table import Board, Ranks, caveats, column, leaderboard, ranks, terminal_tables
from cl.errors import InputError, unknown
from cl.files import write_text

MAX_NUMBERS = 100_000  # cells of differences up to which the page offers every group as a base


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `cl-compare`; errors of the user's are one sentence, without a traceback."""
    options = parser().parse_args(arguments)
    try:
        run(options)
    except InputError as error:
        sys.exit(str(error))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    it = argparse.ArgumentParser("cl-compare", description="Compare runs of clsim: a leaderboard, a CSV and a page.")
    it.add_argument("directories", nargs="+", metavar="DIR", help="a run directory, or a folder with runs below it")
    it.add_argument("--out", metavar="DIR", default=".", help="where comparison.csv and comparison.html go")
    it.add_argument(
        "--by",
        metavar="PART",
        action="append",
        default=[],
        help="part of the configuration that makes a group, such as strategy; may be repeated; default: all of it",
    )
    it.add_argument("--scalar", metavar="NAME", default="average_accuracy", help="what ranks the groups")
    it.add_argument("--level", metavar="SHARE", type=float, default=0.95, help="confidence of the intervals")
    it.add_argument("--base", metavar="GROUP", help="what matrices are subtracted from; default: finetune, or the best")
    it.add_argument("--unfinished", action="store_true", help="keep runs with tasks left, as groups of their own")
    return it


def run(options: argparse.Namespace) -> None:
    """Compare, print and write.

    Raises:
        InputError: If there is nothing to compare, or what was asked for does not exist.
    """
    if not 0 < options.level < 1:
        raise InputError(f"--level {options.level} is not between 0 and 1: give, say, 0.95.")
    comparison = align([read_run(path) for path in find_runs(options.directories)], options.by, options.unfinished)
    first = options.base or _base(comparison)
    if first not in comparison.groups:
        raise unknown("group", first, comparison.groups)
    layouts = [runs[0] for stage in comparison.stages for runs in stage.layouts.values()]
    cells = len(comparison.groups) ** 2 * sum(R.size for run in layouts for R in run.matrices.values())
    bases = [first, *(name for name in comparison.groups if name != first and cells <= MAX_NUMBERS)]
    numbers = summarise(comparison, options.level, bases)
    boards = _boards(comparison, numbers, options.scalar)
    over = ranks(comparison, boards, numbers)
    found = {stage.name: forecasts(stage, numbers) for stage in comparison.stages}
    show(comparison, boards, over)
    out = Path(options.out)
    write_text(out / "comparison.csv", numbers.csv())
    write_text(out / "comparison.html", page(comparison, boards, over, numbers, bases, found))
    print(f"page: {out / 'comparison.html'}, numbers: {out / 'comparison.csv'}")


def _boards(comparison: Comparison, numbers: Numbers, scalar: str) -> list[Board]:
    """Return the leaderboards of the streams whose runs have the scalar, and note the others."""
    having = [stage for stage in comparison.stages if column(stage, scalar)]
    comparison.notes += [f"No run on {s.name} has {scalar}." for s in comparison.stages if having and s not in having]
    return [leaderboard(comparison, stage, numbers, scalar) for stage in having or comparison.stages]


def _base(comparison: Comparison) -> str:
    """Return the group to subtract: the lower bound, else the first."""
    bounds = [name for name, group in comparison.groups.items() if group.bound == "lower bound"]
    return next(iter([*bounds, *comparison.groups]))


def show(comparison: Comparison, boards: Sequence[Board], over: Ranks | None) -> None:
    """Print leaderboards, ranks and notes."""
    from rich.console import Console

    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=200)
    for board in boards:
        for table in terminal_tables(board, console.width):
            console.print(table)
    if over:
        text = ", ".join(f"{name} {number.mean:.2f}" for name, number in over.groups.items())
        text += f"; critical difference {over.critical.mean:.2f}"
        console.print(f"average rank over {over.num_streams} streams: {text}", markup=False, highlight=False)
    for note in [*caveats(boards), *comparison.notes]:
        console.print(note, markup=False, highlight=False)
