r"""EASE, expandable subspace ensemble (Zhou et al. 2024, CVPR).

Each task b trains its own adapters :math:`A_b` in a frozen backbone, and so has a feature space of its own,
:math:`\phi(x; A_b)`. In each of them a class c has a prototype :math:`p_{c,b}`, the mean feature of its examples. The
examples of old classes are gone when a new space appears, so that their prototypes there are synthesised from those of
the new classes N, by the similarity of the classes in the space of the old class's own task o:

.. math:: \hat p_{c,b} = \sum_{j \in N} \mathrm{softmax}_j \bigl( \cos(p_{c,o}, p_{j,o}) \bigr) \; p_{j,b}

A class is scored by the cosines to its prototypes in the spaces of all b tasks, that of its own task o counting most:

.. math:: \cos(\phi(x; A_o), p_{c,o}) + \frac{\alpha}{b - 1} \sum_{j \neq o} \cos(\phi(x; A_j), p_{c,j})

The loss of a task runs over its own classes.

Defaults: bottleneck 64, factor 0.1 and alpha = 0.1, as in the released code for CIFAR-100; places as those of `aper`.
Differences from the paper, of which the abstract was read: the equations are those of the code.
Differences from the released code: in all of its configurations it computes the prototypes of old classes anew in every
space after each task, and N then holds the classes of task b and of all later ones: `released_rule`. A task is learned
there by a new classifier of cosines, here by the task's rows of the head. The adapters have dropout 0.1 there, and read
what the norm before an MLP reads; here they read what the MLP reads. The prototypes of a class that comes again are
computed anew, and its own task is then the present one. The option to use the features of the bare backbone as a
further space, which is off by default, is left out.

State: T adapters at each place in the backbone, prototypes (T, C, D), and the task of each class (C,). A prediction
takes a pass for each task so far. Scenarios: all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from cl.data.target import classes_of
from cl.engine.batch import Batch
from cl.engine.loader import EvalLoader
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.toolkit.inject import ADAPTED, Adapter, add, added, awaken, freeze, places, use

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def synthesised(old: Tensor, new: Tensor, new_here: Tensor) -> Tensor:
    """Return prototypes of old classes in a new space, (K, D).

    Args:
        old: Their prototypes in an old space, (K, D).
        new: Prototypes of the new classes in the old space, (N, D).
        new_here: Prototypes of the new classes in the new space, (N, D).

    Example:
        >>> old, new = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])  # cosines 1 and 0
        >>> synthesised(old, new, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[0.7311, 0.2689]])
    """
    return (F.normalize(old, dim=1) @ F.normalize(new, dim=1).T).softmax(1) @ new_here


class EASE(Strategy):
    """Trains adapters for each task, and classifies by prototypes in the feature spaces of all of them.

    Args:
        width: Width of an adapter's bottleneck.
        scale: Factor of an adapter's output.
        alpha: Weight of the spaces of other tasks than the class's own.
        released_rule: Synthesise anew after each task in all spaces, from all classes that have come since.
        layers: Kinds of modules: "linear", "conv", "norm", "block", or ends of names, such as "mlp" in a transformer;
            None means "mlp" if the backbone has such modules, else "block", else "linear".
        blocks: Blocks of the backbone whose modules are adapted, from 0; None means all.

    Raises:
        InputError: If the backbone has no such modules, or another strategy implements `encode`.

    Example:
        >>> EASE(width=16)
        EASE(width=16)
    """

    needs = ("boundaries",)
    needs_inputs = True
    prototypes: Tensor
    home: Tensor

    def __init__(
        self,
        width: Annotated[int, Ge(1)] = 64,
        scale: float = 0.1,
        alpha: Annotated[float, Ge(0)] = 0.1,
        released_rule: bool = False,
        layers: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.width, self.scale, self.alpha, self.released_rule = width, scale, alpha, released_rule
        self.layers = None if layers is None else tuple(layers)
        self.blocks = None if blocks is None else tuple(blocks)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Freeze the backbone, add the adapters of all tasks, and allocate the prototypes."""
        if learner.strategies.owned("encode"):
            raise InputError(
                "EASE trains adapters of the backbone, but another strategy owns encode: drop one of them."
            )
        body, T = learner.backbone, len(stream)
        freeze(body)
        names = places("EASE", body, ADAPTED, self.layers, self.blocks)
        example = learner.prepare(torch.zeros(1, *stream.input_shape, dtype=stream.input_dtype))
        add(body, names, [lambda channels: Adapter(channels, self.width, self.scale)] * T, example, parallel=True)
        self.register_buffer("prototypes", torch.zeros(T, stream.num_classes, int(body.num_features)))  # type: ignore[arg-type]
        self.register_buffer("home", torch.full((stream.num_classes,), -1))

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Let the backbone use the task's adapters, and train these alone."""
        awaken(learner.backbone)
        use(learner.backbone, task.index)
        for parts in added(learner.backbone):
            parts.requires_grad_(False)
            parts[task.index].requires_grad_()

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the cross-entropy over the classes of each example's own task, a scalar."""
        return F.cross_entropy(learner.mask(logits, batch.task, "task"), batch.y)

    def spaces(self, learner: LearnerLike, view: Tensor, number: int) -> Tensor:
        """Return the features of prepared inputs under the adapters of each of the first tasks, (number, B, D)."""
        found = []
        for task in range(number):
            use(learner.backbone, task)
            found.append(learner.backbone(view))
        use(learner.backbone, learner.task_index)
        return torch.stack(found).to(self.prototypes.dtype)

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Compute the prototypes of the task's classes in all spaces; synthesise those of old classes in the new."""
        now, new = task.index, torch.tensor(classes_of(task.train.labels), device=self.home.device)
        sums = torch.zeros_like(self.prototypes[: now + 1])
        with learner.evaluating():
            for batch in EvalLoader([task.train], learner.device, learner.eval_batch_size):
                sums.index_add_(1, batch.y, self.spaces(learner, learner.prepare(batch.x), now + 1))
        counts = torch.bincount(task.train.labels, minlength=len(self.home)).to(sums)
        self.prototypes[: now + 1, new] = sums[:, new] / counts[new, None]
        self.home[new] = now
        for b in range(1 if self.released_rule else now, now + 1):
            since = self.home >= b
            for t in range(b):
                old = self.home == t
                here, there = self.prototypes[b], self.prototypes[t]
                here[old] = synthesised(there[old], there[since], here[since])

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the weighted sum of the cosines to each class's prototypes, (B, C); -2 for a class without any."""
        tasks = learner.tasks_learned
        if tasks == 0:
            return self.prototypes.new_full((len(view), len(self.home)), -2.0)
        features = F.normalize(self.spaces(learner, view, tasks), dim=2)
        cosines = features @ F.normalize(self.prototypes[:tasks], dim=2).mT  # (tasks, B, C)
        own = torch.arange(tasks, device=self.home.device)[:, None] == self.home
        weights = torch.where(own, 1.0, self.alpha / max(tasks - 1, 1))
        return torch.where(self.home >= 0, (weights[:, None] * cosines).sum(0), -2.0)
