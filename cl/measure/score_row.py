"""A row of R of a saved learner, on the test sets of any stream that fits it; nothing is trained or recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from cl import distributed
from cl.data.feature_rows import raw
from cl.data.task import Stream, TaskData, shard
from cl.engine.batch import Batch
from cl.engine.head import Mask, competing
from cl.engine.learner import Learner
from cl.engine.loader import evaluation
from cl.engine.score import start
from cl.errors import InputError
from cl.trainer.arguments import TrainerFactory, quiet, quiet_trainer
from cl.trainer.processes import replicated

Rows = dict[str, Tensor]


def score_row(learner: Learner, stream: Stream, trainer: TrainerFactory) -> tuple[Rows, Rows]:
    r"""Return the row of R and that of the calibration errors that a learner has on a stream's test sets.

    On an example of test set j with the classes :math:`C_j`, the same classes compete as in R: in the class-incremental
    scenario those that the learner has seen, if they include :math:`C_j`, else all; in the task-incremental one
    :math:`C_j`; in the domain-incremental one all (`cl.engine.head.competing`). The scenario is that of the learner.

    Args:
        learner: As it was after some of its tasks, `learner.tasks_learned`. It is not changed, except that it may be on
            another device afterwards.
        stream: Its T' test sets are scored; it must pass `check_fit`.
        trainer: Builds the Lightning Trainer, which chooses device and precision.

    Returns:
        Rows (T',) by the keys of `learner.matrices`, on the CPU; then those of `learner.calibration`.

    Example:
        >>> from cl.testing.toys import toy_learner, toy_stream, trainer
        >>> learner, _ = toy_learner(num_tasks=2)
        >>> rows, errors = score_row(learner, toy_stream(2, seed=1), trainer)
        >>> rows["class"].shape, sorted(errors)
        (torch.Size([2]), ['class', 'task'])
    """
    factory = replicated(_of_one_process(trainer) if distributed.world_size() == 1 else trainer)
    scoring = _Scoring(learner, stream)
    with quiet(), _at_its_last_task(learner):
        built = quiet_trainer(factory)
        tests = evaluation(learner, [shard(task.test) for task in stream], built.strategy.root_device)
        built.test(scoring, tests, verbose=False)
    return scoring.rows, scoring.errors


def _of_one_process(trainer: TrainerFactory) -> TrainerFactory:
    """Return a factory of Trainers for this process alone, also if the run was trained in several."""
    given = {"strategy": "auto", "devices": 1, "num_nodes": 1, **getattr(trainer, "keywords", {})}
    several = isinstance(given["devices"], int) and given["devices"] != 1
    return partial(trainer, devices=1, num_nodes=1) if several or given["strategy"] != "auto" else trainer


class _Scoring(pl.LightningModule):
    """What Lightning tests: the predictions of a learner, scored with masks for the test sets of another stream."""

    def __init__(self, learner: Learner, stream: Stream) -> None:
        super().__init__()
        self.learner = learner
        membership = membership_of(stream, learner.num_classes).to(learner.device)
        self.register_buffer("membership", membership, persistent=False)
        names = dict.fromkeys(str(matrix.mask) for matrix in learner.matrices.values())
        self.masks = nn.ModuleDict({name: Mask(len(stream), learner.num_classes).to(learner.device) for name in names})
        for name, mask in self.masks.items():
            mask.set(competing(name, learner.seen, membership))  # type: ignore[operator, arg-type]

    def _mask(self, logits: Tensor, task: Tensor, name: str) -> Tensor:
        return self.masks[name](logits, task)  # type: ignore[no-any-return]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch unchanged: the loader has put it on the device."""
        return batch

    def on_test_epoch_start(self) -> None:
        """Start the scores."""
        learner = self.learner
        self._score = start(learner.target, list(learner.matrices), self._mask, self.membership)  # type: ignore[arg-type]

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch, whose examples may be of several test sets."""
        self._score.update(self.learner.predict(batch), batch)

    def on_test_epoch_end(self) -> None:
        """Keep the rows."""
        self.rows, self.errors = (
            {name: row.float().cpu() for name, row in found.items()}
            for found in (self._score.rows(), self._score.errors())
        )


@contextmanager
def _at_its_last_task(learner: Learner) -> Iterator[None]:
    """Let the learner be at its last learned task in this context, as it was when R was measured."""
    task, trainer = learner.task, learner._trainer
    learner.task = replace(task, index=max(learner.tasks_learned - 1, 0))
    try:
        yield
    finally:
        learner.task = task
        learner.trainer = trainer


@contextmanager
def unchanged(learner: Learner) -> Iterator[None]:
    """Restore a learner's whole state, and its device, when this context ends.

    Example:
        >>> from cl.testing import toy_learner
        >>> learner, _ = toy_learner(num_tasks=2)
        >>> with unchanged(learner):
        ...     _ = learner.head.weight.data.zero_()
        >>> bool(learner.head.weight.any())
        True
    """
    device = learner.device
    before = {key: value.clone() if isinstance(value, Tensor) else deepcopy(value) for key, value in _state(learner)}
    try:
        yield
    finally:
        learner.to(device)
        learner.load_state_dict(before, strict=True)


def _state(learner: Learner) -> list[tuple[str, Any]]:
    return list(learner.state_dict().items())


# ---- what fits ------------------------------------------------------------------------------------------------------


def membership_of(stream: Stream, num_classes: int) -> Tensor:
    """Return the classes of each task of a stream among those of a learner, bool (T, C).

    Example:
        >>> from cl.testing import toy_stream
        >>> membership_of(toy_stream(2), 4).int().tolist()
        [[1, 1, 0, 0], [0, 0, 1, 1]]
    """
    found = torch.zeros(len(stream), num_classes, dtype=torch.bool)
    for task in stream:
        found[task.index, slice(None) if stream.target.name == "regression" else list(task.classes)] = True
    return found


def _first_kind(data: TaskData) -> str:
    """Return type and shape of the first raw input, in words."""
    x = raw(data).take(torch.tensor([0])).tensors()[0]
    return f"{str(x.dtype).removeprefix('torch.')} inputs of shape {tuple(x.shape[1:])}"


def check_fit(learner: Learner, stream: Stream, class_names: Sequence[str] = ()) -> None:
    """Refuse a stream whose test sets a learner cannot be scored on.

    Args:
        learner: The learner.
        stream: The stream.
        class_names: The names of the learner's classes; empty if they are unknown.

    Raises:
        InputError: If inputs, targets or classes differ; or, for a task-incremental learner, which is told the task of
            every test example, if the classes of a test set are not those of the task at the same position.
    """
    stream.check()
    here, there = (_first_kind(data) for data in (stream[0].test, learner.task.train))
    name = f"{stream.name!r} does not fit the saved learner:"
    if here != there:
        raise InputError(f"{name} it has {here}, the learner was trained on {there}. Give a stream of such inputs.")
    if stream.target.name != learner.target.name:
        raise InputError(
            f"{name} its targets are of kind {stream.target.name}, the learner's of kind {learner.target.name}. Give "
            "a stream with those of the learner."
        )
    if stream.num_classes > learner.num_classes:
        raise InputError(
            f"{name} it has {stream.num_classes} classes, the learner {learner.num_classes}. Give a stream of the "
            "learner's classes."
        )
    names = list(zip(stream.class_names, class_names, strict=False))
    other = next((label for label, (a, b) in enumerate(names) if a != b), None)
    if other is not None:
        raise InputError(
            f"{name} its class {other} is {stream.class_names[other]!r}, the learner's is {class_names[other]!r}. Give "
            "a stream with the learner's classes in the learner's order."
        )
    if learner.scenario == "task":
        _check_tasks(learner, stream, name)


def _check_tasks(learner: Learner, stream: Stream, name: str) -> None:
    found = membership_of(stream, learner.num_classes)
    for position, classes in enumerate(found):
        own = learner.membership[position].cpu() if position < learner.num_tasks else None
        if own is None or not torch.equal(own, classes):
            what = "has no such task" if own is None else f"has {own.nonzero().flatten().tolist()} there"
            raise InputError(
                f"{name} a task-incremental learner is told the task of a test example, and task {position + 1} of "
                f"the stream has the classes {classes.nonzero().flatten().tolist()}, where the learner {what}. Give a "
                "stream whose tasks have the classes of the learner's tasks, in order."
            )
