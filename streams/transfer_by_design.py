"""Sequences in which earlier tasks help, hurt or do not affect the last task, the target (Fisch et al. 2023).

=========  ================================================================  =======================================
task       what it is                                                        its step effect on the target
=========  ================================================================  =======================================
positive   the target's classes, with inputs rotated by some degrees         above 0: accuracy rises from chance
negative   the target's inputs, each class with the label of another         below 0: what was learned is unlearned
neutral    permuted inputs with random labels                                0 on average: chance before and after
target     the dataset itself, with few training examples                    it is learned
=========  ================================================================  =======================================

The step effect is E[i, target] = R[i, target] - R[i-1, target], `cl.metrics.transfer.step_effect`. A negative task
follows a positive one, since an accuracy at chance could fall by at most 1 / C. A neutral task comes first, since it
may cause forgetting of what was learned before; its labels do not depend on those of the target.

Differences from the paper: the paper's sequences are of language tasks; here they are built from one dataset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cl.compose import copies, permute_pixels, relabel, transform, turn
from cl.data.dataset import Dataset, split_validation
from cl.data.task import Order, Stream, Task, TaskData
from cl.errors import InputError, unknown
from cl.random import derive

KINDS = {
    "positive": ("positive",),
    "negative": ("positive", "negative"),
    "neutral": ("neutral",),
    "mixed": ("neutral", "positive", "negative"),
}
SIGNS = {"positive": 1, "negative": -1, "neutral": 0}


def designed_signs(stream: Stream) -> tuple[int, ...]:
    """Return the sign of E[i, target] for each task before the target: 1, -1, or 0 on average.

    Raises:
        InputError: If the tasks of the stream have another order, in which signs are different.

    Example:
        >>> from cl.data.sources import digits
        >>> designed_signs(transfer_by_design(digits(), "mixed"))
        (0, 1, -1)
    """
    *names, last = stream.task_names
    if last != "target" or tuple(names) not in KINDS.values():
        raise InputError(f"The tasks of {stream.name!r} are {[*names, last]}: signs are known for order=null only.")
    return tuple(SIGNS[name] for name in names)


def transfer_by_design(
    dataset: Dataset,
    kind: str = "mixed",
    target_rows: int = 100,
    angle: float = 20.0,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Return a domain-incremental sequence whose effects on its last task have known signs.

    The training examples are divided among the tasks, so that no two tasks share one. Every task is tested on the whole
    test set, which is changed in the same way as its training examples.

    Args:
        dataset: Images or vectors.
        kind: "positive" (a positive task, then the target), "negative" (positive, negative, target), "neutral"
            (neutral, target) or "mixed" (neutral, positive, negative, target).
        target_rows: Training examples of the target, drawn evenly by class; the other tasks share the rest.
        angle: The rotation of a positive task in degrees: of images in their plane, of vectors in random planes.
        order: See `Stream`; in another order the signs are different.
        seed: Seed of all draws.

    Raises:
        InputError: If the kind is unknown, targets are not labels, there is only one class, or a task would have too
            few examples.

    Example:
        >>> from cl.data.sources import synthetic
        >>> [(task.name, len(task.train)) for task in transfer_by_design(synthetic(num_train=1000), "negative")]
        [('positive', 450), ('negative', 450), ('target', 100)]
    """
    if kind not in KINDS:
        raise unknown("kind of transfer", kind, KINDS)
    names = (*KINDS[kind], "target")
    rows = _dealt(dataset, target_rows, len(names) - 1, seed)
    whole = copies(dataset, len(names))
    taken = whole.derive(lambda t: replace(whole[t], train=whole[t].train.take(rows[t]), name=names[t]))
    cycle = _draw(seed, "conflicting labels").permutation(dataset.num_classes)
    conflicting = np.empty_like(cycle)
    conflicting[cycle] = np.roll(cycle, 1)  # a permutation without a fixed point
    labelled = relabel(taken, {t: conflicting.tolist() for t, name in enumerate(names) if name == "negative"})

    def change(t: int) -> Callable[[Tensor], Tensor] | None:
        if names[t] == "positive":
            return _turned(dataset.input_shape, angle, seed)
        pixels = torch.from_numpy(_draw(seed, "pixels").permutation(int(np.prod(dataset.input_shape))))
        return partial(permute_pixels, order=pixels) if names[t] == "neutral" else None

    def build(t: int) -> Task:
        if names[t] != "neutral":
            return seen[t]
        draw = _draw(seed, "labels at random")
        return seen[t].each(lambda part: _at_random(part, dataset.num_classes, draw))

    seen = transform(labelled, change, f"{kind} transfer to {dataset.name}")
    return seen.derive(build, class_names=dataset.class_names, order=order, seed=seed)


def _draw(seed: int, what: str) -> np.random.Generator:
    return np.random.default_rng(derive(seed, "transfer by design", what))


def _dealt(dataset: Dataset, target_rows: int, num_others: int, seed: int) -> list[Tensor]:
    """Return the positions of each task's training examples, disjoint and drawn by class, those of the target last."""
    y, num_classes = dataset.train_y, dataset.num_classes
    most = len(y) - num_others * num_classes
    if dataset.target != "label" or num_classes < 2:
        raise InputError(f"{dataset.name!r} needs labels of two classes or more, for labels that conflict.")
    if not num_classes <= target_rows <= most:
        raise InputError(
            f"target_rows={target_rows} of the {len(y)} of {dataset.name!r}: give {num_classes} to {most}, so that "
            "each task can have a row of each class."
        )
    rest, target = split_validation(y, target_rows / len(y), derive(seed, "target"))
    rest = rest[torch.from_numpy(_draw(seed, "rows").permutation(len(rest)))]
    rest = rest[y[rest].argsort(stable=True)]
    return [*(rest[k::num_others].sort().values for k in range(num_others)), target]


def _turned(shape: tuple[int, ...], angle: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Return the rotation of images; or of other inputs, in as many random orthogonal planes as there are."""
    if len(shape) == 3:
        return partial(turn, angle=angle)
    size, radians = int(np.prod(shape)), np.deg2rad(angle)
    axes = np.linalg.qr(_draw(seed, "planes").standard_normal((size, size)))[0]
    a, b = axes[:, : size // 2], axes[:, size // 2 : size // 2 * 2]
    matrix = np.eye(size) + (np.cos(radians) - 1) * (a @ a.T + b @ b.T) + np.sin(radians) * (a @ b.T - b @ a.T)
    return partial(_multiplied, matrix=torch.from_numpy(matrix.astype(np.float32)))


def _multiplied(x: Tensor, matrix: Tensor) -> Tensor:
    return (x.flatten(1) @ matrix).view_as(x)


def _at_random(part: TaskData, num_classes: int, draw: np.random.Generator) -> TaskData:
    """Return the same inputs with random labels, of each class equally many."""
    y = part.y.clone()
    y[slice(None) if part.index is None else part.index] = torch.from_numpy(draw.permutation(len(part)) % num_classes)
    return replace(part, y=y)
