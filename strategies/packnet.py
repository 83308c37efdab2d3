r"""PackNet (Mallya and Lazebnik 2018, section 3).

Every weight of the backbone has an owner O: a task, or none yet. A task t trains all weights that have none. After some
epochs, in each layer, the share p of its own weights that are smallest in magnitude is pruned and given back; in the
remaining epochs the others are trained on. A task is answered with

.. math:: W^{(t)} = W \odot [1 \le O \le t] \tag{1}

and later tasks never change these: the logits of old tasks stay as they are, to the bit. Weights given back start from
0. After t tasks :math:`p^t` of a layer is left.

State: the owner of each weight, four bytes. Biases and norms belong to the first task and are frozen after it, as in
the paper; outputs belong to the task of their classes. Scenario: task-incremental. Refused: batch norm with running
statistics, which drift (`backbone.norm=batch_no_stats` or `group`), weight decay, classes in several tasks.

Differences from the paper: the fully connected layers that it prunes are those of the backbone; the network starts from
any weights, there from ImageNet's. Batch norm there keeps the statistics of the first task.
Differences from the reference code: it zeroes pruned weights after every step; here equation 1 does, so momentum, which
moves them, does no harm. Pruning goes on with the same optimizer and schedule, there each phase has a new one.
Strategies that project gradients (GPM) belong in front of this one.
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
    """Return which of some weights are the share that is smallest in magnitude.

    Args:
        weight: Any shape.
        among: Which ones count, bool of the same shape.
        share: p, of those that count.

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
    """Prunes what a task does not need and gives it to the next.

    Args:
        share: p, the share of a task's weights that is pruned, in each layer.
        prune_after: Epochs of a task before it prunes; None means half of them.

    Raises:
        InputError: If the scenario is not task-incremental, or old answers could not be kept; see above.

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
        """Give all weights to the first task; refuse what would change old answers."""
        check_isolation(self, learner, stream)
        for i, weight in enumerate(layer_weights(learner.backbone).values()):
            self.register_buffer(f"owner_{i}", torch.ones(weight.shape, dtype=torch.int32))
        self.register_buffer("pruned", torch.zeros((), dtype=torch.bool))

    def remark(self, learner: LearnerLike) -> str | None:
        """Say from which task on a layer has no weights left."""
        first: dict[int, list[str]] = {}
        for name, weight in layer_weights(learner.backbone).items():
            free, task = weight.numel(), 1
            while free and task <= learner.num_tasks:
                free, task = round(self.share * free), task + 1
            if task <= learner.num_tasks:
                first.setdefault(task, []).append(name.removesuffix(".weight"))
        if not first:
            return None
        told = "; ".join(f"{', '.join(names)} from task {task} on" for task, names in sorted(first.items()))
        return f"PackNet has no free weights left in {told}: raise packnet.share, or use a wider backbone."

    def _owned(self, learner: LearnerLike) -> list[tuple[str, Tensor, Tensor]]:
        """Return the layers' weights with their names and owners."""
        weights = layer_weights(learner.backbone).items()
        return [(name, weight, self.get_buffer(f"owner_{i}")) for i, (name, weight) in enumerate(weights)]

    @torch.no_grad()
    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Give the free weights to the task, at 0."""
        epochs = learner.epochs
        if self.prune_after is not None and self.prune_after > epochs:
            raise InputError(
                f"packnet.prune_after={self.prune_after} lies beyond the epochs={epochs} of a task: lower it."
            )
        for _, weight, owner in self._owned(learner):
            weight.masked_fill_(owner == 0, 0)
            owner.masked_fill_(owner == 0, task.index + 1)
        self.pruned.fill_(False)

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return each row's features in the subnetwork of its task (equation 1)."""
        owned = self._owned(learner)

        def subnetwork(task: int) -> dict[str, Tensor]:
            return {name: torch.where((owner > 0) & (owner <= task + 1), w, 0) for name, w, owner in owned}

        return run_by_task(learner, learner.backbone, view, subnetwork)

    def project_gradients(self, learner: LearnerLike) -> None:
        """Leave only gradients of what the task owns; biases and norms are the first task's."""
        owned = self._owned(learner)
        for _, weight, owner in owned:
            if weight.grad is not None:
                weight.grad *= owner == learner.task_index + 1
        silence_others(learner, [weight for _, weight, _ in owned])
        keep_outputs(learner)

    def after_epoch(self, learner: LearnerLike, task: Task, epoch: int) -> None:
        """Prune, once its time has come."""
        epochs = learner.epochs
        if epoch + 1 == (self.prune_after or epochs - epochs // 2):
            self._prune(learner, task)

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Prune a task that was stopped early."""
        if not bool(self.pruned):
            self._prune(learner, task)

    def _prune(self, learner: LearnerLike, task: Task) -> None:
        for _, weight, owner in self._owned(learner):
            owner.masked_fill_(smallest(weight.detach(), owner == task.index + 1, self.share), 0)
        self.pruned.fill_(True)
