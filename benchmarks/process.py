"""Measurements in processes of their own, taken in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

Case = TypeVar("Case")
ROOT = Path(__file__).resolve().parent.parent


def measure(arguments: list[str], threads: int) -> dict[str, Any]:
    """Run `python -m ARGUMENTS` in a process of its own with pinned threads, and return what it hands over."""
    reader, writer = os.pipe()
    pinned = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **pinned, "RESULT_FD": str(writer), "WANDB_MODE": "disabled"},
        pass_fds=[writer],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    if done.returncode or not text:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(text)
    return result


def hand_over(result: dict[str, Any]) -> None:
    """Give a result to the process that measures this one."""
    os.write(int(os.environ["RESULT_FD"]), json.dumps(result).encode())


def matches(name: str, patterns: str) -> bool:
    """Say whether a name fits one of several patterns with commas between them.

    Example:
        >>> matches("er_ace", "gpm,er*"), matches("der", "gpm,er*")
        (True, False)
    """
    return any(fnmatch(name, pattern) for pattern in patterns.split(","))


def take_turns(
    name: str, cases: Iterable[Case], command: Callable[[Case, int], list[str]], args: Namespace, console: Console
) -> dict[Case, list[dict[str, Any]]]:
    """Measure every case once a turn, so that a change of the machine's speed meets all alike."""
    runs: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for turn in range(args.repeat):
        for case, results in runs.items():
            console.print(f"{name}: turn {turn + 1} of {args.repeat}, {case}", style="dim", markup=False)
            results.append(measure(command(case, turn), args.threads))
    return runs
