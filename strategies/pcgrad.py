r"""Gradients of several tasks without conflict (PCGrad, GradVac).

PCGrad is algorithm 1 of Yu et al. 2020 (NeurIPS), GradVac equation 4 of Wang et al. 2021 (ICLR). With replay every
batch holds examples of several tasks. Let :math:`g_i` be the gradient of the mean loss over the examples of task i in
the batch. PCGrad removes from each, for the other tasks j in random order, what points against :math:`g_j`:

.. math:: g_i^{PC} \leftarrow g_i^{PC} - \frac{\min(0, \langle g_i^{PC}, g_j \rangle)}{\lVert g_j \rVert^2} g_j

GradVac also raises a cosine :math:`\phi = \cos(g_i, g_j)` that is positive but below a target :math:`\hat\phi`:

.. math:: g_i \leftarrow g_i + \frac{\lVert g_i \rVert (\hat\phi \sqrt{1 - \phi^2} - \phi \sqrt{1 - \hat\phi^2})}
          {\lVert g_j \rVert \sqrt{1 - \hat\phi^2}} g_j \quad \text{if } \phi < \hat\phi

where the target of each pair of tasks is the running mean of its cosines,
:math:`\hat\phi \leftarrow (1 - \beta) \hat\phi + \beta \phi`, from 0. The update is the mean of the results, weighted
by the tasks' examples, so that without conflicts it is the gradient of the batch.

The loss of a task is the whole loss of the step on its examples: the criterion and the terms of all strategies. So it
composes with any replay (`strategy=[er,pcgrad]`); alone, each batch has one task, and nothing is changed.

Defaults: beta = 0.01 is that of Wang et al. 2021.
Differences from the papers: the tasks are those of the examples in the batch, instead of tasks that are trained
together from the start. The result is a mean; PCGrad's is a sum (of tasks of equal weight), T times as long. All
weights are one vector; GradVac's best variant treats the layers separately.
Differences from the reference code: none known in the projections.

Recorded: `pcgrad/conflicts`, the share of the pairs of tasks in a batch whose gradients point against each other.

State: the running cosines, T x T (GradVac). A step costs a forward and a backward pass more for each task of the batch,
which see batch norm over their own examples. Scenarios: all. Refused: several processes, minibatches that share an
update (`trainer.accumulate_grad_batches`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import unknown
from cl.random import Random
from cl.toolkit.weights import flat

if TYPE_CHECKING:
    from cl.data.task import Stream

RULES = ("pcgrad", "gradvac")


def without_conflict(g: Tensor, other: Tensor) -> Tensor:
    """Return a gradient (P,) without what points against another one (P,); PCGrad.

    Example:
        >>> without_conflict(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]))
        tensor([0.5000, 0.5000])
    """
    return g - (g @ other).clamp_max(0) / other.square().sum().clamp_min(1e-30) * other


def vaccinated(g: Tensor, other: Tensor, cosine: Tensor, target: Tensor) -> Tensor:
    """Return a gradient (P,) whose cosine with another one is raised from `cosine` to `target` if it is below; GradVac.

    Example:
        >>> g, other = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
        >>> vaccinated(g, other, torch.tensor(-0.5**0.5), torch.tensor(0.2))
        tensor([0.3979, 0.6021])
    """
    left, aim = (1 - cosine.square()).clamp_min(0).sqrt(), (1 - target.square()).clamp_min(1e-12).sqrt()
    share = g.norm() * (target * left - cosine * aim) / (other.norm() * aim).clamp_min(1e-30)
    return torch.where(cosine < target, g + share * other, g)


class PCGrad(Strategy):
    """Removes conflicts between the gradients of the tasks in a batch.

    Args:
        rule: "pcgrad" or "gradvac".
        beta: Weight of a new cosine in the running mean, for "gradvac".

    Raises:
        InputError: If there is no such rule.

    Example:
        >>> PCGrad(rule="gradvac")
        PCGrad(rule='gradvac')
    """

    targets = ("label", "multilabel", "regression")
    distributed = False
    uses_closure = True
    cosines: Tensor

    def __init__(self, rule: str = "pcgrad", beta: Annotated[float, Interval(ge=0, le=1)] = 0.01) -> None:
        super().__init__()
        if rule not in RULES:
            raise unknown("rule of PCGrad", rule, RULES)
        self.rule, self.beta, self.random = rule, beta, Random()

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the running cosines of the pairs of tasks."""
        self.register_buffer("cosines", torch.zeros(len(stream), len(stream)))

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Note the batch of the step."""
        self._batch = batch
        return None

    def project_gradients(self, learner: LearnerLike) -> None:
        """Replace the gradients by the weighted mean of the tasks' gradients without conflicts."""
        batch = self._batch
        tasks, counts = batch.task.unique(return_counts=True)
        if len(tasks) < 2:
            return
        weights = [p for p in learner.parameters() if p.grad is not None]
        gradients = [self._gradient(learner, batch.part(batch.task == task), weights) for task in tasks]
        conflicts = sum(float(a @ b < 0) for a, b in itertools.combinations(gradients, 2))
        learner.record("pcgrad/conflicts", 2 * conflicts / (len(tasks) * (len(tasks) - 1)))
        fix = self._vaccinate if self.rule == "gradvac" else lambda g, other, i, j: without_conflict(g, other)
        changed = _all_changed(gradients, tasks.tolist(), fix, self.random)
        summed = torch.stack([n / len(batch) * g for n, g in zip(counts, changed, strict=True)]).sum(0)
        for p, g in zip(weights, summed.split([p.numel() for p in weights]), strict=True):
            p.grad = g.view_as(p).to(p.dtype)

    def _gradient(self, learner: LearnerLike, batch: Batch, weights: list[torch.nn.Parameter]) -> Tensor:
        found = torch.autograd.grad(learner.closure(batch), weights, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, found, strict=True)]
        return flat([part.float() for part in parts])

    def _vaccinate(self, g: Tensor, other: Tensor, i: int, j: int) -> Tensor:
        """Raise the cosine to its running mean, then move the mean."""
        cosine = torch.nn.functional.cosine_similarity(g, other, dim=0)
        result = vaccinated(g, other, cosine, self.cosines[i, j])
        self.cosines[i, j] += self.beta * (cosine - self.cosines[i, j])
        return result


def _all_changed(
    gradients: list[Tensor], tasks: list[int], fix: Callable[[Tensor, Tensor, int, int], Tensor], random: Random
) -> list[Tensor]:
    """Return each gradient changed by all others, unchanged ones, in an order that is drawn for each."""
    found = []
    for i, g in enumerate(gradients):
        for j in random.generator.permutation(len(gradients)).tolist():
            g = g if j == i else fix(g, gradients[j], tasks[i], tasks[j])
        found.append(g)
    return found
