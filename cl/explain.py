"""What went wrong, in a sentence for the user instead of a traceback."""

from __future__ import annotations

import errno
import sys
from typing import Any

from cl.errors import DivergenceError, InputError, unknown

# No room, no right, no file where a folder should be, or the other way round. A file that is missing is not among them:
# it may be a mistake in somebody's code, which a traceback finds.
_DENIED = {
    *(errno.ENOSPC, getattr(errno, "EDQUOT", None), errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY),
}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by dotted key.

    Example:
        >>> flatten({"stream": {"num_tasks": 5}, "seed": 0})
        {'stream.num_tasks': 5, 'seed': 0}
    """
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, branch in tree.items() for k, v in flatten(branch, f"{prefix}.{key}".strip(".")).items()}


FREE = ("checkpoint", "launcher", "trainer.accelerator")  # may change when a run goes on: they move no result


def changes(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Return the first values in which two flattened configurations differ so that a run cannot go on; else nothing.

    Example:
        >>> changes({"seed": 0, "checkpoint.keep": 1}, {"seed": 3})
        'seed: 0 there, 3 here'
    """
    keys = {key for key in there.keys() | here.keys() if key.partition(".")[0] not in FREE and key not in FREE}
    pairs = [(key, there.get(key), here.get(key)) for key in sorted(keys)]
    found = [f"{key}: {a} there, {b} here" for key, a, b in pairs if a != b and not (a != a and b != b)]
    return "; ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


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
    return error if error is not None else denied(first) or _wrong_call(first)


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


def _wrong_call(error: BaseException | None) -> InputError | None:
    """Return a sentence on a `_target_` that is not there or takes other arguments, not on what failed inside it."""
    from hydra.errors import InstantiationException
    from omegaconf.errors import MissingMandatoryValue

    if isinstance(error, MissingMandatoryValue):
        return InputError(f"{error.full_key} has no default: write {error.full_key}=... on the command line.")
    if not isinstance(error, InstantiationException):
        return None
    inner = error.__cause__ or error.__context__
    place = inner.__traceback__ if inner is not None else None
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    key = str(error).partition("full_key: ")[2] or "the configuration"
    if place is None or "hydra" not in place.tb_frame.f_code.co_filename:
        return None
    return InputError(f"{key} cannot be made ({' '.join(str(inner).split())}): correct its _target_ or its arguments.")


def missing(error: Any) -> str:
    """Name the nearest options where a group has none of that name."""
    import re
    from importlib.resources import files

    found = re.search(r"Could not (?:find|load) '([^']+)'", str(error))
    group, _, name = (found.group(1) if found else str(error.missing_cfg_file or "")).rpartition("/")
    if (group, name) == ("hydra/sweeper", "optuna"):
        return "hydra/sweeper=tune searches with Optuna, which is not installed: pip install 'clsim[tune]'."
    folder = files("cl.conf").joinpath(group)
    own = [entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml")] if folder.is_dir() else []
    options = {*own, *(error.options or ())}
    return str(unknown(group, name, options)) if group and options else " ".join(str(error).split())


def readable(error: Exception) -> str:
    """Name the nearest keys where an override names a key that does not exist."""
    import difflib
    import re

    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    text = str(error)
    match = re.search(r"Could not (?:override|append to config) '?([\w.@]+)'?|override '([\w.@/]+)'", text)
    if match is None:
        return " ".join(text.split())
    key = match.group(1) or match.group(2)
    GlobalHydra.instance().clear()
    with initialize_config_module("cl.conf", version_base="1.3"):
        groups = [a.split("=")[0] + "=" + a.split("=")[1] for a in sys.argv[1:] if a.count("=") == 1 and "." not in a]
        try:
            known = list(_flatten_keys(compose("config", overrides=[g for g in groups if not g.startswith(key)])))
        except Exception:
            known = list(_flatten_keys(compose("config")))
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    if key in known:  # in a sweep, of another job
        return f"There is no key {key!r} with this choice of groups, as there is with others: leave it out here."
    hint = f"did you mean {' or '.join(near)}?" if near else "see cl-run --help for the keys."
    return f"There is no key {key!r} in the configuration: {hint} (To add a new one, write +{key}=...)"


def _flatten_keys(cfg: Any) -> list[str]:
    from omegaconf import OmegaConf

    return list(flatten(OmegaConf.to_container(cfg, resolve=False)))
