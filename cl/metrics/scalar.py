"""`Scalar`: a function from the measurements of a run to one number, together with the definition of that number."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False, repr=False)
class Scalar(Generic[P, T]):
    """One scalar, which is called like its function.

    Attributes:
        name: The name in every file and table.
        function: Returns the number from the measurements; NaN if it is undefined.
        formula: The formula in one line, with tasks numbered from 1.
        source: The paper or the library that defines it.
        scale: Unit and range, such as "fraction, [0, 1]"; without a range it means 0 or more.
        divisor: The divisor of the sum in the formula, in which libraries often differ; "1" if there is none.
        higher_is_better: Whether a higher value is better.
        weighting: What each term of a mean stands for, such as "task mean"; "none" if the formula is no mean.
        needs: What a run must have measured: keys of `cl.report.evidence.NEEDS`, or "instrument:NAME".
        fair: Whether it is read under the mask "task" if the run has one, as experts know no other classes.

    Example:
        >>> from cl.metrics.transfer import bwt_gem, worked_example
        >>> bwt_gem.formula, bwt_gem.divisor, round(float(bwt_gem(worked_example())), 3)
        ('sum_{j<T} (R[T,j] - R[j,j])', 'T - 1', -0.015)
    """

    name: str
    function: Callable[P, T]
    formula: str
    source: str
    scale: str = "fraction, [0, 1]"
    divisor: str = "1"
    higher_is_better: bool = True
    weighting: str = "none"
    needs: tuple[str, ...] = ()
    fair: bool = False

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.function)  # with the docstring of the function, whose example is tested

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of the function."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Scalar({self.name}: {self.formula})"

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest value of the scale."""
        return range_of_scale(self.scale)


AnyScalar: TypeAlias = Scalar[..., Any]


def scalar(
    *,
    formula: str,
    source: str,
    scale: str = "fraction, [0, 1]",
    divisor: str = "1",
    higher_is_better: bool = True,
    weighting: str = "none",
    needs: tuple[str, ...] = (),
    fair: bool = False,
) -> Callable[[Callable[P, T]], Scalar[P, T]]:
    """Decorate a function as a scalar, which runs report in `transfer.json`, W&B, the terminal and `cl-compare`.

    The function takes the measurements of a run, a `cl.Evidence`, and returns a number, or NaN if it is undefined. A
    number outside of the range of the scale is left out, and the reason is reported.

    Args:
        formula: The formula in one line, with tasks numbered from 1.
        source: The paper or the library that defines it.
        scale: Unit and range, such as "fraction, [0, 1]"; without a range it means 0 or more.
        divisor: The divisor of the sum in the formula; "1" if there is none.
        higher_is_better: Whether a higher value is better.
        weighting: What each term of a mean stands for, such as "task mean"; "none" if the formula is no mean.
        needs: What a run must have measured: keys of `cl.report.evidence.NEEDS`, or "instrument:NAME".
        fair: Whether the function reads `evidence.fair_R`, which is under the mask "task" if the run has one.

    Example:
        >>> @scalar(formula="max_j R[T,j] - min_j R[T,j]", source="this page", higher_is_better=False)
        ... def spread(evidence):
        ...     return evidence.R[-1].max() - evidence.R[-1].min()
        >>> spread.name, spread.range
        ('spread', (0.0, 1.0))
    """
    definition = locals()

    def decorate(function: Callable[P, T]) -> Scalar[P, T]:
        return Scalar(name=function.__name__, function=function, **definition)

    return decorate


def range_of_scale(scale: str) -> tuple[float, float]:
    """Return the range in a scale; a scale without one, such as "seconds", means 0 or more.

    Example:
        >>> range_of_scale("fraction, [-1, 1]"), range_of_scale("(-inf, 1]"), range_of_scale("seconds")
        ((-1.0, 1.0), (-inf, 1.0), (0.0, inf))
    """
    found = re.search(r"[\[(](-?inf|-?[\d.]+), (inf|-?[\d.]+)[\])]", scale)
    return (float(found.group(1)), float(found.group(2))) if found else (0.0, math.inf)


def range_of_metric(metric: str) -> tuple[float, float]:
    """Return the range of a metric, and so of the entries of R.

    Example:
        >>> range_of_metric("accuracy"), range_of_metric("R2")
        ((0.0, 1.0), (-inf, 1.0))
    """
    return (-math.inf, 1.0) if metric == "R2" else (0.0, 1.0)
