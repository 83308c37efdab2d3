r"""k nearest neighbours on frozen features, all of which are stored (Prabhu et al. 2023, "ACM").

The features of all training examples are stored at length 1. An example gets the class that most of its k neighbours
have, those of the largest cosine:

.. math:: \text{score}_c(x) = \#\{ i \in N_k(x) : y_i = c \} + \tfrac13 \max_{i : y_i = c} \cos(f(x), f(x_i))

The second term is less than a vote: it decides ties, and between classes without a vote, by the nearest example of each
class. So scores order all classes that compete, also where a task is told at test, and nothing is ever forgotten: a
stored example is classified as its own class with k = 1, whatever comes later.

Every feature is kept: N D numbers, `float16` halves what they take. `resources.csv` counts them as `state_bytes`.

Defaults: k = 5; the option of the code has 2, with which the nearest one decides.
Differences from the paper and its code: neighbours are exact, by one matrix product, not from an approximate index
(HNSW). A tie is decided by the nearest example, in the code by the smaller label. The paper's features are first
trained to a lower dimension on a data set of their own; here they are the backbone's. k is fixed, and not chosen
on the stream.

State: features (N, D), labels (N,) and their number. Scenarios: all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.frozen_features import freeze_trunk, training_features

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def votes(cosines: Tensor, labels: Tensor, k: int, num_classes: int) -> Tensor:
    """Return the scores (B, C) for cosines (B, N) to stored examples with labels (N,).

    Example:
        >>> votes(torch.tensor([[0.9, 0.6, 0.3]]), torch.tensor([1, 0, 0]), k=2, num_classes=3)
        tensor([[ 1.2000,  1.3000, -0.3333]])
    """
    score = cosines.new_zeros(len(cosines), num_classes)
    near = labels[cosines.topk(min(k, len(labels)), dim=1).indices]
    score.scatter_add_(1, near, torch.ones_like(near, dtype=score.dtype))
    nearest = torch.full_like(score, -1.0)
    return score + nearest.scatter_reduce(1, labels.expand_as(cosines), cosines, "amax") / 3


class KNN(Strategy):
    """Predicts by a vote of the k stored examples whose features have the largest cosine with those of the example.

    Args:
        k: Number of neighbours.
        float16: Store numbers of 16 bits.

    Raises:
        InputError: If another strategy implements `encode`.

    Example:
        >>> KNN(k=1, float16=True)
        KNN(k=1, float16=True)
    """

    needs = ("boundaries",)
    test_options = ("k",)
    features: Tensor
    labels: Tensor
    stored: Tensor

    def __init__(self, k: Annotated[int, Ge(1)] = 5, float16: bool = False) -> None:
        super().__init__()
        self.k, self.float16 = k, float16

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Freeze; allocate room for all examples of the stream."""
        N, D = sum(len(task.train) for task in stream), freeze_trunk(learner, self)
        self.register_buffer("features", torch.zeros(N, D, dtype=torch.half if self.float16 else torch.float))
        self.register_buffer("labels", torch.zeros(N, dtype=torch.int64))
        self.register_buffer("stored", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Store the features of the task's examples."""
        for features, y in training_features(learner, task):
            here = slice(int(self.stored), int(self.stored) + len(y))
            self.features[here] = F.normalize(features.float(), dim=1).to(self.features.dtype)
            self.labels[here] = y
            self.stored += len(y)

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return votes for each class, and a third of the cosine to its nearest example, (B, C)."""
        n = int(self.stored)
        query = F.normalize(learner.backbone(view).float(), dim=1)
        with torch.autocast(view.device.type, enabled=False):
            cosines = query @ self.features[:n].float().T
        return votes(cosines, self.labels[:n], self.k, learner.num_classes)
