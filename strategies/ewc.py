r"""Elastic Weight Consolidation (Kirkpatrick et al. 2017, equation 3).

After task k the diagonal Fisher information :math:`F_k` is measured at the optimum :math:`\theta^*_k`, and later

.. math:: L(\theta) = L_t(\theta) + \frac{\lambda}{2} \sum_{k<t} \sum_i F_{k,i} (\theta_i - \theta^*_{k,i})^2

Completing the square turns the sum over tasks into one quadratic of the same gradient, with :math:`F = \sum_k F_k`
and the anchor :math:`\bar\theta = \sum_k F_k \theta^*_k / F`, so the memory does not grow with the tasks.

Differences from the paper: the constant that this leaves out; and under SGD lambda F is cut at 1 / learning rate, where
a step on the penalty alone ends at the anchor. From 2 / learning rate on the weight would run away, and single entries
of F get there (Permuted-MNIST: infinite loss in task 3 at lambda = 1000, in task 8 at 50). `gamma` < 1 fades F, as in
online EWC (Schwarz et al. 2018, section 3.2), whose anchor is the last optimum.
Differences from reference code: the Fisher is the true one, of single examples: labels y are summed over the model's
own distribution (or drawn from it, or the data's). Avalanche and CLArena square the mean gradient of a batch, which is
smaller by about its size; Avalanche and Mammoth have no 1/2. So lambdas differ between libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD

from cl.errors import InputError, unknown
from cl.random import Random
from cl.strategy import Batch, Strategy

if TYPE_CHECKING:
    from cl.learner import Learner
    from cl.task import Stream, Task

FISHERS = ("true", "sampled", "empirical")
_HELD_AT_ONCE = 2**24  # numbers of gradients of single examples


def flat(tensors: list[Tensor]) -> Tensor:
    """Return tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def diagonal_fisher(module: nn.Module, x: Tensor, classes: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Return :math:`F_i = \mathbb{E}_x \sum_y w(y|x) (\partial \log p(y|x) / \partial \theta_i)^2` as one vector.

    Args:
        module: Inputs (B, ...) to logits (B, C); its trainable parameters are theta.
        x: Inputs (n, ...).
        classes: The classes that compete, (K,).
        weights: w(y|x), (n, K); None means the model's own p(y|x), which gives the true Fisher.

    Example:
        >>> w = nn.Linear(1, 2, bias=False)
        >>> _ = w.weight.data.copy_(torch.tensor([[0.0], [3.0]]).log().div(2).nan_to_num(neginf=0.0))
        >>> F = diagonal_fisher(w, torch.tensor([[2.0]]), torch.tensor([0, 1]))
        >>> [round(float(f), 4) for f in F]  # p = .75, so .75 * .25 * x^2
        [0.75, 0.75]
    """
    theta = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def log_p(theta: dict[str, Tensor], one: Tensor, y: Tensor) -> Tensor:
        log_probability = functional_call(module, theta, (one[None],))[0, classes].float().log_softmax(0)
        chosen: Tensor = log_probability.gather(0, y[None])[0]
        return chosen

    if weights is None:
        with torch.no_grad():
            weights = module(x)[:, classes].float().softmax(1)
    examples, labels = weights.nonzero(as_tuple=True)
    size = sum(p.numel() for p in theta.values())
    total = torch.zeros(size, device=x.device)
    chunk = max(1, _HELD_AT_ONCE // size)
    for e, y in zip(examples.split(chunk), labels.split(chunk), strict=True):
        with sdpa_kernel(SDPBackend.MATH):  # the attention that vmap can batch
            gradients = vmap(grad(log_p), in_dims=(None, 0, 0))(theta, x[e], y)
        total += flat([weights[e, y] @ g.reshape(len(e), -1).float().square() for g in gradients.values()])
    return total / len(x)


class EWC(Strategy):
    """Holds each weight near the old optima, as firmly as they need it.

    Args:
        weight: lambda.
        fisher: Labels in the Fisher: "true" (summed over p(y|x)), "sampled" (one drawn), "empirical" (the data's).
        num_samples: Training examples that it is measured on; None means all.
        gamma: Factor on the old F at each new task; 1 is EWC, less is online EWC.

    Raises:
        InputError: If the kind of Fisher is unknown, or another strategy owns `encode`, which F would not see.

    Example:
        >>> from cl.testing import check_strategy
        >>> check_strategy(EWC)
    """

    importance: Tensor
    anchor: Tensor
    strength: Tensor

    def __init__(
        self, weight: float = 100.0, fisher: str = "true", num_samples: int | None = 1000, gamma: float = 1.0
    ) -> None:
        super().__init__()
        if fisher not in FISHERS:
            raise unknown("kind of Fisher", fisher, FISHERS)
        self.weight, self.fisher, self.num_samples, self.gamma = weight, fisher, num_samples, gamma

    def setup(self, learner: Learner, stream: Stream) -> None:
        """Allocate F and the anchor as vectors."""
        if learner.strategies.owned("encode"):
            raise InputError("EWC measures backbone and head, but another strategy owns encode: drop one of the two.")
        size = sum(p.numel() for p in self._theta(learner))
        self.register_buffer("importance", torch.zeros(size))
        self.register_buffer("anchor", torch.zeros(size))
        self.register_buffer("strength", torch.zeros(size), persistent=False)
        self.random = Random()

    def before_task(self, learner: Learner, task: Task) -> None:
        """Weigh F, at most to where one step of SGD on the penalty alone ends at the anchor."""
        optimizer = learner.new_optimizer([nn.Parameter(torch.zeros(1))])
        limit = 1 / optimizer.param_groups[0]["lr"] if isinstance(optimizer, SGD) else torch.inf
        torch.clamp(self.weight * self.importance, max=limit, out=self.strength)

    def _theta(self, learner: Learner) -> list[nn.Parameter]:
        return [p for p in learner.trunk().parameters() if p.requires_grad]

    def loss(self, learner: Learner, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the penalty, from the second task on."""
        if learner.tasks_learned == 0:
            return None
        drift = flat(list(self._theta(learner))) - self.anchor
        return (self.strength * drift.square()).sum() / 2

    def after_task(self, learner: Learner, task: Task) -> None:
        """Measure the Fisher at the new optimum and fold it into F and the anchor."""
        module = nn.Sequential(learner.backbone, learner.head)
        data = task.train
        if self.num_samples is not None and self.num_samples < len(data):
            rows = self.random.generator.choice(len(data), self.num_samples, replace=False)
            data = data.take(torch.from_numpy(rows))
        x, y, _ = (column.to(learner.device) for column in data.tensors())
        view, classes = learner.prepare(x), learner.competing(task)
        with learner.evaluating():
            new = diagonal_fisher(module, view, classes, self._weights(module, view, y, classes))
        theta = flat([p.detach() for p in self._theta(learner)])
        old = self.gamma * self.importance
        mean = (old * self.anchor + new * theta) / (old + new).clamp_min(torch.finfo(new.dtype).tiny)
        self.anchor.copy_(mean if self.gamma == 1 else theta)  # where F is 0 it holds nothing
        self.importance.copy_(old + new)

    def _weights(self, module: nn.Module, view: Tensor, y: Tensor, classes: Tensor) -> Tensor | None:
        if self.fisher == "true":
            return None
        if self.fisher == "sampled":
            with torch.no_grad():
                p = module(view)[:, classes].softmax(1).cumsum(1)
            draw = torch.from_numpy(self.random.generator.random((len(view), 1))).to(p)
            y = classes[(p < draw).sum(1).clamp_max(len(classes) - 1)]
        return (y[:, None] == classes).float()
