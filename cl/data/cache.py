"""A cache of decoded files: memory-mapped arrays, named by a digest of the files and verified before they are used."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cl.data.dataset import Array, channel_moments
from cl.errors import InputError
from cl.files import expand_path, read_sealed, sync, write_sealed

Allocate = Callable[[str, tuple[int, ...]], npt.NDArray[np.uint8]]
Build = Callable[[Allocate], Mapping[str, Array]]

FORMAT = 2  # increase it when the meaning of a cached array changes
_log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_CHUNK = 2**24  # bytes that a thread digests at a time
_RESOLUTION = 2.0  # seconds: the coarsest resolution of a file system's times of change
_verified: set[object] = set()  # arrays whose digest was found right in this process


def decoded(
    key: str,
    files: Sequence[Path],
    root: Path,
    settings: object,
    build: Build,
    cache: bool,
    cache_dir: str | Path | None,
) -> dict[str, Array]:
    """Return the arrays of `build` and the mean and std of the training images, from the cache where they are stored.

    A cache entry is named by a digest of the files' content. The files are read whole to compute it, unless the cache
    holds a note of the digest of the same files. They are the same if device, inode, size and the times of
    modification and of change are equal; a program can set the first of these times, but not the second.

    Args:
        key: Kind of dataset, which begins the entry's name.
        files: The files that the arrays are decoded from.
        root: The directory that the files are in.
        settings: Whatever else the arrays depend on; its `repr` enters the digest.
        build: Decodes the arrays, "train_x" among them.
        cache: Whether to use the cache.
        cache_dir: The directory of the cache; None means `<root>/.clsim-cache`.

    Raises:
        InputError: If a file cannot be read, or the cache cannot be written.
    """

    def complete(allocate: Allocate) -> dict[str, Array]:
        arrays = dict(build(allocate))
        return arrays | dict(zip(("mean", "std"), channel_moments(arrays["train_x"]), strict=True))

    if not cache:
        return complete(lambda _, shape: np.empty(shape, dtype=np.uint8))
    folder = root / ".clsim-cache" if cache_dir is None else expand_path(cache_dir)
    now = time.time()
    stats = [_stat(file) for file in files]
    same = hashlib.sha256(repr((FORMAT, settings)).encode())
    for file, stat in zip(files, stats, strict=True):
        times = stat.st_mtime_ns, stat.st_ctime_ns
        same.update(_name(file, root) + repr((stat.st_dev, stat.st_ino, stat.st_size, *times)).encode())
    note = folder / f".seen-{same.hexdigest()[:20]}"
    seen = read_sealed(note)
    content = seen["content"] if seen else fingerprint(files, root, settings)
    arrays = cached(f"{key}-{content}", folder, complete)
    if seen is None and max((stat.st_ctime for stat in stats), default=now) < now - _RESOLUTION:
        with suppress(OSError):  # a read-only cache
            write_sealed(note, {"content": content})
    return arrays


def fingerprint(files: Sequence[Path], root: Path, *settings: object) -> str:
    """Return a digest of files (their content and path below `root`), of settings and of the cache's format.

    Raises:
        InputError: If a file cannot be read.
    """
    digest = hashlib.sha256(repr((FORMAT, settings)).encode())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, content in zip(files, pool.map(_digest_source, files), strict=True):
            digest.update(_name(file, root) + content.encode() + b"\n")
    return digest.hexdigest()[:20]


def _name(file: Path, root: Path) -> bytes:
    return os.fsencode(str(file).removeprefix(str(root))) + b"\0"  # a name need not be UTF-8


def _stat(file: Path) -> os.stat_result:
    try:
        return os.stat(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): put it there.") from error


def _digest_source(file: Path) -> str:
    try:
        return _digest(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): put it there.") from error


def _digest(file: Path, start: int = 0, length: int | None = None) -> str:
    """Return the digest of a file or a part of it."""
    digest, left = hashlib.blake2b(digest_size=16), length
    with open(file, "rb", buffering=0) as stream:
        stream.seek(start)
        while block := stream.read(2**20 if left is None else min(2**20, left)):
            digest.update(block)
            left = None if left is None else left - len(block)
    return digest.hexdigest()


def _digest_array(file: Path) -> str:
    """Return the digest of a large file, computed on all cores."""
    starts = range(0, file.stat().st_size, _CHUNK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(partial(_digest, file, length=_CHUNK), starts))
    return hashlib.sha256("".join(found).encode()).hexdigest()


def cached(key: str, folder: Path, build: Build) -> dict[str, Array]:
    """Return the arrays of a cache entry, memory-mapped; build and store them the first time.

    An entry is written to a temporary directory and renamed, so that it is whole or absent. Each process verifies the
    digests of its arrays once; damaged arrays are reported by a warning and built again. Arrays are mapped
    copy-on-write: processes share the pages, and no write reaches the disk. Temporary directories of killed processes
    are removed; a process that is building holds a lock on its own.

    Args:
        key: Name of the entry; contains the `fingerprint` of all that the arrays depend on.
        folder: The directory of the cache.
        build: Returns the arrays by name; it may fill uint8 arrays on disk, which `allocate(name, shape)` gives it.

    Raises:
        InputError: If the folder cannot be written or has too little space.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for _ in range(2):
        ...         arrays = cached("ones", Path(folder), lambda allocate: {"x": np.ones(3)})
        >>> arrays["x"].tolist()
        [1.0, 1.0, 1.0]
    """
    entry = Path(folder) / key
    _remove_leftovers(entry.parent)
    if entry.exists() and not _whole(entry):
        _log.warning("The cache %s is damaged and built again.", entry)
    if not _whole(entry):
        try:
            with _building(entry.parent) as temporary:
                _write(temporary, build)
                if not _whole(entry):  # else another process was first
                    shutil.rmtree(entry, ignore_errors=True)
                    temporary.rename(entry)
        except OSError as error:
            if not _whole(entry):
                raise InputError(
                    f"The cache {folder} cannot be written ({error}): set cache_dir to another folder, or cache=false."
                ) from error
    return {
        Path(name).stem: np.load(entry / name, mmap_mode="c") for name in sorted(read_sealed(entry / _MANIFEST) or {})
    }


@contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """Yield a new temporary directory in the cache, whose lock this process holds until it is renamed or removed."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".partial-{uuid.uuid4().hex}"
    lock = FileLock(temporary.with_suffix(".lock"))
    with suppress(NotImplementedError):  # a file system without locks
        lock.acquire()
        while not temporary.with_suffix(".lock").exists():  # another process took it for a leftover and removed it
            lock.release()
            lock.acquire()
    try:
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        lock.release()
        temporary.with_suffix(".lock").unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary directories of killed processes: those whose lock no process holds."""
    from filelock import FileLock, Timeout

    for name in {path.with_suffix("") for path in folder.glob(".partial-*")}:
        lock = FileLock(name.with_suffix(".lock"), timeout=0)
        try:
            lock.acquire()
        except (Timeout, NotImplementedError, OSError):
            continue
        shutil.rmtree(name, ignore_errors=True)
        name.with_suffix(".lock").unlink(missing_ok=True)
        lock.release()


def _write(folder: Path, build: Build) -> None:
    allocated = set()

    def allocate(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        free = shutil.disk_usage(folder).free
        if free < np.prod(shape):  # a mapped write to a full disk would kill the process
            raise InputError(
                f"The cache needs {np.prod(shape) / 1e9:.1f} GB for {name} where {folder.parent} has {free / 1e9:.1f} "
                "GB left: set cache_dir to another folder, or cache=false."
            )
        allocated.add(name)
        mapped: npt.NDArray[np.uint8] = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=shape
        )
        return mapped

    for name, array in build(allocate).items():
        if name not in allocated:
            np.save(folder / f"{name}.npy", np.ascontiguousarray(array))
    found = {}
    for file in sorted(folder.glob("*.npy")):
        sync(file)  # the content is on disk before the entry gets its name
        found[file.name] = _digest_array(file)
    write_sealed(folder / _MANIFEST, found)
    _verified.update(_identity(folder / name) for name in found)


def _whole(entry: Path) -> bool:
    """Return whether an entry's arrays have the digests that were written; each is read once in a process."""
    manifest = read_sealed(entry / _MANIFEST)
    if not manifest:
        return False
    try:
        for name, digest in manifest.items():
            identity = _identity(entry / name)
            if identity not in _verified:
                if _digest_array(entry / name) != digest:
                    return False
                _verified.add(identity)
    except OSError:
        return False
    return True


def _identity(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
