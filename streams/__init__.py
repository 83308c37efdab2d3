"""Kinds of streams: each file builds a stream of tasks from any dataset.

A kind is available as `cl.streams.split(...)`, and its module is imported at first use.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from cl.lazy import callable_modules

__all__ = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
callable_modules(__name__)  # a function has the name of its file


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    if name.startswith("__"):
        raise AttributeError(name)
    from cl.errors import unknown

    raise AttributeError(str(unknown("stream", name, __all__)))


def __dir__() -> list[str]:
    return [*globals(), *__all__]
