"""`cl-compare`: read run directories, print a leaderboard, write `comparison.csv` and `comparison.html`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cl.compare.comparison import compare
from cl.errors import InputError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `cl-compare`; an error that the user can mend is printed as one sentence, without a traceback.

    Args:
        arguments: Its command line; None means that of the process.
    """
    options = parser().parse_args(arguments)
    try:
        run(options)
    except InputError as error:
        sys.exit(str(error))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("cl-compare", description="Compare runs of clsim: a leaderboard, a CSV and a page.")
    found.add_argument("directories", nargs="+", metavar="DIR", help="a run directory, or a folder that contains some")
    found.add_argument("--out", metavar="DIR", default=".", help="the folder for comparison.csv and comparison.html")
    found.add_argument(
        "--by",
        metavar="PART",
        action="append",
        default=[],
        help="part of the configuration, such as strategy, in which the runs of a group agree; may be repeated; "
        "default: all of it",
    )
    found.add_argument("--scalar", metavar="NAME", default="average_accuracy", help="the scalar that ranks the groups")
    found.add_argument("--level", metavar="SHARE", type=float, default=0.95, help="confidence level of the intervals")
    found.add_argument(
        "--base",
        metavar="GROUP",
        help="the group whose matrices are subtracted from the others; default: the lower bound, or the first",
    )
    found.add_argument("--unfinished", action="store_true", help="include runs with tasks left, as groups of their own")
    return found


def run(options: argparse.Namespace) -> None:
    """Compare runs, print the leaderboards, and write the page and the numbers.

    Args:
        options: The parsed command line.

    Raises:
        InputError: If there is no finished run, or a group, scalar or part of the configuration does not exist.
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
