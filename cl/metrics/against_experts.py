"""Metrics against a reference: experts of single tasks, other methods, thresholds, k-shot probes.

`experts`, (T,) or (T, points), are results of learners of one task alone, with the same architecture and budget. A
function that returns a vector (T,) gives one value per task; the mean of the vector is the number that the paper
reports.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl.metrics.checks import Table, Values, keep, learned, ratio, table, transfer_matrix, vector
from cl.metrics.transfer import fwt_gem

# --------------------------------------------------------------------------- experts


def fwt_expert(R: Table, experts: Values, from_first: bool = False) -> Tensor:
    """Forward transfer against experts: how far each task, just learned, is above a learner of that task alone.

    FWT = 1/(T-1) sum_{j>=2} (R[j,j] - experts[j]), in [-1, 1], higher is better, NaN for T = 1. With `from_first` the
    first task, to which nothing can be transferred, counts too and the divisor is T. An expert knows the classes of its
    task alone, so give R under the mask "task" for a class-incremental run too: to choose among all classes seen so far
    is a harder problem than that of the expert. Source: Wang et al. 2023 (survey, arXiv 2302.00487).

    Raises:
        InputError: if a shape is wrong.

    Example:
        >>> from cl.metrics.transfer import worked_example
        >>> f"{fwt_expert(worked_example(), [0.88, 0.86, 0.83]):.6f}"
        '-0.020000'
    """
    _, diagonal = learned(R)
    gains = diagonal - vector("experts", experts, len(diagonal))
    return gains.mean() if from_first else gains[1:].mean()


def fwt_continual_world(curves: Table, experts: Table) -> Tensor:
    """Forward transfer of Continual World (T,): the gain in area under the curve over the expert, as a share.

    FT_j = (AUC_j - AUC_j^ref) / (1 - AUC_j^ref) with AUC_j the mean of row j, in (-inf, 1], higher is better, NaN if
    1 - AUC_j^ref is below 1e-6. `curves` (T, points) are those of each task while it was trained, and `experts`
    (T, points) those of learners from scratch over the same budget. FT is the mean over all tasks, the first included.
    Source: Wolczyk et al. 2021 (Continual World, arXiv 2105.10919), from a secondary account.

    Raises:
        InputError: if a shape is wrong, or the experts are not as many as the tasks.

    Example:
        >>> gains = fwt_continual_world([[0.0, 0.6, 0.9], [0.2, 0.7, 0.8]], [[0.0, 0.6, 0.9], [0.0, 0.5, 0.8]])
        >>> print(gains)
        tensor([0.0000, 0.2353], dtype=torch.float64)
    """
    own = _curves("curves", curves).mean(1)
    reference = _curves("experts", experts, len(own)).mean(1)
    left = 1 - reference
    return keep((own - reference) / left, left >= 1e-6)


def jump_start(curves: Table, experts: Table | None = None) -> Tensor:
    """Jump-start of each task (T,): the metric before its first step, for curves that begin at step 0.

    JS_j = curves[j,0], in [0, 1], higher is better. With `experts` (T, points) it is the gain over them, in [-1, 1], as
    Taylor & Stone 2009 (Transfer learning for reinforcement learning domains) define it.

    Raises:
        InputError: if a shape is wrong, or the experts are not as many as the tasks.

    Example:
        >>> print(jump_start([[0.3, 0.9], [0.4, 0.8]], experts=[[0.1, 0.9], [0.1, 0.9]]))
        tensor([0.2000, 0.3000], dtype=torch.float64)
    """
    first = _curves("curves", curves)[:, 0]
    return first if experts is None else first - _curves("experts", experts, len(first))[:, 0]


def time_to_threshold(curve: Values, expert: Values, threshold: float) -> Tensor:
    """Time to threshold: how many times longer the expert takes to reach a metric, on one task.

    TT = n_expert / n with n the index, from 0, of the first point at or above the threshold; above 1 is better. It is
    NaN if a curve never reaches the threshold, has a NaN before it does, or if n is 0. The two curves (points,) may
    differ in length but not in the distance between their points.
    Source: Taylor & Stone 2009 (Transfer learning for reinforcement learning domains), as a ratio.

    Raises:
        InputError: if a curve is no vector.

    Example:
        >>> time_to_threshold([0.1, 0.8, 0.9], [0.1, 0.5, 0.8], threshold=0.8).item()
        2.0
    """
    own, other = (_first_at(vector(n, c), threshold) for n, c in (("curve", curve), ("expert", expert)))
    return ratio(other, own)


# --------------------------------------------------------------------------- LIBERO


def fwt_libero(curves: Table) -> Tensor:
    """Forward transfer of LIBERO (K,): the mean of each task's curve, which is constant from its best point on.

    FWT_k = 1/E sum_e c_k(e) with c_k(e) = c_k(e*) for e >= e*, the first maximum; in [0, 1], higher is better. It
    rewards fast and successful learning, and subtracts no baseline. `curves` (K, E) are those of each task while it was
    trained, from step 0.
    Source: Liu et al. 2023 (LIBERO, arXiv 2306.03310), from its code.

    Raises:
        InputError: if curves is not (K, E).

    Example:
        >>> print(fwt_libero([[0.0, 0.4, 0.7, 0.9, 0.8]]))
        tensor([0.5800], dtype=torch.float64)
    """
    values = _curves("curves", curves)
    best = values.amax(1, keepdim=True)
    reached = (values == best).cumsum(1) > 0
    return torch.where(reached, best, values).mean(1)


def nbt_libero(R: Table) -> Tensor:
    """Negative backward transfer of LIBERO (K,): the mean fall of each task, after later ones, since it was learned.

    NBT_k = 1/(K-k) sum_{i>k} (R[k,k] - R[i,k]) and NBT_K = 0, in [-1, 1], lower is better. NBT is the mean over all K,
    the 0 of the last task included; all NaN for K = 1. LIBERO selects, for each task, the checkpoint that is best on
    it, so its R[k,k] is the best point of the curve. Source: Liu et al. 2023 (LIBERO, arXiv 2306.03310), from its code.

    Raises:
        InputError: if R is not (K + 1, K).

    Example:
        >>> from cl.metrics.transfer import worked_example
        >>> print(nbt_libero(worked_example()))
        tensor([ 0.0100, -0.0300,  0.0000], dtype=torch.float64)
    """
    rows, diagonal = learned(R)
    if len(rows) == 1:
        return torch.full_like(diagonal, torch.nan)
    later = torch.ones_like(rows, dtype=torch.bool).tril(-1)
    return keep(diagonal - rows, later, 0.0).sum(0) / later.sum(0).clamp(min=1)


def auc_libero(R: Table, curves: Table) -> Tensor:
    """Area under the success curve of LIBERO (K,): each task's fwt_libero averaged with its metric after later tasks.

    AUC_k = (FWT_k + sum_{i>k} R[i,k]) / (K - k + 1), in [0, 1], higher is better; R is (K + 1, K), `curves` (K, E).
    Source: Liu et al. 2023 (LIBERO, arXiv 2306.03310), from its code.

    Raises:
        InputError: if a shape is wrong, or the curves are not as many as the tasks.

    Example:
        >>> from cl.metrics.transfer import worked_example
        >>> print(auc_libero(worked_example(), [[0.5, 0.9], [0.5, 0.9], [0.5, 0.9]]))
        tensor([0.8267, 0.7900, 0.7000], dtype=torch.float64)
    """
    rows, _ = learned(R)
    learning = fwt_libero(_curves("curves", curves, len(rows)))
    later = torch.ones_like(rows, dtype=torch.bool).tril(-1)
    return (learning + keep(rows, later, 0.0).sum(0)) / (later.sum(0) + 1)


# --------------------------------------------------------------------------- other references


def fwt_relative(R: Table, reference: Table) -> Tensor:
    """Forward transfer against another method: the mean difference of the two on each task, just learned.

    FWT = 1/T sum_j (R[j,j] - reference[j,j]), in [-1, 1], higher is better; both matrices are (T + 1, T), from the
    same order of tasks and the same seed. Source: CUBER (Lin et al. 2022), with GPM as the reference; the divisor T is
    assumed.

    Raises:
        InputError: if a shape is wrong or the two differ.

    Example:
        >>> from cl.metrics.transfer import worked_example
        >>> f"{fwt_relative(worked_example(), worked_example() - 0.02):.6f}"
        '0.020000'
    """
    _, own = learned(R)
    other = transfer_matrix(reference, "The reference's transfer matrix")[1:].diagonal()
    return (own - vector("reference", other, len(own))).mean()


def rai_duet(now: Values, before: Values, unseen: Values, reference: Values) -> Tensor:
    """Retention-adaptability index: the mean of retention on old tasks and generalisation to unseen pairs.

    RAI = (RI + GI) / 2. RI = mean_k min(1, now[k] / before[k]) over old tasks k, measured after all tasks (`now`) and
    right after task k (`before`). GI = mean_p min(1, unseen[p] / reference[p]) over (classes, domain) pairs p that were
    never trained together, where `reference` is a model trained on the pair. In [0, 1], higher is better; NaN if a
    denominator is 0.
    Source: Monga et al. 2025 (DuET, arXiv 2506.21260); the clipping and the reference are from a secondary account.

    Raises:
        InputError: if lengths differ or an entry is negative.

    Example:
        >>> f"{rai_duet([0.54, 0.44], [0.60, 0.50], unseen=[0.30, 0.24], reference=[0.50, 0.48]):.6f}"
        '0.720000'
    """
    retained = _clipped_ratio(("now", now), ("before", before))
    reached = _clipped_ratio(("unseen", unseen), ("reference", reference))
    return (retained + reached) / 2


def few_shot_transfer(P: Table) -> Tensor:
    """Few-shot transfer: how much the earlier tasks improved the features for a k-shot probe of a new task.

    FS_k = 1/(T-1) sum_{j>=2} (P[j-1,j] - P[0,j]), in [-1, 1], higher is better, NaN for T = 1. It is fwt_gem of a
    matrix P (T + 1, T): P[i,j] is the accuracy on task j of a probe that is fitted to the frozen features of k examples
    per class after i tasks, as the mean over at least 10 draws. Source: clsim, after Davari et al. 2022 (arXiv
    2203.13381).

    Raises:
        InputError: if P is not (T + 1, T).

    Example:
        >>> nan = float("nan")
        >>> P = [[nan, 0.33, 0.30], [nan, 0.55, nan], [nan, nan, 0.52], [nan, nan, nan]]
        >>> f"{few_shot_transfer(P):.6f}"
        '0.220000'
    """
    return fwt_gem(transfer_matrix(P))


def _curves(name: str, values: Table, num_tasks: int | None = None) -> Tensor:
    return table(name, values, "tasks", "points", (num_tasks, None))


def _clipped_ratio(above: tuple[str, Values], below: tuple[str, Values]) -> Tensor:
    denominators = vector(*below, low=0)
    return ratio(vector(*above, len(denominators), low=0), denominators).clamp(max=1).mean()


def _first_at(curve: Tensor, threshold: float) -> Tensor:
    """Return the index of the first entry at or above the threshold; NaN if there is none or a NaN comes before it."""
    found = ((curve >= threshold) | curve.isnan()).nonzero().flatten()
    nothing = len(found) == 0 or curve[found[0]].isnan()
    return curve.new_tensor(torch.nan if nothing else float(found[0]))
