"""Bad input: one clear sentence that names the thing, its value and the remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Raised before any training starts; its message is shown to the user without a traceback."""


class DivergenceError(RuntimeError):
    """Raised when a loss is NaN or infinite; its message is shown without a traceback."""


class Preempted(SystemExit):
    """Raised where a signal stops a run; the exit status is 128 and the signal's number, as shells have it.

    Args:
        number: Of the signal.
        saved: Whether the task in training was saved, too.

    Example:
        >>> Preempted(15, saved=True).code
        143
    """

    def __init__(self, number: int, saved: bool) -> None:
        super().__init__(128 + number)
        self.number, self.saved = number, saved


def check_range(
    owner: str,
    low: float,
    high: float = math.inf,
    /,
    *,
    above: bool = False,
    **values: float | Sequence[float] | None,
) -> None:
    """Refuse values outside of a range; None passes, of several each counts.

    Args:
        owner: Whose they are, as a key is written; empty where keys stand alone.
        low: The least.
        high: The most.
        above: Whether `low` itself is out.
        values: By name.

    Raises:
        InputError: Naming the first one outside, which NaN is.

    Example:
        >>> check_range("ewc", 0, weight=100.0, num_samples=None)
        >>> check_range("lwf", 0, above=True, temperature=0)
        Traceback (most recent call last):
        cl.errors.InputError: lwf.temperature=0 must be above 0.
    """
    for name, value in values.items():
        for number in value if isinstance(value, Sequence) else [value]:
            if number is None or ((low < number if above else low <= number) and number <= high):
                continue
            least = f"above {low}" if above else f"{low} or more"
            wanted = (
                least if high == math.inf else f"{least} and at most {high}" if above else f"between {low} and {high}"
            )
            raise InputError(f"{owner}{'.' if owner else ''}{name}={value} must be {wanted}.")


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for a name that does not exist, with the nearest ones that do.

    Example:
        >>> print(unknown("strategy", "dep", ["derpp", "er", "ewc"]))
        There is no strategy called 'dep': did you mean 'derpp'? Known: derpp, er, ewc.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else "."
    return InputError(f"There is no {kind} called {name!r}{hint} Known: {', '.join(names)}.")
