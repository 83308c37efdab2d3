"""Files that are written whole or not at all, and digests that detect a change."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cl.errors import InputError
from cl.rundir import LOCK


def expand_path(path: str | Path) -> Path:
    """Return a path in which a leading ~ is replaced by the user's home directory, as in a shell.

    Example:
        >>> expand_path("~/data") == Path.home() / "data", expand_path("data/~")
        (True, PosixPath('data/~'))
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~name of an unknown user
        return Path(path)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path beside `path`, then rename: a reader sees the old file or the whole new one.

    The file is synced to the disk before the rename, and the folder after it, so that this holds in a power failure.

    Args:
        path: The file; its folder is created if it does not exist.
        write: Writes the content to the path that it is given.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> replace_file(path, lambda temporary: temporary.write_text("whole"))
        >>> path.read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _named(path):
        try:
            temporary.unlink(missing_ok=True)  # writing to a link would change the file that it points to
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
            if os.name != "nt":  # Windows cannot open a folder
                sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Append to a text file."""
    with _named(path), path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the name of the file to an OSError raised in this context: that of a full disk has none."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
            raise gone(path.parent) from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def gone(folder: Path) -> InputError:
    """Return the error for a run's folder that was renamed or removed during the run."""
    return InputError(
        f"{folder} is not there any more: it was renamed or removed while the run went on. Name its new path "
        "(hydra.run.dir), and the run goes on from its last checkpoint."
    )


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files that a killed process left behind in `replace_file`.

    Args:
        folder: A folder that no other process writes to.
        name: The file whose temporary files are removed; None means those of all files.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / ".a.txt.4711.tmp").write_text("tor")
        >>> remove_leftovers(folder)
        >>> list(folder.iterdir())
        []
    """
    for path in folder.glob(".*.tmp"):
        found = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
        if found is not None and name in (None, found.group(1)) and path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a run's folder in this context against other processes; the lock of a killed process is released.

    Raises:
        InputError: If another process holds the lock.

    Example:
        >>> import tempfile
        >>> with alone(Path(tempfile.mkdtemp())):
        ...     pass
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"Another process runs in {folder}: wait until it ends, or choose another directory (hydra.run.dir)."
        ) from error
    except NotImplementedError:  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file by write-then-rename."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a dict as JSON with its SHA-256, so that `read_sealed` detects a change of the content or the file's name.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.json"
        >>> write_sealed(path, {"value": 0.5})
        >>> read_sealed(path)
        {'value': 0.5}
        >>> _ = path.write_text(path.read_text().replace("0.5", "0.6"))
        >>> read_sealed(path) is None
        True
    """
    write_text(path, json.dumps({"content": content, "sha256": _digest(path.name, content)}, indent=2, allow_nan=False))


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return what `write_sealed` wrote, or None if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        content: dict[str, Any] = found["content"]
        return content if found["sha256"] == _digest(path.name, content) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(name: str, content: Any) -> str:
    return hashlib.sha256(json.dumps([name, content], sort_keys=True).encode()).hexdigest()


def relative(tree: Any, directory: Path) -> Any:
    """Return nested dicts and lists with paths inside a directory written from ".", so that the directory can be moved.

    Example:
        >>> relative({"a": "/runs/x/refs", "b": ["/runs/x_refs", "/runs/x"]}, Path("/runs/x"))
        {'a': './refs', 'b': ['/runs/x_refs', '.']}
    """
    if isinstance(tree, dict):
        return {key: relative(value, directory) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [relative(value, directory) for value in tree]
    whole = str(directory)
    if isinstance(tree, str) and (tree == whole or tree.startswith((f"{whole}/", f"{whole}{os.sep}"))):
        return f".{tree[len(whole) :]}"
    return tree


def digest_of(path: Path, size: int | None = None, name: str = "") -> str:
    """Return the SHA-256 of a name and the first bytes of a file in hexadecimal; "" if there is no file.

    Args:
        path: The file.
        size: How many bytes; None means all.
        name: A name that the digest covers too, so that a renamed file is detected.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a"
        >>> _ = path.write_bytes(b"bcd")
        >>> digest_of(path, 2, "a") == hashlib.sha256(b"abc").hexdigest()
        True
    """
    if not path.is_file():
        return ""
    digest, left = hashlib.sha256(name.encode()), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while part := file.read(min(left, 1 << 20)):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()
