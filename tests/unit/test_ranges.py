"""The checker of ranges: what passes, what is refused, and what a decorated function or class keeps."""

from __future__ import annotations

import inspect
import math
import pickle
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt
from hypothesis import given
from hypothesis import strategies as st

from cl.app.annotations import check_call
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.ranges import check_range, checked, range_of


@checked
def scaled(x: int, scale: Annotated[float, Interval(gt=0, le=1)] = 0.5, *, times: Annotated[int, Ge(1)] | None = None):
    """Return x times the scale."""
    return x * scale


class Bounded(Strategy):
    def __init__(self, weight: Annotated[float, Ge(0)] = 1.0, sizes: Sequence[Annotated[int, Ge(1)]] = (1, 2)) -> None:
        super().__init__()
        self.weight = weight


class Inherits(Bounded):
    def __init__(self, much: float) -> None:
        super().__init__(weight=much)


NUMBERS = st.floats() | st.integers() | st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan])


@given(NUMBERS, st.floats(-2, 2), st.floats(-2, 2), st.booleans(), st.booleans())
def test_a_number_passes_where_the_inequalities_hold(number, low, high, open_low, open_high):
    bounds = Gt(low) if open_low else Ge(low), Lt(high) if open_high else Le(high)
    inside = (number > low if open_low else number >= low) and (number < high if open_high else number <= high)
    if inside:
        check_range("mine.x", number, Annotated[(float, *bounds)])
    else:
        with pytest.raises(InputError, match=r"mine\.x="):
            check_range("mine.x", number, Annotated[(float, *bounds)])


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Annotated[int, Ge(1)], "1 or more"),
        (Annotated[float, Gt(0)] | None, "above 0"),
        (Annotated[float, Le(3)], "at most 3"),
        (Annotated[float, Lt(3)], "below 3"),
        (Annotated[float, Interval(ge=0, le=1)], "between 0 and 1"),
        (Annotated[float, Interval(gt=0, le=1)], "above 0 and at most 1"),
        (Annotated[float, Interval(ge=0, lt=1)], "0 or more and below 1"),
        (Annotated[int, Ge(1)] | Sequence[Annotated[int, Ge(1)]], "1 or more"),
        (Annotated[int, "of the memory"], ""),
        (int | Literal["auto"], ""),
    ],
)
def test_a_range_in_words(annotation, words):
    assert range_of(annotation) == words


@pytest.mark.parametrize("value", [None, "auto", 1, [1, 2], (3,), np.array([1, 4]), np.int64(2)])
def test_what_else_an_annotation_allows_passes(value):
    check_range("mine.x", value, Annotated[int, Ge(1)] | Sequence[Annotated[int, Ge(1)]] | Literal["auto"] | None)


@pytest.mark.parametrize("value", [0, [1, 0], (-3,), np.array([1, 0]), [math.nan]])
def test_each_number_of_several_counts(value):
    with pytest.raises(InputError, match="1 or more"):
        check_range("mine.x", value, Annotated[int, Ge(1)] | Sequence[Annotated[int, Ge(1)]] | Literal["auto"] | None)


@pytest.mark.parametrize("value", [None, "5", object()])
def test_what_is_no_number_is_outside_of_a_range(value):
    with pytest.raises(InputError, match="must be 1 or more"):
        check_range("mine.x", value, Annotated[int, Ge(1)])


def test_a_function_refuses_by_position_and_by_name():
    assert scaled(4, 0.25) == 1 and scaled(4, times=None) == 2
    for call in (lambda: scaled(4, 0), lambda: scaled(4, scale=1.5), lambda: scaled(4, math.nan)):
        with pytest.raises(InputError, match=r"^scaled\.scale=.* must be above 0 and at most 1\.$"):
            call()
    with pytest.raises(InputError, match=r"^scaled\.times=0 must be 1 or more\.$"):
        scaled(4, times=0)


def test_a_function_keeps_what_tools_read_of_it():
    original = inspect.unwrap(scaled)
    assert original is not scaled and inspect.signature(scaled) == inspect.signature(original)
    assert (scaled.__name__, scaled.__doc__) == ("scaled", "Return x times the scale.")
    assert scaled.__globals__ is globals(), "doctest tells a module's functions by it"
    assert pickle.dumps(checked) and inspect.getsource(scaled).startswith("@checked")


def test_wrong_arguments_are_told_by_python():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        scaled()
    with pytest.raises(TypeError, match="unexpected keyword argument 'scales'"):
        scaled(1, scales=2)


def test_a_strategy_is_checked_without_a_decorator_and_through_super():
    assert list(inspect.signature(Bounded).parameters) == ["weight", "sizes"]
    assert Inherits(2.0).weight == 2.0
    for make in (lambda: Bounded(-1.0), lambda: Inherits(-1.0)):
        with pytest.raises(InputError, match=r"^Bounded\.weight=-1\.0 must be 0 or more\.$"):
            make()
    with pytest.raises(InputError, match=r"^Bounded\.sizes=\[1, 0\] must be 1 or more\.$"):
        Bounded(sizes=[1, 0])


def test_a_configuration_is_told_by_its_key():
    check_call("strategy.mine", Bounded, {"weight": 0.5, "sizes": [3]})
    with pytest.raises(InputError, match=r"^strategy\.mine\.weight=-1 must be 0 or more\.$"):
        check_call("strategy.mine", Bounded, {"weight": -1})
    with pytest.raises(InputError, match=r"^strategy\.mine\.sizes=\[1, 0\] must be 1 or more\.$"):
        check_call("strategy.mine", Bounded, {"sizes": [1, 0]})
    with pytest.raises(InputError, match=r"^strategy\.mine\.weight='much' must be a number\.$"):
        check_call("strategy.mine", Bounded, {"weight": "much"})
