"""The total loss of a step's batch once more, such as at moved weights, without side effects on the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cl.errors import InputError
from cl.random import Random

if TYPE_CHECKING:
    from cl.engine.batch import Batch
    from cl.engine.learner import Learner


class Step:
    """The batch of the present step, and the states of all generators before its forward pass.

    Args:
        learner: In a step, before its forward pass.
        batch: All examples of the step, with their `view`.
    """

    def __init__(self, learner: Learner, batch: Batch) -> None:
        self.batch, self._draws = batch, _draws(learner)

    def loss(self, learner: Learner, batch: Batch | None) -> Tensor:
        """Return the total loss of the batch, or of some of its examples, under the present weights.

        The draws (dropout, and what strategies draw for their loss) are those of the step. Afterwards the generators,
        the buffers of backbone and head (statistics of batch norm) and the attributes of the strategies are as before.

        Raises:
            InputError: If a strategy writes a buffer while its loss is computed.
        """
        before = _versions(learner)
        precision = learner.trainer.precision_plugin
        with ExitStack() as stack:
            stack.enter_context(_generators(learner, self._draws))
            stack.enter_context(_attributes(learner.strategies))
            stack.enter_context(_buffers(learner.trunk()))
            stack.enter_context(precision.forward_context())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.enable_grad())
            loss = total_loss(learner, self.batch if batch is None else batch, {})[0]
        written = [name for name, version in _versions(learner).items() if version != before[name]]
        if written:
            raise InputError(
                f"{written[0]} is written while the loss is computed, so that the loss cannot be computed again: use "
                "that strategy without one that asks for the closure."
            )
        return loss


def total_loss(learner: Learner, batch: Batch, terms: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the criterion plus the losses of all strategies, a scalar, and the logits (B, C).

    Args:
        learner: In training.
        batch: All examples of the step, with their `view`.
        terms: Receives the strategies' losses and the whole loss, detached, by name.
    """
    logits = learner(batch.view, batch.task)
    loss: Tensor = learner.strategies.owners["criterion"](learner, batch, logits)
    for name, term in learner.strategies.chains["loss"]:
        value = term(learner, batch, logits)
        if value is not None:
            loss = loss + value
            terms[name] = value.detach()
    terms["loss"] = loss.detach()
    return loss, logits


def _draws(learner: Learner) -> list[Any]:
    cuda = [torch.cuda.get_rng_state(learner.device)] if learner.device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda, *(random.generator.bit_generator.state for random in _randoms(learner))]


def _randoms(learner: Learner) -> list[Random]:
    return [module for module in learner.strategies.modules() if isinstance(module, Random)]


def _set_draws(learner: Learner, states: list[Any]) -> None:
    left = list(states)
    torch.set_rng_state(left.pop(0))
    if learner.device.type == "cuda":
        torch.cuda.set_rng_state(left.pop(0), learner.device)
    for random, state in zip(_randoms(learner), left, strict=True):
        random.generator.bit_generator.state = state


@contextmanager
def _generators(learner: Learner, states: list[Any]) -> Iterator[None]:
    """In this context all generators start from given states; then their own are restored."""
    own = _draws(learner)
    _set_draws(learner, states)
    try:
        yield
    finally:
        _set_draws(learner, own)


@contextmanager
def _buffers(trunk: nn.Module) -> Iterator[None]:
    """In this context the modules have copies of their buffers."""
    own = [(module, dict(module._buffers)) for module in trunk.modules() if module._buffers]
    for module, buffers in own:
        module._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for module, buffers in own:
            module._buffers.update(buffers)


@contextmanager
def _attributes(strategies: nn.Module) -> Iterator[None]:
    """On exit, the modules' attributes are what they were."""
    own = [(module, dict(vars(module))) for module in strategies.modules()]
    try:
        yield
    finally:
        for module, attributes in own:
            vars(module).clear()
            vars(module).update(attributes)


def _versions(learner: Learner) -> dict[str, int]:
    """Return how often each buffer of the strategies has been written."""
    return {name: buffer._version for name, buffer in learner.strategies.named_buffers()}


def loss_again(learner: Learner, batch: Batch | None) -> Tensor:
    """Return the total loss of the present step's batch, or of some of its examples; see `LearnerLike.closure`.

    Raises:
        InputError: Outside of the hooks of a step, or if no strategy has asked for it.
    """
    if learner.present is None:
        raise InputError(
            "closure() is for the hooks of a step from project_gradients on, of a strategy that sets "
            "`uses_closure = True` in its class."
        )
    return learner.present.loss(learner, batch)
