"""One optimizer step, from the minibatches that make it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cl.distributed import world_size

if TYPE_CHECKING:
    from cl.engine.learner import Learner


def update(learner: Learner, loss: Tensor, optimizer: Any) -> None:
    """Backward; and, on every `accumulate`-th minibatch of an epoch and on its last, one optimizer step.

    Its gradient is that of the mean loss over the rows of all its minibatches, however many each of them has.

    Args:
        learner: Whose `rows` are those of the minibatch.
        loss: The mean over them.
        optimizer: Torch's own where the learner is `plain`, else in Lightning's wrappers.
    """
    plain, accumulate = learner.plain, learner.accumulate
    place = learner.step % learner.steps_per_epoch if accumulate > 1 else 0
    if place % accumulate == 0:
        _zero_grad(optimizer) if plain else optimizer.zero_grad()
        learner.summed = 0.0
    several = accumulate > 1 and world_size() == 1  # else the processes weigh by rows
    if several:
        loss = loss * (learner.rows / learner.batch_size) / accumulate
    learner.summed += learner.rows / learner.batch_size
    loss.backward() if plain else learner.manual_backward(loss)
    if (place + 1) % accumulate and place + 1 < learner.steps_per_epoch:
        return
    if several and learner.summed != accumulate:
        for parameter in learner.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(accumulate / learner.summed)
    if plain:
        learner.on_before_optimizer_step(optimizer)
        optimizer.step()
        progress = learner.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
    else:
        optimizer.step()
    if learner.scheduler_interval == "step" and learner._schedule is not None:
        learner._schedule.step()


def _zero_grad(optimizer: Any) -> None:
    for group in optimizer.param_groups:  # what zero_grad does, without the profiler's entry around it
        for parameter in group["params"]:
            parameter.grad = None
