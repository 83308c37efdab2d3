"""The weights that regularisation methods hold near old values: those of backbone and head, as one vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cl.errors import InputError

if TYPE_CHECKING:
    from cl.engine.strategy import LearnerLike


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one vector.

    Example:
        >>> flat([torch.zeros(1, 2), torch.ones(1)]).tolist()
        [0.0, 0.0, 1.0]
    """
    return torch.cat([tensor.flatten() for tensor in tensors])


@torch.no_grad()
def write(weights: Iterable[nn.Parameter], vector: Tensor) -> None:
    """Copy a vector, as `flat` returns it, into weights.

    Example:
        >>> weights = [nn.Parameter(torch.zeros(1, 2)), nn.Parameter(torch.zeros(1))]
        >>> write(weights, torch.tensor([1.0, 2.0, 3.0]))
        >>> [weight.tolist() for weight in weights]
        [[[1.0, 2.0]], [3.0]]
    """
    start = 0
    for weight in weights:
        weight.copy_(vector[start : start + weight.numel()].view_as(weight))
        start += weight.numel()


def held(learner: LearnerLike) -> list[nn.Parameter]:
    """Return the trainable parameters of backbone and head.

    Example:
        >>> from cl.testing import toy_learner
        >>> sum(p.numel() for p in held(toy_learner()[0]))
        614
    """
    return [p for p in learner.trunk().parameters() if p.requires_grad]


def check_held(name: str, learner: LearnerLike, size: int) -> None:
    """Refuse a learner whose trainable weights are not those of `setup`; to call in `before_task`.

    Args:
        name: The method.
        learner: The learner.
        size: The number of trainable weights in the method's `setup`.

    Raises:
        InputError: If all weights are frozen, or their number has changed; names the method.
    """
    if not held(learner):
        raise InputError(f"{name} holds trainable weights, and all are frozen: drop it, or what freezes them.")
    if sum(p.numel() for p in held(learner)) != size:
        raise InputError(
            f"{name} holds the weights that are trained, and another strategy has changed which ones: put {name} last "
            "in strategy=[...], or drop one of the two."
        )


def check_encode(name: str, learner: LearnerLike) -> None:
    """Refuse another strategy that owns `encode`, whose features depend on other weights than the backbone's.

    Raises:
        InputError: If there is one; names the method.
    """
    if learner.strategies.owned("encode"):
        raise InputError(
            f"{name} holds the weights of backbone and head, but another strategy owns encode: drop one of the two."
        )
