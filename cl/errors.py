"""Bad input: one clear sentence that names the thing, its value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Raised for bad input, before anything is written; its message is shown to the user without a traceback."""


class DivergenceError(RuntimeError):
    """Raised when a loss or a weight is NaN or infinite; its message is shown without a traceback."""


class Preempted(SystemExit):
    """Raised when a signal stops a run; the exit status is 128 plus the number of the signal, as in shells.

    Args:
        number: The number of the signal.
        saved: Whether the task in training was saved.

    Example:
        >>> Preempted(15, saved=True).code
        143
    """

    def __init__(self, number: int, saved: bool) -> None:
        super().__init__(128 + number)
        self.number, self.saved = number, saved


def reason(error: BaseException) -> str:
    r"""Return the first line of the message of another library's error, without a full stop; else its type's name.

    Example:
        >>> reason(OSError("No weights here.\nSee the manual.")), reason(KeyError())
        ('No weights here', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for an unknown name, which suggests similar names and lists all.

    Args:
        kind: What the name stands for, such as "strategy".
        name: The unknown name.
        known: All names that exist.

    Example:
        >>> print(unknown("strategy", "dep", ["derpp", "er", "ewc"]))
        There is no strategy called 'dep': did you mean 'derpp'? Known: derpp, er, ewc.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else "."
    return InputError(f"There is no {kind} called {name!r}{hint} Known: {', '.join(names)}.")
