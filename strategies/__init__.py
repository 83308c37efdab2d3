"""Methods of continual learning, one file for each paper.

Each class is an attribute of this package, such as `cl.strategies.EWC`; its file is imported at the first access.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


@cache
def _files() -> dict[str, str]:
    """Return class name -> file name. The two are equal but for "_" and the case of letters."""
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
