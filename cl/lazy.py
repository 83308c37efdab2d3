"""Names that are imported when they are first used, and modules that can be called; nothing heavy is imported here."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def imported(path: str) -> Any:
    """Return what a path such as "cl.data.task:Stream" names, or the module that one without a colon names.

    Example:
        >>> imported("cl.errors:InputError").__name__
        'InputError'
    """
    module, _, name = path.partition(":")
    return getattr(import_module(module), name) if name else import_module(module)


class _Callable(ModuleType):
    """A module that can be called like one function of it."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return imported(vars(self)["__call_path__"])(*arguments, **options)


def make_callable(module: ModuleType, path: str) -> None:
    """Let a module be called like a function, which is imported at the first call.

    For a function that is offered under the name of the module or package that it lies in.

    Example:
        >>> textwrap = ModuleType("textwrap")
        >>> make_callable(textwrap, "textwrap:dedent")
        >>> textwrap("  text")
        'text'
    """
    module.__call_path__ = path  # type: ignore[attr-defined]
    module.__class__ = _Callable


class _Functions(ModuleType):
    """A package whose modules can each be called like the function of their name, whoever imports them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and value.__name__ == f"{self.__name__}.{name}":
            make_callable(value, f"{value.__name__}:{name}")
        super().__setattr__(name, value)


def callable_modules(package: str) -> None:
    """Let each module of a package be called like the function of its name."""
    sys.modules[package].__class__ = _Functions
