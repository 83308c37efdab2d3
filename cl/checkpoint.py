"""Checkpoints of a run: everything in one state dict, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from cl.distributed import pack, rank, unpack
from cl.errors import InputError
from cl.files import replace_file
from cl.instruments import Instruments
from cl.learner import Learner

_DIGITS = 64  # of a SHA-256 in hexadecimal


def save(learner: Learner, folder: Path, keep: int | None = None, instruments: Instruments | None = None) -> Path:
    """Write `after_task_<k>.ckpt` for the k tasks learned, whole or not at all.

    Args:
        learner: Its state dict holds the memories, generators, anchors and R as well as the weights.
        folder: Made where it does not exist.
        keep: The newest that stay; None keeps all.
        instruments: What they have measured stands beside it.
    """
    path = folder / f"after_task_{learner.tasks_learned:03d}.ckpt"
    content = {"state_dict": learner.state_dict()}
    if instruments is not None:
        content["instruments"] = instruments.state_dict()
    content = pack(content)
    if rank() > 0:
        return path

    def write(temporary: Path) -> None:
        torch.save(content, temporary)
        _seal(temporary)

    replace_file(path, write)
    if keep is not None:
        for old in sorted(folder.glob("after_task_*.ckpt"), key=_tasks)[:-keep]:
            old.unlink()
    return path


def _tasks(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def latest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a folder, or None; warn of newer ones that are not.

    Each carries its own SHA-256, so that a torn or a changed one is told, down to a bit.
    """
    for path in sorted(folder.glob("after_task_*.ckpt"), key=_tasks, reverse=True):
        if _whole(path):
            return path
        warnings.warn(f"{path} is torn or changed, and is left aside: the one before it is used.", stacklevel=2)
    return None


def _seal(path: Path) -> None:
    """Append a file's digest as the comment of the zip archive that `torch.save` wrote; readers of archives skip it."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment, until here none
        file.write(_DIGITS.to_bytes(2, "little"))
    digest = _digest(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(digest)


def _whole(path: Path) -> bool:
    size = path.stat().st_size - _DIGITS
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


def load(learner: Learner, path: Path, instruments: Instruments | None = None) -> None:
    """Load a checkpoint strictly, with `weights_only=True`, into a learner built from the same configuration.

    Raises:
        InputError: If the file is unreadable or belongs to another configuration.
    """
    try:
        content: dict[str, Any] = unpack(torch.load(path, map_location="cpu", weights_only=True))
        learner.load_state_dict(content["state_dict"], strict=True)
        if instruments is not None:
            instruments.load_state_dict(content["instruments"], strict=True)
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"Checkpoint {path} does not fit this configuration ({reason}): use the one it was made with."
        ) from error
