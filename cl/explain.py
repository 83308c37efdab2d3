"""What went wrong, in a sentence for the user instead of a traceback."""

from __future__ import annotations

import errno
import re
import sys
from typing import Any

from cl.errors import DivergenceError, InputError, unknown
from cl.settings import flatten, nearest

# Plugins of Hydra that are installed with an extra.
_EXTRAS = {
    "hydra/sweeper/optuna": ("hydra/sweeper=tune searches with Optuna", "tune"),
    "hydra/launcher/joblib": ("launcher=joblib starts processes with joblib", "joblib"),
    "hydra/launcher/submitit_slurm": ("launcher=submitit_slurm queues jobs with submitit", "slurm"),
    "hydra/launcher/submitit_local": ("launcher=submitit_local starts processes with submitit", "slurm"),
    "hydra/launcher/ray": ("launcher=ray runs jobs on Ray", "ray"),
}

# No room, no right, no file where a folder should be, or the other way round. A file that is missing is not among them:
# it may be a mistake in somebody's code, which a traceback finds.
_DENIED = {
    *(errno.ENOSPC, getattr(errno, "EDQUOT", None), errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY),
}


def cause(error: BaseException | None) -> BaseException | None:
    """Return the error in a chain of causes that is meant for the user, or None where there is none.

    Example:
        >>> error = RuntimeError("Error in call to target")
        >>> error.__cause__ = InputError("batch_size=0 must be 1 or more.")
        >>> print(cause(error))
        batch_size=0 must be 1 or more.
    """
    first = error
    while error is not None and not isinstance(error, InputError | DivergenceError):
        error = error.__cause__ or error.__context__
    if error is not None:
        return error
    return _exhausted(first) or denied(first) or _one_row(first) or _unwatched(first) or _wrong_call(first)


_GO_ON = "The checkpoint of the last finished task is kept: run again with the same hydra.run.dir to go on from it"
_TOO_MUCH = ("not enough memory", "can't allocate memory", "Cannot allocate memory", "alloc_cpu.cpp", "overflow")


def _unwatched(error: BaseException | None) -> InputError | None:
    """Return a sentence where Lightning's EarlyStopping watches what nothing measures."""
    found = re.match(r"Early stopping conditioned on metric `(.*)` which is not available", str(error))
    if found is None:
        return None
    return InputError(
        f"EarlyStopping watches {found.group(1)}, which nothing measures: watch val/loss or val/accuracy, with a "
        "validation set (stream.val_fraction)."
    )


def _exhausted(error: BaseException | None) -> InputError | None:
    """Return a sentence where the disk or the memory is full, which nobody's code is to blame for."""
    import torch

    made = re.search(r"full_key: (\S+)", str(error))
    while error is not None:  # not through __context__: what fails while a full memory is handled is a bug
        text = str(error).strip()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for {error.filename}" if error.filename else ""
            return InputError(f"The disk has no room left{where} ({error.strerror}): free some. {_GO_ON}.")
        allocator = isinstance(error, RuntimeError) and any(words in text for words in _TOO_MUCH)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or allocator:
            reason = " ".join(text.split())[:200].rstrip(".") or "the system gives no more"
            if made is not None:
                return InputError(f"{made.group(1)} takes more memory than there is ({reason}): ask for less.")
            return InputError(f"Out of memory ({reason}): free some, or ask for less of it. {_GO_ON}.")
        error = error.__cause__
    return None


def denied(error: BaseException | None) -> InputError | None:
    """Return a sentence on a file that the system does not let be written or read, None for all other errors.

    Example:
        >>> print(denied(OSError(errno.ENOSPC, "No space left on device", "out/transfer.csv")))
        out/transfer.csv cannot be used (No space left on device): mend that, and go on from what was saved before.
    """
    while error is not None and not (isinstance(error, OSError) and error.errno in _DENIED):
        error = error.__cause__ or error.__context__
    if not isinstance(error, OSError):
        return None
    what = error.filename or "The disk"
    return InputError(f"{what} cannot be used ({error.strerror}): mend that, and go on from what was saved before.")


def _one_row(error: BaseException | None) -> InputError | None:
    """Return a sentence where batch norm was given one row in training, which has no variance."""
    if not (isinstance(error, ValueError) and "more than 1 value per channel" in str(error)):
        return None
    return InputError(
        "A single row came to batch norm, which needs two or more: of a minibatch (then choose another batch_size), or "
        "of a memory that holds or draws one (make it larger). Or use a backbone without batch norm."
    )


def _wrong_call(error: BaseException | None) -> InputError | None:
    """Return a sentence on a `_target_` that is not there or takes other arguments, not on what failed inside it."""
    from hydra.errors import InstantiationException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    if isinstance(error, MissingMandatoryValue):
        return InputError(f"{error.full_key} has no default: write {error.full_key}=... on the command line.")
    if isinstance(error, OmegaConfBaseException):
        reason = str(error.msg or error).strip().splitlines()[0].rstrip(".")
        return InputError(f"{error.full_key or 'The configuration'}: {reason}. Correct it on the command line.")
    if not isinstance(error, InstantiationException):
        return None
    inner = error.__cause__ or error.__context__ or error
    place = inner.__traceback__ if inner is not None else None
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    key = str(error).partition("full_key: ")[2] or "the configuration"
    if place is None or "hydra" not in place.tb_frame.f_code.co_filename:
        return None
    reason = " ".join(str(inner).partition("full_key: ")[0].split())
    return InputError(f"{key} cannot be built ({reason}): correct its _target_ or its arguments.")


def missing(error: Any) -> str:
    """Name the nearest options where a group has none of that name."""
    from importlib.resources import files

    found = re.search(r"Could not (?:find|load) '([^']+)'", str(error))
    group, _, name = (found.group(1) if found else str(error.missing_cfg_file or "")).rpartition("/")
    if f"{group}/{name}" in _EXTRAS:
        what, extra = _EXTRAS[f"{group}/{name}"]
        return f"{what}, which is not installed: pip install 'clsim[{extra}]'."
    if ".." in group.split("/"):
        return f"There is no {group}/{name}: groups and options are names, as cl-run --help lists them."
    folder = files("cl.conf").joinpath(group)
    own = [entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml")] if folder.is_dir() else []
    options = {*own, *(error.options or ())}
    return str(unknown(group, name, options - {"config"} or options)) if group and options else _one_line(str(error))


def before_run(error: BaseException) -> str | None:
    """Return a sentence for what Hydra could not compose or write before any run; None for what happened in one."""
    import hydra.core.utils as jobs
    from hydra._internal import config_loader_impl as loader

    frames, place = set(), error.__traceback__
    while place is not None:
        frames.add((place.tb_frame.f_globals.get("__name__"), place.tb_frame.f_code.co_name))
        place = place.tb_next
    modules = {module for module, _ in frames}
    if loader.__name__ in modules:
        hint = "a group takes names, as strategy=one or strategy=[one,other], and ~group leaves it out"
        return _one_line(f"The configuration cannot be composed ({error}): {hint}")
    if isinstance(error, OSError) and jobs.__name__ in modules and ("cl.app.cli", "run") not in frames:
        reason = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        return _one_line(f"The run has nowhere to write ({reason}): choose another hydra.run.dir")
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".") + "."


def readable(error: Exception) -> str:
    """Name the nearest keys where an override names a key that does not exist."""
    from importlib.resources import files

    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    text = str(error)
    merged = re.match(r"Error merging override (.+?)=(.*)", text, re.DOTALL)
    if merged is not None:
        key, value = merged.groups()
        return _one_line(f"{key}={value} cannot be written over what is there: {key} has keys of its own to write")
    match = re.search(r"Could not (?:override|append to config) '?([\w.@]+)'?|override '([\w.@/]+)'", text)
    if match is None:
        return _one_line(text)
    key = match.group(1) or match.group(2)
    GlobalHydra.instance().clear()
    with initialize_config_module("cl.conf", version_base="1.3"):
        groups = [a.split("=")[0] + "=" + a.split("=")[1] for a in sys.argv[1:] if a.count("=") == 1 and "." not in a]
        try:
            known = list(_flatten_keys(compose("config", overrides=[g for g in groups if not g.startswith(key)])))
        except Exception:
            known = list(_flatten_keys(compose("config")))
    own = files("cl.conf").joinpath(key)
    if "." not in key and own.is_dir():
        options = sorted(entry.name[:-5] for entry in own.iterdir() if entry.name.endswith(".yaml"))
        return f"{key} takes the name of an option, in a list where it takes several: {', '.join(options)}."
    near = nearest(key, [*known, *groups_there()])
    if key in known:  # in a sweep, of another job
        return f"There is no key {key!r} with this choice of groups, as there is with others: leave it out here."
    hint = f"did you mean {' or '.join(near)}?" if near else "see cl-run --help for the keys."
    group, _, rest = key.partition(".")
    option = rest.partition(".")[0]
    there = files("cl.conf").joinpath(group).joinpath(f"{option}.yaml").is_file()
    if there and not any(name.startswith(f"{group}.{option}.") for name in known):
        return f"There is no key {key!r} in the configuration, as {option} is not chosen: add {group}={option}."
    new = f" (To hand a new one on, write +{key}=...)" if group in ("trainer", "stream", "strategy", "dataset") else ""
    return f"There is no key {key!r} in the configuration: {hint}{new}"


def groups_there() -> list[str]:
    """Return the groups of the configuration."""
    from importlib.resources import files

    return sorted(entry.name for entry in files("cl.conf").iterdir() if entry.is_dir() and entry.name[0].isalpha())


def _flatten_keys(cfg: Any) -> list[str]:
    from omegaconf import OmegaConf

    return list(flatten(OmegaConf.to_container(cfg, resolve=False)))
