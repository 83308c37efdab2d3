r"""InfLoRA, interference-free low-rank adaptation (Liang and Li 2024, CVPR).

Each task t trains a low-rank change :math:`A_t B_t` of the weight of a layer, in which :math:`B_t` (r, d) is computed
before the task and frozen, so that training moves the weight in the span of its rows alone. The rows are chosen for two
ends: to be orthogonal to the inputs of earlier tasks, so that outputs on these stay the same, and to contain what the
gradients of the new task use. Gradients of a linear layer are in the span of its inputs; with :math:`H_t` (d, n) the
inputs of the new task and M an orthonormal basis of those of earlier tasks,

.. math:: \hat H_t = H_t - M M^\top H_t, \qquad B_t = U_r^\top / \sqrt 3

where :math:`U_r` are the r left singular vectors of :math:`\hat H_t` with the largest singular values; :math:`A_t`
starts at 0. After the task M is extended, as in GPM, until it spans the share
:math:`\epsilon_t = \epsilon + (\epsilon_T - \epsilon) \, t / T` of the inputs' energy, t = 0, 1, ... (DualGPM). The
loss runs over the task's own classes.

Defaults: r = 10, :math:`\epsilon` = 0.95 and :math:`\epsilon_T` = 1, as in the released code for CIFAR-100; the factor
:math:`1/\sqrt 3` is of the code, too. There keys and values are adapted, here queries as well.
Differences from the paper: DualGPM stores a basis of the complement of M where that is smaller; the projector on M is
the same, and is stored here. The product is added to W after each task, which is the same function.
Differences from the released code: it takes all training examples, augmented, here `num_samples` of them. It has
:math:`H H^\top / n` in the place of H, also where it chooses :math:`B_t`. The energies of that are the squares of
those of H, and it takes one direction less in the first task, though at least one, and so protects less:
`released_rule` counts as it does. There each task has a head of its own, and the network is in evaluation mode while it
trains.

State: the pairs in the backbone, and the projector M M^T (d, d) of each layer. Scenarios: all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike
from cl.random import Random
from cl.toolkit.inject import LowRankTuning, low_rank_inputs, low_rank_layers, low_ranks, merge
from cl.toolkit.subspace import new_directions

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def design(H: Tensor, projector: Tensor, rank: int) -> Tensor:
    r"""Return the main directions of inputs in the complement of a subspace, divided by :math:`\sqrt 3`, (r, d).

    Rows beyond the rank of what is left of the inputs are 0.

    Args:
        H: Inputs of the new task, (d, n).
        projector: M M^T, (d, d).
        rank: r.

    Example:
        >>> H, M = torch.diag(torch.tensor([5.0, 3.0, 2.0])), torch.diag(torch.tensor([1.0, 0.0, 0.0]))
        >>> (3**0.5 * design(H, M, 1)).abs().round(decimals=4).tolist()
        [[0.0, 1.0, 0.0]]
    """
    P = projector.double()
    rest = H.double() - P @ H.double()
    squares, vectors = torch.linalg.eigh(rest @ rest.T)
    rows = vectors.flip(1)[:, :rank] * (squares.flip(0)[:rank] > 1e-9 * H.double().square().sum())
    directions: Tensor = (rows - P @ rows).T / 3**0.5
    return directions.to(H.dtype)


class InfLoRA(LowRankTuning):
    """Trains low-rank changes of weights in input directions that earlier tasks do not use.

    Args:
        rank: r.
        threshold: epsilon, the share of the inputs' energy that is protected after the first task.
        last_threshold: The share towards which it grows, epsilon_T.
        num_samples: Examples of a task whose inputs are used.
        released_rule: Protect as few directions as the released code does.
        layers: Kinds of layers: "linear", "conv", or ends of names, such as "qkv", "proj", "fc1" in a transformer; None
            means "qkv" if the backbone has such layers, else all linear layers and convolutions without groups.
        blocks: Blocks of the backbone whose layers are adapted, from 0; None means all.

    Raises:
        InputError: If the backbone has no such layers.

    Example:
        >>> InfLoRA(rank=4)
        InfLoRA(rank=4)
    """

    targets = ("label",)

    def __init__(
        self,
        rank: Annotated[int, Ge(1)] = 10,
        threshold: Annotated[float, Interval(ge=0, le=1)] = 0.95,
        last_threshold: Annotated[float, Interval(ge=0, le=1)] = 1.0,
        num_samples: Annotated[int, Ge(1)] = 300,
        released_rule: bool = False,
        layers: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__(rank, 1.0, layers, blocks)
        self.threshold, self.last_threshold = threshold, last_threshold
        self.num_samples, self.released_rule = num_samples, released_rule

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Add the pairs, and allocate the projectors."""
        super().setup(learner, stream)
        self.random = Random()
        for i, pair in enumerate(low_ranks(learner.backbone)):
            self.register_buffer(f"projector_{i}", torch.zeros(pair.A.shape[1], pair.A.shape[1]))

    @torch.no_grad()
    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Compute the directions of the task, and freeze them."""
        super().before_task(learner, task)
        inputs = low_rank_inputs(learner, task, self.num_samples, self.random)
        for i, (pair, H) in enumerate(zip(low_ranks(learner.backbone), inputs, strict=True)):
            pair.A.copy_(design(H, self.get_buffer(f"projector_{i}"), len(pair.A))).requires_grad_(False)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the cross-entropy over the classes of each example's own task, a scalar."""
        return F.cross_entropy(learner.mask(logits, batch.task, "task"), batch.y)

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Extend the bases by the task's inputs, and add the products to W."""
        share = task.index / learner.num_tasks
        threshold = self.threshold + (self.last_threshold - self.threshold) * share
        for i, H in enumerate(low_rank_inputs(learner, task, self.num_samples, self.random)):
            projector, R = self.get_buffer(f"projector_{i}"), H @ H.T if self.released_rule else H
            M = new_directions(R, projector, threshold)
            if self.released_rule and task.index == 0:
                M = M[:, : max(M.shape[1] - 1, 1)]
            projector += (M @ M.T).to(projector.dtype)
        for layer, pair in zip(low_rank_layers(learner.backbone), low_ranks(learner.backbone), strict=True):
            merge(layer, pair)
