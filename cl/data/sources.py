"""Load datasets from scikit-learn, torchvision, folders of images or map-style datasets; or draw Gaussian classes."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from cl.data.cache import Allocate, decoded
from cl.data.dataset import Array, Dataset, Numbers, make_dataset, split_validation
from cl.data.images import image_folder as image_folder
from cl.data.items import read_sides
from cl.errors import InputError, unknown
from cl.files import expand_path
from cl.random import derive
from cl.ranges import checked

TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "emnist": "EMNIST",
    "svhn": "SVHN",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
_PATIENCE = 10.0  # seconds to wait for a server that does not answer


@checked
def digits(
    test_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.2,
    seed: int = 0,
    normalize: bool = True,
    mean: Numbers = None,
    std: Numbers = None,
    augment: nn.Module | None = None,
) -> Dataset:
    """Load scikit-learn's 1,797 scans of handwritten digits, uint8 (1, 8, 8), which need no download.

    Args:
        test_fraction: Share of each class that becomes the test set, in [0, 1).
        seed: Seed of that split.
        normalize: Whether to subtract `mean` and divide by `std`; else pixels are only divided by 255.
        mean: Mean of each channel, in [0, 1], or one number for all; None computes it from the training set.
        std: Standard deviation of each channel, in the same form.
        augment: Train-time augmentation of raw batches, or None.

    Example:
        >>> data = digits()
        >>> tuple(data.train_x.shape), len(data.test_y), int(data.train_x.max())
        ((1438, 1, 8, 8), 359, 255)
    """
    from sklearn.datasets import load_digits

    scans = load_digits()  # values 0..16
    x = torch.from_numpy(np.rint(scans.images * (255 / 16)).astype(np.uint8))[:, None]
    y = torch.from_numpy(scans.target.astype(np.int64))
    train, test = split_validation(y, test_fraction, seed)
    arrays = {"train_x": x[train], "train_y": y[train], "test_x": x[test], "test_y": y[test]}
    return make_dataset("digits", arrays, [str(d) for d in range(10)], normalize, mean, std, augment)


@checked
def synthetic(
    num_classes: int = 10,
    num_train: int = 1000,
    num_test: int = 500,
    input_shape: Sequence[Annotated[int, Ge(1)]] = (16,),
    separation: float = 4.0,
    image: bool = False,
    seed: int = 0,
    normalize: bool = True,
    mean: Numbers = None,
    std: Numbers = None,
    augment: nn.Module | None = None,
) -> Dataset:
    """Draw balanced classes from Gaussians of unit covariance.

    Class c is N(mu_c, I) with |mu_c| = separation / sqrt(2). With at least as many dimensions as classes, the means are
    orthogonal, so that any two are `separation` apart and the best accuracy on two classes is Phi(separation / 2).

    Args:
        num_classes: Number of classes, C.
        num_train: Number of training examples of all classes together.
        num_test: Number of test examples of all classes together.
        input_shape: Shape of one input.
        separation: Distance of two class means in standard deviations.
        image: Whether to store inputs z as uint8 images, 128 + 32 z rounded and clipped, instead of float32.
        seed: Seed of the means and of the examples.
        normalize: See `digits`.
        mean: See `digits`; None does not change the mean of float inputs.
        std: See `digits`; None does not change the scale of float inputs.
        augment: Train-time augmentation of raw batches, or None.

    Raises:
        InputError: If a class would have no example, or `image` is true and `input_shape` is not (C, H, W).

    Example:
        >>> synthetic(num_classes=3, input_shape=(1, 8, 8), image=True).train_x.dtype
        torch.uint8
    """
    shape = tuple(int(size) for size in input_shape)
    if not shape:
        raise InputError("dataset.input_shape=[] has no dimension: give one or more.")
    if min(num_train, num_test) < num_classes or num_classes < 1:
        raise InputError(
            f"num_train={num_train} and num_test={num_test} leave one of {num_classes} classes empty: raise them."
        )
    if image and len(shape) != 3:
        raise InputError(f"Synthetic images need input_shape=[C, H, W], not {list(shape)}: fix it or set image=false.")
    draw = np.random.default_rng(derive(seed, "synthetic"))
    size = int(np.prod(shape))
    means = draw.standard_normal((num_classes, size))
    means = np.linalg.qr(means.T)[0].T if num_classes <= size else means / np.linalg.norm(means, axis=1, keepdims=True)
    arrays: dict[str, Tensor] = {}
    for part, count in (("train", num_train), ("test", num_test)):
        y = np.arange(count) % num_classes
        z = means[y] * (separation / np.sqrt(2)) + draw.standard_normal((count, size))
        z = np.rint(128 + 32 * z).clip(0, 255).astype(np.uint8) if image else z.astype(np.float32)
        arrays |= {f"{part}_x": torch.from_numpy(z.reshape(count, *shape)), f"{part}_y": torch.from_numpy(y)}
    return make_dataset("synthetic", arrays, [str(c) for c in range(num_classes)], normalize, mean, std, augment)


def map_style(
    train: Any,
    test: Any,
    name: str = "dataset",
    class_names: Sequence[str] | None = None,
    normalize: bool = True,
    mean: Numbers = None,
    std: Numbers = None,
    augment: nn.Module | None = None,
) -> Dataset:
    """Read a training and a test set, map-style datasets of (input, label) items, into arrays, once.

    Args:
        train: Training items. Pictures become uint8 (C, H, W) with the channels that they have; floats of 16 and 64
            bits become float32; other arrays and tensors keep their type.
        test: Test items.
        name: Its name in reports.
        class_names: A name for each class that has examples, or for each label from 0 on. None takes the names from the
            datasets' `class_to_idx`, where both have one, and matches labels by name; else labels are the names.
        normalize: See `digits`.
        mean: See `digits`; None does not change the mean of float inputs.
        std: See `digits`; None does not change the scale of float inputs.
        augment: Train-time augmentation of raw batches, or None. Transforms of the items are applied once, when they
            are read.

    Raises:
        InputError: If there are no items, an item is not a pair of an input and a label, or two inputs or labels differ
            in shape or type.

    Example:
        >>> pairs = [(torch.zeros(2), 0), (torch.ones(2), 1)]
        >>> map_style(pairs, pairs).class_names
        ('0', '1')
    """
    x, y, names = read_sides([train], [test], class_names)
    arrays: dict[str, Any] = dict(zip(("train_x", "test_x", "train_y", "test_y"), (*x, *y), strict=True))
    arrays |= {key: value.float() for key, value in arrays.items() if value.dtype in (torch.float64, torch.float16)}
    known = names or [str(c) for c in range(int(y[0].max()) + 1)]
    return make_dataset(name, arrays, known, normalize, mean, std, augment)


def torchvision_dataset(
    name: str,
    root: str | Path = "data",
    split: str | None = None,
    download: bool = True,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    normalize: bool = True,
    mean: Numbers = None,
    std: Numbers = None,
    augment: nn.Module | None = None,
) -> Dataset:
    """Load mnist, fashion_mnist, kmnist, emnist, svhn, cifar10 or cifar100 through torchvision.

    EMNIST's files hold transposed images, and the labels of its split "letters" begin at 1; here images are upright and
    labels begin at 0.

    Args:
        name: The name of the dataset.
        root: The folder that contains the files in torchvision's layout, or that they are downloaded to.
        split: The split of EMNIST: byclass, bymerge, balanced (the default), letters, digits or mnist; else None.
        download: Whether to download missing files.
        cache: Whether to store the decoded arrays as memory-mapped files.
        cache_dir: The directory of these files; None means `<root>/.clsim-cache`.
        normalize: See `digits`.
        mean: See `digits`.
        std: See `digits`.
        augment: Train-time augmentation of raw batches, or None.

    Raises:
        InputError: If the name is unknown, or the files are missing and cannot be downloaded.
    """
    from torchvision import datasets

    if name not in TORCHVISION:
        raise unknown("torchvision dataset", name, TORCHVISION)
    source, root = getattr(datasets, TORCHVISION[name]), expand_path(root)
    if name == "emnist":
        split = split or "balanced"
        if split not in source.splits:
            raise unknown("split of emnist", split, source.splits)
    elif split is not None:
        raise InputError(f"split={split!r} is only for emnist, not {name}: leave it out.")
    files, archive = _files(source, root, split)

    def load(train: bool) -> Any:
        part: dict[str, Any] = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
        if split:
            part["split"] = split
        try:
            with _timeout(_PATIENCE):
                return source(root, download=download, **part)
        except (OSError, RuntimeError, EOFError, HTTPException) as error:  # URLError is an OSError
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise InputError(
                f"{name} could not be loaded from {root} ({reason}): "
                f"put {', '.join(f.name for f in files)} into {files[0].parent}{archive}."
            ) from error

    def build(_: Allocate) -> dict[str, Array]:
        parts = {"train": load(True), "test": load(False)}
        arrays = {f"{part}_x": _pixels(data, name) for part, data in parts.items()}
        shift = 1 if split == "letters" else 0
        for part, data in parts.items():
            labels = data.labels if name == "svhn" else data.targets
            arrays[f"{part}_y"] = np.asarray(labels, dtype=np.int64) - shift
        names = [str(d) for d in range(10)] if name in ("mnist", "svhn") else list(parts["train"].classes)[shift:]
        return arrays | {"class_names": np.array(names)}

    if cache and not all(file.is_file() for file in files):
        load(True), load(False)  # download the files first, so that they can be fingerprinted
    arrays = decoded(name, files, root, (name, split), build, cache, cache_dir)
    return make_dataset(name, arrays, arrays["class_names"].tolist(), normalize, mean, std, augment)


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _files(source: Any, root: Path, split: str | None) -> tuple[list[Path], str]:
    """Return the files that torchvision reads, and a remark on the archive that can replace them, or ""."""
    if split:
        folder, kinds = root / "EMNIST" / "raw", ("images-idx3-ubyte", "labels-idx1-ubyte")
        names = [f"emnist-{split}-{part}-{kind}" for part in ("train", "test") for kind in kinds]
        return [folder / name for name in names], f" (or gzip.zip, with download=true, into {folder})"
    if hasattr(source, "resources"):
        folder = root / source.__name__ / "raw"
        return [
            folder / name.removesuffix(".gz") for name, _ in source.resources
        ], " (or, with download=true, their .gz)"
    if hasattr(source, "base_folder"):
        names = [name for name, _ in source.train_list + source.test_list] + [source.meta["filename"]]
        return [
            root / source.base_folder / n for n in names
        ], f" (or {source.filename}, with download=true, into {root})"
    return [root / source.split_list[part][1] for part in ("train", "test")], ""


def _pixels(data: Any, name: str) -> Array:
    x: Array = np.asarray(data.data)
    if x.ndim == 4 and name != "svhn":  # SVHN is (N, C, H, W) already
        x = x.transpose(0, 3, 1, 2)  # from (N, H, W, C)
    if name == "emnist":
        x = x.swapaxes(1, 2)
    return x if x.ndim == 4 else x[:, None]
