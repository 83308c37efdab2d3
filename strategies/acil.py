r"""ACIL and G-ACIL: analytic learning of the classifier by recursive least squares (Zhuang et al. 2022 and 2024).

Frozen features f(x) are expanded by a fixed random layer, :math:`h = \max(0, f(x) A)`, and the classifier W is the
ridge regression of the one-hot labels on h. It is updated with each batch H (B, M), Y (B, C), such that it is at all
times the one of all examples so far, although only W and the inverse R of the regularised Gram matrix are kept:

.. math:: R \leftarrow R - R H^\top (I + H R H^\top)^{-1} H R, \qquad W \leftarrow W + R H^\top (Y - H W)

which begins with :math:`R = I / \gamma` and W = 0 (equations 9 and 10 of ACIL, in the form that G-ACIL gives them).
After any number of batches, in any order,

.. math:: W = \Big( \sum_i h_i h_i^\top + \gamma I \Big)^{-1} \sum_i h_i y_i^\top

G-ACIL is the same recursion for streams in which classes come again: the columns of W of all classes are updated with
each batch, whichever classes it has. ACIL's is the case that a task has new classes only.

With the same h and gamma this is the regression of RanPAC; that method draws its projections from N(0, 1), and chooses
its gamma anew after each task from the stored Gram matrix.

Defaults: M = 2000, where the code has 8192; that R takes 540 MB, and an update calls for a GPU. gamma = 0.1 as in the
code. A is drawn as in the code: uniform in :math:`\pm 1 / \sqrt{D}`, without a bias.
Differences from the papers: they train the backbone on the classes of a first phase, half of all classes; here it is
used as it comes, trained elsewhere, and all tasks are learned by the recursion.
Differences from the code: W has a column for each class of the stream from the beginning, which is zero until the class
comes. The (B, B) system is solved and not inverted. DS-AL, GKEAL and AIR of the same code are not part of this.

State, in double precision: A (D, M), R (M, M) and W (M, C). Scenarios: all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.frozen_features import freeze_trunk, training_features

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def recursion(R: Tensor, W: Tensor, H: Tensor, Y: Tensor) -> None:
    """Update R (M, M) and W (M, C) in place by the examples H (B, M) with the targets Y (B, C).

    Example:
        >>> R, W = torch.eye(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
        >>> recursion(R, W, torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[3.0]]).double())
        >>> R.tolist(), W.tolist()
        ([[0.5, 0.0], [0.0, 1.0]], [[1.5], [0.0]])
    """
    RH = R @ H.T
    R -= RH @ torch.linalg.solve(torch.eye(len(H)).to(R) + H @ RH, RH.T)
    W += R @ (H.T @ (Y - H @ W))


class ACIL(Strategy):
    """Classifies by the ridge regression of all examples so far, which each batch updates.

    Args:
        num_expanded: Width of the random layer, M.
        gamma: Strength of the regularisation.

    Raises:
        InputError: If another strategy implements `encode`.

    Example:
        >>> ACIL(num_expanded=20)
        ACIL(num_expanded=20)
    """

    needs = ("boundaries",)
    expansion: Tensor
    R: Tensor
    W: Tensor

    def __init__(self, num_expanded: Annotated[int, Ge(1)] = 2000, gamma: Annotated[float, Gt(0)] = 0.1) -> None:
        super().__init__()
        self.num_expanded, self.gamma = num_expanded, gamma

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Freeze; draw the random layer; begin with the regression of no examples."""
        D, M = freeze_trunk(learner, self), self.num_expanded
        self.register_buffer("expansion", (2 * torch.rand(D, M, dtype=torch.float64) - 1) / D**0.5)
        self.register_buffer("R", torch.eye(M, dtype=torch.float64) / self.gamma)
        self.register_buffer("W", torch.zeros(M, stream.num_classes, dtype=torch.float64))

    def expand(self, features: Tensor) -> Tensor:
        """Return h (B, M) of features (B, D), in double precision."""
        return (features.double() @ self.expansion.double()).relu()

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Update R and W by the task's examples, batch by batch."""
        R, W = self.R.double(), self.W.double()
        for features, y in training_features(learner, task):
            recursion(R, W, self.expand(features), F.one_hot(y, W.shape[1]).double())
        self.R.copy_(R)
        self.W.copy_(W)

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the outputs of the regression for each class, (B, C)."""
        return (self.expand(learner.backbone(view)) @ self.W.double()).float()
