"""Ranges of arguments: annotations such as `Annotated[float, Ge(0)]`, checked where a function or class is called.

The ranges are those of the package `annotated_types`: `Ge`, `Gt`, `Le`, `Lt` and `Interval`. They hold for Python
callers and for configurations alike, and the documentation shows them.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Le, Lt

from cl.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])
Bound = Ge | Gt | Le | Lt


def checked(thing: F) -> F:
    """Decorate a function or class to refuse arguments outside of the ranges in their annotations.

    Signature, documentation and name are preserved. A decorated class checks the arguments of its constructor, also if
    a subclass calls it. Subclasses of `Strategy` are checked without a decorator.

    Args:
        thing: A function or a class.

    Raises:
        InputError: When the result is called with an argument out of range; the message names function or class,
            argument and value.

    Example:
        >>> @checked
        ... def halve(share: Annotated[float, Interval(ge=0, le=1)], times: Annotated[int, Ge(1)] | None = None):
        ...     return share / 2
        >>> halve(0.5)
        0.25
        >>> halve(0.5, times=0)
        Traceback (most recent call last):
        cl.errors.InputError: halve.times=0 must be 1 or more.
    """
    if isinstance(thing, type):
        thing.__init__ = checked(thing.__init__)  # type: ignore[misc]
        return thing
    function = typing.cast(types.FunctionType, thing)
    arguments = _Arguments(function)

    def call(*given: Any, **named: Any) -> Any:
        arguments.check(given, named)
        return function(*given, **named)

    # With the globals of the original's module: by them doctest recognises the functions of a module.
    wrapped = types.FunctionType(call.__code__, function.__globals__, closure=call.__closure__)
    return typing.cast(F, functools.update_wrapper(wrapped, function))


class _Arguments:
    """The arguments of a function and their ranges."""

    def __init__(self, function: types.FunctionType) -> None:
        self.function = function
        self.signature = inspect.signature(function)

    @functools.cached_property
    def ranged(self) -> dict[str, Any]:
        """The annotations with a range, by argument; read at the first call, when all names in them are defined."""
        found = ((name, annotation_of(self.function, name)) for name in self.signature.parameters)
        return {name: annotation for name, annotation in found if range_of(annotation)}

    @functools.cached_property
    def owner(self) -> str:
        """The name of the function, or of the class of a constructor, as `option_name` gives it."""
        name = self.function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
        return option_name(self.function.__module__, name)

    def check(self, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Refuse a value out of range. Missing or unknown arguments are left to Python's own TypeError."""
        if not self.ranged:
            return
        try:
            values = self.signature.bind_partial(*given, **named).arguments
        except TypeError:
            return
        for name, annotation in self.ranged.items():
            if name in values:
                check_range(f"{self.owner}.{name}", values[name], annotation)


def option_name(module: str, name: str) -> str:
    """Return the name of a class or function in the configuration: that of its file if both agree, else its own.

    Example:
        >>> option_name("cl.strategies.online_ewc", "OnlineEWC"), option_name("cl.backbones.networks", "MLP")
        ('online_ewc', 'MLP')
    """
    file = module.rpartition(".")[2]
    return file if file.replace("_", "") == name.lower().replace("_", "") else name


def annotation_of(thing: Callable[..., Any], name: str) -> Any:
    """Return the annotation of an argument as a type; Any if it uses a name that is not imported at run time.

    Args:
        thing: A function or a class.
        name: The name of the argument.

    Example:
        >>> annotation_of(check_range, "name")
        <class 'str'>
    """
    annotation = inspect.signature(thing).parameters[name].annotation
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    function = inspect.unwrap(thing.__init__ if isinstance(thing, type) else thing)  # type: ignore[misc]
    module = sys.modules.get(getattr(thing, "__module__", ""))
    own = getattr(function, "__globals__", vars(module) if module else {})
    try:
        return eval(annotation, {**vars(typing), **vars(collections.abc), **own})
    except Exception:
        return Any


def check_range(name: str, value: Any, annotation: Any) -> None:
    """Refuse a number outside of the range in its annotation; NaN is outside of every range.

    Args:
        name: The name of the argument, as the user writes it.
        value: A number, a sequence of numbers, each of which is checked, or another value, such as None or text.
        annotation: Such as `Annotated[int, Ge(1)] | None` or `Sequence[Annotated[float, Interval(ge=0, le=1)]]`.

    Raises:
        InputError: Naming the value and the range.

    Example:
        >>> check_range("ewc.weight", 100.0, Annotated[float, Ge(0)])
        >>> check_range("freeze", False, bool | Annotated[int, Ge(1)])
        >>> check_range("lwf.temperature", float("nan"), Annotated[float, Gt(0)])
        Traceback (most recent call last):
        cl.errors.InputError: lwf.temperature=nan must be above 0.
    """
    for number, bounds in _pairs(value, annotation):
        if not all(_holds(number, bound) for bound in bounds):
            shown = repr(value) if isinstance(value, str) else value
            raise InputError(f"{name}={shown} must be {_text(bounds)}.")


def range_of(annotation: Any) -> str:
    """Return the range of the numbers that an annotation allows, in words; "" if it gives none.

    Example:
        >>> range_of(Annotated[float, Interval(gt=0, le=1)] | None), range_of(int)
        ('above 0 and at most 1', '')
    """
    if isinstance(annotation, str | bytes):
        return ""
    own = [_text(_bounds(annotation))] if get_origin(annotation) is Annotated else []
    inner = get_args(annotation)[: 1 if own else None]
    return " or ".join(dict.fromkeys(text for text in [*own, *map(range_of, inner)] if text))


def _pairs(value: Any, annotation: Any) -> Iterator[tuple[Any, list[Bound]]]:
    """Yield each number in a value with the bounds in its annotation."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield value, _bounds(annotation)
    elif origin in (Union, types.UnionType):
        if value is not None and not isinstance(value, str) and not (isinstance(value, bool) and bool in inner):
            for part in inner:
                if _is_several(value) == _is_sequence(part):
                    yield from _pairs(value, part)
    elif inner and _is_sequence(annotation) and _is_several(value):
        for number in value:
            yield from _pairs(number, inner[0])


def _is_several(value: Any) -> bool:
    return (isinstance(value, Sequence) and not isinstance(value, str)) or getattr(value, "ndim", 0) > 0


def _is_sequence(annotation: Any) -> bool:
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, Sequence) and kind is not str


def _bounds(annotation: Any) -> list[Bound]:
    said = (part for some in annotation.__metadata__ for part in (some if isinstance(some, Interval) else [some]))
    return [bound for bound in said if isinstance(bound, Bound)]


def _holds(number: Any, bound: Bound) -> bool:
    try:
        match bound:
            case Ge(least):
                return bool(number >= least)
            case Gt(least):
                return bool(number > least)
            case Le(most):
                return bool(number <= most)
            case Lt(most):
                return bool(number < most)
    except TypeError:  # no number
        return False


def _text(bounds: Sequence[Bound]) -> str:
    """Return a range in words."""
    least = next((bound for bound in bounds if isinstance(bound, Ge | Gt)), None)
    most = next((bound for bound in bounds if isinstance(bound, Le | Lt)), None)
    if isinstance(least, Ge) and isinstance(most, Le):
        return f"between {least.ge} and {most.le}"
    low = "" if least is None else f"{least.ge} or more" if isinstance(least, Ge) else f"above {least.gt}"
    high = "" if most is None else f"at most {most.le}" if isinstance(most, Le) else f"below {most.lt}"
    return " and ".join(filter(None, [low, high]))
