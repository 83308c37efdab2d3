r"""Hard Attention to the Task (Serrà et al. 2018, section 2).

Each unit (in a convolution, each channel) of each layer l has a learned embedding :math:`e_l^t` for each task t. The
unit's output is multiplied by a gate

.. math:: a_l^t = \sigma(s \, e_l^t) \tag{1}

In each epoch s rises over the batches b = 1..B, so that the gates change from nearly linear to nearly binary; at test
s is :math:`s_{max}`:

.. math:: s = \frac1{s_{max}} + \Big(s_{max} - \frac1{s_{max}}\Big) \frac{b - 1}{B - 1} \tag{3}

The units that old tasks use, :math:`A_l = \max_{i < t} a_l^i`, protect the weights between two of them:

.. math:: g_{l,ij} \leftarrow \big(1 - \min(A_{l,i}, A_{l-1,j})\big) \, g_{l,ij} \tag{2}

The gradient :math:`q_e` of e is multiplied by a factor that makes it independent of s, where s e is clamped to +-50 and
e to +-6. A loss term c R limits the share of the free units that the task uses:

.. math:: q_e \leftarrow \frac{s_{max} (\cosh(s e) + 1)}{s \, (\cosh(e) + 1)} \, q_e \tag{5}
.. math:: R = \frac{\sum_{l,i} a_{l,i} (1 - A_{l,i})}{\sum_{l,i} (1 - A_{l,i})} \tag{6}

How far old tasks are protected: a weight between units of old tasks moves by 1 - min(A) of its step. Where
:math:`s_{max} |e| > 17` that is 0 or 1 in float32, and old logits do not change but for rounding; gates in between let
them drift.

Defaults: c = 0.75 and :math:`s_{max}` = 400 are the paper's.
Differences from the paper: in training, features behind a gate below 1e-12 are multiplied by 1e-12 instead, while the
gradient of the gate is unchanged.
Differences from the reference code: s reaches :math:`s_{max}` in the last batch of an epoch, as equation 3 says; in the
code it does not. A gate is applied before the activation, in the code behind it, which is the same for ReLU and
max-pooling; dropout, if the backbone has it, follows the gate instead of preceding it. Embeddings are drawn from a
normal distribution, as in the code.

State: an embedding for each unit and task, and A. Outputs belong to the task of their classes. Scenarios:
task-incremental. Refused: norms, which would undo the scale of a gate; connections that skip a layer; optimizers other
than plain SGD; classes that occur in several tasks.
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
    """Return s for a batch of an epoch, where batches are counted from 0 (equation 3).

    Example:
        >>> round(annealed(400, 4, 10), 3), annealed(400, 9, 10)
        (177.779, 400.0)
    """
    return 1 / s_max + (s_max - 1 / s_max) * batch / max(num_batches - 1, 1)


def compensation(e: Tensor, s: float, s_max: float) -> Tensor:
    """Return the factor by which the gradient of the embeddings e is multiplied (equation 5).

    Example:
        >>> compensation(torch.tensor([0.5]), 2.0, 400.0)
        tensor([239.0534])
    """
    return s_max / s * (torch.cosh((s * e).clamp(-50, 50)) + 1) / (torch.cosh(e) + 1)


def new_share(a: Tensor, used: Tensor) -> Tensor:
    """Return the share of the free units that the gates a open, a scalar (equation 6).

    Example:
        >>> new_share(torch.ones(3), torch.tensor([1.0, 0.0, 0.5]))
        tensor(1.)
    """
    free = 1 - used
    return (a * free).sum() / free.sum().clamp_min(1e-12)


def _gate(a: Tensor, layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
    if a.requires_grad:  # avoids products below 1e-38, on which CPUs are slow
        a = a + (CLOSED - a).clamp_min(0).detach()
    return outputs * by_row(a, outputs[0])


class HAT(Strategy):
    """Learns gates that choose the units of each task, and protects the weights between units of old tasks.

    Args:
        weight: c, the weight of the loss term for units in use.
        s_max: Steepness s of the gates at test.

    Raises:
        InputError: If the scenario is not task-incremental, or old outputs could change (see what the header refuses).

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
        """Allocate embeddings and A; refuse backbones and settings that gates cannot protect."""
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
        steps, group = max(learner.steps_per_epoch, 1), learner.accumulate  # minibatches of one update share one s
        return annealed(self.s_max, learner.step % steps // group, -(-steps // group))

    def _gates(self, learner: LearnerLike, task: int) -> Tensor:
        return torch.sigmoid(self._steepness(learner, task) * self.embedding[task])

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the features of each example, computed with the gates of its task, (B, D)."""
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
        """Return c R, the penalty on units that no earlier task uses (equation 6)."""
        return self.weight * new_share(self._gates(learner, learner.task_index), self.used)

    def project_gradients(self, learner: LearnerLike) -> None:
        """Scale the gradient of weights by (2) and that of the embeddings by (5)."""
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
        """Add the units that the task uses to A."""
        self.used.copy_(torch.maximum(self.used, torch.sigmoid(self.s_max * self.embedding[task.index])))
