r"""CODA-Prompt: continual decomposed attention-based prompting (Smith et al. 2023, section 4).

In some blocks of a frozen transformer each example gets a prefix: keys and values that are put in front of the
attention's own. The prefix is a weighted sum of M components :math:`P_m`. A component's weight is the cosine between
its key :math:`K_m` and the query q(x), the class token without prompts, multiplied elementwise by the component's
attention vector :math:`A_m`:

.. math:: p = \sum_m \alpha_m P_m, \qquad \alpha_m = \cos(q(x) \odot A_m, K_m)

M / T components with their keys and attention vectors belong to each task. In a task only its own are trained, and used
beside those of earlier tasks. A penalty keeps all of them orthogonal, where B stands for each of P, K and A of a block,
with a component in each row:

.. math:: \min \; \mathrm{CE}(f(x; p), y) \; + \; \lambda \sum_B \lVert B B^\top - I \rVert^2

The cross-entropy runs over the classes of the example's own task. Components of tasks to come are 0, and so are their
weights.

Defaults: 100 components, length 8 (4 keys and 4 values), blocks 0 to 4 and lambda = 0, as in the released code.
Differences from the paper, both as in the authors' later code: the components of a task are drawn when it begins,
orthonormal and orthogonal to all earlier ones, where the paper draws all at the start; and lambda is 0, which the
authors then found sufficient (0.1 in the paper). The squared norm is the mean over the entries of a matrix.
Differences from the reference code: its Gram-Schmidt procedure treats trained components as if they were orthogonal;
here new components are orthogonal to the span of the earlier ones (QR decomposition). The M - T floor(M / T) components
that belong to no task are not allocated. Replayed examples use the same components as all others.

State, for L blocks and each of T tasks: M / T components (L, 2, l / 2, D) of l / 2 keys and l / 2 values, keys (L, D)
and attention vectors (L, D). Scenarios: all. Refused: backbones that take no prefixes, and more components than there
are dimensions, which could not be orthogonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from cl.backbones.vit import freeze_transformer
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.random import Random

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

EPSILON = 1e-12


def agreement(query: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
    """Return the cosines (B, ...) of q * A with K, for queries q (B, D), attention vectors A and keys K (..., D).

    Example:
        >>> q, A, K = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> round(float(agreement(q, A, K)), 6)
        0.707107
    """
    product = torch.einsum("bd,...d->b...", query, attention * keys)
    squares = torch.einsum("bd,...d->b...", query.square(), attention.square()) * keys.square().sum(-1)
    cosine: Tensor = product / squares.clamp_min(EPSILON).sqrt()
    return cosine


def apart(rows: Tensor) -> Tensor:
    """Return the mean squared entry of B B^T - I, summed over the L blocks, for n components (n, L, ...).

    Example:
        >>> float(apart(torch.eye(3)[:2, None])), float(apart(torch.ones(2, 1, 1)))
        (0.0, 0.5)
    """
    B = rows.flatten(2).transpose(0, 1)
    return (B @ B.mT - torch.eye(len(rows), device=B.device)).square().mean((1, 2)).sum()


class CODAPrompt(Strategy):
    """Learns components of prefixes, their weights for each example, and a head for a frozen transformer.

    Args:
        num_components: Total number of components, M; each of T tasks gets M / T of them, rounded down.
        length: Number of keys plus number of values of a prefix, l; even.
        blocks: Blocks that get a prefix, counted from 0.
        penalty: lambda, the weight of the penalty on components that are not orthogonal.

    Raises:
        InputError: If the length is odd, a task would get no component, there are more components than features, the
            backbone takes no prefixes, or it has no block of that index.

    Example:
        >>> CODAPrompt(num_components=6, blocks=(0,))
        CODAPrompt(num_components=6, blocks=(0,))
    """

    needs = ("boundaries", "transformer")

    def __init__(
        self,
        num_components: Annotated[int, Ge(1)] = 100,
        length: Annotated[int, Ge(2)] = 8,
        blocks: Sequence[int] = (0, 1, 2, 3, 4),
        penalty: Annotated[float, Ge(0)] = 0.0,
    ) -> None:
        super().__init__()
        if length % 2:
            raise InputError(f"coda_prompt.length={length} has no half for keys and half for values: make it even.")
        self.num_components, self.length, self.blocks, self.penalty = num_components, length, tuple(blocks), penalty

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate components, keys and attention vectors; freeze the transformer."""
        freeze_transformer("coda_prompt", learner.backbone, blocks=self.blocks)
        T, L, D = len(stream), len(self.blocks), int(learner.backbone.num_features)  # type: ignore[arg-type]
        if not T <= self.num_components <= D:
            raise InputError(
                f"coda_prompt.num_components={self.num_components} must be from {T}, one per task, to {D}, the "
                "number of features: more cannot be orthogonal."
            )
        m = self.num_components // T
        self.components, self.keys, self.attention = (
            nn.ParameterList(torch.zeros(m, L, *shape) for _ in stream)
            for shape in ((2, self.length // 2, D), (D,), (D,))
        )
        self.random = Random()

    @torch.no_grad()
    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Draw the task's components, orthonormal and orthogonal to earlier ones; make only them trainable."""
        for parts in (self.components, self.keys, self.attention):
            for t, part in enumerate(parts):
                part.requires_grad_(t == task.index)
            new = parts[task.index]
            draw = torch.from_numpy(self.random.generator.standard_normal(new.shape)).to(new)
            rows = torch.cat([*parts[: task.index], draw]).flatten(2).transpose(0, 1).float()  # (L, n, D)
            basis = torch.linalg.qr(rows.mT)[0].mT[:, -len(new) :]
            new.copy_(basis.transpose(0, 1).view_as(new))

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the features of each example under its prefixes, (B, D)."""
        backbone = learner.backbone.eval()  # without dropout, so that an example always has the same query
        with torch.no_grad():
            query = backbone(view)
        P, K, A = (torch.cat(tuple(parts)) for parts in (self.components, self.keys, self.attention))
        weights = agreement(query.to(K.dtype), A, K)  # (B, M, L)
        prefixes = torch.einsum("bml,ml...->lb...", weights, P)
        features: Tensor = backbone(view, dict(zip(self.blocks, prefixes, strict=True)))
        return features

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the cross-entropy over the classes of each example's task, plus the weighted penalty."""
        loss = F.cross_entropy(learner.mask(logits, batch.task, "task"), batch.y)
        if not self.penalty:
            return loss
        so_far = slice(learner.task_index + 1)
        terms = [apart(torch.cat(tuple(parts[so_far]))) for parts in (self.components, self.keys, self.attention)]
        return loss + self.penalty * torch.stack(terms).sum()
