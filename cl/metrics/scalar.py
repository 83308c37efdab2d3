"""`Scalar`: a function that makes one number of a run, and what must be said next to that number."""

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
        name: What it is called in every file and table.
        function: What is measured to a number; NaN where that is undefined.
        formula: One line, tasks numbered from 1.
        source: The paper or the library that the definition is from.
        scale: Unit and range, such as "fraction, [0, 1]"; without a range, 0 and more.
        divisor: What the sum of the formula is divided by; the libraries differ here most. "1" where there is none.
        higher_is_better: The sign.
        weighting: What counts once in a mean, such as "task mean"; "none" where the formula is no mean.
        needs: What a run must have measured: keys of `cl.report.scalars.NEEDS`, or "instrument:NAME".
        fair: Whether it is read under the mask "task" where there is one, beside experts who know no other classes.

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
        functools.update_wrapper(self, self.function)  # its docstring, and its example, are those of the function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what the function returns."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Scalar({self.name}: {self.formula})"

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest value that its scale names."""
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
    """Make a function a scalar that runs report: in `transfer.json`, W&B, the terminal and `cl-compare`.

    The function is given what a run has measured, `cl.Evidence`, and returns a number, or NaN where it is undefined. A
    number outside the range of its scale is left out, and the reason is told.

    Args:
        formula: One line, tasks numbered from 1.
        source: The paper or the library that the definition is from.
        scale: Unit and range, such as "fraction, [0, 1]"; without a range, 0 and more.
        divisor: What the sum of the formula is divided by; "1" where there is none.
        higher_is_better: The sign.
        weighting: What counts once in a mean, such as "task mean"; "none" where the formula is no mean.
        needs: What a run must have measured: keys of `cl.report.scalars.NEEDS`, or "instrument:NAME".
        fair: Whether the function reads `evidence.fair_R`, under the mask "task" where there is one.

    Example:
        >>> @scalar(formula="max_j R[T,j] - min_j R[T,j]", source="this page", higher_is_better=False)
        ... def spread(evidence):
        ...     return evidence.R[-1].max() - evidence.R[-1].min()
        >>> spread.name, spread.range
        ('spread', (0.0, 1.0))
    """
    said = locals()

    def decorate(function: Callable[P, T]) -> Scalar[P, T]:
        return Scalar(name=function.__name__, function=function, **said)

    return decorate


def range_of_scale(scale: str) -> tuple[float, float]:
    """Return the range that a scale names; of amounts, which it does not, 0 and more.

    Example:
        >>> range_of_scale("fraction, [-1, 1]"), range_of_scale("(-inf, 1]"), range_of_scale("seconds")
        ((-1.0, 1.0), (-inf, 1.0), (0.0, inf))
    """
    found = re.search(r"[\[(](-?inf|-?[\d.]+), (inf|-?[\d.]+)[\])]", scale)
    return (float(found.group(1)), float(found.group(2))) if found else (0.0, math.inf)


def range_of_metric(metric: str) -> tuple[float, float]:
    """Return the range of an entry of R.

    Example:
        >>> range_of_metric("accuracy"), range_of_metric("R2")
        ((0.0, 1.0), (-inf, 1.0))
    """
    return (-math.inf, 1.0) if metric == "R2" else (0.0, 1.0)
