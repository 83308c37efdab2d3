r"""O-LoRA, orthogonal low-rank adaptation (Wang et al. 2023, Findings of EMNLP).

Each task trains a low-rank change :math:`B_t A_t` of the weights of a frozen backbone, in directions that are
orthogonal to those of earlier tasks: the rows of :math:`A_i` span the inputs to which task i made the layer react. With
:math:`O_{i,t} = A_i A_t^\top`, the loss of task t is

.. math:: L_t + \lambda \sum_{\text{layers}} \sum_{i < t} \sum_{j,k} \bigl| O_{i,t}[j, k] \bigr|

The changes of earlier tasks are frozen. At test the weight is :math:`W + s \sum_i B_i A_i`, for examples of all tasks.

Defaults: r = 8 and lambda = 0.5, as in the released code (`lora_dim`, `lamda_1`); its scripts raise lambda to 5 for
some tasks. The layers are those of queries, keys and values in a transformer, where the code adapts queries and values.
Differences from the paper: it squares the entries of O (quoted from memory; `penalty=squared`), and the released code
takes their absolute values, which is the default here. The changes of earlier tasks are added to W, which is the same
function.
Differences from the released code: it learns language models by instructions; here the head is trained with the pairs.
It has s = 32 / r = 4 and dropout 0.1 before A, here s = 1 and none, and a weight of the norms of A and B, by default 0,
which is left out.

State: A and B in the backbone, and A of each earlier task, (T, r, d) for each layer. Scenarios: all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike
from cl.errors import unknown
from cl.random import Random
from cl.toolkit.inject import LowRankTuning, low_rank_layers, low_ranks, merge

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

PENALTIES = ("absolute", "squared")


def overlap(old: Tensor, new: Tensor, squared: bool = False) -> Tensor:
    """Return the sum of absolute or squared inner products of rows, a scalar.

    Args:
        old: A of earlier tasks, (..., r, d); of tasks to come 0.
        new: A of the present task, (r, d).
        squared: Whether they are squared.

    Example:
        >>> old, new = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]]), torch.tensor([[0.5, -1.0, 3.0]])
        >>> overlap(old, new), overlap(old, new, squared=True)  # inner products 0.5 and -2
        (tensor(2.5000), tensor(4.2500))
    """
    products = old @ new.T
    return (products.square() if squared else products.abs()).sum()


class OLoRA(LowRankTuning):
    """Trains a low-rank change in each task, whose input directions are pushed away from those of earlier tasks.

    Args:
        rank: r.
        scale: s, the factor of the product.
        weight: lambda.
        penalty: "absolute" or "squared" inner products.
        layers: Kinds of layers: "linear", "conv", or ends of names, such as "qkv", "proj", "fc1" in a transformer; None
            means "qkv" if the backbone has such layers, else all linear layers and convolutions without groups.
        blocks: Blocks of the backbone whose layers are adapted, from 0; None means all.

    Raises:
        InputError: If the backbone has no such layers, or `penalty` is unknown.

    Example:
        >>> OLoRA(weight=1.0)
        OLoRA(weight=1.0)
    """

    def __init__(
        self,
        rank: Annotated[int, Ge(1)] = 8,
        scale: Annotated[float, Gt(0)] = 1.0,
        weight: Annotated[float, Ge(0)] = 0.5,
        penalty: str = "absolute",
        layers: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__(rank, scale, layers, blocks)
        if penalty not in PENALTIES:
            raise unknown("penalty of O-LoRA", penalty, PENALTIES)
        self.weight, self.penalty = weight, penalty

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Add the pairs, and allocate A of each task."""
        super().setup(learner, stream)
        self.random = Random()
        for i, pair in enumerate(low_ranks(learner.backbone)):
            self.register_buffer(f"old_{i}", torch.zeros(len(stream), *pair.A.shape))

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return lambda times the overlap of the present A with those of earlier tasks."""
        if learner.task_index == 0 or self.weight == 0:
            return None
        pairs, squared = low_ranks(learner.backbone), self.penalty == "squared"
        terms = [overlap(self.get_buffer(f"old_{i}"), pair.A, squared) for i, pair in enumerate(pairs)]
        return self.weight * torch.stack(terms).sum()

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Store A, add the product to W, and start a new pair."""
        for i, (layer, pair) in enumerate(
            zip(low_rank_layers(learner.backbone), low_ranks(learner.backbone), strict=True)
        ):
            self.get_buffer(f"old_{i}")[task.index] = pair.A.detach()
            merge(layer, pair)
            pair.renew(self.random)
