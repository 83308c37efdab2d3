"""Exemplar memories: buffers of fixed shape, filled by reservoir sampling, greedy class balance or a ring per group."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cl.data.task import Stream
from cl.distributed import share, world_size
from cl.engine.batch import Batch
from cl.errors import InputError, unknown
from cl.random import Random

if TYPE_CHECKING:
    from cl.engine.strategy import LearnerLike

Rows = np.ndarray[Any, np.dtype[np.int64]]
POLICIES = ("reservoir", "class_balanced", "ring")
STORAGES = ("device", "host", "disk")
_AHEAD = 1024  # examples whose slots are drawn at a time


class Memory(nn.Module):
    """A store of raw exemplars with their labels, task labels and named extras.

    Policies (Vitter 1985 for the reservoir, Prabhu et al. 2020 for the greedy balance, Lopez-Paz and Ranzato 2017 for
    the ring):

    - "reservoir": after n insertions, each of the n examples is stored with probability capacity / n.
    - "class_balanced": a new example of a class that is smaller than the largest one replaces a random exemplar of a
      largest class.
    - "ring": each group (a class, or a class of a task if tasks share classes) keeps its last
      `capacity // num_groups` exemplars; the first groups keep one more until the capacity is used.

    Slots and counts are computed and stored on the host. A step costs O(B) for B examples, whatever the capacity. Each
    of W processes holds M / W exemplars from its own examples, and samples them by its own generator.

    Args:
        capacity: Largest number of exemplars of all processes together, M.
        stream: The stream, which has the shape and type of an input and the number of groups.
        policy: "reservoir", "class_balanced" or "ring".
        extras: Shape of one example's value of each extra, which is stored as float32.
        storage: Where exemplars are stored: "device", the learner's; "host"; or "disk", a memory-mapped file without a
            name in the folder for temporary files. Checkpoints contain them in each case.

    Raises:
        InputError: If policy or storage is unknown, they do not fit into it, or a process's share of the capacity is
            below 1 or, for a ring, smaller than the number of groups.

    Example:
        >>> from cl.data.task import Task, TaskData
        >>> data = TaskData(torch.arange(8.0).view(8, 1), torch.arange(8) % 2)
        >>> memory = Memory(4, Stream([Task(0, data, data)], num_classes=2))
        >>> memory.insert(Batch(data.x, data.y, torch.zeros(8, dtype=torch.int64)))
        >>> len(memory), len(memory.sample(3))
        (4, 3)
    """

    here: Tensor
    by_rank = True  # each process has its own state

    def __init__(
        self,
        capacity: int,
        stream: Stream,
        policy: str = "reservoir",
        extras: Mapping[str, tuple[int, ...]] | None = None,
        storage: str = "device",
    ) -> None:
        super().__init__()
        _check(capacity, stream, policy, storage)
        self.num_groups = stream.num_classes * (len(stream) if stream.scenario == "domain" else 1)
        if policy == "ring" and capacity // world_size() < self.num_groups:
            where = f" in each of {world_size()} processes" if world_size() > 1 else ""
            raise InputError(
                f"memory_size={capacity} is smaller than the {self.num_groups} groups (classes of tasks) that a ring "
                f"memory keeps one of each{where}: set memory_size to {self.num_groups * world_size()} or more."
            )
        capacity = share("memory_size", capacity)
        self.capacity, self.policy, self.num_classes = capacity, policy, stream.num_classes
        self.random = Random(by_rank=True)
        self.num_seen = 0
        self._extras = tuple(extras or {})
        self._off_device: dict[str, Tensor] = {}
        self.register_buffer("here", torch.empty(0), persistent=False)  # follows the learner
        columns: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "x": (stream.input_shape, stream.input_dtype),
            "y": stream.target.row(stream.num_classes),
            "task": ((), torch.int64),
        }
        columns |= {name: (shape, torch.float32) for name, shape in (extras or {}).items()}
        _check_room(capacity, sum(math.prod(shape) * dtype.itemsize for shape, dtype in columns.values()), storage)
        for name, (shape, dtype) in columns.items():
            if storage == "device":
                self.register_buffer(f"rows_{name}", torch.zeros(capacity, *shape, dtype=dtype))
            else:
                make = torch.zeros if storage == "host" else _on_disk
                self._off_device[name] = make((capacity, *shape), dtype=dtype)
        # State on the host. Group g of a ring owns _size[g] slots, from _start[g] on.
        groups = np.arange(self.num_groups)
        self._size = capacity // self.num_groups + (groups < capacity % self.num_groups)
        self._start = np.concatenate(([0], self._size.cumsum()[:-1]))
        self._received = np.zeros(self.num_groups, dtype=np.int64)  # examples of each group that were ever inserted
        self._group = np.full(capacity, -1, dtype=np.int64)  # class_balanced: the group in each slot, -1: free
        self._held = np.zeros(self.num_groups, dtype=np.int64)  # class_balanced: exemplars of each group
        self._stored = 0
        self._ahead, self._at = np.zeros(0, dtype=np.int64), 0  # reservoir: slots of the next examples

    def __len__(self) -> int:
        return self._stored

    def __repr__(self) -> str:
        return f"Memory({len(self)} of {self.capacity} exemplars, {self.policy})"

    def column(self, name: str) -> Tensor:
        """Return all slots of "x", "y", "task" or an extra, (capacity, ...), including free ones."""
        return self._off_device[name] if self._off_device else getattr(self, f"rows_{name}")

    def sample(self, size: int) -> Batch:
        """Draw exemplars with their extras without replacement; all of them if fewer than `size` are stored."""
        return self.at(self.draw(size))

    def extend(self, batch: Batch, size: int | None = None) -> Batch:
        """Return a batch with drawn exemplars appended; the same object while the memory is empty.

        Args:
            batch: The batch.
            size: How many exemplars are drawn at most; None means as many as the batch has incoming examples.
        """
        return batch.append(self.sample(size or batch.num_incoming)) if len(self) else batch

    def draw(self, size: int) -> Rows:
        """Draw positions of exemplars without replacement, for `at`; all of them if fewer than `size` are stored."""
        return self._distinct(min(size, self._stored))

    def rows(self) -> Batch:
        """Return all exemplars with their extras, in the order of slots, as a copy on the learner's device."""
        return self.at(np.arange(self._stored))

    def at(self, rows: Rows) -> Batch:
        """Return the exemplars at some positions, 0 to len - 1, with their extras; except for a ring, these are slots.

        Example:
            >>> from cl.testing import toy_stream
            >>> memory = Memory(4, toy_stream(2))
            >>> memory.put(Batch(*toy_stream(2)[0].train.tensors()).take(slice(3)), np.array([0, 1, -1]))
            >>> memory.at(np.array([1, 0])).y.tolist(), len(memory)
            ([1, 0], 2)
        """
        if self.policy == "ring":
            ends = np.minimum(self._received, self._size).cumsum()
            group = np.searchsorted(ends, rows, side="right")
            rows = self._start[group] + rows - np.concatenate(([0], ends))[group]
        index = torch.from_numpy(rows).to(self.column("y").device, non_blocking=True)
        drawn = [self.column(name).index_select(0, index) for name in ("x", "y", "task", *self._extras)]
        if self._off_device:
            drawn = [values.to(self.here.device, non_blocking=True) for values in drawn]
        x, y, task, *extras = drawn
        return Batch(x, y, task, dict(zip(self._extras, extras, strict=True)))

    def insert(self, batch: Batch) -> None:
        """Insert the examples of a batch in order; the policy decides which are stored, and in which slots.

        With several updates per batch, only the call at the last of them inserts.
        """
        if batch.again:
            return
        self._write(batch, getattr(self, f"_slots_{self.policy}")(batch))

    def overwrite(self, name: str, rows: Rows, values: Tensor) -> None:
        """Replace "x", "y", "task" or an extra of the exemplars at some positions, as in `at`, which differ."""
        assert self.policy != "ring", "positions are no slots"
        column = self.column(name)
        column[torch.from_numpy(rows).to(column.device)] = values.to(column)

    def put(self, batch: Batch, slots: Rows) -> None:
        """Store examples in given slots, for a strategy with a rule of its own; -1 stores none.

        New slots follow those in use: slot `len(memory)` first. With several updates per batch, only the call at the
        last of them stores.
        """
        assert self.policy == "reservoir", "the slots of other policies belong to groups"
        if batch.again:
            return
        self._write(batch, slots)
        self._stored = max(self._stored, int(slots.max(initial=-1)) + 1)
        self.num_seen += len(batch)

    def _write(self, batch: Batch, slots: Rows) -> None:
        # Of two examples for one slot the later is stored, as if they had been inserted one by one.
        kept = {slot: row for row, slot in enumerate(slots.tolist()) if slot >= 0}
        if not kept:
            return
        where, rows = torch.tensor(list(kept)), torch.tensor(list(kept.values()))
        offered = {"x": batch.x, "y": batch.y, "task": batch.task, **{n: batch.extras[n] for n in self._extras}}
        for name, values in offered.items():
            column = self.column(name)
            chosen = values.index_select(0, rows.to(values.device, non_blocking=True))
            late = column.is_cuda  # a copy from a GPU to the host must be complete before it is read
            column.index_copy_(0, where.to(column.device, non_blocking=True), chosen.to(column, non_blocking=late))

    def fill(self, batch: Batch) -> None:
        """Replace all exemplars by the examples of a batch, at most the capacity, in their order.

        This is for strategies that choose exemplars themselves. The state is then that of a reservoir into which only
        these examples were inserted.
        """
        assert self.policy == "reservoir", "the slots of other policies belong to groups"
        for name, values in (("x", batch.x), ("y", batch.y), ("task", batch.task), *batch.extras.items()):
            self.column(name)[: len(batch)].copy_(values)
        self._stored = self.num_seen = len(batch)
        self._ahead, self._at = self._ahead[:0], 0

    def _distinct(self, size: int) -> Rows:
        if size * size < self._stored:  # a draw with replacement is cheaper, and mostly has no repeat
            while True:
                rows = self.random.generator.integers(self._stored, size=size)
                if len(set(rows.tolist())) == size:
                    return rows
        return self.random.generator.choice(self._stored, size, replace=False, shuffle=False)

    def _slots_reservoir(self, batch: Batch) -> Rows:
        if self._at + len(batch) > len(self._ahead):
            self._draw_ahead(len(batch))
        slots = self._ahead[self._at : self._at + len(batch)]
        self._at += len(batch)
        self.num_seen += len(batch)
        self._stored = min(self.capacity, self.num_seen)
        return slots

    def _draw_ahead(self, rows: int) -> None:
        rest = self._ahead[self._at :]
        count = self.num_seen + len(rest) + np.arange(max(rows, _AHEAD))
        draw = (self.random.generator.random(len(count)) * (count + 1)).astype(np.int64)
        slots = np.where(count < self.capacity, count, np.where(draw < self.capacity, draw, -1))
        self._ahead, self._at = np.concatenate([rest, slots]), 0

    def _slots_ring(self, batch: Batch) -> Rows:
        groups = self._groups(batch)
        order = np.argsort(groups, kind="stable")
        first = np.searchsorted(groups[order], groups[order])  # where the group begins among the sorted examples
        rank = np.empty_like(groups)
        rank[order] = np.arange(len(groups)) - first
        slots: Rows = self._start[groups] + (self._received[groups] + rank) % self._size[groups]
        self._received += np.bincount(groups, minlength=self.num_groups)
        self._stored = int(np.minimum(self._received, self._size).sum())
        self.num_seen += len(batch)
        return slots

    def _slots_class_balanced(self, batch: Batch) -> Rows:
        slots = np.full(len(batch), -1, dtype=np.int64)
        held, most = self._held, int(self._held.max())
        for row, group in enumerate(self._groups(batch).tolist()):
            if self._stored < self.capacity:
                slots[row] = self._stored
                self._stored += 1
            elif held[group] < most:
                slots[row] = self._slot_of_a_largest(most)
                held[self._group[slots[row]]] -= 1
            else:
                continue
            self._group[slots[row]] = group
            held[group] += 1
            most = int(held.max())
        self.num_seen += len(batch)
        return slots

    def _slot_of_a_largest(self, most: int) -> int:
        """Draw slots until one is of a largest group, on average at most as many as there are groups."""
        while True:
            slots = self.random.generator.integers(self.capacity, size=16)
            fits = np.flatnonzero(self._held[self._group[slots]] == most)
            if len(fits):
                return int(slots[fits[0]])

    def _groups(self, batch: Batch) -> Rows:
        y, task = (column.cpu().numpy() for column in (batch.y, batch.task)) if batch.host is None else batch.host
        return task * self.num_classes + y if self.num_groups > self.num_classes else y

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state on the host: counts of insertions, groups of slots, and exemplars off the device."""
        return {
            "num_seen": self.num_seen,
            "stored": self._stored,
            "group": torch.from_numpy(self._group.copy()),
            "received": torch.from_numpy(self._received.copy()),
            "ahead": torch.from_numpy(self._ahead[self._at :].copy()),
            "rows": {name: column.clone() for name, column in self._off_device.items()},
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the state that `get_extra_state` returned."""
        self.num_seen, self._stored = state["num_seen"], state["stored"]
        self._group, self._received = state["group"].cpu().numpy().copy(), state["received"].cpu().numpy().copy()
        self._ahead, self._at = state["ahead"].cpu().numpy().copy(), 0
        self._held = np.bincount(self._group[self._group >= 0], minlength=self.num_groups)
        for name, column in self._off_device.items():
            column.copy_(state["rows"][name])


def remark_without(name: str, learner: LearnerLike) -> str | None:
    """Return a remark that a method without exemplars fails in class-incremental learning; None if it does not apply.

    Args:
        name: Name of the method.
        learner: The learner. The remark applies if its scenario is "class" and there are several tasks, unless a
            strategy has a `Memory` or owns `training_data`.

    Example:
        >>> from cl.testing import toy_learner
        >>> remark_without("EWC", toy_learner()[0])[:46]
        'EWC keeps no exemplars: it never sees the clas'
        >>> remark_without("EWC", toy_learner(scenario="task")[0])
    """
    remembers = any(isinstance(module, Memory) for module in learner.strategies.modules())
    if learner.scenario != "class" or learner.num_tasks == 1 or remembers or learner.strategies.owned("training_data"):
        return None
    return (
        f"{name} keeps no exemplars: it never sees the classes of different tasks together, so it cannot learn to tell "
        "them apart, and in the class-incremental scenario ends near fine-tuning (van de Ven and Tolias 2019, "
        '"Three scenarios for continual learning"): add a method that keeps some (`cl-list strategy memory=yes`), or '
        "use scenario=task."
    )


def _check(capacity: int, stream: Stream, policy: str, storage: str) -> None:
    if policy not in POLICIES:
        raise unknown("memory policy", policy, POLICIES)
    if storage not in STORAGES:
        raise unknown("memory storage", storage, STORAGES)
    if policy != "reservoir" and stream.target.name != "label":
        raise InputError(
            f"A {policy} memory counts classes, but the targets of {stream.name!r} are {stream.target.name}: use "
            "policy=reservoir."
        )
    if capacity < 1:
        raise InputError(f"A memory of {capacity} exemplars holds nothing: set memory_size to 1 or more.")


def _check_room(capacity: int, row_bytes: int, storage: str) -> None:
    """Refuse more bytes than the machine has: a kernel may grant memory and kill the process when it is written to."""
    if storage == "disk":
        room = shutil.disk_usage(tempfile.gettempdir()).free
    elif hasattr(os, "sysconf"):
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if capacity * row_bytes > room:
        raise InputError(
            f"memory_size={capacity} takes {capacity * row_bytes / 1e9:.3g} GB, and the {storage} has "
            f"{room / 1e9:.3g} GB: lower it{'' if storage == 'disk' else ', or try storage=disk'}."
        )


def _on_disk(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros in a memory-mapped file, which is deleted together with them."""
    folder = tempfile.mkdtemp(prefix="clsim-memory-")
    path = Path(folder) / "rows"
    try:
        flat = torch.from_file(str(path), shared=True, size=max(1, math.prod(shape)), dtype=dtype)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"A memory does not fit into {folder} ({reason}): set TMPDIR to another folder.") from error
    finally:
        path.unlink(missing_ok=True)  # the mapped content exists until the mapping is closed
        Path(folder).rmdir()
    return flat[: math.prod(shape)].view(shape)
