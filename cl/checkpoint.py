"""Checkpoints of a run: everything in one state dict, written whole or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from cl.errors import InputError
from cl.files import replace_file
from cl.instruments import Instruments
from cl.learner import Learner


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
    replace_file(path, lambda temporary: torch.save(content, temporary))
    if keep is not None:
        for old in sorted(folder.glob("after_task_*.ckpt"), key=_tasks)[:-keep]:
            old.unlink()
    return path


def _tasks(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a folder, or None."""
    return max(folder.glob("after_task_*.ckpt"), default=None, key=_tasks)


def load(learner: Learner, path: Path, instruments: Instruments | None = None) -> None:
    """Load a checkpoint strictly, with `weights_only=True`, into a learner built from the same configuration.

    Raises:
        InputError: If the file is unreadable or belongs to another configuration.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        learner.load_state_dict(content["state_dict"], strict=True)
        if instruments is not None:
            instruments.load_state_dict(content["instruments"], strict=True)
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"Checkpoint {path} does not fit this configuration ({reason}): use the one it was made with."
        ) from error
