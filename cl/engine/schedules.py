"""Learning-rate schedules: how many steps they take in a task, and whether they change the learning rate there."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Interval
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from cl.errors import InputError
from cl.ranges import checked

if TYPE_CHECKING:
    from cl.data.task import Stream
    from cl.engine.learner import Learner

INTERVALS = ("epoch", "step")
LENGTHS = ("T_max", "total_steps", "total_iters")  # torch's names for the number of a schedule's steps
_TRIED = 20_000  # the most steps of a schedule that are tried before training
SchedulerFactory = Callable[[Optimizer], LRScheduler]


@checked
def warmup_cosine(
    optimizer: Optimizer, total_steps: Annotated[int, Ge(1)], warmup: Annotated[float, Interval(ge=0, lt=1)] = 0.1
) -> LRScheduler:
    r"""Return a schedule that rises linearly to the learning rate and then falls to 0 as half a cosine.

    With n steps, of which :math:`w = \mathrm{round}(\mathtt{warmup} \, n)` rise, the factor at step k, from 0, is

    .. math:: (k + 1) / w \text{ for } k < w, \quad
              \tfrac{1}{2} (1 + \cos(\pi (k - w) / (n - w))) \text{ after that}

    (Goyal et al. 2017, section 2.2; Loshchilov and Hutter 2017, equation 5).

    Args:
        optimizer: The optimizer whose learning rates it changes.
        total_steps: n.
        warmup: Share of the steps in which the rate rises.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule, rates = warmup_cosine(optimizer, total_steps=6, warmup=1 / 3), []
        >>> for _ in range(6):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 3))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    rising = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(total_steps - rising, 1))))

    return LambdaLR(optimizer, factor)


def known_interval(interval: str) -> str:
    """Return the interval of a schedule, "epoch" or "step", if it is one of these.

    Raises:
        InputError: If it is neither.
    """
    if interval not in INTERVALS:
        raise InputError(f"scheduler_interval={interval!r} is unknown: use epoch or step.")
    return interval


def make_schedule(factory: SchedulerFactory, optimizer: Optimizer, num_steps: int) -> LRScheduler:
    """Return the schedule of an optimizer; if its length is left open, it becomes the number of its steps.

    Args:
        factory: Such as `partial(CosineAnnealingLR)`. The length is left open if `T_max`, `total_steps` or
            `total_iters` is None, or has no default and is not given.
        optimizer: The optimizer whose learning rate the schedule changes.
        num_steps: How often the schedule moves in a task: its epochs, or its optimizer steps.

    Example:
        >>> from functools import partial
        >>> from torch.optim.lr_scheduler import CosineAnnealingLR
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> make_schedule(partial(CosineAnnealingLR, eta_min=0.01), optimizer, 40).T_max
        40
    """
    given = dict(getattr(factory, "keywords", {}))
    parameters = inspect.signature(getattr(factory, "func", factory)).parameters
    filled: dict[str, Any] = {}
    for name in parameters.keys() & set(LENGTHS):
        default = parameters[name].default
        value = given.get(name, None if default is inspect.Parameter.empty else default)
        # OneCycleLR takes either total_steps or both of epochs and steps_per_epoch
        if value is None and not (given.get("epochs") and given.get("steps_per_epoch")):
            filled[name] = max(num_steps, 1)
    return factory(optimizer, **filled)


def schedule_of(learner: Learner, optimizer: Optimizer, num_rows: Sequence[int]) -> LRScheduler | None:
    """Return the schedule of a learner's optimizer, or None.

    Args:
        learner: A learner in training.
        optimizer: The optimizer of the present task.
        num_rows: The numbers of training examples of the tasks that the schedule spans.
    """
    if learner._scheduler is None:
        return None
    by_step = learner.scheduler_interval == "step"
    shape = learner.batch_size, learner.limit, learner.accumulate
    each = [updates(n, *shape) * learner.updates if by_step else 1 for n in num_rows]
    begun, configured = learner.restarted_at // max(learner.steps_per_epoch, 1), learner.epochs - learner.more_epochs
    end = configured if begun < configured else learner.epochs
    return make_schedule(learner._scheduler, optimizer, sum(each) * (end - begun))


def updates(num_rows: int, batch_size: int, limit: int | float, accumulate: int = 1) -> int:
    """Return the optimizer steps of an epoch, each of `accumulate` minibatches or, at the end of an epoch, fewer.

    Args:
        num_rows: Training examples of a task.
        batch_size: Examples of a minibatch.
        limit: Minibatches of an epoch at most (int), or a share of them (float).
        accumulate: Minibatches per optimizer step.

    Example:
        >>> updates(103, 10, 1.0), updates(103, 10, 1.0, 4), updates(103, 10, 5), updates(103, 10, 0.5)
        (11, 3, 5, 5)
    """
    steps = -(-num_rows // batch_size)
    share = int(steps * limit) or int(limit > 0)  # a small share is one step, not zero
    return -(-min(steps, limit if isinstance(limit, int) else share) // accumulate)


def check_schedule(learner: Learner, stream: Stream, epochs: int, trainer: Mapping[str, Any]) -> str | None:
    """Try a learner's optimizer and schedule on a new weight, before anything is trained.

    Args:
        learner: With the optimizer and the schedule.
        stream: The stream that it will learn; without boundaries, one schedule spans all of it.
        epochs: Passes over a task.
        trainer: Options of the Trainer, of which `limit_train_batches` and `accumulate_grad_batches` are used.

    Returns:
        A note if the run ends before the schedule ever changes the learning rate; else None.

    Raises:
        InputError: If optimizer or schedule cannot step.
    """
    by_step, factory = learner.scheduler_interval == "step", learner._scheduler
    if factory is None or (by_step and learner.strategies.owned("training_data")):  # the number of steps is unknown yet
        return None
    if by_step and getattr(factory, "func", factory) is ReduceLROnPlateau:
        raise InputError("ReduceLROnPlateau watches the validation loss of every epoch: use scheduler_interval=epoch.")
    limits = trainer.get("limit_train_batches") or 1.0, trainer.get("accumulate_grad_batches") or 1
    each = [updates(len(task.train), learner.batch_size, *limits) * learner.updates * epochs for task in stream]
    steps = each if by_step else [epochs] * len(each)
    longest = max(steps) if stream.boundaries else sum(steps)
    name, rates = _rates(learner, factory, longest, min(longest, _TRIED))
    if longest > _TRIED or len(set(rates)) != 1:
        return None
    if len(set(_rates(learner, factory, longest, min(1000 * longest, _TRIED), past_end=True)[1])) == 1:
        return None  # a constant schedule
    unit, instead = ("step", "a shorter schedule") if by_step else ("epoch", "scheduler_interval=step")
    if getattr(factory, "func", factory) is ReduceLROnPlateau:
        instead = "a smaller patience"
    number = f"{longest} {unit}{'s' * (longest > 1)} {'in a task' if stream.boundaries else 'in all'}"
    return (
        f"{name} leaves the learning rate at {rates[0]:g}: it has {number}, and does not move before their end. Use "
        f"{instead}, more epochs, or scheduler=constant."
    )


def _rates(
    learner: Learner, factory: SchedulerFactory, length: int, steps: int, past_end: bool = False
) -> tuple[str, list[float]]:
    """Return the name of a schedule and its learning rates at the first steps.

    Args:
        learner: Builds the optimizer.
        factory: Builds the schedule.
        length: The length of the schedule if it is left open.
        steps: How many steps to take.
        past_end: Whether to take steps past that length, and to ignore that a schedule refuses them.
    """
    optimizer = learner.new_optimizer([torch.nn.Parameter(torch.zeros(1))])
    rates: list[float] = []
    try:
        schedule = make_schedule(factory, optimizer, length)
        optimizer.step()
        for _ in range(steps):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            schedule.step(0.0) if isinstance(schedule, ReduceLROnPlateau) else schedule.step()
    except Exception as error:
        if not past_end:
            raise InputError(f"Optimizer and scheduler cannot step ({error}): correct their arguments.") from error
    return type(schedule).__name__, rates
