"""A directory tree of image files as a dataset: list the files, decode them, split them."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Interval
from torch import nn

from cl.data.cache import Allocate, decoded
from cl.data.dataset import Array, Dataset, Numbers, make_dataset, split_validation
from cl.data.pictures import eight_bits
from cl.data.rows import release_pages
from cl.errors import InputError
from cl.files import expand_path
from cl.ranges import checked

_log = logging.getLogger(__name__)
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
Pixels = npt.NDArray[np.uint8]
_BLOCK = 256  # images that a thread decodes at a time
_OPENING = threading.Lock()
# Folders that a system or a program puts among the user's own; hidden ones begin with a dot.
_SYSTEMS = {"__MACOSX", "__pycache__", "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot"}
_SYSTEMS |= {"$RECYCLE.BIN", "System Volume Information", "lost+found"}


def is_users_own(name: str) -> bool:
    """Return whether a file or folder is the user's own: neither hidden nor put there by a system.

    Example:
        >>> [is_users_own(name) for name in ("cat", ".ipynb_checkpoints", "@eaDir", "__MACOSX")]
        [True, False, False, False]
    """
    return name[0] != "." and name not in _SYSTEMS


def list_images(folder: Path) -> list[tuple[Path, str]]:
    """Return (file, class) of every image in a folder, sorted by class and path.

    Each direct child of the folder is a class, and contains its images at any depth. Hidden files and folders and those
    of a system (`.ipynb_checkpoints`, `@eaDir`, `__MACOSX`) are skipped at every level. If the folder contains a file
    `<folder>_annotations.txt` (the layout of Tiny-ImageNet), its lines `file<TAB>class<TAB>...` give the class of
    `images/<file>` instead.

    Raises:
        InputError: If the folder or an image is missing, a link is broken, or a class has no image.
    """
    notes = folder / f"{folder.name}_annotations.txt"
    if notes.is_file():
        rows = [line.split("\t") for line in notes.read_text(encoding="utf-8").splitlines() if line.strip()]
        if any(len(row) < 2 for row in rows):
            raise InputError(f"{notes} has a line without a tab: each needs file<TAB>class.")
        listed = sorted(((folder / "images" / row[0], row[1]) for row in rows), key=lambda item: (item[1], item[0]))
        missing = next((file for file, _ in listed if not file.is_file()), None)
        if missing is not None or not listed:
            raise InputError(f"{notes} names {missing or 'no image'}, which is not there: restore the images.")
        return listed
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: put one folder of images for each class into it, or name another.")
    found: list[tuple[Path, str]] = []
    for label in sorted(folders_in(folder)):
        files = _below(folder / label)
        if not files:
            raise InputError(f"{folder / label} holds no image ({', '.join(SUFFIXES)}): add some or remove the folder.")
        found += [(Path(file), label) for file in sorted(files)]
    if not found:
        raise InputError(f"{folder} holds no class: put one folder of images for each class into it.")
    within = sorted({parts[1] for f, _ in found if len(parts := f.relative_to(folder).parts) > 2})
    if len(within) > 1:
        classes = sorted({label for _, label in found})
        _log.info(
            "The %d classes of %s are %s; folders within them, such as %s, are no classes.",
            len(classes), folder, _some(classes), _some(within),
        )  # fmt: skip
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= 3 else [*names[:3], "..."])


def folders_in(folder: Path) -> list[str]:
    """Return the names of the user's own folders in a folder, in no particular order.

    Raises:
        InputError: If a link is broken, or the name of a folder is not UTF-8.
    """
    entries = [entry for entry in os.scandir(folder) if is_users_own(entry.name)]
    odd = next((e.name for e in entries if e.is_dir() and e.name != e.name.encode(errors="replace").decode()), None)
    if odd is not None:
        raise InputError(f"{folder} holds a folder called {odd!r}, which is not UTF-8: rename it.")
    for entry in entries:
        if entry.is_symlink() and not entry.name.lower().endswith(SUFFIXES):
            _check_link(entry.path)
    return [entry.name for entry in entries if entry.is_dir()]


def _below(folder: Path) -> list[str]:
    """Return the images in a folder at any depth; a directory that several links lead to is read once."""
    files, known = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(parent)
        if here in known:
            folders.clear()
            continue
        known.add(here)
        folders[:] = filter(is_users_own, folders)  # os.walk does not enter the others
        files += [os.path.join(parent, n) for n in names if is_users_own(n) and n.lower().endswith(SUFFIXES)]
    for file in files:
        _check_link(file)
    return files


def _check_link(path: str) -> None:
    if not os.path.exists(path):
        to = os.readlink(path) if os.path.islink(path) else "nothing"
        raise InputError(f"{path} is a link to {to}, which does not exist: restore it or remove the link.")


def read_image(
    file: Path | IO[bytes],
    channels: int = 3,
    size: tuple[int, int] | None = None,
    name: str | None = None,
    exif_orientation: bool = False,
) -> Pixels:
    """Return an image as uint8 (C, H, W).

    Args:
        file: An image in any format that Pillow reads, with 8 bits a channel.
        channels: 3 for colour, 1 for grey.
        size: (H, W): the image is cropped at its centre to this aspect ratio and resized; None keeps its own size.
        name: The name of the image in errors; None means the file.
        exif_orientation: Whether to turn and mirror the image as its EXIF data say, as viewers do; else pixels stay as
            they are stored. The orientation of the TIFF format is always applied.

    Raises:
        InputError: If the image cannot be read, has more than 8 bits a channel, or Pillow warns about its pixels.
    """
    from PIL import Image, ImageOps

    try:
        with _open(file) as image:
            picture = eight_bits(image, channels)
        if exif_orientation:
            with _OPENING, warnings.catch_warnings():  # damaged EXIF data do not concern the pixels
                warnings.simplefilter("ignore")
                picture = ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{name or file} cannot be read as an image ({error}): replace or remove it.") from error
    if size is not None and picture.size != size[::-1]:
        picture = ImageOps.fit(picture, size[::-1], Image.Resampling.BICUBIC)
    pixels: Pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _open(file: Path | IO[bytes]) -> Any:
    """Open an image; a warning of Pillow is raised as a ValueError, unless it concerns metadata alone."""
    from PIL import Image

    # The filters of warnings belong to the process, so one thread at a time may change them.
    with _OPENING, warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        image = Image.open(file)
    for warning in noted:
        # In other formats than TIFF, the TIFF reader reads EXIF data. In TIFF, a tag of too many values gives a
        # "Metadata Warning", and its first value is used.
        exif = image.format != "TIFF" and Path(warning.filename).name == "TiffImagePlugin.py"
        if not exif and not str(warning.message).startswith("Metadata Warning"):
            image.close()
            raise ValueError(str(warning.message).strip().rstrip("."))
    return image


def decode(
    files: Sequence[Path | IO[bytes]],
    channels: int,
    size: tuple[int, int] | None,
    allocate: Callable[[tuple[int, ...]], Pixels],
    name: Callable[[int], str] | None = None,
    exif_orientation: bool = False,
) -> Pixels:
    """Return images as uint8 (N, C, H, W), decoded on all cores.

    Args:
        files: The images.
        channels: 3 for colour, 1 for grey.
        size: (H, W) to crop and resize to; None requires that all images have the size of the first.
        allocate: Returns an array of the shape it is given, which is filled and returned.
        name: Returns the name of the i-th image in errors; None means its file.
        exif_orientation: See `read_image`.

    Raises:
        InputError: If an image cannot be read, or `size` is None and an image has another size than the first.
    """
    called = name or (lambda row: str(files[row]))
    shape = read_image(files[0], channels, size, called(0), exif_orientation).shape
    out = allocate((len(files), *shape))

    def fill(start: int) -> None:
        for row in range(start, min(start + _BLOCK, len(files))):
            pixels = read_image(files[row], channels, size, called(row), exif_orientation)
            if pixels.shape != shape:
                here, there = ("x".join(map(str, s[1:])) for s in (pixels.shape, shape))
                raise InputError(
                    f"{called(row)} is {here} where {called(0)} is {there}: set image_size to resize all of them."
                )
            out[row] = pixels
        release_pages(out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(fill, range(0, len(files), _BLOCK)):  # an error cancels the blocks still waiting
            pass
    return out


def decoded_images(
    key: str,
    parts: Mapping[str, Sequence[Path | IO[bytes]]],
    root: Path,
    image_size: int | Sequence[int] | None,
    channels: int,
    cache: bool,
    cache_dir: str | Path | None,
    files: Sequence[Path] | None = None,
    chosen: object = None,
    name: Callable[[str, int], str] | None = None,
    exif_orientation: bool = False,
) -> dict[str, Array]:
    """Return `<part>_x` of every part, uint8 (N, C, H, W), and the mean and std of the training images.

    Args:
        key: Kind of dataset, with which the name of the cache entry begins.
        parts: The images of "train" and "test".
        root: The folder that they are in.
        image_size: See `image_folder`.
        channels: See `image_folder`.
        cache: See `image_folder`.
        cache_dir: See `image_folder`.
        files: The files that contain the images; None means that each image is a file.
        chosen: Whatever decides which images of the files are used, for the digest of the cache entry.
        name: Returns the name of the i-th image of a part in errors; None means its file.
        exif_orientation: See `read_image`.

    Raises:
        InputError: If `channels` or `image_size` is out of range; or from `decode` and `cl.data.cache.cached`.
    """
    if channels not in (1, 3):
        raise InputError(f"channels={channels}: images are read as 3 (colour) or 1 (grey).")
    size = None if image_size is None else _height_width(image_size)

    def build(allocate: Allocate) -> dict[str, Array]:
        _log.info("Decoding the %d images of %s.", sum(map(len, parts.values())), root)
        return {
            f"{part}_x": decode(
                images,
                channels,
                size,
                partial(allocate, f"{part}_x"),
                None if name is None else partial(name, part),
                exif_orientation,
            )
            for part, images in parts.items()
        }

    every: Any = [image for images in parts.values() for image in images] if files is None else files
    settings = ({part: len(images) for part, images in parts.items()}, size, channels, chosen, exif_orientation)
    return decoded(key, every, root, settings, build, cache, cache_dir)


@checked
def image_folder(
    root: str | Path,
    train: str = "train",
    test: str | None = "test",
    image_size: int | Sequence[int] | None = None,
    channels: int = 3,
    exif_orientation: bool = False,
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
    """Load a tree of images with one folder for each class, `<root>/<train>/<class>/**/*.png`, as uint8 (C, H, W).

    Tiny-ImageNet in its own layout is read with `test="val"`: the file `val_annotations.txt` in that folder lists the
    labels.

    Args:
        root: The folder that contains the training and the test folder.
        train: Name of the training folder.
        test: Name of the test folder; None draws the test set from the training folder.
        image_size: Height and width, or one number for both: every image is cropped at its centre to this aspect ratio
            and resized. None requires that all images have one size.
        channels: 3 for colour, 1 for grey.
        exif_orientation: Whether to turn images as their EXIF data say, as viewers do; else they stay as stored.
        test_fraction: Share of each class that becomes the test set, in (0, 1), if `test` is None.
        seed: Seed of that split.
        name: Its name in reports; None means the name of the root.
        cache: Whether to store the decoded arrays as memory-mapped files.
        cache_dir: The directory of these files; None means `<root>/.clsim-cache`.
        normalize: See `digits`.
        mean: See `digits`.
        std: See `digits`.
        augment: Train-time augmentation of raw batches, or None.

    Raises:
        InputError: If a folder is missing, an image cannot be read, sizes differ without `image_size`, the classes of
            train and test differ, or the two share a file.
    """
    root = expand_path(root)
    parts = list_parts(root, train, test, test_fraction, seed)
    names = sorted({label for _, label in parts["train"]})
    number = {label: c for c, label in enumerate(names)}
    files = {part: [file for file, _ in rows] for part, rows in parts.items()}
    check_disjoint(root.name, files["train"], files["test"])
    arrays = decoded_images(
        "image_folder", files, root, image_size, channels, cache, cache_dir, exif_orientation=exif_orientation
    )
    labels = {f"{part}_y": np.array([number[label] for _, label in rows]) for part, rows in parts.items()}
    return make_dataset(name or root.resolve().name, arrays | labels, names, normalize, mean, std, augment)


def list_parts(
    root: Path, train: str, test: str | None, fraction: float, seed: int
) -> dict[str, list[tuple[Path, str]]]:
    """Return (file, class) of every image of "train" and "test".

    Args:
        root: The folder that contains the training and the test folder.
        train: Name of the training folder.
        test: Name of the test folder; None draws the test set from the training folder.
        fraction: Share of each class that is drawn for the test set.
        seed: Seed of the draw.

    Raises:
        InputError: If a folder is missing, or the classes of train and test differ.
    """
    listed = list_images(root / train)
    names = sorted({label for _, label in listed})
    if test is None:
        kept, drawn = split_validation(torch.tensor([names.index(label) for _, label in listed]), fraction, seed)
        return {part: [listed[i] for i in rows.tolist()] for part, rows in (("train", kept), ("test", drawn))}
    parts = {"train": listed, "test": list_images(root / test)}
    odd = sorted(set(names) ^ {label for _, label in parts["test"]})
    if odd:
        raise InputError(
            f"Class {odd[0]!r} is in only one of {root / train} and {root / test} ({len(odd)} such): "
            "give both the same class folders, or name another test folder."
        )
    return parts


def _height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    height, width = np.broadcast_to(np.asarray(image_size, dtype=int), 2).tolist()
    if min(height, width) < 1:
        raise InputError(f"image_size={image_size}: give pixels, one number or [height, width].")
    return height, width


def check_disjoint(name: str, train_files: Sequence[Path], test_files: Sequence[Path]) -> None:
    """Refuse a test set that shares a file with the training set, even under another path or link.

    Raises:
        InputError: Naming the first shared file.
    """

    def identity(file: Path) -> tuple[int, int]:
        stat = os.stat(file)
        return stat.st_dev, stat.st_ino

    trained = {identity(file) for file in train_files}
    shared = next((file for file in test_files if identity(file) in trained), None)
    if shared is not None:
        raise InputError(f"{shared} is in both the train and the test set of {name!r}: keep the two apart.")
