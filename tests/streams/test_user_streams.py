"""The user's own data: arrays, folders, tables and Hugging Face datasets become what was written, or are refused."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import get_method, instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

import cl.data.cache
import cl.data.images
import cl.data.rows
import cl.data.task
from cl.data.augment import RandomCropFlip
from cl.data.by_row import Float32
from cl.data.dataset import channel_moments
from cl.data.huggingface import huggingface
from cl.data.images import read_image
from cl.data.rows import Mapped
from cl.data.sources import digits
from cl.data.table import read_table
from cl.errors import InputError
from cl.streams.from_arrays import from_arrays
from cl.streams.image_folders import image_folders
from cl.streams.manifest import manifest
from cl.streams.split import split
from cl.testing import check_stream


def picture(seed: int, height: int = 6, width: int = 6):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chw(seed: int):
    return torch.from_numpy(picture(seed).transpose(2, 0, 1).copy())


def save(file: Path, pixels: Any, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)
    return file


def refuses(words: str, make: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError, match=words) as caught:
        stream = make(*arguments, **options)
        stream.check()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


# Arrays


def toy(num_rows: int = 24, images: bool = True, num_classes: int = 6, seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    arrays = {}
    for part in ("train", "test"):
        x = draw.integers(0, 256, (num_rows, 3, 5, 4), dtype=np.uint8) if images else draw.normal(size=(num_rows, 7))
        arrays |= {f"{part}_x": x, f"{part}_y": np.arange(num_rows) % num_classes}
    return arrays


@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["uint8", "float32", "float64", "float16"]),
    integer=st.sampled_from(["uint8", "int16", "int64", "uint64"]),
    shape=st.sampled_from(["array", "tensor", "file"]),
    num_tasks=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_each_task_holds_the_rows_that_say_so(seed, kind, integer, shape, num_tasks):
    draw = np.random.default_rng(seed)
    classes = np.sort(draw.choice(200, 5, replace=False))  # with gaps
    own = [draw.choice(5, draw.integers(1, 6), replace=False) for _ in range(num_tasks)]
    called = np.sort(draw.choice(100, num_tasks, replace=False)) - 50
    columns: dict[str, Any] = {}
    for part, copies in (("train", 3), ("test", 2)):
        task = np.concatenate([np.full(copies * len(c), t) for t, c in enumerate(own)])
        label = np.concatenate([np.tile(c, copies) for c in own])
        rows = draw.permutation(len(task))
        x = draw.integers(0, 256, (len(task), 3, 2, 4)).astype(kind)
        columns |= {
            f"{part}_x": x,
            f"{part}_y": classes[label[rows]].astype(integer),
            f"{part}_task": called[task[rows]],
        }
    with tempfile.TemporaryDirectory() as folder:
        given_as = dict(columns)
        for name, column in columns.items() if shape != "array" else ():
            if shape == "file":
                np.save(f"{folder}/{name}.npy", column)
            given_as[name] = f"{folder}/{name}.npy" if shape == "file" else torch.from_numpy(column)
        stream = from_arrays(**given_as)
        check_stream(stream)
        assert stream.task_names == [str(value) for value in called]
        assert stream.input_dtype == (torch.uint8 if kind == "uint8" else torch.float32)
        for t, task in enumerate(stream):
            for part in ("train", "test"):
                rows = np.flatnonzero(columns[f"{part}_task"] == called[t])
                x, y, label = getattr(task, part).tensors()
                assert np.array_equal(x.numpy(), columns[f"{part}_x"][rows])
                assert [stream.class_names[c] for c in y] == [str(c) for c in columns[f"{part}_y"][rows]]
                assert label.unique().tolist() == [t]
    used = np.concatenate(own)
    assert stream.num_classes == len(set(used)) and stream.scenario == (
        "class" if len(set(used)) == len(used) else "domain"
    )


def test_without_tasks_the_classes_are_split_as_by_split():
    data = digits()
    arrays = {"train_x": data.train_x, "train_y": data.train_y, "test_x": data.test_x, "test_y": data.test_y}
    ours, theirs = from_arrays(**arrays), split(data, num_tasks=5)
    check_stream(ours)
    assert (ours.task_names, ours.class_names, ours.scenario) == (theirs.task_names, theirs.class_names, "class")
    for scenario in ("class", "domain"):
        ours, theirs = from_arrays(**arrays, scenario=scenario), split(data, num_tasks=5, scenario=scenario)
        assert ours.num_classes == theirs.num_classes
        for a, b in zip(ours, theirs, strict=True):
            for part in ("train", "test"):
                assert all(map(torch.equal, getattr(a, part).tensors(), getattr(b, part).tensors()))
        view = ours.normalize(data.test_x)
        assert torch.equal(view, theirs.normalize(data.test_x)), "the same mean and standard deviation"


@pytest.mark.parametrize(
    ("num_classes", "num_tasks", "sizes"),
    [(7, None, [2, 2, 1, 1, 1]), (3, None, [1, 1, 1]), (7, 2, [4, 3]), (4, 1, [4])],
)
def test_classes_are_split_as_evenly_as_they_can_be(num_classes, num_tasks, sizes):
    stream = from_arrays(**toy(4 * num_classes, num_classes=num_classes), num_tasks=num_tasks)
    assert [len(task.classes) for task in stream] == sizes
    assert [c for task in stream for c in task.classes] == list(range(num_classes))
    assert stream.task_names[0] == ["0", "0+1", "0+1+2", "0 … 3"][sizes[0] - 1]
    domain = from_arrays(**toy(4 * num_classes, num_classes=num_classes), num_tasks=num_tasks, scenario="domain")
    assert [task.classes for task in domain] == [tuple(range(size)) for size in sizes]
    check_stream(domain)


def test_names_and_order():
    stream = from_arrays(**toy(), num_tasks=3, class_names="abcdef", order=[2, 0, 1], name="letters")
    assert stream.task_names == ["e+f", "a+b", "c+d"] and stream.class_names == tuple("abcdef")
    assert [task.classes for task in stream] == [(4, 5), (0, 1), (2, 3)] and stream.order == (2, 0, 1)
    assert stream[0].train.tasks.unique().tolist() == [0] and stream.name == "letters"
    assert from_arrays(**toy(), num_tasks=6, order="shuffled", seed=3).order != tuple(range(6))


def test_targets_of_other_kinds():
    draw, task = np.random.default_rng(0), np.repeat([0, 1], 12)
    several = np.zeros((24, 5), dtype=bool)
    several[:12, :3], several[12:, 3:] = draw.random((12, 3)) < 0.6, draw.random((12, 2)) < 0.6
    several[[0, 12]] = [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    arrays = toy(images=False) | {"train_y": several, "test_y": several, "train_task": task, "test_task": task}
    stream = from_arrays(**arrays, target="multilabel", class_names="abcde")
    check_stream(stream)
    assert stream.scenario == "class" and [task.classes for task in stream] == [(0, 1, 2), (3, 4)]
    assert np.array_equal(stream[1].train.labels.numpy(), several[12:]) and stream.target.name == "multilabel"
    several[0, 4] = True
    assert from_arrays(**arrays, target="multilabel").scenario == "domain"
    for y in (draw.normal(size=(24, 2)), draw.integers(0, 9, 24)):
        stream = from_arrays(**{**arrays, "train_y": y, "test_y": y}, target="regression")
        check_stream(stream)
        assert stream.scenario == "domain" and stream.num_classes == (2 if y.ndim == 2 else 1)
        expected = y[12:].astype(np.float32)
        assert np.array_equal(stream[1].test.labels.numpy(), expected.reshape(12, -1))


def test_images_are_normalised_by_the_training_set_and_floats_are_left():
    arrays = toy()
    stream = from_arrays(**arrays)
    x = torch.from_numpy(arrays["train_x"])
    view = stream.normalize(x).double()
    assert view.mean((0, 2, 3)) == pytest.approx(torch.zeros(3), abs=1e-6)
    assert view.std((0, 2, 3), correction=0) == pytest.approx(torch.ones(3), abs=1e-6)
    augment = RandomCropFlip(padding=1)
    assert stream.augment is None and from_arrays(**arrays, augment=augment).augment is augment
    given_values = from_arrays(**arrays, mean=[0.5], std=[0.25]).normalize(x)
    assert torch.allclose(given_values, (x / 255 - 0.5) / 0.25, atol=1e-6)
    assert torch.equal(from_arrays(**arrays, normalize=False).normalize(x), x * (torch.tensor(1.0) / 255))
    vectors = toy(images=False)
    assert torch.equal(from_arrays(**vectors).normalize(x.float()), x.float())
    assert torch.allclose(from_arrays(**vectors, mean=[1.0], std=[2.0]).normalize(x.float()), (x.float() - 1) / 2)


@pytest.mark.parametrize("kind", ["uint8", "float64"])
def test_large_files_stay_where_they_are(tmp_path, monkeypatch, kind):
    arrays = toy()
    small = from_arrays(**{k: v.astype(kind) if k.endswith("_x") else v for k, v in arrays.items()}, val_fraction=0.25)
    for name, column in arrays.items():
        np.save(tmp_path / f"{name}.npy", column.astype(kind) if name.endswith("_x") else column)
    for module in (cl.data.rows, cl.data.task):
        monkeypatch.setattr(module, "RESIDENT", 100)
    monkeypatch.setattr("cl.data.rows.PART", 500)  # several parts
    stream = from_arrays(**{name: str(tmp_path / f"{name}.npy") for name in arrays}, val_fraction=0.25)
    check_stream(stream)
    assert isinstance(stream[0].train.x, Mapped if kind == "uint8" else Float32) and not stream[0].train.resident
    for ours, theirs in zip(stream, small, strict=True):
        for part in ("train", "val", "test"):
            assert all(map(torch.equal, getattr(ours, part).tensors(), getattr(theirs, part).tensors()))
    np.save(tmp_path / "columns.npy", np.asfortranarray(arrays["test_x"].astype(kind)))
    refuses("columns.npy is stored in Fortran order", from_arrays, **arrays | {"test_x": tmp_path / "columns.npy"})
    x = small[0].train.x[:5]
    assert torch.allclose(stream.normalize(x), small.normalize(x), atol=1e-6)
    if kind == "uint8":
        for ours, theirs in zip(channel_moments(stream[0].train.x), channel_moments(small[0].train.x), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-12)


def test_validation_is_a_share_of_every_class_of_every_task_and_drawn_apart():
    arrays = toy(120, num_classes=3)
    when = np.repeat([0, 1], 60)
    stream = from_arrays(**arrays, train_task=when, test_task=when, val_fraction=0.25)
    check_stream(stream)
    for task in stream:
        assert task.val.labels.bincount().tolist() == [5, 5, 5] and task.train.labels.bincount().tolist() == [15] * 3
        assert (
            sorted([*task.val.index.tolist(), *task.train.index.tolist()])
            == np.flatnonzero(when == task.index).tolist()
        )
    assert (stream[1].val.index - 60).tolist() != stream[0].val.index.tolist()
    again, other = (from_arrays(**arrays, train_task=when, test_task=when, val_fraction=0.25, seed=s) for s in (0, 1))
    assert torch.equal(again[0].val.index, stream[0].val.index)
    assert not torch.equal(other[0].val.index, stream[0].val.index)


def spoilt(part: str, row: int, value: float) -> dict[str, Any]:
    x = toy(images=False)[part]
    x[row, 2] = value
    return {part: x}


TASK = np.repeat([4, 9], 12)
BAD_ARRAYS: list[tuple[dict[str, Any], str]] = [
    (
        {"train_x": np.zeros((24, 32, 32, 3), np.uint8)},
        r"train_x has shape .24, 32, 32, 3., which looks like .N, H, W, C.",
    ),
    (
        {"train_x": np.zeros((24, 32, 32), np.uint8)},
        r"train_x has shape .24, 32, 32., images without channels.*\[:, None\]",
    ),
    ({"test_x": np.zeros((24, 7), np.int64)}, "test_x holds int64: give uint8 images"),
    ({"test_x": "nowhere.npy"}, "nowhere.npy cannot be read as a .npy array"),
    ({"test_x": np.array(["a"] * 24)}, "test_x is not an array of numbers"),
    ({"test_x": np.zeros((24, 6))}, r"\(7,\) float32 in the train set but \(6,\) float32 in the test set"),
    ({"train_x": np.zeros((23, 7))}, "train set of 'arrays' has 23 inputs but 24 labels"),
    ({"train_x": np.zeros((0, 7)), "train_y": np.zeros(0, int), "test_y": np.zeros(0, int)}, "train set .* is empty"),
    (spoilt("train_x", 7, np.nan), "train set of 'arrays' has a NaN or infinite value in row 7"),
    (spoilt("test_x", 23, np.inf), "test set of 'arrays' has a NaN or infinite value in row 23"),
    (spoilt("train_x", 5, 1e300), "train set of 'arrays' has a NaN or infinite value in row 5"),
    ({"train_y": np.zeros(24)}, r"train_y holds float64 of shape \(24,\): give integers"),
    ({"test_y": np.arange(24) % 8}, "Row 6 of test_y has label 6, which train_y never has"),
    ({"class_names": ["a"]}, "class_names has 1 names where train_y has 6 classes"),
    ({"target": "labels"}, "no target called 'labels'"),
    ({"scenario": "tasks"}, "scenario='tasks' is unknown"),
    ({"train_task": TASK}, "One of train_task and test_task is missing"),
    ({"train_task": TASK, "test_task": TASK[:20]}, "test_task has 20 rows for 24 of test_x"),
    ({"train_task": TASK, "test_task": TASK * 0 + 4}, "Task '9' of 'arrays' has no test row"),
    ({"train_task": TASK * 0 + 4, "test_task": TASK}, "Task '9' of 'arrays' has no training row"),
    ({"train_task": TASK, "test_task": TASK, "num_tasks": 3}, "num_tasks=3, but train_task names 2 tasks"),
    ({"train_task": TASK, "test_task": TASK, "scenario": "class"}, "Class 0 is in tasks 0 and 1"),
    ({"num_tasks": 7}, "num_tasks=7 for 6 classes"),
    ({"num_tasks": 0}, "num_tasks=0 for 6 classes"),
    ({"target": "regression"}, "target=regression cannot be split by class"),
    ({"mean": [0.0, 0.0], "std": [1.0]}, r"mean=\[0.0, 0.0\] .* does not fit"),
    ({"mean": [0.0], "std": [0.0]}, "std=.* is not above 0"),
    ({"val_fraction": 1.0}, r"from_arrays\.val_fraction=1\.0 must be 0 or more and below 1"),
    ({"target": "multilabel", "train_y": np.full((24, 2), 2)}, r"has the target \[2.0, 2.0\] in row 0: give 0 or 1"),
    ({"target": "regression", "train_y": np.full(24, np.nan)}, r"has the target \[nan\] in row 0: give finite"),
]


@pytest.mark.parametrize(("options", "words"), BAD_ARRAYS, ids=[words[:40] for _, words in BAD_ARRAYS])
def test_arrays_are_refused_in_one_sentence(options, words):
    refuses(words, from_arrays, **{**toy(images=False), **options})


def test_narrow_images_are_not_taken_for_transposed_ones():
    x = np.zeros((24, 13, 4, 4), np.uint8)
    assert from_arrays(**toy() | {"train_x": x, "test_x": x}).input_shape == (13, 4, 4)


# Pictures


def test_pictures_of_which_pillow_warns(tmp_path, monkeypatch):
    fine = save(tmp_path / "fine.tif", picture(0), tiffinfo={270: "x" * 60})
    broken = bytearray(fine.read_bytes())
    entry = broken.index(struct.pack("<HHI", 270, 2, 61))
    broken[entry + 4 : entry + 8] = struct.pack("<I", 10**6)  # more text than the file has bytes
    (tmp_path / "broken.tif").write_bytes(broken)
    assert np.array_equal(read_image(fine), chw(0))
    refuses("broken.tif cannot be read as an image .*larger than file", read_image, tmp_path / "broken.tif")
    cut = fine.read_bytes()[:120]
    (tmp_path / "cut.tif").write_bytes(cut)
    refuses("cut.tif cannot be read as an image", read_image, tmp_path / "cut.tif")

    exif = Image.Exif()
    exif[270] = "x" * 60
    photo = save(tmp_path / "photo.jpg", picture(0), exif=exif)
    pixels = read_image(photo)
    spoilt_exif = bytearray(photo.read_bytes())
    entry = next(
        spoilt_exif.index(struct.pack(f"{o}HHI", 270, 2, 61))
        for o in "<>"
        if struct.pack(f"{o}HHI", 270, 2, 61) in spoilt_exif
    )
    spoilt_exif[entry + 4 : entry + 12] = b"\x00\x00\x00\xff" * 2
    photo.write_bytes(spoilt_exif)
    assert np.array_equal(read_image(photo), pixels), "EXIF holds no pixels"

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)  # of 36: Pillow warns, and from twice as many it fails
    refuses("fine.tif cannot be read as an image .*exceeds limit", read_image, fine)


def test_palettes_with_transparent_colours_are_read_as_opaque(tmp_path):
    indexed = Image.fromarray(picture(0)).quantize(8)
    expected = np.asarray(indexed.convert("RGB")).transpose(2, 0, 1)
    indexed.save(tmp_path / "clear.png", transparency=bytes([0, 128, 255]))
    assert np.array_equal(read_image(tmp_path / "clear.png"), expected)


# Folders of images


def folders(root: Path, plan: dict[str, list[str]], parts: tuple[str, ...] = ("train", "test"), count: int = 2) -> Path:
    """Images whose seeds say task, part, class and position."""
    for t, (task, classes) in enumerate(plan.items()):
        for p, part in enumerate(parts):
            for c, label in enumerate(classes):
                for i in range(count):
                    save(root / task / part / label / f"{i}.png", picture(1000 * t + 100 * p + 10 * c + i))
    return root


NIGHT = {"day": ["cat", "dog"], "night": ["dog", "ant"]}


def test_folders_become_tasks_and_classes_are_matched_by_name(tmp_path):
    root = folders(tmp_path, NIGHT)
    (root / ".hidden").mkdir()
    stream = image_folders(root)
    check_stream(lambda: image_folders(root))
    assert (stream.task_names, stream.class_names) == (["day", "night"], ("cat", "dog", "ant"))
    assert (stream.scenario, stream.num_classes, stream.name) == ("domain", 3, tmp_path.name)
    # Within a task classes stand in the order of the alphabet: ant, the second of night's list, comes first.
    expected = {0: ([0, 1, 10, 11], [0, 0, 1, 1]), 1: ([1010, 1011, 1000, 1001], [2, 2, 1, 1])}
    for t, (seeds, labels) in expected.items():
        for p, part in enumerate(("train", "test")):
            x, y, _ = getattr(stream[t], part).tensors()
            assert torch.equal(x, torch.stack([chw(seed + 100 * p) for seed in seeds])) and y.tolist() == labels
    x = torch.cat([task.train.tensors()[0] for task in stream])
    assert stream.normalize(x).mean((0, 2, 3)) == pytest.approx(torch.zeros(3), abs=1e-6)
    backward = image_folders(root, folders=["night", "day"])
    assert backward.task_names == ["night", "day"] and backward.class_names == ("ant", "dog", "cat")
    assert image_folders(root, order=[1, 0]).task_names == ["night", "day"]


def test_folders_with_classes_of_their_own(tmp_path):
    root = folders(tmp_path, {"2": ["cat", "dog"], "10": ["ant"]})
    stream = image_folders(root, image_size=4, channels=1)
    assert (stream.scenario, stream.task_names, stream.input_shape) == ("class", ["2", "10"], (1, 4, 4))
    assert [task.classes for task in stream] == [(0, 1), (2,)]
    stream.check()
    assert image_folders(root, scenario="task").scenario == "task"


def test_test_sets_drawn_from_folders_do_not_depend_on_other_tasks(tmp_path):
    root = folders(tmp_path, NIGHT, parts=("",), count=10)
    stream = image_folders(root, train=".", test=None, test_fraction=0.3, val_fraction=0.2)
    check_stream(stream)
    for task in stream:
        sizes = [len(part) for part in (task.train, task.val, task.test)]
        assert sizes == [11, 3, 6] and sorted(task.test.labels.bincount().tolist())[-2:] == [3, 3]
    alone = image_folders(root, folders=["night"], train=".", test=None, test_fraction=0.3)
    assert torch.equal(alone[0].test.tensors()[0], stream[1].test.tensors()[0])
    other = image_folders(root, folders=["night"], train=".", test=None, test_fraction=0.3, seed=1)
    assert not torch.equal(other[0].test.tensors()[0], stream[1].test.tensors()[0])


@pytest.fixture
def decodes(monkeypatch):
    """The files that were decoded."""
    found: list[Any] = []
    original = cl.data.images.read_image

    def counted(file: Any, *arguments: Any) -> Any:
        found.append(file)
        return original(file, *arguments)

    monkeypatch.setattr(cl.data.images, "read_image", counted)
    return found


def test_a_cache_is_used_until_a_file_changes_or_it_is_damaged(tmp_path, monkeypatch, decodes):
    root = folders(tmp_path, NIGHT)
    first = image_folders(root)
    count = len(decodes)
    assert count >= 16
    again = image_folders(root)
    assert len(decodes) == count and all(
        torch.equal(a.test.tensors()[0], b.test.tensors()[0]) for a, b in zip(first, again, strict=True)
    )
    monkeypatch.setattr(cl.data.rows, "RESIDENT", 100)
    assert isinstance(image_folders(root)[0].train.x, Mapped), "what is large is read from the cache"
    assert torch.equal(image_folders(root)[1].train.tensors()[0], first[1].train.tensors()[0])
    monkeypatch.undo()

    changed = save(root / "night" / "test" / "ant" / "1.png", picture(77))
    assert torch.equal(image_folders(root)[1].test.tensors()[0][1], chw(77))
    stat = changed.stat()
    save(changed, 255 - picture(77))  # where even the size were the same, the time is not
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert torch.equal(image_folders(root)[1].test.tensors()[0][1], 255 - chw(77))

    expected = image_folders(root)[1].train.tensors()[0]
    for entry in (root / ".clsim-cache").iterdir():
        with open(entry / "train_x.npy", "r+b") as stream:
            stream.truncate(200)
    assert torch.equal(image_folders(root)[1].train.tensors()[0], expected)
    for entry in (root / ".clsim-cache").iterdir():
        (entry / "test_x.npy").unlink()
    assert torch.equal(image_folders(root)[1].train.tensors()[0], expected)


def test_bad_folders_are_refused_and_nothing_is_left(tmp_path):
    refuses("nowhere is not a folder: put one folder for each task", image_folders, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refuses("empty holds no folder", image_folders, tmp_path / "empty")
    one = folders(tmp_path / "one", {"": ["cat"]})
    refuses("one holds 'train' itself, so it is one dataset.*dataset=image_folder", image_folders, one)
    root = folders(tmp_path / "root", NIGHT)
    refuses("dusk.train is not a folder", image_folders, root, folders=["day", "dusk"])
    refuses(r"test_fraction=1\.5 must be above 0 and below 1", image_folders, root, test=None, test_fraction=1.5)
    refuses("channels=2", image_folders, root, channels=2)
    refuses("Class 0 stands in|Class 1 is in tasks 0 and 1", image_folders, root, scenario="class")
    shutil.rmtree(root / ".clsim-cache")

    odd = save(root / "night" / "train" / "dog" / "5.png", picture(0, 6, 7))
    refuses("dog.5.png is 6x7 where .*day.*0.png is 6x6: set image_size", image_folders, root)
    odd.write_bytes(odd.read_bytes()[:70])
    refuses("dog.5.png cannot be read as an image", image_folders, root)
    odd.unlink()
    extra = save(root / "night" / "test" / "owl" / "0.png", picture(0))
    refuses("Class 'owl' is in only one of", image_folders, root)
    extra.unlink()
    extra.parent.rmdir()
    link = root / "night" / "test" / "dog" / "link.png"
    link.symlink_to(root / "day" / "train" / "cat" / "0.png")  # another task trains it
    refuses("link.png is in both the train and the test set", image_folders, root)
    link.unlink()
    assert not os.path.exists(root / ".clsim-cache") or os.listdir(root / ".clsim-cache") == []
    image_folders(root).check()


# Tables


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Sixty images, whose names are their seeds."""
    root = tmp_path_factory.mktemp("gallery")
    for seed in range(60):
        save(root / f"{seed}.png", picture(seed))
    return root


def seeds(data: Any) -> list[int]:
    """Return which images of the gallery a part holds."""
    known = {chw(seed).numpy().tobytes(): seed for seed in range(60)}
    return [known[x.numpy().tobytes()] for x in data.tensors()[0]]


@given(seed=st.integers(0, 2**31), numbers=st.booleans(), parquet=st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_table_says_task_label_and_split_of_each_image(gallery, seed, numbers, parquet):
    draw = np.random.default_rng(seed)
    tasks = [2, 10] if numbers else ["b", "a"]
    labels = [3, 30, 4] if numbers else ["x y", "NA", "ü"]
    rows = []
    for k, path in enumerate(draw.permutation(60)):
        once = k < 12  # every task has every label in every split
        label = labels[k % 3] if once else labels[draw.integers(3)]
        task = tasks[k % 2] if once else tasks[draw.integers(2)]
        part = ("train", "test")[k // 6] if once else ("train", "val", "test")[draw.integers(3)]
        rows.append({"path": f"{path}.png", "label": label, "task": task, "split": part})
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "all.csv", rows)
        if parquet and importlib.util.find_spec("pyarrow"):
            pa, pq = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
            path = path.with_suffix(".parquet")
            pq.write_table(pa.Table.from_pylist(rows), path)
        stream = manifest(path, root=gallery, cache_dir=folder)
        check_stream(stream)
        assert stream.task_names == ([str(t) for t in tasks] if numbers else ["a", "b"])
        assert list(stream.class_names) == (["3", "4", "30"] if numbers else ["NA", "x y", "ü"])
        assert stream.scenario == "domain" and stream.name == "all"
        for task in stream:
            for part in ("train", "val", "test"):
                own = [r for r in rows if str(r["task"]) == task.name and r["split"] == part]
                data = getattr(task, part)
                if data is None:
                    assert not own
                    continue
                assert [f"{seed}.png" for seed in seeds(data)] == [r["path"] for r in own]
                assert [stream.class_names[c] for c in data.labels] == [str(r["label"]) for r in own]


def test_tasks_with_labels_of_their_own_are_class_incremental(gallery, tmp_path):
    rows = [{"path": f"{k}.png", "label": "abcd"[k % 4], "task": k % 4 // 2, "split": "train"} for k in range(40)]
    rows += [{**row, "path": f"{40 + k}.png", "split": "test"} for k, row in enumerate(rows[:8])]
    path = write(tmp_path / "all.csv", rows)
    stream = manifest(path, gallery, cache=False)
    assert stream.scenario == "class" and [task.classes for task in stream] == [(0, 1), (2, 3)]
    renamed = write(tmp_path / "renamed.csv", [dict(zip("fcgs", row.values(), strict=True)) for row in rows])
    names = {"path": "f", "label": "c", "task": "g", "split": "s"}
    other = manifest(renamed, gallery, names, cache=False)
    assert all(torch.equal(a.train.tensors()[1], b.train.tensors()[1]) for a, b in zip(stream, other, strict=True))


def test_test_rows_are_drawn_where_no_column_says_them(gallery, tmp_path):
    rows = [{"path": f"{k}.png", "label": "ab"[k % 2], "task": "xyz"[k % 3]} for k in range(60)]
    path = write(tmp_path / "all.csv", rows)
    stream, other = (manifest(path, gallery, cache=False, test_fraction=0.3, seed=s) for s in (0, 1))
    check_stream(stream)
    for task in stream:
        assert task.test.labels.bincount().tolist() == [3, 3] and task.train.labels.bincount().tolist() == [7, 7]
        assert sorted(seeds(task.train) + seeds(task.test)) == [k for k in range(60) if "xyz"[k % 3] == task.name]
    assert seeds(stream[0].test) != seeds(other[0].test)
    assert [len(task.val) for task in manifest(path, gallery, cache=False, val_fraction=0.25)] == [4] * 3


CLOCKS = {
    "number": str,
    "float": lambda k: f"{k / 7:.6f}",
    "day": lambda k: str(np.datetime64("2024-02-20") + k),
    "second": lambda k: str(np.datetime64("2024-02-28T23:59:30") + np.timedelta64(k, "s")),
    "zone": lambda k: f"2024-05-01T{12 + k % 2}:00:{k:02d}+0{k % 2}:00",  # an hour more where the zone is one ahead
    "Z": lambda k: f"2024-05-01T12:00:{k:02d}Z",
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_periods_hold_equal_numbers_of_training_rows_in_the_order_of_time(gallery, tmp_path, clock):
    draw = np.random.default_rng(0)
    when = draw.permutation(60)  # of the image of each name
    part = np.array(["train", "train", "val", "test"])[draw.integers(0, 4, 60)]
    rows = [
        {"path": f"{k}.png", "label": "a", "split": part[k], "timestamp": CLOCKS[clock](int(when[k]))}
        for k in range(60)
    ]
    path = write(tmp_path / "all.csv", rows)
    for num_tasks in (1, 4, None):
        stream = manifest(path, gallery, by="time", num_tasks=num_tasks, cache_dir=tmp_path)
        check_stream(stream)
        assert stream.scenario == "domain" and len(stream) == (num_tasks or 5)
        own = [[int(when[k]) for k in seeds(task.train)] for task in stream]
        assert [t for times in own for t in times] == sorted(when[part == "train"].tolist())
        assert max(map(len, own)) - min(map(len, own)) <= 1
        for t, task in enumerate(stream):
            first = own[t][0] if t else -1
            last = own[t + 1][0] if t + 1 < len(own) else 60
            for name in ("val", "test"):
                expected = [k for k in when.argsort() if part[k] == name and first <= when[k] < last]
                assert seeds(getattr(task, name)) == expected
        assert stream.task_names[0].startswith(rows[seeds(stream[0].train)[0]]["timestamp"])


def test_rows_of_one_instant_on_both_sides_of_a_cut(gallery, tmp_path):
    times = [1, 1, 2, 2, 2, 2, 3, 3, 1, 2, 0, 9]
    rows = [{**row, "label": "a", "timestamp": time} for row, time in zip(GOOD, times, strict=True)]
    stream = manifest(write(tmp_path / "all.csv", rows), gallery, by="time", num_tasks=2, cache=False)
    assert [seeds(task.train) for task in stream] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [seeds(task.test) for task in stream] == [[10, 8], [9, 11]]
    assert stream.task_names == ["1 – 2", "2 – 3"]


def test_periods_of_a_table_without_splits(gallery, tmp_path):
    rows = [{"path": f"{k}.png", "label": k % 2, "timestamp": 59 - k} for k in range(60)]
    stream = manifest(write(tmp_path / "all.csv", rows), gallery, by="time", num_tasks=3, cache=False)
    check_stream(stream)
    for t, task in enumerate(stream):
        assert sorted(seeds(task.train) + seeds(task.test)) == list(range(40 - 20 * t, 60 - 20 * t))
        assert len(task.test) == 4 and seeds(task.train) == sorted(seeds(task.train), reverse=True)


def test_tables_of_several_labels_and_of_numbers(gallery, tmp_path):
    told = ["a;b", "b", "", "b; c ;a"] * 5
    rows = [
        {"path": f"{k}.png", "label": told[k], "task": 0, "split": "train" if k < 16 else "test"} for k in range(20)
    ]
    stream = manifest(write(tmp_path / "several.csv", rows), gallery, target="multilabel", cache=False)
    check_stream(stream)
    assert stream.class_names == ("a", "b", "c") and stream.target.name == "multilabel"
    assert stream[0].test.labels.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]]
    values = np.random.default_rng(0).normal(size=(20, 2)).round(3)
    both = [{**row, "label": f"{x};{y}"} for row, (x, y) in zip(rows, values, strict=True)]
    apart = [{**row, "x": x, "y": y} for row, (x, y) in zip(rows, values, strict=True)]
    for table, columns in ((both, None), (apart, {"label": ["x", "y"]})):
        path = write(tmp_path / "numbers.csv", table)
        stream = manifest(path, gallery, columns, target="regression", cache=False)
        check_stream(stream)
        assert stream.scenario == "domain" and stream.num_classes == 2
        assert np.array_equal(stream[0].train.labels.numpy(), values[:16].astype(np.float32))


def test_parquet_keeps_lists_times_and_missing_cells(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zone = pa.array([0, 10**9 + 1], pa.timestamp("ns", "Europe/Rome"))
    columns = {"label": [["a", "b"], []], "when": zone, "value": [1.5, float("nan")], "task": [None, "x"]}
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    table = read_table(tmp_path / "all.parquet")
    assert table.columns["label"] == ["a;b", ""] and table.columns["value"] == ["1.5", ""]
    assert table.columns["when"] == ["1970-01-01 00:00:00", "1970-01-01 00:00:01"]
    assert table.columns["task"] == ["", "x"] and table.rows == [1, 2]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but no more")
    refuses("bad.parquet cannot be read", read_table, tmp_path / "bad.parquet")


def test_parquet_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refuses(r"all.parquet is a Parquet file: run .pip install 'clsim\[parquet\]'", manifest, tmp_path / "all.parquet")


GOOD = [
    {
        "path": f"{k}.png",
        "label": "ab"[k % 2],
        "task": k % 4 // 2,
        "split": "train" if k < 8 else "test",
        "timestamp": k,
    }
    for k in range(12)
]


def edited(**changes: Any) -> list[dict[str, Any]]:
    """Return the good table with some cells changed: column=(position, value); the row's number is position + 2."""
    rows = [dict(row) for row in GOOD]
    for column, (position, value) in changes.items():
        rows[position][column] = value
    return rows


def without(*columns: str) -> list[dict[str, Any]]:
    return [{name: cell for name, cell in row.items() if name not in columns} for row in GOOD]


TIME = {"by": "time", "num_tasks": 1}
BAD_TABLES: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    ("missing file", edited(path=(3, "99.png")), {}, "Row 5 of .*all.csv names .*99.png, which is no file"),
    ("a folder", edited(path=(3, ".")), {}, "Row 5 of .*all.csv names .*, which is no file"),
    ("empty path", edited(path=(3, "")), {}, "Row 5 of .*all.csv names .*, which is no file"),
    (
        "split word",
        edited(split=(4, "Training")),
        {},
        "Row 6 of .*all.csv has the split 'Training': give train, val or",
    ),
    (
        "label never trained",
        edited(label=(9, "c")),
        {},
        "Row 11 of .*all.csv has the test label 'c', which no train row",
    ),
    ("empty label", edited(label=(0, " ")), {}, "Row 2 of .*all.csv has no label"),
    ("empty task", edited(task=(1, "")), {}, "Row 3 of .*all.csv has no task"),
    ("task without test", edited(task=(2, 7)), {}, "Task '7' of .*all.csv, that of row 4, has no test row"),
    ("task without train", edited(task=(11, 7)), {}, "Task '7' of .*all.csv, that of row 13, has no train row"),
    ("no path", without("path"), {}, "all.csv has no column 'path' among label, task, split, timestamp"),
    ("no label", without("label"), {}, "all.csv has no column 'label'"),
    ("no task", without("task"), {}, "all.csv has no column 'task'"),
    ("no timestamp", without("timestamp"), TIME, "all.csv has no column 'timestamp'"),
    ("renamed", GOOD, {"columns": {"label": "kind"}}, "all.csv has no column 'kind'"),
    ("misnamed", GOOD, {"columns": {"lable": "label"}}, "no column called 'lable': did you mean 'label'"),
    ("train and test", edited(path=(10, "3.png")), {}, "Row 12 of .*puts .*3.png into test, and row 5 into train"),
    ("twice", [*without("split"), without("split")[4]], {}, "Row 14 of .*names .*4.png again, after row 6"),
    ("time", edited(timestamp=(6, "yesterday")), TIME, "Row 8 of .*all.csv has the timestamp 'yesterday'"),
    ("no time", edited(timestamp=(6, "")), TIME, "Row 8 of .*all.csv has the timestamp ''"),
    ("NaN time", edited(timestamp=(6, "nan")), TIME, "Row 8 of .*all.csv has the timestamp 'nan'"),
    ("periods", GOOD, {"by": "time", "num_tasks": 9}, "num_tasks=9 for the 8 training rows of .*all.csv"),
    ("period without test", GOOD, {"by": "time", "num_tasks": 2}, "Task '0 – 3' of .*, that of row 2, has no test row"),
    ("num_tasks", GOOD, {"num_tasks": 3}, "num_tasks=3, but .*all.csv names 2 tasks"),
    ("by", GOOD, {"by": "label"}, "by='label' is unknown: use task or time"),
    ("target", GOOD, {"target": "boxes"}, "no target called 'boxes'"),
    ("text as number", GOOD, {"target": "regression"}, "Row 2 of .*all.csv has the label 'a': give finite numbers"),
    ("numbers", edited(label=(5, "1;2")), {"target": "regression", "columns": {"label": "timestamp"}}, ""),
    ("two fractions", edited(split=(0, "val")), {"val_fraction": 0.5}, "has val rows, and val_fraction=0.5"),
    (
        "few rows",
        without("split"),
        {"test_fraction": 0.9},
        "Task '0' of .*, that of row 2, has too few rows of a class",
    ),
    ("fraction", without("split"), {"test_fraction": 0.0}, "test_fraction=0.0 must be above 0 and below 1"),
    ("scenario", GOOD, {"scenario": "class"}, "Class 0 is in tasks 0 and 1"),
]


@pytest.mark.parametrize(
    ("rows", "options", "words"), [b[1:] for b in BAD_TABLES if b[3]], ids=[b[0] for b in BAD_TABLES if b[3]]
)
def test_tables_are_refused_by_file_and_row(gallery, tmp_path, rows, options, words):
    refuses(words, manifest, write(tmp_path / "all.csv", rows), gallery, cache_dir=tmp_path / "cache", **options)
    if "Class 0" not in words:
        assert not (tmp_path / "cache").exists() or os.listdir(tmp_path / "cache") == []


def test_rows_are_counted_as_a_person_does(gallery, tmp_path):
    good = write(tmp_path / "all.csv", GOOD).read_text().splitlines()
    manifest(tmp_path / "all.csv", gallery, cache=False).check()
    for lines, words in (
        ([*good[:4], "", good[4].replace("train", "trains"), *good[5:]], "Row 6 of .*has the split 'trains'"),
        ([*good[:4], good[4] + ",1", *good[5:]], "Row 5 of .*has 6 cells where the header has 5"),
        ([good[0].replace("label", "path"), *good[1:]], "has two columns called 'path'"),
        (good[:1], "has no rows"),
        ([], "is empty: give it a header"),
    ):
        (tmp_path / "bad.csv").write_text("\n".join(lines))
        refuses(words, manifest, tmp_path / "bad.csv", gallery)
    (tmp_path / "excel.csv").write_bytes("\r\n".join([*good, ""]).encode("utf-8-sig"))
    manifest(tmp_path / "excel.csv", gallery, cache=False).check()
    (tmp_path / "latin.csv").write_bytes("\n".join(good).replace("a", "ä").encode("latin-1"))
    refuses("latin.csv cannot be read", manifest, tmp_path / "latin.csv")
    refuses("nowhere.csv cannot be read", manifest, tmp_path / "nowhere.csv")
    (tmp_path / "numbers.csv").write_text("path,label,task,split\n0.png,1;2,0,train\n1.png,3,0,test\n")
    refuses(
        "Row 3 of .*has the label '3': give 2 numbers", manifest, tmp_path / "numbers.csv", gallery, target="regression"
    )


def test_pictures_of_a_table_are_named_by_file_and_row(tmp_path):
    for k in range(12):
        save(tmp_path / f"{k}.png", picture(k))
    path = write(tmp_path / "all.csv", GOOD)
    save(tmp_path / "10.png", picture(0, 6, 8))
    refuses(r"10.png \(row 12 of .*all.csv\) is 6x8 where .*8.png \(row 10 of .*all.csv\) is 6x6", manifest, path)
    save(tmp_path / "10.png", picture(10))
    save(tmp_path / "5.png", picture(5, 5, 5))
    refuses(r"5.png \(row 7 of .*all.csv\) is 5x5 where .*0.png \(row 2 of", manifest, path)
    (tmp_path / "5.png").write_bytes((tmp_path / "4.png").read_bytes()[:80])
    refuses(r"5.png \(row 7 of .*all.csv\) cannot be read as an image", manifest, path)
    write(path, GOOD[::-1])  # sorted by time, but counted as they stand
    refuses(r"5.png \(row 8 of .*all.csv\) cannot be read", manifest, path, by="time", num_tasks=1)
    assert os.listdir(tmp_path / ".clsim-cache") == []
    os.link(tmp_path / "3.png", tmp_path / "twin.png")
    refuses(
        "Row 13 of .*puts .*twin.png into test, and row 5 into train",
        manifest,
        write(path, edited(path=(11, "twin.png"))),
    )


def test_a_table_is_decoded_again_when_an_image_changes(tmp_path, decodes):
    for k in range(12):
        save(tmp_path / f"{k}.png", picture(k))
    path = write(tmp_path / "all.csv", GOOD)
    manifest(path)
    count = len(decodes)
    manifest(path, by="time", num_tasks=1)
    assert len(decodes) == count, "the same images in another order of tasks"
    save(tmp_path / "9.png", picture(55))
    assert seeds(manifest(path)[0].test) == [8, 55]
    assert len(decodes) == 2 * count


# Hugging Face


def saved(
    hub: Any,
    path: Path,
    inputs: Any,
    labels: list[Any],
    kinds: dict[str, Any],
    parts: tuple[str, ...] = ("train", "test"),
) -> Path:
    def one(shift: int) -> Any:
        return hub.Dataset.from_dict({"image": inputs(shift), "label": labels}, features=hub.Features(kinds))

    hub.DatasetDict({part: one(100 * p) for p, part in enumerate(parts)}).save_to_disk(str(path))
    return path


def test_pictures_of_a_hugging_face_dataset(hub, tmp_path, decodes):
    kinds = {"image": hub.Image(), "label": hub.ClassLabel(names=["cat", "dog"])}

    def pictures(shift: int) -> list[Any]:
        return [Image.fromarray(picture(shift + k)) for k in range(6)]

    path = saved(hub, tmp_path / "pets", pictures, [0, 1] * 3, kinds)
    data = huggingface(path)
    assert (data.class_names, data.name) == (("cat", "dog"), "pets") and data.train_y.tolist() == [0, 1] * 3
    assert torch.equal(data.train_x, torch.stack([chw(k) for k in range(6)]))
    assert torch.equal(data.test_x, torch.stack([chw(100 + k) for k in range(6)]))
    assert data.mean == pytest.approx((data.train_x / 255).double().mean((0, 2, 3)).tolist())
    count = len(decodes)
    huggingface(path)
    assert len(decodes) == count and os.listdir(path / ".clsim-cache")
    drawn = huggingface(path, test=None, test_fraction=1 / 3)
    assert drawn.test_y.tolist() in ([0, 1], [1, 0]) and len(drawn.train_y) == 4
    assert {x.numpy().tobytes() for x in torch.cat([drawn.train_x, drawn.test_x])} == {
        chw(k).numpy().tobytes() for k in range(6)
    }
    assert huggingface(path, image_size=4, channels=1).input_shape == (1, 4, 4)
    check_stream(split(data, num_tasks=2))
    others = [huggingface(path, test=None, test_fraction=1 / 3, seed=seed) for seed in range(1, 5)]
    assert not all(torch.equal(other.test_x, drawn.test_x) for other in others), "one cache, but not one entry"
    alone = huggingface(path / "train", test=None, test_fraction=1 / 3)
    assert torch.equal(alone.train_x, drawn.train_x)

    refuses("train and test are both 'train'", huggingface, path, test="train")
    refuses("pets has no split 'valid', only train, test", huggingface, path, test="valid")
    refuses("holds one split: set test to null", huggingface, path / "train")
    refuses("There is no column 'img' in the train split of .*, only image, label", huggingface, path, image="img")
    refuses("nowhere is not a saved dataset", huggingface, tmp_path / "nowhere")
    refuses(r"test_fraction=2 must be above 0 and below 1", huggingface, path, test=None, test_fraction=2)

    def mixed(shift: int) -> list[Any]:
        return [Image.fromarray(picture(shift + k, 6, 6 + (k == 4))) for k in range(6)]

    odd = saved(hub, tmp_path / "mixed", mixed, [0, 1] * 3, kinds)
    refuses("Row 4 of the train split of .*mixed is 6x7 where Row 0 of", huggingface, odd)
    cut = saved(
        hub,
        tmp_path / "cut",
        lambda shift: [
            {"bytes": save(tmp_path / "a.png", picture(k)).read_bytes()[: 80 if k == 3 else None]} for k in range(6)
        ],
        [0, 1] * 3,
        kinds,
    )
    refuses("Row 3 of the train split of .*cut cannot be read as an image", huggingface, cut)
    for seed in range(4):
        refuses("Row 3 of the train split of .*cut cannot", huggingface, cut, test=None, test_fraction=1 / 3, seed=seed)
    assert os.listdir(cut / ".clsim-cache") == []
    unlabelled = saved(hub, tmp_path / "unlabelled", pictures, [0, 1, 0, 1, 0, -1], kinds)
    refuses("Row 5 of the train split of .* has the label -1", huggingface, unlabelled)


def test_arrays_of_a_hugging_face_dataset(hub, tmp_path):
    draw = np.random.default_rng(0)
    grids, vectors = draw.integers(0, 256, (4, 5, 6), dtype=np.uint8), draw.normal(size=(4, 3))
    for kind, array, expected in (
        (hub.Array2D((5, 6), "uint8"), grids, torch.from_numpy(grids)[:, None]),
        (hub.List(hub.Value("float64")), vectors, torch.from_numpy(vectors).float()),
    ):
        path = tmp_path / type(kind).__name__
        kinds = {"image": kind, "label": hub.Value("string")}
        saved(hub, path, lambda _, array=array: list(array), ["10", "9", "10", "9"], kinds)
        data = huggingface(path)
        assert torch.equal(data.train_x, expected) and data.train_x.dtype == expected.dtype
        assert data.class_names == ("9", "10") and data.train_y.tolist() == [1, 0, 1, 0]
    kinds = {"image": hub.List(hub.Value("float32")), "label": hub.Value("int64")}
    ragged = saved(hub, tmp_path / "ragged", lambda _: [[1.0], [2.0], [3.0, 4.0]], [5, 7, 5], kinds)
    refuses(r"Row 2 of the train split of .* has shape \(2,\), row 0 \(1,\): give", huggingface, ragged)
    nested = {**kinds, "image": hub.List(hub.List(hub.Value("float32")))}
    uneven = saved(hub, tmp_path / "uneven", lambda _: [[[1.0], [2.0, 3.0]]] * 2, [5, 7], nested)
    refuses("Row 0 of the train split of .*uneven is ragged", huggingface, uneven)
    formatted = hub.Dataset.from_dict({"image": [[1.0], [2.0], [3.0], [4.0]], "label": [7, 5, 7, 5]}).with_format(
        "numpy"
    )
    formatted.save_to_disk(tmp_path / "formatted")
    assert huggingface(tmp_path / "formatted", test=None, test_fraction=0.5).class_names == ("5", "7")
    spoilt_rows = saved(hub, tmp_path / "spoilt", lambda _: [[1.0], [float("nan")]], [5, 7], kinds)
    refuses("train set of 'spoilt' has a NaN or infinite value in row 1", huggingface, spoilt_rows)
    missing = saved(hub, tmp_path / "missing", lambda _: [[1.0], [2.0]], [5, None], kinds)
    refuses("Row 1 of the train split of .* has the label None", huggingface, missing)
    words = saved(hub, tmp_path / "words", lambda _: ["a", "b"], [5, 7], {**kinds, "image": hub.Value("string")})
    refuses("Column 'image' of the train split of .* holds string", huggingface, words)


def test_a_hugging_face_dataset_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refuses(r"run .pip install 'clsim\[huggingface\]'", huggingface, tmp_path)


# Configurations


@pytest.mark.parametrize(
    "group", ["stream=from_arrays", "stream=image_folders", "stream=manifest", "dataset=huggingface"]
)
def test_a_yaml_lists_every_argument_with_its_default(group):
    with initialize_config_module("cl.conf", version_base="1.3"):
        node = compose("config", overrides=[group])[group.split("=")[0]]
    written = OmegaConf.to_container(node, resolve=False)
    parameters = inspect.signature(get_method(written.pop("_target_"))).parameters
    for own in ("seed", "scenario") if group.startswith("stream") else ():
        assert written.pop(own) == f"${{{own}}}"
    given_there = {
        name: "???" if p.default is p.empty else p.default for name, p in parameters.items() if name in written
    }
    assert written == given_there and set(written) | {"seed", "scenario"} >= set(parameters)


def test_streams_are_made_from_the_command_line(gallery, tmp_path):
    rows = [{**row, "kind": row.pop("label")} for row in edited()]
    path = write(tmp_path / "all.csv", rows)
    for name, column in toy().items():
        np.save(tmp_path / f"{name}.npy", column)
    root = folders(tmp_path / "root", NIGHT)
    made = {
        "manifest": [
            f"stream.path={path}",
            f"stream.root={gallery}",
            "stream.columns={label: kind}",
            "stream.cache=false",
        ],
        "image_folders": [f"stream.root={root}", "stream.folders=[night,day]", "stream.mean=[0.5]"],
        "from_arrays": [f"stream.{name}={tmp_path / name}.npy" for name in toy()]
        + ["stream.class_names=[a,b,c,d,e,f]"],
    }
    for name, overrides in made.items():
        with initialize_config_module("cl.conf", version_base="1.3"):
            cfg = compose("config", overrides=[f"stream={name}", *overrides])
        check_stream(instantiate(cfg.stream))
