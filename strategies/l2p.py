r"""Learning to Prompt (Wang et al. 2022, section 4).

A frozen transformer is steered by prompts from a pool of N prompts, each with a key :math:`k_i`. The query q(x) of an
example is the transformer's own [CLS] output without prompts. The k prompts whose keys are nearest to the query
(equation 3), :math:`K_x`, are put in front of the tokens; the head g reads the mean of the outputs at their positions
(section 4.1). The keys are pulled towards the queries that have chosen them (equation 5):

.. math:: \min \; \mathrm{CE}(g(f_r(x_p)), y) \; - \; \lambda \frac1B \sum_x \sum_{i \in K_x} \cos(q(x), k_i)

The cross-entropy runs over the classes of the example's own task (the released code calls this "train_mask").

Defaults: N = 10, prompts of 5 tokens, k = 5 and lambda = 0.1, as in the released code for CIFAR-100.
Differences from the paper: none known.
Differences from the reference code: the prompts are chosen for each example. In the released code the examples of a
batch vote for common prompts, at test, too, so that a prediction depends on the rest of the batch, and a batch of a
single task reveals the task. Prompts and keys start uniform in (-1, 1), as in the PyTorch port. The prompts get no
position embedding, as in the JAX release; the port gives them one.

State: prompts (N, length, D) and keys (N, D). Scenarios: all. Refused: backbones that are not transformers with `embed`
and `encode`.
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
    """Learns a pool of prompts, from which each example chooses some, and a head for a frozen transformer.

    Args:
        pool_size: Number of prompts in the pool, N.
        length: Tokens per prompt.
        top_k: Prompts per example, k; from 1 to `pool_size`.
        pull: lambda, the weight of the pull on the keys.

    Raises:
        InputError: If the backbone has no `embed` and `encode`, or `top_k` is not from 1 to `pool_size`.

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
        """Allocate prompts and keys; freeze the transformer."""
        freeze_transformer("l2p", learner.backbone)
        dim = int(learner.backbone.num_features)  # type: ignore[arg-type]
        self.prompts = nn.Parameter(torch.empty(self.pool_size, self.length, dim).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(self.pool_size, dim).uniform_(-1, 1))

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the mean output at the chosen prompts' positions, (B, D)."""
        learner.backbone.eval()  # without dropout, so that an example always has the same query
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
        """Return the cross-entropy over the classes of each example's task, minus the weighted pull on the keys."""
        return F.cross_entropy(learner.mask(logits, batch.task, "task"), batch.y) - self.pull * self._pulled
