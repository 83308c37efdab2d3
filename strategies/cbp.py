r"""Continual backprop (CBP; Dohare et al. 2024, Nature, "Loss of plasticity in deep continual learning", algorithm 1).

A network that learns task after task slowly loses the ability to learn. CBP keeps it by generate and test: a small part
of the hidden units with the lowest utility start anew. The utility of unit i of a layer is a running mean of what it
contributes to the next layer, with its activation h and its outgoing weights w:

.. math:: u_i \leftarrow \eta u_i + (1 - \eta) \, \overline{|h_i|} \sum_k |w_{ik}|, \qquad
          \hat u_i = u_i / (1 - \eta^{a_i})

where the bar is the mean over a minibatch, and over positions for a channel, and :math:`a_i` the steps since the unit
was started. Each step adds :math:`\rho` times the number of units with :math:`a_i > m` to a count, for each layer; as
often as the count reaches 1, the unit with the lowest :math:`\hat u` of these is replaced: its incoming weights are
drawn anew, its outgoing weights, bias, utility and age are set to 0. So the new unit changes no output at first, and it
is safe from being replaced for m steps.

CBP is about learning new tasks, not about remembering old ones: it is to be combined with a method against forgetting
(`strategy=[er,cbp]`). `instrument=dormant` counts units that hardly react.

Published: on Continual ImageNet (tasks of two classes, a network of three convolutions), backprop falls from 89 % on an
early task to 77 % on task 2000, about the level of a linear network, while CBP appears to stay where it begins (from
the abstract of the preprint, "Maintaining plasticity in deep continual learning", arXiv 2306.13812).

Defaults: rho = 1e-4 and eta = 0.99 are those of the released code's class, m = 100 is that of its Continual ImageNet,
where rho = 3e-4.
Differences from the paper: activations are those of the incoming examples in evaluation mode, after the step.
Differences from the reference code: its sum of outgoing weights is a mean, which ranks alike; it adds what a replaced
unit contributed on average to the biases of the next layer; it clears Adam's moments of the replaced weights, which
stay here; with `accumulate=false` it draws a unit with the probability of a count below 1.

State: utility and age of each unit, and a count for each layer. A step costs one more forward pass. Scenarios: all.
Refused: backbones with shortcuts, whose layers do not feed the next one alone; several processes; another strategy that
owns `encode`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.random import Random
from cl.toolkit.layers import trainable_layers
from cl.toolkit.units import activities, check_chain, outgoing, start_anew, units_of
from cl.toolkit.weights import check_encode

if TYPE_CHECKING:
    from cl.data.task import Stream


class CBP(Strategy):
    """Starts the hidden units of lowest utility anew, a few at a time.

    Args:
        rate: rho, the share of the mature units that is replaced per step.
        decay: eta, the part of the running mean that stays in a step.
        maturity: m, steps for which a new unit is not replaced.

    Raises:
        InputError: If there is no hidden layer, layers do not feed the next one alone, or another strategy owns
            `encode`.

    Example:
        >>> CBP(rate=1e-3)
        CBP(rate=0.001)
    """

    targets = ("label", "multilabel", "regression")
    distributed = False  # a process without examples in a step would not know the utility
    due: Tensor

    def __init__(
        self,
        rate: Annotated[float, Interval(ge=0, le=1)] = 1e-4,
        decay: Annotated[float, Interval(ge=0, lt=1)] = 0.99,
        maturity: Annotated[int, Ge(0)] = 100,
    ) -> None:
        super().__init__()
        self.rate, self.decay, self.maturity = rate, decay, maturity

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate utility and age of each unit, and a count for each layer."""
        check_encode("CBP", learner)
        x = stream[0].train.take(torch.arange(2)).tensors()[0].to(learner.device)
        layers = check_chain("CBP", learner, learner.prepare(x))
        for number, layer in enumerate(layers[:-1]):
            self.register_buffer(f"utility_{number}", torch.zeros(units_of(layer)))
            self.register_buffer(f"age_{number}", torch.zeros(units_of(layer), dtype=torch.int64))
        self.register_buffer("due", torch.zeros(len(layers) - 1))
        self.random = Random()

    @torch.no_grad()
    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Update the utilities, and replace the units that are due."""
        if not self.rate:
            return
        layers = trainable_layers(learner.trunk())
        with learner.evaluating():
            active = activities(layers, lambda: learner.head(learner.backbone(batch.view)))
        replaced = 0
        for number, (layer, following) in enumerate(pairwise(layers)):
            utility, age = getattr(self, f"utility_{number}"), getattr(self, f"age_{number}")
            age += 1
            contribution = active[number] * outgoing(following, units_of(layer))
            utility.lerp_(contribution.to(utility), 1 - self.decay)
            mature = age > self.maturity
            self.due[number] += self.rate * mature.sum()
            size = min(int(self.due[number]), int(mature.sum()))
            if size:
                corrected = utility / (1 - self.decay**age)
                units = corrected.masked_fill(~mature, torch.inf).argsort(stable=True)[:size]
                start_anew(layer, following, units, self.random)
                utility[units], age[units] = 0, 0
                self.due[number] -= size
                replaced += size
        learner.record("replaced_units", replaced)
