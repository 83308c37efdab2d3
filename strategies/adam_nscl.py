r"""Training in the null space of feature covariance (Adam-NSCL; Wang, Li, Sun and Xu 2021, algorithms 1 and 2).

A change of a layer's weight leaves the layer's outputs on old inputs unchanged if its product with every old input x is
0, that is, if it lies in the null space of their uncentred covariance :math:`\bar X = \sum x x^\top`, summed over the
training examples of all earlier tasks. The singular vectors of :math:`\bar X` with singular values
:math:`s_i \le a \, s_{min}` (1) form an approximate null space :math:`U_2`. Not only the gradient but the whole step of
the optimizer is projected onto it (2), so that Adam's moments and weight decay do not break the projection:

.. math:: \Delta W \leftarrow \Delta W \, U_2 U_2^\top

Defaults: a = 10 and all training examples, as in the released code.
Differences from the paper: biases and norms get no step after the first task, where the paper protects batch norm by
EWC (weight 100). The head is projected, too, unless task labels give each task outputs of its own. :math:`s_{min}` is
taken to be at least 1e-10 of the largest singular value: if it were exactly 0, as for pixels that are always black,
rounding would decide which vectors satisfy (1).
Differences from the reference code: the code divides the projector by its Frobenius norm, the square root of its rank,
which amounts to a learning rate of its own for each layer (`released_rule=true` does so). It averages the inputs of a
batch before they enter the covariance; here each input enters. It has separate learning rates for later tasks (half of
the first task's), for heads (ten times) and for batch norm.

State: for a layer with d inputs the covariance, in double precision, and the projector, (d, d) each.
Scenarios: all. Any optimizer can be used; the paper uses Adam. Refused: batch norm with running statistics.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor
from torch.optim import Optimizer

from cl.engine.loader import EvalLoader
from cl.engine.strategy import LearnerLike, OptimizerFactory, Strategy
from cl.random import Random
from cl.toolkit.layers import layer_inputs
from cl.toolkit.subspace import check_statistics, protected_layers, silence_others

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def null_projector(covariance: Tensor, ratio: float, released_rule: bool = False) -> Tensor:
    """Return the projector (d, d) on the approximate null space of a covariance, by equation 1.

    Args:
        covariance: Uncentred covariance of the layer's inputs, (d, d).
        ratio: a; with 1 only the directions of the smallest singular value are kept.
        released_rule: Divide the projector by its Frobenius norm.

    Example:
        >>> null_projector(torch.diag(torch.tensor([100.0, 1.0, 0.5])), 10).diagonal().tolist()
        [0.0, 1.0, 1.0]
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    free = vectors[:, values <= ratio * values[0].clamp_min(1e-10 * values[-1])]
    projector: Tensor = free @ free.T
    return projector / projector.norm() if released_rule else projector


class AdamNSCL(Strategy):
    """Keeps the steps of any optimizer in the approximate null space of earlier tasks' inputs.

    Args:
        ratio: a; the null space has the singular values up to a times the smallest one.
        num_samples: Training examples of each task on which the covariance is measured; None means all.
        released_rule: Divide each projector by its Frobenius norm, as the released code does.

    Raises:
        InputError: If batch norm keeps running statistics, which change with the data whatever the steps.

    Example:
        >>> AdamNSCL(ratio=20.0)
        AdamNSCL(ratio=20.0)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("boundaries",)

    def __init__(
        self,
        ratio: Annotated[float, Ge(1)] = 10.0,
        num_samples: Annotated[int, Ge(1)] | None = None,
        released_rule: bool = False,
    ) -> None:
        super().__init__()
        self.ratio, self.num_samples, self.released_rule = ratio, num_samples, released_rule

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate covariance and projector for each layer; refuse batch norm with running statistics."""
        check_statistics(learner, "Adam-NSCL")
        self.random = Random()
        for i, layer in enumerate(protected_layers(learner)):
            size = layer.weight[0].numel()
            self.register_buffer(f"covariance_{i}", torch.zeros(size, size, dtype=torch.float64))
            self.register_buffer(f"projector_{i}", torch.eye(size))

    def configure_optimizer(self, learner: LearnerLike, factory: OptimizerFactory) -> Optimizer:
        """Return the configured optimizer; from the second task on the steps of protected layers are projected."""
        optimizer = factory(p for p in learner.parameters() if p.requires_grad)
        if learner.tasks_learned == 0:
            return optimizer
        weights = [layer.weight for layer in protected_layers(learner)]
        before: list[Tensor] = []

        def remember(*_: Any) -> None:
            before[:] = [weight.detach().clone() for weight in weights]

        @torch.no_grad()
        def project(*_: Any) -> None:
            for i, (weight, old) in enumerate(zip(weights, before, strict=True)):
                step = (weight - old).flatten(1) @ self.get_buffer(f"projector_{i}")
                weight.copy_(old + step.view_as(old))

        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(project)
        return optimizer

    def project_gradients(self, learner: LearnerLike) -> None:
        """Remove the gradient of protected parameters that have no projector: biases and norms."""
        if learner.tasks_learned > 0:
            silence_others(learner, protected_layers(learner))

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add this task's inputs to the covariances, and compute the null spaces again."""
        layers, data = protected_layers(learner), task.train
        if self.num_samples is not None and self.num_samples < len(data):
            data = data.take(torch.from_numpy(self.random.generator.choice(len(data), self.num_samples, replace=False)))
        with learner.evaluating():
            for batch in EvalLoader([data], learner.device, batch_size=64):  # an image may have a thousand patches
                for i, R in enumerate(layer_inputs(layers, partial(learner, learner.prepare(batch.x), batch.task))):
                    self.get_buffer(f"covariance_{i}").add_(R.double() @ R.double().T)
        for i in range(len(layers)):
            projector = null_projector(self.get_buffer(f"covariance_{i}"), self.ratio, self.released_rule)
            self.get_buffer(f"projector_{i}").copy_(projector)
