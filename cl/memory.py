"""Exemplar memories: buffers of fixed shape, filled by reservoir, greedy class balance, or a ring per group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cl.errors import InputError, unknown
from cl.random import Random
from cl.strategy import Batch
from cl.task import Stream

Rows = np.ndarray[Any, np.dtype[np.int64]]
POLICIES = ("reservoir", "class_balanced", "ring")


class Memory(nn.Module):
    """A store of raw exemplars with their labels, task labels and named extras.

    Policies (METHODS: Vitter 1985 for the reservoir, Prabhu et al. 2020 for the greedy balance, Lopez-Paz and
    Ranzato 2017 for the ring):

    - "reservoir": after n insertions each of the n stands here with probability capacity / n.
    - "class_balanced": a newcomer of a class below the largest evicts a random exemplar of a largest class.
    - "ring": each group (a class, or a class of a task where tasks share classes) keeps its last
      `capacity // num_groups` exemplars, the remainder going to the first groups.

    What decides (slots, counts) is drawn and kept on the host; the exemplars lie on the learner's device.

    Args:
        capacity: Exemplars at most, M.
        stream: Tells the shape and type of an input and the number of groups.
        policy: One of the above.
        extras: Shape of one row of each extra, stored as float32.

    Raises:
        InputError: If the policy is unknown, or the capacity is below 1 or, for a ring, below one a group.

    Example:
        >>> from cl.task import Task, TaskData
        >>> data = TaskData(torch.arange(8.0).view(8, 1), torch.arange(8) % 2)
        >>> memory = Memory(4, Stream([Task(0, data, data)], num_classes=2))
        >>> memory.insert(Batch(data.x, data.y, torch.zeros(8, dtype=torch.int64)))
        >>> len(memory), len(memory.sample(3))
        (4, 3)
    """

    x: Tensor
    y: Tensor
    task: Tensor

    def __init__(
        self,
        capacity: int,
        stream: Stream,
        policy: str = "reservoir",
        extras: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        if policy not in POLICIES:
            raise unknown("memory policy", policy, POLICIES)
        if capacity < 1:
            raise InputError(f"A memory of {capacity} exemplars holds nothing: set memory_size to 1 or more.")
        self.capacity, self.policy, self.num_classes = capacity, policy, stream.num_classes
        self.num_groups = stream.num_classes * (len(stream) if stream.scenario == "domain" else 1)
        if policy == "ring" and capacity < self.num_groups:
            raise InputError(
                f"memory_size={capacity} is smaller than the {self.num_groups} groups (classes of tasks) that a ring "
                f"memory keeps one of each: set memory_size to {self.num_groups} or more."
            )
        self.random = Random()
        self.num_seen = 0
        self.register_buffer("x", torch.zeros(capacity, *stream.input_shape, dtype=stream.input_dtype))
        self.register_buffer("y", torch.zeros(capacity, dtype=torch.int64))
        self.register_buffer("task", torch.zeros(capacity, dtype=torch.int64))
        self._extras = tuple(extras or {})
        for name, shape in (extras or {}).items():
            self.register_buffer(f"extra_{name}", torch.zeros(capacity, *shape))
        # The host's view. A ring's group g owns the slots from _start[g] on, _size[g] of them.
        groups = np.arange(self.num_groups)
        self._size = capacity // self.num_groups + (groups < capacity % self.num_groups)
        self._start = np.concatenate(([0], self._size.cumsum()[:-1]))
        self._received = np.zeros(self.num_groups, dtype=np.int64)  # how many each group was ever offered
        self._group = np.full(capacity, -1, dtype=np.int64)  # the group in each slot, -1: free
        self._stored = 0

    def __len__(self) -> int:
        return self._stored

    def sample(self, size: int) -> Batch:
        """Draw without replacement, at most what is stored: rows (size, ...) with their extras."""
        size = min(size, self._stored)
        rows = self.random.generator.choice(self._stored, size, replace=False, shuffle=False)
        if self.policy == "ring":
            ends = np.minimum(self._received, self._size).cumsum()
            group = np.searchsorted(ends, rows, side="right")
            rows = self._start[group] + rows - np.concatenate(([0], ends))[group]
        index = torch.from_numpy(rows).to(self.y.device)
        extras = {name: self.get_buffer(f"extra_{name}")[index] for name in self._extras}
        return Batch(self.x[index], self.y[index], self.task[index], extras)

    def insert(self, batch: Batch) -> None:
        """Offer the rows of a batch, in order; the policy decides which are kept, and where."""
        slots = getattr(self, f"_slots_{self.policy}")(batch)
        # Of two rows for one slot the later stays, as if they had been inserted one by one.
        last = dict(zip(slots.tolist(), range(len(slots)), strict=True))
        last.pop(-1, None)
        if not last:
            return
        where = torch.tensor(list(last), device=self.y.device)
        rows = torch.tensor(list(last.values()), device=self.y.device)
        self.x[where], self.y[where], self.task[where] = batch.x[rows], batch.y[rows], batch.task[rows]
        for name in self._extras:
            stored = self.get_buffer(f"extra_{name}")
            stored[where] = batch.extras[name][rows].to(stored.dtype)

    def _slots_reservoir(self, batch: Batch) -> Rows:
        count = self.num_seen + np.arange(len(batch))
        draw = (self.random.generator.random(len(batch)) * (count + 1)).astype(np.int64)
        slots = np.where(count < self.capacity, count, np.where(draw < self.capacity, draw, -1))
        self.num_seen += len(batch)
        self._stored = min(self.capacity, self.num_seen)
        return slots

    def _slots_ring(self, batch: Batch) -> Rows:
        groups = np.asarray(self._groups(batch), dtype=np.int64)
        order = np.argsort(groups, kind="stable")
        first = np.searchsorted(groups[order], groups[order])  # where the row's group starts among the sorted rows
        rank = np.empty_like(groups)
        rank[order] = np.arange(len(groups)) - first
        slots: Rows = self._start[groups] + (self._received[groups] + rank) % self._size[groups]
        self._received += np.bincount(groups, minlength=self.num_groups)
        self._stored = int(np.minimum(self._received, self._size).sum())
        self.num_seen += len(batch)
        return slots

    def _slots_class_balanced(self, batch: Batch) -> Rows:
        slots = np.full(len(batch), -1, dtype=np.int64)
        held = np.bincount(self._group[self._group >= 0], minlength=self.num_groups)
        for row, group in enumerate(self._groups(batch)):
            if self._stored < self.capacity:
                slots[row] = self._stored
                self._stored += 1
            elif held[group] < held.max():
                largest = self.random.generator.choice(np.flatnonzero(held == held.max()))
                slots[row] = self.random.generator.choice(np.flatnonzero(self._group == largest))
                held[largest] -= 1
            else:
                continue
            self._group[slots[row]] = group
            held[group] += 1
        self.num_seen += len(batch)
        return slots

    def _groups(self, batch: Batch) -> list[int]:
        shared = self.num_groups > self.num_classes
        groups: list[int] = (batch.task * self.num_classes + batch.y if shared else batch.y).tolist()
        return groups

    def get_extra_state(self) -> dict[str, Any]:
        """Return what the host keeps: the count of insertions, and the slots' groups."""
        return {
            "num_seen": self.num_seen,
            "stored": self._stored,
            "group": torch.from_numpy(self._group.copy()),
            "received": torch.from_numpy(self._received.copy()),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        self.num_seen, self._stored = state["num_seen"], state["stored"]
        self._group, self._received = state["group"].cpu().numpy().copy(), state["received"].cpu().numpy().copy()
