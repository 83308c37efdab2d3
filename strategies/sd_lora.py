r"""SD-LoRA, scalable decoupled low-rank adaptation (Wu et al. 2025, ICLR).

The change of a weight that a task makes has a direction and a magnitude. The directions of earlier tasks are frozen,
and the magnitudes of all tasks go on learning, together with the present task's pair:

.. math:: W + \sum_{i < t} \alpha_i \, \overline{B_i A_i} + \alpha_t B_t A_t, \qquad
          \overline{B A} = \frac{B A}{\lVert B A \rVert_F}

So later tasks reuse what earlier directions offer, in the measure that helps, without examples or a choice of a part at
test. The loss runs over the task's own classes.

Defaults: r = 10 as in the released code, and the layers of queries, keys and values in a transformer, where the code
adapts queries and values.
Differences from the paper, of which the abstract was read: when a task ends, its magnitude becomes
:math:`\alpha_t \lVert B_t A_t \rVert_F`, so that the network stays the same. The variants with falling ranks (RR) and
merged directions (KD) are left out.
Differences from the released code: there a direction is divided by the product of the norms of B and A; a magnitude is
shared by all layers, and all magnitudes restart from 0.8 in every task, so that the network changes between tasks.

State: A, B and their magnitude, and those of each earlier task, in the backbone. Scenarios: all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike
from cl.random import Random
from cl.toolkit.inject import LowRank, LowRankTuning, low_ranks

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


class Directions(LowRank):
    """A low-rank change for the present task, and directions with magnitudes for the earlier ones.

    Args:
        weight: The layer's weight.
        rank: r.
        num_tasks: T.

    Example:
        >>> part = Directions(torch.zeros(2, 2), 1, 3)
        >>> part.A.data, part.B.data = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0], [1.0]])
        >>> before = part.product
        >>> part.end(0, Random())
        >>> part.alpha.data, torch.allclose(part.product, before)
        (tensor([5., 0., 0.]), True)
    """

    old_A: Tensor
    old_B: Tensor

    def __init__(self, weight: Tensor, rank: int, num_tasks: int) -> None:
        super().__init__(weight, rank)
        self.scale: Tensor = nn.Parameter(weight.new_ones(()))  # type: ignore[assignment]
        self.alpha = nn.Parameter(weight.new_zeros(num_tasks))
        self.register_buffer("old_A", weight.new_zeros(num_tasks, *self.A.shape))
        self.register_buffer("old_B", weight.new_zeros(num_tasks, *self.B.shape))

    @property
    def product(self) -> Tensor:
        """The change of the weight, (out, d)."""
        old = (self.alpha[:, None, None] * self.old_B).transpose(0, 1).flatten(1) @ self.old_A.flatten(0, 1)
        return super().product + old

    @torch.no_grad()
    def end(self, task: int, random: Random) -> None:
        """Turn the present change into a direction with a magnitude, and start a new pair."""
        length = (self.B @ self.A).norm()
        self.old_A[task], self.old_B[task] = self.A, self.B / length.clamp_min(1e-12)
        self.alpha[task] = self.scale * length
        self.renew(random)
        self.scale.fill_(1.0)


class SDLoRA(LowRankTuning):
    """Trains a low-rank change in each task, and the magnitudes of the changes of all earlier tasks.

    Args:
        rank: r.
        layers: Kinds of layers: "linear", "conv", or ends of names, such as "qkv", "proj", "fc1" in a transformer; None
            means "qkv" if the backbone has such layers, else all linear layers and convolutions without groups.
        blocks: Blocks of the backbone whose layers are adapted, from 0; None means all.

    Raises:
        InputError: If the backbone has no such layers.

    Example:
        >>> SDLoRA(rank=4)
        SDLoRA(rank=4)
    """

    targets = ("label",)

    def __init__(
        self,
        rank: Annotated[int, Ge(1)] = 10,
        layers: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__(rank, 1.0, layers, blocks)
        self.random = Random()

    def pair(self, stream: Stream, weight: Tensor) -> LowRank:
        """Return the directions of a layer."""
        return Directions(weight, self.rank, len(stream))

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the cross-entropy over the classes of each example's own task, a scalar."""
        return F.cross_entropy(learner.mask(logits, batch.task, "task"), batch.y)

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Freeze the task's direction, and start a new pair."""
        for part in low_ranks(learner.backbone):
            assert isinstance(part, Directions)
            part.end(task.index, self.random)
