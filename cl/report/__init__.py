"""What a person reads of a run: the terminal, files, a picture, W&B. Every reporter sees the same `Run`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl import rundir
from cl.files import digest_of, read_sealed, write_sealed
from cl.result import Run as Run

_TABLES = ("*.csv", rundir.SUMMARY, rundir.REFERENCES, rundir.MANIFEST)

# The scalars of one line, in the words of a reader; all others are in transfer.json.
HEADLINE = {
    "average_accuracy": "average accuracy",
    "bwt_gem": "backward transfer",
    "fwt_gem": "forward transfer",
    "forgetting_chaudhry": "forgetting",
}


class Report:
    """Base of all reports: every hook does nothing until it is overridden.

    Example:
        >>> class Shout(Report):
        ...     def finish(self, run):
        ...         print("DONE")
        >>> Shout().finish(Run(Path("."), {}, [], "class", {}))
        DONE
    """

    def start(self, run: Run, after_task: int) -> None:
        """Begin a run, fresh (`after_task` = -1) or resumed after that many tasks."""

    def row(self, run: Run, after_task: int) -> None:
        """React to a row of R that has just been measured (0: the untrained learner)."""

    def settle(self) -> Mapping[str, Any] | None:
        """Put on the disk what a checkpoint that is about to be written takes as done.

        Returns:
            By the name of a file, plain data that tell later whether it is as it is now; `Run.settled` hands them back.
        """
        return None

    def say(self, text: str) -> None:
        """React to a sentence on what goes on beside the stream, such as a reference that is trained."""

    def finish(self, run: Run) -> None:
        """React to the last row, and the references, having been measured."""


class Pace:
    """Lets a report be made again when at most a twentieth of the time would go to it.

    Args:
        pause: Seconds before the first time.

    Example:
        >>> pace = Pace()
        >>> pace.ready()
        True
        >>> with pace:
        ...     time.sleep(0.01)
        >>> pace.ready()
        False
    """

    def __init__(self, pause: float = 0.0) -> None:
        self._until = time.monotonic() + pause

    def ready(self) -> bool:
        """Say whether it is time."""
        return time.monotonic() >= self._until

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        ended = time.monotonic()
        self._until = ended + 20 * (ended - self._began)


def percent(value: float, signed: bool = False, digits: int = 1) -> str:
    """Return a fraction as it is shown everywhere: in percent, "-" where unmeasured.

    Example:
        >>> percent(0.8449), percent(0.2, signed=True), percent(-0.0001, signed=True), percent(float("nan"))
        ('84.5', '+20.0', '0.0', '-')
    """
    if math.isnan(value):
        return "-"
    text = f"{100 * value:{'+' if signed else ''}.{digits}f}"
    return text[1:] if text[0] in "+-" and float(text) == 0 else text


def headline(run: Run, mask: str) -> str:
    """Return the scalars that a reader looks for first, as one line in percent."""
    scalars = run.scalars(mask)
    signed = {"bwt_gem", "fwt_gem"}
    metric = run.matrices[mask].metric
    words = {name: text.replace("accuracy", metric) for name, text in HEADLINE.items()}
    parts = [f"{text} {percent(scalars[name], name in signed)}" for name, text in words.items()]
    return f"{mask}: " + ", ".join(parts)


def named(run: Run, mask: str) -> str:
    """Return what a matrix is measured by: the mask of a scenario, or a probe.

    Example:
        >>> named(Run(Path("."), {}, [], "class", {}), "ridge")
        'ridge probe'
    """
    return f"{mask} mask" if mask in ("class", "task", "domain") or mask.startswith(run.scenario) else f"{mask} probe"


def remarks(run: Run) -> list[str]:
    """Return the sentences that belong beside the numbers: the run's notes, then the caveat of forward transfer."""
    from cl.transfer import caveat

    about = caveat("fwt_gem", run.primary.mask) if run.primary.metric == "accuracy" else None
    drift = "No boundaries: a row of R is an evaluation point, where strategies do what they do at the end of a task."
    return run.notes + [drift] * (not run.boundaries) + ([f"Forward transfer, {about.rstrip('.')}."] if about else [])


def write_result(run: Run) -> None:
    """Write `result.json`, by which a finished run is known: its final averages, and digests of its tables."""
    averages = {mask: run.scalars(mask)["average_accuracy"] for mask in run.matrices}
    measured = {mask: value for mask, value in averages.items() if not math.isnan(value)}
    files = {path.name: digest_of(path) for pattern in _TABLES for path in sorted(run.directory.glob(pattern))}
    content = {"mask": run.primary.mask, "average_accuracy": measured, "sha256": files}
    write_sealed(run.directory / rundir.RESULT, content)


def changed_since(directory: Path) -> list[str]:
    """Return the tables of a finished run that are no more what they were when it ended.

    Example:
        >>> changed_since(Path("no such place"))
        []
    """
    files = (read_sealed(directory / rundir.RESULT) or {}).get("sha256", {})
    return sorted(name for name, known in files.items() if digest_of(directory / name) != known)


def read_result(directory: Path) -> float | None:
    """Return the final average of a finished run under the mask of its scenario, None where it is not finished.

    Example:
        >>> read_result(Path("no such place")) is None
        True
    """
    found = read_sealed(directory / rundir.RESULT)
    return None if found is None else float(found["average_accuracy"].get(found["mask"], math.nan))
