r"""Estimators of how well a network transfers to a task, from features Z (n, D) and labels y (n,) before training.

Every estimator of `ESTIMATORS` is a pure function of (Z, y). Compare its values with the forward transfer measured
afterwards, by a rank correlation over networks or tasks. `covariance_similarity` compares two tasks instead.

All compute in float64 on the CPU and return a 0-d tensor. They do not depend on the order of examples or the names of
classes (except for ties of the k-NN), and return NaN, never 0, if the result is undefined or a feature is not finite.
Labels may be any integers.

    >>> Z = torch.tensor([[1.0, 2], [3, 2], [1, 3], [3, 4], [5, 2], [7, 2], [5, 3], [7, 4]])
    >>> y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    >>> {name: round(estimator.function(Z, y).item(), 4) for name, estimator in ESTIMATORS.items()}
    {'tmi': 3.1059, 'ped': -0.6868, 'log_me': -0.6868, 'vci': 0.1852, 'knn': 0.875}

Differences from the papers and their released code.

- TMI: `aggregation="expectation"` is the conditional entropy of the paper; the code averages its terms over classes
  ("released"), which is 1/C of it. The code drops classes of 2 or 3 examples and gives 0 to those of 1; the
  expectation is NaN there.
- PED: features are standardised by the statistics of source features; without `source` by their own, which the code
  does not offer. Where two classes that overlap share their mean, no direction exists: NaN.
- LogME: the same maximum of the evidence, from its fixed point. The code stops at a change of 1e-3 or 11 rounds, here
  1e-6 or 100; for D > n it leaves D - n eigenvalues out of the determinant but not out of the prior; and it adds 1e-5
  to the norm of the weights, which makes the score depend on the scale of the features.
- VCI: every class counts equally, also in the mean of all, so that it stays in [0, 1] for classes of unequal size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cl.errors import InputError
from cl.metrics.features import knn_votes

Score = Callable[[Tensor, Tensor], Tensor]

# --------------------------------------------------------------------------- within classes


def tmi(Z: Tensor, y: Tensor, aggregation: str = "expectation", k: int = 3, clip: float = 1.0) -> Tensor:
    r"""TMI: the entropy H(Z|Y) of the features within classes; higher means more transferable.

    Kozachenko and Leonenko's estimate for a class of n_c examples, in nats,

    .. math:: h_c = \psi(n_c) - \psi(k) + \frac{D}{n_c} \sum_i \ln(2 \rho_i),

    rho_i the maximum-norm distance to the k-th neighbour of the class, at least `clip`; then H = sum_c p_c h_c with
    p_c = n_c / n. Source: Xu and Kang, ICCV 2023.

    No bounds. The clip makes it depend on scale: a factor s adds D ln s while no distance is clipped, and where all
    are (features of small norm) only the counts and D are left. Invariant to translation, not to rotation. NaN if a
    class has k examples or fewer.

    Args:
        Z: (n, D) features.
        y: (n,) labels.
        aggregation: "expectation", or "released": the mean over classes of p_c h_c, a class of one example giving 0
            and a class without a k-th neighbour left out.
        k: Which neighbour.
        clip: Least distance; 0 gives the plain estimate, minus infinity where k + 1 examples coincide.

    Raises:
        InputError: If shapes disagree, or the aggregation, k or clip is none.

    Example:
        >>> Z = torch.tensor([0, 10, 20, 40, 0, 0.1, 0.2, 0.3])[:, None]
        >>> y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        >>> print(f"{tmi(Z, y):.6f} {tmi(Z, y, aggregation='released'):.6f}")
        2.748317 1.374158
    """
    if aggregation not in ("expectation", "released"):
        raise InputError(f"aggregation={aggregation!r} is unknown: choose 'expectation' or 'released'.")
    if k < 1 or not clip >= 0:
        raise InputError(f"k={k} and clip={clip}: give a neighbour of at least 1 and a distance of at least 0.")
    Z, labels, counts = _examples(Z, y)
    if not Z.isfinite().all():
        return _undefined()
    entropies = torch.stack([_entropy(Z[labels == c], k, clip) for c in range(len(counts))])
    terms: Tensor = counts / counts.sum() * entropies
    return terms.sum() if aggregation == "expectation" else terms.where(counts > 1, 0.0).nanmean()


def _entropy(rows: Tensor, k: int, clip: float) -> Tensor:
    """Return the differential entropy of the rows (n, D) in nats; NaN for n <= k."""
    n, d = rows.shape
    if n <= k:
        return _undefined()
    distances = torch.cdist(rows, rows, p=math.inf).kthvalue(k + 1, dim=1).values  # the nearest is the row itself
    psi = torch.digamma(torch.tensor([n, k], dtype=torch.float64))
    entropy: Tensor = psi[0] - psi[1] + d * (2 * distances.clamp(min=clip)).log().mean()
    return entropy


def vci(Z: Tensor, y: Tensor) -> Tensor:
    r"""Variability collapse index: how little of the features' variance lies between classes.

    .. math:: VCI = 1 - \operatorname{tr}(S_T^+ S_B) / \min(D, C - 1)

    with S_B = 1/C sum_c (m_c - m)(m_c - m)^T, m the mean of the class means, S_T = S_B + S_W and S_W the mean of the
    classes' covariances (divisor n_c). Source: Xu and Liu, ICML 2023.

    In [0, 1]: 0 is full collapse, 1 no class information. On the classes of the source, higher should transfer better
    among good networks; on those of the target it is a diagnosis: store both. Invariant to invertible affine maps. NaN
    for one class, for constant features, and where the n centred examples are as independent as they can be (rank
    n - 1, always so for generic features with D >= n - 1): any labels give 0 there, so project on fewer dimensions.

    Args:
        Z: (n, D) features.
        y: (n,) labels.

    Raises:
        InputError: If shapes disagree.

    Example:
        >>> Z = torch.tensor([[0, 0], [2, 0], [0, 1], [2, 1], [4, 0], [6, 0], [4, 1], [6, 1]])
        >>> print(f"{vci(Z, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])):.6f}")
        0.200000
    """
    Z, labels, counts = _examples(Z, y)
    if len(counts) < 2 or not Z.isfinite().all():
        return _undefined()
    means = _means(Z, labels, counts)
    centre = means.mean(0)
    rows = (Z - centre) / (len(counts) * counts[labels]).sqrt()[:, None]  # their Gram matrix is S_T
    _, scale, axes = torch.linalg.svd(rows, full_matrices=False)
    size = torch.maximum(scale[0], Z.abs().max())  # what rounding leaves of a constant is no dimension
    rank = int((scale > max(Z.shape) * torch.finfo(Z.dtype).eps * size).sum())
    if rank in (0, len(Z) - 1):
        return _undefined()
    white = (means - centre) @ axes[:rank].T / scale[:rank]
    value: Tensor = 1 - white.square().sum() / len(counts) / min(Z.shape[1], len(counts) - 1)
    return value


def knn_score(Z: Tensor, y: Tensor, k: int = 5) -> Tensor:
    """Leave-one-out accuracy of k-NN on L2-normalised features, with the rules of `knn_probe`: the plain baseline.

    In [0, 1], higher means more transferable. NaN for a single example. Source: Bornschein et al. 2023 (NEVIS'22) for
    the classifier. Invariant to rotations and to the length of each feature vector.

    Args:
        Z: (n, D) features.
        y: (n,) labels.
        k: Neighbours, at least 1, cut to n - 1.

    Raises:
        InputError: If shapes disagree or k is below 1.

    Example:
        >>> knn_score(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), torch.tensor([4, 4, 9]), k=1)
        tensor(0.6667, dtype=torch.float64)
    """
    Z, labels, _ = _examples(Z, y)
    votes = knn_votes(Z, labels, k=k)
    if len(Z) < 2 or not Z.isfinite().all():
        return _undefined()
    return (votes.argmax(1) == labels).double().mean()


# --------------------------------------------------------------------------- evidence


def log_me(Z: Tensor, y: Tensor) -> Tensor:
    r"""LogME: the largest log evidence of a linear model of the one-hot labels, per example; higher is better.

    For each class the target t in {0, 1}^n is Z w + noise with w ~ N(0, I/alpha) and noise ~ N(0, I/beta), no
    intercept, and

    .. math:: \frac{1}{n} \max_{\alpha, \beta} \log p(t \mid Z, \alpha, \beta),
              \quad t \sim N(0, I / \beta + Z Z^\top / \alpha),

    averaged over classes. The maximum is sought from alpha = beta = 1 by alpha = gamma / |m|^2 and
    beta = (n - gamma) / (|Z m - t|^2 + 1e-5), m the posterior mean and gamma its effective dimension. Source: You et
    al., ICML 2021, algorithm 1; the 1e-5, of the released code, keeps features that predict a class exactly finite.

    No bounds; higher means more transferable. Invariant to rotation and to isotropic scale (up to the start of the
    search), not to translation. Comparable between networks on one task, hardly between tasks.

    Args:
        Z: (n, D) features.
        y: (n,) labels.

    Raises:
        InputError: If shapes disagree.

    Example:
        >>> y = torch.tensor([0, 0, 1, 1])
        >>> good, bad = torch.tensor([[3.0], [3.0], [1.0], [0.9]]), torch.tensor([[3.0], [1.0], [3.0], [0.9]])
        >>> bool(log_me(good, y) > log_me(bad, y))
        True
    """
    Z, labels, counts = _examples(Z, y)
    if not Z.isfinite().all():
        return _undefined()
    n = len(Z)
    U, scale, _ = torch.linalg.svd(Z, full_matrices=False)
    kept = scale > max(Z.shape) * torch.finfo(Z.dtype).eps * scale[0]
    variances = scale[kept, None].square()
    targets = torch.nn.functional.one_hot(labels, len(counts)).double()
    square = (U[:, kept].T @ targets).square()  # (rank, C)
    rest = (counts - square.sum(0)).clamp(min=0)
    largest = 1e12 * scale[0].square()  # of a class of which the features know nothing
    ratio = torch.ones(len(counts), dtype=torch.float64)  # alpha / beta
    for _ in range(100):
        old = ratio
        dimension, weight, noise = _posterior(variances, square, rest, ratio)
        ratio = dimension / weight * (noise + 1e-5) / (n - dimension)
        ratio = torch.where(weight > 0, ratio, largest).clamp(max=largest)
        if ((ratio - old).abs() <= 1e-6 * old).all():
            break
    dimension, weight, noise = _posterior(variances, square, rest, ratio)
    beta = (n - dimension) / (noise + 1e-5)
    evidence = n * (beta / (2 * math.pi)).log() - beta * (noise + ratio * weight)
    evidence = (evidence - (variances / ratio).log1p().sum(0)) / 2
    average: Tensor = (evidence / n).mean()
    return average


def _posterior(variances: Tensor, square: Tensor, rest: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return effective dimension, |m|^2 and |Z m - t|^2 of each class, (C,)."""
    shrunk = variances / (variances + ratio)
    weight = (square * shrunk.square() / variances).sum(0)
    return shrunk.sum(0), weight, (square * (1 - shrunk).square()).sum(0) + rest


# --------------------------------------------------------------------------- potential energy


def ped(
    Z: Tensor,
    y: Tensor,
    score: Score = log_me,
    source: Tensor | None = None,
    reach: float = 0.6,
    time_step: float = 0.1,
    constant: float = 1.0,
) -> Tensor:
    """PED: a static score of the features after overlapping classes have pushed each other apart, as in fine-tuning.

    The motion is that of `ped_features`; sign, range and invariances are those of `score`. Source: Li et al., ICCV
    2023. NaN where the motion is undefined.

    Args:
        Z: (n, D) features.
        y: (n,) labels.
        score: A function of (Z, y).
        source: (m, D) features of what the network was trained on, as in `ped_features`.
        reach: As in `ped_features`; the paper uses 0.3 or 0.6.
        time_step: As in `ped_features`.
        constant: As in `ped_features`.

    Raises:
        InputError: As `ped_features`, or as `score`.

    Example:
        >>> Z, y = torch.tensor([[-1.0], [1.0], [0.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> bool(ped(Z, y) > log_me(Z, y))
        True
    """
    moved = ped_features(Z, y, source, reach, time_step, constant)
    return score(moved, y) if moved.isfinite().all() else _undefined()


def ped_features(
    Z: Tensor,
    y: Tensor,
    source: Tensor | None = None,
    reach: float = 0.6,
    time_step: float = 0.1,
    constant: float = 1.0,
    max_steps: int = 6,
) -> Tensor:
    r"""Features (n, D) after potential energy descent: classes as balls that repel each other where they overlap.

    In features standardised by the source, class c has mean m_c and radius r_c, the root of the sum of its variances.
    Two classes overlap by o = max(reach (r_a + r_b) - |m_a - m_b|, 0), and each moves
    min(dt^2 constant o / 2, o) away from the other along the line of the means, summed over pairs. Steps repeat while
    the total displacement (sum of absolute values) is above half of the first. Source: Li et al., ICCV 2023.

    Float64 on the CPU. NaN where overlapping classes share their mean, and everywhere if a feature is not finite.

    Args:
        Z: (n, D) features.
        y: (n,) labels.
        source: (m, D) features of data like those the network was trained on; None takes Z itself. Deviations below
            1e-3 count as 1e-3.
        reach: Share of the radii that may not overlap.
        time_step: dt.
        constant: Strength of the force.
        max_steps: At most so many steps.

    Raises:
        InputError: If shapes disagree, or an option is negative.

    Example:
        >>> Z, y = torch.tensor([[-1.0], [1.0], [0.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> (ped_features(Z, y, source=torch.tensor([[-1.0], [1.0]]), max_steps=1) - Z).flatten()
        tensor([-0.0010, -0.0010,  0.0010,  0.0010], dtype=torch.float64)
    """
    Z, labels, counts = _examples(Z, y)
    if source is not None and (source.ndim != 2 or source.shape[1] != Z.shape[1] or len(source) == 0):
        raise InputError(f"source has shape {tuple(source.shape)}: give (m, {Z.shape[1]}), features as those of Z.")
    for name, value in {"reach": reach, "time_step": time_step, "constant": constant, "max_steps": max_steps}.items():
        if not value >= 0:
            raise InputError(f"{name}={value} must not be negative: it scales a force that repels.")
    general = Z if source is None else source.detach().cpu().double()
    mean, std = general.mean(0), general.std(0, correction=0).clamp(min=1e-3)
    rows, first = (Z - mean) / std, None
    for _ in range(max_steps):
        motion = _repulsion(rows, labels, counts, reach, constant * time_step**2 / 2)
        total = motion.abs().sum()
        first = total if first is None else first
        if total <= 0.5 * first:  # also where nothing overlaps at all
            break
        rows = rows + motion[labels]
    return rows * std + mean


def _repulsion(rows: Tensor, labels: Tensor, counts: Tensor, reach: float, rate: float) -> Tensor:
    """Return how far each class is pushed, (C, D)."""
    means = _means(rows, labels, counts)
    radii = _means((rows - means[labels]).square(), labels, counts).sum(1).sqrt()
    distance = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
    near = reach * (radii[:, None] + radii)
    distance = torch.where(distance <= 1e-12 * near, 0, distance)  # what rounding leaves has no direction
    overlap = (near - distance).clamp(min=0).fill_diagonal_(0)
    push = torch.where(overlap == 0, 0, overlap * min(rate, 1.0) / distance)  # a share of the vector between means
    return push.sum(1, keepdim=True) * means - push @ means


# --------------------------------------------------------------------------- two tasks


def covariance_similarity(X1: Tensor, X2: Tensor, energy: float = 0.99, normalise: bool = False) -> Tensor:
    r"""Alignment of the second moments of two tasks in a shared space: misaligned ones interfere.

    With X_i^T X_i = U_i D_i U_i^T cut to the fewest leading directions that hold `energy` of the trace,

    .. math:: sim = \|D_1^{1/2} U_1^\top U_2 D_2^{1/2}\|_F / (\|D_1^{1/2}\|_F \|D_2^{1/2}\|_F).

    Source: Wu, Zhang and Ré, ICLR 2020, the formula from memory. In [0, 1], higher means better aligned; of a task with
    itself it is 1 for rank one only (1 / sqrt(D) for X^T X = I). `normalise` divides by
    sqrt(sim(1, 1) sim(2, 2)), not in the paper, for a unit diagonal. Invariant to the scale of each task and to one
    rotation of both. NaN if a task is all zeros or not finite.

    A stored second moment C serves as well as its examples: any root R^T R = C can be given for X.

    Args:
        X1: (n, D) features of one task; not centred here.
        X2: (m, D) features of another.
        energy: In (0, 1].
        normalise: Make the similarity of a task with itself 1.

    Raises:
        InputError: If shapes disagree or the energy is out of range.

    Example:
        >>> X1, X2 = torch.eye(2), torch.tensor([[2.0, 0.0]])
        >>> print(f"{covariance_similarity(X1, X2):.6f} {covariance_similarity(X1, X1):.6f}")
        0.707107 0.707107
    """
    if X1.ndim != 2 or X2.ndim != 2 or X1.shape[1] != X2.shape[1] or 0 in (*X1.shape, *X2.shape):
        raise InputError(f"X1 and X2 have shapes {tuple(X1.shape)} and {tuple(X2.shape)}: give (n, D) and (m, D).")
    if not 0 < energy <= 1:
        raise InputError(f"energy={energy} is outside (0, 1]: give the share of the trace to keep.")
    if not (X1.isfinite().all() and X2.isfinite().all()):
        return _undefined()
    one, two = (_leading(X.detach().cpu().double(), energy) for X in (X1, X2))
    similarity: Tensor = (one @ two.T).norm()
    if normalise:
        similarity = similarity / ((one @ one.T).norm() * (two @ two.T).norm()).sqrt()
    return similarity


def _leading(X: Tensor, energy: float) -> Tensor:
    """Return D^{1/2} U^T (r, D) of unit Frobenius norm, cut to the energy; NaN for zeros."""
    if not X.any():
        return X * math.nan
    _, scale, axes = torch.linalg.svd(X / X.abs().max(), full_matrices=False)
    share = scale.square().cumsum(0) / scale.square().sum()
    rank = int((share < energy * (1 - 1e-12)).sum()) + 1  # rounding of the sum must not cost a direction
    root = scale[:rank, None] * axes[:rank]
    unit: Tensor = root / root.norm()
    return unit


# --------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Estimator:
    """One estimator of (Z, y), with its definition.

    Attributes:
        function: Features (n, D) and labels (n,) to a 0-d tensor.
        formula: One line.
        source: The paper.
        higher_means: What a higher value predicts.

    Example:
        >>> ESTIMATORS["log_me"].higher_means
        'more transferable'
    """

    function: Score
    formula: str
    source: str
    higher_means: str


_MORE = "more transferable"
ESTIMATORS: dict[str, Estimator] = {
    "tmi": Estimator(tmi, "H(Z|Y) = sum_c p_c h_c", "Xu & Kang 2023 (TMI)", _MORE),
    "ped": Estimator(ped, "log_me after overlapping classes repelled each other", "Li et al. 2023 (PED)", _MORE),
    "log_me": Estimator(log_me, "mean_c max_{a,b} log p(y_c | Z, a, b) / n", "You et al. 2021 (LogME)", _MORE),
    "vci": Estimator(
        vci,
        "1 - tr(pinv(S_T) S_B) / min(D, C - 1)",
        "Xu & Liu 2023 (VCI)",
        "less collapse: on source classes more transferable among good networks, on target classes less separated",
    ),
    "knn": Estimator(knn_score, "leave-one-out accuracy of 5-NN", "Bornschein et al. 2023 (NEVIS'22)", _MORE),
}


# --------------------------------------------------------------------------- helpers


def _examples(Z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return features in float64, labels renumbered 0..C-1, and the size of each class, on the CPU."""
    if Z.ndim != 2 or y.shape != Z.shape[:1] or 0 in Z.shape:
        raise InputError(
            f"Features have shape {tuple(Z.shape)} and labels {tuple(y.shape)}: "
            "give (n, D) and (n,) with n and D of at least 1."
        )
    _, labels, counts = y.detach().cpu().unique(return_inverse=True, return_counts=True)
    return Z.detach().cpu().double(), labels, counts.double()  # the root of an integer would be float32


def _means(rows: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add(0, labels, rows)
    return sums / counts[:, None]


def _undefined() -> Tensor:
    return torch.tensor(math.nan, dtype=torch.float64)
