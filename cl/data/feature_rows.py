"""What a frozen network makes of the inputs of a dataset, computed once for each of them and kept in a file."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cl.data.provenance import content_digest
from cl.data.rows import Rows, release_pages
from cl.data.task import TaskData
from cl.distributed import rank
from cl.errors import InputError

FORMAT = 1  # increase it when the meaning of a stored row changes
_PART = 1024  # inputs that are computed and stored at a time
_LONG = 2000  # inputs whose computation shows its progress
_CHECKED = 4  # stored rows of a file that are computed again when a process first reads it
_log = logging.getLogger(__name__)


class Network(Protocol):
    """A frozen network, for `FeatureRows`."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map raw inputs (n, *input) to float32 (n, *shape) on the CPU."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an output."""

    def digest(self) -> str:
        """Return a digest of the weights and of the way inputs are prepared, as they are now."""


class FeatureRows:
    """The outputs (N, *shape) of a frozen network, each computed when it is first read, and kept in a file.

    The file is named by digests of the network and of the inputs, so that runs, seeds and strategies share it, also at
    the same time, and a killed run loses the last thousand at most. It has room for all N; what is missing takes no
    space on most file systems. When a process opens a file, it computes a few stored rows again, and puts a file aside
    whose rows differ.

    Args:
        inputs: The raw inputs.
        network: Maps them to the outputs.
        digest: Returns a digest of the inputs.
        folder: The directory of the files; None keeps the outputs in memory.

    Example:
        >>> class Double:
        ...     shape = (2,)
        ...     def __call__(self, x):
        ...         print(f"computes {len(x)}")
        ...         return 2 * x
        ...     def digest(self):
        ...         return "double"
        >>> rows = FeatureRows(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), Double(), str, None)
        >>> for index in ([2, 0], [0]):
        ...     rows[torch.tensor(index)].tolist()
        computes 2
        [[10.0, 12.0], [2.0, 4.0]]
        [[2.0, 4.0]]
    """

    dtype = torch.float32

    def __init__(self, inputs: Rows, network: Network, digest: Callable[[], str], folder: Path | None) -> None:
        self.rows, self.network, self.folder, self._inputs_digest = inputs, network, folder, cache(digest)
        self.shape = torch.Size((len(inputs), *network.shape))
        self._key = ""  # of the file that is open
        self._values: Any = None
        self._done: Any = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        wanted = index.cpu().numpy().reshape(-1)
        self._open()
        if self._done is None and len(wanted) <= 1:  # somebody asks for the shape; nothing is written yet
            return torch.from_numpy(self._compute(wanted))
        missing = np.unique(wanted if self._done is None else wanted[self._done[wanted] == 0])
        for start in _progress(range(0, len(missing), _PART), len(missing)):
            with self._lock():
                self._attach()
                part = missing[start : start + _PART]
                part = part[self._done[part] == 0]  # another process may have been first
                if len(part):
                    self._values[part] = self._compute(part)
                    _flush(self._values)  # the rows are in the file before they count as done
                    self._done[part] = 1
                    _flush(self._done)
        found = torch.from_numpy(np.array(self._values[wanted]))
        release_pages(self._values)
        return found

    def _compute(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = self.network(self.rows[torch.from_numpy(rows)]).numpy()
        return found

    # ---- files --------------------------------------------------------------------------------------------------

    def _file(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._key}.npy"

    def _open(self) -> None:
        """Open what is stored for the network's present weights; without a file, there is nothing yet."""
        made_of = f"{FORMAT} {self.network.digest()} {self._inputs_digest()} {tuple(self.shape)}"
        key = hashlib.sha256(made_of.encode()).hexdigest()[:20]
        if key == self._key:
            return
        self._key, self._values, self._done = key, None, None
        if self.folder is None:
            self._values = np.zeros(self.shape, dtype=np.float32)
            self._done = np.zeros(len(self), dtype=np.uint8)
        elif self._file().exists():
            self._attach()
            self._verify()

    def _attach(self) -> None:
        """Map the file, which is made first if there is none."""
        if self._done is not None:
            return
        file = self._file()
        if not file.exists():
            self._make(file)
        self._values = np.load(file, mmap_mode="r+")
        self._done = np.load(file.with_suffix(".done.npy"), mmap_mode="r+")

    def _make(self, file: Path) -> None:
        size = math.prod(self.shape) * 4
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(file.parent).free
            if free < size:  # a mapped write to a full disk would kill the process
                raise InputError(
                    f"The features of {len(self)} inputs take {size / 1e9:.1f} GB where {file.parent} has "
                    f"{free / 1e9:.1f} GB left: set feature_dir to another folder, or to null."
                )
            for name, shape, kind in ((file.with_suffix(".done.npy"), (len(self),), "u1"), (file, self.shape, "f4")):
                partial = name.with_suffix(".partial")
                np.lib.format.open_memmap(partial, mode="w+", dtype=kind, shape=tuple(shape)).flush()
                os.replace(partial, name)  # the rows come last: where they exist, both do
        except OSError as error:
            raise InputError(
                f"feature_dir={file.parent} cannot be written ({error}): set it to another folder, or to null."
            ) from error

    def _lock(self) -> AbstractContextManager[Any]:
        if self.folder is None:
            return nullcontext()
        from filelock import FileLock

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"feature_dir={self.folder} cannot be made ({error.strerror}): set it to another folder, or to null."
            ) from error
        return FileLock(self._file().with_suffix(".lock"))

    def _verify(self) -> None:
        """Compute a few of the stored rows again; put the file aside if they differ or it has another form."""
        fits = self._values.shape == tuple(self.shape) and self._done.shape == (len(self),)
        stored = np.flatnonzero(self._done)[:: max(1, int(self._done.sum()) // _CHECKED)][:_CHECKED]
        if fits and len(stored):
            found, again = self._values[stored], self._compute(stored)
            fits = bool(np.allclose(found, again, rtol=1e-3, atol=1e-3 * float(np.abs(again).max())))
        if not fits:
            _log.warning("The features in %s are damaged and computed again.", self._file())
            with self._lock():
                os.replace(self._file(), self._file().with_suffix(".damaged"))
            self._values = self._done = None


def _flush(array: Any) -> None:
    if isinstance(array, np.memmap):
        array.flush()


def _progress(steps: Sequence[int], total: int) -> Any:
    """Return an iterable over the steps, with a bar if they take long; into a file it is written once a minute."""
    if total < _LONG or rank() > 0:
        return steps
    from tqdm import tqdm  # type: ignore[import-untyped]

    often = 0.5 if sys.stderr.isatty() else 60
    return tqdm(steps, desc=f"frozen network on {total} inputs", unit="k", leave=False, mininterval=often)


class Transformed:
    """The inputs of a set of examples after its transform, as rows.

    Args:
        data: The examples.

    Example:
        >>> data = TaskData(torch.arange(3.0), torch.arange(3), index=torch.tensor([2, 0]), transform=torch.neg)
        >>> Transformed(data)[torch.tensor([0])].tolist()
        [-2.0]
    """

    def __init__(self, data: TaskData) -> None:
        self.data = data
        first = data.take(torch.zeros(1, dtype=torch.int64)).tensors()[0]
        self.shape, self.dtype = torch.Size((len(data), *first.shape[1:])), first.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.data.take(index).tensors()[0]


def raw(data: TaskData) -> TaskData:
    """Return the same examples with the raw inputs in place of features; the same object if it holds no features.

    Example:
        >>> data = TaskData(torch.zeros(3, 2), torch.arange(3))
        >>> raw(data) is data
        True
    """
    if not isinstance(data.x, FeatureRows):
        return data
    inputs: Any = data.x.rows
    if isinstance(inputs, Transformed):
        return inputs.data if data.index is None else inputs.data.take(data.index)
    return replace(data, x=inputs)


Rewrite = Callable[[TaskData], TaskData]


def rewriter(network: Network, folder: Path | None) -> Rewrite:
    """Return the function that puts the outputs of a network in place of the inputs of examples.

    Sets of examples that share their array of inputs share their outputs.

    Args:
        network: The frozen network.
        folder: See `FeatureRows`.
    """
    known: dict[int, tuple[Rows, FeatureRows]] = {}  # by id, with the inputs themselves, so that ids stay taken

    def rows_of(inputs: Rows) -> FeatureRows:
        if id(inputs) not in known:
            known[id(inputs)] = inputs, FeatureRows(inputs, network, partial(content_digest, inputs), folder)
        return known[id(inputs)][1]

    def rewrite(data: TaskData) -> TaskData:
        if data.transform is None:
            return TaskData(rows_of(data.x), data.y, data.task, data.index)
        return TaskData(
            rows_of(Transformed(data)), data.labels, data.task if isinstance(data.task, int) else data.tasks
        )

    return rewrite
