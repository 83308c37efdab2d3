"""Checkpoints of a run, at the ends of tasks and inside them: all state in one file, written whole or not at all.

To resume inside a task, the checkpoint of the end of the previous task is loaded first, the strategies' `before_task`
is called again, and the checkpoint inside the task is loaded on top. So attributes that `before_task` sets outside of
buffers, such as a copy of the network, are restored too.
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

_DIGITS = 64  # length of a SHA-256 in hexadecimal
_INSIDE = 2  # how many checkpoints inside a task are retained
State = dict[str, Any]


def save(
    learner: Learner,
    folder: Path,
    keep: int | None = None,
    instruments: Instruments | None = None,
    beside: State | None = None,
) -> Path:
    """Write `after_task_<k>.ckpt` for the k tasks learned, and remove the checkpoints inside task k.

    Args:
        learner: Its state dict holds the memories, generators, anchors and R as well as the weights.
        folder: The directory of the checkpoints, created if it does not exist.
        keep: How many checkpoints of ends of tasks to retain, the newest ones; None retains all.
        instruments: Their state is stored in the same file.
        beside: Further entries of the file: the configuration, and what the reports' `flush` returned.

    Returns:
        The path of the file.

    Raises:
        InputError: If the state holds an object that could not be loaded with `weights_only=True`.
    """
    path = folder / rundir.checkpoint_after(learner.tasks_learned)
    _write(path, {"state_dict": learner.state_dict(), **_measured(instruments), **(beside or {})})
    if rank() == 0:
        tidy(folder, learner.tasks_learned, keep)
    return path


def tidy(folder: Path, tasks_learned: int, keep: int | None, inside: Path | None = None) -> None:
    """Remove the checkpoints that a newer one supersedes.

    It runs after each checkpoint of the end of a task, and on resume, because a kill may have prevented it. Files with
    a higher number than the one resumed from are damaged; they stay and are not counted.

    Args:
        folder: The directory of the checkpoints.
        tasks_learned: The number of tasks in the newest intact checkpoint of the end of a task.
        keep: How many checkpoints of ends of tasks to retain; None retains all.
        inside: The newest intact checkpoint inside the next task, if any. It and the one before it are retained.
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
    """Write `in_task_<k>_step_<s>.ckpt` after s steps of the k-th task, and retain the two newest of these.

    Args:
        learner: As in `save`.
        folder: The directory of the checkpoints, which holds the one of the end of the previous task.
        inside: State of the training of this task that no state dict holds; see `cl.engine.preemption`.
        instruments: Their state is stored in the same file.
        beside: As in `save`.

    Returns:
        The path of the file.
    """
    present = learner.tasks_learned + 1, learner.step
    path = folder / rundir.checkpoint_inside(*present)
    _write(path, {"state_dict": learner.state_dict(), **_measured(instruments), **(beside or {}), "inside": inside})
    # Files of later steps are damaged, or belong to a task that is learned again: they are not counted.
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
        except RuntimeError as error:  # torch raises this on a full disk
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
    """Return checkpoints, newest first, by the count of numbers in their names: 1 at ends of tasks, 2 inside tasks."""
    files = [path for path in folder.glob("*") if len(_numbers(path)) == numbers]
    return sorted(files, key=_numbers, reverse=True)


def latest(folder: Path) -> Path | None:
    """Return the newest intact checkpoint of the end of a task, or None; warn of newer ones that are damaged.

    Each file carries its own SHA-256, so that a single changed bit is detected.
    """
    return next(_intact(_newest_first(folder, 1)), None)


def inside(folder: Path, tasks_learned: int) -> Path | None:
    """Return the newest intact checkpoint inside the next task, or None; warn of newer ones that are damaged."""
    files = _newest_first(folder, 2)
    return next(_intact([file for file in files if _numbers(file)[0] == tasks_learned + 1]), None)


def steps(path: Path | None) -> int:
    """Return how many steps of its task a checkpoint inside a task comes after; 0 if there is no checkpoint.

    Example:
        >>> steps(Path("in_task_002_step_00000450.ckpt")), steps(None)
        (450, 0)
    """
    return 0 if path is None else _numbers(path)[1]


def _intact(files: list[Path]) -> Iterator[Path]:
    for path in files:
        if is_whole(path):
            yield path
        else:
            warnings.warn(f"{path} is torn or changed, and is left aside: the one before it is used.", stacklevel=3)


def _seal(path: Path, name: str) -> None:
    """Append a digest as the comment of the zip archive that `torch.save` wrote, which readers of archives skip.

    The digest covers the name that the file will have, so that a renamed checkpoint is detected too.
    """
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)  # the last field of the archive is the length of its comment, 0 so far
        file.write(_DIGITS.to_bytes(2, "little"))
    digest = digest_of(path, name=name)
    with path.open("ab") as file:
        file.write(digest.encode())


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint exists, under the name it was written with, and no byte of it has changed."""
    size = path.stat().st_size - _DIGITS if path.is_file() else -1
    if size < 0:
        return False
    with path.open("rb") as file:
        file.seek(size)
        stored = file.read()
    return stored == digest_of(path, size, path.name).encode()


def load(learner: Learner, path: Path, instruments: Instruments | None = None, config: str = "") -> State:
    """Load a checkpoint strictly, with `weights_only=True`, into a learner built from the same configuration.

    Args:
        learner: Receives the state dict.
        path: The file.
        instruments: Receive their state; None leaves it in the file.
        config: The configuration, as `config_text` returns it, that the checkpoint must have been written under; empty
            accepts any.

    Returns:
        The `inside` of `save_inside`; empty for a checkpoint of the end of a task.

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
    """Return a configuration in the form that a checkpoint stores: JSON by dotted key, the run's directory as "."."""
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
    """Return one note if settings of kind `rounding` differ from those that a checkpoint was written under.

    Args:
        path: The checkpoint.
        config: The present configuration, as `config_text` returns it.
    """
    there = read(path, mmap=True).get("config")
    if not (isinstance(there, str) and there and config):
        return []
    found = changes(json.loads(there), json.loads(config), ["rounding"])
    return [f"The run went on under other settings that change its results by rounding ({found})."] * bool(found)


def report_positions(path: Path) -> dict[str, Any]:
    """Return what each report's `flush` returned before the checkpoint was written, by file name.

    A report cuts its file to this state on resume. The tensors of the checkpoint are not read.
    """
    found = read(path, mmap=True).get("reports")
    return dict(found) if isinstance(found, dict) else {}


def fill(module: nn.Module, state: State, path: Path) -> None:
    """Load a state dict strictly into a module.

    Raises:
        InputError: If it does not fit; the message names the path.
    """
    try:
        module.load_state_dict(state, strict=True)
    except Exception as error:  # set_extra_state of a strategy or an instrument may raise anything
        raise _misfit(path, error) from error


def read(path: Path, mmap: bool = False) -> State:
    """Return the content of a checkpoint, as plain data on the CPU; no code from the file is executed.

    Args:
        path: The file.
        mmap: Whether to map the file into memory, so that a tensor is read only when it is used.

    Raises:
        InputError: If the file is no checkpoint, or could be loaded only by executing code from it.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a file of unknown origin may fail in many ways
        raise _misfit(path, error) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise _misfit(path, ValueError("it holds no state_dict"))
    return content


def _misfit(path: Path, error: Exception) -> InputError:
    return InputError(
        f"Checkpoint {path} does not fit this configuration ({_sentence(error)}): use the one it was written with."
    )


def _sentence(error: Exception) -> str:
    """Return the message of an error without torch's advice to load the file with weights_only=False."""
    return " ".join(str(error).rpartition("WeightsUnpickler error:")[2].partition("Please use")[0].split())[:300]
