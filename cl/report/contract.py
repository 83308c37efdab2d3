"""The contract of all reports, and how often a costly one may be made."""

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
        """Begin a run, fresh (`after_task` = -1) or resumed after that many tasks."""

    def row(self, run: Run, after_task: int) -> None:
        """React to a row of R that has just been measured (0: the untrained learner)."""

    def flush(self) -> Mapping[str, Any] | None:
        """Put on the disk what a checkpoint that is about to be written takes as done.

        Returns:
            By the name of a file, plain data that tell later whether it is as it is now; `Run.flushed` hands them back.
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
