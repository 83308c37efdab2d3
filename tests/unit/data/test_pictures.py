from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

import cl.data.images
from cl.data.sources import image_folder
from cl.errors import InputError

Bytes = npt.NDArray[np.uint8]


def picture(seed: int, height: int = 8, width: int = 8) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(file: Path, pixels: Bytes, **options: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)  # type: ignore[arg-type]
    return file


def tree(root: Path, parts: tuple[str, ...] = ("train", "test"), count: int = 3) -> Path:
    """Two classes of lossless WebP, `count` a part."""
    for p, part in enumerate(parts):
        for c, label in enumerate(("cat", "dog")):
            for i in range(count):
                save(root / part / label / f"{i}.webp", picture(100 * p + 10 * c + i), lossless=True)
    return root


def refuses(words: str, root: Path, **options: object) -> None:
    with pytest.raises(InputError, match=words) as caught:
        image_folder(root, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_webp_folder_is_decoded_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes: list[int] = []
    original = cl.data.images.decode

    def counted(*arguments: Any) -> Bytes:
        decodes.append(1)
        return original(*arguments)

    monkeypatch.setattr(cl.data.images, "decode", counted)
    tree(tmp_path)
    for _ in range(2):
        data = image_folder(tmp_path)
        expected = [picture(10 * c + i).transpose(2, 0, 1) for c in range(2) for i in range(3)]
        assert np.array_equal(data.train_x, np.stack(expected))
        assert data.train_y.tolist() == [0, 0, 0, 1, 1, 1] and data.class_names == ("cat", "dog")
        assert data.mean == pytest.approx((np.stack(expected) / 255).mean((0, 2, 3)))
        assert data.train_x.is_contiguous()
    assert len(decodes) == 2  # train and test, once
    save(tmp_path / "test" / "dog" / "0.webp", picture(7), lossless=True)
    assert np.array_equal(image_folder(tmp_path).test_x[3], picture(7).transpose(2, 0, 1))
    assert len(decodes) == 4
    assert os.listdir(tmp_path / ".clsim-cache")


def test_cache_elsewhere_or_nowhere(tmp_path: Path) -> None:
    root = tree(tmp_path / "images")
    first = image_folder(root, cache_dir=tmp_path / "cache", name="pets")
    second = image_folder(root, cache=False)
    assert torch.equal(first.train_x, second.train_x) and first.mean == second.mean
    assert sorted(os.listdir(root)) == ["test", "train"]
    assert (first.name, second.name) == ("pets", "images")


def test_tiny_imagenets_own_layout(tmp_path: Path) -> None:
    wnids = ["n01443537", "n02099601"]
    for c, wnid in enumerate(wnids):
        for i in range(2):
            save(tmp_path / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", np.full((64, 64, 3), 40 * c, np.uint8))
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
    order = [1, 0, 1, 0]
    for i, c in enumerate(order):
        save(tmp_path / "val" / "images" / f"val_{i}.JPEG", np.full((64, 64, 3), 40 * c + 5, np.uint8))
    save(tmp_path / "test" / "images" / "test_0.JPEG", picture(0, 64, 64))  # Tiny-ImageNet's test set has no labels
    rows = [f"val_{i}.JPEG\t{wnids[c]}\t0\t32\t44\t62\n" for i, c in enumerate(order)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(rows))
    data = image_folder(tmp_path, test="val")
    assert data.class_names == tuple(wnids) and data.input_shape == (3, 64, 64)
    assert torch.equal(data.train_x[:, 0, 0, 0].long(), 40 * data.train_y)
    assert torch.equal(data.test_x[:, 0, 0, 0].long(), 40 * data.test_y + 5)
    assert data.test_y.bincount().tolist() == [2, 2]
    refuses("Class 'images' is in only one of .*train and .*test", tmp_path)
    (tmp_path / "val" / "images" / "val_2.JPEG").unlink()
    refuses("val_2.JPEG, which is not there", tmp_path, test="val")


def test_test_set_drawn_from_the_training_folder(tmp_path: Path) -> None:
    tree(tmp_path, ("train",), count=10)
    data = image_folder(tmp_path, test=None, test_fraction=0.3, seed=1)
    assert data.train_y.bincount().tolist() == [7, 7] and data.test_y.bincount().tolist() == [3, 3]
    rows = {tuple(x.flatten().tolist()) for x in torch.cat([data.train_x, data.test_x])}
    assert rows == {tuple(picture(10 * c + i).transpose(2, 0, 1).ravel().tolist()) for c in range(2) for i in range(10)}
    other = image_folder(tmp_path, test=None, test_fraction=0.3, seed=2)
    assert not torch.equal(other.test_x, data.test_x)
    refuses("test_fraction=0 must be above 0", tmp_path, test=None, test_fraction=0)


def test_formats_grey_and_palette_images(tmp_path: Path) -> None:
    tree(tmp_path)
    grey = picture(0)[:, :, 0]
    save(tmp_path / "train" / "cat" / "0.webp", np.repeat(grey[:, :, None], 3, 2), lossless=True)
    save(tmp_path / "train" / "cat" / "A.PNG", grey)
    save(tmp_path / "train" / "cat" / "B.bmp", picture(5))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    data = image_folder(tmp_path)
    assert np.array_equal(data.train_x[3], np.broadcast_to(grey, (3, 8, 8)))
    assert np.array_equal(data.train_x[4], picture(5).transpose(2, 0, 1))
    single = image_folder(tmp_path, channels=1)
    assert single.input_shape == (1, 8, 8) and np.array_equal(single.train_x[3, 0], grey)
    refuses("channels=4", tmp_path, channels=4)


def test_image_size_crops_the_centre_and_resizes(tmp_path: Path) -> None:
    tree(tmp_path)
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200  # the centred square
    save(tmp_path / "train" / "cat" / "0.webp", wide, lossless=True)
    refuses(r"1.webp is 8x8 where .*0.webp is 16x48: set image_size", tmp_path)
    data = image_folder(tmp_path, image_size=8)
    assert data.input_shape == (3, 8, 8) and int(data.train_x[0].min()) > 180  # the filter reaches over the edge
    assert np.array_equal(data.train_x[1], picture(1).transpose(2, 0, 1))
    assert image_folder(tmp_path, image_size=[4, 6]).input_shape == (3, 4, 6)
    refuses("image_size=0", tmp_path, image_size=0)


def test_train_and_test_of_different_sizes(tmp_path: Path) -> None:
    tree(tmp_path, ("train",))
    for label in ("cat", "dog"):
        save(tmp_path / "test" / label / "0.png", picture(0, 9, 9))
    refuses(r"\(3, 8, 8\) uint8 in the train set but \(3, 9, 9\) uint8 in the test set", tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    tree(tmp_path)
    file = tmp_path / "test" / "dog" / "1.webp"
    file.write_bytes(file.read_bytes()[:60] if content is None else content)
    refuses("dog.*1.webp cannot be read as an image", tmp_path)
    assert os.listdir(tmp_path / ".clsim-cache") == []


def test_image_of_sixteen_bits_is_refused(tmp_path: Path) -> None:
    tree(tmp_path)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "test" / "dog" / "deep.png")
    refuses("deep.png cannot be read as an image .more than 8 bits a channel", tmp_path)


def test_shared_files_are_refused_by_any_path(tmp_path: Path) -> None:
    tree(tmp_path)
    refuses("in both the train and the test set", tmp_path, test="train")
    target = tmp_path / "test" / "dog" / "copy.webp"
    target.symlink_to(tmp_path / "train" / "dog" / "0.webp")
    refuses("copy.webp is in both", tmp_path)
    target.unlink()
    os.link(tmp_path / "train" / "cat" / "0.webp", target)
    refuses("copy.webp is in both", tmp_path)


def test_missing_folders_and_classes(tmp_path: Path) -> None:
    refuses("train is not a folder", tmp_path)
    tree(tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    refuses("eel holds no image", tmp_path)
    save(tmp_path / "train" / "eel" / "deep" / "0.png", picture(0))
    refuses("Class 'eel' is in only one of", tmp_path)
    (tmp_path / "empty").mkdir()
    refuses("empty holds no class", tmp_path, train="empty")
