r"""Deep SLDA: streaming linear discriminant analysis of frozen features (Hayes and Kanan 2020).

Each class is a Gaussian with a mean of its own and the covariance that all classes share. The covariance is shrunk
towards the identity, and an example z is assigned to the class under which it is most likely:

.. math:: \Lambda = \big((1 - \varepsilon) \Sigma + \varepsilon I\big)^{-1}, \quad
          \hat y = \arg\max_k \; z^\top \Lambda \mu_k - \tfrac12 \mu_k^\top \Lambda \mu_k, \quad
          \Sigma = \frac1n \sum_i (z_i - \mu_{y_i}) (z_i - \mu_{y_i})^\top

Stored are the sums of z, of z z' and the counts, from which means and covariance follow exactly: each example is used
once, and neither the order of examples nor that of the tasks makes a difference. All classes are equally likely
beforehand, however many examples they have, as in the paper.

Differences from the paper and its code: their covariance is updated example by example, in which the deviation from the
mean so far has the weight t / (t + 1), for t earlier examples of all classes. That sum depends on the order; the exact
one has the number of earlier examples of the same class in place of t, and is the one here. They begin with the
covariance of a first part of the classes, by the OAS estimator; here all examples are treated alike, as their code
does without `fit_base`. They take a pseudo-inverse, which for a positive `shrinkage` is the inverse. A class without
examples scores lowest; in the code it has the mean 0.

scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)` shrinks towards m I, for m the mean variance of
a feature, and adds the logarithm of each class's share; for :math:`s = \varepsilon / (\varepsilon + m (1 -
\varepsilon))`, its scores without that logarithm are those above times (1 - epsilon) / (1 - s).

State, in double precision: sums (C, D) and (D, D), counts (C, 1), weights (D, C) and biases (C,). Scenarios: all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor

from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.frozen_features import freeze_trunk, training_features

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def discriminant(means: Tensor, covariance: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Return weights (D, C) and biases (C,) of the classifier for means (C, D) and a covariance (D, D).

    Example:
        >>> means, covariance = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.diag(torch.tensor([3.0, 1.0]))
        >>> weight, bias = discriminant(means, covariance, 0.5)
        >>> weight.tolist(), bias.tolist()
        ([[0.5, 0.0], [0.0, 2.0]], [-0.25, -2.0])
    """
    shrunk = (1 - shrinkage) * covariance + shrinkage * torch.eye(len(covariance)).to(covariance)
    weight = torch.linalg.solve(shrunk, means.T)
    return weight, -0.5 * (means.T * weight).sum(0)


class SLDA(Strategy):
    """Classifies by class means and one covariance of the features of a frozen backbone.

    Args:
        shrinkage: epsilon, the weight of the identity.

    Raises:
        InputError: If another strategy implements `encode`.

    Example:
        >>> SLDA(shrinkage=0.01)
        SLDA(shrinkage=0.01)
    """

    needs = ("boundaries",)
    total: Tensor
    count: Tensor
    gram: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, shrinkage: Annotated[float, Gt(0), Le(1)] = 1e-4) -> None:
        super().__init__()
        self.shrinkage = shrinkage

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Freeze; allocate sums and classifier."""
        D, C = freeze_trunk(learner, self), stream.num_classes
        shapes = {"total": (C, D), "count": (C, 1), "gram": (D, D), "weight": (D, C), "bias": (C,)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64 if name == "count" else torch.float64))

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add the task's examples to the sums, and compute the classifier."""
        for features, y in training_features(learner, task):
            z = features.to(self.gram.dtype)
            self.total.index_add_(0, y, z)
            self.count[:, 0] += torch.bincount(y, minlength=len(self.count))
            self.gram += z.T @ z
        total, gram = self.total.double(), self.gram.double()
        means = total / self.count.clamp_min(1)
        covariance = (gram - total.T @ means) / self.count.sum()
        weight, bias = discriminant(means, covariance, self.shrinkage)
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the log-likelihoods of the classes up to a constant of each example, (B, C)."""
        scores = (learner.backbone(view).double() @ self.weight.double() + self.bias).float()
        return torch.where(self.count[:, 0] > 0, scores, -1e9)
