"""The manifest: the format of the run's files, and the versions, command, seed and hardware of each session.

A session is the part of a run that one start of the program does: a run that is resumed once has two.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from cl import rundir
from cl.errors import InputError
from cl.files import relative, write_text
from cl.report.run import Run

_PACKAGES = {
    "clsim": "clsim",
    "torch": "torch",
    "pytorch_lightning": "pytorch-lightning",
    "torchvision": "torchvision",
    "torchmetrics": "torchmetrics",
    "hydra": "hydra-core",
    "numpy": "numpy",
    "timm": "timm",
    "wandb": "wandb",
    "avalanche": "avalanche-lib",
}


def write_manifest(run: Run, after_task: int) -> None:
    """Write the manifest at the start of a session, with the earlier sessions of the run.

    Args:
        run: The run, whose directory is written to.
        after_task: After how many tasks this session resumes; -1 for a new run.
    """
    path = run.directory / rundir.MANIFEST
    content = manifest(run, after_task, _sessions(path) if after_task >= 0 else [])
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False))


def _sessions(path: Path) -> list[dict[str, Any]]:
    """Return the sessions in a manifest; none if it cannot be read."""
    try:
        return list(rundir.read_json(path)["sittings"])
    except (InputError, KeyError, TypeError):
        return []


def manifest(run: Run, after_task: int, earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of the manifest: format, versions, seed, digest of the configuration, and the sessions.

    Args:
        run: The run.
        after_task: After how many tasks this session resumes; -1 for a new run.
        earlier: The earlier sessions, each with its own versions and hardware.

    Example:
        >>> from pathlib import Path
        >>> found = manifest(Run(Path("."), {"seed": 3}, [], "class", {}), -1, [])
        >>> found["seed"], len(found["sittings"])
        (3, 1)
    """
    config = json.dumps(relative(run.config, run.directory), sort_keys=True, default=str)
    session = {
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "after_task": max(after_task, 0),
        "step": run.total_steps,
        "command": sys.argv,
        "versions": versions(),
        "hardware": hardware(),
    }
    return {
        "format": rundir.FORMAT,
        "versions": session["versions"],
        "seed": run.config.get("seed"),
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "sittings": [*earlier, session],
    }


def hardware() -> dict[str, Any]:
    """Return the machine: its name, processor, cores, threads in use, and graphics cards.

    Example:
        >>> hardware()["cores"] >= 1
        True
    """
    import torch

    found = {
        "host": platform.node(),
        "processor": torch.backends.cpu.get_cpu_capability() + " " + platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python, platform, packages (without importing them), CUDA, GPU and git commit, if known.

    Example:
        >>> {"python", "platform", "torch"} <= versions().keys()
        True
    """
    import torch

    found = {"python": platform.python_version(), "platform": platform.platform(), "clsim": metadata.version("clsim")}
    for name, distribution in _PACKAGES.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    commit = _git_commit()
    return {**found, "git_commit": commit} if commit else found


def _git_commit() -> str | None:
    """Return the commit of the working directory, "-dirty" appended where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
