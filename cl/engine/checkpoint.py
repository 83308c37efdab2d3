"""Checkpoints of a run, at the ends of tasks and inside them: all state in one file, written whole or not at all.

A checkpoint inside a task is loaded on top of the one of the task's beginning, from which the strategies' `before_task`
is called again: what they keep outside their buffers comes back by itself.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cl import rundir
from cl.distributed import pack, rank, unpack
from cl.engine.instrument import Instruments
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.files import digest_of, relative, replace_file
from cl.settings import changes, flatten

_DIGITS = 64  # of a SHA-256 in hexadecimal
_INSIDE = 2  # checkpoints inside a task that stay
State = dict[str, Any]


def save(
    learner: Learner,
    folder: Path,
    keep: int | None = None,
    instruments: Instruments | None = None,
    beside: State | None = None,
) -> Path:
    """Write `after_task_<k>.ckpt` for the k tasks learned, and let those inside task k go.

    Args:
        learner: Its state dict holds the memories, generators, anchors and R as well as the weights.
        folder: Made where it does not exist.
        keep: The newest that stay; None keeps all.
        instruments: What they have measured stands beside it.
        beside: What else stands there: the configuration, and how far files of reports are whole.

    Raises:
        InputError: If something keeps what could not be loaded safely again.
    """
    path = folder / rundir.checkpoint_after(learner.tasks_learned)
    _write(path, {"state_dict": learner.state_dict(), **_measured(instruments), **(beside or {})})
    if rank() == 0:
        tidy(folder, learner.tasks_learned, keep)
    return path


def tidy(folder: Path, tasks_learned: int, keep: int | None, inside: Path | None = None) -> None:
    """Remove what a checkpoint makes needless, at once or where a kill came between.

    What has a higher number was not whole when this run went on, and does not count.

    Args:
        folder: Of the checkpoints.
        tasks_learned: At the newest one of the end of a task.
        keep: How many of those stay.
        inside: The newest one inside the task that follows, which stays with the one before it.
    """
    ends = [old for old in _newest_first(folder, 1) if _numbers(old)[0] <= tasks_learned]
    within = _newest_first(folder, 2)
    done = [old for old in within if _numbers(old)[0] <= tasks_learned]
    before = [old for old in within if inside is not None and (tasks_learned + 1,) < _numbers(old) < _numbers(inside)]
    _remove([*(ends[keep:] if keep is not None else ()), *done, *before[_INSIDE - 1 :]])


def save_inside(
    learner: Learner,
    folder: Path,
    inside: State,
    instruments: Instruments | None = None,
    beside: State | None = None,
) -> Path:
    """Write `in_task_<k>_step_<s>.ckpt` for s steps into the k-th task; the two newest stay.

    Args:
        learner: As at the end of a task.
        folder: Which holds the checkpoint of the task's beginning.
        inside: What belongs to the training of this task alone; see `cl.engine.preemption`.
        instruments: What they have measured stands beside it.
        beside: As at the end of a task.
    """
    present = learner.tasks_learned + 1, learner.step
    path = folder / rundir.checkpoint_inside(*present)
    _write(path, {"state_dict": learner.state_dict(), **_measured(instruments), **(beside or {}), "inside": inside})
    # Those behind this step were not whole when this run went on, or belong to a task that is learned anew.
    if rank() == 0:
        _remove([old for old in _newest_first(folder, 2) if _numbers(old) <= present][_INSIDE:])
    return path


def _measured(instruments: Instruments | None) -> State:
    return {} if instruments is None else {"instruments": instruments.state_dict()}


def _write(path: Path, content: State) -> None:
    content = pack(content)
    if rank() > 0:
        return

    def write(temporary: Path) -> None:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        try:
            torch.load(temporary, mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"The state of this run cannot be kept as plain data ({_sentence(error)}): keep tensors, numbers, "
                "strings, and lists and dicts of them."
            ) from error
        _seal(temporary, path.name)

    replace_file(path, write)


def _remove(files: list[Path]) -> None:
    for old in files:
        if old.is_file():
            old.unlink()


def _numbers(path: Path) -> tuple[int, ...]:
    return rundir.numbers_in(path.name)


def _newest_first(folder: Path, numbers: int) -> list[Path]:
    """Return the checkpoints with so many numbers in their names: 1 at the ends of tasks, 2 inside."""
    files = [path for path in folder.glob("*") if len(_numbers(path)) == numbers]
    return sorted(files, key=_numbers, reverse=True)


def latest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of the end of a task, or None; warn of newer ones that are not whole.

    Each carries its own SHA-256, so that a torn or a changed one is told, down to a bit.
    """
    return next(_whole_ones(_newest_first(folder, 1)), None)


def inside(folder: Path, tasks_learned: int) -> Path | None:
    """Return the newest whole checkpoint inside the task that follows, or None; warn of newer ones not whole."""
    files = _newest_first(folder, 2)
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


def _seal(path: Path, name: str) -> None:
    """Append a digest as the comment of the zip archive that `torch.save` wrote; readers of archives skip it.

    It covers the name that the file will have, so that one cannot stand in the place of another.
    """
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment, until here none
        file.write(_DIGITS.to_bytes(2, "little"))
    digest = digest_of(path, name=name)
    with path.open("ab") as file:
        file.write(digest.encode())


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint is there as it was written, under its own name."""
    size = path.stat().st_size - _DIGITS if path.is_file() else -1
    if size < 0:
        return False
    with path.open("rb") as file:
        file.seek(size)
        kept = file.read()
    return kept == digest_of(path, size, path.name).encode()


def load(learner: Learner, path: Path, instruments: Instruments | None = None, config: str = "") -> State:
    """Load a checkpoint strictly, with `weights_only=True`, into a learner built from the same configuration.

    Args:
        learner: Takes the state dict.
        path: The file.
        instruments: Take what was measured.
        config: The configuration, as `config_text` has it, with which it must have been made; empty for any.

    Returns:
        What belongs to the training of the present task; empty at the end of one.

    Raises:
        InputError: If the file is unreadable or belongs to another configuration.
    """
    content = unpack(read(path))
    _compare(content.get("config"), config, path)
    fill(learner, content["state_dict"], path)
    if instruments is not None:
        fill(instruments, content.get("instruments", {}), path)
    found: State = content.get("inside", {})
    return found


def config_text(config: dict[str, Any], directory: Path) -> str:
    """Return a configuration as a checkpoint keeps it: JSON of dotted keys, the run's directory as "."."""
    if not config:
        return ""
    return json.dumps(flatten(relative(config, directory)), sort_keys=True, default=str)


def _compare(there: Any, here: str, path: Path) -> None:
    if isinstance(there, str) and there and here and there != here:
        try:
            found = changes(json.loads(there), json.loads(here))
        except (ValueError, AttributeError) as error:
            raise _misfit(path, error) from error
        if found:
            raise InputError(f"{path} was written by another configuration ({found}): repeat that, or remove the file.")


def rounding(path: Path, config: str) -> list[str]:
    """Return a sentence where the settings that a checkpoint was written under move results by rounding alone."""
    there = read(path, mmap=True).get("config")
    if not (isinstance(there, str) and there and config):
        return []
    found = changes(json.loads(there), json.loads(config), ["rounding"])
    return [f"The run went on under other settings that change its results by rounding ({found})."] * bool(found)


def report_positions(path: Path) -> dict[str, Any]:
    """Return how far the files of reports are whole that a checkpoint rests on, by name; no tensor is read."""
    found = read(path, mmap=True).get("reports")
    return dict(found) if isinstance(found, dict) else {}


def fill(module: nn.Module, state: State, path: Path) -> None:
    """Load a state dict strictly.

    Raises:
        InputError: If it does not fit; the path is named.
    """
    try:
        module.load_state_dict(state, strict=True)
    except Exception as error:  # of torch, or of what takes an extra state of its own
        raise _misfit(path, error) from error


def read(path: Path, mmap: bool = False) -> State:
    """Return what a checkpoint holds, as plain data on the CPU: nothing in it is ever executed.

    Args:
        path: The file.
        mmap: Whether to leave the tensors in it until somebody reads them.

    Raises:
        InputError: If it is no checkpoint, or would have to be executed.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a stranger's file has many ways to be none
        raise _misfit(path, error) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise _misfit(path, ValueError("it holds no state_dict"))
    return content


def _misfit(path: Path, error: Exception) -> InputError:
    return InputError(
        f"Checkpoint {path} does not fit this configuration ({_sentence(error)}): use the one it was made with."
    )


def _sentence(error: Exception) -> str:
    """Return what went wrong without torch's advice on how to load what should not be loaded."""
    return " ".join(str(error).rpartition("WeightsUnpickler error:")[2].partition("Please use")[0].split())[:300]
