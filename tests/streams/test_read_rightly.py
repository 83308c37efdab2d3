"""What could be read in two ways is read in the right one, told, or refused in one sentence."""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import IterableDataset, Subset

from cl.compose import concat, copies, partition, repeat
from cl.data.augment import Normalize
from cl.data.avalanche import preparation
from cl.data.class_names import in_natural_order, move, number_classes
from cl.data.dataset import Dataset
from cl.data.huggingface import huggingface
from cl.data.images import image_folder, read_image
from cl.data.rows import open_array, to_tensor
from cl.data.sources import map_style, synthetic
from cl.data.task import Stream, TaskData
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.streams.domains import domains
from cl.streams.from_arrays import from_arrays
from cl.streams.image_folders import image_folders
from cl.streams.manifest import manifest
from cl.streams.split import split
from cl.testing import check_stream

PETS = ["ant", "bee", "cat", "dog"]


def refuses(words: str, make: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(InputError, match=words) as caught:
        make(*arguments, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def picture(seed: int, height: int = 6, width: int = 6) -> Any:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chw(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def save(file: Path, image: Any, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)
    return file


# Classes by their names


def saved(hub: Any, path: Path, **splits: tuple[list[Any], Any]) -> Path:
    """Save splits, each of labels and of what kind they are; the vector of a row says its label."""
    made = {}
    for part, (labels, kind) in splits.items():
        features = hub.Features({"image": hub.List(hub.Value("float32")), "label": kind})
        vectors = [[float(len(str(label))), float(k)] for k, label in enumerate(labels)]
        made[part] = hub.Dataset.from_dict({"image": vectors, "label": labels}, features=features)
    hub.DatasetDict(made).save_to_disk(str(path))
    return path


def test_test_labels_of_the_hugging_face_library_are_read_by_their_own_names(hub, tmp_path):
    kinds = {part: hub.ClassLabel(names=names) for part, names in (("train", PETS[:3]), ("test", PETS[1:3]))}
    path = saved(hub, tmp_path / "a", train=([0, 1, 2], kinds["train"]), test=([0, 1, 1], kinds["test"]))
    data = huggingface(path)
    assert [data.class_names[c] for c in data.test_y] == ["bee", "cat", "cat"]
    backward = hub.ClassLabel(names=PETS[2::-1])
    path = saved(hub, tmp_path / "b", train=([0, 1, 2], kinds["train"]), test=([0, 2], backward))
    assert [data.class_names[c] for c in huggingface(path).test_y] == ["cat", "ant"]
    path = saved(hub, tmp_path / "c", train=([0, 1, 2], kinds["train"]), test=(["cat"], hub.Value("string")))
    assert huggingface(path).test_y.tolist() == [2]
    path = saved(hub, tmp_path / "d", train=([0, 1, 2], kinds["train"]), test=([1], hub.Value("int64")))
    refuses("test split of .* has numbers as labels, and only the train split .* has their names", huggingface, path)
    path = saved(hub, tmp_path / "e", train=([0, 1], kinds["test"]), test=([0], kinds["train"]))
    refuses("Row 0 of the test split of .* has the label 'ant', where 2 classes", huggingface, path)


def test_a_filtered_dataset_has_the_classes_that_have_rows(hub, tmp_path, caplog):
    names = hub.ClassLabel(names=[f"c{k}" for k in range(100)])
    kept = np.sort(np.random.default_rng(1993).permutation(100)[:10]).tolist()
    path = saved(hub, tmp_path / "a", train=(kept * 3, names), test=(kept, names))
    with caplog.at_level(logging.INFO):
        stream = split(huggingface(path), num_tasks=5)
    assert "90 of the 100 classes of a have no example" in caplog.text
    assert stream.num_classes == 10 and [len(task.classes) for task in stream] == [2] * 5
    assert stream.class_names == tuple(f"c{k}" for k in kept)
    strange = saved(hub, tmp_path / "b", train=(kept, names), test=([*kept, min({*range(100)} - {*kept})], names))
    refuses("Row 10 of the test set of 'b' has the class 'c[0-9]+', which no training row has", huggingface, strange)


def pairs(labels: list[Any], start: int = 0) -> list[tuple[torch.Tensor, Any]]:
    return [(torch.tensor([float(start + k), 0.0]), label) for k, label in enumerate(labels)]


@given(
    labels=st.lists(st.integers(0, 12), min_size=2, max_size=12, unique=True),
    copies=st.integers(1, 3),
)
def test_classes_without_rows_are_no_classes(labels, copies):
    rows = pairs(labels * copies)
    data = map_style(rows, rows)
    assert data.num_classes == len(labels) and data.class_names == tuple(str(c) for c in sorted(labels))
    assert [data.class_names[c] for c in data.train_y] == [str(label) for _, label in rows]
    stream = split(data, classes_per_task=1)
    assert [task.classes for task in stream] == [(c,) for c in range(len(labels))]
    together = Stream.from_datasets([rows[: len(labels)], rows], [rows[: len(labels)], rows])
    assert together.num_classes == len(labels)
    y, names = torch.tensor([label for _, label in rows]), tuple(map(str, range(13)))
    held = Dataset("mine", data.train_x, y, data.test_x, y, names)
    assert split(held, classes_per_task=1).num_classes == len(labels), "also of a Dataset that one makes oneself"


def test_names_of_classes_that_have_rows_or_of_all():
    rows = pairs([0, 2, 4, 4])
    for names in (["a", "c", "e"], list("abcde"), list("abcdefg")):
        assert map_style(rows, rows, class_names=names).class_names == ("a", "c", "e")
        stream = Stream.from_datasets([rows], [rows], class_names=names)
        assert stream.class_names == ("a", "c", "e") and stream.num_classes == 3
    refuses("class_names has 4 names where the training rows have 3", map_style, rows, rows, class_names=list("abcd"))
    assert Stream.from_datasets([rows], [rows], num_classes=9).num_classes == 9
    refuses("Row 1 of the test set of 'the dataset' has the class '1'", map_style, rows, pairs([0, 1]))


class Folder(list[Any]):
    """Items whose labels have names, as torchvision's folders have."""

    def __init__(self, *names: str, start: int = 0) -> None:
        super().__init__(pairs([c for c in range(len(names)) for _ in range(2)], start))
        self.class_to_idx = {name: c for c, name in enumerate(names)}


def test_folders_that_number_their_classes_themselves_are_matched_by_name():
    data = map_style(Folder("ant", "bee", "cat"), Folder("bee", "cat"))
    assert data.class_names == ("ant", "bee", "cat") and data.test_y.tolist() == [1, 1, 2, 2]
    stream = Stream.from_datasets([Folder("ant", "bee"), Folder("bee", "cow")], [Folder("ant", "bee"), Folder("cow")])
    assert stream.class_names == ("ant", "bee", "cow") and stream.scenario == "domain"
    assert [task.classes for task in stream] == [(0, 1), (1, 2)] and stream[1].test.labels.tolist() == [2, 2]
    part = Subset(Folder("ant", "bee", "cat"), [4, 5])  # type: ignore[arg-type]
    assert map_style(part, part).class_names == ("cat",)
    refuses("Row 0 of the test set .* has the class 'dog'", map_style, Folder("ant"), Folder("dog"))


def named(names: list[str], seed: int = 0, count: int = 6) -> Dataset:
    """Vectors whose first number says the name."""
    y = torch.arange(count) % len(names)
    x = torch.tensor([[float(PETS.index(names[c])), float(seed)] for c in y])
    return Dataset(f"pets {seed}", x, y, x, y, tuple(names))


@given(st.lists(st.lists(st.sampled_from(PETS), min_size=3, max_size=3, unique=True), min_size=2, max_size=4))
def test_domains_share_the_classes_of_one_name(lists):
    union = list(dict.fromkeys(name for own in lists for name in own))
    if len(union) == 3 * len(lists):
        return
    stream = domains({f"{k}": named(own, k) for k, own in enumerate(lists)})
    stream.check()
    assert stream.scenario == "domain" and stream.class_names == tuple(union)
    for task in stream:
        x, y, _ = task.train.tensors()
        assert [union[c] for c in y] == [PETS[int(row[0])] for row in x]


def test_domains_by_position_only_where_asked():
    a, b, strange = named(["ant", "bee"]), named(["bee", "cat"], 1), named(["cat", "dog"], 2)
    both = {"a": a, "b": b}
    assert domains(both).num_classes == 3 and domains(both, match="position").num_classes == 2
    assert domains(both, match="position")[1].train.labels.tolist() == b.train_y.tolist()
    assert domains(both, scenario="task").num_classes == 4
    apart = {"a": a, "strange": strange}
    assert domains(apart).scenario == "class" and domains(apart).num_classes == 4
    refuses("no name in common.*match=position", domains, apart, scenario="domain")
    assert domains(apart, scenario="domain", match="position").num_classes == 2
    fewer = {"a": named(PETS[:3]), "b": b}
    assert domains(fewer, scenario="domain").class_names == ("ant", "bee", "cat")
    refuses(r"have \[3, 2\] classes", domains, fewer, scenario="domain", match="position")
    refuses("no match called 'names': did you mean 'name'", domains, both, match="names")  # type: ignore[arg-type]
    unnamed = copies(synthetic(num_classes=2), 1, "task")
    assert concat([unnamed, unnamed], "domain").num_classes == 2


def test_a_withheld_label_stays_withheld():
    assert move(torch.tensor([1, -1]), [3, 4], 5).tolist() == [4, -1]


def test_tasks_without_a_name_have_one_when_they_come_again():
    source = copies(named(["ant", "bee"]), 2)
    stream = source.derive(lambda t: source[t].each(lambda part: part, name=""))
    assert repeat(stream, visits=[1, 0, 1]).task_names == ["task 2", "task 1", "task 2 again"]
    assert partition(stream, 2).task_names[0] == "task 1, part 1"


# Folders


def tree(root: Path, places: list[str], count: int = 2) -> Path:
    for k, place in enumerate(places):
        for i in range(count):
            save(root / place / f"{i}.png", picture(100 * k + i))
    return root


@pytest.mark.parametrize(
    "names",
    [["1", "2", "3", "10", "11"], ["s1", "s2", "s10"], ["task1", "task2", "task10"], ["a2b1", "a2b10", "a10b1"]],
)
def test_tasks_stand_in_natural_order_and_classes_in_that_of_text(tmp_path, names, caplog):
    tree(tmp_path, [f"{task}/{part}/{label}" for task in names for part in ("train", "test") for label in ("9", "10")])
    with caplog.at_level(logging.INFO):
        stream = image_folders(tmp_path, cache=False)
    assert stream.task_names == names and stream.class_names == ("10", "9")
    assert f"in natural order: {', '.join(names)}." in caplog.text
    rows = [f"{task}/{part}/9/0.png,a,{task},{part}" for task in reversed(names) for part in ("train", "test")]
    (tmp_path / "all.csv").write_text("\n".join(["path,label,task,split", *rows]))
    assert manifest(tmp_path / "all.csv", cache=False).task_names == names


@given(st.lists(st.integers(0, 10**6), min_size=1, unique=True), st.sampled_from(["", "s", "task_", "2x"]))
def test_natural_order_is_that_of_the_numbers(numbers, prefix):
    expected = [f"{prefix}{n}" for n in sorted(numbers)]
    assert in_natural_order("Tasks", [f"{prefix}{n}" for n in numbers]) == expected


def test_words_that_only_look_like_numbers():
    assert number_classes(["nan", "10", "9"]) == ["10", "9", "nan"] and number_classes(["1_0", "2"]) == ["1_0", "2"]
    assert in_natural_order("Tasks", ["2019-10", "2019-9", "inf"]) == ["2019-9", "2019-10", "inf"]


HIDDEN = [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git/deep", "#recycle"]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_what_a_system_puts_beside_ones_images_is_left_out_at_every_level(tmp_path, hidden):
    places = ["train/a", "train/a/more", "train/b"]
    tree(tmp_path, places)
    expected = image_folder(tmp_path, test=None, test_fraction=0.5, cache=False)
    beside = [hidden, f"train/{hidden}", f"train/a/{hidden}", f"train/a/more/{hidden}", f"train/b/{hidden}/{hidden}"]
    tree(tmp_path, beside)
    save(tmp_path / "train" / "a" / "._0.png", picture(1))
    found = image_folder(tmp_path, test=None, test_fraction=0.5, cache=False)
    assert torch.equal(found.train_x, expected.train_x) and torch.equal(found.test_x, expected.test_x)
    assert found.class_names == ("a", "b")
    stream = image_folders(tmp_path.parent, folders=[tmp_path.name], test=None, test_fraction=0.5, cache=False)
    assert stream.class_names == ("a", "b") and len(stream[0].train) == 3
    tree(tmp_path / "tasks", [f"{task}/{part}/a" for task in ("x", hidden) for part in ("train", "test")])
    assert image_folders(tmp_path / "tasks", cache=False).task_names == ["x"]


def test_links_that_lead_nowhere_or_in_a_circle(tmp_path):
    tree(tmp_path, ["train/a", "train/b"])
    (tmp_path / "train" / "a" / "round").symlink_to(tmp_path / "train" / "a")
    data = image_folder(tmp_path, test=None, test_fraction=0.5, cache=False)
    assert len(data.train_y) == len(data.test_y) == 2
    (tmp_path / "train" / "a" / "round").unlink()
    link = tmp_path / "train" / "a" / "lost.png"
    link.symlink_to("nowhere.png")
    refuses("lost.png is a link to nowhere.png, which does not exist", image_folder, tmp_path, test=None)
    link.unlink()
    (tmp_path / "train" / "c").symlink_to("elsewhere")
    refuses("c is a link to elsewhere, which does not exist", image_folder, tmp_path, test=None)


def test_names_that_are_no_utf8(tmp_path):
    tree(tmp_path, ["train/a", "train/b"])
    name = os.fsdecode(b"\xff.png")
    save(tmp_path / "train" / "a" / "2.png", picture(9)).rename(tmp_path / "train" / "a" / name)
    for _ in range(2):
        assert len(image_folder(tmp_path, test=None, test_fraction=0.4).train_y) == 3
    (tmp_path / "train" / os.fsdecode(b"c\xff")).mkdir()
    refuses(
        r"train.* holds a folder called 'c.udcff', which is not UTF-8: rename it", image_folder, tmp_path, test=None
    )


def test_folders_within_classes_are_told(tmp_path, caplog):
    tree(tmp_path, ["train/day/cat", "train/day/dog", "train/night/cat"])
    with caplog.at_level(logging.INFO):
        assert image_folder(tmp_path, test=None, test_fraction=0.5, cache=False).class_names == ("day", "night")
    assert "The 2 classes of" in caplog.text and "folders within them, such as cat, dog, are no classes" in caplog.text
    caplog.clear()
    tree(tmp_path / "tiny", ["train/a/images", "train/b/images"])
    with caplog.at_level(logging.INFO):
        image_folder(tmp_path / "tiny", test=None, test_fraction=0.5, cache=False)
    assert "no classes" not in caplog.text


def test_the_split_may_stand_above_the_tasks(tmp_path):
    below = tree(tmp_path / "below", [f"{t}/{p}/{c}" for t in ("t2", "t10") for p in ("train", "test") for c in "ab"])
    above = tmp_path / "above"
    for file in below.rglob("*.png"):
        task, part, *rest = file.relative_to(below).parts
        with Image.open(file) as image:
            save(above.joinpath(part, task, *rest), image)
    expected, found = image_folders(below), image_folders(above, pattern="split/task/class")
    check_stream(found)
    assert found.task_names == expected.task_names == ["t2", "t10"]
    for a, b in zip(expected, found, strict=True):
        for part in ("train", "test"):
            assert all(map(torch.equal, getattr(a, part).tensors(), getattr(b, part).tensors()))
    drawn = image_folders(above, pattern="split/task/class", test=None, test_fraction=0.5)
    assert [len(task.test) for task in drawn] == [2, 2]
    refuses("if the folders in .*train are tasks, set stream.pattern=split/task/class", image_folders, above)
    tree(above, ["test/t3/a"])
    refuses("test has the task 't3', which .*train lacks", image_folders, above, pattern="split/task/class")
    refuses("no pattern called 'task/class'", image_folders, above, pattern="task/class")
    one = tree(tmp_path / "one", ["train/a", "test/a"])
    refuses("one holds 'train' itself, so it is one dataset", image_folders, one)


# Pictures


def deep_png(pixels: Any) -> bytes:
    """A PNG of 16 bits a channel."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_tiff(pixels: Any) -> bytes:
    """A little-endian TIFF of 16 bits a channel, in one strip."""
    height, width, channels = pixels.shape
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, 0), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, 0), (277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, 2 * pixels.size)]
    depths = 8 + 2 + 12 * len(tags) + 4
    values = {258: depths, 273: depths + 2 * channels}
    entries = b"".join(struct.pack("<HHII", tag, kind, n, values.get(tag, v)) for tag, kind, n, v in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return head + struct.pack("<H", 16) * channels + pixels.astype("<u2").tobytes()


def deep_jpeg2000(pixels: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels[:, :, 0].astype(np.uint16)).save(out, "JPEG2000")
    return out.getvalue()


DEEP = {
    "png": deep_png,
    "tif": deep_tiff,
    "ppm": lambda pixels: b"P6 40 40 4095\n" + pixels.astype(">u2").tobytes(),
    "pgm": lambda pixels: b"P5 40 40 4095\n" + pixels[:, :, :1].astype(">u2").tobytes(),
    "jp2": deep_jpeg2000,
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_eight_bits_a_channel_are_refused_in_every_format(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 40, 3))
    for channels in (3, 4) if kind == "png" else (3,):
        (tmp_path / f"deep.{kind}").write_bytes(DEEP[kind](np.resize(pixels, (40, 40, channels))))
        refuses(f"deep.{kind} cannot be read as an image .more than 8 bits", read_image, tmp_path / f"deep.{kind}")
        with Image.open(tmp_path / f"deep.{kind}") as image:
            refuses("item 0 of the dataset is a picture .*more than 8 bits", TaskData.from_dataset, [(image, 0)])


def test_pictures_of_every_mode_are_grey_or_in_their_colours(tmp_path):
    colour = Image.new("RGB", (8, 8), (200, 30, 90))
    expected = {
        "P": (colour.quantize(4), chw(colour)),
        "1": (Image.new("1", (8, 8), 1), torch.full((1, 8, 8), 255, dtype=torch.uint8)),
        "L": (colour.convert("L"), torch.from_numpy(np.asarray(colour.convert("L")).copy())[None]),
        "CMYK": (colour.convert("CMYK"), chw(colour.convert("CMYK").convert("RGB"))),
        "YCbCr": (colour.convert("YCbCr"), chw(colour.convert("YCbCr").convert("RGB"))),
        "RGBA": (colour.convert("RGBA"), chw(colour.convert("RGBA"))),
    }
    for mode, (image, pixels) in expected.items():
        data = map_style([(image, 0)] * 2, [(image, 0)])
        assert torch.equal(torch.as_tensor(data.train_x[0]), pixels), mode
        assert torch.equal(TaskData.from_dataset([(image, 0)], lazy=True).tensors()[0][0], pixels), mode
    for mode in ("I;16", "I", "F"):
        refuses("item 0 of the training set is a picture of mode", map_style, [(Image.new(mode, (4, 4)), 0)], [])


def rotated(place: Path, orientation: int, **options: Any) -> Any:
    exif = Image.Exif()
    exif[274] = orientation
    return save(place, picture(3, 6, 8), exif=exif, **options)


def test_pictures_are_turned_as_the_hugging_face_library_shows_them(hub, tmp_path):
    files = [str(rotated(tmp_path / f"{k}.png", orientation)) for k, orientation in enumerate((6, 8, 6, 8))]
    features = hub.Features({"image": hub.Image(), "label": hub.Value("int64")})
    made = hub.Dataset.from_dict({"image": files, "label": [0, 1, 0, 1]}, features=features)
    hub.DatasetDict(train=made, test=made).save_to_disk(str(tmp_path / "all"))
    data = huggingface(tmp_path / "all")
    assert torch.equal(torch.as_tensor(data.train_x), torch.stack([chw(row["image"]) for row in made]))
    assert data.input_shape == (3, 8, 6)


def test_folders_and_tables_are_turned_where_asked(tmp_path):
    for place in ("day/train/a", "day/test/a"):
        rotated(tmp_path / place / "0.jpg", 6, quality=95)
    (tmp_path / "all.csv").write_text("path,label,task,split\nday/train/a/0.jpg,a,1,train\nday/test/a/0.jpg,a,1,test\n")
    with Image.open(tmp_path / "day/train/a/0.jpg") as image:
        stored, turned = chw(image), chw(ImageOps.exif_transpose(image))
    for turn, expected in ((False, stored), (True, turned)):
        found = [
            image_folder(tmp_path / "day", exif_orientation=turn).train_x[0],
            image_folders(tmp_path, exif_orientation=turn)[0].train.x[torch.tensor([0])][0],
            manifest(tmp_path / "all.csv", exif_orientation=turn)[0].train.x[torch.tensor([0])][0],
        ]
        assert all(torch.equal(torch.as_tensor(x), expected) for x in found)


# Items


def test_only_bytes_are_pixels():
    kinds = {
        "int64": (torch.tensor([[42, 7]]), [42.0, 7.0]),
        "int16": (torch.tensor([[300, -2]], dtype=torch.int16), [300.0, -2.0]),
        "uint16": (np.array([[42, 60_000]], dtype=np.uint16), [42.0, 60_000.0]),
        "torch's uint16": (torch.tensor([[42, 60_000]]).to(torch.uint16), [42.0, 60_000.0]),
        "bool": (torch.tensor([[True, False]]), [1.0, 0.0]),
        "uint8": (torch.tensor([[51, 255]], dtype=torch.uint8), [51 / 255, 1.0]),
        "float64": (torch.tensor([[42.5, 1.0]], dtype=torch.float64), [42.5, 1.0]),
    }
    for name, (x, expected) in kinds.items():
        rows = [(x[0], 0), (x[0], 1)]
        stream = Stream.from_datasets([rows], [rows])
        identity = nn.Flatten()
        identity.num_features = 2  # type: ignore[assignment]
        learner = Learner(stream, identity, {}, partial(torch.optim.SGD, lr=0.1))
        raw = stream[0].train.tensors()[0]
        assert torch.allclose(learner.prepare(raw)[0], torch.tensor(expected), rtol=1e-6), name
        assert torch.allclose(preparation(None)(raw)[0], torch.tensor(expected), rtol=1e-6), name
        assert torch.allclose(Normalize()(raw)[0].float(), torch.tensor(expected), rtol=1e-6), name


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(pairs([0, 1]))


ONE = torch.zeros(2)
BAD_ITEMS: list[tuple[Any, str]] = [
    ([(ONE, 0), (torch.eye(2).to_sparse(), 1)], "The input of item 1 of the dataset is a sparse or nested tensor"),
    ([(ONE.to(torch.complex64), 1)], "item 0 of the dataset is a complex64 tensor"),
    ([({"ids": ONE}, 0)], "The input of item 0 of the dataset is of type dict"),
    ([((ONE, torch.zeros(3)), 0)], "The input of item 0 of the dataset is of type tuple"),
    ([("a text", 0)], "item 0 of the dataset is of type str"),
    ([(np.ma.masked_array([1.0, 2.0], [0, 1]), 0)], "item 0 of the dataset is a masked array"),
    ([(None, 0)], "item 0 of the dataset is of type NoneType"),
    ([(ONE, 0), (ONE, "cat")], "Item 1 of the dataset has the label 'cat': number the classes"),
    ([(ONE, 0), (ONE, None)], "Item 1 of the dataset has a label of type NoneType"),
    ([(ONE, [1, 0]), (ONE, [1])], r"Item 1 of the dataset has a label of shape \(1,\) where item 0 has \(2,\)"),
    ([{"image": ONE, "label": 0}], "Item 0 of the dataset is a dict with the keys image, label"),
    ([ONE], "Item 0 of the dataset is of type Tensor: give a pair"),
    ([(ONE,)], "Item 0 of the dataset is of type tuple: give a pair"),
    (
        [(ONE, 0), (torch.zeros(2, dtype=torch.uint8), 0)],
        "Item 1 of the dataset has uint8 of .* where item 0 has fl",
    ),
    (Numbers(), "Numbers cannot be indexed"),
    (iter([(ONE, 0)]), "cannot be indexed"),
    ([], "The dataset is empty"),
]


@pytest.mark.parametrize(("items", "words"), BAD_ITEMS, ids=[words for _, words in BAD_ITEMS])
def test_items_that_are_no_pairs_of_an_array_and_a_label(items, words):
    refuses(words, TaskData.from_dataset, items)
    if "label" not in words and items and not isinstance(items, Numbers) and "where item 0" not in words:
        good = [(ONE, 0)]
        for make in (lambda: map_style(items, good), lambda: Stream.from_datasets([good, good], [good, items])):
            refuses("cannot be indexed|of the training set|of the test set of task 1", make)


@pytest.mark.parametrize("part", ["train_x", "train_y"])
def test_arrays_that_are_not_plain_are_refused(part):
    arrays = {"train_x": torch.rand(6, 3), "train_y": np.arange(6) % 2}
    arrays |= {"test_x": arrays["train_x"], "test_y": arrays["train_y"]}
    for x in (torch.eye(6).to_sparse(), torch.eye(6).to(torch.complex64), torch.zeros(6, 3).to(torch.float8_e4m3fn)):
        refuses(f"{part} is a .* tensor: give a dense one of real numbers", from_arrays, **arrays | {part: x})
    masked = np.ma.masked_array(np.zeros((6, 3)), np.eye(6, 3))
    refuses(f"{part} is a masked array, whose mask would be lost", from_arrays, **arrays | {part: masked})


def test_a_file_with_one_number_is_no_array(tmp_path):
    np.save(tmp_path / "one.npy", np.float32(3))
    refuses("one.npy holds a single number", open_array, tmp_path / "one.npy")


def test_arrays_in_another_order_of_bytes_are_read():
    assert to_tensor(np.array([1.5, 2], dtype=">f4")).tolist() == [1.5, 2.0]
    refuses("holds 18446744073709551615", to_tensor, np.array([2**64 - 1], dtype=np.uint64))


# Tables


@pytest.fixture
def images(tmp_path):
    for k in range(6):
        save(tmp_path / f"{k}.png", picture(k))
    return tmp_path


def table(folder: Path, header: str, cells: list[str]) -> Path:
    parts = ["train"] * 4 + ["test"] * 2
    rows = [f"{k}.png,{cell},1,{part}" for k, (cell, part) in enumerate(zip(cells, parts, strict=True))]
    (folder / "all.csv").write_text("\n".join([f"path,{header},task,split", *rows]))
    return folder / "all.csv"


def test_columns_of_0_and_1_are_the_classes(images):
    flags = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [1, 1, 0]])
    names = ["Edema", "Fracture", "Nodule"]
    for words in (("0", "1"), ("0.0", "1.0"), ("False", "True")):
        path = table(images, ",".join(names), [",".join(words[f] for f in row) for row in flags])
        stream = manifest(path, columns={"label": names}, target="multilabel", cache=False)
        assert stream.class_names == tuple(names)
        both = torch.cat([stream[0].train.labels, stream[0].test.labels])
        assert both.tolist() == flags.tolist()
    single = manifest(path, columns={"label": "Edema"}, target="multilabel", cache=False)
    assert single.class_names == ("Edema",) and single[0].train.labels.flatten().tolist() == [1, 0, 0, 1]
    refuses(
        "Row 2 of .* has the labels Edema, Nodule, where target=label needs one",
        manifest,
        path,
        columns={"label": names},
    )
    one_hot = table(images, ",".join(names), ["1,0,0", "0,1,0", "0,0,1", "0,1,0", "1,0,0", "0,0,1"])
    stream = manifest(one_hot, columns={"label": names}, cache=False)
    assert stream.class_names == tuple(names) and stream[0].train.labels.tolist() == [0, 1, 2, 1]


BAD_LABELS = [
    ("Edema,Nodule", ["1,0", "0,1", "1,", "1,1", "0,0", "1,0"], "Row 4 of .* has '' in the column 'Nodule'"),
    ("Edema,Nodule", ["1,0", "0,1", "1,-1", "1,1", "0,0", "1,0"], "Row 4 of .* has '-1' in the column 'Nodule'"),
    ("label", ["0", "1", "0", "1", "0", "1"], "The labels of .* are 0 and 1 alone"),
    ("label", ["0;1", "1", "0;0;1", "1", "0", "1"], "The labels of .* are 0 and 1 alone"),
    ("label", ["a;b", "b;b", "a", "b", "a", "b"], "Row 3 of .* has a label twice in 'b;b'"),
]


@pytest.mark.parametrize(("header", "cells", "words"), BAD_LABELS, ids=[b[2] for b in BAD_LABELS])
def test_what_may_mean_a_name_or_a_flag_is_refused(images, header, cells, words):
    columns = None if header == "label" else {"label": header.split(",")}
    refuses(words, manifest, table(images, header, cells), columns=columns, target="multilabel", cache=False)


def test_several_columns_of_names_are_joined_as_before(images):
    path = table(images, "first,second", ["a,b", "b,", ",", "a,c", "a,b", "a,c"])
    stream = manifest(path, columns={"label": ["first", "second"]}, target="multilabel", cache=False)
    assert stream.class_names == ("a", "b", "c") and stream[0].train.labels.tolist()[1] == [0, 1, 0]


DAYS = [f"2018-07-0{k}" for k in range(3, 9)]
MIXED = [
    (
        [DAYS[0], "2019", *DAYS[2:]],
        "Row 3 .* '2019', row 2 '2018-07-03'",
    ),
    (["2018", "2019", "2020-01-01", "2021", "2022", "2023"], "Row 4 .* '2020-01-01', row 2 '2018'"),
    (
        ["20180703", "2018-07-04", "20180705", "20180706", "20180707", "20180708"],
        "Row 3 .* '2018-07-04', row 2 '20180703'",
    ),
]


@pytest.mark.parametrize(("cells", "words"), MIXED, ids=[words for _, words in MIXED])
def test_a_column_holds_dates_or_numbers(images, cells, words):
    path = table(images, "label,timestamp", [f"a,{cell}" for cell in cells])
    refuses(words + ": give all rows a date, or all a number", manifest, path, by="time", num_tasks=1, cache=False)


@pytest.mark.parametrize(
    ("separator", "told"), [(",", ""), ("\t", "a tab"), (";", "a semicolon"), (" ", "a blank"), ("  ", "a blank")]
)
def test_what_stands_between_cells_is_what_stands_in_the_header(images, separator, told, caplog):
    lines = ["path,label,task,split", *(f"{k}.png,a,1,{'train' if k < 4 else 'test'}" for k in range(6)), ""]
    (images / "all.txt").write_text("\n".join(line.replace(",", separator) for line in lines))
    with caplog.at_level(logging.INFO):
        stream = manifest(images / "all.txt", cache=False)
    assert [len(stream[0].train), len(stream[0].test)] == [4, 2] and stream.class_names == ("a",)
    assert (f"read with {told} between" in caplog.text) == bool(told)
    (images / "all.txt").write_text((images / "all.txt").read_text() + f"a{separator}b c{separator}d e.png{separator}x")
    if told != "a blank":
        refuses("Row 8 of .* names .*a, which is no file|Row 8 of .* has the split 'x'", manifest, images / "all.txt")
    else:
        refuses("Row 8 of .* has 6 cells where the header has 4: .*in quotes where a cell holds a blank", manifest,
                images / "all.txt")  # fmt: skip


def test_labels_may_be_joined_by_what_does_not_stand_in_the_header(images):
    rows = [f"{k}.png\ta;b\t1\t{'train' if k < 4 else 'test'}" for k in range(6)]
    (images / "all.tsv").write_text("\n".join(["path\tlabel\ttask\tsplit", *rows]))
    assert manifest(images / "all.tsv", target="multilabel", cache=False).class_names == ("a", "b")
    (images / "list.txt").write_text("0.png 1\n1.png 2\n")
    refuses("list.txt has no column 'path' among 0.png, 1: add it", manifest, images / "list.txt")
