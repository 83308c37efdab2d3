"""Decoded files, kept as memory-mapped arrays."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cl.data import Array, channel_moments
from cl.errors import InputError

Allocate = Callable[[str, tuple[int, ...]], npt.NDArray[np.uint8]]
Build = Callable[[Allocate], Mapping[str, Array]]

FORMAT = 1  # raise it when what a cached array means changes
_MANIFEST = "manifest.json"


def decoded(
    key: str,
    files: Sequence[Path],
    root: Path,
    settings: object,
    build: Build,
    cache: bool,
    cache_dir: str | Path | None,
) -> dict[str, Array]:
    """Return what `build` makes and the mean and std of its training images, from the cache where there is one."""

    def complete(allocate: Allocate) -> dict[str, Array]:
        arrays = dict(build(allocate))
        return arrays | dict(zip(("mean", "std"), channel_moments(arrays["train_x"]), strict=True))

    if not cache:
        return complete(lambda _, shape: np.empty(shape, dtype=np.uint8))
    folder = root / ".clsim-cache" if cache_dir is None else Path(cache_dir)
    return cached(f"{key}-{fingerprint(files, root, settings)}", folder, complete)


def fingerprint(files: Iterable[Path], root: Path, *settings: object) -> str:
    """Return a digest of files (path below root, size, time of change), of settings and of the cache's format.

    Raises:
        InputError: If a file is missing.
    """
    digest = hashlib.sha256(repr((FORMAT, settings)).encode())
    for file in files:
        try:
            stat = os.stat(file)
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror}): put it there.") from error
        digest.update(f"{str(file).removeprefix(str(root))}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]


def cached(key: str, folder: Path, build: Build) -> dict[str, Array]:
    """Return the arrays of a cache entry, memory-mapped; build and store them the first time.

    The entry is written beside its place and renamed, so that it is whole or absent; one whose files have changed in
    size since is built again. Pages are mapped copy-on-write: processes share them and no write reaches the disk.

    Args:
        key: Name of the entry; holds the `fingerprint` of all that the arrays depend on.
        folder: Where entries live.
        build: Makes the arrays; `allocate(name, shape)` gives it a uint8 array on the disk to fill.

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
    if not _whole(entry):
        temporary = entry.with_name(f".partial-{uuid.uuid4().hex}")
        try:
            temporary.mkdir(parents=True)
            _write(temporary, build)
            if not _whole(entry):  # else another process was first
                shutil.rmtree(entry, ignore_errors=True)
                temporary.rename(entry)
        except OSError as error:
            if not _whole(entry):
                raise InputError(
                    f"The cache {folder} cannot be written ({error}): set cache_dir to another folder, or cache=false."
                ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return {file.stem: np.load(file, mmap_mode="c") for file in sorted(entry.glob("*.npy"))}


def _write(folder: Path, build: Build) -> None:
    placed = set()

    def allocate(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        free = shutil.disk_usage(folder).free
        if free < np.prod(shape):  # a mapped write to a full disk would kill the process
            raise InputError(
                f"The cache needs {np.prod(shape) / 1e9:.1f} GB for {name} where {folder.parent} has {free / 1e9:.1f} "
                "GB left: set cache_dir to another folder, or cache=false."
            )
        placed.add(name)
        mapped: npt.NDArray[np.uint8] = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=shape
        )
        return mapped

    for name, array in build(allocate).items():
        if name not in placed:
            np.save(folder / f"{name}.npy", np.ascontiguousarray(array))
    sizes = {}
    for file in sorted(folder.glob("*.npy")):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())  # the bytes before the name
        sizes[file.name] = file.stat().st_size
    (folder / _MANIFEST).write_text(json.dumps(sizes))


def _whole(entry: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((entry / _MANIFEST).read_text())
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
