from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchvision import datasets

from cl.data.sources import digits, synthetic, torchvision_dataset
from cl.errors import InputError

Bytes = npt.NDArray[np.uint8]


def pixels(count: int, *shape: int) -> Bytes:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def idx(array: Bytes) -> bytes:
    """The IDX format: two zero bytes, 8 for uint8, the number of axes, their sizes big-endian, the values."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def labels(count: int, num_classes: int = 10) -> Bytes:
    return (np.arange(count) % num_classes).astype(np.uint8)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_digits_are_scikit_learns_scans() -> None:
    from sklearn.datasets import load_digits

    data, scans = digits(test_fraction=0.25, seed=3), load_digits()
    assert data.input_shape == (1, 8, 8) and data.num_classes == 10
    x, y = torch.cat([data.train_x, data.test_x]).flatten(1), torch.cat([data.train_y, data.test_y])
    ours = sorted((label, *row) for label, row in zip(y.tolist(), x.tolist(), strict=True))
    scaled = np.rint(scans.data / 16 * 255).astype(int)
    assert ours == sorted((label, *row) for label, row in zip(scans.target.tolist(), scaled.tolist(), strict=True))
    assert len(data.test_y) == round(len(scans.target) / 4)
    assert np.abs(data.test_y.bincount().numpy() - np.bincount(scans.target) / 4).max() < 1
    train = data.train_x.double() / 255
    assert data.mean == pytest.approx([float(train.mean())])
    assert data.std == pytest.approx([float(train.std(correction=0))])


def test_mean_and_std_can_be_given_and_switched_off() -> None:
    assert digits(mean=[0.5], std=[0.25]).mean == (0.5,)
    assert digits(mean=[0.5]).std == digits().std
    off = digits(mean=[0.5], std=[0.25], normalize=False)
    assert (off.mean, off.std) == ((0.0,), (1.0,))
    with pytest.raises(InputError, match="test set of 'digits' is empty"):
        digits(test_fraction=0.0)


def test_synthetic_has_the_accuracy_that_separation_says() -> None:
    data = synthetic(num_classes=2, num_train=20_000, num_test=20_000, input_shape=(6,), separation=2.0, seed=1)
    means = torch.stack([data.train_x[data.train_y == c].mean(0) for c in range(2)])
    assert float((means[0] - means[1]).norm()) == pytest.approx(2.0, abs=0.06)
    nearest = torch.cdist(data.test_x, means).argmin(1)
    accuracy = float((nearest == data.test_y).double().mean())
    bayes = 0.5 * (1 + float(torch.erf(torch.tensor(1.0) / 2**0.5)))  # Phi(separation / 2)
    assert accuracy == pytest.approx(bayes, abs=0.01)  # 4 standard errors
    assert float(data.train_x[data.train_y == 0].std(0).mean()) == pytest.approx(1.0, abs=0.02)
    assert (data.mean, data.std) == ((0.0,), (1.0,))


def test_synthetic_classes_are_balanced_distinct_and_reproducible() -> None:
    data = synthetic(num_classes=7, num_train=70, num_test=15, input_shape=(3,), separation=5.0, seed=2)
    assert data.train_y.bincount().tolist() == [10] * 7
    assert torch.equal(data.train_x, synthetic(7, 70, 15, (3,), 5.0, seed=2).train_x)
    assert not torch.equal(data.train_x, synthetic(7, 70, 15, (3,), 5.0, seed=3).train_x)
    assert not torch.equal(data.train_x[:15], data.test_x)
    image = synthetic(num_classes=2, input_shape=(3, 8, 8), image=True)
    assert image.train_x.dtype == torch.uint8 and image.input_shape == (3, 8, 8) and len(image.mean) == 3
    assert float(image.train_x.float().std()) == pytest.approx(32, abs=2)
    with pytest.raises(InputError, match=r"need input_shape=\[C, H, W\], not \[16\]"):
        synthetic(image=True)
    with pytest.raises(InputError, match="leave one of 10 classes empty"):
        synthetic(num_train=9)


MNIST_LIKES = [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]


@pytest.mark.parametrize(("name", "source"), MNIST_LIKES)
def test_mnist_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    raw = tmp_path / source / "raw"
    raw.mkdir(parents=True)
    content = {
        "train-images-idx3-ubyte": pixels(20, 28, 28),
        "train-labels-idx1-ubyte": labels(20),
        "t10k-images-idx3-ubyte": pixels(10, 28, 28),
        "t10k-labels-idx1-ubyte": labels(10),
    }
    sums = []
    for file, array in content.items():
        packed = gzip.compress(idx(array))
        (raw / f"{file}.gz").write_bytes(packed)
        sums.append((f"{file}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(getattr(datasets, source), "resources", sums)
    data = torchvision_dataset(name, tmp_path, mean=[0.5], std=[0.5])
    assert np.array_equal(data.train_x[:, 0], content["train-images-idx3-ubyte"])
    assert np.array_equal(data.test_x[:, 0], content["t10k-images-idx3-ubyte"])
    assert data.train_y.tolist() == [*range(10), *range(10)] and data.test_y.tolist() == list(range(10))
    assert len(data.class_names) == 10 and data.mean == (0.5,)

    stored = raw / "t10k-images-idx3-ubyte"
    stored.write_bytes(idx(~pixels(10, 28, 28)))
    assert torch.equal(torchvision_dataset(name, tmp_path, download=False).test_x, ~data.test_x)
    stored.write_bytes(stored.read_bytes()[:500])
    with pytest.raises(InputError, match=f"{name} could not be loaded"):
        torchvision_dataset(name, tmp_path, cache=False)


@pytest.mark.parametrize(("split", "first", "num_classes"), [("letters", 1, 26), ("balanced", 0, 47)])
def test_emnist_stands_upright_and_counts_from_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, first: int, num_classes: int
) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    upright, y = pixels(60, 28, 28), labels(60, num_classes)
    with zipfile.ZipFile(raw / "gzip.zip", "w") as archive:
        for part in ("train", "test"):
            stored = idx(upright.swapaxes(1, 2)), idx(y + np.uint8(first))
            for kind, content in zip(("images-idx3", "labels-idx1"), stored, strict=True):
                archive.writestr(f"gzip/emnist-{split}-{part}-{kind}-ubyte.gz", gzip.compress(content))
    monkeypatch.setattr(datasets.EMNIST, "md5", hashlib.md5((raw / "gzip.zip").read_bytes()).hexdigest())
    data = torchvision_dataset("emnist", tmp_path, split=split)
    assert np.array_equal(data.train_x[:, 0], upright)
    assert data.train_y.tolist() == y.tolist()
    assert data.num_classes == num_classes and data.class_names[0] == ("a" if first else "0")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source: Any = getattr(datasets, name.upper())
    folder, num_classes = tmp_path / source.base_folder, int(name[5:])
    folder.mkdir()
    key, names = ("labels", "label_names") if name == "cifar10" else ("fine_labels", "fine_label_names")
    train: list[Bytes] = []

    def dump(file: str, content: object) -> str:
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    def batch(count: int) -> Bytes:
        return pixels(count, 3072)

    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for part, entries in lists.items():
        for position, (file, _) in enumerate(getattr(source, part)):
            x = batch(num_classes + position)
            train += [x] if part == "train_list" else []
            entries.append([file, dump(file, {"data": x, key: [i % num_classes for i in range(len(x))]})])
    meta = source.meta | {"md5": dump(source.meta["filename"], {names: [f"c{i}" for i in range(num_classes)]})}
    for attribute, value in (*lists.items(), ("meta", meta)):
        monkeypatch.setattr(source, attribute, value)

    data = torchvision_dataset(name, tmp_path)
    assert np.array_equal(data.train_x.flatten(1), np.concatenate(train))  # rows are red, then green, then blue
    assert data.input_shape == (3, 32, 32) and data.num_classes == num_classes and data.class_names[1] == "c1"
    assert data.mean == pytest.approx((np.concatenate(train).reshape(-1, 3, 1024) / 255).mean((0, 2)))
    again = torchvision_dataset(name, tmp_path, download=False)
    assert torch.equal(again.train_x, data.train_x) and again.class_names == data.class_names


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    y = np.array([10, *range(1, 10)], dtype=np.uint8)[:, None]  # SVHN calls the digit 0 "10"
    split_list = {}
    for part, count in (("train", 10), ("test", 10)):
        file = tmp_path / f"{part}_32x32.mat"
        savemat(file, {"X": pixels(count, 32, 32, 3).transpose(1, 2, 3, 0), "y": y})
        split_list[part] = ["http://nowhere", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    data = torchvision_dataset("svhn", tmp_path)
    assert np.array_equal(data.train_x, pixels(10, 32, 32, 3).transpose(0, 3, 1, 2))
    assert data.train_y.tolist() == list(range(10)) and data.class_names == tuple("0123456789")


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize(
    ("name", "file", "folder"),
    [
        ("mnist", "train-images-idx3-ubyte", "MNIST/raw"),
        ("emnist", "emnist-balanced-test-labels-idx1-ubyte", "EMNIST/raw"),
        ("cifar100", "train, test, meta", "cifar-100-python"),
        ("cifar10", "data_batch_5", "cifar-10-batches-py"),
        ("svhn", "train_32x32.mat, test_32x32.mat", ""),
    ],
)
def test_missing_files_are_named_with_their_folder(
    tmp_path: Path, name: str, file: str, folder: str, download: bool
) -> None:
    with pytest.raises(InputError) as caught:
        torchvision_dataset(name, tmp_path, download=download)
    message = str(caught.value)
    assert file in message and f"into {tmp_path / folder}" in message and "\n" not in message
    assert ("no network in tests" in message) == download


def test_torchvision_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'cifar1"):
        torchvision_dataset("cifar", tmp_path)
    with pytest.raises(InputError, match="split of emnist called 'letter': did you mean 'letters'"):
        torchvision_dataset("emnist", tmp_path, split="letter")
    with pytest.raises(InputError, match="only for emnist, not mnist"):
        torchvision_dataset("mnist", tmp_path, split="letters")
