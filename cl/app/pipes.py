"""Output to a pipe that its reader may close: `cl-run | head -1` must not end a run that takes a day."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class PipeSafe:
    """A stream of text that discards what is written to it once the reader of its pipe has closed it.

    Args:
        stream: Standard output or standard error.

    Example:
        >>> PipeSafe(sys.stdout).write("said")
        said4
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text; return the number of characters."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._discard()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _discard(self) -> None:
        """Point the descriptor to the null device, for text that is still buffered and for other writers to it, too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._stream is sys.__stdout__:
            print("The reader of the output has closed it; the run goes on without output.", file=sys.stderr)


def ignore_closed_pipes() -> None:
    """Wrap standard output and standard error of this process in `PipeSafe`; a second call changes nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, PipeSafe):
            setattr(sys, name, PipeSafe(stream))
