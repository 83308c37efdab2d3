r"""Nearest class mean on features (Mensink et al. 2013; the "SimpleCIL" of Zhou et al. 2023).

.. math:: \hat y = \arg\max_c \cos(\phi(x), \mu_c), \qquad \mu_c = \frac{1}{n_c} \sum_{y_i = c} \phi(x_i)

On a frozen backbone (the default) nothing is trained, the means are sums over examples, and so the order of the tasks
does not matter. With `freeze=false` the backbone learns as in fine-tuning and old means go stale.

SimpleCIL is this with the defaults: it makes the means the weights of a cosine classifier, normalised and with scale 1.

Differences from the papers: none on a frozen backbone. A class without a mean has the lowest cosine, -1.
Differences from SimpleCIL's code: there the mean of a class that returns replaces the old one; here all its examples
count, whatever their task.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.engine.loader import EvalLoader
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


class NCM(Strategy):
    """Predicts the class whose mean feature is nearest in angle.

    Args:
        freeze: Train nothing.

    Raises:
        InputError: If another strategy owns `encode`, whose features the means would not be of.

    Example:
        >>> NCM(freeze=False)
        NCM(freeze=False)
    """

    needs = ("boundaries",)
    total: Tensor
    count: Tensor

    def __init__(self, freeze: bool = True) -> None:
        super().__init__()
        self.freeze = freeze

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate sums and counts of features by class; freeze."""
        if learner.strategies.owned("encode"):
            raise InputError(
                "NCM averages the backbone's features, but another strategy owns encode: drop one of them."
            )
        self.register_buffer("total", torch.zeros(stream.num_classes, int(learner.backbone.num_features)))  # type: ignore[arg-type]
        self.register_buffer("count", torch.zeros(stream.num_classes, 1))
        if self.freeze:
            learner.trunk().requires_grad_(False)

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add the features of the task's training examples to their classes' sums."""
        with learner.evaluating():
            for batch in EvalLoader([task.train], learner.device, learner.eval_batch_size):
                features = learner.backbone(learner.prepare(batch.x))
                self.total.index_add_(0, batch.y, features.to(self.total.dtype))
                self.count[:, 0] += torch.bincount(batch.y, minlength=len(self.count))

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the cosine to every class mean, (B, C)."""
        means = F.normalize(self.total, dim=1)  # to an angle, a sum is as good as a mean
        cosine = F.normalize(learner.backbone(view).to(means.dtype), dim=1) @ means.T
        return torch.where(self.count.T > 0, cosine, -1.0)
