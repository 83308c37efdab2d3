"""What is learned, and in which order: `TaskData`, `Task` and `Stream`.

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
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal, overload

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor, nn

from cl.data.items import read_items, read_sides
from cl.data.rows import RESIDENT, Items, Rows, kind_of, row_bytes
from cl.data.target import TARGETS, Target, classes_of
from cl.distributed import own, world_size
from cl.errors import InputError, unknown
from cl.random import derive
from cl.ranges import check_range

Scenario = Literal["class", "task", "domain"]
SCENARIOS: tuple[Scenario, ...] = ("class", "task", "domain")
MOST_TASKS = 10_000  # R has a row and a column for each task
Order = Sequence[int] | Literal["shuffled"] | None


@dataclass(frozen=True)
class TaskData:
    """Labelled examples, as a view of base arrays; `tensors` gathers them.

    Args:
        x: Base inputs as stored, (N, *input): uint8 images or float32 arrays; a tensor or other `Rows`.
        y: Stream-wide labels of the N base rows, int64 (N,); or targets, float32 (N, C), see `cl.data.target`.
        task: Task label, one for all rows or int64 (N,).
        index: The n rows of the base arrays that are in the view, in order; None means all of them.
        transform: A deterministic map of gathered inputs (a permutation of pixels, a rotation), which acts on each
            example independently.
    """

    x: Rows
    y: Tensor
    task: int | Tensor = 0
    index: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.y) if self.index is None else len(self.index)

    def __repr__(self) -> str:
        task = f"task {self.task}" if isinstance(self.task, int) else "several tasks"
        return f"TaskData({len(self)} rows of {kind_of(self.x)}, {task})"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs (n, *input), labels (n,) and task labels (n,), gathered and transformed.

        Example:
            >>> data = TaskData(torch.arange(6).view(3, 2), torch.tensor([0, 1, 2]), index=torch.tensor([2, 0]))
            >>> data.tensors()[0].tolist(), data.tensors()[1].tolist()
            ([[4, 5], [0, 1]], [2, 0])
        """
        if self.index is not None:
            x = self.x[self.index]
        else:
            x = self.x if isinstance(self.x, Tensor) else self.x[torch.arange(len(self.x))]
        if self.transform is not None:
            x = self.transform(x)
        return x, self.labels, self.tasks

    def take(self, rows: Tensor) -> TaskData:
        """Return a view of the examples at these positions of this view, int64 (n,).

        Example:
            >>> len(TaskData(torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)).take(torch.tensor([1, 3])))
            2
        """
        index = rows if self.index is None else self.index[rows]
        return TaskData(self.x, self.y, self.task, index, self.transform)

    @cached_property
    def labels(self) -> Tensor:
        """The labels of the view's examples, (n,)."""
        return self.y if self.index is None else self.y[self.index]

    @property
    def tasks(self) -> Tensor:
        """The task labels of the view's examples, (n,)."""
        if isinstance(self.task, int):
            return torch.full((len(self),), self.task, dtype=torch.int64, device=self.y.device)
        return self.task if self.index is None else self.task[self.index]

    def of_tasks(self, labels: Sequence[int]) -> TaskData:
        """Return the examples that have one of these task labels; the same object if all have.

        Example:
            >>> data = TaskData(torch.zeros(3, 2), torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]))
            >>> data.of_tasks([0, 2]).tasks.tolist(), data.of_tasks(range(3)) is data
            ([0, 2], True)
        """
        own = torch.isin(self.tasks, torch.tensor(list(labels)).to(self.tasks.device))
        return self if bool(own.all()) else self.take(own.nonzero().flatten())

    def renumbered(self, task: int, moved: Tensor | None = None) -> TaskData:
        """Return the same examples with another task label.

        Args:
            task: The new label, if all examples have one label now.
            moved: The new label of each old one, for examples of several tasks.

        Raises:
            InputError: If the examples are of several tasks and `moved` is None.
        """
        if isinstance(self.task, int) or len(torch.unique(self.tasks)) < 2:
            return replace(self, task=task)
        if moved is None:
            raise InputError(
                "Rows of several tasks cannot get one task label: change the stream before it blends tasks."
            )
        return replace(self, task=moved[self.task])

    def then(self, transform: Callable[[Tensor], Tensor]) -> TaskData:
        """Return the same examples with another transform after the present one."""
        return replace(self, transform=transform if self.transform is None else _Chain(self.transform, transform))

    @property
    def resident(self) -> bool:
        """Whether the examples are held on the training device as a whole; see `fit`."""
        return TaskData.fit([self])

    @staticmethod
    def fit(parts: Sequence[TaskData]) -> bool:
        """Return whether sets are held as a whole: those from files take at most 1 GiB together, none is `Items`."""
        read = [part for part in parts if not isinstance(part.x, Tensor)]
        small = sum(len(part) * row_bytes(part.x) for part in read) <= RESIDENT
        return small and not any(isinstance(part.x, Items) for part in read)

    def on(self, device: torch.device) -> TaskData:
        """Return the examples gathered on a device if they are `resident`; else the same object."""
        if not self.resident:
            return self
        x, y, task = (column.to(device) for column in self.tensors())
        return TaskData(x.contiguous(), y, task)

    @staticmethod
    def concat(parts: Sequence[TaskData]) -> TaskData:
        """Return several sets one after the other: as a view where they share their base arrays, else gathered.

        Example:
            >>> one = TaskData(torch.zeros(2, 3), torch.tensor([0, 1]), task=4)
            >>> TaskData.concat([one, one]).tasks.tolist()
            [4, 4, 4, 4]
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        if all(p.x is first.x and p.y is first.y and p.transform is first.transform for p in parts):
            index = torch.cat([torch.arange(len(p.y)) if p.index is None else p.index for p in parts])
            task = torch.zeros(len(first.y), dtype=torch.int64)
            if len(torch.unique(index)) == len(index):  # each row has one task label
                task[index] = torch.cat([p.tasks for p in parts])
                return TaskData(first.x, first.y, task, index, first.transform)
        x, y, task = (torch.cat(column) for column in zip(*(part.tensors() for part in parts), strict=True))
        return TaskData(x, y, task)

    @staticmethod
    def from_dataset(dataset: Any, task: int = 0, lazy: bool = False) -> TaskData:
        """Return the examples of a map-style dataset of (input, label, ...) items.

        Args:
            dataset: The dataset; its items are read once, into arrays.
            task: Task label.
            lazy: Whether inputs are read anew whenever they are needed instead, for transforms that draw anew; labels
                are read once in any case.

        Raises:
            InputError: See `cl.data.items.read_items`.

        Example:
            >>> TaskData.from_dataset([(torch.zeros(2), 0), (torch.ones(2), 1)]).x.shape
            torch.Size([2, 2])
        """
        x, y = read_items(dataset, lazy)
        return TaskData(x, y, task)


def shard(data: TaskData) -> TaskData:
    """Return this process's part of some examples, for quantities that are summed over processes.

    See `cl.distributed.own`. If there are fewer examples than the W processes, each process takes all of them: sums are
    then W times as large, and shares of sums are the same.

    Example:
        >>> len(shard(TaskData(torch.zeros(3, 2), torch.arange(3))))
        3
    """
    return data if world_size() == 1 else data.take(own(len(data)))


@dataclass(frozen=True)
class _Chain:
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@dataclass(frozen=True)
class Task:
    """One step of the stream, the unit of `fit`.

    Args:
        index: Position in the stream, from 0; also the task label, which may be hidden at test.
        train: Training examples.
        test: Test examples, never trained on.
        val: Validation examples, drawn from the training set only and never augmented, or None.
        name: Its name in tables and figures.
        unlabelled: Inputs whose label is withheld (y = -1), for semi-supervised strategies, or None.
        hidden: Whether strategies see -1 in place of the labels of the training and validation examples; instruments,
            the validation and R use the labels.
    """

    index: int
    train: TaskData
    test: TaskData
    val: TaskData | None = None
    name: str = ""
    unlabelled: TaskData | None = None
    hidden: bool = False

    def __repr__(self) -> str:
        parts = {"train": self.train, "val": self.val, "test": self.test, "unlabelled": self.unlabelled}
        sizes = ", ".join(f"{len(part)} {name}" for name, part in parts.items() if part is not None)
        return f"Task({self.index}, {self.name!r}: {sizes} rows)"

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """The task's classes, stream-wide and ascending: those of training and test examples with its task label."""
        parts = [part.labels[part.tasks == self.index] for part in (self.train, self.test)]
        return classes_of(torch.cat(parts))

    def without_hidden_labels(self) -> Task:
        """Return the task as strategies see it: -1 in place of each label if it hides them, else the same object.

        Example:
            >>> data = TaskData(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
            >>> task = Task(0, data, data, hidden=True).without_hidden_labels()
            >>> task.train.labels.tolist(), task.test.labels.tolist(), task.classes
            ([-1, -1, -1], [0, 1, 1], (0, 1))
        """
        if not self.hidden:
            return self
        if "_blank" not in self.__dict__:
            blank = replace(self, train=_blank(self.train), val=None if self.val is None else _blank(self.val))
            blank.__dict__["classes"] = self.classes
            self.__dict__["_blank"] = blank
        found: Task = self.__dict__["_blank"]
        return found

    def each(self, change: Callable[[TaskData], TaskData], **fields: Any) -> Task:
        """Return the task with its training, validation, test and unlabelled examples changed.

        Args:
            change: Maps a set of examples to another.
            fields: Other fields to replace, such as the name.

        Example:
            >>> data = TaskData(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
            >>> Task(0, data, data).each(lambda part: part.renumbered(5), index=5).classes
            (0, 1)
        """
        parts = {name: getattr(self, name) for name in ("train", "test", "val", "unlabelled")}
        changed = {name: None if part is None else change(part) for name, part in parts.items()}
        return replace(self, **{**changed, **fields})


def _blank(data: TaskData) -> TaskData:
    return replace(data, y=torch.full_like(data.y, -1))


class Stream(Sequence[Task]):
    """An ordered, finite sequence of tasks that can be iterated twice and nested.

    Args:
        tasks: The tasks; or a function from a position to the task there, called when the task is first needed.
        scenario: What is known at test. "class": all classes seen so far compete; "task": those of the given task
            compete; "domain": every task has the same classes.
        num_classes: Number of classes in the whole stream; for other targets, the number of their columns.
        num_tasks: Number of tasks; needed if `tasks` is a function.
        augment: Train-time augmentation of raw batches, `(x, numpy generator) -> x`.
        normalize: Maps a raw batch to what the backbone receives; the default only divides uint8 by 255.
        class_names: Names of the classes.
        name: Its name in reports.
        target: The kind of target: "label", "multilabel" or "regression", see `cl.data.target`.
        repeats: Whether classes may come again in later tasks of a class- or task-incremental stream.
        boundaries: Whether the learner sees where a task begins and ends. If not, the stream drifts, tasks are only
            points of evaluation, and their examples are trained on in the order in which they are stored.
        order: The order in which the tasks are learned: their positions, or "shuffled"; None keeps the given order.
        seed: Seed of a shuffled order.

    Attributes:
        order: The positions in the order of learning, stored beside the results.

    Raises:
        InputError: If scenario, target or order is unknown, or the number of tasks is not in 1..10,000.
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
        target: str = "label",
        repeats: bool = False,
        boundaries: bool = True,
        order: Order = None,
        seed: int = 0,
    ) -> None:
        if scenario not in SCENARIOS:
            raise InputError(f"scenario={scenario!r} is unknown: use one of {', '.join(SCENARIOS)}.")
        if target not in TARGETS:
            raise unknown("target", target, TARGETS)
        self._build = tasks if callable(tasks) else tasks.__getitem__
        length = num_tasks if callable(tasks) else len(tasks)
        if not length:
            raise InputError(f"Stream {name!r} has no tasks: give at least one.")
        check_range("stream.num_tasks", length, Annotated[int, Interval(ge=1, le=MOST_TASKS)])
        self._tasks: list[Task | None] = [None] * length
        self.order = self._places = _resolve(order, length, seed, name)
        self._moved = None if order is None else torch.tensor(self._places).argsort()  # the new position of each task
        self.scenario: Scenario = scenario
        self.num_classes = num_classes
        self.augment = augment
        self.normalize = normalize
        self.class_names = tuple(class_names)
        self.name = name
        self.target: Target = TARGETS[target]
        self.repeats, self.boundaries = repeats, boundaries

    @staticmethod
    def from_datasets(train: Sequence[Any], test: Sequence[Any], **options: Any) -> Stream:
        """Return a stream with a task for each pair of map-style datasets of (input, label) items.

        Labels are stream-wide. If all datasets name their classes (`class_to_idx`, as torchvision's folders do),
        classes of one name are one class. Labels without a training example are left out, unless `num_classes` is
        given.

        Args:
            train: The training set of each task.
            test: The test set of each task.
            options: Arguments of `Stream`. `num_classes` defaults to the number of classes that have examples, and the
                scenario to "domain" if tasks share classes, else to "class".

        Example:
            >>> cats, dogs = [(torch.zeros(2), 0), (torch.ones(2), 1)], [(torch.zeros(2), 2), (torch.ones(2), 3)]
            >>> stream = Stream.from_datasets([cats, dogs], [cats, dogs])
            >>> stream.num_classes, stream.scenario
            (4, 'class')
        """
        if len(train) != len(test):
            raise InputError(f"{len(train)} training sets but {len(test)} test sets: give each task one of both.")
        inputs, labels, names = read_sides(train, test, options.get("class_names"), "num_classes" in options)
        parts = [TaskData(x, y, k % len(train)) for k, (x, y) in enumerate(zip(inputs, labels, strict=True))]
        tasks = [Task(t, parts[t], parts[len(train) + t]) for t in range(len(train))]
        classes = [c for task in tasks for c in task.classes]
        shared = len(set(classes)) < len(classes)
        width = labels[0].shape[1] if labels[0].ndim > 1 else max(classes) + 1
        defaults = {"num_classes": width, "scenario": "domain" if shared else "class"}
        return Stream(tasks, **{**defaults, **options, "class_names": names})

    def derive(self, build: Callable[[int], Task], num_tasks: int | None = None, **changes: Any) -> Stream:
        """Return a stream of other tasks with the other arguments of this stream, except for the changes.

        Args:
            build: Maps a position to the task there.
            num_tasks: Number of tasks; None means as many as here.
            changes: Arguments of `Stream` that differ.
        """
        shared = ("scenario", "num_classes", "augment", "normalize", "class_names", "name", "repeats", "boundaries")
        same = {key: getattr(self, key) for key in shared} | {"target": self.target.name}
        stream = Stream(build, num_tasks=num_tasks or len(self), **{**same, **changes})
        if num_tasks is None and changes.get("order") is None:
            stream.order = self.order  # its tasks are in this order already
        return stream

    def without_hidden_labels(self) -> Stream:
        """Return the stream as strategies see it; the same object if no task hides its labels."""
        if not any(task.hidden for task in self):
            return self
        return self.derive(lambda position: self[position].without_hidden_labels())

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        what = "classes" if self.target.name == "label" else f"outputs ({self.target.name})"
        about = f"{len(self)} tasks, {self.num_classes} {what}, {self.scenario}-incremental"
        return f"Stream({self.name!r}: {about}{'' if self.boundaries else ', without boundaries'})"

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
            task = self._build(self._places[position])
            if self._moved is not None:
                task = task.each(lambda part: part.renumbered(position, self._moved), index=position)
            self._tasks[position] = task
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
        """Type of a raw input as stored, and so in a memory."""
        return self._example.dtype

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks; a task without one is called by its number, from 1."""
        return [task.name or f"task {task.index + 1}" for task in self]

    def check(self) -> None:
        """Refuse a stream that cannot be learned; `cl.engine.experiment` calls this before any training.

        Raises:
            InputError: If tasks are not numbered from 0, a set is empty or its lengths, types or labels are wrong, a
                task tests classes that it does not train, or tasks share classes that the scenario keeps apart.
        """
        if self.target.name == "regression" and self.scenario != "domain":
            raise InputError(f"{self.name!r} has numbers as targets, which have no classes: set scenario=domain.")
        owner: dict[int, int] = {}
        for position, task in enumerate(self):
            if task.index != position:
                raise InputError(f"Task {position} of {self.name!r} says index={task.index}: number tasks from 0.")
            for part, data in (("train", task.train), ("val", task.val), ("test", task.test)):
                if data is not None:
                    self._check_part(f"The {part} set of task {position} of {self.name!r}", data)
            untrained = set(classes_of(task.test.labels)) - set(classes_of(task.train.labels))
            if untrained and self.boundaries and self.target.name != "regression":
                raise InputError(
                    f"Task {position} of {self.name!r} tests classes {sorted(untrained)} that it never trains: "
                    "remove them from its test set or add training examples."
                )
            for label in task.classes if self.scenario != "domain" and not self.repeats else ():
                if label in owner:
                    raise InputError(
                        f"Class {label} is in tasks {owner[label]} and {position} of {self.name!r}, which "
                        f"scenario={self.scenario} does not allow: give each class one task, use scenario=domain, or "
                        "set repeats=True if classes come again."
                    )
                owner[label] = position

    def _check_part(self, what: str, data: TaskData) -> None:
        if len(data) == 0:
            raise InputError(f"{what} is empty: every task needs at least one example.")
        if len(data.x) != len(data.y):
            raise InputError(f"{what} has {len(data.x)} inputs but {len(data.y)} labels: give one label an input.")
        if len(data.tasks) != len(data):
            raise InputError(f"{what} has {len(data)} rows but {len(data.tasks)} task labels: give one label a row.")
        self.target.check(what, data.labels, self.num_classes)
        first = data.take(torch.tensor([0])).tensors()[0]
        if first.dtype != self.input_dtype or tuple(first.shape[1:]) != self.input_shape:
            raise InputError(
                f"{what} holds {first.dtype} inputs of shape {tuple(first.shape[1:])} where task 0 has "
                f"{self.input_dtype} of {self.input_shape}: give all sets one shape and type."
            )


def _resolve(order: Order, length: int, seed: int, name: str) -> tuple[int, ...]:
    """Return an order as a permutation of the positions 0..`length` - 1."""
    if isinstance(order, str) and order != "shuffled":
        raise InputError(
            f"order={order!r} of {name!r} is unknown: give null, shuffled, or the positions 0..{length - 1}."
        )
    if order == "shuffled":
        order = np.random.default_rng(derive(seed, "task order")).permutation(length).tolist()
    positions = tuple(range(length)) if order is None else tuple(int(t) for t in order)
    if sorted(positions) != list(range(length)):
        raise InputError(f"order={list(positions)} of {name!r}: name each of the positions 0..{length - 1} once.")
    return positions
