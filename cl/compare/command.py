"""`cl-compare`: reads run directories, prints a leaderboard, writes `comparison.csv` and `comparison.html`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cl.compare.comparison import compare
from cl.errors import InputError


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
    it.add_argument(
        "--base", metavar="GROUP", help="what matrices are subtracted from; default: the lower bound, or the first"
    )
    it.add_argument("--unfinished", action="store_true", help="keep runs with tasks left, as groups of their own")
    return it


def run(options: argparse.Namespace) -> None:
    """Compare, print and write.

    Raises:
        InputError: If there is nothing to compare, or what was asked for does not exist.
    """
    found = compare(
        *options.directories,
        by=options.by,
        scalar=options.scalar,
        level=options.level,
        base=options.base,
        unfinished=options.unfinished,
    )
    found.show()
    page = found.save(options.out)
    print(f"page: {page}, numbers: {page.with_suffix('.csv')}")
