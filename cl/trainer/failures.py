"""Translation of the exceptions of a run into one sentence for the user, shown instead of a traceback."""

from __future__ import annotations

import errno
import re

from cl.errors import DivergenceError, InputError

# Errors of the file system that are no bug: a full or failing disk, no permission, a file in place of a folder or the
# reverse. A missing file is not among them: it may be a bug in the user's code, which a traceback shows.
_DENIED = {
    *(errno.ENOSPC, getattr(errno, "EDQUOT", None), errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY),
}


def cause(error: BaseException | None) -> BaseException | None:
    """Return the error in a chain of causes whose message is meant for the user, or None if the chain has none.

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
    """Return an InputError if Lightning's EarlyStopping watches a metric that nothing measures."""
    found = re.match(r"Early stopping conditioned on metric `(.*)` which is not available", str(error))
    if found is None:
        return None
    return InputError(
        f"EarlyStopping watches {found.group(1)}, which nothing measures: watch val/loss or val/accuracy, with a "
        "validation set (stream.val_fraction)."
    )


def _exhausted(error: BaseException | None) -> InputError | None:
    """Return an InputError if the disk or the memory is full."""
    import torch

    built = re.search(r"full_key: (\S+)", str(error))
    while error is not None:  # not through __context__: an error while a full memory is handled is a bug
        text = str(error).strip()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for {error.filename}" if error.filename else ""
            return InputError(f"The disk has no room left{where} ({error.strerror}): free some. {_GO_ON}.")
        allocator = isinstance(error, RuntimeError) and any(words in text for words in _TOO_MUCH)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or allocator:
            reason = " ".join(text.split())[:200].rstrip(".") or "the system gives no more"
            if built is not None:
                return InputError(f"{built.group(1)} takes more memory than there is ({reason}): ask for less.")
            return InputError(f"Out of memory ({reason}): free some, or ask for less of it. {_GO_ON}.")
        error = error.__cause__
    return None


def denied(error: BaseException | None) -> InputError | None:
    """Return an InputError if the system refused to read or write a file; None for all other errors.

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
    """Return an InputError if batch norm received one example in training, which has no variance."""
    if not (isinstance(error, ValueError) and "more than 1 value per channel" in str(error)):
        return None
    return InputError(
        "Batch norm received a single row and needs two or more: choose another batch_size if a minibatch has one, "
        "enlarge a memory that holds or draws one, or use a backbone without batch norm."
    )


def _wrong_call(error: BaseException | None) -> InputError | None:
    """Return an InputError if a `_target_` does not exist or takes other arguments; None if it failed inside."""
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
    frame = inner.__traceback__ if inner is not None else None
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    key = str(error).partition("full_key: ")[2] or "the configuration"
    if frame is None or "hydra" not in frame.tb_frame.f_code.co_filename:
        return None
    reason = " ".join(str(inner).partition("full_key: ")[0].split())
    return InputError(f"{key} cannot be built ({reason}): correct its _target_ or its arguments.")
