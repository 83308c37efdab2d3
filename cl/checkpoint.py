"""Checkpoints of a run, at the ends of tasks and inside them: all state in one file, written whole or not at all.

A checkpoint inside a task is loaded on top of the one of the task's beginning, from which the strategies' `before_task`
is called again: what they keep outside their buffers comes back by itself.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cl.errors import InputError
from cl.files import replace_file
from cl.instruments import Instruments
from cl.learner import Learner

_DIGITS = 64  # of a SHA-256 in hexadecimal
_INSIDE = 2  # checkpoints inside a task that stay
State = dict[str, Any]


def save(learner: Learner, folder: Path, keep: int | None = None, instruments: Instruments | None = None) -> Path:
    """Write `after_task_<k>.ckpt` for the k tasks learned, and let those inside task k go.

    Args:
        learner: Its state dict holds the memories, generators, anchors and R as well as the weights.
        folder: Made where it does not exist.
        keep: The newest that stay; None keeps all.
        instruments: What they have measured stands beside it.

    Raises:
        InputError: If something keeps what could not be loaded safely again.
    """
    path = folder / f"after_task_{learner.tasks_learned:03d}.ckpt"
    _write(path, {"state_dict": learner.state_dict(), **_measured(instruments)})
    if keep is not None:
        _retain(folder, "after_task_*.ckpt", keep)
    for old in _newest_first(folder, "in_task_*.ckpt"):
        if _numbers(old)[0] <= learner.tasks_learned:
            old.unlink()
    return path


def save_inside(learner: Learner, folder: Path, inside: State, instruments: Instruments | None = None) -> Path:
    """Write `in_task_<k>_step_<s>.ckpt` for s steps into the k-th task; the two newest stay.

    Args:
        learner: As at the end of a task.
        folder: Which holds the checkpoint of the task's beginning.
        inside: What belongs to the training of this task alone; see `cl.pause`.
        instruments: What they have measured stands beside it.
    """
    path = folder / f"in_task_{learner.tasks_learned + 1:03d}_step_{learner.step:08d}.ckpt"
    _write(path, {"state_dict": learner.state_dict(), **_measured(instruments), "inside": inside})
    _retain(folder, "in_task_*.ckpt", _INSIDE)
    return path


def _measured(instruments: Instruments | None) -> State:
    return {} if instruments is None else {"instruments": instruments.state_dict()}


def _write(path: Path, content: State) -> None:
    def write(temporary: Path) -> None:
        torch.save(content, temporary)
        try:
            torch.load(temporary, mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"The state of this run cannot be kept as plain data ({_sentence(error)}): keep tensors, numbers, "
                "strings, and lists and dicts of them."
            ) from error
        _seal(temporary)

    replace_file(path, write)


def _retain(folder: Path, pattern: str, keep: int) -> None:
    for old in _newest_first(folder, pattern)[keep:]:
        old.unlink()


def _numbers(path: Path) -> tuple[int, ...]:
    """Return the tasks, and steps, in the name of a checkpoint."""
    return tuple(int(part) for part in path.stem.split("_") if part.isdecimal())


def _newest_first(folder: Path, pattern: str) -> list[Path]:
    return sorted((path for path in folder.glob(pattern) if _numbers(path)), key=_numbers, reverse=True)


def latest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of the end of a task, or None; warn of newer ones that are not whole.

    Each carries its own SHA-256, so that a torn or a changed one is told, down to a bit.
    """
    return next(_whole_ones(_newest_first(folder, "after_task_*.ckpt")), None)


def inside(folder: Path, tasks_learned: int) -> Path | None:
    """Return the newest whole checkpoint inside the task that follows, or None; warn of newer ones not whole."""
    files = _newest_first(folder, "in_task_*.ckpt")
    return next(_whole_ones([file for file in files if _numbers(file)[0] == tasks_learned + 1]), None)


def steps(path: Path | None) -> int:
    """Return how many steps into its task a checkpoint is, 0 for none.

    Example:
        >>> steps(Path("in_task_002_step_00000450.ckpt")), steps(None)
        (450, 0)
    """
    return 0 if path is None else _numbers(path)[1]


def _whole_ones(files: list[Path]) -> Iterator[Path]:
    for path in files:
        if is_whole(path):
            yield path
        else:
            warnings.warn(f"{path} is torn or changed, and is left aside: the one before it is used.", stacklevel=3)


def _seal(path: Path) -> None:
    """Append a file's digest as the comment of the zip archive that `torch.save` wrote; readers of archives skip it."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment, until here none
        file.write(_DIGITS.to_bytes(2, "little"))
    digest = _digest(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(digest)


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint is there as it was written."""
    size = path.stat().st_size - _DIGITS if path.is_file() else -1
    if size < 0:
        return False
    with path.open("rb") as file:
        file.seek(size)
        kept = file.read()
    return kept == _digest(path, size)


def _digest(path: Path, size: int) -> bytes:
    """Return the SHA-256 of the first `size` bytes of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0:
            part = file.read(min(size, 1 << 20))
            digest.update(part)
            size -= len(part)
    return digest.hexdigest().encode()


def load(learner: Learner, path: Path, instruments: Instruments | None = None) -> State:
    """Load a checkpoint strictly, with `weights_only=True`, into a learner built from the same configuration.

    Returns:
        What belongs to the training of the present task; empty at the end of one.

    Raises:
        InputError: If the file is unreadable or belongs to another configuration.
    """
    content = read(path)
    fill(learner, content["state_dict"], path)
    if instruments is not None:
        fill(instruments, content["instruments"], path)
    found: State = content.get("inside", {})
    return found


def fill(module: nn.Module, state: State, path: Path) -> None:
    """Load a state dict strictly.

    Raises:
        InputError: If it does not fit; the path is named.
    """
    try:
        module.load_state_dict(state, strict=True)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise _misfit(path, error) from error


def read(path: Path) -> State:
    """Return what a checkpoint holds, as plain data on the CPU: nothing in it is ever executed.

    Raises:
        InputError: If it is no checkpoint, or would have to be executed.
    """
    try:
        content: State = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, OSError, ValueError) as error:
        raise _misfit(path, error) from error
    return content


def _misfit(path: Path, error: Exception) -> InputError:
    return InputError(
        f"Checkpoint {path} does not fit this configuration ({_sentence(error)}): use the one it was made with."
    )


def _sentence(error: Exception) -> str:
    """Return what went wrong without torch's advice on how to load what should not be loaded."""
    return " ".join(str(error).rpartition("WeightsUnpickler error:")[2].partition("Please use")[0].split())[:300]
