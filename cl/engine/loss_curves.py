"""Training curves: the mean of each loss term over a fixed number of steps, whatever the chunk size.

Beside the loss terms they hold what strategies record: in a step, averaged like a loss; between steps, as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from lightning_fabric.loggers.logger import Logger
from torch import Tensor

from cl.errors import InputError
from cl.rundir import RECORD


class Curves:
    """Collects the loss terms of each step on the device, and logs their means.

    Args:
        every: Steps that a point is the mean of.

    Example:
        >>> curves = Curves(every=2)
        >>> for step in (1, 2, 3):
        ...     curves.add({"loss": torch.tensor(float(step))})
        >>> curves.log([], task=1, step=3)
        >>> len(curves.waiting)
        1
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.waiting: list[dict[str, Tensor]] = []  # the terms of each step that was not logged yet
        self.between: list[tuple[int, int, str, float]] = []  # recorded between steps: task, step, name, value

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add the loss terms of one step, detached scalars by name."""
        self.waiting.append(terms)

    def record(self, name: str, value: float | Tensor, at: tuple[int, int] | None) -> None:
        """Add a strategy's own number.

        Args:
            name: The name of its curve.
            value: A number or a scalar tensor.
            at: The task, from 1, and the step over the stream, between two steps; None inside a step.

        Raises:
            InputError: If the name has other characters than letters, digits, _, -, . and /, or the value is not one
                number.

        Example:
            >>> curves = Curves(every=2)
            >>> curves.record("alpha", 0.5, at=(1, 0))
            >>> curves.between
            [(1, 0, 'record/alpha', 0.5)]
        """
        if not re.fullmatch(r"[\w./-]+", name):
            raise InputError(f"record({name!r}, ...): choose a name of letters, digits, _, -, . and /.")
        number = value.detach().float() if isinstance(value, Tensor) else _number(name, value)
        if number.numel() != 1:
            raise InputError(f"record({name!r}, ...) takes one number, not a tensor {tuple(number.shape)}: reduce it.")
        if at is None:
            self.waiting[-1][RECORD + name] = number.reshape(())
        else:
            self.between.append((*at, RECORD + name, float(number)))

    def log(self, loggers: Sequence[Logger], task: int, step: int, rest: bool = False) -> None:
        """Log every complete point among the steps that were not logged yet, at the last step that it is the mean of.

        Args:
            loggers: The loggers that receive the points.
            task: Number of the present task, from 1.
            step: Steps over the stream so far.
            rest: Whether to log a last point of fewer steps too.
        """
        for logger in loggers:
            for at, when, name, value in self.between:
                logger.log_metrics({name: value, "train/task": at}, step=when)
        self.between = []
        while len(self.waiting) >= self.every or (rest and self.waiting):
            terms, self.waiting = self.waiting[: self.every], self.waiting[self.every :]
            if loggers:
                names = dict.fromkeys(name for point in terms for name in point)
                means = {_curve(name): _mean([point[name] for point in terms if name in point]) for name in names}
            for logger in loggers:
                logger.log_metrics({**means, "train/task": task}, step=step - len(self.waiting))
                logger.save()  # so that the curves can be watched, and survive a killed run


def _curve(name: str) -> str:
    return name if name.startswith(RECORD) else f"train/{name}"


def _number(name: str, value: Any) -> Tensor:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"record({name!r}, {value!r}): give a number or a scalar tensor.")
    return torch.tensor(float(value))


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.stack(list(values)).float().mean())
