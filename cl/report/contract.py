"""The contract of all reports, and a limit on how often a costly one is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from cl.report.run import Run


class Report:
    """Base of all reports: every hook does nothing until it is overridden.

    Example:
        >>> class Shout(Report):
        ...     def finish(self, run):
        ...         print("DONE")
        >>> from pathlib import Path
        >>> Shout().finish(Run(Path("."), {}, [], "class", {}))
        DONE
    """

    def start(self, run: Run, after_task: int) -> None:
        """Start a report: of a new run (`after_task` = -1), or of one that resumes after so many tasks."""

    def row(self, run: Run, after_task: int) -> None:
        """Report a row of R that has just been measured (0: the untrained learner)."""

    def flush(self) -> Mapping[str, Any] | None:
        """Sync the files of the report to the disk, before a checkpoint is written.

        Returns:
            By file name, plain data that describe the present state of the file, such as its length. The checkpoint
            stores them. A run that resumes from it has them in `Run.flushed`, to cut the file to that state.
        """
        return None

    def say(self, text: str) -> None:
        """Show a message, such as that a reference is being trained."""

    def finish(self, run: Run) -> None:
        """Report the end of the run, when the last row and the references have been measured."""


class Pace:
    """Limits how often a report is written: after each time, it waits 20 times as long as the writing took.

    Args:
        delay: Seconds before the first time.

    Example:
        >>> pace = Pace()
        >>> pace.ready()
        True
        >>> with pace:
        ...     time.sleep(0.01)
        >>> pace.ready()
        False
    """

    def __init__(self, delay: float = 0.0) -> None:
        self._until = time.monotonic() + delay

    def ready(self) -> bool:
        """Say whether the report may be written again."""
        return time.monotonic() >= self._until

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        ended = time.monotonic()
        self._until = ended + 20 * (ended - self._began)
