r"""Hard Attention to the Task (Serrà et al. 2018, section 2).

Each unit (a channel, in a convolution) of each layer l has a learned embedding :math:`e_l^t` for each task t, and is
gated by

.. math:: a_l^t = \sigma(s \, e_l^t) \tag{1}

where s rises in each epoch, over its B batches b, from nearly linear gates to nearly binary ones; at test it is
:math:`s_{max}`:

.. math:: s = \frac1{s_{max}} + \Big(s_{max} - \frac1{s_{max}}\Big) \frac{b - 1}{B - 1} \tag{3}

What old tasks use, :math:`A_l = \max_{i < t} a_l^i`, holds the weights between two used units:

.. math:: g_{l,ij} \leftarrow \big(1 - \min(A_{l,i}, A_{l-1,j})\big) \, g_{l,ij} \tag{2}

The gradient of e is made independent of s, with s e within +-50, and e kept within +-6; and gates are kept few by
c times the share of the free units that the task uses:

.. math:: q_e \leftarrow \frac{s_{max} (\cosh(s e) + 1)}{s \, (\cosh(e) + 1)} \, q_e \tag{5}
.. math:: R = \frac{\sum_{l,i} a_{l,i} (1 - A_{l,i})}{\sum_{l,i} (1 - A_{l,i})} \tag{6}

The bound: a weight between units of old tasks takes 1 - min(A) of its step. Where s_max |e| > 17 that is 0 or 1 in
float32, and old logits stay but for rounding; gates in between let them drift.

State: an embedding a unit and task, and A. Outputs belong to the task of their classes. Scenario: task-incremental.
Refused: norms, whose scale would undo a gate's; paths past a layer; optimizers but plain SGD; classes in several tasks.

Differences from the paper: in training, features behind a gate below 1e-12 are scaled by 1e-12; its gradient is kept.
Differences from the reference code: s is s_max in an epoch's last batch (equation 3), in the code it stops short of it.
A gate is before the activation, there behind it, the same with ReLU and max-pooling; dropout, where the backbone has
it, comes after, not before. Embeddings are drawn from a normal distribution, as there.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.by_task import rows_by_task
from cl.toolkit.isolation import by_row, chained_layers, check_isolation, keep_outputs, silence_others
from cl.toolkit.subspace import check_plain_sgd

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

CLOSED = 1e-12


def annealed(s_max: float, batch: int, num_batches: int) -> float:
    """Return s at a batch of an epoch, counted from 0 (equation 3).

    Example:
        >>> round(annealed(400, 4, 10), 3), annealed(400, 9, 10)
        (177.779, 400.0)
    """
    return 1 / s_max + (s_max - 1 / s_max) * batch / max(num_batches - 1, 1)


def compensation(e: Tensor, s: float, s_max: float) -> Tensor:
    """Return what the gradient of an embedding is multiplied with (equation 5).

    Example:
        >>> compensation(torch.tensor([0.5]), 2.0, 400.0)
        tensor([239.0534])
    """
    return s_max / s * (torch.cosh((s * e).clamp(-50, 50)) + 1) / (torch.cosh(e) + 1)


def new_share(a: Tensor, used: Tensor) -> Tensor:
    """Return the share of the free units that gates open, a scalar (equation 6).

    Example:
        >>> new_share(torch.ones(3), torch.tensor([1.0, 0.0, 0.5]))
        tensor(1.)
    """
    free = 1 - used
    return (a * free).sum() / free.sum().clamp_min(1e-12)


def _gate(a: Tensor, layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
    if a.requires_grad:  # products of closed gates, below 1e-38, take a CPU as long as the rest of a step
        a = a + (CLOSED - a).clamp_min(0).detach()
    return outputs * by_row(a, outputs[0])


class HAT(Strategy):
    """Learns for each task which units it uses, and holds what lies between units of old tasks.

    Args:
        weight: c.
        s_max: The steepness of gates at test.

    Raises:
        InputError: If the scenario is not task-incremental, or old answers could not be kept; see above.

    Example:
        >>> HAT(weight=1.5)
        HAT(weight=1.5)
    """

    scenarios = ("task",)
    needs = ("boundaries", "sgd")
    uses_task = True
    used: Tensor

    def __init__(self, weight: Annotated[float, Ge(0)] = 0.75, s_max: Annotated[float, Ge(1)] = 400.0) -> None:
        super().__init__()
        self.weight, self.s_max = weight, s_max

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate embeddings and A; refuse what gates do not isolate."""
        check_isolation(self, learner, stream)
        check_plain_sgd(learner, "HAT")
        with learner.evaluating():
            layers = chained_layers(learner.backbone, stream.input_shape)
        self._names, self._sizes = list(layers), [len(layer.weight) for layer in layers.values()]
        self.embedding = nn.Parameter(torch.randn(len(stream), sum(self._sizes)))
        self.register_buffer("used", torch.zeros(sum(self._sizes)))

    def _steepness(self, learner: LearnerLike, task: int) -> float:
        if not learner.backbone.training or task != learner.task_index:
            return self.s_max
        steps, group = max(learner.steps_per_epoch, 1), learner.accumulate  # one s for what makes one update
        return annealed(self.s_max, learner.step % steps // group, -(-steps // group))

    def _gates(self, learner: LearnerLike, task: int) -> Tensor:
        return torch.sigmoid(self._steepness(learner, task) * self.embedding[task])

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return each row's features behind the gates of its task."""
        if learner.backbone.training:
            with torch.no_grad():
                self.embedding.clamp_(-6, 6)

        def gated(rows: Tensor, task: int) -> Tensor:
            gates = self._gates(learner, task).split(self._sizes)
            with ExitStack() as hooks:
                for name, a in zip(self._names, gates, strict=True):
                    layer = learner.backbone.get_submodule(name)
                    hooks.callback(layer.register_forward_hook(partial(_gate, a)).remove)
                return learner.backbone(rows)  # type: ignore[no-any-return]

        return rows_by_task(learner, view, gated)

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the price of the units that the task is the first to use."""
        return self.weight * new_share(self._gates(learner, learner.task_index), self.used)

    def project_gradients(self, learner: LearnerLike) -> None:
        """Hold what old tasks use (equation 2); compensate the embedding's gradient (equation 5)."""
        layers = [learner.backbone.get_submodule(name) for name in self._names]
        inputs: Tensor | None = None
        for layer, outputs in zip(layers, self.used.split(self._sizes), strict=True):
            for parameter in layer.parameters():
                if parameter.grad is not None:
                    both = by_row(outputs, parameter)
                    if inputs is not None and parameter.ndim > 1:
                        columns = inputs.repeat_interleave(parameter.shape[1] // len(inputs))
                        both = torch.minimum(both, by_row(columns, parameter[0]))
                    parameter.grad *= 1 - both
            inputs = outputs
        silence_others(learner, [parameter for layer in layers for parameter in layer.parameters()])
        keep_outputs(learner)
        task = learner.task_index
        if self.embedding.grad is not None:
            own = self.embedding.grad[task].clone()
            own *= compensation(self.embedding.detach()[task], self._steepness(learner, task), self.s_max)
            self.embedding.grad.zero_()
            self.embedding.grad[task] = own

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add the units that the task uses."""
        self.used.copy_(torch.maximum(self.used, torch.sigmoid(self.s_max * self.embedding[task.index])))
