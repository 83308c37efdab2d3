"""Load a dataset of the Hugging Face library from the folder that `save_to_disk` wrote."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, overload

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor, nn

from cl.data.class_names import number_classes
from cl.data.dataset import Array, Dataset, Numbers, make_dataset, split_validation
from cl.data.images import decoded_images
from cl.errors import InputError
from cl.files import expand_path
from cl.ranges import checked

_BATCH = 1000  # examples that are read at a time


@checked
def huggingface(
    path: str | Path,
    image: str = "image",
    label: str = "label",
    train: str = "train",
    test: str | None = "test",
    image_size: int | Sequence[int] | None = None,
    channels: int = 3,
    test_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.2,
    seed: int = 0,
    name: str | None = None,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    normalize: bool = True,
    mean: Numbers = None,
    std: Numbers = None,
    augment: nn.Module | None = None,
) -> Dataset:
    """Load a Hugging Face dataset that `save_to_disk` wrote; needs `pip install 'clsim[huggingface]'`.

    Inputs are pictures (the feature `Image`, turned by their EXIF orientation as the library does), arrays of bytes
    (C, H, W) or (H, W), or arrays of floats. Labels are a `ClassLabel`, integers or text; integers and text are
    numbered in ascending order. Classes of the training and of the test split are matched by name. Classes without a
    training example are left out.

    Args:
        path: The folder of a `DatasetDict`, or of one `Dataset`, which is then the training split.
        image: The column of the inputs.
        label: The column of the labels.
        train: Name of the training split.
        test: Name of the test split; None draws the test set from the training split.
        image_size: Height and width, or one number for both: every picture is cropped at its centre to this aspect
            ratio and resized. None requires that all pictures have one size.
        channels: Channels of pictures: 3 for colour, 1 for grey.
        test_fraction: Share of each class that becomes the test set, in (0, 1), if `test` is None.
        seed: Seed of that split.
        name: Its name in reports; None means the folder's name.
        cache: Whether to store decoded pictures as memory-mapped files.
        cache_dir: The directory of these files; None means `<path>/.clsim-cache`.
        normalize: See `cl.data.sources.digits`.
        mean: See `cl.data.sources.digits`; None does not change the mean of float inputs.
        std: See `cl.data.sources.digits`; None does not change the scale of float inputs.
        augment: Train-time augmentation of raw batches, or None.

    Raises:
        InputError: If the library, folder, split or column is missing, a picture cannot be read, sizes differ without
            `image_size`, a label is missing or of no training example, or one split names its labels and the other does
            not.
    """
    path = expand_path(path)
    splits = _splits(path, train, test)
    for split in splits.values():
        for column in (image, label):
            if column not in split.data.column_names:
                known = ", ".join(split.data.column_names)
                raise InputError(f"There is no column {column!r} in {split.name}, only {known}: name one of them.")
    y, names = _labels(splits, label)
    if test is None:
        splits, y = _draw(splits["train"], y["train"], test_fraction, seed)
    if type(splits["train"].data.features[image]).__name__ == "Image":
        chosen = (image, label, train, test, test_fraction, seed)
        arrays = _decode(path, splits, image, image_size, channels, cache, cache_dir, chosen)
    else:
        arrays = {f"{part}_x": _arrays(split, image) for part, split in splits.items()}
    arrays |= {f"{part}_y": torch.from_numpy(labels) for part, labels in y.items()}
    return make_dataset(name or path.resolve().name, arrays, names, normalize, mean, std, augment)


@dataclass(frozen=True)
class _Split:
    data: Any
    name: str
    rows: Array  # the row numbers in the stored split, for errors

    def where(self, i: int) -> str:
        return f"Row {self.rows[i]} of {self.name}"

    def take(self, rows: Array) -> _Split:
        return _Split(self.data.select(rows), self.name, self.rows[rows])


def _splits(path: Path, train: str, test: str | None) -> dict[str, _Split]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "The Hugging Face library is not installed: run `pip install 'clsim[huggingface]'`."
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{path} is not a saved dataset ({reason}): write one there with save_to_disk.") from error
    if not isinstance(found, dict):
        if test is not None:
            raise InputError(f"{path} holds one split: set test to null, to draw the test set from it.")
        return {"train": _split(found, str(path))}
    if train == test:
        raise InputError(f"train and test are both {train!r}: keep the two apart, or set test to null.")
    named = {"train": train} if test is None else {"train": train, "test": test}
    for split in named.values():
        if split not in found:
            raise InputError(f"{path} has no split {split!r}, only {', '.join(found)}: name one of them.")
    return {part: _split(found[split], f"the {split} split of {path}") for part, split in named.items()}


def _split(data: Any, name: str) -> _Split:
    return _Split(data.with_format(None), name, np.arange(len(data)))


def _labels(splits: Mapping[str, _Split], column: str) -> tuple[dict[str, Array], list[str]]:
    """Return labels 0..C-1 of each split, and the names of the classes."""
    named = {part: getattr(split.data.features[column], "names", None) for part, split in splits.items()}
    cells = {part: _named(list(split.data[column]), named[part]) for part, split in splits.items()}
    for part, split in splits.items():
        numbers = all(isinstance(cell, int) for cell in cells[part])
        if numbers and named["train"] is not None and named[part] is None:
            raise InputError(
                f"{split.name} has numbers as labels, and only {splits['train'].name} has their names: give both "
                f"the same ClassLabel, by cast_column({column!r}, ...)."
            )
    known = set(named["train"] or (cell for cell in cells["train"] if isinstance(cell, int | str)))
    names = number_classes(map(str, known)) if named["train"] is None else list(named["train"])
    index = {name: c for c, name in enumerate(names)}
    number = {cell: index[str(cell)] for cell in known}
    for part, labels in cells.items():
        for i, cell in enumerate(labels):
            if not isinstance(cell, int | str) or cell not in number:
                raise InputError(
                    f"{splits[part].where(i)} has the label {cell!r}, where {len(number)} classes are known from the "
                    "training split, each an integer or text: leave the row out."
                )
    return {part: np.array([number[cell] for cell in labels]) for part, labels in cells.items()}, names


def _named(labels: list[Any], names: Sequence[str] | None) -> list[Any]:
    """Return labels with numbers replaced by names, where there are names."""
    if names is None:
        return labels
    return [names[c] if isinstance(c, int) and 0 <= c < len(names) else c for c in labels]


def _draw(split: _Split, y: Array, fraction: float, seed: int) -> tuple[dict[str, _Split], dict[str, Array]]:
    kept, drawn = (rows.numpy() for rows in split_validation(torch.from_numpy(y), fraction, seed))
    return {"train": split.take(kept), "test": split.take(drawn)}, {"train": y[kept], "test": y[drawn]}


class _Pictures(Sequence[Path | IO[bytes]]):
    """The encoded pictures of a split, each read when it is indexed."""

    def __init__(self, split: _Split, column: str) -> None:
        import datasets

        self.data = split.data.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column, self.split = column, split

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, row: int) -> Path | IO[bytes]: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Path | IO[bytes]]: ...
    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        cell = self.data[row][self.column]
        if cell is None:
            raise InputError(f"{self.split.where(row)} has no picture: leave the row out.")
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"])


def _decode(
    path: Path,
    splits: Mapping[str, _Split],
    column: str,
    image_size: int | Sequence[int] | None,
    channels: int,
    cache: bool,
    cache_dir: str | Path | None,
    chosen: object,
) -> dict[str, Any]:
    def name(part: str, i: int) -> str:
        return splits[part].where(i)

    pictures = {part: _Pictures(split, column) for part, split in splits.items()}
    files = [Path(file["filename"]) for split in splits.values() for file in split.data.cache_files]
    return decoded_images(
        "huggingface", pictures, path, image_size, channels, cache, cache_dir, files, chosen, name, True
    )


def _arrays(split: _Split, column: str) -> Tensor:
    leaf = split.data.features[column]
    while hasattr(leaf, "feature"):
        leaf = leaf.feature
    stored = getattr(leaf, "dtype", "no array")
    kind = np.uint8 if stored == "uint8" else np.float32 if str(stored).startswith("float") else None
    if kind is None:
        raise InputError(
            f"Column {column!r} of {split.name} holds {stored}: give pictures, arrays of bytes (uint8) or of floats."
        )
    data, rows = split.data.select_columns([column]).with_format("numpy", dtype=kind), []
    for start in range(0, len(data), _BATCH):
        rows += [np.asarray(row) for row in data[start : start + _BATCH][column]]
    for i, row in enumerate(rows):
        if row.dtype != kind:
            raise InputError(f"{split.where(i)} is ragged: give it lists of one length.")
        if row.shape != rows[0].shape:
            raise InputError(
                f"{split.where(i)} has shape {row.shape}, row {split.rows[0]} {rows[0].shape}: give all rows one shape."
            )
    x = torch.from_numpy(np.stack(rows))
    return x[:, None] if x.dtype == torch.uint8 and x.ndim == 3 else x
