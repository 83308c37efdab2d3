"""A package of a user's own, installed by pip, whose configurations `cl-run` finds through an entry point."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PROJECT = """\
[build-system]
requires = ["setuptools>=61"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "1"

[project.entry-points."clsim.conf"]
{name} = "{name}.conf"

[tool.setuptools]
packages = ["{name}", "{name}.conf"]

[tool.setuptools.package-data]
"{name}.conf" = ["**/*.yaml"]
"""


def write(place: Path, name: str, files: dict[str, str]) -> Path:
    """Write the files of a package, by their paths in it, and its pyproject.toml; return the place."""
    paths = {f"{name}/{path}": text for path, text in files.items()} | {f"{name}/conf/__init__.py": ""}
    for path, text in (paths | {"pyproject.toml": _PROJECT.format(name=name)}).items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text)
    return place


def install(place: Path, target: Path) -> Path:
    """Install a package by pip into a folder, and return the folder."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target
