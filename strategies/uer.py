r"""Unbiased experience replay (Lin et al. 2023, "UER: A Heuristic Bias Addressing Approach", arXiv 2309.04081).

The logit of class c for features h is :math:`w_c \cdot h = \lVert w_c \rVert \lVert h \rVert \cos\theta_c`. Where new
classes are learned without the old ones, the angles lean towards them. So incoming examples B are learned by the angle
alone, and the examples :math:`B_M` replayed from the memory by the whole product:

.. math:: L = \frac{1}{|B|} \sum_{(x, y) \in B} \mathrm{CE}(s \cos\theta(x), y)
          + \frac{1}{|B_M|} \sum_{(x, y) \in B_M} \mathrm{CE}(W h(x), y)

The gradient of :math:`\cos\theta_c` is orthogonal to h and to :math:`w_c`: incoming examples change no norm to first
order. Predictions are by the product; the bias that it avoids is in the angles, which predict far worse.

The logits have no bias term: the bias of the head, if it has one, is not used. `head.bias=false` leaves it out.

Defaults: s = 1 / 0.09 is that of the cosine layer in the same authors' code of PCR; 200 exemplars as in `er`.
Differences from the paper: only its abstract was available, so the temperature, the equal weights of the two means and
the prediction follow from its description. With several epochs an example is offered to the reservoir in the first
epoch only. Examples that another strategy replays in the same batch are treated like those from the memory.
Differences from the reference code: there is none; the authors' repository holds a README alone.

State: the memory, |M| examples with their labels. Scenarios: all. Refused: targets other than single labels, a head
without a weight (C, D), another strategy that implements `classify`, `criterion` or `predict`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from cl.distributed import share
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import unknown
from cl.toolkit.memory import Memory
from cl.toolkit.proxies import check_proxies, cosine_logits, proxies

if TYPE_CHECKING:
    from cl.data.task import Stream

LOGITS = ("dot", "cos")


class UER(Strategy):
    """Learns incoming examples by the angles to the classes' weights, and replayed ones by the dot products.

    Args:
        memory_size: Total number of exemplars, |M|.
        batch_size: Replayed examples per step, over all processes; None means as many as there are incoming examples.
        scale: The factor s of the cosines.
        predict_with: Logits of predictions: "dot", the products, or "cos", the scaled cosines.
        every_epoch: Offer each example to the memory in every epoch instead of in the first epoch only.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If `predict_with` is unknown, or the head has no row of weights for each class.

    Example:
        >>> UER(memory_size=20)
        UER(memory_size=20)
    """

    needs = ("memory",)
    test_options = ("predict_with",)

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 200,
        batch_size: Annotated[int, Ge(1)] | None = None,
        scale: Annotated[float, Gt(0)] = 1 / 0.09,
        predict_with: str = "dot",
        every_epoch: bool = False,
        storage: str = "device",
    ) -> None:
        super().__init__()
        if predict_with not in LOGITS:
            raise unknown("kind of logits", predict_with, LOGITS)
        self.memory_size, self.batch_size, self.scale = memory_size, batch_size, scale
        self.predict_with, self.every_epoch, self.storage = predict_with, every_epoch, storage

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory; refuse a head without a row of weights for each class."""
        check_proxies(learner, "UER")
        if self.batch_size is not None:
            self.batch_size = share("uer.batch_size", self.batch_size)
        self.memory = Memory(self.memory_size, stream, storage=self.storage)

    def extend_batch(self, learner: LearnerLike, batch: Batch) -> Batch:
        """Append replayed examples, if the memory holds any."""
        return self.memory.extend(batch, self.batch_size)

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Return the products of features and classes' weights, (B, C), and keep the features for their angles."""
        self._features = features
        return F.linear(features, proxies(learner))

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the loss of the incoming examples by angle plus that of the replayed ones by product, a scalar."""
        n = batch.num_incoming
        angles = cosine_logits(self._features[:n], proxies(learner), self.scale)
        loss = learner.criterion(angles, batch.take(slice(n)))
        return loss if n == len(batch) else loss + learner.criterion(logits[n:], batch.take(slice(n, None)))

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Offer the incoming examples to the memory, after the step, so that none is replayed in the same step."""
        if self.every_epoch or learner.current_epoch == 0:
            self.memory.insert(batch)

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the products or the scaled cosines, (B, C)."""
        products = learner(view)
        if self.predict_with == "dot":
            return products
        return cosine_logits(self._features, proxies(learner), self.scale)
