"""Your own list of images: a CSV or Parquet file with the label, the task or time, and the split of each image."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from cl.data.by_row import by_task
from cl.data.cells import read_targets, read_times
from cl.data.class_names import in_natural_order
from cl.data.dataset import Numbers, make_dataset, split_validation
from cl.data.images import decoded_images
from cl.data.table import Table, read_table, rename
from cl.data.target import TARGETS
from cl.data.task import Order, Scenario, Stream
from cl.errors import InputError, unknown
from cl.files import expand_path
from cl.random import derive
from cl.ranges import checked

SPLITS = ("train", "val", "test")
COLUMNS = ("path", "label", "task", "split", "timestamp")
Whole = npt.NDArray[np.int64]
_TRAIN, _VAL, _TEST = range(3)


@checked
def manifest(
    path: str | Path,
    root: str | Path | None = None,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    image_size: int | Sequence[int] | None = None,
    channels: int = 3,
    exif_orientation: bool = False,
    target: str = "label",
    by: str = "task",
    num_tasks: int | None = None,
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
    """Return a stream of the images that a table lists, one in each row, as uint8 (C, H, W).

    =========  ==============================================================================================
    column     its cells
    =========  ==============================================================================================
    path       the image, absolute or relative to `root`
    label      one label; for "multilabel" any number of labels, for "regression" one number or more, separated
               by ";"; or several columns of 0 and 1, one for each class
    task       the row's task; not needed with by="time"
    split      train, val or test; without the column, test rows are drawn
    timestamp  a number in all rows, or a date and time as in ISO 8601 in all rows (UTC if it names no zone);
               only with by="time"
    =========  ==============================================================================================

    Classes are in ascending order, compared as numbers if all are numbers, else as text. Tasks are in natural order, in
    which s2 comes before s10. With by="time", rows are sorted by time and cut into periods of equal numbers of training
    rows; other rows belong to the last period that began before them. Errors number the rows from 1; in CSV, the header
    is row 1.

    Args:
        path: A CSV file with a header, or a file whose name ends in .parquet.
        root: The folder that paths are relative to; None means that of the table.
        columns: The name in the table of each column, such as {label: species}; several columns as a list.
        image_size: Height and width, or one number for both: every image is cropped at its centre to this aspect ratio
            and resized. None requires that all images have one size.
        channels: 3 for colour, 1 for grey.
        exif_orientation: Whether to turn images as their EXIF data say, as viewers do; else they stay as stored.
        target: "label", "multilabel" or "regression", see `cl.data.target`.
        by: What tasks are: "task", the values of that column, or "time", periods.
        num_tasks: Number of periods; None means 5.
        test_fraction: Share of each class in each task that becomes the test set, in (0, 1), if there is no column
            "split".
        scenario: "class", "task" or "domain"; None means "domain" for periods or if tasks share a class, else "class".
        val_fraction: Share of each task's training rows that becomes the validation set, if no row has the split val.
        name: Name of the stream in reports; None means that of the table.
        cache: Whether to store the decoded images as memory-mapped files.
        cache_dir: The directory of these files; None means `<root>/.clsim-cache`.
        normalize: Whether to subtract `mean` and divide by `std`; else pixels are only divided by 255.
        mean: Mean of each channel, in [0, 1]; None computes it from the training images of all tasks.
        std: Standard deviation of each channel, in the same form.
        augment: Train-time augmentation of raw batches, or None.
        order: The order of the tasks, see `Stream`.
        seed: Seed of test and validation sets and of a shuffled order.

    Raises:
        InputError: If a column or an image is missing, an image cannot be read, a cell cannot be read as a split, label
            or time, a task has no training or test row, a test label is not trained in its task, or an image is in two
            splits; names file and row.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for k in range(4):
        ...     Image.new("RGB", (8, 8)).save(root / f"{k}.png")
        >>> rows = ["path,label,task,split", "0.png,cat,1,train", "1.png,cat,1,test", "2.png,eel,2,train"]
        >>> _ = (root / "all.csv").write_text(chr(10).join([*rows, "3.png,eel,2,test"]))
        >>> stream = manifest(root / "all.csv")
        >>> stream.scenario, stream.class_names, stream.task_names
        ('class', ('cat', 'eel'), ['1', '2'])
    """
    if by not in ("task", "time"):
        raise InputError(f"by={by!r} is unknown: use task or time.")
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    table = _renamed(read_table(path), columns or {})
    root = table.path.parent if root is None else expand_path(root)
    if by == "time":
        table = table.take(np.argsort(read_times(table), kind="stable").tolist())
    files = [root / cell for cell in table.column("path")]
    y, names = read_targets(table, target, (columns or {}).get("label"))
    split = _splits(table)
    _check_files(table, files, split)
    task, tasks = _periods(table, split, num_tasks) if by == "time" else _named_tasks(table, num_tasks)
    if split is None:
        split = _draw(table, y, task, tasks, test_fraction, seed)
    _check_tasks(table, split, task, tasks)
    if target != "regression":
        _check_trained(table, split, task, tasks, y, names)
    val = split[split != _TEST] == _VAL
    if val.any() and val_fraction > 0:
        raise InputError(f"{table.path} has val rows, and val_fraction={val_fraction} would draw more: keep one.")
    rows = {"train": np.flatnonzero(split != _TEST), "test": np.flatnonzero(split == _TEST)}
    arrays = _decode(table, files, rows, root, image_size, channels, cache, cache_dir, exif_orientation)
    arrays |= {f"{part}_y": y[torch.from_numpy(own)] for part, own in rows.items()}
    dataset = make_dataset(name or table.path.stem, arrays, names, normalize, mean, std, augment, target)
    train_task, test_task = (torch.from_numpy(task[own]) for own in rows.values())
    held = torch.from_numpy(val) if val.any() else None
    scenario = scenario or ("domain" if by == "time" else None)
    return by_task(dataset, train_task, test_task, tasks, held, scenario, val_fraction, order, seed)


def _decode(
    table: Table,
    files: Sequence[Path],
    rows: Mapping[str, Whole],
    root: Path,
    image_size: int | Sequence[int] | None,
    channels: int,
    cache: bool,
    cache_dir: str | Path | None,
    exif_orientation: bool,
) -> dict[str, Any]:
    def name(part: str, k: int) -> str:
        i = rows[part][k]
        return f"{files[i]} (row {table.rows[i]} of {table.path})"

    images = {part: [files[i] for i in own] for part, own in rows.items()}
    return decoded_images(
        "manifest",
        images,
        root,
        image_size,
        channels,
        cache,
        cache_dir,
        name=name,
        exif_orientation=exif_orientation,
    )


def _renamed(table: Table, columns: Mapping[str, str | Sequence[str]]) -> Table:
    for name in columns:
        if name not in COLUMNS:
            raise unknown("column", name, COLUMNS)
    return rename(table, {name: given for name, given in columns.items() if name != "label"})


def _splits(table: Table) -> Whole | None:
    if "split" not in table.columns:
        return None
    cells = table.columns["split"]
    for i, cell in enumerate(cells):
        if cell not in SPLITS:
            raise InputError(f"{table.where(i)} has the split {cell!r}: give train, val or test.")
    return np.array([SPLITS.index(cell) for cell in cells])


def _check_files(table: Table, files: Sequence[Path], split: Whole | None) -> None:
    """Refuse rows without a file, and files in two splits, even under another path or link."""
    first: dict[tuple[int, int], int] = {}
    for i, file in enumerate(files):
        try:
            found = os.stat(file)
        except (OSError, ValueError):
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            raise InputError(f"{table.where(i)} names {file}, which is no file: put it there or remove the row.")
        j = first.setdefault((found.st_dev, found.st_ino), i)
        if split is None and j != i:
            raise InputError(
                f"{table.where(i)} names {file} again, after row {table.rows[j]}, so that it could be drawn "
                "for training and test: remove one, or add a split column."
            )
        if split is not None and split[i] != split[j]:
            raise InputError(
                f"{table.where(i)} puts {file} into {SPLITS[split[i]]}, and row {table.rows[j]} into "
                f"{SPLITS[split[j]]}: keep the two apart."
            )


def _named_tasks(table: Table, num_tasks: int | None) -> tuple[Whole, list[str]]:
    cells = table.column("task")
    empty = next((i for i, cell in enumerate(cells) if not cell), None)
    if empty is not None:
        raise InputError(f"{table.where(empty)} has no task: give one, or use by=time.")
    names = in_natural_order(f"Tasks of {table.path}", cells)
    if num_tasks not in (None, len(names)):
        raise InputError(f"num_tasks={num_tasks}, but {table.path} names {len(names)} tasks: leave num_tasks out.")
    number = {task: t for t, task in enumerate(names)}
    return np.array([number[cell] for cell in cells]), names


def _periods(table: Table, split: Whole | None, num_tasks: int | None) -> tuple[Whole, list[str]]:
    """Cut rows, which are sorted by time, into periods; return the period of each row, and the periods' names."""
    count = 5 if num_tasks is None else num_tasks
    trained = np.arange(len(table)) if split is None else np.flatnonzero(split == _TRAIN)
    if not 1 <= count <= len(trained):
        raise InputError(f"num_tasks={count} for the {len(trained)} training rows of {table.path}: give fewer periods.")
    parts = np.array_split(trained, count)
    times = np.array(read_times(table))
    # A row at a period's first instant belongs to that period, and a row before all training rows to the first period.
    task = np.searchsorted(times[[part[0] for part in parts]], times, side="right") - 1
    task = task.clip(0)
    for t, part in enumerate(parts):
        task[part] = t
    cells = table.columns["timestamp"]
    return task, [f"{cells[part[0]]} – {cells[part[-1]]}" for part in parts]


def _draw(table: Table, y: Tensor, task: Whole, tasks: Sequence[str], fraction: float, seed: int) -> Whole:
    """Draw test rows of every task; return the split of each row."""
    split = np.zeros(len(table), dtype=np.int64)
    for t, name in enumerate(tasks):
        rows = np.flatnonzero(task == t)
        try:
            _, drawn = split_validation(y[torch.from_numpy(rows)], fraction, derive(seed, "test", t))
        except InputError as error:
            raise InputError(
                f"Task {name!r} of {table.path}, that of row {table.rows[rows[0]]}, has too few rows of a class "
                f"to draw test_fraction={fraction}: give it more, another share, or a split column."
            ) from error
        split[rows[drawn.numpy()]] = _TEST
    return split


def _check_tasks(table: Table, split: Whole, task: Whole, tasks: Sequence[str]) -> None:
    present = np.zeros((len(tasks), len(SPLITS)), dtype=bool)
    present[task, split] = True
    for t, name in enumerate(tasks):
        for part in (_TRAIN, _TEST):
            if not present[t, part]:
                row = table.rows[np.flatnonzero(task == t)[0]]
                raise InputError(
                    f"Task {name!r} of {table.path}, that of row {row}, has no {SPLITS[part]} row: give it one."
                )


def _check_trained(
    table: Table, split: Whole, task: Whole, tasks: Sequence[str], y: Tensor, names: Sequence[str]
) -> None:
    """Refuse test and validation rows of labels that their task never trains."""
    has = F.one_hot(y, len(names)).bool() if y.ndim == 1 else y > 0
    trained = torch.zeros(len(tasks), len(names), dtype=torch.bool)
    for t in range(len(tasks)):
        trained[t] = has[torch.from_numpy((task == t) & (split == _TRAIN))].any(0)
    untrained = has & ~trained[torch.from_numpy(task)]
    if untrained.any():
        i, c = (int(k) for k in untrained.nonzero()[0])
        raise InputError(
            f"{table.where(i)} has the {SPLITS[split[i]]} label {names[c]!r}, which no train row of its task "
            f"{tasks[task[i]]!r} has: leave it out or add train rows."
        )
