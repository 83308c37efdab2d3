"""The inputs of a dataset as rows: a tensor in memory, a mapped `.npy` file, or the items of a map-style dataset."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cl.data.pictures import eight_bits
from cl.errors import InputError
from cl.files import expand_path

RESIDENT = 2**30  # bytes; larger arrays stay in their files
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
PART = 2**26  # bytes that are read at a time


class Rows(Protocol):
    """Inputs (N, *input), one row for each example, that can be indexed by a tensor of row numbers; tensors can."""

    @property
    def shape(self) -> Sequence[int]:
        """Number of rows and shape of an input, (N, *input)."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the inputs."""

    def __len__(self) -> int:
        """Number of rows, N."""

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the rows of an index, int64 (n,), as a new tensor (n, *input)."""


def kind_of(x: Rows) -> str:
    """Return the type and the shape of one input, in words.

    Example:
        >>> kind_of(torch.zeros(5, 1, 8, 8, dtype=torch.uint8))
        'uint8 (1, 8, 8)'
    """
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape[1:])}"


class Mapped:
    """A `.npy` file that is mapped anew for each reading of rows.

    So the process's memory holds only the rows that are being read, whatever the size of the file. The operating
    system's cache of the file does not count as the process's memory, and is freed when memory is short.

    Args:
        path: A `.npy` file of an array (N, *input) in C order.

    Raises:
        InputError: If the array is in Fortran order.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "x.npy"
        >>> np.save(path, np.arange(6).reshape(3, 2))
        >>> Mapped(path)[torch.tensor([2, 0])].tolist()
        [[4, 5], [0, 1]]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        array = np.load(self.path, mmap_mode="r")
        if not array.flags.c_contiguous:
            raise InputError(
                f"{path} is stored in Fortran order: write it with numpy.save(numpy.ascontiguousarray(x))."
            )
        self.shape = torch.Size(array.shape)
        self.dtype = torch.as_tensor(np.zeros(0, array.dtype)).dtype
        self._type, self._offset = array.dtype, array.offset

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        # "c", copy-on-write: torch needs writable memory, and no write reaches the file
        array: Any = np.memmap(self.path, self._type, "c", self._offset, tuple(self.shape))
        return torch.from_numpy(array).index_select(0, index.cpu())


class Items:
    """The inputs of a map-style dataset, read one by one whenever they are needed.

    This is for datasets that cannot be read once, because a transform draws anew each time. It is as slow as the
    dataset.

    Args:
        dataset: A map-style dataset of (input, ...) items; an input is a tensor, an array or a picture.

    Example:
        >>> Items([(torch.tensor([1.0]), 0), (torch.tensor([2.0]), 1)])[torch.tensor([1])].tolist()
        [[2.0]]
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        first = to_tensor(dataset[0][0], "The input of item 0 of the dataset")
        self.shape, self.dtype = torch.Size((len(dataset), *first.shape)), first.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        items = [to_tensor(self.dataset[row][0], f"The input of item {row} of the dataset") for row in index.tolist()]
        return torch.stack(items) if items else torch.empty(0, *self.shape[1:], dtype=self.dtype)


def open_array(path: str | Path) -> Rows:
    """Open a `.npy` file: as a tensor of mapped memory, or as `Mapped` if it takes more than 1 GiB.

    Raises:
        InputError: If the file is missing, or is not one array of numbers with at least one dimension.
    """
    try:
        found = np.load(expand_path(path), mmap_mode="c")
        if not isinstance(found, np.ndarray):
            found.close()
            raise InputError(f"{path} holds several arrays: write one of them with numpy.save.")
        if found.ndim == 0:
            raise InputError(f"{path} holds a single number: write an array with one row for each example.")
        return as_rows(found)
    except InputError:
        raise
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a .npy array ({error}): write it with numpy.save.") from error


def as_rows(array: Any) -> Rows:
    """Return an array as a tensor, or as `Mapped` if it is mapped from a file and takes more than 1 GiB.

    Example:
        >>> as_rows(np.arange(3)).tolist()
        [0, 1, 2]
    """
    if isinstance(array, np.memmap) and array.nbytes > RESIDENT:
        return Mapped(str(array.filename))
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def parts(x: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Iterate over an array, a tensor or a mapped file in parts of consecutive rows, each at most 64 MiB or one row.

    Example:
        >>> [part.tolist() for part in parts(torch.tensor([[1], [2]]))]
        [[[1], [2]]]
    """
    step = max(1, PART // max(1, x[:1].nbytes if isinstance(x, np.ndarray) else row_bytes(x)))
    for start in range(0, len(x), step):
        if isinstance(x, np.ndarray):
            yield x[start : start + step]
            release_pages(x)
        else:
            yield x[torch.arange(start, min(start + step, len(x)))].numpy()


def release_pages(array: Any) -> None:
    """Release the pages of a mapped file from the process's memory; what was written to them stays in the file."""
    shared = isinstance(array, np.memmap) and array.mode != "c"  # a private page would be lost
    if shared and hasattr(mmap, "MADV_DONTNEED"):
        array._mmap.madvise(mmap.MADV_DONTNEED)


def to_tensor(x: Any, what: str = "An input") -> Tensor:
    """Return an input as a tensor on the CPU; a picture as uint8 (C, H, W), with the channels that it has.

    Numbers keep their type, with two exceptions: unsigned integers of more than 8 bits become int64, since torch cannot
    index with them, and floats of more than 64 bits become float64.

    Args:
        x: A tensor, an array, a number, a list of numbers, or a picture of Pillow.
        what: The name of the input in errors.

    Raises:
        InputError: If `x` is none of these, a picture has more than 8 bits a channel, or a tensor is sparse, nested,
            complex or quantized.

    Example:
        >>> from PIL import Image
        >>> to_tensor(Image.new("L", (4, 3))).shape
        torch.Size([1, 3, 4])
    """
    if hasattr(x, "getbands"):  # PIL
        try:
            pixels = np.asarray(eight_bits(x))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{what} is a picture of mode {x.mode} that cannot be read ({error}): convert it to 8 bits a channel, "
                "or give an array of floats."
            ) from error
        return torch.from_numpy(pixels[None].copy() if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())
    check_plain(x, what)
    if isinstance(x, Tensor):
        return (x.to(torch.int64) if x.dtype in _UNSIGNED else x).detach().cpu()
    try:
        array = np.asarray(x)
    except (TypeError, ValueError):
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{what} is of type {type(x).__name__}: give one array or tensor of numbers, or a picture.")
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        if array.size and int(array.max()) >= 2**63:
            raise InputError(f"{what} holds {int(array.max())}, too much for a signed 64-bit integer: give floats.")
        return torch.from_numpy(array.astype(np.int64))
    native = np.float64 if array.dtype.kind == "f" and array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=native))


def check_plain(x: Any, what: str) -> None:
    """Refuse masked arrays, and tensors that are not dense or do not hold real numbers of 16 bits or more.

    Args:
        x: Anything; only arrays and tensors are checked.
        what: The name of the input in errors.

    Raises:
        InputError: If `x` is such an array or tensor.

    Example:
        >>> check_plain(torch.eye(2).to_sparse(), "train_x")
        Traceback (most recent call last):
        cl.errors.InputError: train_x is a sparse or nested tensor: give a dense one of real numbers.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise InputError(f"{what} is a masked array, whose mask would be lost: fill it, by x.filled(value).")
    if isinstance(x, Tensor):
        dense = x.layout == torch.strided and not x.is_nested
        number = not (x.is_complex() or x.is_quantized or (x.is_floating_point() and x.element_size() < 2))
        if not dense or not number:
            kind = str(x.dtype)[6:] if dense else "sparse or nested"
            raise InputError(f"{what} is a {kind} tensor: give a dense one of real numbers.")


def row_bytes(x: Rows) -> int:
    """Return the bytes of one row."""
    return math.prod(x.shape[1:]) * torch.empty(0, dtype=x.dtype).element_size()


def first_not_finite(x: Rows) -> int | None:
    """Return the number of the first row that holds NaN or infinity, or None; a mapped file is read part by part.

    Example:
        >>> first_not_finite(torch.tensor([[1.0], [float("nan")]]))
        1
    """
    if not x.dtype.is_floating_point:
        return None
    start = 0
    for part in parts(x):
        if not (np.isfinite(part.min()) and np.isfinite(part.max())):
            return start + int(np.flatnonzero(~np.isfinite(part.reshape(len(part), -1)).all(1))[0])
        start += len(part)
    return None
