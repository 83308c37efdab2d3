r"""Task-based Accumulated Gradients, an optimizer (TAG; Malviya, Ravindran and Chandar 2022, algorithm 1).

Adaptive optimizers divide a step by the root of a mean of squared gradients. TAG has one such mean :math:`V_\tau` for
each task :math:`\tau`, and weighs those of earlier tasks by how well the present direction of descent agrees with
theirs. Each tensor of weights is treated by itself. Let m be the running mean of gradients, and :math:`\hat m_\tau` the
unit vector in the direction of m at the end of the earlier task :math:`\tau`:

.. math:: \alpha_\tau = \exp\big(-b \langle m / \lVert m \rVert, \hat m_\tau \rangle\big), \qquad \alpha_t = \exp(-b)

.. math:: \theta \leftarrow \theta - \eta \, N \Big/
          \Big(\sqrt{\textstyle\sum_{\tau < t} \alpha_\tau V_\tau + \alpha_t V_t} + 10^{-8}\Big)

In the first task :math:`\alpha_t` = 1. Where an earlier task has pulled in the opposite direction, steps are shorter.
The forms are "rmsprop" (N = g, V a running mean with :math:`\beta_2` = 0.99), "adagrad" (N = g, V a sum) and "adam"
(N = m, V a running mean with :math:`\beta_2` = 0.999, both corrected for their bias).

The learning rate :math:`\eta` is that of the configured optimizer and follows its schedule; no other setting of that
optimizer is used.

Defaults: b = 5, as in the paper for most data sets. The paper's learning rate for "rmsprop" on CIFAR-100 is 0.00025, a
twentieth of that of its plain RMSProp; tune each for itself. These rates belong to the paper's network
(`backbone.block=half`) and to pixels in [0, 1]; its plain optimizers retain their state over all tasks.
Differences from the paper: none known.
Differences from the reference code: Adam's correction of the bias counts the steps of the task, in the code those of
the epoch. A direction of 0, as for outputs of another task, has an agreement of 0, where the code divides by 0.

State: V and the directions of all tasks, and m: (2 T + 1) |theta| numbers.
Scenarios: all. Refused: momentum or weight decay in the configured optimizer, strategies with trainable weights of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn
from torch.optim import Optimizer

from cl.engine.strategy import LearnerLike, OptimizerFactory, Strategy
from cl.errors import InputError, unknown

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

FORMS = ("rmsprop", "adam", "adagrad")


def unit(vector: Tensor) -> Tensor:
    """Return a vector scaled to length 1; a vector of 0 is returned unchanged."""
    shrunk: Tensor = vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
    return shrunk


def denominator(squares: Tensor, m: Tensor, directions: Tensor, b: float) -> Tensor:
    """Return the root of the sum of alpha V over the tasks, (n,), without the 1e-8.

    Args:
        squares: V of the earlier tasks and of the present one, (t + 1, n).
        m: Running mean of gradients, (n,).
        directions: Unit vectors of the earlier tasks, (t, n).
        b: Strength of the dependence on agreement.

    Example:
        >>> squares, same = torch.ones(2, 1), torch.ones(1)
        >>> [round(float(denominator(squares, sign * same, same[None], 5.0)), 4) for sign in (1, -1)]
        [0.1161, 12.1828]
    """
    if len(directions) == 0:
        return squares[0].sqrt()
    agreement = torch.cat([directions @ unit(m), m.new_ones(1)])
    mixed: Tensor = torch.exp(-b * agreement) @ squares
    return mixed.sqrt()


class Steps(Optimizer):
    """An optimizer that counts its steps and makes each by calling a function of the parameter group."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, update: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(parameters, {"lr": lr, "num_steps": 0})
        self._update = update

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["num_steps"] += 1
            self._update(group)
        return loss


class TAG(Strategy):
    """An adaptive optimizer that weighs the squared gradients of each task by their agreement with the present one.

    Args:
        form: "rmsprop", "adam" or "adagrad".
        b: Strength of the dependence on agreement.
        beta1: Decay of the running mean m.
        beta2: Decay of the running mean V; None means 0.99 for "rmsprop" and 0.999 for "adam".

    Raises:
        InputError: If the form is unknown, the configured optimizer has momentum or weight decay, which TAG ignores,
            or another strategy trains weights of its own.

    Example:
        >>> TAG(form="adam")
        TAG(form='adam', beta2=0.999)
    """

    targets = ("label", "multilabel", "regression")
    needs = ("boundaries",)
    momentum: Tensor
    squares: Tensor
    directions: Tensor

    def __init__(
        self,
        form: str = "rmsprop",
        b: Annotated[float, Ge(0)] = 5.0,
        beta1: Annotated[float, Interval(ge=0, le=1)] = 0.9,
        beta2: Annotated[float, Interval(ge=0, le=1)] | None = None,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise unknown("form of TAG", form, FORMS)
        self.form, self.b, self.beta1 = form, b, beta1
        self.beta2 = (0.999 if form == "adam" else 0.99) if beta2 is None else beta2

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate m, and for each task V and its direction."""
        group = learner.new_optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]
        for name in ("momentum", "weight_decay"):
            if group.get(name):
                raise InputError(
                    f"TAG takes only the learning rate of an optimizer, but this one has {name}={group[name]}: set "
                    f"optimizer.{name}=0."
                )
        size = sum(p.numel() for p in learner.trunk().parameters())
        self.register_buffer("momentum", torch.zeros(size))
        for name in ("squares", "directions"):
            self.register_buffer(name, torch.zeros(len(stream), size))

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Set the running mean to 0; refuse trainable weights of other strategies, which TAG would not update."""
        self.momentum.zero_()
        own = {id(p) for p in learner.trunk().parameters()}
        if any(p.requires_grad and id(p) not in own for p in learner.parameters()):
            raise InputError("TAG steps backbone and head, but another strategy trains weights of its own: drop it.")

    def _parts(self, learner: LearnerLike) -> list[tuple[nn.Parameter, slice]]:
        """Return each tensor of weights with its slice of the state vectors."""
        ends = torch.tensor([p.numel() for p in learner.trunk().parameters()]).cumsum(0).tolist()
        return [(p, slice(end - p.numel(), end)) for p, end in zip(learner.trunk().parameters(), ends, strict=True)]

    def configure_optimizer(self, learner: LearnerLike, factory: OptimizerFactory) -> Optimizer:
        """Return an optimizer with the configured learning rate that makes the steps of TAG for this task."""
        parts = self._parts(learner)
        lr = float(factory(p for p, _ in parts).param_groups[0]["lr"])
        return Steps((p for p, _ in parts), lr, partial(self._update, learner.task_index, parts))

    @torch.no_grad()
    def _update(self, task: int, parts: list[tuple[nn.Parameter, slice]], group: dict[str, Any]) -> None:
        adam = self.form == "adam"
        bias1, bias2 = ((1 - beta ** group["num_steps"]) if adam else 1.0 for beta in (self.beta1, self.beta2))
        for p, part in parts:
            if p.grad is None:
                continue
            g, V = p.grad.flatten(), self.squares[: task + 1, part]
            m = self.momentum[part].lerp_(g, 1 - self.beta1)
            V[task].mul_(1 if self.form == "adagrad" else self.beta2)
            V[task].addcmul_(g, g, value=1 if self.form == "adagrad" else 1 - self.beta2)
            D = denominator(V, m, self.directions[:task, part], self.b) / bias2**0.5 + 1e-8
            p.sub_(group["lr"] * ((m / bias1 if adam else g) / D).view_as(p))

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Store the direction of this task for each tensor of weights."""
        for _, part in self._parts(learner):
            self.directions[task.index, part] = unit(self.momentum[part])
