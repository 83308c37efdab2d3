"""Your own folders of images: one folder for each task, and in it one folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Interval
from torch import nn

from cl.data.by_row import by_task
from cl.data.class_names import in_natural_order
from cl.data.dataset import Numbers, make_dataset
from cl.data.images import check_disjoint, decoded_images, folders_in, list_parts
from cl.data.task import Order, Scenario, Stream
from cl.errors import InputError, unknown
from cl.files import expand_path
from cl.random import derive
from cl.ranges import checked

PATTERNS = ("task/split/class", "split/task/class")


@checked
def image_folders(
    root: str | Path,
    folders: Sequence[str] | None = None,
    train: str = "train",
    test: str | None = "test",
    pattern: str = "task/split/class",
    image_size: int | Sequence[int] | None = None,
    channels: int = 3,
    exif_orientation: bool = False,
    test_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.2,
    scenario: Scenario | None = None,
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    name: str | None = None,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    normalize: bool = True,
    mean: Numbers = None,
    std: Numbers = None,
    augment: nn.Module | None = None,
    order: Order = None,
    seed: int = 0,
) -> Stream:
    """Return a stream with a task for each folder, `<root>/<task>/<train>/<class>/**/*.png`, as uint8 (C, H, W).

    Classes of one name are one class in the whole stream; they are numbered as they first appear, task by task. To
    split the classes of one tree into tasks, use `stream=split dataset=image_folder`. Hidden files and those of a
    system are skipped, see `cl.data.images.list_images`.

    Args:
        root: The folder that contains all others.
        folders: The names of the tasks' folders, in order; None means all, in natural order, in which s2 comes before
            s10. The classes of a task are in alphabetical order.
        train: Name of the training folder; "." if the folders of classes are in the task's folder itself.
        test: Name of the test folder; None draws the test set from the training folder.
        pattern: The levels of folders: "task/split/class", or "split/task/class" for
            `<root>/<train>/<task>/<class>/**/*.png`.
        image_size: Height and width, or one number for both: every image is cropped at its centre to this aspect ratio
            and resized. None requires that all images have one size.
        channels: 3 for colour, 1 for grey.
        exif_orientation: Whether to turn images as their EXIF data say, as viewers do; else they stay as stored.
        test_fraction: Share of each class of a task that becomes the test set, in (0, 1), if `test` is None.
        scenario: "class", "task" or "domain"; None means "class" if no two tasks share a class, else "domain".
        val_fraction: Share of each task's training images that becomes the validation set, in [0, 1).
        name: Name of the stream in reports; None means the name of the root.
        cache: Whether to store the decoded images as memory-mapped files.
        cache_dir: The directory of these files; None means `<root>/.clsim-cache`.
        normalize: Whether to subtract `mean` and divide by `std`; else pixels are only divided by 255.
        mean: Mean of each channel, in [0, 1]; None computes it from the training images of all tasks.
        std: Standard deviation of each channel, in the same form.
        augment: Train-time augmentation of raw batches, or None.
        order: The order of the tasks; labels do not depend on it. See `Stream`.
        seed: Seed of test and validation sets and of a shuffled order.

    Raises:
        InputError: If a folder is missing, an image cannot be read, sizes differ without `image_size`, training and
            test set of a task differ in their classes, or a test image is in the training set of a task.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder in ("day/train/cat", "day/test/cat", "night/train/cat", "night/test/cat"):
        ...     (root / folder).mkdir(parents=True)
        ...     Image.new("RGB", (8, 8)).save(root / folder / "0.png")
        >>> stream = image_folders(root)
        >>> stream.task_names, stream.scenario, stream.class_names
        (['day', 'night'], 'domain', ('cat',))
    """
    root = expand_path(root)
    if pattern not in PATTERNS:
        raise unknown("pattern", pattern, PATTERNS)
    above = pattern == PATTERNS[1]
    tasks = [str(folder) for folder in folders] if folders is not None else _tasks(root, train, test, above)
    if not tasks:
        raise InputError(f"folders=[] of {root}: name at least one, or leave it out to take all.")
    sides = {task: (f"{train}/{task}", test and f"{test}/{task}") if above else (train, test) for task in tasks}
    listed = [
        list_parts(root if above else root / task, *sides[task], test_fraction, derive(seed, "test", task))
        for task in tasks
    ]
    rows = {p: [(t, *row) for t, parts in enumerate(listed) for row in parts[p]] for p in ("train", "test")}
    names = list(dict.fromkeys(label for _, _, label in rows["train"]))
    number = {label: c for c, label in enumerate(names)}
    files = {part: [file for _, file, _ in own] for part, own in rows.items()}
    name = name or root.resolve().name
    check_disjoint(name, files["train"], files["test"])
    arrays = decoded_images(
        "image_folders", files, root, image_size, channels, cache, cache_dir, exif_orientation=exif_orientation
    )
    labels = {f"{part}_y": torch.tensor([number[label] for _, _, label in own]) for part, own in rows.items()}
    train_task, test_task = (torch.tensor([t for t, _, _ in own]) for own in rows.values())
    dataset = make_dataset(name, arrays | labels, names, normalize, mean, std, augment)
    return by_task(dataset, train_task, test_task, tasks, None, scenario, val_fraction, order, seed)


def _tasks(root: Path, train: str, test: str | None, above: bool) -> list[str]:
    """Return the names of the tasks' folders; with `above`, they are inside the training folder, else outside."""
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: put one folder for each task into it, or name another.")
    if not above and train != "." and (root / train).is_dir():
        inner = root / train
        deep = any(folders_in(inner / name) for name in folders_in(inner))
        split = "split its classes with stream=split dataset=image_folder"
        if deep:
            raise InputError(
                f"{root} holds {train!r} itself: if the folders in {inner} are tasks, set "
                f"stream.pattern={PATTERNS[1]}; if they are classes, {split}."
            )
        raise InputError(f"{root} holds {train!r} itself, so it is one dataset: {split}, or name its tasks' folders.")
    parent = root / train if above else root
    if not parent.is_dir():
        raise InputError(f"{parent} is not a folder: put one folder for each task into it, or name another.")
    tasks = folders_in(parent)
    if not tasks:
        raise InputError(f"{parent} holds no folder: put one folder for each task into it.")
    untrained = set(folders_in(root / test)) - set(tasks) if above and test and (root / test).is_dir() else ()
    if untrained:
        raise InputError(
            f"{root / str(test)} has the task {min(untrained)!r}, which {parent} lacks: give it training images or "
            "name the tasks in folders."
        )
    return in_natural_order(f"Tasks of {root}", tasks)
