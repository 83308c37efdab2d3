r"""Supermasks in Superposition (Wortsman et al. 2020, sections 3.1-3.3).

The weights W of backbone and head are random and never trained: signed constants, :math:`\pm\sqrt{2 / fan}`. Each task
learns a score for each weight instead, and its subnetwork keeps, in each layer, the share k with the largest

.. math:: M^t = [\,|S^t| \text{ is among the largest}\,], \qquad f^t(x) = f(x, W \odot M^t) \tag{1}

where the gradient passes to S as if the mask were S itself. Old masks are kept, so old logits stay to the bit.

Where the task is not given at test, it is inferred: of all masks in superposition, with :math:`\alpha_i = 1/T` each,
the one that lowers the entropy H of the outputs fastest:

.. math:: \hat t = \arg\min_i \frac{\partial H}{\partial \alpha_i}, \qquad
          H = H\big(f(x, W \odot \textstyle\sum_i \alpha_i M^i)\big) \tag{2}

State: masks, a byte a weight and task; the present task's scores. Scenarios: all; in the class-incremental one the
classes of other tasks than the inferred one are put last. Refused: batch norm with running statistics
(`backbone.norm=batch_no_stats` or `group`; scale and shift stay as they are), streams without boundaries.

Inference wants wide layers and sparse masks: of five permutations of scikit-learn's digits, domain-incremental, two
layers of 512 and k = 0.1 found that of 89 % of the test examples, layers of 256 and k = 0.5 that of 51 % (one seed).

Differences from the paper: where classes differ by task, the loss is over the classes seen, there over all outputs
(`train_mask=domain`). Each example's task is inferred from it alone; the slopes are directional derivatives, one
forward pass a task. The binary search for many tasks, and Hopfield networks in place of masks, are left out.
Differences from the reference code: it infers from the first examples of a batch of one task. It can spread k over the
layers as in an Erdos-Renyi graph, and keeps batch norm's statistics for each task; its threshold variant, for MNIST,
keeps scores above 0, about half. Signs are those of the initial weights, as there; biases are 0, there left out.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.random import Random
from cl.toolkit.by_task import check_apart, run_by_task
from cl.toolkit.isolation import layer_weights
from cl.toolkit.subspace import check_statistics

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def supermask(scores: Tensor, density: float) -> Tensor:
    """Return the mask, 0 or 1, of the share of scores that is largest in magnitude; its gradient is theirs.

    Example:
        >>> supermask(torch.tensor([0.1, -0.5, 0.3, -0.05]), 0.5)
        tensor([0., 1., 1., 0.])
    """
    size = scores.abs()
    count = size.numel() - int((1 - density) * size.numel())
    mask = torch.zeros_like(size).flatten().index_fill(0, size.detach().flatten().topk(count).indices, 1.0)
    return mask.view_as(size) + (size - size.detach())


def entropy_slopes(logits: Tensor, changes: Tensor) -> Tensor:
    r"""Return the slopes of outputs' entropy in some directions, :math:`\sum_c \dot z_c \, \partial H / \partial z_c`.

    Args:
        logits: z, (B, C).
        changes: Those of z in each direction, (T, B, C).

    Example:
        >>> entropy_slopes(torch.tensor([[1.0, 0.5]]), torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]]))
        tensor([[-0.2350,  0.1175]])
    """
    log_p = logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1, keepdim=True)
    return (changes * -log_p.exp() * (log_p + entropy)).sum(2).T


class SupSup(Strategy):
    """Finds each task a subnetwork of one random network.

    Args:
        density: k, the share of each layer's weights that a mask keeps.

    Raises:
        InputError: If tasks have no boundaries, or batch norm keeps running statistics.

    Example:
        >>> SupSup(density=0.5)
        SupSup(density=0.5)
    """

    needs = ("boundaries",)
    uses_task = True

    def __init__(self, density: Annotated[float, Interval(gt=0, le=1)] = 0.1) -> None:
        super().__init__()
        self.density = density

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Fix the random weights; allocate masks and scores."""
        if not stream.boundaries:
            raise InputError(f"SupSup learns a mask a task, but {stream.name!r} has no boundaries: use another stream.")
        check_apart("SupSup", learner, stream)
        check_statistics(learner, "SupSup")
        self.random = Random()
        self.scores = nn.ParameterList()
        for i, weight in enumerate(self._weights(learner).values()):
            weight.data = weight.data.sign() * math.sqrt(2 / weight[0].numel())
            self.scores.append(nn.Parameter(torch.zeros_like(weight)))
            self.register_buffer(f"masks_{i}", torch.zeros(len(stream), *weight.shape, dtype=torch.bool))
        for module in learner.trunk().modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        learner.trunk().requires_grad_(False)
        self._draw()

    def _weights(self, learner: LearnerLike) -> dict[str, Tensor]:
        return layer_weights(nn.Sequential(learner.backbone, learner.head))

    @torch.no_grad()
    def _draw(self) -> None:
        """Draw scores from U(-1, 1) / sqrt(fan)."""
        for scores in self.scores:
            draw = self.random.generator.uniform(-1, 1, tuple(scores.shape)) / math.sqrt(scores[0].numel())
            scores.copy_(torch.from_numpy(draw))

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Start new scores."""
        self._draw()
        learner.forget_optimizer()

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Keep the mask."""
        for i, scores in enumerate(self.scores):
            self.get_buffer(f"masks_{i}")[task.index] = supermask(scores.detach(), self.density) > 0

    def _known(self, learner: LearnerLike) -> int:
        """Return the number of tasks that have a mask, the one in training among them."""
        return learner.tasks_learned + int(learner.task_index == learner.tasks_learned)

    def _subnetwork(self, learner: LearnerLike, part: str, task: int) -> dict[str, Tensor]:
        """Return masked weights of backbone ("0."), head ("1.") or both (""); a task to come has the newest mask."""
        task = min(task, self._known(learner) - 1)
        masked = {}
        for i, (name, weight) in enumerate(self._weights(learner).items()):
            if name.startswith(part):
                learned = task < learner.tasks_learned
                mask = self.get_buffer(f"masks_{i}")[task] if learned else supermask(self.scores[i], self.density)
                masked[name[len(part) :]] = weight * mask
        return masked

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return each row's features in the subnetwork of its task (equation 1)."""
        return run_by_task(learner, learner.backbone, view, partial(self._subnetwork, learner, "0."))

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Return the logits under the head's masks."""
        return run_by_task(learner, learner.head, features, partial(self._subnetwork, learner, "1."))

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the logits of the task that is given, or else inferred, in front of those of other tasks' classes."""
        if learner.scenario == "task" or self._known(learner) < 2:
            return learner(view)
        task = self.infer(learner, view)
        logits = learner(view, task)
        return torch.where(learner.membership[task], logits, logits - 1e4)

    @torch.no_grad()
    def infer(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the task that each row seems to be of, (B,) (equation 2)."""
        network = nn.Sequential(learner.backbone, learner.head)
        masked = [self._subnetwork(learner, "", task) for task in range(self._known(learner))]
        mean = {name: torch.stack([weights[name] for weights in masked]).mean(0) for name in masked[0]}

        seen = learner.seen.nonzero().flatten()

        def outputs(weights: dict[str, Tensor]) -> Tensor:
            return functional_call(network, weights, (view,))[:, seen].float()  # type: ignore[no-any-return]

        with sdpa_kernel(SDPBackend.MATH):  # the attention that has forward derivatives
            pairs = [jvp(outputs, (mean,), (weights,))[:2] for weights in masked]
        return entropy_slopes(pairs[0][0], torch.stack([change for _, change in pairs])).argmin(1)
