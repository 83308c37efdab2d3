r"""RanPAC: random projections of pre-trained features (McDonnell et al. 2023, section 4).

Frozen features f(x) of width L are projected by fixed random weights W (L, M) with
:math:`W_{ij} \sim N(0, 1)`, and a ridge regression on the projections h predicts the one-hot label y. The Gram matrix G
takes correlations between classes into account, which plain class means ignore:

.. math:: h = \max(0, W^\top f(x)), \quad G = \sum_i h_i h_i^\top, \quad Q = \sum_i h_i y_i^\top, \quad
          \hat y = \arg\max_c \; h^\top (G + \lambda I)^{-1} Q_c

The sums run over the examples of all tasks so far. After each task :math:`\lambda` is chosen among
:math:`10^{-8}, \dots, 10^8`: four fifths of the task's examples are fitted, and the :math:`\lambda` with the smallest
squared error on the last fifth is taken. G and Q do not depend on the order of the tasks; :math:`\lambda` depends on
the last task only, and `ridge` fixes it.

Defaults: M = 2000, where the paper has 10000; that Gram matrix takes 400 MB, and its decomposition calls for a GPU.
Differences from the paper: in its optional first phase the paper trains adapters, SSF or visual prompts on the first
task; `adapt=true` trains whatever is not frozen, with the optimizer and loss of the run, and freezes it afterwards.
Differences from the reference code: the fifth is drawn from the strategy's own generator, in the code by the order of a
shuffled loader. The squared errors are computed from G and Q of both parts, so that no features are stored. The systems
are solved by one eigendecomposition in double precision, in which negative eigenvalues, due to rounding, are set to 0.

State: W (L, M), G (M, M), Q (M, C) and the classifier (M, C). Scenarios: all; examples of a class that comes again are
added to its sums.
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
    """Return (G + lambda I)^-1 Q, (K, M, C), in double precision, for each lambda of `strengths`, (K,).

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
    """Classifies by a ridge regression on randomly projected features of a frozen backbone.

    Args:
        num_projections: Width of the projection, M; with 0 the features are not projected.
        ridge: lambda; None means that it is chosen after each task.
        adapt: Train backbone and head in the first task, and freeze them afterwards.

    Raises:
        InputError: If another strategy implements `encode`, whose features the sums would ignore.

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
        """Draw the projection; allocate the sums and the classifier; without `adapt`, freeze."""
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
            learner.trunk().requires_grad_(False).eval()

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Freeze backbone and head from the second task on."""
        if task.index > 0:
            learner.trunk().requires_grad_(False).eval()

    def lift(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the projections h of prepared inputs, (B, M)."""
        features: Tensor = learner.backbone(view).to(self.G.dtype)
        with torch.autocast(view.device.type, enabled=False):  # in full precision, for the Gram matrix
            return (features @ self.projection).relu() if self.num_projections else features

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add the task's examples to G and Q, choose lambda, and compute the classifier."""
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
        """Return the lambda that minimises ||H W - Y||^2 = tr W'GW - 2 tr W'Q + ||Y||^2 on the held-out part, (1,)."""
        strengths = 10.0 ** torch.arange(-8, 9, dtype=torch.float64)
        G, Q = (part.double() for part in held)
        errors = [(W * (G @ W - 2 * Q)).sum() for W in ridge_regression(*fit, strengths)]
        return strengths[int(torch.stack(errors).argmin()), None]

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the outputs of the regression for each class, (B, C)."""
        h = self.lift(learner, view)
        with torch.autocast(view.device.type, enabled=False):
            return h @ self.weight
