"""Training curves: the mean of each loss term over a fixed number of steps, whatever the chunk size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning_fabric.loggers.logger import Logger
from torch import Tensor


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
        self.waiting: list[dict[str, Tensor]] = []

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add the loss terms of one step, detached scalars by name."""
        self.waiting.append(terms)

    def log(self, loggers: Sequence[Logger], task: int, step: int, rest: bool = False) -> None:
        """Log every complete point among the steps that were not logged yet, at the last step that it is the mean of.

        Args:
            loggers: The loggers that receive the points.
            task: Number of the present task, from 1.
            step: Steps over the stream so far.
            rest: Whether to log a last point of fewer steps too.
        """
        while len(self.waiting) >= self.every or (rest and self.waiting):
            terms, self.waiting = self.waiting[: self.every], self.waiting[self.every :]
            if loggers:
                names = dict.fromkeys(name for point in terms for name in point)
                means = {f"train/{name}": _mean([point[name] for point in terms if name in point]) for name in names}
            for logger in loggers:
                logger.log_metrics({**means, "train/task": task}, step=step - len(self.waiting))
                logger.save()  # so that the curves can be watched, and survive a killed run


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.stack(list(values)).float().mean())
