"""5-Datasets on small files in the true formats of its five datasets."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from PIL import Image
from torchvision import datasets

from cl.app.build import build, build_stream
from cl.data.task import Stream

NAMES = ["cifar10", "mnist", "svhn", "fashion_mnist", "notmnist"]
LABELS = np.arange(20) % 10


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def idx(folder: Path, name: str, array: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    (folder / name).write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from scipy.io import savemat

    def dump(file: str, content: object) -> list[str]:
        path = tmp_path / datasets.CIFAR10.base_folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return [file, hashlib.md5(path.read_bytes()).hexdigest()]

    for part in ("train_list", "test_list"):
        content = {"data": pixels(20, 3072), "labels": LABELS.tolist()}
        entries = [dump(file, content) for file, _ in getattr(datasets.CIFAR10, part)]
        monkeypatch.setattr(datasets.CIFAR10, part, entries)
    file, digest = dump(datasets.CIFAR10.meta["filename"], {"label_names": [f"thing {c}" for c in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "filename": file, "md5": digest})
    for name in ("MNIST", "FashionMNIST"):
        for part in ("train", "t10k"):
            idx(tmp_path / name / "raw", f"{part}-images-idx3-ubyte", pixels(20, 28, 28))
            idx(tmp_path / name / "raw", f"{part}-labels-idx1-ubyte", LABELS)
    split_list = {}
    for part in ("train", "test"):
        path = tmp_path / f"{part}_32x32.mat"
        savemat(path, {"X": pixels(32, 32, 3, 20), "y": np.where(LABELS == 0, 10, LABELS)[:, None]})
        split_list[part] = ["http://nowhere", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    for c, letter in enumerate("ABCDEFGHIJ"):
        folder = tmp_path / "notMNIST_small" / letter
        folder.mkdir(parents=True)
        for number in range(10):
            Image.fromarray(np.full((28, 28), 20 * c + number, np.uint8)).save(folder / f"{number}.png")
    return tmp_path


def built(root: Path, *overrides: str) -> Stream:
    given = ["stream=five_datasets", f"stream.datasets.cifar10.root={root}", *overrides]
    with initialize_config_module("cl.conf", version_base="1.3"):
        found: Stream = build_stream(compose("config", overrides=given))
    return found


def test_each_dataset_is_a_task_of_ten_classes_in_colour(root: Path) -> None:
    stream = built(root)
    assert list(stream.task_names) == NAMES and stream.scenario == "task"
    assert stream.num_classes == 50 and stream.input_shape == (3, 32, 32)
    for t, task in enumerate(stream):
        assert task.classes == tuple(range(10 * t, 10 * t + 10))
        for part in (task.train, task.test):
            x, y, _ = part.tensors()
            assert x.dtype == torch.uint8 and tuple(x.shape[1:]) == (3, 32, 32)
            assert set(y.tolist()) == set(range(10 * t, 10 * t + 10))
            grey = NAMES[t] not in ("cifar10", "svhn")
            assert bool((x == x[:, :1]).all()) == grey
    assert [len(task.train) for task in stream] == [100, 20, 20, 20, 90]
    assert len(stream[4].test) == 10  # a tenth of notMNIST
    letters, y, _ = stream[4].train.tensors()
    assert ((letters[:, 0, 0, 0] // 20).long() == y - 40).all()  # an image of one grey stays so
    assert stream.class_names[:1] + stream.class_names[-1:] == ("thing 0", "J")
    images = torch.from_numpy(pixels(20, 28, 28))
    first = stream[1].train.tensors()[0][0, 0].float()
    assert abs(float(first.mean() - images[0].float().mean())) < 3  # resized, neither cut nor padded


def test_order_and_scenario_are_choices_and_nothing_is_augmented(root: Path) -> None:
    stream = built(root, "stream.order=[4,3,2,1,0]", "stream.scenario=class")
    assert list(stream.task_names) == NAMES[::-1] and stream.scenario == "class"
    assert stream[0].classes == tuple(range(40, 50))
    assert stream.augment is None


def test_a_file_of_notmnist_that_is_no_image_is_named(root: Path) -> None:
    (root / "notMNIST_small" / "A" / "RGVtb2NyYXRpY2FCb2xk.png").write_bytes(b"")
    with pytest.raises(InstantiationException, match=r"RGVtb2NyYXRpY2FCb2xk.png cannot be read as an image"):
        built(root)


@pytest.mark.slow
def test_its_experiment_runs(root: Path, tmp_path: Path) -> None:
    given = [f"stream.datasets.cifar10.root={root}", "epochs=1", "report=quiet", "logger=none"]
    given += ["strategy=finetune", "trainer.accelerator=cpu"]
    with initialize_config_module("cl.conf", version_base="1.3"):
        cfg = compose("config", overrides=["experiment=five_datasets", *given])
    cfg.report = {}
    run = build(cfg, tmp_path).run()
    assert run.scenario == "task" and run.primary.R.shape == (6, 5)
    learned = torch.ones(5, 5).tril().bool()
    assert bool(torch.isfinite(run.primary.R[1:][learned]).all())
