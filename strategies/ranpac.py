r"""RanPAC: random projections of pre-trained features (McDonnell et al. 2023, section 4).

Frozen features :math:`f(x)` of width L are lifted once and for all by random weights W (L, M), and what the classes
have in common is taken off their prototypes by the Gram matrix:

.. math:: h = \max(0, W^\top f(x)), \quad G = \sum_i h_i h_i^\top, \quad Q = \sum_i h_i y_i^\top, \quad
          \hat y = \arg\max_c \; h^\top (G + \lambda I)^{-1} Q_c

over the examples of all tasks so far, with :math:`W_{ij} \sim N(0, 1)` and one-hot y. Lambda is the one of
:math:`10^{-8}, \dots, 10^8` with the least squared error on a fifth of the task's examples, fitted to the other
four. G and Q are sums, so the order of the tasks does not matter but for the lambda that the last one chooses
(`ridge` fixes it).

Differences from the paper: its optional first phase trains adapters, SSF or visual prompts on the first task;
`adapt=true` trains whatever is not frozen, with the run's optimizer and loss, and then freezes it. M is 2000 by
default, not 10000, whose Gram matrix takes 400 MB and whose decomposition wants a GPU.
Differences from the reference code: the fifth is drawn from the strategy's own generator, where the order of a shuffled
loader decides there; the squared errors come from G and Q of both parts, so that no features are kept; and systems are
solved by one decomposition in double precision with negative eigenvalues, which are rounding, set to 0.

State: W (L, M), G (M, M), Q (M, C) and the classifier (M, C). For every scenario; labels that return add to their sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from cl.engine.loader import EvalLoader
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.random import Random

if TYPE_CHECKING:
    from cl.data.task import Stream, Task, TaskData


def ridge_regression(G: Tensor, Q: Tensor, strengths: Tensor) -> Tensor:
    """Return (G + lambda I)^-1 Q for each lambda of a vector, (K, M, C), in double precision.

    Example:
        >>> H, Y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), F.one_hot(torch.tensor([0, 1, 1])).float()
        >>> ridge_regression(H.T @ H, H.T @ Y, torch.tensor([1.0])).round(decimals=4)[0].tolist()
        [[0.3529, 0.1765], [-0.0588, 0.4706]]
    """
    values, vectors = torch.linalg.eigh(G.double())
    scaled = vectors.T @ Q.double() / (values.clamp_min(0)[:, None] + strengths.to(values)[:, None, None])
    solved: Tensor = vectors @ scaled
    return solved


class RanPAC(Strategy):
    """Solves a ridge regression on randomly projected features of a frozen backbone.

    Args:
        num_projections: M; 0 takes the features as they are.
        ridge: lambda; None chooses it after each task.
        adapt: Train in the first task what is not frozen, and freeze it then.

    Raises:
        InputError: If another strategy owns `encode`, whose features the sums would not be of.

    Example:
        >>> RanPAC(num_projections=20)
        RanPAC(num_projections=20)
    """

    needs = ("boundaries",)
    projection: Tensor
    G: Tensor
    Q: Tensor
    weight: Tensor

    def __init__(
        self,
        num_projections: Annotated[int, Ge(0)] = 2000,
        ridge: Annotated[float, Gt(0)] | None = None,
        adapt: bool = False,
    ) -> None:
        super().__init__()
        self.num_projections, self.ridge, self.adapt = num_projections, ridge, adapt

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Draw the projection; allocate the sums and the classifier; freeze."""
        if learner.strategies.owned("encode"):
            raise InputError("RanPAC sums the backbone's features, but another strategy owns encode: drop one of them.")
        L = int(learner.backbone.num_features)  # type: ignore[arg-type]
        M = self.num_projections or L
        self.random = Random()
        self.register_buffer("projection", torch.randn(L, M) if self.num_projections else torch.zeros(L, 0))
        self.register_buffer("G", torch.zeros(M, M))
        self.register_buffer("Q", torch.zeros(M, stream.num_classes))
        self.register_buffer("weight", torch.zeros(M, stream.num_classes))
        if not self.adapt:
            learner.trunk().requires_grad_(False)

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Freeze what the first task has adapted."""
        if task.index > 0:
            learner.trunk().requires_grad_(False)

    def lift(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return h of prepared inputs, (B, M)."""
        features: Tensor = learner.backbone(view).to(self.G.dtype)
        with torch.autocast(view.device.type, enabled=False):  # the Gram matrix is of h in full
            return (features @ self.projection).relu() if self.num_projections else features

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add the task's examples to the sums, choose lambda and solve."""
        order = torch.from_numpy(self.random.generator.permutation(len(task.train)))
        cut = int(0.8 * len(order))
        with learner.evaluating():
            fit, held = (self._sums(learner, task.train.take(rows.sort()[0])) for rows in (order[:cut], order[cut:]))
        self.G += fit[0] + held[0]
        self.Q += fit[1] + held[1]
        strength = self._strength(fit, held) if self.ridge is None else torch.tensor([self.ridge])
        self.weight.copy_(ridge_regression(self.G, self.Q, strength)[0])

    def _sums(self, learner: LearnerLike, data: TaskData) -> tuple[Tensor, Tensor]:
        G, Q = torch.zeros_like(self.G), torch.zeros_like(self.Q)
        for batch in EvalLoader([data], learner.device, learner.eval_batch_size):
            H = self.lift(learner, learner.prepare(batch.x))
            G += H.T @ H
            Q += H.T @ F.one_hot(batch.y, Q.shape[1]).to(H.dtype)
        return G, Q

    def _strength(self, fit: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> Tensor:
        """Return the lambda of least ||H W - Y||^2 = tr W'GW - 2 tr W'Q + ||Y||^2 on the held-out part, (1,)."""
        strengths = 10.0 ** torch.arange(-8, 9, dtype=torch.float64)
        G, Q = (part.double() for part in held)
        errors = [(W * (G @ W - 2 * Q)).sum() for W in ridge_regression(*fit, strengths)]
        return strengths[int(torch.stack(errors).argmin()), None]

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the regression's outputs, (B, C)."""
        h = self.lift(learner, view)
        with torch.autocast(view.device.type, enabled=False):
            return h @ self.weight
