"""Named datasets in their true layouts, on small files made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from PIL import Image

from cl.app.build import build_stream
from cl.data.cub import cub_200
from cl.errors import InputError


def picture(path: Path, colour: int, size: tuple[int, int] = (20, 12), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3) if mode == "RGB" else size, colour, dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path)


def stream(*overrides: str) -> Any:
    with initialize_config_module("cl.conf", version_base="1.3"):
        return build_stream(compose("config", overrides=["stream=split", "stream.num_tasks=2", *overrides]))


def contents(task: Any, part: str) -> list[tuple[int, int]]:
    """Return (label, colour) of each image of a part."""
    x, y, _ = getattr(task, part).tensors()
    return [(int(label), int(image.float().mean().round())) for image, label in zip(x, y, strict=True)]


def make_cub(root: Path) -> None:
    kinds = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "010.Red_winged_Blackbird", "011.Rusty_Blackbird"]
    images, labels, parts = [], [], []
    for number in range(1, 17):
        kind = (number * 7) % 4  # not in the order of the classes
        file = f"{kinds[kind]}/Bird_{number:04d}.jpg"
        picture(root / "images" / file, 10 * number, (20 + number, 30))
        images.append(f"{number} {file}")
        labels.append(f"{number} {kind + 1}")
        parts.append(f"{number} {int(number > 8)}")
    for name, lines in (
        ("images", images),
        ("image_class_labels", labels),
        ("train_test_split", parts),
        ("classes", [f"{i + 1} {kind}" for i, kind in enumerate(kinds)]),
    ):
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")


def test_cub_has_its_own_division(tmp_path: Path) -> None:
    root = tmp_path / "CUB_200_2011"
    make_cub(root)
    found = stream("dataset=cub_200", f"dataset.root={root}", "dataset.image_size=8")
    assert found.class_names == (
        "001.Black_footed_Albatross",
        "002.Laysan_Albatross",
        "010.Red_winged_Blackbird",
        "011.Rusty_Blackbird",
    )
    for part, numbers in (("train", range(9, 17)), ("test", range(1, 9))):
        expected = sorted(((n * 7) % 4, 10 * n) for n in numbers)
        seen = sorted(pair for task in found for pair in contents(task, part))
        assert [label for label, _ in seen] == [label for label, _ in expected]
        assert all(abs(a - b) <= 2 for (_, a), (_, b) in zip(seen, expected, strict=True))  # JPEG
    assert found.input_shape == (3, 8, 8)


def test_lists_that_contradict_are_refused(tmp_path: Path) -> None:
    make_cub(tmp_path)
    for file, text, message in (
        ("train_test_split.txt", "1 1\n", "is in only one of"),
        ("image_class_labels.txt", "\n".join(f"{n} 9" for n in range(1, 17)), "names class 9"),
        ("classes.txt", "one two three\n", "each needs a number and a value"),
    ):
        before = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text)
        with pytest.raises(InputError, match=message):
            cub_200(tmp_path, image_size=8)
        (tmp_path / file).write_text(before)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        cub_200(tmp_path, image_size=8)


def test_imagenet_r_is_divided_by_the_seed(tmp_path: Path) -> None:
    for kind in range(4):
        for number in range(5):
            picture(tmp_path / "imagenet-r" / f"n0{kind}443537" / f"art_{number}.jpg", 40 * kind + number)
    (tmp_path / "imagenet-r" / "README.txt").write_text("n00443537 one\n")
    found = stream("dataset=imagenet_r", f"dataset.root={tmp_path}", "dataset.image_size=8")
    assert [(len(task.train), len(task.test)) for task in found] == [(8, 2), (8, 2)]
    for task in found:
        assert all(abs(40 * label + 2 - colour) <= 5 for label, colour in contents(task, "train"))


def test_tiny_imagenet_is_tested_on_its_validation_set(tmp_path: Path) -> None:
    notes = []
    for kind in range(4):
        for number in range(3):
            picture(tmp_path / "train" / f"n0{kind}" / "images" / f"n0{kind}_{number}.JPEG", 50 * kind, (64, 64))
        picture(tmp_path / "val" / "images" / f"val_{kind}.JPEG", 50 * kind + 9, (64, 64), "L")
        notes.append(f"val_{kind}.JPEG\tn0{kind}\t0\t0\t62\t62")
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(notes) + "\n")
    found = stream("dataset=tiny_imagenet", f"dataset.root={tmp_path}")
    assert found.input_shape == (3, 64, 64)
    assert [pair for task in found for pair in contents(task, "test")] == [(c, 50 * c + 9) for c in range(4)]


def test_vtab_is_read_from_its_folders(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for kind in range(4):
            picture(tmp_path / part / f"{kind:02d}" / "a.png", 20 * kind + (part == "test"))
    found = stream("dataset=vtab", f"dataset.root={tmp_path}", "dataset.image_size=8")
    assert [pair for task in found for pair in contents(task, "test")] == [(c, 20 * c + 1) for c in range(4)]
    assert torch.equal(found[1].train.labels, torch.tensor([2, 3]))
