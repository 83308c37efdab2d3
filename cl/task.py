"""What is learned, in which order: `TaskData`, `Task` and `Stream`.

A stream needs no base class. A function that returns a `Stream` is enough:

    >>> import torch
    >>> def two_blobs(seed: int = 0) -> Stream:
    ...     draw = torch.Generator().manual_seed(seed)
    ...     tasks = []
    ...     for t in range(2):
    ...         y = torch.arange(40) % 2 + 2 * t
    ...         x = torch.randn(40, 3, generator=draw) + y[:, None]
    ...         tasks.append(Task(index=t, train=TaskData(x[:30], y[:30], t), test=TaskData(x[30:], y[30:], t)))
    ...     return Stream(tasks, scenario="class", num_classes=4)
    >>> stream = two_blobs()
    >>> len(stream), stream.input_shape, stream[1].classes
    (2, (3,), (2, 3))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from cl.errors import InputError

Scenario = Literal["class", "task", "domain"]
SCENARIOS: tuple[Scenario, ...] = ("class", "task", "domain")


@dataclass(frozen=True)
class TaskData:
    """Labelled examples: a view of base arrays until `tensors` gathers them.

    Args:
        x: Base inputs as stored, (N, *input): uint8 images or float32 arrays, possibly memory-mapped.
        y: Stream-wide labels of the N base rows, int64 (N,).
        task: Task label, one for all rows or int64 (N,).
        index: The rows of the base arrays that belong, in order; None means all of them.
        transform: A deterministic map of gathered inputs (a permutation of pixels, a rotation), applied once.
    """

    x: Tensor
    y: Tensor
    task: int | Tensor = 0
    index: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.y) if self.index is None else len(self.index)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs (n, *input), labels (n,) and task labels (n,), gathered and transformed.

        Example:
            >>> data = TaskData(torch.arange(6).view(3, 2), torch.tensor([0, 1, 2]), index=torch.tensor([2, 0]))
            >>> data.tensors()[0].tolist(), data.tensors()[1].tolist()
            ([[4, 5], [0, 1]], [2, 0])
        """
        x, y = (self.x, self.y) if self.index is None else (self.x[self.index], self.y[self.index])
        if self.transform is not None:
            x = self.transform(x)
        if isinstance(self.task, int):
            return x, y, torch.full_like(y, self.task)
        return x, y, self.task if self.index is None else self.task[self.index]

    def take(self, rows: Tensor) -> TaskData:
        """Return the view of some of this view's rows.

        Example:
            >>> len(TaskData(torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)).take(torch.tensor([1, 3])))
            2
        """
        index = rows if self.index is None else self.index[rows]
        return TaskData(self.x, self.y, self.task, index, self.transform)

    @cached_property
    def labels(self) -> Tensor:
        """The labels of the rows that belong, (n,)."""
        return self.y if self.index is None else self.y[self.index]

    @staticmethod
    def concat(parts: Sequence[TaskData]) -> TaskData:
        """Return the union of several, one after the other, gathered.

        Example:
            >>> one = TaskData(torch.zeros(2, 3), torch.tensor([0, 1]), task=4)
            >>> TaskData.concat([one, one]).task.tolist()
            [4, 4, 4, 4]
        """
        x, y, task = (torch.cat(column) for column in zip(*(part.tensors() for part in parts), strict=True))
        return TaskData(x, y, task)

    @staticmethod
    def from_dataset(dataset: Sequence[tuple[object, int]], task: int = 0) -> TaskData:
        """Read any map-style dataset of (input, label) pairs into arrays, once.

        Example:
            >>> TaskData.from_dataset([(torch.zeros(2), 0), (torch.ones(2), 1)]).x.shape
            torch.Size([2, 2])
        """
        pairs = [dataset[i] for i in range(len(dataset))]
        inputs = [torch.as_tensor(np.asarray(x)) for x, _ in pairs]
        return TaskData(torch.stack(inputs), torch.tensor([int(y) for _, y in pairs]), task)


@dataclass(frozen=True)
class Task:
    """One step of the stream, the unit of `fit`.

    Args:
        index: Position in the stream, from 0; also the task label, which may be hidden at test.
        train: Training examples.
        test: Test examples, never trained on.
        val: Validation examples, drawn from the training set only and never augmented, or None.
        name: What tables and pictures call it.
    """

    index: int
    train: TaskData
    test: TaskData
    val: TaskData | None = None
    name: str = ""

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """The stream-wide classes of the task, ascending."""
        return tuple(torch.unique(self.train.labels).tolist())


class Stream(Sequence[Task]):
    """An ordered, finite sequence of tasks that can be iterated twice and nested.

    Args:
        tasks: The tasks, or a function from the position to the task, called when it is first needed.
        scenario: What is known at test: "class" (all seen classes compete), "task" (those of the given
            task), "domain" (the same labels in every task).
        num_classes: Width of the label space over the whole stream.
        num_tasks: Length; needed where `tasks` is a function.
        augment: Train-time augmentation, `(x, numpy generator) -> x`, on raw batches.
        normalize: Maps a raw batch to what the backbone receives; the default only divides uint8 by 255.
        class_names: Names of the classes.
        name: What reports call the stream.

    Raises:
        InputError: If a task is empty, a label lies outside the range, or a class stands in two tasks of
            a class- or task-incremental stream.
    """

    def __init__(
        self,
        tasks: Sequence[Task] | Callable[[int], Task],
        *,
        scenario: Scenario = "class",
        num_classes: int,
        num_tasks: int | None = None,
        augment: Callable[[Tensor, np.random.Generator], Tensor] | None = None,
        normalize: nn.Module | None = None,
        class_names: Sequence[str] = (),
        name: str = "stream",
    ) -> None:
        if scenario not in SCENARIOS:
            raise InputError(f"scenario={scenario!r} is unknown: use one of {', '.join(SCENARIOS)}.")
        self._build = tasks if callable(tasks) else tasks.__getitem__
        length = num_tasks if callable(tasks) else len(tasks)
        if not length:
            raise InputError(f"Stream {name!r} has no tasks: give at least one.")
        self._tasks: list[Task | None] = [None] * length
        self.scenario: Scenario = scenario
        self.num_classes = num_classes
        self.augment = augment
        self.normalize = normalize
        self.class_names = tuple(class_names)
        self.name = name

    def __len__(self) -> int:
        return len(self._tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        task = self._tasks[position]
        if task is None:
            task = self._tasks[position] = self._build(position)
        return task

    def __iter__(self) -> Iterator[Task]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def _example(self) -> Tensor:
        x: Tensor = self[0].train.take(torch.tensor([0])).tensors()[0]
        return x

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one raw input."""
        return tuple(self._example.shape[1:])

    @property
    def input_dtype(self) -> torch.dtype:
        """Type of a raw input as stored, and so as a memory keeps it."""
        return self._example.dtype

    @property
    def task_names(self) -> list[str]:
        """One name a task."""
        return [task.name or f"task {task.index + 1}" for task in self]

    def check(self) -> None:
        """Refuse a stream that cannot be learned as it stands; `cl.experiment` calls it before any training.

        Raises:
            InputError: One sentence naming the task, the value and the remedy.
        """
        owner: dict[int, int] = {}
        for position, task in enumerate(self):
            if task.index != position:
                raise InputError(f"Task {position} of {self.name!r} says index={task.index}: number tasks from 0.")
            for part, data in (("train", task.train), ("val", task.val), ("test", task.test)):
                if data is not None:
                    self._check_part(f"The {part} set of task {position} of {self.name!r}", data)
            strangers = set(task.test.labels.unique().tolist()) - set(task.classes)
            if strangers:
                raise InputError(
                    f"Task {position} of {self.name!r} tests classes {sorted(strangers)} that it never trains: "
                    "remove them from its test set or add training examples."
                )
            for label in task.classes if self.scenario != "domain" else ():
                if label in owner:
                    raise InputError(
                        f"Class {label} stands in tasks {owner[label]} and {position} of {self.name!r}, which "
                        f"scenario={self.scenario} does not allow: give each class one task, or use scenario=domain."
                    )
                owner[label] = position

    def _check_part(self, what: str, data: TaskData) -> None:
        if len(data) == 0:
            raise InputError(f"{what} is empty: every task needs at least one example.")
        if len(data.x) != len(data.y):
            raise InputError(f"{what} has {len(data.x)} inputs but {len(data.y)} labels: give one label an input.")
        low, high = int(data.labels.min()), int(data.labels.max())
        if low < 0 or high >= self.num_classes:
            bad = low if low < 0 else high
            raise InputError(f"{what} has label {bad}, outside 0..{self.num_classes - 1}: fix it or num_classes.")
        first = data.take(torch.tensor([0])).tensors()[0]
        if first.dtype != self.input_dtype or tuple(first.shape[1:]) != self.input_shape:
            raise InputError(
                f"{what} holds {first.dtype} inputs of shape {tuple(first.shape[1:])} where task 0 has "
                f"{self.input_dtype} of {self.input_shape}: bring them to one shape and type."
            )
