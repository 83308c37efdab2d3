"""The wording of numbers and remarks that all reports share."""

from __future__ import annotations

import math

from cl.metrics.transfer import caveat
from cl.report.run import Run

# The scalars of the headline, with the words for them; all others are in transfer.json.
HEADLINE = {
    "average_accuracy": "average accuracy",
    "bwt_gem": "backward transfer",
    "fwt_gem": "forward transfer",
    "forgetting_chaudhry": "forgetting",
}


def percent(value: float, signed: bool = False, digits: int = 1) -> str:
    """Return a fraction as text in percent; "-" if it is NaN.

    Example:
        >>> percent(0.8449), percent(0.2, signed=True), percent(-0.0001, signed=True), percent(float("nan"))
        ('84.5', '+20.0', '0.0', '-')
    """
    if math.isnan(value):
        return "-"
    text = f"{100 * value:{'+' if signed else ''}.{digits}f}"
    return text[1:] if text[0] in "+-" and float(text) == 0 else text


def headline(run: Run, mask: str) -> str:
    """Return the main scalars of R under one mask, as one line in percent."""
    scalars = run.scalars(mask)
    signed = {"bwt_gem", "fwt_gem"}
    metric = run.matrices[mask].metric
    words = {name: text.replace("accuracy", metric) for name, text in HEADLINE.items()}
    parts = [f"{text} {percent(scalars[name], name in signed)}" for name, text in words.items()]
    return f"{mask}: " + ", ".join(parts)


def named(run: Run, mask: str) -> str:
    """Return the words for the key of a matrix: "... mask" for the mask of a scenario, else "... probe".

    Example:
        >>> from pathlib import Path
        >>> named(Run(Path("."), {}, [], "class", {}), "ridge")
        'ridge probe'
    """
    return f"{mask} mask" if mask in ("class", "task", "domain") or mask.startswith(run.scenario) else f"{mask} probe"


def remarks(run: Run) -> list[str]:
    """Return the sentences to show beside the results: the run's notes, then the caveat of forward transfer."""
    about = caveat("fwt_gem", run.primary.mask) if run.primary.metric == "accuracy" else None
    drift = "No boundaries: a row of R is an evaluation point, where strategies do what they do at the end of a task."
    return run.notes + [drift] * (not run.boundaries) + ([f"Forward transfer, {about.rstrip('.')}."] if about else [])
