"""Convert a stream, examples and a network to what Avalanche's strategies train on and evaluate."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cl.data.augment import to_floats
from cl.data.task import Stream, TaskData
from cl.errors import InputError
from cl.random import Random

Augment = Callable[[Tensor, np.random.Generator], Tensor]


@contextmanager
def quietly() -> Iterator[None]:
    """Hide the warnings of Avalanche (a missing solver at import, loggers, deprecations) inside the block.

    Example:
        >>> with quietly():
        ...     warnings.warn("No loggers specified", stacklevel=1)
    """
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python inside the block, and restore their states after it.

    Example:
        >>> state = torch.get_rng_state()
        >>> with drawing(3):
        ...     a = torch.rand(1)
        >>> with drawing(3):
        ...     bool(torch.rand(1) == a)
        True
        >>> bool((torch.get_rng_state() == state).all())
        True
    """
    from pytorch_lightning.utilities.seed import isolate_rng

    with isolate_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


def to_avalanche(stream: Stream, prepared: bool = True) -> Any:
    """Return an Avalanche benchmark of a stream: one experience for each task, with its examples and labels.

    Experiences carry task labels (those of the examples in the task-incremental scenario, else 0) and the classes of
    this, earlier and later experiences. Augmentation is not carried over.

    Args:
        stream: A stream whose targets are labels.
        prepared: Whether inputs are as a backbone receives them, normalised and float32; else they are as stored.

    Returns:
        A `CLScenario` with the streams "train" and "test", and "valid" where every task has validation examples.

    Raises:
        InputError: If the stream's targets are not labels.

    Example:
        >>> from cl.testing import toy_stream
        >>> benchmark = to_avalanche(toy_stream(num_tasks=2))
        >>> [(len(e.dataset), e.classes_in_this_experience) for e in benchmark.test_stream]
        [(24, [0, 1]), (24, [2, 3])]
    """
    if stream.target.name != "label":
        raise InputError(
            f"The targets of {stream.name!r} are of kind {stream.target.name}: an Avalanche benchmark needs labels."
        )
    with quietly():
        from avalanche.benchmarks import CLScenario, EagerCLStream

    classes = [task.classes for task in stream]
    prepare = preparation(stream.normalize) if prepared else None
    sides = {"train": [task.train for task in stream], "test": [task.test for task in stream]}
    held_out = [task.val for task in stream if task.val is not None]
    if len(held_out) == len(stream):
        sides["valid"] = held_out
    aware = stream.scenario == "task"
    return CLScenario(
        [
            EagerCLStream(name, [to_experience(part, t, classes, aware, prepare) for t, part in enumerate(parts)])
            for name, parts in sides.items()
        ]
    )


def to_experience(
    data: TaskData,
    index: int,
    classes: Sequence[Sequence[int]],
    task_labels: bool = False,
    prepare: Callable[[Tensor], Tensor] | None = None,
    augment: Augment | None = None,
    draws: Random | None = None,
) -> Any:
    """Return examples as an Avalanche experience.

    Args:
        data: Labelled examples; held in memory where `TaskData.resident` is true, else read one by one.
        index: Position of the task.
        classes: The classes of every task of the stream.
        task_labels: Whether Avalanche receives the task labels of the examples; else it receives 0.
        prepare: Maps raw inputs to what a network receives. It is applied once in advance; where there is augmentation,
            after it and to each example as it is read.
        augment: Train-time augmentation, in the dataset's transform group "train".
        draws: The generator that the augmentation draws from; None means a new one.

    Example:
        >>> data = TaskData(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
        >>> experience = to_experience(data, 0, [(0, 1), (2, 3)])
        >>> len(experience.dataset), experience.future_classes
        (3, [2, 3])
    """
    with quietly():
        from avalanche.benchmarks import DatasetExperience, EagerCLStream
        from avalanche.benchmarks.utils import (
            ConstantSequence,
            TaskLabels,
            TransformGroups,
            as_classification_dataset,
            as_taskaware_classification_dataset,
        )

        groups = None
        if augment is not None:
            act = partial(_row, prepare=prepare)
            groups = TransformGroups({"train": partial(act, augment=augment, draws=draws or Random()), "eval": act})
        elif prepare is not None:
            data = data.then(prepare)
        labels = data.tasks.tolist() if task_labels else ConstantSequence(0, len(data))
        dataset = as_classification_dataset(_Examples(data), groups)
        dataset = as_taskaware_classification_dataset(
            dataset.update_data_attribute("targets_task_labels", TaskLabels(labels))
        )
        experience: Any = DatasetExperience(dataset=dataset, current_experience=index)
        experience.origin_stream = EagerCLStream("train", [experience], set_stream_info=False)
    experience.task_labels = sorted(set(labels))
    if len(experience.task_labels) == 1:
        experience.task_label = experience.task_labels[0]
    past, own, coming = (
        sorted({c for task in part for c in task})
        for part in (classes[:index], classes[index : index + 1], classes[index + 1 :])
    )
    experience.classes_in_this_experience, experience.previous_classes = own, past
    experience.classes_seen_so_far = sorted({*past, *own})
    experience.future_classes = sorted({*coming} - {*past, *own})
    return experience


def preparation(normalize: nn.Module | None) -> Callable[[Tensor], Tensor]:
    """Return a function from raw inputs on the CPU to what a network receives, float32, by a copy of `normalize`.

    Example:
        >>> preparation(None)(torch.tensor([[0, 51]], dtype=torch.uint8)).tolist()
        [[0.0, 0.20000000298023224]]
    """
    return partial(_prepare, normalize=None if normalize is None else copy.deepcopy(normalize).cpu())


class _Examples(Dataset[tuple[Tensor, int]]):
    """Examples as items (input, label) of a map-style dataset."""

    def __init__(self, data: TaskData) -> None:
        self.data, self.held = data.on(torch.device("cpu")), data.resident
        self.targets: list[int] = data.labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        index = torch.tensor([row])
        x = self.data.x[index] if self.held else self.data.take(index).tensors()[0]
        return x[0], self.targets[row]


@torch.no_grad()
def _prepare(x: Tensor, normalize: nn.Module | None) -> Tensor:
    return to_floats(x if normalize is None else normalize(x)).to(torch.float32)


def _row(
    x: Tensor,
    prepare: Callable[[Tensor], Tensor] | None,
    augment: Augment | None = None,
    draws: Random | None = None,
) -> Tensor:
    rows = x[None] if augment is None or draws is None else augment(x[None], draws.generator)
    return (rows if prepare is None else prepare(rows))[0]


def to_network(backbone: nn.Module, head: nn.Module, competing: Tensor | None = None) -> Any:
    """Return backbone and head as one module, which maps prepared inputs to logits (B, C) and shares their parameters.

    Args:
        backbone: Maps prepared inputs to features.
        head: Maps features to logits.
        competing: Classes of each task, bool (T, C). The module is then a `MultiTaskModule`, which sets the logits of
            other tasks' classes to -1000, as Avalanche's own multi-head classifier does. None changes no logits.

    Example:
        >>> network = to_network(nn.Flatten(), nn.Linear(4, 2), torch.eye(2) > 0)
        >>> network(torch.zeros(1, 2, 2), torch.tensor([1]))[0, 0].item()
        -1000.0
    """
    with quietly():
        from avalanche.models import MultiTaskModule

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.feature_extractor, self.classifier = backbone, head  # names that some plugins ask for

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.classifier(self.feature_extractor(x))
            return logits

        def train(self, mode: bool = True) -> Network:
            body = self.feature_extractor
            frozen = not body.training and not any(p.requires_grad for p in body.parameters())
            super().train(mode)
            if frozen:
                body.eval()
            return self

    class MultiHead(Network, MultiTaskModule):  # type: ignore[misc, unused-ignore]
        competing: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("competing", competing)

        def forward(self, x: Tensor, task_labels: Tensor | int | None) -> Any:  # type: ignore[override]
            if task_labels is None:
                return self.forward_all_tasks(x)  # type: ignore[operator, unused-ignore]
            return Network.forward(self, x).masked_fill(~self.competing[task_labels], -1000.0)

        forward_single_task = forward

    return Network() if competing is None else MultiHead()


def take_back(network: Any, backbone: nn.Module, head: nn.Module) -> None:
    """Copy the weights of a trained network into backbone and head, for a strategy that trains a copy, as GDumb does.

    Args:
        network: The network that the strategy trained.
        backbone: Receives the weights of its `feature_extractor`.
        head: Receives the weights of its `classifier`.

    Raises:
        InputError: If the strategy trained a network of another architecture.

    Example:
        >>> from copy import deepcopy
        >>> head = nn.Linear(1, 1)
        >>> copy = deepcopy(to_network(nn.Flatten(), head))
        >>> _ = copy.classifier.weight.data.fill_(7.0)
        >>> take_back(copy, nn.Flatten(), head)
        >>> head.weight.item()
        7.0
    """
    for name, own in (("feature_extractor", backbone), ("classifier", head)):
        trained = getattr(network, name, None)
        try:
            if trained is not own:
                own.load_state_dict(trained.state_dict())  # type: ignore[union-attr]
        except (AttributeError, RuntimeError) as error:
            raise InputError(
                "The strategy of Avalanche trained a network of another architecture, which cannot be evaluated here: "
                "choose a strategy that trains the network it is given."
            ) from error
