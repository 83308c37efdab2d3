"""Checks before the first step: schedules that never move, minibatches that a network cannot take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from cl.distributed import world_size
from cl.engine.schedules import check_schedule, updates
from cl.errors import InputError

if TYPE_CHECKING:
    from cl.data.task import Stream, TaskData
    from cl.engine.learner import Learner
    from cl.engine.strategy import LearnerLike, Strategy


def preflight(learner: Learner, stream: Stream, epochs: int, trainer: Mapping[str, Any]) -> list[str]:
    """Refuse a training that would fail, before anything is measured or written.

    Args:
        learner: In its initial state.
        stream: The stream that it will learn.
        epochs: Passes over a task.
        trainer: Options of the Trainer.

    Returns:
        Notes for the user, such as that the schedule never moves the learning rate.

    Raises:
        InputError: If optimizer or schedule cannot step, or a minibatch of a single example meets batch norm.
    """
    if learner.more_epochs and not stream.boundaries:
        raise InputError(
            f"{' + '.join(learner.strategies)} adds {learner.more_epochs} epochs to each task for phases of its own, "
            f"and {stream.name!r} has no boundaries between tasks: use another stream or another strategy."
        )
    remark = check_schedule(learner, stream, epochs, trainer)
    _check_updates(learner, trainer.get("accumulate_grad_batches") or 1)
    unknown = epochs == 0 or any(learner.strategies.owned(hook) for hook in ("training_data", "encode"))
    limit = trainer.get("limit_train_batches") or 1.0
    for task in () if unknown else stream:
        if has_single_row(len(task.train), learner, limit) and not takes_single_row(learner, task.train):
            raise _refusal(learner, f"task {task.index + 1} of {stream.name!r} has {len(task.train)} rows")
    return [remark] if remark else []


def _check_updates(learner: Learner, accumulate: int) -> None:
    """Refuse minibatches that share an update where each has several, or where its loss is computed once more."""
    if accumulate == 1:
        return
    if learner.updates > 1:
        raise InputError(
            f"updates_per_batch={learner.updates} contradicts trainer.accumulate_grad_batches={accumulate}: "
            "set one of them to 1."
        )
    for strategy in learner.strategies.values():
        if strategy.uses_closure:
            raise InputError(
                f"{type(strategy).__name__} computes the loss of one minibatch again in each update: set "
                f"trainer.accumulate_grad_batches={accumulate} to 1, and batch_size to as many rows as you need."
            )


def check_hidden(stream: Stream, strategies: Mapping[str, Strategy]) -> None:
    """Refuse tasks that hide their labels if a strategy, or plain training, learns from labels.

    Raises:
        InputError: Naming the task and the strategy.
    """
    hidden = next((task.index for task in stream if task.hidden), None)
    if hidden is None:
        return
    learn = [type(strategy).__name__ for strategy in strategies.values() if strategy.needs_labels]
    if learn or not strategies:
        raise InputError(
            f"Task {hidden + 1} of {stream.name!r} hides its labels, and {learn[0] if learn else 'fine-tuning'} learns "
            "from labels: use a strategy with `needs_labels = False`, or show them."
        )


def check_optimizer(optimizer: Any, scheduler: Any, stream: Stream, trainer: Mapping[str, Any]) -> None:
    """Try an optimizer on a new weight, and check that the validation loss exists if the schedule watches it.

    Args:
        optimizer: A factory of optimizers.
        scheduler: A factory of schedules, or None.
        stream: The stream to learn.
        trainer: Options of the Trainer.

    Raises:
        InputError: If the factory builds no optimizer, the optimizer cannot step, or ReduceLROnPlateau watches a
            validation loss that is not measured after every epoch.
    """
    trial = _build(optimizer)
    if getattr(scheduler, "func", scheduler) is ReduceLROnPlateau:
        if any(task.val is None for task in stream):
            raise InputError(
                "ReduceLROnPlateau watches the validation loss, but a task has none: set stream.val_fraction."
            )
        for key in ("check_val_every_n_epoch", "limit_val_batches"):
            if trainer.get(key, 1) != 1:
                raise InputError(
                    f"ReduceLROnPlateau watches the validation loss of every epoch: drop trainer.{key}={trainer[key]}."
                )
    try:
        trial.step()
    except Exception as error:
        raise InputError(f"The optimizer cannot step ({error}): correct its arguments.") from error


def _build(optimizer: Any) -> Optimizer:
    if not callable(optimizer):
        raise InputError(
            f"optimizer={type(optimizer).__name__} makes no optimizer: give a function that does, such as "
            "functools.partial(torch.optim.SGD, lr=0.1)."
        )
    found = optimizer([torch.nn.Parameter(torch.zeros(1))])
    if not isinstance(found, Optimizer):
        raise InputError(f"optimizer makes a {type(found).__name__}, not an optimizer: correct its _target_.")
    return found


def check_watched(callbacks: Iterable[Callback], stream: Stream) -> None:
    """Refuse an EarlyStopping that watches a metric of the validation set if a task has no validation set.

    Raises:
        InputError: Naming the metric.
    """
    for callback in callbacks:
        watched = str(callback.monitor) if isinstance(callback, EarlyStopping) else ""
        if watched.startswith("val/") and any(task.val is None for task in stream):
            raise InputError(
                f"EarlyStopping watches {watched}, but a task has no validation set: set stream.val_fraction."
            )


def check_rows(learner: Learner, num_rows: int) -> None:
    """Refuse a minibatch of a single example once a task's training data, which a strategy may choose, are known.

    Raises:
        InputError: If a minibatch has one example and the backbone has batch norm.
    """
    if has_single_row(num_rows, learner, learner.limit) and not takes_single_row(learner, learner.task.train):
        raise _refusal(learner, f"there are {num_rows} rows in this task")


def _refusal(learner: Learner, what: str) -> InputError:
    where = f" in each of {world_size()} processes" if world_size() > 1 else ""
    return InputError(
        f"With batch_size={learner.batch_size}{where} a minibatch has a single row ({what}), which the norms of "
        f"{type(learner.backbone).__name__} cannot take: choose another batch_size, or a backbone without batch norm."
    )


def has_single_row(num_rows: int, learner: Learner, limit: int | float = 1.0) -> bool:
    """Say whether a process receives a minibatch of one example, and no strategy appends others.

    Args:
        num_rows: Training examples of the task.
        learner: Gives the batch size and the strategies.
        limit: Minibatches of an epoch at most (int), or a share of them (float).
    """
    if learner.strategies.chains["extend_batch"]:
        return False
    size, rest = learner.batch_size, num_rows % learner.batch_size
    whole = num_rows // size
    sizes = {size} if whole else set()
    if rest and updates(num_rows, size, limit) > whole:
        sizes.add(rest)
    # below 2 W examples, some of the W processes has one of its own, or none and borrows one
    return any(n < 2 * world_size() for n in sizes)


def takes_single_row(learner: LearnerLike, data: TaskData) -> bool:
    """Say whether the backbone in its present mode takes a minibatch of one example; trying it has no side effect.

    Args:
        learner: With the backbone.
        data: Examples, of which the first one is used.
    """
    view = learner.prepare(data.take(torch.zeros(1, dtype=torch.int64)).tensors()[0].to(learner.device))
    apart = {name: buffer.clone() for name, buffer in learner.backbone.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            functional_call(learner.backbone, apart, (view,))
    except ValueError as error:
        # torch's message for batch norm, and for group norm on one pixel
        return "more than 1 value per channel" not in str(error)
    return True


def check_draws(name: str, learner: LearnerLike, stream: Stream, parts: int = 1, **sizes: int | None) -> None:
    """Refuse to draw a single remembered example if batch norm needs two.

    A strategy calls this in `setup` if it passes remembered examples through the network on their own.

    Args:
        name: The strategy's name in the configuration.
        learner: With the backbone.
        stream: The stream that it will learn.
        parts: Into how many draws each size is divided.
        sizes: By name, the settings that give the number of drawn examples; None means as many as come in.

    Raises:
        InputError: Naming the setting.
    """
    ones = [key for key, size in sizes.items() if size is not None and size // parts == 1]
    if ones and not takes_single_row(learner, stream[0].train):
        raise InputError(
            f"{name}.{ones[0]}={sizes[ones[0]]} passes remembered examples one at a time through "
            f"{type(learner.backbone).__name__}, whose norms need two or more: set it to {2 * parts} or more, or "
            "use a backbone without batch norm."
        )
