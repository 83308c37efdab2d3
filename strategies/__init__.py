"""Methods of continual learning: one paper a file, each to be read next to it.

The class of a file is there as `cl.strategies.EWC`, and imported when it is first asked for.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


@cache
def _files() -> dict[str, str]:
    """Return the file that each class lies in; a class has the name of its file, in any case and without "_"."""
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        classes = re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        found |= {name: path.stem for name in classes if name.lower() == path.stem.replace("_", "")}
    return found


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return list(_files())
    if name.startswith("__"):
        raise AttributeError(name)
    if name not in _files():
        from cl.errors import unknown

        raise AttributeError(str(unknown("strategy", name, _files())))
    return getattr(import_module(f"{__name__}.{_files()[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_files()]
