r"""Learning to Prompt (Wang et al. 2022, section 4).

A frozen transformer is steered by prompts from a pool of N. The query q(x) is its own [CLS] output; the k prompts
whose keys are nearest to it (equation 3) are put in front of the tokens, the head reads the mean of the output at their
positions (section 4.1), and keys are pulled to the queries that chose them (equation 5):

.. math:: \min \; \mathrm{CE}(g(f_r(x_p)), y) \; - \; \lambda \frac1B \sum_x \sum_{i \in K_x} \cos(q(x), k_i)

The cross-entropy runs over the classes of the example's own task (released code: "train_mask").

Differences from the paper: none known. Differences from the reference code: the prompts are chosen for each example.
The released code lets a batch vote for its prompts, at test too, so that a prediction depends on its neighbours and a
batch of one task gives the task away. Uniform(-1, 1) prompts and keys are those of the PyTorch port; the prompts get
no position embedding (JAX release), the port gives them one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from cl.backbones.vit import freeze_transformer
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError

if TYPE_CHECKING:
    from cl.data.task import Stream


class L2P(Strategy):
    """Learns a pool of prompts and a head for a frozen transformer.

    Args:
        pool_size: N.
        length: Tokens of a prompt.
        top_k: Prompts an example, k.
        pull: lambda.

    Raises:
        InputError: If the backbone has no `embed` and `encode`, or k exceeds N.

    Example:
        >>> L2P(pool_size=20)
        L2P(pool_size=20)
    """

    needs = ("transformer",)

    def __init__(
        self,
        pool_size: Annotated[int, Ge(1)] = 10,
        length: Annotated[int, Ge(1)] = 5,
        top_k: int = 5,
        pull: Annotated[float, Ge(0)] = 0.1,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= pool_size:
            raise InputError(f"l2p.top_k={top_k} must lie between 1 and pool_size={pool_size}.")
        self.pool_size, self.length, self.top_k, self.pull = pool_size, length, top_k, pull

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the pool; freeze the transformer."""
        freeze_transformer("l2p", learner.backbone)
        dim = int(learner.backbone.num_features)  # type: ignore[arg-type]
        self.prompts = nn.Parameter(torch.empty(self.pool_size, self.length, dim).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(self.pool_size, dim).uniform_(-1, 1))

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the mean output at the chosen prompts' positions, (B, D)."""
        learner.backbone.eval()  # dropout off: the queries must be the same every time
        transformer: Any = learner.backbone
        with torch.no_grad():
            tokens = transformer.embed(view)  # (B, 1 + P, D)
            query = transformer.encode(tokens)[:, 0]
        cosine = F.normalize(query, dim=1) @ F.normalize(self.keys, dim=1).T.to(query.dtype)
        nearest = cosine.topk(self.top_k, dim=1)
        self._pulled = nearest.values.sum(1).mean()
        prompts = self.prompts[nearest.indices].flatten(1, 2).to(tokens.dtype)  # (B, k * length, D)
        output: Tensor = transformer.encode(torch.cat([prompts, tokens], dim=1))
        return output[:, : prompts.shape[1]].mean(1)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the cross-entropy over the classes of each row's own task, less the pull of the chosen keys."""
        return F.cross_entropy(learner.mask(logits, batch.task, "task"), batch.y) - self.pull * self._pulled
