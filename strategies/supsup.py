r"""Supermasks in Superposition (Wortsman et al. 2020, sections 3.1-3.3).

The weights W of backbone and head are random constants, :math:`\pm\sqrt{2 / fan}`, and never trained. Instead each task
t learns a score for each weight. Its subnetwork consists, in each layer, of the share k of weights whose scores
:math:`S^t` have the largest magnitude:

.. math:: M^t = [\,|S^t| \text{ is among the largest}\,], \qquad f^t(x) = f(x, W \odot M^t) \tag{1}

The gradient with respect to the mask is used as the gradient with respect to :math:`|S^t|` (straight-through). The
masks of old tasks do not change, so their logits stay the same, bit for bit.

If the task is not given at test, it is inferred. All masks are superposed with the weights
:math:`\alpha_i = 1/T`, and the task is chosen whose mask lowers the entropy H of the outputs fastest:

.. math:: \hat t = \arg\min_i \frac{\partial H}{\partial \alpha_i}, \qquad
          H = H\big(f(x, W \odot \textstyle\sum_i \alpha_i M^i)\big) \tag{2}

This works best with wide layers and sparse masks. For five permutations of scikit-learn's digits,
domain-incremental, two layers of 512 units and k = 0.1 inferred the task of 89 % of the test examples, layers of 256
units and k = 0.5 that of 51 % (one seed).

Defaults: k = 0.1, in view of that.
Differences from the paper: where classes differ by task, the loss is over the classes seen, in the paper over all
outputs (`train_mask=domain`). The task of each example is inferred from this example alone; the slopes are directional
derivatives, with one forward pass per task. The binary search for many tasks, and Hopfield networks in place of masks,
are left out.
Differences from the reference code: the code infers the task from the first examples of a batch that belongs to one
task. It can distribute k over the layers as in an Erdos-Renyi graph, and stores batch norm's statistics for each task.
Its variant with a threshold, for MNIST, selects weights with scores above 0, about half of them. The signs of W are
those of the initial weights, as in the code; biases are 0, in the code there are none.

State: masks, one byte per weight and task; the scores of the present task. Scenarios: all; in the class-incremental one
the classes of other tasks than the inferred one rank last. Refused: batch norm with running statistics (use
`backbone.norm=batch_no_stats` or `group`, whose scale and shift are not trained), streams without task boundaries.
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
    """Return a mask, 1 for the given share of scores with the largest magnitude, else 0; its gradient goes to |scores|.

    Example:
        >>> supermask(torch.tensor([0.1, -0.5, 0.3, -0.05]), 0.5)
        tensor([0., 1., 1., 0.])
    """
    size = scores.abs()
    count = size.numel() - int((1 - density) * size.numel())
    mask = torch.zeros_like(size).flatten().index_fill(0, size.detach().flatten().topk(count).indices, 1.0)
    return mask.view_as(size) + (size - size.detach())


def entropy_slopes(logits: Tensor, changes: Tensor) -> Tensor:
    r"""Return the slopes of the entropy, (B, T), in T directions: :math:`\sum_c \dot z_c \, \partial H / \partial z_c`.

    Args:
        logits: Outputs z, (B, C).
        changes: Derivatives :math:`\dot z` of the outputs in each direction, (T, B, C).

    Example:
        >>> entropy_slopes(torch.tensor([[1.0, 0.5]]), torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]]))
        tensor([[-0.2350,  0.1175]])
    """
    log_p = logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1, keepdim=True)
    return (changes * -log_p.exp() * (log_p + entropy)).sum(2).T


class SupSup(Strategy):
    """Learns for each task a subnetwork of one network with fixed random weights.

    Args:
        density: k, the share of each layer's weights that a mask selects.

    Raises:
        InputError: If the stream has no task boundaries, or batch norm keeps running statistics.

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
        """Set the constant weights; allocate masks and scores."""
        if not stream.boundaries:
            raise InputError(f"SupSup learns masks by task, but {stream.name!r} has no boundaries: use another stream.")
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
        """Draw new scores, and start a new optimizer."""
        self._draw()
        learner.forget_optimizer()

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Store the mask of the task."""
        for i, scores in enumerate(self.scores):
            self.get_buffer(f"masks_{i}")[task.index] = supermask(scores.detach(), self.density) > 0

    def _known(self, learner: LearnerLike) -> int:
        """Return the number of tasks that have a mask, the one in training among them."""
        return learner.tasks_learned + int(learner.task_index == learner.tasks_learned)

    def _subnetwork(self, learner: LearnerLike, part: str, task: int) -> dict[str, Tensor]:
        """Return masked weights of backbone ("0."), head ("1.") or both (""); tasks to come get the latest mask."""
        task = min(task, self._known(learner) - 1)
        masked = {}
        for i, (name, weight) in enumerate(self._weights(learner).items()):
            if name.startswith(part):
                learned = task < learner.tasks_learned
                mask = self.get_buffer(f"masks_{i}")[task] if learned else supermask(self.scores[i], self.density)
                masked[name[len(part) :]] = weight * mask
        return masked

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the features of each example in the subnetwork of its task (equation 1)."""
        return run_by_task(learner, learner.backbone, view, partial(self._subnetwork, learner, "0."))

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Return the logits of each example under the head's mask of its task, (B, C)."""
        return run_by_task(learner, learner.head, features, partial(self._subnetwork, learner, "1."))

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the logits under the given or inferred task; if it is inferred, other tasks' classes get 1e4 less."""
        if learner.scenario == "task" or self._known(learner) < 2:
            return learner(view)
        task = self.infer(learner, view)
        logits = learner(view, task)
        return torch.where(learner.membership[task], logits, logits - 1e4)

    @torch.no_grad()
    def infer(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the inferred task of each example, (B,) (equation 2)."""
        network = nn.Sequential(learner.backbone, learner.head)
        masked = [self._subnetwork(learner, "", task) for task in range(self._known(learner))]
        mean = {name: torch.stack([weights[name] for weights in masked]).mean(0) for name in masked[0]}

        seen = learner.seen.nonzero().flatten()

        def outputs(weights: dict[str, Tensor]) -> Tensor:
            return functional_call(network, weights, (view,))[:, seen].float()  # type: ignore[no-any-return]

        with sdpa_kernel(SDPBackend.MATH):  # forward derivatives support no other kernel of attention
            pairs = [jvp(outputs, (mean,), (weights,))[:2] for weights in masked]
        return entropy_slopes(pairs[0][0], torch.stack([change for _, change in pairs])).argmin(1)
