"""Images that four lists describe, as CUB-200-2011 has them: path, class, part (train or test) and names of classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from cl.data.dataset import Dataset, Numbers, make_dataset
from cl.data.images import check_disjoint, decoded_images
from cl.errors import InputError
from cl.files import expand_path
from cl.ranges import checked

_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


@checked
def cub_200(
    root: str | Path,
    image_size: int | Sequence[int] | None = None,
    channels: int = 3,
    name: str | None = "cub200",
    cache: bool = True,
    cache_dir: str | Path | None = None,
    normalize: bool = True,
    mean: Numbers = None,
    std: Numbers = None,
    augment: nn.Module | None = None,
) -> Dataset:
    """Load CUB-200-2011 (Wah et al. 2011) in its own layout, with its own division into training and test images.

    The folder holds `images/<class>/<image>` and four lists with a line "number value" for each image or class:
    `images.txt`, `image_class_labels.txt`, `train_test_split.txt` (1: training) and `classes.txt`.

    Args:
        root: The folder `CUB_200_2011`.
        image_size: See `cl.data.images.image_folder`; the images have different sizes.
        channels: 3 for colour, 1 for grey.
        name: Its name in reports.
        cache: Whether to store the decoded arrays as memory-mapped files.
        cache_dir: The directory of these files; None means `<root>/.clsim-cache`.
        normalize: See `cl.data.sources.digits`.
        mean: See `cl.data.sources.digits`.
        std: See `cl.data.sources.digits`.
        augment: Train-time augmentation of raw batches, or None.

    Raises:
        InputError: If a list is missing or contradicts another one, or an image cannot be read.
    """
    root = expand_path(root)
    paths, labels, trained, classes = (_read(root / file) for file in _LISTS)
    for file, found in zip(_LISTS[1:3], (labels, trained), strict=True):
        if found.keys() != paths.keys():
            odd = next(iter(sorted(found.keys() ^ paths.keys())))
            raise InputError(f"Image {odd} is in only one of {root / file} and {root / _LISTS[0]}: restore the lists.")
    unknown = sorted(set(labels.values()) - classes.keys())
    if unknown:
        raise InputError(f"{root / _LISTS[1]} names class {unknown[0]}, which {root / _LISTS[3]} lacks: restore them.")
    numbers = {key: position for position, key in enumerate(sorted(classes, key=int))}
    rows = {
        part: [
            (root / "images" / paths[i], numbers[labels[i]]) for i in paths if (trained[i] == "1") == (part == "train")
        ]
        for part in ("train", "test")
    }
    files = {part: [file for file, _ in entries] for part, entries in rows.items()}
    check_disjoint(root.name, files["train"], files["test"])
    arrays = decoded_images("cub_200", files, root, image_size, channels, cache, cache_dir)
    for part, entries in rows.items():
        arrays[f"{part}_y"] = np.array([label for _, label in entries])
    names = [classes[key] for key in sorted(classes, key=int)]
    return make_dataset(name or root.resolve().name, arrays, names, normalize, mean, std, augment)


def _read(file: Path) -> dict[str, str]:
    """Return the values of a list by their numbers, in its order."""
    try:
        lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read ({error}): restore it, or name the folder CUB_200_2011.") from error
    wrong = next((line for line in lines if len(line) != 2 or not line[0].isdigit()), None)
    if wrong is not None:
        raise InputError(f"{file} has the line {' '.join(wrong)!r}: each needs a number and a value.")
    return {number: value for number, value in lines}
