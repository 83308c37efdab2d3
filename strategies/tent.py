r"""TENT, fully test-time adaptation by entropy minimization (Wang et al. 2021, ICLR).

A network that was trained with labels meets inputs of another kind without labels, such as corrupted images. There it
makes its own predictions more certain: with :math:`p_c(x)` the softmax of the outputs of the classes that compete, the
loss of a batch B is the mean entropy

.. math:: L = \frac{1}{|B|} \sum_{x \in B} H(x), \qquad H(x) = -\sum_c p_c(x) \log p_c(x)

and only scale and shift of the batch norms are trained, :math:`\gamma` and :math:`\beta` of each channel:

.. math:: z' = \gamma \, \frac{z - \mu_B}{\sigma_B} + \beta

where mean and deviation are those of the batch, at test, too. This holds on tasks that hide their labels
(`stream=hidden_labels`); the others are learned by the cross-entropy, as in fine-tuning.

Such as `cl-run strategy=tent stream=hidden_labels stream@stream.source=corrupted dataset=cifar10 backbone=resnet18`:
the first task, clean images, has labels, and the corrupted ones do not. The paper's predictions are those of one pass,
made before each update, as `instrument=prequential` counts them in the first epoch. Row t of R is the network after
task t on test sets that it has not adapted to. A class that no earlier task has shown with its label cannot be learned,
and a remark says so.

Defaults: the learning rate on hidden tasks is that of the run. The authors' example for CIFAR-10-C has Adam with a rate
of 1e-3 on batches of 200 (`strategy.tent.lr=1e-3`). It lists these mean errors over its fifteen corruptions of the
highest severity, for a WRN-28-10: 43.5 % without adaptation, 20.4 % with the statistics of the batch, 18.6 % with TENT
(README of github.com/DequanWang/tent). They have not been run here. Seen here: under fog of severity 5 an MLP with
batch norm, trained on the digits of scikit-learn, is right on 38.7 +- 3.3 % without adaptation, on 68.7 +- 2.0 % with
the statistics of the batch, and on 69.2 +- 1.6 % after TENT (five seeds, standard errors; Adam with a rate of 3e-3,
five epochs): what the entropy adds, 0.5 +- 0.5, is not certain, and a rate of 3e-2 takes 2.1 +- 1.3 away.
Differences from the paper: training with labels is part of the run, a hidden task has as many epochs as the others, and
predictions use the statistics of the batch from the start. `statistics=running` keeps running statistics, which move
with every task, and predicts with them. The network is not put back between two hidden tasks.
Differences from the released code: it adapts batch norms of images alone (`BatchNorm2d`), and starts anew from the
trained network for each corruption.

State: none. Scenarios: all. Refused: backbones without batch norm or whose batch norms are not trained, targets other
than single labels, another strategy that implements `criterion` or `configure_optimizer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, OptimizerFactory, Strategy
from cl.errors import InputError, unknown

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

STATISTICS = ("batch", "running")


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy (B,) of the softmax of logits (B, C), in nats; classes at minus infinity have no part in it.

    Example:
        >>> import torch
        >>> entropy(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        tensor([0.3653, 0.6931])
    """
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p.clamp_min(-100)).sum(1)  # 0 times minus infinity would be NaN


class Tent(Strategy):
    """Learns tasks without labels by the entropy of its predictions, which scale and shift of batch norms lower.

    Args:
        lr: Learning rate on tasks that hide their labels; None means that of the run.
        statistics: Those with which batch norms predict: of the "batch", or the "running" ones.

    Raises:
        InputError: If the backbone has no batch norm that is trained, or `statistics` is unknown.

    Example:
        >>> Tent(lr=1e-3)
        Tent(lr=0.001)
    """

    needs = ("boundaries", "batch_norm")
    needs_inputs = True
    needs_labels = False

    def __init__(self, lr: Annotated[float, Gt(0)] | None = None, statistics: str = "batch") -> None:
        super().__init__()
        if statistics not in STATISTICS:
            raise unknown("kind of statistics", statistics, STATISTICS)
        self.lr, self.statistics = lr, statistics
        self._hidden, self._frozen = False, list[nn.Parameter]()

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Drop the running statistics; find the hidden tasks with classes that are never shown with labels before."""
        name = type(learner.backbone).__name__
        if not _norms(learner.backbone):
            raise InputError(
                f"tent needs batch norm with scale and shift, and {name} has none: use another backbone, such as "
                "backbone=resnet18 or backbone.norm=true of backbone=mlp."
            )
        if not _trained(learner.backbone):
            raise InputError(f"tent trains the batch norms of {name}, and they are frozen: set freeze=false.")
        if self.statistics == "batch":
            for norm in _norms(learner.backbone):
                norm.track_running_stats = False
                norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        shown: set[int] = set()
        self._unknown = []
        for task in stream:
            if not task.hidden:
                shown.update(task.classes)
            elif not shown.issuperset(task.classes):
                self._unknown.append(task.index + 1)

    def remark(self, learner: LearnerLike) -> str | None:
        """Say which hidden tasks have classes that no earlier task has shown."""
        if not self._unknown:
            return None
        return (
            f"TENT adapts to new inputs of known classes, but no earlier task shows the labels of all classes of task "
            f"{', '.join(map(str, self._unknown))}, which hides them: it cannot learn those."
        )

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Freeze all but scale and shift of the batch norms if the task hides its labels."""
        self._hidden = task.hidden
        if task.hidden:
            kept = {id(parameter) for parameter in _trained(learner.backbone)}
            self._frozen = [p for p in learner.trunk().parameters() if p.requires_grad and id(p) not in kept]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def configure_optimizer(self, learner: LearnerLike, factory: OptimizerFactory) -> Optimizer:
        """Return the run's optimizer, with a learning rate of its own on a hidden task."""
        optimizer = super().configure_optimizer(learner, factory)
        if self._hidden and self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        return optimizer

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the mean entropy over the classes that compete if labels are hidden, else the cross-entropy."""
        if not self._hidden:
            return learner.criterion(logits, batch)
        return entropy(learner.mask(logits, batch.task, learner.train_mask)).mean()

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Let all weights learn again."""
        for parameter in self._frozen:
            parameter.requires_grad_()
        self._frozen = []


def _norms(backbone: nn.Module) -> list[_BatchNorm]:
    return [module for module in backbone.modules() if isinstance(module, _BatchNorm) and module.affine]


def _trained(backbone: nn.Module) -> list[nn.Parameter]:
    return [p for norm in _norms(backbone) for p in norm.parameters() if p.requires_grad]
