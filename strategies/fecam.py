r"""FeCAM: Mahalanobis distances to class means of frozen features, a covariance per class (Goswami et al. 2023).

Features are made less skewed by Tukey's power, :math:`\tilde x = x^\lambda`, and classes have means and covariances:

.. math:: \hat y = \arg\min_c \; d^\top \Sigma_c^{-1} d, \qquad
          d = \frac{\tilde x}{|\tilde x|} - \frac{\tilde \mu_c}{|\tilde \mu_c|}

:math:`\mu_c` is the mean of x, to which the power is then applied, and :math:`\Sigma_c` comes from the covariance S of
the class's :math:`\tilde x` in two steps, without which it has no inverse if a class has fewer examples than features.
It is shrunk, twice in a row, with V1 the mean of its diagonal and V2 that of the rest,

.. math:: S \leftarrow S + \alpha_1 V_1 I + \alpha_2 V_2 (1 - I),

and normalised to correlations, :math:`S_{ij} / \sqrt{S_{ii} S_{jj}}`, so that no class is near to everything because
its features vary much. For :math:`\alpha_2 \le \alpha_1` the result has an inverse.

Means and covariances are sums over the examples of a class, whatever their tasks: nothing depends on the order. With
`common`, all classes have one covariance, the mean of theirs, which takes D^2 numbers instead of C D^2.

Defaults are those of the released code for CIFAR-100; for a ViT, whose features are not positive, the code has tukey=1,
alpha2=0, shrinks once and averages features of length 1, without scaling that mean to length 1 again. Here the power
keeps the sign of a feature.
Differences from the paper and its code: they train the network on the first task, and classify there by the distance to
the weights of its classes; here it comes trained, and all tasks are treated alike. V2 is the mean of all entries off
the diagonal, in the code of those that are not 0. The code takes a pseudo-inverse, which for a matrix with an inverse
is the same. Its common covariance is a mean over tasks of the covariance of all features of the task, which is shrunk
once, after the first task, and not normalised; here it is that around class means, treated as the others are. If a
class comes again, its code for CORe50 averages the old and the new covariance.

State: counts (C, 1), means (C, D) of x and of the power, and sums of squares around the means (C, D, D), or (1, D, D).
Scenarios: all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor

from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.frozen_features import freeze_trunk, training_features

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def shrink(S: Tensor, alpha1: float, alpha2: float) -> Tensor:
    """Return a covariance (D, D) with multiples of the mean variance and of the mean covariance added.

    Example:
        >>> shrink(torch.tensor([[4.0, 1.0], [1.0, 2.0]]), 1.0, 0.5).tolist()
        [[7.0, 1.5], [1.5, 5.0]]
    """
    D, trace = len(S), S.trace()
    rest = (S.sum() - trace) / max(1, D * D - D)
    return S + alpha2 * rest + torch.eye(D).to(S) * (alpha1 * trace / D - alpha2 * rest)


def correlations(S: Tensor) -> Tensor:
    """Return a covariance (D, D) divided by the standard deviations of both features.

    Example:
        >>> correlations(torch.tensor([[4.0, 1.0], [1.0, 1.0]])).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    deviation = S.diagonal().sqrt()
    return S / deviation.outer(deviation)


class FeCAM(Strategy):
    """Predicts the class with the smallest Mahalanobis distance between its mean and the features of the example.

    Args:
        tukey: lambda, the power of features; 1 leaves them.
        alpha1: Multiple of the mean variance that is added to variances, twice.
        alpha2: Multiple of the mean covariance that is added to covariances, twice.
        normalize: Use correlations in place of covariances.
        common: One covariance for all classes.

    Raises:
        InputError: If another strategy implements `encode`.

    Example:
        >>> FeCAM(tukey=1.0, alpha2=0.0)
        FeCAM(tukey=1.0, alpha2=0.0)
    """

    needs = ("boundaries",)
    count: Tensor
    mean: Tensor
    centre: Tensor
    scatter: Tensor

    def __init__(
        self,
        tukey: Annotated[float, Gt(0), Le(1)] = 0.5,
        alpha1: Annotated[float, Gt(0)] = 1.0,
        alpha2: Annotated[float, Ge(0)] = 1.0,
        normalize: bool = True,
        common: bool = False,
    ) -> None:
        super().__init__()
        self.tukey, self.alpha1, self.alpha2, self.normalize, self.common = tukey, alpha1, alpha2, normalize, common
        self._inverses: tuple[tuple[int, int], dict[int, Tensor]] = (0, -1), {}

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Freeze; allocate counts, means and sums of squares."""
        D, C = freeze_trunk(learner, self), stream.num_classes
        shapes = {"count": (C, 1), "mean": (C, D), "centre": (C, D), "scatter": (1 if self.common else C, D, D)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64 if name == "count" else torch.float))

    def power(self, x: Tensor) -> Tensor:
        """Return Tukey's transform, with the sign of x."""
        return x.sign() * x.abs() ** self.tukey

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add the task's examples to means and sums of squares, exactly (Chan et al. 1983)."""
        for features, y in training_features(learner, task):
            for c in y.unique().tolist():
                x = features[y == c].float()
                z, share = self.power(x), len(x) / (len(x) + self.count[c])
                gap, spread = z.mean(0) - self.centre[c], z - z.mean(0)
                self.scatter[0 if self.common else c] += spread.T @ spread + gap.outer(gap) * self.count[c] * share
                self.mean[c] += share * (x.mean(0) - self.mean[c])
                self.centre[c] += share * gap
                self.count[c] += len(x)

    def inverses(self) -> dict[int, Tensor]:
        """Return the inverse matrix (D, D) of each class so far; they are computed anew when the sums change."""
        key = self.scatter.data_ptr(), self.scatter._version
        if self._inverses[0] != key:
            seen = self.count[:, 0].nonzero()[:, 0].tolist()
            free = (self.count - 1).clamp_min(0).squeeze(1)
            if self.common:
                found = dict.fromkeys(seen, self._inverse(self.scatter[0] / free.sum().clamp_min(1)))
            else:
                found = {c: self._inverse(self.scatter[c] / free[c].clamp_min(1)) for c in seen}
            self._inverses = key, found
        return self._inverses[1]

    def _inverse(self, S: Tensor) -> Tensor:
        if not S.any():  # of a class with one example
            return torch.eye(len(S), device=S.device)
        S = S.float()
        for _ in range(2):
            S = shrink(S, self.alpha1, self.alpha2)
        inverse: Tensor = torch.linalg.inv(correlations(S) if self.normalize else S)
        return inverse

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the negative distance to each class, (B, C)."""
        z = F.normalize(self.power(learner.backbone(view).float()), dim=1)
        means = F.normalize(self.power(self.mean.float()), dim=1)
        distance = z.new_full((len(z), len(means)), 1e9)
        with torch.autocast(view.device.type, enabled=False):
            for c, inverse in self.inverses().items():
                d = z - means[c]
                distance[:, c] = ((d @ inverse) * d).sum(1)
        return -distance
