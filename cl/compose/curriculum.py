"""The Curriculum Designer, which ranks the orders in which to learn classes from features, before any training.

Singh et al., "Learning to Learn: How to Continuously Teach Humans and Machines", ICCV 2023, arXiv 2211.15470. Features
come from a frozen network that never saw the stream. `class_distances` computes a matrix D of class distances from
them, `design_orders` proposes orders, `rank_orders` scores any orders, and `effectiveness` scores an order after it was
learned. A stream learns an order that it is given as `class_order`.

    >>> x, y = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.arange(4)
    >>> distances = class_distances(x, y, metric="euclidean")
    >>> design_orders(distances)
    [(3, 0, 1, 2), (2, 3, 0, 1)]
    >>> [(round(score, 4), order) for score, order in rank_orders(distances)[:2]]
    [(3.4915, (1, 3, 2, 0)), (3.4861, (0, 3, 2, 1))]

Differences from the paper and from the reference code (ZhangLab-DeepNeuroCogLab/Learning2Learn). The full text of the
paper was not available, so only the code was compared.

- The variance of a row is over all C entries, its zero included, with divisor C, as in the reference code. That code
  then divides the variances by their sum over classes before the score takes 1 minus them. Here the score takes the
  variance itself, which has less weight: it is of order 1/C^2, where the shares are of order 1/C.
- "otdd" is the distance of two classes as Gaussians, a part of OTDD: see `class_distances`.
- The mean of a class is that of its examples; the reference code averages the means of batches, the last one smaller.
- The reference generator fails on an even number of classes, where one class is left for two ends; here that class
  takes the one free position. The reference scorer visits that middle class from both ends, which adds exactly 1 to
  every score; so does this one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cl.errors import InputError, unknown

METRICS = ("cosine", "euclidean", "otdd")
MAX_CLASSES = 8  # 8! = 40320 orders


def class_distances(features: Tensor, labels: Tensor, metric: str = "cosine") -> Tensor:
    r"""Return the distance of every class to every other, as a share of all its distances.

    D(i, j) = d(i, j) / sum_k d(i, k), so D is not symmetric. With the mean m and the covariance S (divisor: the number
    of examples) of each class, d is one of

    - "cosine": 1 - cos(m_i, m_j);
    - "euclidean": ||m_i - m_j||;
    - "otdd": the 2-Wasserstein distance of N(m_i, S_i) and N(m_j, S_j),
      d^2 = ||m_i - m_j||^2 + tr(S_i + S_j - 2 (S_i^{1/2} S_j S_i^{1/2})^{1/2}), the mean term and the Bures term.

    OTDD proper (Alvarez-Melis and Fusi, NeurIPS 2020) transports examples, at a cost of the squared distance of two
    examples plus the d^2 above of their classes. With one class on either side its square is W_2^2 of the examples plus
    d^2, so at least 2 d^2, and exactly that where the classes are Gaussian: then its D is ours. The reference code
    takes the regularised squared cost, as released of raw pixels.

    Args:
        features: (N, D), finite; of a frozen network, flattened.
        labels: (N,), the classes 0..C-1, each with at least one example.
        metric: "cosine", "euclidean" or "otdd".

    Returns:
        (C, C) float64 in [0, 1], zero diagonal, each row adds up to 1.

    Raises:
        InputError: If shapes disagree, a value is not finite, a class lacks examples, or a row has no distance above 0.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
        >>> (6 * class_distances(x, torch.tensor([0, 1, 2]))).round().int().tolist()
        [[0, 2, 4], [3, 0, 3], [4, 2, 0]]
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    _check_features(features, labels)
    x = features.detach().double()
    classes = [x[labels == c] for c in range(int(labels.max()) + 1)]
    means = torch.stack([rows.mean(0) for rows in classes])
    if metric == "cosine":
        means = _unit(means)
    distances = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
    if metric == "otdd":
        distances = _wasserstein(classes, distances)
    alone = distances.sum(1) <= 1e-12 * means.norm(dim=1).max()  # equal up to rounding
    if alone.any():
        raise InputError(
            f"Class {int(alone.nonzero()[0])} lies at {metric} distance 0 from every other class: "
            "use other features or another metric."
        )
    if metric == "cosine":
        distances = distances.square() / 2  # 1 - cos of unit vectors, without its cancellation
    return distances / distances.sum(1, keepdim=True)


def design_orders(distances: Tensor, top_k: int = 2) -> list[tuple[int, ...]]:
    """Return the designer's own orders, one for each candidate start class.

    Candidates are the classes whose row of D varies least. An order is filled inward from both ends: the remaining
    class farthest from the start class goes to the front, and the nearest to the back. So an order is the start class,
    and then all others from the farthest to the nearest. Up to four classes, no order with that start scores higher;
    with more classes one may, since `order_score` compares each class with the one before it. An order with another
    start often scores higher: a row that varies more may gain more from near and far classes than it loses by its
    variance.

    Args:
        distances: The matrix D of `class_distances`, (C, C).
        top_k: Number of candidate start classes, 1..C.

    Returns:
        `top_k` permutations of 0..C-1, that of the smallest variance first. Of classes with equal values, the lower one
        starts first and comes later in an order, as in the reference code.

    Raises:
        InputError: If `distances` is not such a matrix, or `top_k` is out of range.

    Example:
        >>> design_orders(torch.tensor([[0.0, 0.4, 0.6], [0.2, 0.0, 0.8], [0.3, 0.7, 0.0]]), top_k=1)
        [(0, 2, 1)]
    """
    table = _check_distances(distances)
    if not 1 <= top_k <= len(table):
        raise InputError(f"top_k={top_k} is outside 1..{len(table)} classes: ask for that many start classes.")
    starts = _variances(table).argsort(stable=True)[:top_k].tolist()
    return [(c, *(other for other in table[c].argsort(stable=True).flip(0).tolist() if other != c)) for c in starts]


def order_score(order: Sequence[int], distances: Tensor) -> float:
    """Return the designer's score of an order p_1, ..., p_C of the classes, higher is better.

    A(p) = 1 - var(D(p_1, .)) + sum_{k=1}^{floor(C/2)} [1 - D(p_k, p_{C+1-k}) + D(p_k, p_{k+1})]: a class near the
    current one belongs at the mirrored end of the order and a class far from it comes next. No unit; between 3/4 and
    1 + 2 floor(C/2). Renaming the classes does not change it.

    Args:
        order: A permutation of 0..C-1.
        distances: (C, C), of `class_distances`.

    Raises:
        InputError: If `order` is not a permutation or `distances` not such a matrix.

    Example:
        >>> D = torch.tensor([[0.0, 0.4, 0.6], [0.2, 0.0, 0.8], [0.3, 0.7, 0.0]])
        >>> round(order_score((0, 2, 1), D), 6)  # 1 - 0.186667/3 + 1 - 0.4 + 0.6
        2.137778
    """
    return rank_orders(distances, [order])[0][0]


def rank_orders(
    distances: Tensor, orders: Iterable[Sequence[int]] | None = None
) -> list[tuple[float, tuple[int, ...]]]:
    """Return orders with their `order_score`, best first.

    Args:
        distances: (C, C), of `class_distances`.
        orders: Permutations of 0..C-1; None means all C! of them, up to 8 classes.

    Returns:
        Pairs (score, order); equal scores in lexicographic order.

    Raises:
        InputError: If there are too many classes to rank all orders, or as `order_score` does.

    Example:
        >>> D = torch.tensor([[0.0, 0.4, 0.6], [0.2, 0.0, 0.8], [0.3, 0.7, 0.0]])
        >>> [order for _, order in rank_orders(D)]
        [(1, 2, 0), (2, 1, 0), (0, 2, 1), (0, 1, 2), (2, 0, 1), (1, 0, 2)]
    """
    table = _check_distances(distances)
    num_classes = len(table)
    if orders is None:
        if num_classes > MAX_CLASSES:
            raise InputError(
                f"{num_classes} classes have too many orders to rank them all (at most {MAX_CLASSES} classes): "
                "give the orders, say those of design_orders."
            )
        orders = itertools.permutations(range(num_classes))
    rows = [tuple(int(c) for c in order) for order in orders]
    for row in rows:
        if sorted(row) != list(range(num_classes)):
            raise InputError(f"order={row} is not a permutation of 0..{num_classes - 1}: name each class once.")
    scores = _scores(torch.tensor(rows, dtype=torch.int64).view(-1, num_classes), table).tolist()
    return sorted(zip(scores, rows, strict=True), key=lambda pair: (-pair[0], pair[1]))


def effectiveness(accuracy: float, drop: float) -> float:
    """Return the effectiveness of a curriculum, F = 2a / (Da + 1), the harmonic mean of a and 1/D; higher is better.

    a is the final mean accuracy over tasks, and D = R_11 - R_T1 is the drop of the first task's accuracy. F is at least
    0 and not bounded by 1: D = 0 gives 2a, a negative D (backward transfer) gives more, and a = 1, D = -1 gives
    infinity. Clip D at 0 to use F as an objective.

    Args:
        accuracy: a, in [0, 1], or NaN.
        drop: D, in [-1, 1], or NaN.

    Returns:
        F, which is NaN if either is NaN.

    Raises:
        InputError: If a value is out of range, as percentages are.

    Example:
        >>> round(effectiveness(0.84, 0.06), 6)
        1.599391
    """
    for name, value, low in (("accuracy", accuracy, 0), ("drop", drop, -1)):
        if value < low or value > 1:
            raise InputError(f"{name}={value} is outside {low}..1: give fractions, not percentages.")
    divisor = drop * accuracy + 1
    return 2 * accuracy / divisor if divisor else math.inf


def _check_features(features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or 0 in features.shape:
        raise InputError(
            f"features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}: give (N, D) and (N,)."
        )
    if not features.isfinite().all():
        row = int((~features.isfinite()).any(1).nonzero()[0])
        raise InputError(f"The features of example {row} are not finite: remove it or repair the feature network.")
    found = labels.unique().tolist()
    if len(found) < 2 or found != list(range(len(found))):
        raise InputError(
            f"labels name the classes {found} where 0..C-1 with C of at least 2 are needed: "
            "renumber them, as labels.unique(return_inverse=True) does, or add classes."
        )


def _unit(means: Tensor) -> Tensor:
    norm: Tensor = means.norm(dim=1, keepdim=True)
    if (norm == 0).any():
        c = int((norm == 0).nonzero()[0, 0])
        raise InputError(f"Class {c} has mean feature 0, which has no direction: use metric='euclidean'.")
    return means / norm


def _wasserstein(classes: list[Tensor], mean_distances: Tensor) -> Tensor:
    """Return the 2-Wasserstein distances (C, C) of classes (N_c, D) as Gaussians."""
    # S = A^T A for centred rows A, and A = QR, so R is a root of S of min(N, D) rows: no D x D matrix where N < D.
    roots = [torch.linalg.qr((rows - rows.mean(0)) / len(rows) ** 0.5, mode="r").R for rows in classes]
    trace = torch.stack([root.square().sum() for root in roots])
    scale = mean_distances.square() + trace[:, None] + trace[None]
    square = scale.clone().fill_diagonal_(0)
    for i, j in itertools.combinations(range(len(roots)), 2):
        # tr (S_i^1/2 S_j S_i^1/2)^1/2 is the nuclear norm of R_i R_j^T.
        square[i, j] = square[j, i] = scale[i, j] - 2 * torch.linalg.svdvals(roots[i] @ roots[j].T).sum()
    return square.where(square > 1e-12 * scale, 0).sqrt()  # equal Gaussians: cancellation leaves rounding errors


def _check_distances(distances: Tensor) -> Tensor:
    table = distances.detach().double().cpu()
    if table.ndim != 2 or table.shape[0] != table.shape[1] or len(table) < 2:
        raise InputError(f"distances have shape {tuple(table.shape)}: give (C, C) with at least 2 classes.")
    off = (table.sum(1) - 1).abs()
    good = (table >= 0).all(1) & (table.diagonal() == 0) & (off < 1e-4)
    if not good.all():
        c = int((~good).nonzero()[0])
        raise InputError(
            f"Row {c} of distances is {[round(d, 4) for d in table[c].tolist()]}, not shares of at least 0 that add up "
            "to 1 with 0 to itself: give the matrix of class_distances."
        )
    return table


def _variances(table: Tensor) -> Tensor:
    variances: Tensor = table.var(1, correction=0)
    return variances


def _scores(orders: Tensor, table: Tensor) -> Tensor:
    """Return the scores (M,) of orders (M, C)."""
    steps = orders.shape[1] // 2
    current, following, mirrored = orders[:, :steps], orders[:, 1 : steps + 1], orders.flip(1)[:, :steps]
    return 1 - _variances(table)[orders[:, 0]] + (1 - table[current, mirrored] + table[current, following]).sum(1)
