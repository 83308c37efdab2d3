"""Every range in an annotation is checked where it is called, and its default is inside."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_args, get_origin

import griffe
from annotated_types import Ge, Gt, Interval, Le, Lt

import cl
import cl.strategies
import cl.streams
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.ranges import annotation_of, check_range, range_of


def functions() -> Iterator[Any]:
    """Yield every function that our modules define, constructors and methods among them."""
    packages = cl, cl.strategies, cl.streams
    names = {info.name for p in packages for info in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")}
    for name in sorted(names - {"cl.__main__"}):
        module = importlib.import_module(name)
        for thing in vars(module).values():
            if getattr(thing, "__module__", "") != name:
                continue
            if inspect.isfunction(thing):
                yield thing
            elif inspect.isclass(thing):
                yield from (part for part in vars(thing).values() if inspect.isfunction(part))


def ranged() -> list[tuple[Any, str, Any]]:
    """Return function, argument and annotation wherever one has a range."""
    found = []
    for function in dict.fromkeys(functions()):
        for name, parameter in inspect.signature(function).parameters.items():
            annotation = annotation_of(function, name)
            said = "Annotated[" in str(parameter.annotation)
            assert bool(range_of(annotation)) == said, f"{function.__qualname__}.{name}: a range that cannot be read"
            if said:
                found.append((function, name, annotation))
    return found


RANGED = ranged()


def edges(annotation: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a value just inside and one just outside, for each bound of an annotation."""
    origin = get_origin(annotation)
    if origin is not Annotated:
        for pair in (pair for part in get_args(annotation) for pair in edges(part)):
            yield ([pair[0]], [pair[1]]) if origin is Sequence else pair
        return
    kind, *metadata = get_args(annotation)
    for bound in [b for some in metadata for b in (some if isinstance(some, Interval) else [some])]:
        edge = getattr(bound, type(bound).__name__.lower())
        away = -1 if isinstance(bound, Ge | Gt) else 1
        if kind is int:
            beyond, before = edge + away, edge - away
        else:
            beyond, before = math.nextafter(edge, away * math.inf), math.nextafter(edge, -away * math.inf)
        yield (edge, beyond) if isinstance(bound, Ge | Le) else (before, edge)
        assert isinstance(bound, Ge | Gt | Le | Lt)


def test_each_function_with_a_range_refuses_what_is_just_outside():
    assert len({function for function, _, _ in RANGED}) > 60
    for function, name, annotation in RANGED:
        for inside, outside in edges(annotation):
            check_range(name, inside, annotation)
            try:
                function(**{name: outside})
            except InputError as error:
                assert f".{name}={outside} must be " in str(error), f"{function.__qualname__}: {error}"
            except TypeError as error:
                raise AssertionError(f"{function.__module__}.{function.__qualname__} lacks @checked") from error
            else:
                raise AssertionError(f"{function.__qualname__}({name}={outside}) is accepted")


def test_a_default_is_inside_its_range():
    for function, name, annotation in RANGED:
        default = inspect.signature(function).parameters[name].default
        if default is not inspect.Parameter.empty:
            check_range(f"{function.__qualname__}.{name}", default, annotation)


RANGE_IN_WORDS = re.compile(r"\b(in|within) [\[(]-?\d|\b\d+ or more\b|\b\d+ to \d+\b|\babove \d|\bat least \d+\b")


def test_a_range_that_a_strategys_docstring_states_is_an_annotation():
    for kind in strategies():
        for section in griffe.Docstring(inspect.getdoc(kind) or "", parser="google").parse(warnings=False):
            if section.kind is griffe.DocstringSectionKind.parameters:
                for argument in section.value:
                    if RANGE_IN_WORDS.search(argument.description):
                        assert range_of(annotation_of(kind, argument.name)), f"{kind.__name__}.{argument.name}"


def strategies() -> list[type[Strategy]]:
    return [getattr(cl.strategies, name) for name in cl.strategies.__all__]
