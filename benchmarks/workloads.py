"""What is timed: a stream, a model and a budget, the same for every contestant."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """One job: train on each task in turn, and after each evaluate on the test sets of all.

    Attributes:
        name: On the command line.
        about: One line for the table's title.
        dataset: "mnist" or "cifar100".
        split: Classes split over the tasks; else each task is a permutation of the pixels.
        num_tasks: Tasks that are learned.
        batch_size: Incoming rows a step.
        lr: Of plain SGD.
        of_tasks: Tasks that the classes are split over, where only the first `num_tasks` of them are learned.
        replay: Remembered rows a step.
        memory: Exemplars of the reservoir.
        augment: Random crop and flip.
        tolerance: Points of average accuracy within which contestants have done the same job.
    """

    name: str
    about: str
    dataset: str
    split: bool
    num_tasks: int
    batch_size: int
    lr: float
    of_tasks: int = 0
    replay: int = 0
    memory: int = 500
    augment: bool = False
    tolerance: float = 8.0

    @property
    def num_classes(self) -> int:
        """Classes in all."""
        return 10 if self.dataset == "mnist" else 100

    def model(self) -> nn.Module:
        """Return the network, inputs to logits, from the same initial weights for every contestant and turn."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._model()

    def _model(self) -> nn.Module:
        if self.dataset == "mnist":
            return nn.Sequential(
                nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
            )
        from cl.backbones.networks import ResNet18

        backbone = ResNet18((3, 32, 32), width=20)
        return nn.Sequential(backbone, nn.Linear(backbone.num_features, 100))


WORKLOADS = {
    w.name: w
    for w in (
        Workload("online_mlp", "Split-MNIST, one pass, batch 10 + 10 replayed", "mnist", True, 5, 10, 0.05, replay=10),
        Workload("epoch_mlp", "Permuted-MNIST, 5 tasks, one pass, batch 128", "mnist", False, 5, 128, 0.1),
        Workload(
            "cnn_aug",
            "CIFAR-100, 3 of 10 tasks, ResNet-18 of width 20, batch 32 + 32 replayed, crop and flip",
            "cifar100",
            True,
            3,
            32,
            0.05,
            of_tasks=10,
            replay=32,
            augment=True,
        ),
        Workload("evaluate", "Permuted-MNIST, the test sets of 20 tasks, five times", "mnist", False, 20, 128, 0.1),
    )
}


def quietly(run: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a peer's warnings to itself, also where it switches them on again."""

    @functools.wraps(run)
    def wrapped(*args: Any) -> Any:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("ignore")
            return run(*args)

    return wrapped


Arrays = tuple[Tensor, Tensor, Tensor, Tensor]  # train x, train y, test x, test y
MEAN = {"mnist": [0.1307], "cifar100": [0.5071, 0.4865, 0.4409]}
STD = {"mnist": [0.3081], "cifar100": [0.2673, 0.2564, 0.2762]}


def load(workload: Workload, data: Path | None) -> tuple[list[Arrays], str]:
    """Return each task's uint8 images and int64 labels, and a sentence about where they come from."""
    if data is None:
        arrays, about = _made(workload), "images made on the spot (--data DIR takes the real ones)"
    else:
        from cl.data.sources import image_folder, torchvision_dataset

        folders = data / "cifar100"
        if workload.dataset == "cifar100" and (folders / "train").is_dir():
            source = image_folder(folders)
        else:
            source = torchvision_dataset(name=workload.dataset, root=str(data), download=False)
        arrays = tuple(
            torch.as_tensor(np.asarray(a)) for a in (source.train_x, source.train_y, source.test_x, source.test_y)
        )
        about = f"{workload.dataset}, the real images"
    return _tasks(workload, arrays), about


def _made(workload: Workload) -> Arrays:
    """Draw images of the true sizes around one prototype a class, learnable but not at once."""
    shape, train, test = ((1, 28, 28), 60_000, 10_000) if workload.dataset == "mnist" else ((3, 32, 32), 50_000, 10_000)
    draw = np.random.default_rng(0)
    prototypes = draw.integers(0, 160, (workload.num_classes, *shape))

    def images(rows: int) -> tuple[Tensor, Tensor]:
        y = draw.permutation(rows) % workload.num_classes
        x = prototypes[y] + draw.integers(0, 96, (rows, *shape))
        return torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(y)

    return (*images(train), *images(test))


def _tasks(workload: Workload, arrays: Arrays) -> list[Arrays]:
    x, y, test_x, test_y = arrays
    tasks = []
    for t in range(workload.num_tasks):
        if workload.split:
            share = workload.num_classes // (workload.of_tasks or workload.num_tasks)
            here = [(labels // share == t).nonzero().flatten() for labels in (y, test_y)]
            tasks.append((x[here[0]], y[here[0]], test_x[here[1]], test_y[here[1]]))
        else:
            order = torch.from_numpy(np.random.default_rng(t).permutation(x[0].numel()))
            tasks.append((_permute(x, order), y, _permute(test_x, order), test_y))
    return tasks


def _permute(x: Tensor, order: Tensor) -> Tensor:
    return x.flatten(1)[:, order].view(x.shape)
