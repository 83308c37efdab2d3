"""Output that outlives its reader: `cl-run | head -1` must not end a run that takes a day."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class Steady:
    """A stream of text whose writes go nowhere once nobody reads them.

    Args:
        stream: Standard output or standard error.

    Example:
        >>> Steady(sys.stdout).write("said")
        said4
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or let go."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        """Flush, or let go."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._let_go()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _let_go(self) -> None:
        """Point the descriptor at nothing, so that what is still buffered, and other writers to it, end there, too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._stream is sys.__stdout__:
            print("Nobody reads the output any more; the run goes on without it.", file=sys.stderr)


def outlive_readers() -> None:
    """Make standard output and standard error of this process steady; again changes nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Steady):
            setattr(sys, name, Steady(stream))
