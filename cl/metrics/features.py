r"""Probes of frozen features, and the similarity of two representations: ridge and k-NN probes, and linear CKA.

A probe matrix `P` (T + 1, T) has the layout of the transfer matrix: `P[i, j]` is the test accuracy, on the task of
index j, of a probe that is fitted to the features of the network after i tasks. As every probe is fitted again, a loss
in P is one of the representation and not of the classifier.

The probes and CKA run on the device of the features, in float64 (float32 on a device without it), and do not
synchronise with it if `classes` is given. They return NaN if the result is undefined: features that are not finite, no
test example, a constant representation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cl.errors import InputError
from cl.metrics.transfer import bwt_gem, fwt_gem

Classes = Sequence[int] | Tensor | None

_WITHOUT_FLOAT64 = {"mps"}
_BLOCK = 2**24  # distances held at once: 128 MiB in float64


# --------------------------------------------------------------------------- probes


def ridge_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    classes: Classes = None,
    penalty: float = 1e-2,
) -> Tensor:
    """Ridge probe: test accuracy of the closed-form linear classifier of `ridge_scores`.

    In [0, 1], higher is better; 0-d, on the device of the features. NaN if a feature is not finite or no test example
    exists. Invariant to the order of rows and of features and to any affine map of a single feature, not to rotations:
    standardising depends on the axes.

    Args:
        train_x: (n, D) features.
        train_y: (n,) integer labels.
        test_x: (m, D) features.
        test_y: (m,) integer labels.
        classes: Competing labels; None takes those of `train_y`, which reads the device once. A label that is not
            among them is no class: as a target it is all zeros, as a test label it is never hit.
        penalty: Above 0, a multiple of n.

    Raises:
        InputError: If shapes disagree, there is no training row or no class, or the penalty is not above 0.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([0, 0, 1, 1])
        >>> ridge_probe(x, y, torch.tensor([[2.0], [4.0], [2.5], [9.0]]), torch.tensor([0, 1, 1, 1]))
        tensor(0.7500, dtype=torch.float64)
    """
    _check(train_x, train_y, test_x, test_y)
    labels = _labels(classes, train_y)
    scores = ridge_scores(train_x, train_y, test_x, labels, penalty)
    return _accuracy(scores, labels, test_y, train_x, test_x)


def ridge_scores(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, classes: Classes = None, penalty: float = 1e-2
) -> Tensor:
    r"""Scores (m, C) of ridge regression on centred one-hot targets, columns in ascending order of the labels.

    With X the training features standardised by their mean and standard deviation (divisor n; constant features are
    left at zero) and Y the centred targets,

    .. math:: W = (X^\top X + \lambda n I)^{-1} X^\top Y = X^\top (X X^\top + \lambda n I)^{-1} Y,

    whichever system is smaller, and the scores are X_test W plus the class frequencies. Source: Hoerl and Kennard 1970;
    the dual is Saunders et al. 1998. Unlike a logistic probe it has a closed-form solution, and its penalty is the same
    for every row of P.

    Args:
        train_x: (n, D) features.
        train_y: (n,) integer labels.
        test_x: (m, D) features.
        classes: Competing labels, as in `ridge_probe`.
        penalty: lambda, above 0.

    Raises:
        InputError: As `ridge_probe`.

    Example:
        >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> ridge_scores(x, y, torch.tensor([[0.0], [1.0]]), penalty=1.0)  # half of the slope 1/2 is left
        tensor([[0.5000, 0.5000],
                [0.2500, 0.7500]], dtype=torch.float64)
    """
    _check(train_x, train_y, test_x)
    if not penalty > 0:
        raise InputError(f"penalty={penalty} must be above 0: the system may have no unique solution without it.")
    x, test = _precise(train_x), _precise(test_x)
    mean, std = x.mean(0), x.std(0, correction=0)
    scale = torch.where(std == 0, 0, 1 / std)
    x, test = (x - mean) * scale, (test - mean) * scale
    targets = _one_hot(train_y, _labels(classes, train_y), x)
    prior = targets.mean(0)
    dual = x.shape[1] > len(x)
    system = x @ x.T if dual else x.T @ x
    system.diagonal().add_(penalty * len(x))
    factor = torch.linalg.cholesky_ex(system).L  # cholesky() would wait for the device to say that it succeeded
    right = targets - prior
    weights = x.T @ torch.cholesky_solve(right, factor) if dual else torch.cholesky_solve(x.T @ right, factor)
    scores: Tensor = test @ weights + prior
    return scores


def knn_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    classes: Classes = None,
    k: int = 5,
) -> Tensor:
    """k-NN probe: test accuracy of the majority of the k nearest training features, as in NEVIS.

    Euclidean distance of L2-normalised features; a tied vote goes to the smallest label, as in scikit-learn, and a tied
    distance to the earlier training row, where scikit-learn leaves the choice to its heap. Source: Bornschein et al.
    2023 (NEVIS'22), whose baseline takes scikit-learn's `KNeighborsClassifier` as it is.

    In [0, 1], higher is better; 0-d, on the device of the features. NaN if a feature is not finite or no test example
    exists. Invariant to the order of rows, to rotations and to the length of each feature vector.

    Args:
        train_x: (n, D) features; a zero vector stays zero.
        train_y: (n,) integer labels.
        test_x: (m, D) features.
        test_y: (m,) integer labels.
        classes: Competing labels, as in `ridge_probe`; a neighbour with another label has no vote.
        k: At least 1, cut to n.

    Raises:
        InputError: If shapes disagree, there is no training row or no class, or k is below 1.

    Example:
        >>> x, y = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]), torch.tensor([3, 3, 7])
        >>> knn_probe(x, y, torch.tensor([[0.1, 9.0], [9.0, 0.0]]), torch.tensor([7, 3]), k=1)
        tensor(1., dtype=torch.float64)
    """
    _check(train_x, train_y, test_x, test_y)
    labels = _labels(classes, train_y)
    return _accuracy(knn_votes(train_x, train_y, test_x, labels, k), labels, test_y, train_x, test_x)


def knn_votes(
    train_x: Tensor, train_y: Tensor, test_x: Tensor | None = None, classes: Classes = None, k: int = 5
) -> Tensor:
    """Votes (m, C) of the k nearest training rows of `knn_probe`, columns in ascending order of the labels.

    Args:
        train_x: (n, D) features.
        train_y: (n,) integer labels.
        test_x: (m, D) features; None asks for each training row among all the others.
        classes: Competing labels, as in `knn_probe`.
        k: At least 1, cut to the number of rows that may be neighbours.

    Raises:
        InputError: As `knn_probe`.

    Example:
        >>> x, y = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.3]]), torch.tensor([0, 0, 1])
        >>> knn_votes(x, y, k=1).tolist()
        [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    """
    alone = test_x is None
    query = train_x if test_x is None else test_x
    _check(train_x, train_y, query)
    if k < 1:
        raise InputError(f"k={k} must be at least 1: ask for one neighbour or more.")
    train, test = _unit(_precise(train_x)), _unit(_precise(query))
    targets = _one_hot(train_y, _labels(classes, train_y), train)
    k = min(k, len(train) - alone)
    if k == 0:  # a single row, left out
        return torch.zeros_like(targets)
    square, votes, start = train.square().sum(1), [], 0
    for part in test.split(max(1, _BLOCK // len(train))):
        distance = square - 2 * part @ train.T  # squared, short of the query's own length, which moves no rank
        if alone:
            distance.diagonal(start).fill_(math.inf)
        votes.append(_nearest(distance, k).to(targets.dtype) @ targets)
        start += len(part)
    return torch.cat(votes)


# --------------------------------------------------------------------------- similarity


def linear_cka(X: Tensor, Y: Tensor, debiased: bool = False) -> Tensor:
    r"""Linear centred kernel alignment of two representations of the same inputs.

    With column-centred X and Y,

    .. math:: CKA = \|Y^\top X\|_F^2 / (\|X^\top X\|_F \|Y^\top Y\|_F)

    in [0, 1] (Kornblith et al. 2019, section 3). It tends to 1 for n << D whatever the features. `debiased` replaces
    each of the three by the unbiased HSIC of Song et al. 2012 (Nguyen et al. 2021, eq. 3), which for centred rows is

    .. math:: \|Y^\top X\|_F^2 - \tfrac{n}{n-2} \sum_i |x_i|^2 |y_i|^2
              + \tfrac{1}{(n-1)(n-2)} \sum_i |x_i|^2 \sum_i |y_i|^2

    up to a factor that cancels; then it lies in [-1, 1] and its mean over independent features is exactly 0.

    Invariant to translations, rotations, isotropic scale, and one order of rows for both; not to other linear maps.
    0-d, on the device of the features. NaN if a representation is constant or not finite, and debiased for n < 4 or
    where all rows are equally far apart.

    Args:
        X: (n, D) features.
        Y: (n, E) features of the same inputs in the same rows.
        debiased: Unbiased HSIC; needed below about 10 D inputs.

    Raises:
        InputError: If shapes disagree.

    Example:
        >>> X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
        >>> print(f"{linear_cka(X, torch.tensor([[1.0], [0.0], [1.0], [0.0]])):.6f}")
        0.117041
    """
    if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y) or 0 in (*X.shape, *Y.shape):
        raise InputError(
            f"Representations have shapes {tuple(X.shape)} and {tuple(Y.shape)}: give (n, D) and (n, E), "
            "one row for each input."
        )
    num_rows = len(X)
    if debiased and num_rows < 4:
        return X.new_full((), math.nan, dtype=_precise(X).dtype)
    x, y = _centred(X), _centred(Y)
    d, e = x.shape[1], y.shape[1]
    if num_rows * (d + e) < d * d + e * e + d * e:
        x_map, y_map = x @ x.T, y @ y.T
        xy, xx, yy = (x_map * y_map).sum(), x_map.square().sum(), y_map.square().sum()
    else:
        xy, xx, yy = (x.T @ y).square().sum(), (x.T @ x).square().sum(), (y.T @ y).square().sum()
    if debiased:
        xy, xx, yy = _unbiased(xy, x, y), _positive(_unbiased(xx, x, x), xx), _positive(_unbiased(yy, y, y), yy)
    return xy / (xx.sqrt() * yy.sqrt())


def rep_bwt(P: Tensor) -> Tensor:
    """Representation backward transfer: `bwt_gem` of a probe matrix, how far old tasks moved under a refitted head.

    rep-BWT = 1/(T-1) sum_{j<T} (P[T,j] - P[j,j]), in [-1, 1], higher is better, NaN for T = 1 or unmeasured cells.
    Davari et al. 2022 report its negative as representation forgetting.

    Args:
        P: (T + 1, T) probe accuracies; row 0 is the untrained network.

    Raises:
        InputError: If P is not (T + 1, T).

    Example:
        >>> f"{rep_bwt(torch.tensor([[0.3, 0.35], [0.92, 0.6], [0.9, 0.88]])):.6f}"
        '-0.020000'
    """
    return bwt_gem(P)


def rep_fwt(P: Tensor) -> Tensor:
    """Representation forward transfer: `fwt_gem` of a probe matrix, what earlier tasks gave the features of the next.

    rep-FWT = 1/(T-1) sum_{j>=2} (P[j-1,j] - P[0,j]), in [-1, 1], higher is better, NaN for T = 1 or unmeasured cells.
    A refitted head gives every task a trained output, so this is meaningful in class-incremental streams too.

    Args:
        P: (T + 1, T) probe accuracies; row 0 is the untrained network.

    Raises:
        InputError: If P is not (T + 1, T).

    Example:
        >>> f"{rep_fwt(torch.tensor([[0.3, 0.35], [0.92, 0.6], [0.9, 0.88]])):.6f}"
        '0.250000'
    """
    return fwt_gem(P)


# --------------------------------------------------------------------------- helpers


def _check(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor | None = None) -> None:
    shapes = [tuple(train_x.shape), tuple(train_y.shape), tuple(test_x.shape)]
    good = train_x.ndim == 2 == test_x.ndim and shapes[1] == shapes[0][:1] and train_x.shape[1:] == test_x.shape[1:]
    if test_y is not None:
        shapes.append(tuple(test_y.shape))
        good = good and shapes[3] == shapes[2][:1]
    if not good or 0 in shapes[0]:
        raise InputError(
            f"Features and labels of a probe have shapes {', '.join(map(str, shapes))}: "
            "give (n, D), (n,), (m, D), (m,) with n and D of at least 1."
        )


def _labels(classes: Classes, train_y: Tensor) -> Tensor:
    """Return the competing labels in ascending order, on the device of the training labels."""
    if classes is None:
        found: Tensor = train_y.unique()
        return found
    labels = torch.as_tensor(classes)
    if labels.ndim != 1 or len(labels) == 0:
        raise InputError(f"classes={classes} names no class: give at least one label.")
    return labels.sort().values.to(train_y.device, non_blocking=labels.device.type == "cpu")


def _one_hot(y: Tensor, labels: Tensor, like: Tensor) -> Tensor:
    hits: Tensor = y[:, None] == labels
    return hits.to(like)


def _accuracy(scores: Tensor, labels: Tensor, test_y: Tensor, *features: Tensor) -> Tensor:
    hits = labels[scores.argmax(1).to(labels.device)] == test_y
    accuracy: Tensor = hits.to(scores).mean()
    for x in features:
        accuracy = accuracy.where(x.isfinite().all(), math.nan)
    return accuracy


def _precise(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32 if x.device.type in _WITHOUT_FLOAT64 else torch.float64)


def _centred(x: Tensor) -> Tensor:
    """Return centred columns over their Frobenius norm; all NaN if x is constant."""
    x = _precise(x)
    x = x / x.abs().amax()  # no square overflows
    constant = x.amax(0) == x.amin(0)  # the mean of equal numbers may differ from them by rounding
    x = torch.where(constant, 0, x - x.mean(0))
    norm: Tensor = torch.linalg.vector_norm(x)
    return x / norm


def _unit(x: Tensor) -> Tensor:
    norm = x.norm(dim=1, keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


def _nearest(distance: Tensor, k: int) -> Tensor:
    """Return a mask (m, n) of the k nearest columns in each row; of equal distances the earlier column counts."""
    edge = distance.topk(k, largest=False).values[:, -1:]
    closer, tied = distance < edge, distance == edge
    return closer | (tied & (tied.cumsum(1) <= k - closer.sum(1, keepdim=True)))


def _unbiased(alignment: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return n (n - 3) times the unbiased HSIC of centred rows from their ||Y^T X||_F^2."""
    n, a, b = len(x), x.square().sum(1), y.square().sum(1)
    return alignment - n / (n - 2) * (a @ b) + a.sum() * b.sum() / ((n - 1) * (n - 2))


def _positive(value: Tensor, scale: Tensor) -> Tensor:
    """Return the value, or NaN where it is only what rounding leaves of 0."""
    return value.where(value > 1e4 * torch.finfo(value.dtype).eps * scale, math.nan)
