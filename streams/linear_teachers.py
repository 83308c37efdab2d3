r"""Linear regressions whose transfer matrix is known in closed form.

The setting of Evron et al. 2022, "How catastrophic can catastrophic forgetting be in linear regression?".

Task t has inputs in a subspace of rank r with the orthonormal basis :math:`U_t`, and a teacher :math:`W^*_t = U_t A_t`:

.. math:: U_t = \sqrt{o} \, S + \sqrt{1 - o} \, O_t, \qquad A_t = \rho A_{t-1} + \sqrt{1 - \rho^2} \, E_t

S, which all tasks share, and each task's own O have orthonormal columns, so that the overlap o is the cosine of every
principal angle between two tasks. Columns of A and E have norm 1, and E is orthogonal to the last A, so that the
similarity :math:`\rho` is the correlation of neighbouring teachers (k tasks apart: :math:`\rho^k` on average). Gradient
descent that converges on a task projects the weights on the task's solutions. So R2 on task j after i tasks is

.. math:: W_i = W_{i-1} + P_i (W^*_i - W_{i-1}), \quad P_i = U_i U_i^\top, \qquad
          R_{ij} = 1 - \lVert P_j (W_i - W^*_j) \rVert^2 / \lVert W^*_j \rVert^2

For two tasks from zero weights, forward transfer is :math:`R_{12} = o (2\rho - o)` and forgetting is :math:`R_{11} -
R_{21} = o^2 (1 + o^2 - 2 o \rho)`. With equal teachers, forgetting is :math:`o^2 (1-o)^2`, which is largest at o = 1/2.

Differences from the paper: the paper assumes weights that solve all tasks. Here they exist for every overlap below 1,
and at overlap 1 only for equal teachers. The paper's residual is divided here by the teacher's norm: it is 1 - R2.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from cl.data.dataset import Array
from cl.data.task import MOST_TASKS, Order, Stream, Task, TaskData
from cl.errors import InputError
from cl.random import derive
from cl.ranges import checked


@checked
def geometry(
    num_tasks: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 5,
    rank: int = 5,
    dimension: int = 50,
    overlap: float = 0.5,
    similarity: float = 0.0,
    num_outputs: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the tasks' bases U, float64 (T, D, r), and teachers W*, float64 (T, D, K), in the order before `order`.

    Args:
        num_tasks: Number of tasks, T.
        rank: Dimensions of each task's inputs, r.
        dimension: Dimensions of the whole space, D, at least r (T + 1).
        overlap: o, in [0, 1].
        similarity: rho, in [-1, 1].
        num_outputs: Number of outputs, K.
        seed: Seed of directions and teachers.

    Raises:
        InputError: If an argument is out of range.

    Example:
        >>> U, W = geometry(num_tasks=2, overlap=0.25, similarity=-1.0)
        >>> round((U[0].T @ U[1])[0, 0].item(), 6), round((W[0].T @ W[1]).item(), 6)  # o, o * rho
        (0.25, -0.25)
    """
    if min(num_tasks, rank, num_outputs) < 1 or dimension < rank * (num_tasks + 1):
        raise InputError(
            f"dimension={dimension} does not hold num_tasks={num_tasks} subspaces of rank={rank} and a shared one: "
            f"set it to {rank * (num_tasks + 1)} or more, and each of the others to at least 1."
        )
    if not 0 <= overlap <= 1 or not -1 <= similarity <= 1 or (rank == 1 and abs(similarity) < 1):
        raise InputError(
            f"overlap={overlap} must be in [0, 1], and similarity={similarity} in [-1, 1], with rank=1 either -1 or 1."
        )
    draw = np.random.default_rng(derive(seed, "geometry"))
    shared, *own = np.split(_orthonormal(draw, dimension)[:, : rank * (num_tasks + 1)], num_tasks + 1, axis=1)
    coordinates = [_unit(draw.standard_normal((rank, num_outputs)))]
    for _ in range(1, num_tasks):
        last, fresh = coordinates[-1], draw.standard_normal((rank, num_outputs))
        fresh -= last * (last * fresh).sum(0)
        coordinates.append(similarity * last + (1 - similarity**2) ** 0.5 * _unit(fresh))
    U = np.sqrt(overlap) * shared + np.sqrt(1 - overlap) * np.stack(own)
    return torch.from_numpy(U), torch.from_numpy(U @ np.stack(coordinates))


def _unit(columns: Array) -> Array:
    unit: Array = columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
    return unit


def _orthonormal(draw: np.random.Generator, size: int) -> Array:
    return np.linalg.qr(draw.standard_normal((size, size)))[0]


def expected_transfer(bases: Tensor, teachers: Tensor, initial: Tensor | None = None) -> Tensor:
    r"""Return the R of fine-tuning that converges on every task, by the equations above, (T + 1, T).

    It also gives every metric of `cl.metrics.transfer`, such as forgetting and forward transfer.

    Args:
        bases: U, orthonormal columns, (T, D, r), in the order of learning.
        teachers: W*, (T, D, K).
        initial: Weights of the untrained head, (K, D); None means 0.

    Example:
        >>> from cl.metrics.transfer import forgetting_chaudhry, fwt_gem
        >>> R = expected_transfer(*geometry(num_tasks=2, overlap=0.5, similarity=1.0))
        >>> round(forgetting_chaudhry(R).item(), 6), round(fwt_gem(R).item(), 6)  # o^2 (1-o)^2, o (2 - o)
        (0.0625, 0.75)
    """
    W = torch.zeros_like(teachers[0]) if initial is None else initial.T.to(teachers)

    def row() -> Tensor:
        wrong, whole = (bases.mT @ (W - teachers)).square().sum(1), (bases.mT @ teachers).square().sum(1)
        return (1 - wrong / whole).mean(1)

    rows = [row()]
    for U, teacher in zip(bases, teachers, strict=True):
        W = W + U @ (U.T @ (teacher - W))
        rows.append(row())
    return torch.stack(rows)


@checked
def linear_teachers(
    num_tasks: Annotated[int, Interval(ge=1, le=MOST_TASKS)] = 5,
    rank: int = 5,
    dimension: int = 50,
    overlap: float = 0.5,
    similarity: float = 0.0,
    num_outputs: int = 1,
    num_rows: int = 100,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Return the regressions y = x W* of `geometry`, for a linear head without bias.

    Inputs are rotations of the basis and their negatives, different ones in training and test sets, scaled so that
    their mean is 0 and their second moment K P. So R2 on them is that of the population, and the mean squared error
    over examples and outputs has the gradient 2 P (W - W*): full-batch SGD converges in one step of lr=0.5, and with
    another lr the distance from the solution is multiplied by |1 - 2 lr| at each step.

    Args:
        num_tasks: Number of tasks, T.
        rank: Dimensions of each task's inputs, r.
        dimension: Dimensions of the whole space, D, at least r (T + 1).
        overlap: Cosine of the principal angles between the inputs of two tasks, in [0, 1].
        similarity: Correlation of the teachers of two neighbouring tasks, in [-1, 1].
        num_outputs: Number of outputs, K.
        num_rows: Training examples of each task, and as many test examples; a multiple of 2 r.
        order: See `Stream`.
        seed: Seed of all draws.

    Raises:
        InputError: If an argument is out of range.

    Example:
        >>> stream = linear_teachers(num_tasks=2, similarity=1.0)
        >>> U, W = geometry(num_tasks=2, similarity=1.0)
        >>> x, y, _ = stream[1].train.tensors()
        >>> bool(torch.allclose(x.T @ x / len(x), (U[1] @ U[1].T).float(), atol=1e-6))
        True
    """
    bases, teachers = geometry(num_tasks, rank, dimension, overlap, similarity, num_outputs, seed)
    if num_rows < 1 or num_rows % (2 * rank):
        raise InputError(f"num_rows={num_rows} is not a multiple of {2 * rank}, a rotated basis and its negative.")

    def part(t: int, name: str) -> TaskData:
        draw = np.random.default_rng(derive(seed, name, t))
        turned = [_orthonormal(draw, rank) for _ in range(num_rows // (2 * rank))]
        z = torch.from_numpy(np.concatenate([sign * q for q in turned for sign in (1, -1)]))
        x = (rank * num_outputs) ** 0.5 * z @ bases[t].T
        return TaskData(x.float(), (x @ teachers[t]).float(), t)

    return Stream(
        lambda t: Task(t, part(t, "train"), part(t, "test"), name=f"teacher {t + 1}"),
        scenario="domain",
        num_classes=num_outputs,
        num_tasks=num_tasks,
        name="linear teachers",
        target="regression",
        order=order,
        seed=seed,
    )
