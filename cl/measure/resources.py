"""The costs of each task: time, steps, operations, parameters, and the memory of the method."""

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
    """Records the costs of a task, from the strategies' `before_task` to the end of their `after_task`.

    `seconds` is wall time without the time of the instruments. `flops` are the operations of the training steps: torch
    counts one step in the middle of the task (forward, backward, the strategies' own gradients), and the count is
    multiplied by the number of steps. `pass_flops` are the operations of one plain forward and backward pass over the
    task's examples. Computations of strategies between tasks (a Fisher information, an SVD) are in the seconds alone.
    `state_bytes` are the strategies' parameters and buffers; `memory_bytes`, the exemplar memories at full capacity,
    are a part of them. `peak_memory_bytes` is the peak in the task on a GPU, and that of the process so far on a CPU.
    In several processes, operations and memories are summed, state of which each process has a copy counts once, and
    the seconds and the peak are those of process 0.

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
        """Store the instruments, whose time is subtracted."""
        self.__dict__["_others"] = instruments  # not as a sub-module, which would make a circle of modules

    def steps(self, learner: Learner) -> Sequence[int]:
        """Return the step whose operations are counted, and the next one."""
        if not self.flops or learner.compiled or not learner.num_steps or math.isfinite(self._counted):
            return ()
        middle = max(learner.num_steps // 2, learner.step)  # the present step, if the task resumes after its middle
        return middle, middle + 1

    def look(self, learner: Learner) -> None:
        """Start to count after all other instruments have measured, or stop before they do."""
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
        """Start the clock, before the `before_task` of the strategies."""
        self._began, self._aside, self._counted = time.perf_counter(), self._measuring(), math.nan
        self._a_row = math.nan
        if learner.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(learner.device)

    def after_task(self, learner: Learner, task: Task) -> None:
        """Record the costs of the task."""
        aside = self._measuring() - self._aside
        memories = [module for module in learner.strategies.modules() if isinstance(module, Memory)]
        held, counted = sum(map(_bytes, memories)), self._counted * learner.step
        summed = total(torch.tensor([held, sum(map(len, memories)), counted], dtype=torch.float64)).tolist()
        self.add(
            TaskCosts(
                task=task.index + 1,
                seconds=time.perf_counter() - self._began - aside,
                steps=learner.step * learner.updates,
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
        """Return the records, and the time and operations of the present task so far."""
        clock = {"spent": time.perf_counter() - self._began, "aside": self._measuring() - self._aside}
        # a counter that is still open has counted its one step, as this is called between two steps
        counted = self._counted if self._counter is None else float(self._counter.get_total_flops())
        return {"records": list(self._records), **clock, "counted": counted, "a_row": self._a_row}

    def set_extra_state(self, state: Any) -> None:
        """Restore what `get_extra_state` returned; the clock continues from that time."""
        self._records = list(state["records"])
        self._began, self._aside = time.perf_counter() - state["spent"], self._measuring() - state["aside"]
        self._counted, self._a_row = state["counted"], state["a_row"]

    def _measuring(self) -> float:
        return 0.0 if self._others is None else self._others.seconds

    def column(self, name: str) -> list[float]:
        """Return one column, with one entry per task."""
        position = self.columns.index(name)
        return [float(record[position]) for record in self.records()]


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
