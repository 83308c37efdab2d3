r"""PackNet (Mallya and Lazebnik 2018, section 3).

Every weight of the backbone is owned by a task or is free; let O be the owner's number, and 0 for free weights. A task
t takes all free weights and trains them. After some epochs, in each layer, the share p of its own weights with the
smallest magnitude is pruned and becomes free again; the remaining epochs train the others further. A task is evaluated
with the weights of the tasks up to it:

.. math:: W^{(t)} = W \odot [1 \le O \le t] \tag{1}

Later tasks never change these weights, so the logits of old tasks stay the same, bit for bit. Free weights are 0 at the
start of a task. After t tasks the share :math:`p^t` of a layer is free.

Defaults: p = 0.5, as in one setting of the paper; a task prunes after half of its epochs, a choice of this project.
Differences from the paper: all layers of the backbone are pruned, and those fully connected layers only that belong to
it. The network starts from any weights, in the paper from those trained on ImageNet, and batch norm keeps the
statistics of the first task.
Differences from the reference code: the code sets pruned weights to 0 after every step; here equation 1 does so, so
that momentum, which still moves them, has no effect. After pruning, the same optimizer and schedule go on; the code
begins new ones. Strategies that project gradients (GPM) must stand before this one in the configuration.

State: the owner of each weight, four bytes. Biases and norms belong to the first task and are frozen after it, as in
the paper; outputs belong to the task of their classes. Scenarios: task-incremental. Refused: batch norm with running
statistics, which change with the data (use `backbone.norm=batch_no_stats` or `group`), weight decay, and classes that
occur in several tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.toolkit.by_task import run_by_task
from cl.toolkit.isolation import check_isolation, keep_outputs, layer_weights, silence_others

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def smallest(weight: Tensor, among: Tensor, share: float) -> Tensor:
    """Return a mask of the given share of weights that have the smallest magnitude.

    Args:
        weight: Weights, of any shape.
        among: Which weights are considered, bool of the same shape.
        share: p, the share of these weights that is marked.

    Example:
        >>> smallest(torch.tensor([0.1, -0.5, 0.3, -0.05, 0.0]), torch.tensor([True] * 4 + [False]), 0.5)
        tensor([ True, False, False,  True, False])
    """
    magnitudes = weight[among].abs()
    count = round(share * len(magnitudes))
    chosen = torch.zeros_like(magnitudes, dtype=torch.bool)
    chosen[magnitudes.argsort(stable=True)[:count]] = True
    return torch.zeros_like(among).masked_scatter(among, chosen)


class PackNet(Strategy):
    """Prunes the weights that a task needs least, and trains them for the next task.

    Args:
        share: p, the share of a task's weights that is pruned, in each layer.
        prune_after: Epochs of a task before pruning; None means half of its epochs, rounded up.

    Raises:
        InputError: If the scenario is not task-incremental, or old outputs could change (see what the header refuses).

    Example:
        >>> PackNet(share=0.75)
        PackNet(share=0.75)
    """

    scenarios = ("task",)
    needs = ("boundaries",)
    uses_task = True
    pruned: Tensor

    def __init__(
        self, share: Annotated[float, Interval(ge=0, le=1)] = 0.5, prune_after: Annotated[int, Ge(1)] | None = None
    ) -> None:
        super().__init__()
        self.share, self.prune_after = share, prune_after

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Assign all weights to the first task; refuse settings under which old outputs could change."""
        check_isolation(self, learner, stream)
        for i, weight in enumerate(layer_weights(learner.backbone).values()):
            self.register_buffer(f"owner_{i}", torch.ones(weight.shape, dtype=torch.int32))
        self.register_buffer("pruned", torch.zeros((), dtype=torch.bool))

    def remark(self, learner: LearnerLike) -> str | None:
        """Warn from which task on a layer has no free weights left."""
        first: dict[int, list[str]] = {}
        for name, weight in layer_weights(learner.backbone).items():
            free, task = weight.numel(), 1
            while free and task <= learner.num_tasks:
                free, task = round(self.share * free), task + 1
            if task <= learner.num_tasks:
                first.setdefault(task, []).append(name.removesuffix(".weight"))
        if not first:
            return None
        full = "; ".join(f"{', '.join(names)} from task {task} on" for task, names in sorted(first.items()))
        return f"PackNet has no free weights left in {full}: raise packnet.share, or use a wider backbone."

    def _owned(self, learner: LearnerLike) -> list[tuple[str, Tensor, Tensor]]:
        """Return the name, the weight and the owners of each layer."""
        weights = layer_weights(learner.backbone).items()
        return [(name, weight, self.get_buffer(f"owner_{i}")) for i, (name, weight) in enumerate(weights)]

    @torch.no_grad()
    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Assign the free weights to the task, and set them to 0."""
        epochs = learner.epochs
        if self.prune_after is not None and self.prune_after > epochs:
            raise InputError(
                f"packnet.prune_after={self.prune_after} is more than the epochs={epochs} of a task: lower it."
            )
        for _, weight, owner in self._owned(learner):
            weight.masked_fill_(owner == 0, 0)
            owner.masked_fill_(owner == 0, task.index + 1)
        self.pruned.fill_(False)

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the features of each example in the subnetwork of its task (equation 1)."""
        owned = self._owned(learner)

        def subnetwork(task: int) -> dict[str, Tensor]:
            return {name: torch.where((owner > 0) & (owner <= task + 1), w, 0) for name, w, owner in owned}

        return run_by_task(learner, learner.backbone, view, subnetwork)

    def project_gradients(self, learner: LearnerLike) -> None:
        """Leave only the gradients of what the task owns; biases and norms belong to the first task."""
        owned = self._owned(learner)
        for _, weight, owner in owned:
            if weight.grad is not None:
                weight.grad *= owner == learner.task_index + 1
        silence_others(learner, [weight for _, weight, _ in owned])
        keep_outputs(learner)

    def after_epoch(self, learner: LearnerLike, task: Task, epoch: int) -> None:
        """Prune after the epoch that `prune_after` says."""
        epochs = learner.epochs
        if epoch + 1 == (self.prune_after or epochs - epochs // 2):
            self._prune(learner, task)

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Prune, if the task ended before its epoch of pruning."""
        if not bool(self.pruned):
            self._prune(learner, task)

    def _prune(self, learner: LearnerLike, task: Task) -> None:
        for _, weight, owner in self._owned(learner):
            owner.masked_fill_(smallest(weight.detach(), owner == task.index + 1, self.share), 0)
        self.pruned.fill_(True)
