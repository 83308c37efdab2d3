"""Imports at first use, and modules that can be called like a function; this module imports nothing heavy."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def imported(path: str) -> Any:
    """Return the object that a path such as "cl.data.task:Stream" names; without a colon, the module.

    Example:
        >>> imported("cl.errors:InputError").__name__
        'InputError'
    """
    module, _, name = path.partition(":")
    return getattr(import_module(module), name) if name else import_module(module)


class _Callable(ModuleType):
    """A module that can be called like a function."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return imported(vars(self)["__call_path__"])(*arguments, **options)


def make_callable(module: ModuleType, path: str) -> None:
    """Let a module be called like a function, for a function that has the name of its module or package.

    Args:
        module: The module to change.
        path: The function, as `imported` takes it; it is imported at the first call.

    Example:
        >>> textwrap = ModuleType("textwrap")
        >>> make_callable(textwrap, "textwrap:dedent")
        >>> textwrap("  text")
        'text'
    """
    module.__call_path__ = path  # type: ignore[attr-defined]
    module.__class__ = _Callable


class _Functions(ModuleType):
    """A package each of whose modules can be called like its function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and value.__name__ == f"{self.__name__}.{name}":
            make_callable(value, f"{value.__name__}:{name}")
        super().__setattr__(name, value)


def callable_modules(package: str) -> None:
    """Let each module of a package be called like its function of the same name."""
    sys.modules[package].__class__ = _Functions
