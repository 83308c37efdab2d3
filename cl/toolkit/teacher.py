"""A frozen copy of backbone and head, whose outputs a method distils."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cl.errors import InputError

if TYPE_CHECKING:
    from cl.engine.strategy import LearnerLike


class Teacher(nn.ModuleDict):
    """Backbone and head as they were when `copy_from` was last called, without gradients and in evaluation mode.

    Args:
        learner: The learner to copy.
        name: The name of the method in messages; None for a method that itself owns `encode`.

    Raises:
        InputError: If another strategy implements `encode`, which the copy would lack.

    Example:
        >>> from cl.testing import toy_learner
        >>> learner, stream = toy_learner(num_tasks=2)
        >>> view = learner.prepare(stream[0].train.x[:3])
        >>> bool(torch.equal(Teacher(learner, "LwF")(view), learner(view)))
        True
    """

    def __init__(self, learner: LearnerLike, name: str | None) -> None:
        if name is not None and learner.strategies.owned("encode"):
            raise InputError(
                f"{name} distils backbone and head, but another strategy owns encode: drop one of the two."
            )
        super().__init__(dict(deepcopy(learner.trunk()).requires_grad_(False).items()))
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Remain in evaluation mode, whatever the mode."""
        super().train(False)
        return self

    def copy_from(self, learner: LearnerLike) -> None:
        """Copy the present weights of backbone and head."""
        self.load_state_dict(learner.trunk().state_dict())

    @torch.no_grad()
    def forward(self, view: Tensor) -> Tensor:
        """Return the logits (B, C) of prepared inputs (B, *input)."""
        logits: Tensor = self["head"](self["backbone"](view))
        return logits
