"""The costs of learning: parameters, stored samples and operations, and error together with compute."""

from __future__ import annotations

import math

from torch import Tensor

from cl.errors import InputError
from cl.metrics.checks import Values, ratio, vector


def model_size_efficiency_diaz(params: Values) -> Tensor:
    """Model size efficiency: 1 if the model does not grow; `params` (T,) are its sizes after each task.

    MS = min(1, 1/T sum_i params[1] / params[i]), in [0, 1], higher is better.
    Source: Diaz-Rodriguez et al. 2018 (arXiv 1810.13166).

    Example:
        >>> f"{model_size_efficiency_diaz([10, 12, 15]):.6f}"
        '0.833333'
    """
    sizes = vector("params", params, low=1)
    return (sizes[0] / sizes).mean().clamp(max=1)


def sample_storage_efficiency_diaz(stored: Values, lifetime: float) -> Tensor:
    """Sample storage efficiency: the share of all `lifetime` samples that is not stored, as the mean over tasks.

    SSS = 1 - min(1, 1/T sum_i stored[i] / lifetime), in [0, 1], higher is better. `stored` (T,) counts the stored
    samples, once per task. Both are in one unit: samples or bytes.
    Source: Diaz-Rodriguez et al. 2018 (arXiv 1810.13166).

    Example:
        >>> f"{sample_storage_efficiency_diaz([100, 200, 300], 3000):.6f}"
        '0.933333'
    """
    total = vector("lifetime", [lifetime], low=1)[0]
    return 1 - (vector("stored", stored, low=0) / total).mean().clamp(max=1)


def computational_efficiency_diaz(pass_ops: Values, ops: Values, scale: float = 1.0) -> Tensor:
    """Computational efficiency: the cost of one pass over each task's data, divided by all operations for the task.

    CE = min(1, 1/T sum_i scale * pass_ops[i] / (1 + ops[i])), in [0, 1], higher is better. `pass_ops` (T,) are the
    operations of one forward and backward pass over task i, `ops` (T,) all operations spent learning it.
    Source: Diaz-Rodriguez et al. 2018 (arXiv 1810.13166); the constant 1 and `scale` (their epsilon, at least 1) are
    from a secondary account and were not checked against the paper.

    Example:
        >>> f"{computational_efficiency_diaz([1e9] * 3, [5e9, 10e9, 4e9]):.6f}"
        '0.183333'
    """
    spent = vector("ops", ops, low=0)
    one_pass = vector("pass_ops", pass_ops, len(spent), low=0)
    factor = vector("scale", [scale], low=1)[0]
    return (factor * one_pass / (1 + spent)).mean().clamp(max=1)


def _criteria(name: str, values: Values, weights: Values | None) -> Tensor:
    """Return sum_m weights[m] * values[m]; equal weights where none are given."""
    terms = vector(name, values, low=0)
    if weights is None:
        return terms.mean()
    shares = vector("weights", weights, len(terms), low=0)
    if not math.isclose(float(shares.sum()), 1.0, abs_tol=1e-6):
        raise InputError(f"weights must sum to 1, got {shares.sum().item():g}: divide them by their sum.")
    return (shares * terms).sum()


def cl_score_diaz(criteria: Values, weights: Values | None = None) -> Tensor:
    """CL score: the weighted mean of chosen criteria (M,), each in [0, 1] and higher better.

    CL_score = sum_m weights[m] * criteria[m], sum(weights) = 1 (equal by default), in [0, 1], higher is better.
    Source: Diaz-Rodriguez et al. 2018 (arXiv 1810.13166), from a secondary account, not checked against the paper.

    Example:
        >>> f"{cl_score_diaz([0.9, 0.5], [0.75, 0.25]):.6f}"
        '0.800000'
    """
    return _criteria("criteria", criteria, weights)


def cl_stability_diaz(stds: Values, weights: Values | None = None) -> Tensor:
    """CL stability: one minus the weighted mean standard deviation of the criteria over runs; `stds` is (M,).

    CL_stability = 1 - sum_m weights[m] * stds[m], sum(weights) = 1 (equal by default), higher is better.
    Source: Diaz-Rodriguez et al. 2018 (arXiv 1810.13166), from a secondary account, not checked against the paper.

    Example:
        >>> f"{cl_stability_diaz([0.04, 0.08], [0.75, 0.25]):.6f}"
        '0.950000'
    """
    return 1 - _criteria("stds", stds, weights)


def nevis_error(errors: Values, num_samples: Values | None = None) -> Tensor:
    """NEVIS error: the mean over tasks of the test error right after the task was learned; forgetting is not scored.

    E = 1/T sum_t errors[t] with errors[t] = 1 - R[t,t], in [0, 1], lower is better. Report it with `nevis_compute`.
    With `num_samples` (T,), the size of each test set, the mean is weighted by it, as the benchmark's code logs too.
    Source: Bornschein et al. 2022 (NEVIS'22, arXiv 2211.11747), from its code.

    Raises:
        InputError: if the lengths differ or an error is negative.

    Example:
        >>> f"{nevis_error([0.10, 0.15, 0.20]):.6f}"
        '0.150000'
    """
    rates = vector("errors", errors, low=0)
    if num_samples is None:
        return rates.mean()
    weights = vector("num_samples", num_samples, len(rates), low=1)
    return (rates * weights).sum() / weights.sum()


def nevis_compute(flops: Values, reference: Values | None = None) -> Tensor:
    """NEVIS compute: the floating-point operations spent on the whole stream, every tried hyper-parameter included.

    C = sum_t flops[t], lower is better. With `reference` (T,), the operations of a reference learner, it is the ratio
    C / C_ref; NaN if C_ref is 0. The benchmark plots it against `nevis_error` and combines the two into no score.
    Source: Bornschein et al. 2022 (NEVIS'22, arXiv 2211.11747), from its code, which leaves evaluation out.

    Raises:
        InputError: if the lengths differ or an entry is negative.

    Example:
        >>> f"{nevis_compute([2e15, 3e15, 1e15], reference=[4e15] * 3):.6f}"
        '0.500000'
    """
    spent = vector("flops", flops, low=0)
    if reference is None:
        return spent.sum()
    return ratio(spent.sum(), vector("reference", reference, len(spent), low=0).sum())


def regret(errors: Values, reference: Values) -> Tensor:
    """Cumulative regret (T,): the errors so far above those of a reference learner on the same tasks.

    Reg_t = sum_{i<=t} (errors[i] - reference[i]), in [-t, t], lower is better (negative: better than the reference);
    divide by t for the mean over tasks. Source: Bornschein et al. 2022 (NEVIS'22, arXiv 2211.11747); the paper's own
    curve was not checked.

    Raises:
        InputError: if the lengths differ.

    Example:
        >>> print(regret([0.10, 0.15, 0.20], reference=[0.10, 0.20, 0.22]))
        tensor([ 0.0000, -0.0500, -0.0700], dtype=torch.float64)
    """
    own = vector("errors", errors)
    return (own - vector("reference", reference, len(own))).cumsum(0)
