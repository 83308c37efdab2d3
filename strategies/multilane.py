r"""MULTI-LANE (De Min et al. 2024, CVPR Workshops, "Less is more: Summarizing Patch Tokens ...").

Each task has a pathway of its own through a frozen transformer, which is short because it reads the image through a few
summaries of its tokens. Let :math:`X_b` be the tokens that enter block b of the frozen transformer, and N its first
norm. With selectors :math:`S_b` (S, D), the pathway's class token :math:`c_b` is moved on by

.. math:: Z_b = \mathrm{softmax}\bigl( N(S_b) N(X_b)^\top / \sqrt{D} \bigr) N(X_b), \qquad
          c_{b+1} = \mathrm{block}_b(c_b; [N(c_b), Z_b], P_b)

where attention also runs over the task's prefixes :math:`P_b` of keys and values in some blocks. The outputs for the
summaries are dropped, and the selectors summarise anew in the next block ("drop and replace"). The feature is
:math:`c / \lVert c \rVert` after the last norm, and the loss runs over the task's own classes. At test all pathways
run, and a class takes its logit from that of its task, so that no task must be inferred.

With `selectors=fixed` all blocks use the parameter, as the paper describes. In the released code the selectors pass
through the block, too, with N(S) in place of the output of attention, so that each block has others:

.. math:: S' = S_b + N(S_b), \qquad S_{b+1} = S' + \mathrm{MLP}(N_2(S'))

Defaults: 20 selectors, 20 prefixes in blocks 0 to 4, `selectors=released`. A task starts from the pathway of the task
before, the first one from orthogonal rows.
Differences from the paper, in which this follows the released code: summaries are made of all tokens, the class token
included, and the pathway's class token has no position embedding.
Differences from the released code: as committed, its configurations set `normalize` to a value with which features are
not normalised (here `normalize=false`). It makes one tensor of all tasks orthogonal, whose parts have smaller entries.
Its loss of multi-label tasks is a mean over all classes, with logits of 0 for those of other tasks; here it is over the
task's own, which differs by a factor and a constant. Task selection and token merging, ablations, are left out.

State: selectors (S, D) and prefixes (E, 2, L, D) for E blocks of each task. A task's logits stay the same to the bit
when later tasks are learned, unless weight decay shrinks the head. Classes of tasks to come take the logits of the
latest pathway. Scenarios: class- and task-incremental. Refused: tasks with classes in common, and transformers without
a class token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from cl.backbones.vit import attend, finish, freeze_transformer
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError, unknown
from cl.toolkit.by_task import check_apart, rows_by_task

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def summaries(selectors: Tensor, tokens: Tensor) -> Tensor:
    """Return a mean of tokens (B, N, D) for each selector (S, D), weighted by similarity, (B, S, D).

    Example:
        >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> summaries(torch.tensor([[2.0**0.5, 0.0], [0.0, 0.0]]), tokens)  # softmax of (1, 0), and of (0, 0)
        tensor([[[0.7311, 0.2689],
                 [0.5000, 0.5000]]])
    """
    weights: Tensor = (selectors @ tokens.mT / tokens.shape[2] ** 0.5).softmax(2)
    return weights @ tokens


class MultiLane(Strategy):
    """Learns selectors, prefixes and outputs for each task on a frozen transformer; all pathways run at test.

    Args:
        num_selectors: S.
        length: L, prefixes in a block: keys, and as many values.
        blocks: Blocks that get prefixes, from 0.
        selectors: "released" or "fixed".
        normalize: Whether features have length 1.

    Raises:
        InputError: If `selectors` is unknown, or the backbone takes no prefixes, has no class token or no such block.

    Example:
        >>> MultiLane(selectors="fixed", blocks=(0,))
        MultiLane(blocks=(0,), selectors='fixed')
    """

    scenarios = ("class", "task")
    targets = ("label", "multilabel")
    needs = ("boundaries", "transformer")
    uses_task = True

    def __init__(
        self,
        num_selectors: Annotated[int, Ge(1)] = 20,
        length: Annotated[int, Ge(1)] = 20,
        blocks: Sequence[int] = (0, 1, 2, 3, 4),
        selectors: str = "released",
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if selectors not in ("released", "fixed"):
            raise unknown("kind of selectors", selectors, ("released", "fixed"))
        self.num_selectors, self.length, self.blocks = num_selectors, length, tuple(blocks)
        self.selectors, self.normalize = selectors, normalize

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the pathways; freeze the transformer."""
        check_apart("MULTI-LANE", learner, stream)
        freeze_transformer("multilane", learner.backbone, blocks=self.blocks)
        if learner.shared_outputs:
            raise InputError(
                f"MULTI-LANE gives each class to one task, but tasks of {stream.name!r} share classes: choose another "
                "stream, or another strategy."
            )
        body: Any = learner.backbone
        if getattr(getattr(body, "model", None), "cls_token", None) is None:
            raise InputError(
                f"MULTI-LANE starts from a transformer's class token, but {type(body).__name__} has none: use "
                "backbone=vit, or a ViT of timm with one."
            )
        D, shape = body.num_features, (len(self.blocks), 2, self.length)
        self.S = nn.ParameterList(nn.init.orthogonal_(torch.empty(self.num_selectors, D)) for _ in stream)
        rows = [nn.init.orthogonal_(torch.empty(2 * len(self.blocks) * self.length, D)) for _ in stream]
        self.P = nn.ParameterList(each.view(*shape, D) for each in rows)

    @torch.no_grad()
    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Copy the pathway of the task before, and train the task's alone, with a new optimizer."""
        learner.forget_optimizer()
        for parts in (self.S, self.P):
            if task.index > 0:
                parts[task.index].copy_(parts[task.index - 1])
            for t, part in enumerate(parts):
                part.requires_grad_(t == task.index)

    @torch.no_grad()
    def frozen(self, learner: LearnerLike, view: Tensor) -> list[Tensor]:
        """Return the tokens (B, N, D) that enter each block of the frozen transformer, after its first norm."""
        body: Any = learner.backbone.eval()
        x, found = body.embed(view), []
        for block in body.model.blocks:
            found.append(block.norm1(x))
            x = block(x)
        return found

    def lane(self, learner: LearnerLike, tokens: list[Tensor], task: int) -> Tensor:
        """Return the features (B, D) of a task's pathway on the tokens of all blocks."""
        model: Any = learner.backbone.model
        cls, S = model.cls_token.expand(len(tokens[0]), -1, -1), self.S[task]
        for b, (block, x) in enumerate(zip(model.blocks, tokens, strict=True)):
            selectors, n = block.norm1(S), self.blocks.index(b) if b in self.blocks else None
            prefix = x.new_zeros(2, 0, x.shape[2]) if n is None else self.P[task][n]
            inputs = torch.cat([block.norm1(cls), summaries(selectors, x)], dim=1)
            cls = finish(block, cls, attend(block.attn, inputs, prefix.expand(len(x), *prefix.shape))[:, :1])
            S = finish(block, S, selectors) if self.selectors == "released" else S
        features: Tensor = model.norm(cls)[:, 0]
        return F.normalize(features, dim=1) if self.normalize else features

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the features of each example in the pathway of its task, (B, D); of the present one if it has none."""
        return rows_by_task(learner, view, lambda rows, task: self.lane(learner, self.frozen(learner, rows), task))

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the loss over the classes of each example's task, a scalar."""
        return learner.target.loss(learner.mask(logits, batch.task, "task"), batch.y)

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the logit of each class from the pathway of its task, (B, C); under a given task from that one."""
        if learner.told is not None:
            return learner(view)
        begun = learner.tasks_learned + int(learner.task_index == learner.tasks_learned)
        tokens = self.frozen(learner, view)
        logits: Tensor = learner.head(self.lane(learner, tokens, begun - 1))
        for task in range(begun - 1):
            logits = torch.where(learner.membership[task], learner.head(self.lane(learner, tokens, task)), logits)
        return logits
