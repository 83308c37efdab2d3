"""The correction of a classifier's outputs for new classes, fitted on examples that it was not trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.enable_grad()
def affine_correction(logits: Tensor, y: Tensor, new: Tensor, decay: float) -> Tensor:
    r"""Return alpha and beta, (2,) in double precision, that correct the outputs of the new classes (Wu et al. 2019).

    They minimise a cross-entropy, which is convex in them:

    .. math:: \frac1n \sum_i \mathrm{CE}(q(x_i), y_i) + \tfrac{r}{2} \big( (\alpha - 1)^2 + \beta^2 \big), \qquad
              q_c = \alpha o_c + \beta \ (c\ \mathrm{new}), \quad q_c = o_c \ (c\ \mathrm{old})

    Args:
        logits: The outputs o, (n, K).
        y: Their labels, positions in K, (n,).
        new: Which classes are new, bool (K,).
        decay: Weight r of the penalty. With 0 there may be no minimum; then the values after some steps are returned.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0], [0.0, 2.0], [0.0, 1.0]])
        >>> found = affine_correction(logits, torch.tensor([0, 1, 1]), torch.tensor([False, True]), 0.1)
        >>> [round(value, 3) for value in found.tolist()]
        [0.4, 0.266]
    """
    pair = torch.tensor([1.0, 0.0], dtype=torch.float64, device=logits.device, requires_grad=True)
    identity, outputs = pair.detach().clone(), logits.detach().double()
    optimizer = torch.optim.LBFGS(
        [pair], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        corrected = torch.where(new, pair[0] * outputs + pair[1], outputs)
        loss = F.cross_entropy(corrected, y) + decay / 2 * (pair - identity).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return pair.detach()
