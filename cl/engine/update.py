"""A training step: the strategies' hooks around one update of the weights, from one minibatch or several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl.distributed import world_size
from cl.engine.closure import Step, total_loss

if TYPE_CHECKING:
    from cl.engine.batch import Batch
    from cl.engine.learner import Learner


def train_on(learner: Learner, incoming: Batch, optimizer: Any) -> Tensor:
    """Update the weights once, or `updates_per_batch` times, on incoming examples; return the loss, detached."""
    terms: dict[str, Tensor] = {}
    learner.begin_step(terms)
    for measure in learner.before_step:
        measure(learner, incoming)
    for index in range(learner.updates):
        learner.update_index, incoming.again = index, index + 1 < learner.updates
        _update_on(learner, incoming, optimizer, terms)
    learner.in_step, learner.present = False, None
    return terms["loss"]


def _update_on(learner: Learner, incoming: Batch, optimizer: Any, terms: dict[str, Tensor]) -> None:
    if learner.compiled:
        torch.compiler.cudagraph_mark_step_begin()  # outputs of the last step's graphs may be overwritten
    chains, batch = learner.strategies.chains, incoming
    for _, extend in chains["extend_batch"]:
        batch = extend(learner, batch)
    batch.view = learner.prepare(batch.x, augment=True)
    if not learner.plain or learner.accumulate > 1:
        learner.rows = 0 if batch.idle else len(batch)  # weight of this loss among those of the same update
    if learner.closes:
        learner.present = Step(learner, batch)
    loss, logits = total_loss(learner, batch, terms)
    update(learner, loss, optimizer)
    if learner.update_index == 0:
        learner.step += 1
        learner.total_steps += 1
    if chains["after_step"] and not batch.idle:
        incoming.view, stale = batch.view[: len(incoming)], logits.detach()[: len(incoming)]
        for _, hook in chains["after_step"]:
            hook(learner, incoming, stale)


def update(learner: Learner, loss: Tensor, optimizer: Any) -> None:
    """Run the backward pass, and after every `accumulate`-th minibatch and the last one of an epoch an optimizer step.

    The gradient of a step is that of the mean loss over all examples of its minibatches, even if their sizes differ.

    Args:
        learner: With `rows`, the number of examples of the minibatch.
        loss: The mean loss over them.
        optimizer: Torch's own if the learner is `plain`, else in Lightning's wrapper.
    """
    plain, accumulate = learner.plain, learner.accumulate
    position = learner.step % learner.steps_per_epoch if accumulate > 1 else 0
    if position % accumulate == 0:
        _zero_grad(optimizer) if plain else optimizer.zero_grad()
        learner.summed = 0.0
    several = accumulate > 1 and world_size() == 1  # several processes weigh by examples in reduce_gradients
    if several:
        loss = loss * (learner.rows / learner.batch_size) / accumulate
    learner.summed += learner.rows / learner.batch_size
    loss.backward() if plain else learner.manual_backward(loss)
    if (position + 1) % accumulate and position + 1 < learner.steps_per_epoch:
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
