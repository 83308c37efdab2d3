"""What a person reads of a run: the terminal, files, a picture, W&B. Every reporter sees the same `Run`."""

from __future__ import annotations

import math
import platform
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl.transfer import TransferMatrix

# The scalars of one line, in the words of a reader; all others are in transfer.json.
HEADLINE = {
    "average_accuracy": "average accuracy",
    "bwt_gem": "backward transfer",
    "fwt_gem": "forward transfer",
    "forgetting_chaudhry": "forgetting",
}

_PACKAGES = {
    "clsim": "clsim",
    "torch": "torch",
    "pytorch_lightning": "pytorch-lightning",
    "torchvision": "torchvision",
    "torchmetrics": "torchmetrics",
    "hydra": "hydra-core",
    "numpy": "numpy",
    "timm": "timm",
    "wandb": "wandb",
    "avalanche": "avalanche-lib",
}


@dataclass
class Run:
    """What a report may look at.

    Attributes:
        directory: Where the run's files are.
        config: The resolved configuration.
        task_names: One name a task, in the order of the stream.
        scenario: "class", "task" or "domain".
        matrices: Transfer matrices by mask; the first key is the mask of the scenario.
        notes: Sentences that belong beside the numbers.

    Example:
        >>> from cl.transfer import TransferMatrix
        >>> run = Run(Path("."), {}, ["cats", "dogs"], "class", {"class": TransferMatrix(2, "class")})
        >>> run.primary.num_tasks, run.tasks_learned
        (2, -1)
    """

    directory: Path
    config: dict[str, Any]
    task_names: list[str]
    scenario: str
    matrices: dict[str, TransferMatrix]
    notes: list[str] = field(default_factory=list)

    @property
    def primary(self) -> TransferMatrix:
        """The matrix under the mask of the scenario."""
        return next(iter(self.matrices.values()))

    @property
    def zero_shot(self) -> TransferMatrix:
        """The matrix whose cells above the diagonal measure transfer best: under the mask "task" where there is one."""
        return self.matrices.get("task", self.primary)

    @property
    def tasks_learned(self) -> int:
        """The last measured row of R, -1 before the first."""
        return max(self.primary.measured_rows, default=-1)

    def scalars(self, mask: str) -> dict[str, float]:
        """Return the scalars over the tasks learned so far, all of them NaN before the first."""
        from cl.transfer import SCALARS

        if self.tasks_learned < 1:
            return dict.fromkeys(SCALARS, math.nan)
        return self.matrices[mask].scalars(after_task=self.tasks_learned)


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

    def finish(self, run: Run) -> None:
        """React to the last row having been measured."""


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
    parts = [f"{words} {percent(scalars[name], name in signed)}" for name, words in HEADLINE.items()]
    return f"{mask}: " + ", ".join(parts)


def remarks(run: Run) -> list[str]:
    """Return the sentences that belong beside the numbers: the run's notes, then the caveat of forward transfer."""
    from cl.transfer import caveat

    about = caveat("fwt_gem", run.primary.mask)
    return run.notes + ([f"Forward transfer, {about.rstrip('.')}."] if about else [])


def versions() -> dict[str, str]:
    """Return what the run ran on: interpreter, platform, packages (not imported), GPU, git commit; absent if unknown.

    Example:
        >>> {"python", "platform", "torch"} <= versions().keys()
        True
    """
    import torch

    import cl

    found = {"python": platform.python_version(), "platform": platform.platform(), "clsim": cl.__version__}
    for name, distribution in _PACKAGES.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    commit = _git_commit()
    return {**found, "git_commit": commit} if commit else found


def _git_commit() -> str | None:
    """Return the commit of the working directory, "-dirty" appended where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
