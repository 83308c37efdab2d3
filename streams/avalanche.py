"""Any classification benchmark of Avalanche (Carta et al. 2023), with its transforms and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cl.data.avalanche import drawing, quietly
from cl.data.task import Order, Scenario, Stream, Task, TaskData
from cl.errors import InputError, unknown
from cl.random import derive

TESTS = ("given", "own")
_VALIDATION = ("valid", "validation", "val")  # names of validation streams in Avalanche and its users' code


def avalanche(
    benchmark: Any,
    lazy: bool = False,
    scenario: Scenario | None = None,
    order: Order = None,
    seed: int = 0,
    tests: str = "given",
) -> Stream:
    """Return a stream with a task for each training experience of a benchmark.

    Test experience i belongs to training experience i. If there is a single test experience, every task uses it: the
    whole of it in the domain-incremental scenario, else the examples of the task's classes. Labels stay as they are,
    except if a task-incremental benchmark uses the same labels under several task labels: then the classes of each task
    label are numbered after those of the ones before. Several experiences with one task label are separate tasks.

    Args:
        benchmark: An Avalanche benchmark with the streams "train" and "test", and optionally "valid".
        lazy: Whether inputs are read anew whenever they are needed, at the speed of the dataset, so that random
            training transforms act; labels are then those of `dataset.targets`. `cl.testing.check_stream` refuses such
            a stream, since two readings differ. Else all inputs are read once, and random transforms are drawn from the
            seed.
        scenario: "class", "task" or "domain". None means "task" if task labels differ; else "domain" if experiences
            share classes, else "class". In "class", classes may come again.
        order: Order of the tasks, see `cl.data.task.Stream`.
        seed: Seed of a shuffled order, and of transforms if inputs are read once.
        tests: "given", as above. "own": each task is tested on those examples of its test experience whose classes it
            trains, for benchmarks with one complete test set whose classes come one by one (CORe50's NICv2), or with
            growing test sets. A class of several tasks is then tested in each of them.

    Raises:
        InputError: If the benchmark is not such a one, has no experiences, or they do not fit together.

    Example:
        >>> from cl.data.avalanche import to_avalanche
        >>> from cl.testing import check_stream, toy_stream
        >>> stream = avalanche(to_avalanche(toy_stream(num_tasks=3)))
        >>> stream.scenario, [task.classes for task in stream]
        ('class', [(0, 1), (2, 3), (4, 5)])
        >>> check_stream(stream)
    """
    sides = _datasets(benchmark)
    heads = [_task_labels(dataset) for dataset in sides["train"]]
    parts = _read(sides, lazy, derive(seed, "avalanche"))
    _check_inputs([data for side in parts.values() for data in side])
    classes = [data.labels.unique() for data in parts["train"]]
    if scenario is None:
        again = len(torch.cat(classes)) > len(torch.cat(classes).unique())
        scenario = "task" if len(set(heads)) > 1 else "domain" if again else "class"
    if tests not in TESTS:
        raise unknown("tests", tests, TESTS)
    one_for_all = all(data is parts["test"][0] for data in parts["test"][1:])
    if tests == "given":
        _check_tests(parts["test"], classes, one_for_all and scenario != "domain")
    if tests == "own" or (scenario != "domain" and one_for_all):
        own = [torch.isin(data.labels, seen) for data, seen in zip(parts["test"], classes, strict=True)]
        parts["test"] = [data.take(rows.nonzero().flatten()) for data, rows in zip(parts["test"], own, strict=True)]
    offsets = _offsets(heads, list(zip(*parts.values(), strict=True))) if scenario == "task" else [0] * len(heads)
    moved = {side: [_move(data, t, offsets[t]) for t, data in enumerate(found)] for side, found in parts.items()}
    held_out: Sequence[TaskData | None] = moved.get("val") or [None] * len(heads)
    columns = zip(moved["train"], moved["test"], held_out, strict=True)
    tasks = [Task(t, *row) for t, row in enumerate(columns)]
    return Stream(
        tasks,
        scenario=scenario,
        num_classes=1 + max(int(data.labels.max()) for side in moved.values() for data in side if len(data)),
        name="avalanche",
        repeats=len({c for task in tasks for c in task.classes}) < sum(len(task.classes) for task in tasks),
        order=order,
        seed=seed,
    )


def unnamed(**options: Any) -> Any:
    """Raise an error; it is the default of `stream.benchmark`, where a user must name the benchmark's function.

    Raises:
        InputError: Always.
    """
    raise InputError(
        "stream=avalanche needs a benchmark: name its function, say "
        "stream.benchmark._target_=avalanche.benchmarks.classic.SplitMNIST, and its arguments, say "
        "+stream.benchmark.n_experiences=5."
    )


def _datasets(benchmark: Any) -> dict[str, list[Any]]:
    """Return the datasets of training, test and validation with their transforms, one of each for every task."""
    streams = dict(getattr(benchmark, "streams", {}))
    found = next((name for name in _VALIDATION if name in streams), None)
    try:
        sides = {"train": [experience.dataset.train() for experience in streams["train"]]}
        sides["test"] = [experience.dataset.eval() for experience in streams["test"]]
        if found:
            sides["val"] = [experience.dataset.eval() for experience in streams[found]]
        for dataset in (dataset for side in sides.values() for dataset in side if len(dataset)):
            int(dataset.targets[0])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{type(benchmark).__name__} is not a classification benchmark of Avalanche: give an object with a train "
            "and a test stream, whose experiences hold datasets with one integer label for each example."
        ) from error
    num_tasks = len(sides["train"])
    if len(sides["test"]) == 1:
        sides["test"] *= num_tasks
    for side, datasets in sides.items():
        if not datasets:
            raise InputError(f"The {side} stream of the benchmark has no experiences: give one for each task.")
        if len(datasets) != num_tasks:
            raise InputError(
                f"The benchmark has {len(datasets)} {side} experiences for {num_tasks} training experiences: give one "
                "each, or one test experience for all."
            )
    return sides


def _task_labels(dataset: Any) -> tuple[int, ...]:
    labels = getattr(dataset, "targets_task_labels", None)
    return tuple(sorted(map(int, labels.uniques))) if labels is not None else (0,)


def _read(sides: dict[str, list[Any]], lazy: bool, seed: int) -> dict[str, list[TaskData]]:
    """Read the datasets, each once, even if it is used by several tasks."""
    known: dict[int, TaskData] = {}
    with drawing(seed), quietly():
        for side, datasets in sides.items():
            for t, dataset in enumerate(datasets):
                if id(dataset) not in known:
                    known[id(dataset)] = _read_one(f"The {side} set of experience {t}", dataset, lazy)
    return {side: [known[id(dataset)] for dataset in datasets] for side, datasets in sides.items()}


def _read_one(what: str, dataset: Any, lazy: bool) -> TaskData:
    if not len(dataset):
        raise InputError(f"{what} is empty: every task needs at least one example.")
    try:
        data = TaskData.from_dataset(dataset, lazy=lazy)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    if data.y.ndim != 1 or data.y.is_floating_point():
        raise InputError(
            f"{what} has labels of {data.y.dtype}, shape {tuple(data.y.shape)}: give one integer for each example."
        )
    return data


def _check_tests(tests: Sequence[TaskData], classes: Sequence[Tensor], shared_out: bool) -> None:
    """Refuse test sets with classes that their task does not train, and name the remedy."""
    for t, (data, own) in enumerate(zip(tests, classes, strict=True)):
        untrained = data.labels[~torch.isin(data.labels, own)].unique().tolist()
        if untrained and not shared_out:
            raise InputError(
                f"The test set of experience {t} has classes {_some(untrained)} that it never trains: if there is one "
                "complete test set, or test sets grow, set stream.tests=own, so that each task is tested on its own "
                "classes."
            )


def _some(classes: list[int]) -> str:
    return f"{classes if len(classes) <= 5 else [*classes[:5], '...']}".replace("'", "")


def _move(data: TaskData, task: int, offset: int) -> TaskData:
    return replace(data, y=data.y + offset if offset else data.y, task=task)


def _check_inputs(parts: Sequence[TaskData]) -> None:
    kinds = {(tuple(part.x.shape[1:]), part.x.dtype): None for part in parts}
    if len(kinds) > 1:
        (first, a), (other, b) = list(kinds)[:2]
        raise InputError(
            f"The benchmark's experiences hold {a} inputs of shape {first} and {b} of {other}: bring them to one shape "
            "and type by their transforms."
        )


def _offsets(heads: list[tuple[int, ...]], parts: list[tuple[TaskData, ...]]) -> list[int]:
    """Return the offset of each task's labels by which no two task labels share a class; zeros if none do anyway."""
    mixed = next((t for t, head in enumerate(heads) if len(head) > 1), None)
    if mixed is not None:
        raise InputError(
            f"Training experience {mixed} mixes the task labels {list(heads[mixed])}, where scenario=task needs one: "
            "give stream.scenario=class or stream.scenario=domain."
        )
    labels: dict[int, Tensor] = {}
    for (head,), sides in zip(heads, parts, strict=True):
        here = torch.cat([part.labels for part in sides]).unique()
        labels[head] = torch.cat([labels.get(head, here), here]).unique()
    if len(torch.cat(list(labels.values())).unique()) == sum(map(len, labels.values())):
        return [0] * len(heads)
    start, starts = 0, {}
    for head, own in labels.items():
        starts[head], start = start, start + int(own.max()) + 1
    return [starts[head] for (head,) in heads]
