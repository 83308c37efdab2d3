"""Bad input: one clear sentence that names the thing, its value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Raised before any training starts; its message is shown to the user without a traceback."""


class DivergenceError(RuntimeError):
    """Raised when a loss is NaN or infinite; its message is shown without a traceback."""


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
