"""What each task costs: time, steps, operations, parameters, and what the method keeps."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cl.data.task import Task
from cl.distributed import total
from cl.engine.instrument import Instrument, Instruments
from cl.engine.learner import Learner
from cl.rundir import RESOURCES, TaskCosts
from cl.toolkit.memory import Memory


class Resources(Instrument):
    """Records what a task took, from the strategies' `before_task` to the end of their `after_task`.

    `seconds` is wall time without what the instruments themselves took. `flops` are those of the training steps: one
    step in the middle of the task counted by torch (forward, backward, the strategies' own gradients), times the
    steps; `pass_flops` those of one plain forward and backward pass over the task's rows. What strategies compute
    between tasks (a Fisher, an SVD) is in the seconds alone. `state_bytes` are the strategies' parameters and buffers;
    `memory_bytes`, the exemplar memories at their full capacity, are a part of them. `peak_memory_bytes` is the
    device's peak in the task on a GPU, and that of the whole process so far on a CPU. Of several processes, operations
    and memories are summed, what each has a copy of counts once, and the seconds and the peak are those of process 0.

    Args:
        flops: Whether to count operations; torch's counter takes a second to load.

    Example:
        >>> Resources().columns[:3]
        ('task', 'seconds', 'steps')
    """

    file = RESOURCES.stem
    columns = RESOURCES.columns

    def __init__(self, flops: bool = False) -> None:
        super().__init__()
        self.flops = flops
        self._counter: Any = None
        self._counted = self._a_row = math.nan
        self._began, self._aside = time.perf_counter(), 0.0
        self._others: Instruments | None = None

    def watch(self, instruments: Instruments) -> None:
        """Name the instruments whose time is not the method's."""
        self.__dict__["_others"] = instruments  # not a child, which would be registered in a circle

    def steps(self, learner: Learner) -> Sequence[int]:
        """Return the step that is counted, and the one after it."""
        if not self.flops or learner.compiled or not learner.num_steps or math.isfinite(self._counted):
            return ()
        middle = max(learner.num_steps // 2, learner.step)  # or where the task goes on
        return middle, middle + 1

    def look(self, learner: Learner) -> None:
        """Start counting when all others have looked, or stop before they do."""
        if self._counter is None:
            learner.looks[learner.step].append(self._count)
            return
        self._counter.__exit__(None, None, None)
        self._counted, self._counter = float(self._counter.get_total_flops()), None

    def _count(self, learner: Learner) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        pair = learner.task.train.take(torch.tensor([0, 0]))  # batch norm without statistics takes no single row
        x = learner.prepare(pair.tensors()[0].to(learner.device))
        trained = [p for p in learner.trunk().parameters() if p.requires_grad]
        with learner.evaluating(), FlopCounterMode(display=False) as plain:
            outputs = learner.head(learner.backbone(x))
            if trained:
                torch.autograd.grad(outputs.sum(), trained, allow_unused=True)
        self._a_row = plain.get_total_flops() / 2
        self._counter = FlopCounterMode(display=False)
        self._counter.__enter__()

    def begin(self, learner: Learner) -> None:
        """Start the clock, before anybody's `before_task`."""
        self._began, self._aside, self._counted = time.perf_counter(), self._measuring(), math.nan
        self._a_row = math.nan
        if learner.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(learner.device)

    def after_task(self, learner: Learner, task: Task) -> None:
        """Record the task."""
        aside = self._measuring() - self._aside
        memories = [module for module in learner.strategies.modules() if isinstance(module, Memory)]
        held, counted = sum(map(_bytes, memories)), self._counted * learner.step
        summed = total(torch.tensor([held, sum(map(len, memories)), counted], dtype=torch.float64)).tolist()
        self.add(
            TaskCosts(
                task=task.index + 1,
                seconds=time.perf_counter() - self._began - aside,
                steps=learner.step,
                flops=summed[2],
                parameters=sum(p.numel() for p in learner.trunk().parameters()),
                state_bytes=_bytes(learner.strategies) - held + int(summed[0]),
                memory_bytes=int(summed[0]),
                stored_examples=int(summed[1]),
                peak_memory_bytes=_peak(learner.device),
                measuring_seconds=aside,
                rows=len(task.train),
                pass_flops=self._a_row * len(task.train),
            )
        )

    def get_extra_state(self) -> Any:
        """Return the records, and the present task's clock and count."""
        clock = {"spent": time.perf_counter() - self._began, "aside": self._measuring() - self._aside}
        # between two steps an open counter has counted the one step that it is there for
        counted = self._counted if self._counter is None else float(self._counter.get_total_flops())
        return {"records": list(self._records), **clock, "counted": counted, "a_row": self._a_row}

    def set_extra_state(self, state: Any) -> None:
        """Restore what `get_extra_state` returned; the clock goes on."""
        self._records = list(state["records"])
        self._began, self._aside = time.perf_counter() - state["spent"], self._measuring() - state["aside"]
        self._counted, self._a_row = state["counted"], state["a_row"]

    def _measuring(self) -> float:
        return 0.0 if self._others is None else self._others.seconds

    def column(self, name: str) -> list[float]:
        """Return one column, an entry a task."""
        place = self.columns.index(name)
        return [float(record[place]) for record in self.records()]


def _bytes(module: nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return math.nan
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else 1024 * peak)
