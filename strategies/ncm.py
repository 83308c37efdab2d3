r"""Nearest class mean on features (Mensink et al. 2013; the "SimpleCIL" of Zhou et al. 2023).

An example is assigned to the class whose mean feature has the largest cosine with the example's feature:

.. math:: \hat y = \arg\max_c \cos(\phi(x), \mu_c), \qquad \mu_c = \frac{1}{n_c} \sum_{y_i = c} \phi(x_i)

By default the backbone is frozen and nothing is trained. The means are then sums over examples, so that the order of
the tasks makes no difference. With `freeze=false` the backbone is trained as in fine-tuning, and the means of old
classes, which are not computed again, no longer fit its features.

With the defaults this is SimpleCIL, which uses the means as the weights of a normalised cosine classifier of scale 1.

Differences from the papers: none on a frozen backbone. A class without a mean has the smallest cosine, -1.
Differences from SimpleCIL's code: in the code the mean of a class that comes again replaces the old mean; here the mean
is over all examples of the class, whatever their task.

State: the sum of features and the number of examples of each class, (C, D) and (C, 1). Scenarios: all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.frozen_features import add_to_sums, cosine_to_means, feature_width, freeze_trunk, training_features

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


class NCM(Strategy):
    """Predicts the class whose mean feature has the largest cosine with the feature of the example.

    Args:
        freeze: Freeze backbone and head, so that nothing is trained.

    Raises:
        InputError: If another strategy implements `encode`, whose features the means would ignore.

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
        """Allocate the sum of features and the number of examples of each class; freeze if asked to."""
        D = freeze_trunk(learner, self) if self.freeze else feature_width(learner, self)
        self.register_buffer("total", torch.zeros(stream.num_classes, D))
        self.register_buffer("count", torch.zeros(stream.num_classes, 1))

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add the features of the task's training examples to their classes' sums."""
        for features, y in training_features(learner, task):
            add_to_sums(self.total, self.count, features, y)

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the cosine to every class mean, (B, C)."""
        return cosine_to_means(learner.backbone(view), self.total, self.count)
