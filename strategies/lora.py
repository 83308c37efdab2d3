r"""LoRA, low-rank adaptation (Hu et al. 2022), through all tasks; or with KORE's initialisation (Jiang et al. 2025).

The backbone is frozen. Beside the weight W of each chosen layer, two small matrices are trained with the head:

.. math:: W' = W + s B A, \qquad A \in R^{r \times d}, \quad B \in R^{out \times r}

A starts at random and B at 0, so that the network starts as it was. By default one pair is trained through all tasks,
as fine-tuning trains all weights: nothing protects what the pair has learned.

`init=null_space` protects it, as KORE does. Let C be the sum of :math:`x x^\top` over the layer's inputs x in earlier
tasks. From the second task on, :math:`U_r` holds the r eigenvectors of C with the smallest eigenvalues, and

.. math:: W U_r U_r^\top = Q S V^\top, \qquad s B A = Q_r S_r V_r^\top, \qquad W \leftarrow W - s B A

A is frozen and B is trained. The rows of A are in the span of :math:`U_r`, so that A x is about 0 for earlier inputs x,
and the layer's outputs for them stay as they are, whatever B becomes. After each task the product is added to W.

Defaults: r = 8; Hu et al. write s as :math:`\alpha / r`. The layers are those of queries, keys and values in a
transformer; the paper adapts those of queries and values (quoted from memory). In other networks they are all linear
layers and convolutions without groups.
Differences from the papers: LoRA has no tasks, and the head is trained, too. In KORE the earlier inputs are those of
pre-training (256 examples of one data set), here those of the tasks so far, and the first task trains a plain pair.
KORE also writes training data with a large language model, which is left out.
Differences from the released code of LoRA: the product is added to the weight instead of to the output, and has no
dropout; convolutions may be adapted, too.

State: A and B in the backbone; with `null_space` C (d, d) of each layer. Scenarios: all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from cl.engine.strategy import LearnerLike
from cl.errors import unknown
from cl.random import Random
from cl.toolkit.inject import LowRankTuning, frozen_weight, low_rank_inputs, low_rank_layers, low_ranks, merge

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

INITS = ("zero", "null_space")


def null_space_pair(W: Tensor, C: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (out, r) and A (r, d), whose product is the part of W (out, d) on the directions that C knows least.

    Args:
        W: A layer's weight.
        C: Sum of x x^T over inputs x, (d, d).
        rank: r; at most out and d.

    Example:
        >>> W = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
        >>> B, A = null_space_pair(W, torch.diag(torch.tensor([1.0, 0.0, 0.0])), 2)
        >>> (W - B @ A).round(decimals=4).abs().tolist()
        [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    U = torch.linalg.eigh(C.double()).eigenvectors[:, :rank]  # eigenvalues ascend
    Q, S, V = torch.linalg.svd(W.double() @ U @ U.T, full_matrices=False)
    root = S[:rank].sqrt()
    return (Q[:, :rank] * root).to(W.dtype), (root[:, None] * V[:rank]).to(W.dtype)


class LoRA(LowRankTuning):
    """Trains a low-rank change of some layers of a frozen backbone, and the head.

    Args:
        rank: r.
        scale: s, the factor of the product.
        layers: Kinds of layers: "linear", "conv", or ends of names, such as "qkv", "proj", "fc1" in a transformer; None
            means "qkv" if the backbone has such layers, else all linear layers and convolutions without groups.
        blocks: Blocks of the backbone whose layers are adapted, from 0; None means all.
        init: "zero", or "null_space", which keeps outputs on the inputs of earlier tasks.
        num_samples: Examples of a task of which `null_space` keeps the layers' inputs.

    Raises:
        InputError: If the backbone has no such layers, or `init` is unknown.

    Example:
        >>> LoRA(rank=4, layers=("qkv", "proj"))
        LoRA(rank=4, layers=('qkv', 'proj'))
    """

    def __init__(
        self,
        rank: Annotated[int, Ge(1)] = 8,
        scale: Annotated[float, Gt(0)] = 1.0,
        layers: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
        init: str = "zero",
        num_samples: Annotated[int, Ge(1)] = 100,
    ) -> None:
        super().__init__(rank, scale, layers, blocks)
        if init not in INITS:
            raise unknown("initialisation of LoRA", init, INITS)
        self.init, self.num_samples = init, num_samples

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Add the pairs; allocate C of each layer if it is used."""
        super().setup(learner, stream)
        self.random = Random()
        for i, pair in enumerate(low_ranks(learner.backbone) if self.init == "null_space" else ()):
            self.register_buffer(f"C_{i}", torch.zeros(pair.A.shape[1], pair.A.shape[1]))

    @torch.no_grad()
    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """With `null_space`, move the part of W that earlier inputs do not use to B A, and freeze A."""
        super().before_task(learner, task)
        if self.init == "zero" or task.index == 0:
            return
        for i, (layer, pair) in enumerate(
            zip(low_rank_layers(learner.backbone), low_ranks(learner.backbone), strict=True)
        ):
            W = frozen_weight(layer)
            B, A = null_space_pair(W.flatten(1) / self.scale, self.get_buffer(f"C_{i}"), len(pair.A))
            pair.A.copy_(A).requires_grad_(False)
            pair.B.copy_(B)
            W.sub_(pair.product.view_as(W))

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """With `null_space`, add the products to W, and the layers' inputs to C."""
        if self.init == "zero":
            return
        for i, x in enumerate(low_rank_inputs(learner, task, self.num_samples, self.random)):
            self.get_buffer(f"C_{i}").add_(x @ x.T)
        for layer, pair in zip(low_rank_layers(learner.backbone), low_ranks(learner.backbone), strict=True):
            merge(layer, pair)
