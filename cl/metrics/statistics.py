"""Statistics over seeds, strategies and streams: intervals, paired tests, corrections, ranks and correlations.

Every function is pure and computes in float64. NaN means unmeasured: a NaN value, or a pair with one, is left out, and
`num` is the number of those that remain. A result that they do not determine is NaN, never 0. Infinities are refused.

The unit is the seed: one seed fixes the stream, the initial weights and the order of examples, so two strategies are
compared on the differences over the seeds that they share. Which test:

- `paired_t`, the default, needs differences that are near to normal and works from 2 seeds on.
- `sign_flip` and `wilcoxon` need only differences that are symmetric under the null hypothesis, but with n seeds
  their p is never below 2 / 2^n: 0.0625 with 5 seeds, which cannot reach 0.05 at all, and 0.031 with 6. After Holm's
  correction over 10 comparisons they need at least 9 seeds. That is why they are not the default.

Over many streams, whose scales differ, rank the strategies in each: `average_ranks`, `friedman`, `cliques`.

    >>> er, ewc = {0: 0.52, 1: 0.55, 2: 0.50, 3: 0.56, 4: 0.53}, {0: 0.41, 1: 0.47, 2: 0.40, 3: 0.44, 4: 0.45}
    >>> [result] = pairwise_tests({"er": er, "ewc": ewc})
    >>> f"{result.difference.mean:.3f} [{result.difference.low:.3f}, {result.difference.high:.3f}]"
    '0.098 [0.076, 0.120]'
    >>> f"p={result.p:.4f} over {result.num_shared} seeds; sign flip: {sign_flip([*er.values()], [*ewc.values()]).p}"
    'p=0.0003 over 5 seeds; sign flip: 0.0625'
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cl.errors import InputError

Array = NDArray[np.float64]
EXACT = 15  # at most this many differences have all 2^n signs enumerated
ROUNDING = 4 * float(np.finfo(np.float32).eps)  # a relative spread below this counts as 0, as metrics are float32

# --------------------------------------------------------------------------- helpers


def _measured(values: ArrayLike) -> Array:
    """Return the values that are not NaN, float64 (n,)."""
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise InputError(
            f"The values must be a vector, one a seed, got shape {vector.shape}: give one metric at a time."
        )
    return _finite(vector)[~np.isnan(vector)]


def _finite(values: Array) -> Array:
    if np.isinf(values).any():
        raise InputError("A value is infinite: record a run that diverged as NaN, which is left out.")
    return values


def _pairs(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    """Return the pairs in which both values are measured."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise InputError(f"Pairs need two vectors of one length, got shapes {x.shape} and {y.shape}: match the seeds.")
    both = ~(np.isnan(_finite(x)) | np.isnan(_finite(y)))
    return x[both], y[both]


def _share(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise InputError(f"{name}={value} is not between 0 and 1: give, say, {0.05 if name == 'alpha' else 0.95}.")
    return value


def _count(name: str, value: int, least: int = 1) -> int:
    if value < least:
        raise InputError(f"{name}={value} is too few: give at least {least}.")
    return value


# --------------------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval, in the units of the values.

    Args:
        mean: Mean of the measured values; NaN where there are none.
        low: Lower bound; NaN where it is undefined, -inf where the data bound nothing at this level.
        high: Upper bound, likewise.
        sd: Sample standard deviation (divisor num - 1), NaN for fewer than two values.
        num: Values that were measured.
    """

    mean: float
    low: float
    high: float
    sd: float
    num: int


@dataclass(frozen=True)
class CellIntervals:
    """Intervals of every cell of a stack: arrays of one shape, as the fields of `Interval`."""

    mean: Array
    low: Array
    high: Array
    sd: Array
    num: NDArray[np.int64]


def cell_intervals(matrices: ArrayLike, level: float = 0.95) -> CellIntervals:
    """Return the t interval of each cell over a stack of matrices, one a seed.

    As `t_interval`, cell by cell; each cell counts its own measured seeds. The level holds for one cell, not for all
    cells at once.

    Args:
        matrices: (S, T + 1, T), or any (S, ...); NaN where unmeasured.
        level: Confidence, in (0, 1).

    Raises:
        InputError: If there is no axis of seeds, a value is infinite or the level is not in (0, 1).

    Example:
        >>> cells = cell_intervals([[[0.1], [0.8]], [[0.3], [np.nan]]])
        >>> cells.mean.round(6).tolist(), cells.num.tolist(), np.isnan(cells.low).tolist()
        ([[0.2], [0.8]], [[2], [1]], [[False], [True]])
    """
    from scipy.special import stdtrit

    stack = _finite(np.asarray(matrices, dtype=np.float64))
    if stack.ndim == 0:
        raise InputError("Intervals need an axis of seeds, got a single number: give a list of values.")
    measured = ~np.isnan(stack)
    num = measured.sum(0)
    pivot = np.fmin.reduce(stack, axis=0, initial=np.nan)  # so that a constant cell has its value and sd 0 exactly
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = pivot + np.where(measured, stack - pivot, 0).sum(0) / num
        square = np.where(measured, stack - mean, 0) ** 2
        freedom = np.maximum(num - 1, 0)  # 0 / 0 makes the sd of one value NaN
        sd = np.sqrt(square.sum(0) / freedom)
        half = stdtrit(freedom, (1 + _share("level", level)) / 2) * sd / np.sqrt(num)
    return CellIntervals(mean, mean - half, mean + half, sd, num)


def bounded(cells: CellIntervals, low: float = -math.inf, high: float = math.inf) -> CellIntervals:
    r"""Return t intervals of the same means that stay within the range of the quantity.

    An accuracy has no interval up to 131 %. With u the mean's place in the range, the t interval is taken on the scale
    of :math:`\\log (u / (1 - u))`, or of :math:`\\log |m - b|` where one bound b is finite, and mapped back; its half
    width there is that of the values divided by the slope (the delta method; Agresti 2013, Categorical Data Analysis,
    section 3.1.6, for one proportion). Mean and standard deviation are unchanged. If the mean equals a bound, both ends
    of the interval are the mean.

    Args:
        cells: Intervals symmetric about their means.
        low: Least value of the quantity.
        high: Greatest.

    Example:
        >>> plain = cell_intervals([0.80, 0.98, 0.99])
        >>> near = bounded(plain, 0, 1)
        >>> [round(float(x), 3) for x in (plain.low, plain.high, near.low, near.high)]
        [0.658, 1.189, 0.22, 0.998]
    """
    from scipy.special import expit, logit

    if not (math.isfinite(low) or math.isfinite(high)):
        return cells
    half = (cells.high - cells.low) / 2
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if math.isfinite(low) and math.isfinite(high):
            u = (cells.mean - low) / (high - low)
            width = half / (high - low) / (u * (1 - u))
            ends = [low + (high - low) * expit(logit(u) + sign * width) for sign in (-1, 1)]
        else:
            bound, side = (low, 1) if math.isfinite(low) else (high, -1)
            gap = np.abs(cells.mean - bound)
            ends = [bound + side * gap * np.exp(side * sign * half / gap) for sign in (-1, 1)]
    at_bound = (cells.mean <= low) | (cells.mean >= high) | (half == 0)
    kept = [np.where(at_bound & np.isfinite(half), cells.mean, end) for end in ends]
    return replace(cells, low=kept[0], high=kept[1])


def t_interval(values: ArrayLike, level: float = 0.95, low: float = -math.inf, high: float = math.inf) -> Interval:
    """Return the mean and its t interval, kept within a range as `bounded` does.

    mean ± t_{(1 + level)/2, n - 1} sd / sqrt(n), where sd has the divisor n - 1. Exact for normal values.
    Source: Student 1908. NaN values are left out; one value has NaN bounds and sd, no value a NaN mean too. A
    constant sample has an interval of width 0.

    Args:
        values: One a seed, (n,).
        level: Confidence, in (0, 1).
        low: Least value of the quantity.
        high: Greatest.

    Raises:
        InputError: If the values are no vector, one is infinite, or the level is not in (0, 1).

    Example:
        >>> interval = t_interval([0.8, 0.9, 1.0, math.nan])
        >>> f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}], sd {interval.sd:.3f}, n={interval.num}"
        '0.900 [0.652, 1.148], sd 0.100, n=3'
    """
    cell = bounded(cell_intervals(_measured(values), level), low, high)
    return Interval(float(cell.mean), float(cell.low), float(cell.high), float(cell.sd), int(cell.num))


def bootstrap_interval(values: ArrayLike, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean and its bias-corrected and accelerated (BCa) bootstrap interval.

    Source: Efron 1987, section 3; computed by scipy. It assumes no normal values but needs many: with 5 normal ones a
    95% interval covers the mean in about 83% of cases, where the t interval covers it in 95%. BCa is undefined for a
    constant sample; every resample is then the sample, so the interval has width 0. Fewer than two values have NaN
    bounds, as in `t_interval`.

    Args:
        values: One a seed, (n,).
        level: Confidence, in (0, 1).
        num_resamples: Resamples drawn.
        seed: The interval is a function of it and of the arguments alone.

    Raises:
        InputError: As `t_interval`; or if there are no resamples.

    Example:
        >>> interval = bootstrap_interval([0.8, 0.9, 1.0, 0.7, 0.8])
        >>> 0.7 < interval.low < interval.mean < interval.high < 1.0
        True
    """
    kept = np.sort(_measured(values))  # so that the order of the seeds plays no part
    plain = t_interval(kept, level)
    _count("num_resamples", num_resamples)
    if plain.num < 2 or plain.sd == 0:
        return plain
    from scipy.stats import bootstrap

    bounds = bootstrap(
        ((kept - plain.mean) / plain.sd,),  # the jackknife of raw values may underflow
        lambda x, axis: np.round(x.mean(axis), 12),  # BCa counts the resamples that tie with the sample
        n_resamples=num_resamples,
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = (float(plain.mean + plain.sd * bound) for bound in bounds)
    return replace(plain, low=low, high=high)


# --------------------------------------------------------------------------- paired tests


class PairedTest(NamedTuple):
    """The mean difference a - b with its interval, and the two-sided p of no difference."""

    difference: Interval
    p: float


def paired_t(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> PairedTest:
    """Test whether two strategies differ, by the t test of their differences over the same seeds.

    t = mean(a - b) sqrt(n) / sd(a - b) with n - 1 degrees of freedom. Source: Student 1908. The p is below 1 - level
    exactly where the interval leaves out 0. Differences that do not vary (by more than the rounding of float32) have
    no t: p is 1 where they are 0, else NaN, for the spread that they would be judged by is unmeasured. Fewer than two
    pairs have NaN bounds and p.

    Args:
        a: Values of one strategy, one a seed, (n,).
        b: Values of the other on the same seeds.
        level: Confidence of the interval, in (0, 1).

    Raises:
        InputError: If the lengths differ, a value is infinite or the level is not in (0, 1).

    Example:
        >>> test = paired_t([0.8, 0.9, 0.7], [0.7, 0.7, 0.6])
        >>> f"{test.difference.mean:.4f}, p={test.p:.4f}"
        '0.1333, p=0.0572'
    """
    from scipy.special import stdtr

    x, y = _pairs(a, b)
    difference = t_interval(x - y, level)
    if difference.num < 2:
        return PairedTest(difference, math.nan)
    least = ROUNDING * float(np.abs([x, y]).max())
    if np.ptp(x - y) <= least:
        return PairedTest(difference, 1.0 if abs(difference.mean) <= least else math.nan)
    t = difference.mean * math.sqrt(difference.num) / difference.sd
    return PairedTest(difference, float(2 * stdtr(difference.num - 1, -abs(t))))


def sign_flip(a: ArrayLike, b: ArrayLike, level: float = 0.95, num_resamples: int = 9_999, seed: int = 0) -> PairedTest:
    """Test whether two strategies differ, by flipping the signs of their differences.

    If the differences d are symmetric about 0, all 2^n choices of signs s are equally probable, and
    p = #{s: |sum s d| >= |sum d|} / 2^n. Source: Fisher 1935, section 21. The interval holds the shifts that this
    test does not reject: its bounds are order statistics of the means of all subsets of d (Hartigan 1969). Up to 15
    pairs every choice is enumerated; above, the observed one and `num_resamples` random ones are. So p is at least
    2 / 2^n, or 1 / (1 + num_resamples), and never 0. The bounds are infinite where n is too small for the level: a
    95% interval needs 6 pairs. No pair has NaN bounds and p.

    Args:
        a: Values of one strategy, one a seed, (n,).
        b: Values of the other on the same seeds.
        level: Confidence of the interval, in (0, 1).
        num_resamples: Random choices of signs, above 15 pairs.
        seed: Seed of those.

    Raises:
        InputError: As `paired_t`; or if there are no resamples.

    Example:
        >>> test = sign_flip([0.8, 0.9, 0.7, 0.8, 0.6], [0.7, 0.7, 0.6, 0.5, 0.2])
        >>> test.p, test.difference.low  # 2 / 32: five seeds reach no 5%
        (0.0625, -inf)
    """
    x, y = _pairs(a, b)
    d = np.sort(x - y)  # so that the order of the seeds plays no part
    plain = t_interval(d, level)
    flips = _flips(len(d), num_resamples, seed)
    if not len(d):
        return PairedTest(plain, math.nan)
    sums = flips @ d
    means = np.sort(sums / flips.sum(1))
    return PairedTest(_bounded(plain, means, _tail(len(flips), level)), _flip_p(d, sums))


def wilcoxon(a: ArrayLike, b: ArrayLike, level: float = 0.95, num_resamples: int = 9_999, seed: int = 0) -> PairedTest:
    """Test whether two strategies differ, by the signed ranks of their differences.

    This is the sign-flip test of sign(d) rank(|d|), on which an outlier has little influence. Differences of 0 are left
    out, and ties have average ranks; p is exact nevertheless. The interval holds the shifts that the test does not
    reject: its bounds are order statistics of the means of all pairs of d, each d also with itself (Hodges & Lehmann
    1963). It bounds the centre of symmetry; with an outlier it may not contain the mean. Source: Wilcoxon 1945.
    Enumeration, least p and undefined cases are as in `sign_flip`; if all differences are 0, p is 1.

    Args:
        a: Values of one strategy, one a seed or one a stream, (n,).
        b: Values of the other on the same.
        level: Confidence of the interval, in (0, 1).
        num_resamples: Random choices of signs, above 15 pairs.
        seed: Seed of those.

    Raises:
        InputError: As `paired_t`; or if there are no resamples.

    Example:
        >>> wilcoxon([0.8, 0.9, 0.7, 0.8, 0.6, 0.5], [0.7, 0.7, 0.6, 0.5, 0.2, 0.6]).p
        0.125
    """
    from scipy.stats import rankdata

    x, y = _pairs(a, b)
    d = np.sort(x - y)  # so that the order of the seeds plays no part
    plain = t_interval(d, level)
    flips = _flips(len(d), num_resamples, seed)
    if not len(d):
        return PairedTest(plain, math.nan)
    size = np.round(np.abs(d) / (np.abs(d).max() or 1), 9)  # what differs by rounding only is a tie
    kept = size > 0
    ranks = rankdata(size[kept]) * np.sign(d[kept])
    p = _flip_p(ranks, _flips(len(ranks), num_resamples, seed) @ ranks) if kept.any() else 1.0
    i, j = np.triu_indices(len(d))
    null = np.sort(np.append(flips @ np.arange(1, len(d) + 1), 0))
    return PairedTest(_bounded(plain, np.sort((d[i] + d[j]) / 2), int(null[_tail(len(flips), level)])), p)


def _flips(num: int, num_resamples: int, seed: int) -> NDArray[np.bool_]:
    """Return which signs to flip, (M, num): every non-empty choice, or random ones of many."""
    _count("num_resamples", num_resamples)
    if num <= EXACT:
        every: NDArray[np.bool_] = (np.arange(1, 2**num)[:, None] >> np.arange(num)) % 2 == 1
        return every
    draws: NDArray[np.bool_] = np.random.default_rng(seed).random((num_resamples, num)) < 0.5
    draws[~draws.any(1)] = True  # flipping none is the observed choice, which counts already; all is its mirror
    return draws


def _flip_p(d: Array, sums: Array) -> float:
    """Return the share of choices of signs, the observed one with them, whose sum is as far from 0."""
    total = d.sum()
    rounding = 1e-9 * np.abs(d).sum()
    extreme = int(np.count_nonzero(np.abs(total - 2 * sums) >= abs(total) - rounding))
    return (1 + extreme) / (1 + len(sums))


def _tail(num: int, level: float) -> int:
    """Return how many of `num` choices and the observed one lie in each tail outside the level."""
    return int((1 + num) * (1 - level) / 2 + 1e-9)


def _bounded(plain: Interval, ordered: Array, tail: int) -> Interval:
    if tail == 0:
        return replace(plain, low=-math.inf, high=math.inf)
    return replace(plain, low=float(ordered[tail - 1]), high=float(ordered[-tail]))


# --------------------------------------------------------------------------- many comparisons


def _p_values(p: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    """Return a copy of p and the positions of the measured p-values, ascending by value."""
    values = np.array(p, dtype=np.float64)
    if values.ndim != 1:
        raise InputError(f"p-values must be a vector, got shape {values.shape}: give those of one family.")
    outside = values[(values < 0) | (values > 1)]
    if len(outside):
        raise InputError(f"A p-value of {outside[0]:g} is not in [0, 1]: give NaN where nothing was tested.")
    order = np.argsort(values, kind="stable")
    return values, order[: np.count_nonzero(~np.isnan(values))]


def holm(p: ArrayLike) -> Array:
    """Adjust p-values so that all rejections together hold the family-wise error rate, whatever their dependence.

    For p_(1) <= ... <= p_(m): adjusted p_(i) = max_{k<=i} min(1, (m - k + 1) p_(k)). Source: Holm 1979. The chance of
    even one false rejection among those with an adjusted p <= alpha is at most alpha. NaN stays and is not in m.

    Raises:
        InputError: If p is no vector or leaves [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03, math.nan]).tolist()
        [0.03, 0.06, 0.06, nan]
    """
    values, order = _p_values(p)
    steps = np.arange(len(order), 0, -1) * values[order]
    values[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return values


def benjamini_hochberg(p: ArrayLike) -> Array:
    """Adjust p-values so that rejections hold the false discovery rate, for independent tests.

    For p_(1) <= ... <= p_(m): adjusted p_(i) = min_{k>=i} m p_(k) / k. Source: Benjamini & Hochberg 1995. Among those
    with an adjusted p <= alpha the expected share of false rejections is at most alpha. NaN stays and is not in m.

    Raises:
        InputError: If p is no vector or leaves [0, 1].

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03, math.nan]).round(6).tolist()
        [0.03, 0.04, 0.04, nan]
    """
    values, order = _p_values(p)
    steps = values[order] * (len(order) / np.arange(1, len(order) + 1))
    values[order] = np.minimum.accumulate(steps[::-1])[::-1]
    return values


@dataclass(frozen=True)
class Comparison:
    """Two strategies over the seeds that they share.

    Args:
        a: Name of one strategy.
        b: Name of the other.
        difference: Mean of a - b with its interval, whose level is that of this comparison alone.
        p: Two-sided p of this comparison alone.
        p_holm: The same, adjusted for all comparisons of the table.
    """

    a: str
    b: str
    difference: Interval
    p: float
    p_holm: float

    @property
    def num_shared(self) -> int:
        """Seeds on which both strategies were measured."""
        return self.difference.num


def pairwise_tests(
    table: Mapping[str, Mapping[int, float]],
    test: Callable[[Array, Array, float], PairedTest] = paired_t,
    level: float = 0.95,
) -> list[Comparison]:
    """Compare every two strategies over their shared seeds, with p-values after Holm over all comparisons.

    Args:
        table: Strategy -> seed -> value. A seed counts for a pair where both have it and neither is NaN.
        test: `paired_t`, `sign_flip` or `wilcoxon`; the module says why the first is the default.
        level: Confidence of each interval, in (0, 1).

    Returns:
        One result a pair, in the order of the table. Where the test is undefined (for `paired_t`, fewer than two
        shared seeds) p is NaN and the comparison is left out of the correction.

    Example:
        >>> results = pairwise_tests({"a": {0: 0.5, 1: 0.7}, "b": {0: 0.4, 1: 0.5}, "c": {1: 0.3, 2: 0.2}})
        >>> [(r.a, r.b, r.num_shared, round(r.p_holm, 4)) for r in results]
        [('a', 'b', 2, 0.2048), ('a', 'c', 1, nan), ('b', 'c', 1, nan)]
    """
    pairs, tests = list(combinations(table, 2)), []
    for a, b in pairs:
        shared = sorted(table[a].keys() & table[b].keys())
        x, y = (np.array([table[name][seed] for seed in shared], dtype=np.float64) for name in (a, b))
        tests.append(test(x, y, level))
    adjusted = holm([p for _, p in tests])
    return [
        Comparison(a, b, difference, p, float(p_holm))
        for (a, b), (difference, p), p_holm in zip(pairs, tests, adjusted, strict=True)
    ]


# --------------------------------------------------------------------------- ranks over streams


def _rank_matrix(table: Mapping[str, Mapping[str, float]], higher_is_better: bool) -> Array:
    """Return the rank of each strategy on each stream where all are measured, (k, N); 1 is best, ties averaged."""
    from scipy.stats import rankdata

    names = [list(row) for row in table.values()]
    streams = [
        s for s in (names[0] if names else []) if all(not math.isnan(r.get(s, math.nan)) for r in table.values())
    ]
    values = np.array([[row[s] for s in streams] for row in table.values()], dtype=np.float64)
    if values.size == 0:
        raise InputError("No stream has a value of every strategy, so none can be ranked: leave a strategy out.")
    ranks: Array = rankdata(-values if higher_is_better else values, axis=0)
    return ranks


def average_ranks(table: Mapping[str, Mapping[str, float]], higher_is_better: bool = True) -> dict[str, float]:
    """Return each strategy's mean rank over the streams.

    R_j = 1/N sum_i r_ij, in [1, k], 1 is best; tied strategies share the mean of their ranks. Source: Demsar 2006,
    section 3.2.2. Only streams on which every strategy is measured count.

    Args:
        table: Strategy -> stream -> value (such as the mean over seeds).
        higher_is_better: The direction of the metric.

    Raises:
        InputError: If no stream has a value of every strategy.

    Example:
        >>> average_ranks({"er": {"digits": 0.9, "letters": 0.8}, "ewc": {"digits": 0.7, "letters": 0.8}})
        {'er': 1.25, 'ewc': 1.75}
    """
    return dict(zip(table, _rank_matrix(table, higher_is_better).mean(1).tolist(), strict=True))


@dataclass(frozen=True)
class FriedmanTest:
    """Whether strategies differ anywhere over the streams.

    Args:
        ranks: Average rank of each strategy.
        num_streams: Streams on which every strategy is measured.
        chi2: Friedman's statistic.
        p_chi2: Its p.
        f: Iman and Davenport's statistic, which is less conservative.
        p: Its p, the one to read.
    """

    ranks: dict[str, float]
    num_streams: int
    chi2: float
    p_chi2: float
    f: float
    p: float


def friedman(
    table: Mapping[str, Mapping[str, float]], higher_is_better: bool = True, correct_ties: bool = True
) -> FriedmanTest:
    """Test whether k strategies differ over N streams, by their ranks.

    chi2 = 12 N / (k (k+1)) (sum_j R_j^2 - k (k+1)^2 / 4), divided with `correct_ties` by
    1 - sum (t^3 - t) / (N k (k^2 - 1)) over groups of t ties, has k - 1 degrees of freedom;
    F = (N-1) chi2 / (N (k-1) - chi2) has k - 1 and (k-1)(N-1). Source: Friedman 1937, Iman & Davenport 1980, Demsar
    2006, section 3.2.2, which does not correct for ties. Both are approximations, good for N > 10 and k > 5; no p is
    put below k!^(1-N), the exact chance that all streams agree. One stream, or ties everywhere, give NaN.

    Args:
        table: Strategy -> stream -> value; only streams on which every strategy is measured count.
        higher_is_better: The direction of the metric.
        correct_ties: Whether to divide by what ties take away.

    Raises:
        InputError: If there are fewer than two strategies, or no stream has a value of every one.

    Example:
        >>> streams = {"a": {"s": 3, "t": 3, "u": 2}, "b": {"s": 2, "t": 2, "u": 3}, "c": {"s": 1, "t": 1, "u": 1}}
        >>> test = friedman(streams)
        >>> round(test.chi2, 4), round(test.f, 4), round(test.p, 4)
        (4.6667, 7.0, 0.0494)
    """
    from scipy.stats import chi2, f

    ranks = _rank_matrix(table, higher_is_better)
    k, num = ranks.shape
    _count("num_strategies", k, 2)
    most = num * (k - 1)  # the statistic where all streams agree
    squares = ((ranks - (k + 1) / 2) ** 2).sum()
    between = ((ranks.mean(1) - (k + 1) / 2) ** 2).sum() * num
    untied = num * k * (k**2 - 1) / 12
    total = squares if correct_ties else untied
    named, nan = average_ranks(table, higher_is_better), math.nan
    if num < 2 or squares == 0:
        return FriedmanTest(named, num, nan, nan, nan, nan)
    statistic = min(most * between / total, most)
    ratio = (num - 1) * statistic / (most - statistic) if most - statistic > 1e-9 * most else math.inf
    least = math.exp((1 - num) * math.lgamma(k + 1))
    p_chi2, p = float(chi2.sf(statistic, k - 1)), float(f.sf(ratio, k - 1, (k - 1) * (num - 1)))
    return FriedmanTest(named, num, float(statistic), max(p_chi2, least), float(ratio), max(p, least))


def critical_difference(num_strategies: int, num_streams: int, alpha: float = 0.05) -> float:
    """Return Nemenyi's critical difference: average ranks further apart than this differ.

    CD = q sqrt(k (k+1) / (6 N)), where q is the studentized range of k groups and infinite degrees of freedom at
    1 - alpha, over sqrt(2). Source: Nemenyi 1963; Demsar 2006, section 3.2.2, table 5.

    Args:
        num_strategies: k, at least 2.
        num_streams: N.
        alpha: Family-wise error rate over all pairs, in (0, 1).

    Raises:
        InputError: If there are too few strategies or streams, or alpha is not in (0, 1).

    Example:
        >>> round(critical_difference(num_strategies=4, num_streams=14), 2)
        1.25
    """
    from scipy.stats import studentized_range

    k, num = _count("num_strategies", num_strategies, 2), _count("num_streams", num_streams)
    q = studentized_range.ppf(1 - _share("alpha", alpha), k, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(k * (k + 1) / (6 * num)))


def cliques(ranks: Mapping[str, float], cd: float) -> list[tuple[str, ...]]:
    """Return the maximal groups of strategies whose average ranks are less than the critical difference apart.

    The bars of a critical difference diagram (Demsar 2006, section 3.2.4). Groups may overlap, each is in order of
    rank, the best group first; a strategy that differs from all others is a group of its own.

    Args:
        ranks: As `average_ranks` returns.
        cd: As `critical_difference` returns, above 0.

    Raises:
        InputError: If cd is not above 0.

    Example:
        >>> cliques({"a": 1.2, "b": 2.0, "c": 2.9, "d": 3.9}, cd=1.0)
        [('a', 'b'), ('b', 'c'), ('d',)]
    """
    if not cd > 0:
        raise InputError(f"cd={cd} is not above 0: give what critical_difference returns.")
    names, groups, end = sorted(ranks, key=ranks.__getitem__), [], 0
    for start, name in enumerate(names):
        stop = next((i for i in range(start, len(names)) if ranks[names[i]] - ranks[name] >= cd), len(names))
        if stop > end:  # else it lies within the group before
            groups.append(tuple(names[start:stop]))
        end = stop
    return groups


# --------------------------------------------------------------------------- agreement of two orders


@dataclass(frozen=True)
class Correlation:
    """A rank correlation.

    Args:
        tau: In [-1, 1]; 1 is the same order, -1 the reverse.
        low: Lower bound.
        high: Upper bound.
        p: Two-sided p of independence.
        num: Pairs that were measured.
    """

    tau: float
    low: float
    high: float
    p: float
    num: int


def kendall_tau(
    x: ArrayLike, y: ArrayLike, level: float = 0.95, num_resamples: int = 2_000, seed: int = 0
) -> Correlation:
    """Return Kendall's tau-b with its bootstrap interval and p.

    tau_b = sum_{i<j} sign(x_i - x_j) sign(y_i - y_j) / sqrt(pairs untied in x * pairs untied in y). Source: Kendall
    1945. The interval is the percentile bootstrap over points, without the resamples that are
    constant in x or y; with few points it is rough. p enumerates all n! orders for n <= 7, ties included; above it is
    scipy's (exact without ties for small n, else the normal approximation). Fewer than three points, or a constant
    side, give NaN throughout.

    Args:
        x: (n,).
        y: (n,).
        level: Confidence, in (0, 1).
        num_resamples: Bootstrap resamples.
        seed: Seed of those.

    Raises:
        InputError: If the lengths differ, a value is infinite, the level is not in (0, 1) or there are no resamples.

    Example:
        >>> tau = kendall_tau([1, 2, 3, 4], [1, 3, 2, 4])
        >>> round(tau.tau, 4), round(tau.p, 4), tau.num
        (0.6667, 0.3333, 4)
    """
    x, y = _pairs(x, y)
    num, tail = len(x), (1 - _share("level", level)) / 2
    _count("num_resamples", num_resamples)
    if num < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(math.nan, math.nan, math.nan, math.nan, num)
    draws = np.random.default_rng(seed).integers(num, size=(num_resamples, num))
    order_x, order_y = (np.sign(v[:, None] - v) for v in (x, y))
    taus = [_tau_b(order_x[np.ix_(rows, rows)], order_y[np.ix_(rows, rows)]) for rows in draws]
    defined = [tau for tau in taus if not math.isnan(tau)]
    low, high = np.quantile(defined, [tail, 1 - tail]).tolist() if defined else (math.nan, math.nan)
    p = _permutation_p(order_x, order_y) if num <= 7 else _scipy_p(x, y)
    return Correlation(_tau_b(order_x, order_y), low, high, p, num)


def _tau_b(order_x: Array, order_y: Array) -> float:
    untied = math.sqrt(np.count_nonzero(order_x) * np.count_nonzero(order_y))
    return float(np.vdot(order_x, order_y)) / untied if untied else math.nan


def _scipy_p(x: Array, y: Array) -> float:
    from scipy.stats import kendalltau

    return float(kendalltau(x, y).pvalue)


def _permutation_p(order_x: Array, order_y: Array) -> float:
    """Return the share of all orders of y that agree with x, or its reverse, as much as the given one."""
    orders = np.array(list(permutations(range(len(order_x)))))
    agreement = np.einsum("ij,pij->p", order_x, order_y[orders[:, :, None], orders[:, None, :]])
    return float(np.mean(np.abs(agreement) >= abs(agreement[0]) - 0.5))  # whole numbers; the first order is the given


def weighted_tau(x: ArrayLike, y: ArrayLike) -> float:
    """Return the weighted tau, in which exchanges at the top of the order count most.

    Each pair of points is weighted by 1/(r + 1) + 1/(s + 1), where r and s are their ranks from 0 at the largest value,
    averaged over the ranks by x and by y. In [-1, 1]. Source: Vigna 2015; computed by scipy. NaN for fewer than three
    points or a constant side. There is no standard p.

    Raises:
        InputError: If the lengths differ or a value is infinite.

    Example:
        >>> top, bottom = weighted_tau([4, 3, 2, 1], [3, 4, 2, 1]), weighted_tau([4, 3, 2, 1], [4, 3, 1, 2])
        >>> top < bottom
        True
    """
    x, y = _pairs(x, y)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    from scipy.stats import weightedtau

    return float(weightedtau(x, y).statistic)
