"""How the hyper-parameters of runs were chosen, in words, and the remarks that follow for a leaderboard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cl.compare.read import COSTS, RunFiles

MARKS = {"tune_first": "tuning, not a result", "tune_everything": "tuned on all test sets"}
_WORDS = {
    "": "as given",
    "tune_first": "a trial of a search on the validation sets of the first tasks",
    "tune_everything": "a trial of a search on the test sets of all tasks",
}


def protocol(run: RunFiles) -> str:
    """Return the name of a run's protocol of tuning, or ""."""
    return str(run.tuning.get("protocol") or "")


def found(run: RunFiles) -> dict[str, Any]:
    """Return the values that a search found, by key of the configuration.

    Example:
        >>> from pathlib import Path
        >>> found(RunFiles(Path("."), {}, tuning={"protocol": "score_rest", "optimizer.lr": 0.1, "trials": 3}))
        {'optimizer.lr': 0.1}
    """
    return {key: value for key, value in run.tuning.items() if key not in ("protocol", *COSTS)}


def chosen(run: RunFiles) -> str:
    """Return in words how the hyper-parameters of a run were chosen.

    Example:
        >>> from pathlib import Path
        >>> chosen(RunFiles(Path("."), {}, tuning={"protocol": "score_rest"}))
        'as given, the first tasks left out'
    """
    name = protocol(run)
    if name == "score_rest":
        searched = bool(found(run)) or "trials" in run.tuning
        return "by a search on the first tasks, left out here" if searched else "as given, the first tasks left out"
    return _WORDS.get(name, name)


def mark(runs: Iterable[RunFiles]) -> str:
    """Return the remark on the tuning of a group in a leaderboard: the gravest of those that hold for its runs, or "".

    Example:
        >>> from pathlib import Path
        >>> mark([RunFiles(Path("."), {}), RunFiles(Path("."), {}, tuning={"protocol": "tune_first"})])
        'tuning, not a result'
    """
    protocols = {protocol(run) for run in runs}
    return next((text for name, text in MARKS.items() if name in protocols), "")
