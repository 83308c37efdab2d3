"""Metrics of evaluations inside the tasks: anytime accuracy, the stability gap, windowed forgetting.

`curves` (N, T) has one row per evaluation, in order, NaN where a task was not evaluated; `training` (N,) is the number
1..T of the task that was being trained. Leave out evaluations before a task's first step: they repeat the last one of
the previous task. Minima can only fall if there are more evaluations, so report the number of steps between two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl.errors import InputError
from cl.metrics.checks import Table, Values, keep, table, vector


def average_anytime_accuracy(curves: Table, training: Values) -> Tensor:
    """Average anytime accuracy: the mean over all evaluations of the mean over the tasks seen by then.

    AAA = 1/N sum_n 1/k_n sum_{j<=k_n} curves[n,j] with k_n = training[n], in [0, 1], higher is better; numbers on
    tasks still to come do not count. Source: Caccia et al. 2020 (OSAKA, arXiv 2003.05856).

    Raises:
        InputError: if a shape is wrong, or `training` is not ascending in 1..T.

    Example:
        >>> nan = float("nan")
        >>> f"{average_anytime_accuracy([[0.9, nan], [0.6, 0.4]], training=[1, 2]):.6f}"
        '0.700000'
    """
    values, now = _checked(curves, training)
    seen = torch.arange(values.shape[1]) < now[:, None]
    return (keep(values, seen, 0.0).sum(1) / seen.sum(1)).mean()


def min_accuracy_delange(curves: Table, training: Values) -> Tensor:
    """Minimum accuracy after each task (T,): the mean over earlier tasks of their lowest point since they were learned.

    min-ACC_k = 1/(k-1) sum_{i<k} min {curves[n,i] : i < training[n] <= k}, in [0, 1], higher is better, NaN for k = 1
    and for a k without evaluations. Source: De Lange et al. 2023 (arXiv 2205.13452).

    Raises:
        InputError: as `average_anytime_accuracy`.

    Example:
        >>> nan = float("nan")
        >>> print(min_accuracy_delange([[0.9, nan], [0.5, 0.4], [0.8, 0.9]], training=[1, 2, 2]))
        tensor([   nan, 0.5000], dtype=torch.float64)
    """
    values, now = _checked(curves, training)
    number = _numbers(values)
    since = keep(values, now[:, None] > number, math.inf).cummin(0).values  # NaN stays NaN
    since = _at_end(since, now)
    before = number < number[:, None]
    return keep(since, before, 0.0).sum(1) / before.sum(1)  # 0 / 0 for the first task


def worst_case_accuracy_delange(curves: Table, training: Values) -> Tensor:
    """Worst-case accuracy after each task (T,): of the new task at its end, and of every old task at its lowest.

    WC-ACC_k = 1/k curves[t_k,k] + (1 - 1/k) min-ACC_k with t_k the last evaluation in task k, in [0, 1], higher is
    better; WC-ACC_1 is the accuracy on task 1. Source: De Lange et al. 2023 (arXiv 2205.13452).

    Raises:
        InputError: as `average_anytime_accuracy`.

    Example:
        >>> nan = float("nan")
        >>> print(worst_case_accuracy_delange([[0.9, nan], [0.5, 0.4], [0.8, 0.9]], training=[1, 2, 2]))
        tensor([0.9000, 0.7000], dtype=torch.float64)
    """
    values, now = _checked(curves, training)
    new, number = _at_end(values, now).diagonal(), _numbers(values)
    old = min_accuracy_delange(curves, training)
    return torch.where(number == 1, new, new / number + (1 - 1 / number) * old)


def windowed_forgetting(curves: Table, window: int) -> Tensor:
    """Windowed forgetting of each task (T,): its largest fall between two evaluations less than `window` apart.

    WF_i = max_{m<=n<m+W} curves[m,i] - curves[n,i], in [0, 1], lower is better; W = 2 compares neighbours. A task's
    curve starts at its first number; NaN if a later one is missing or there is no second.
    Source: De Lange et al. 2023 (arXiv 2205.13452); the window's ends are from a secondary account.

    Raises:
        InputError: if curves is not (N, T) or the window is below 2.

    Example:
        >>> print(windowed_forgetting([[0.9, 0.2], [0.5, 0.4], [0.8, 0.3]], window=2))
        tensor([0.4000, 0.1000], dtype=torch.float64)
    """
    return _largest_fall(_curves(curves), window)


def windowed_plasticity(curves: Table, window: int) -> Tensor:
    """Windowed plasticity of each task (T,): its largest rise between two evaluations less than `window` apart.

    WP_i = max_{m<=n<m+W} curves[n,i] - curves[m,i], in [0, 1], higher is better; else as `windowed_forgetting`.
    Source: De Lange et al. 2023 (arXiv 2205.13452).

    Raises:
        InputError: if curves is not (N, T) or the window is below 2.

    Example:
        >>> print(windowed_plasticity([[0.9, 0.2], [0.5, 0.4], [0.8, 0.3]], window=2))
        tensor([0.3000, 0.2000], dtype=torch.float64)
    """
    return _largest_fall(-_curves(curves), window)


def stability_gap(curves: Table, training: Values) -> Tensor:
    """Depth of the stability gap (T, T): how far task i fell, at worst, while task k was trained.

    G[k,i] = curves[t_{k-1},i] - min_{training[n]=k} curves[n,i] for i < k, NaN elsewhere and where task k - 1 or k has
    no evaluation, in [-1, 1], lower is better (negative: task i never fell); t_k is the last evaluation in task k.
    Source: clsim; the phenomenon was described by De Lange et al. 2023 (arXiv 2205.13452).

    Raises:
        InputError: as `average_anytime_accuracy`.

    Example:
        >>> nan = float("nan")
        >>> print(stability_gap([[0.9, nan], [0.5, 0.4], [0.8, 0.9]], training=[1, 2, 2]))
        tensor([[   nan,    nan],
                [0.4000,    nan]], dtype=torch.float64)
    """
    values, now = _checked(curves, training)
    ends, number = _at_end(values, now), _numbers(values)
    gap = torch.full_like(ends, math.nan)
    for k in range(2, len(number) + 1):
        within = values[now == k]
        if len(within):
            gap[k - 1] = ends[k - 2] - within.amin(0)
    return keep(gap, number < number[:, None])


def recovery(curves: Table, training: Values) -> Tensor:
    """Recovery from the stability gap (T, T): how many evaluations of task k pass until task i has recovered.

    The entry is the first n, counted from 1 in task k, after the lowest point of task i, with
    curves[n,i] >= curves[t_{k-1},i]. It is NaN if there is no such n, if task i did not fall (`stability_gap` is not
    above 0), and for i >= k. Lower is better; the unit is evaluations. Source: clsim, after De Lange et al. 2023
    (arXiv 2205.13452).

    Raises:
        InputError: as `average_anytime_accuracy`.

    Example:
        >>> nan = float("nan")
        >>> print(recovery([[0.9, nan], [0.5, 0.4], [0.8, 0.7], [0.9, 0.9]], training=[1, 2, 2, 2]))
        tensor([[nan, nan],
                [3., nan]], dtype=torch.float64)
    """
    values, now = _checked(curves, training)
    ends, gap = _at_end(values, now), stability_gap(curves, training)
    back = torch.full_like(gap, math.nan)
    for k, i in (gap > 0).nonzero().tolist():
        curve = values[now == k + 1, i]
        again = (curve >= ends[k - 1, i]).nonzero().flatten()
        again = again[again > curve.argmin()]
        if len(again):
            back[k, i] = float(again[0]) + 1
    return back


def _curves(curves: Table) -> Tensor:
    return table("curves", curves, "evaluations", "tasks", (None, None))


def _checked(curves: Table, training: Values) -> tuple[Tensor, Tensor]:
    """Return the curves (N, T) and the task that was trained at each row (N,)."""
    values = _curves(curves)
    now, num_tasks = vector("training", training, len(values), low=1), values.shape[1]
    if (now > num_tasks).any():
        raise InputError(f"training holds {now.max().item():g}, but curves has {num_tasks} tasks.")
    if (now.isnan() | (now != now.round())).any() or (now.diff() < 0).any():
        raise InputError("training must hold whole numbers that never fall: give the evaluations in order.")
    return values, now


def _numbers(values: Tensor) -> Tensor:
    return torch.arange(1, values.shape[1] + 1, dtype=torch.float64)


def _at_end(values: Tensor, now: Tensor) -> Tensor:
    """Return the row (T, T) of the last evaluation in each task, NaN for a task without one."""
    number = _numbers(values)
    last = (torch.searchsorted(now, number, right=True) - 1).clamp(min=0)
    return keep(values[last], (now[last] == number)[:, None])


def _largest_fall(values: Tensor, window: int) -> Tensor:
    """Return per column the largest values[m] - values[n] with m <= n < m + window, columns from their first number."""
    if window < 2:
        raise InputError(f"window={window} holds no two evaluations: use at least 2.")
    begun = values.isnan().logical_not().cumsum(0) > 0
    fall = keep(torch.zeros_like(values[0]), begun.sum(0) > 1)
    for lag in range(1, min(window, len(values))):
        falls = keep(values[:-lag] - values[lag:], begun[:-lag], -math.inf)
        fall = torch.maximum(fall, falls.amax(0))  # both propagate NaN
    return fall
