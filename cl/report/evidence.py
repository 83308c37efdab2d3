"""`Evidence`: the measurements of a run, in the shapes that scalars need, and the names of what scalars may need."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cl.errors import unknown
from cl.report.run import Run

# What a scalar may need, and how to get it or why it is missing.
NEEDS = {
    "curves": "report.points=10 (or report.every=N) evaluates inside tasks",
    "even": "report.points=10 gives every task's curve the same number of points",
    "rows": "the sizes of the test sets are not known",
    "accuracy": "only an accuracy over all rows is a mean of those of the tasks",
    "experts": "references=[experts] trains one on each task",
    "joint": "references=[joint] trains one on tasks 1 to k",
    "costs": "cl.measure.resources.Resources, an instrument, records what each task takes",
    "flops": "report.flops=true counts operations",
    "labels": "only labels have a confidence",
    "ridge": "probes=[ridge] fits one after each task",
    "estimates": "estimators=[...] forecasts before each task",
}
INSTRUMENT = "instrument:"  # prefix of a need for one of the user's instruments, followed by its name


def remedy(need: str) -> str:
    """Return how to get what a scalar needs, for the message that it is missing.

    Example:
        >>> remedy("instrument:losses")
        'the run has no instrument called losses: instrument=losses adds it, or instruments={"losses": ...} of cl.run'
    """
    name = need.removeprefix(INSTRUMENT)
    missing = f'the run has no instrument called {name}: instrument={name} adds it, or instruments={{"{name}": ...}}'
    return NEEDS.get(need, f"{missing} of cl.run")


class Evidence:
    """The measurements of a run over the k tasks learned so far, for scalars.

    Args:
        run: The run.

    Attributes:
        R: (k + 1, k) under the mask of the scenario, float64.
        fair_R: (k + 1, k) under the mask "task" if the run has it: only the classes of the task compete, as they do for
            an expert on it.
        k: How many tasks have been learned.
        run: The run.

    Example:
        >>> from cl.testing import toy_run
        >>> Evidence(toy_run(num_tasks=2)).R.shape
        torch.Size([3, 2])
    """

    def __init__(self, run: Run) -> None:
        self.run, self.k = run, max(run.tasks_learned, 0)
        self.R, self.fair_R = (m.R[: self.k + 1, : self.k].double().cpu() for m in (run.primary, run.zero_shot))
        self._curves = run.instruments.get("curves")
        self._resources = run.instruments.get("resources")

    def missing(self, need: str) -> bool:
        """Say whether the run lacks what a scalar needs, a key of `NEEDS` or "instrument:NAME"."""
        if need.startswith(INSTRUMENT):
            return need.removeprefix(INSTRUMENT) not in self.run.instruments
        if need == "even":
            return self.missing("curves") or len({len(curve) for curve in self.own_curves}) != 1
        here = {
            "curves": lambda: self._curves is not None and len(self._curves) > 0,
            "rows": lambda: len(self.run.test_rows) >= self.k,
            "accuracy": lambda: self.run.primary.metric == "accuracy",
            "experts": lambda: "experts" in self.run.references,
            "joint": lambda: "joint" in self.run.references,
            "costs": lambda: self._resources is not None,
            "flops": lambda: self._resources is not None and not any(map(math.isnan, self.column("flops"))),
            "labels": lambda: bool(self.run.calibration),
            "ridge": lambda: "ridge" in self.run.matrices,
            "estimates": lambda: "estimates" in self.run.instruments,
        }
        return not here[need]()

    def records(self, instrument: str) -> list[dict[str, Any]]:
        """Return the records of an instrument, each by column.

        Raises:
            InputError: If the run has no such instrument.
        """
        if instrument not in self.run.instruments:
            raise unknown("instrument", instrument, self.run.instruments)
        found = self.run.instruments[instrument]
        return [dict(zip(found.columns, record, strict=True)) for record in found.records()]

    def column(self, name: str) -> list[float]:
        """Return a column of `resources.csv`, with one entry per task; empty without that instrument."""
        return list(self._resources.column(name)) if self._resources is not None else []

    @property
    def inside(self) -> tuple[Tensor, list[int]]:
        """The curves of all tasks, float64 (N, k), and the task in training at each point; without points at step 0."""
        assert self._curves is not None
        values = self._curves.values()[:, : self.k]
        rows = [n for n, (task, step, _) in enumerate(self._curves.at) if step and task <= self.k]
        return values[rows].double(), [self._curves.at[n][0] for n in rows]

    @property
    def own_curves(self) -> list[list[float]]:
        """The curve of each task while it is trained, from step 0, under the mask of the scenario."""
        return self._own(0)

    @property
    def fair_curves(self) -> list[list[float]]:
        """The same where only the classes of the task compete, as they do for an expert on it."""
        return self._own(list(self.run.calibration or self.run.matrices).index(self.run.zero_shot.mask))

    def _own(self, mask: int) -> list[list[float]]:
        assert self._curves is not None
        return list(self._curves.own(mask)[: self.k])

    @property
    def expert_curves(self) -> list[list[float]]:
        """The curve of each expert, from step 0."""
        return [[value for _, value in one["curve"]] for one in self.run.references["experts"][: self.k]]

    def values(self, kind: str) -> list[float]:
        """Return the metric of each reference of a kind ("experts", "joint") on its task."""
        return [one["value"] for one in self.run.references[kind][: self.k]]

    @property
    def forward(self) -> Tensor:
        """The forward transfer to each task, (k,): against experts if there are any, else zero-shot; NaN for the first.

        Against experts it is R[j,j] - s_j, zero-shot it is R[j-1,j] - R[0,j].
        """
        if not self.missing("experts"):
            gain = self.R[1:].diagonal() - torch.tensor(self.values("experts"), dtype=torch.float64)
        else:
            R = self.run.zero_shot.R[: self.k + 1, : self.k].double().cpu()
            gain = R[:-1].diagonal() - R[0]
        return torch.cat([gain.new_full((1,), math.nan), gain[1:]])
