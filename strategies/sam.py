r"""Sharpness-aware minimisation (SAM; Foret et al. 2021, ICLR, equation 2 and algorithm 1).

Each step takes the gradient of the loss not at the weights :math:`\theta`, but at the point near them where, to first
order, the loss is highest. With the gradient g of the loss L at :math:`\theta`:

.. math:: \hat\epsilon = \rho \, g / \lVert g \rVert_2, \qquad
          g_{SAM} = \nabla L(\theta + \hat\epsilon), \qquad g_{flat} = g_{SAM} - g

and the optimizer steps from :math:`\theta` with :math:`g_{SAM}`. The loss is the whole loss of the step: the incoming
and the replayed examples, and the terms of all other strategies, on the same augmented examples with the same draws of
dropout. So it composes with any of them (`strategy=[er,sam]`); Mehta et al. 2023 (JMLR, "An Empirical Investigation of
the Role of Pre-training in Lifelong Learning") show that flat minima forget less.

With `adaptive=true` (ASAM; Kwon et al. 2021, equation 7, without their bias term) the step is measured in units of the
weights: :math:`\hat\epsilon = \rho \, \theta^2 g / \lVert \theta g \rVert_2`, elementwise.

Defaults: rho = 0.05 is that of the paper's experiments; Kwon et al. use 0.5 to 1 for `adaptive=true`.
Differences from the paper: none in the update. Where another strategy projects gradients, its projection acts on
:math:`g_{SAM}` if it comes after `sam` in the list, and is lost if it comes before.
Differences from the reference code: statistics of batch norm are updated by the first forward pass alone; the released
code updates them by both. In several processes the point is one for all, from the mean gradient; the released code
lets each process have its own.

State: none. A step costs two forward and two backward passes. Scenarios: all. Refused: minibatches that share an update
(`trainer.accumulate_grad_batches`), strategies that write a buffer while they compute their loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from cl.distributed import mean_gradients
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy


def perturbation(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, adaptive: bool = False
) -> list[Tensor]:
    """Return the step to the point of highest loss near the weights, for each tensor; zero where the gradient is.

    Example:
        >>> w, g = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 20.0])
        >>> perturbation([w], [g], rho=0.05)[0]
        tensor([0.0050, 0.0498])
    """
    scaled = [w.detach() * g for w, g in zip(weights, gradients, strict=True)] if adaptive else list(gradients)
    norm = torch.stack([s.norm() for s in scaled]).norm().clamp_min(1e-12)
    steps = [w.detach() * s for w, s in zip(weights, scaled, strict=True)] if adaptive else scaled
    return [rho / norm * step for step in steps]


class SAM(Strategy):
    """Steps by the gradient at the point of highest loss near the weights.

    Args:
        rho: Distance of that point from the weights; with `adaptive`, relative to their sizes.
        adaptive: Whether the distance is measured in units of the weights (ASAM).

    Example:
        >>> SAM(rho=0.1)
        SAM(rho=0.1)
    """

    targets = ("label", "multilabel", "regression")
    uses_closure = True

    def __init__(self, rho: Annotated[float, Gt(0)] = 0.05, adaptive: bool = False) -> None:
        super().__init__()
        self.rho, self.adaptive = rho, adaptive

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Note the number of examples of the step, which weighs this process's gradient among those of the others."""
        self._rows = 0 if batch.idle else len(batch)
        return None

    def project_gradients(self, learner: LearnerLike) -> None:
        """Replace the gradients by those at the moved weights, and move the weights back, to the bit."""
        weights = [p for p in learner.parameters() if p.grad is not None]
        gradients = [p.grad for p in weights if p.grad is not None]
        own = [p.detach().clone() for p in weights]
        with torch.no_grad():
            for p, step in zip(weights, perturbation(weights, gradients, self.rho, self.adaptive), strict=True):
                p.add_(step)
        found = torch.autograd.grad(learner.closure(), weights, allow_unused=True)
        sharp = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, found, strict=True)]
        for p, old, g in zip(weights, own, mean_gradients(sharp, self._rows), strict=True):
            p.data.copy_(old)
            p.grad = g
