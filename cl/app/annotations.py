"""Check the values of a configuration against the annotations of the function or class that receives them."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin

from cl.errors import InputError, unknown
from cl.ranges import annotation_of, check_range

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}
_LARGEST = 2**63 - 1  # of an integer in a tensor


def check_value(key: str, value: Any, annotation: Any) -> None:
    """Refuse a value of a configuration that does not have the annotated type, or is out of the annotated range.

    NaN and booleans are not accepted as numbers, and integers must fit into 64 bits. Annotations other than those of
    plain values, their lists and dicts are not checked.

    Args:
        key: The key that the user wrote, such as `strategy.er.memory_size`.
        value: Text, a number, true or false, null, or a list or dict of these.
        annotation: The annotation, such as `int | None`.

    Raises:
        InputError: If the value does not fit; names key, value and what is expected.

    Example:
        >>> check_value("seed", 3, int)
        >>> check_value("seed", 1.5, int | None)
        Traceback (most recent call last):
        cl.errors.InputError: seed=1.5 must be a whole number or null.
    """
    if not _fits(value, annotation):
        expected = " or ".join(dict.fromkeys(_describe(annotation)))
        quoted = (
            f""": write {key.rpartition(".")[2]}="'{value}'\"""" if _is_number(value) and "text" in expected else ""
        )
        raise InputError(f"{key}={_shown(value)} must be {expected}{quoted}.")
    if isinstance(value, int | float | list):
        check_range(key, value, annotation)


def check_call(key: str, target: Any, values: Mapping[str, Any], keys: Mapping[str, str] | None = None) -> None:
    """Check the values that a configuration passes to a function or class as keyword arguments.

    Args:
        key: The key of the part of the configuration that holds them.
        target: The function or class.
        values: The value of each argument; objects that no configuration can hold are not checked.
        keys: For each argument whose value was written under another key than `key.argument`, that key.

    Raises:
        InputError: If there is no such argument, or a value does not have the argument's type or is out of its range.

    Example:
        >>> check_call("optimizer", __import__("torch").optim.SGD, {"lr": "fast"})
        Traceback (most recent call last):
        cl.errors.InputError: optimizer.lr='fast' must be a number.
    """
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return
    extra = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in values.items():
        if name not in parameters:
            if extra:
                continue
            raise unknown(
                f"argument of {key}", name, [p.name for p in parameters.values() if p.kind is not p.VAR_POSITIONAL]
            )
        default = parameters[name].default
        if value is default or (type(value) is type(default) and value == default):
            continue
        check_value((keys or {}).get(name, f"{key}.{name}"), value, annotation_of(target, name))


def _fits(value: Any, annotation: Any) -> bool:
    origin, inner = get_origin(annotation), get_args(annotation)
    if not isinstance(value, str | int | float | list | dict | None):
        return True  # an object that a `_target_` built
    if annotation is Any or isinstance(annotation, TypeVar | str):
        return True
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is Literal:
        return any(value == known and type(value) is type(known) for known in inner)
    if annotation in (None, type(None)):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if annotation is float:
        return _is_number(value) and not math.isnan(value) and (isinstance(value, float) or abs(value) <= _LARGEST)
    if annotation in (str, Path):
        return isinstance(value, str) and "\0" not in value
    kind = origin or annotation
    if not isinstance(kind, type) or typing.is_typeddict(kind):
        return True
    if issubclass(kind, Mapping):
        return isinstance(value, dict)
    if kind in (list, tuple, set, frozenset, Sequence, Iterable) or issubclass(kind, Sequence):
        return isinstance(value, list) and _all_fit(value, kind, inner)
    return not isinstance(value, str | int | float | list | None) and not isinstance(value, dict)


def _all_fit(values: list[Any], kind: Any, inner: tuple[Any, ...]) -> bool:
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        return len(values) == len(inner) and all(_fits(v, a) for v, a in zip(values, inner, strict=True))
    return not inner or all(_fits(value, inner[0]) for value in values)


def _describe(annotation: Any) -> list[str]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        words = [word for part in inner for word in _describe(part)]
        return [word for word in words if "_target_" not in word] or words
    if origin is Literal:
        return [", ".join(map(str, inner))]
    if origin is Annotated:
        return _describe(inner[0])
    if annotation in _WORDS or annotation is None:
        return [_WORDS[annotation or type(None)]]
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return ["a mapping"]
    if kind in (list, tuple, set, frozenset, Sequence, Iterable):
        elements = " or ".join(
            dict.fromkeys(word for part in inner if part is not Ellipsis for word in _describe(part))
        )
        plural = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts"}.get(elements, elements)
        count = f"{len(inner)} " if kind is tuple and inner and inner[-1] is not Ellipsis else ""
        return [f"a list of {count}{plural}" if plural else "a list"]
    return [f"built by a _target_ ({getattr(kind, '__name__', kind)})"]


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """Return a value as it is written in a configuration, cut to 80 characters."""
    text = (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else repr(value)
    )
    return text if len(text) <= 80 else f"{text[:77]}..."
