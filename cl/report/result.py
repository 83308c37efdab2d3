"""`result.json`, which marks a run as finished: its final averages, and digests of its tables."""

from __future__ import annotations

import math
from pathlib import Path

from cl import rundir
from cl.files import digest_of, read_sealed, write_sealed
from cl.report.run import Run

_TABLES = ("*.csv", rundir.SUMMARY, rundir.REFERENCES, rundir.MANIFEST)


def write_result(run: Run) -> None:
    """Write `result.json` of a run that has finished."""
    averages = {mask: run.scalars(mask)["average_accuracy"] for mask in run.matrices}
    measured = {mask: value for mask, value in averages.items() if not math.isnan(value)}
    files = {path.name: digest_of(path) for pattern in _TABLES for path in sorted(run.directory.glob(pattern))}
    content = {"mask": run.primary.mask, "average_accuracy": measured, "sha256": files}
    write_sealed(run.directory / rundir.RESULT, content)


def changed_since(directory: Path) -> list[str]:
    """Return the names of the tables of a finished run that have changed since it ended.

    Example:
        >>> changed_since(Path("no such place"))
        []
    """
    files = (read_sealed(directory / rundir.RESULT) or {}).get("sha256", {})
    return sorted(name for name, known in files.items() if digest_of(directory / name) != known)


def read_result(directory: Path) -> float | None:
    """Return the final average of a run under the mask of its scenario; None if the run is not finished.

    Example:
        >>> read_result(Path("no such place")) is None
        True
    """
    found = read_sealed(directory / rundir.RESULT)
    return None if found is None else float(found["average_accuracy"].get(found["mask"], math.nan))
