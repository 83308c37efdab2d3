r"""Deep generative replay (Shin et al. 2017, NeurIPS, section 3), with a variational autoencoder as the generator.

Nothing of earlier tasks is stored. When a task ends, a generator G learns to draw inputs of all tasks so far, and the
learner is copied. In task t each step trains on the incoming examples B, and on as many inputs x' that G draws, with
the labels that the copy :math:`\bar f` gives them:

.. math:: L = r \, \mathrm{CE}(f(B), y) + (1 - r) \, \mathbb{E}_{x' \sim G} \, \mathrm{CE}(f(x'), \bar f(x')), \qquad
          r = 1/t

With `labels="hard"` (the paper) the label is the most probable class of the copy; with `labels="soft"` the second term
is a distillation at temperature T, times :math:`T^2`, in which new classes have the probability 0 (van de Ven and
Tolias 2018, "Generative replay with feedback connections"). G is trained on its own, on r parts of inputs of the task
and 1 - r parts of inputs that the G before draws (see `cl.toolkit.vae.VAE` for its loss).

Published, quoted from memory: 90.79 % on Split-MNIST (class-incremental, 5 tasks of 2000 steps of 128, two layers of
400 units, Adam with rate 1e-3; 91.79 % with soft labels; van de Ven and Tolias 2019, "Three scenarios for continual
learning"). Avalanche's reproductions (github.com/ContinualAI/continual-learning-baselines) list 75 %.

Defaults: the autoencoder and its training are those of van de Ven and Tolias: 400 units, codes of 100, 2000 steps of
128 inputs with Adam and a rate of 1e-3; T = 2.
Differences from the paper: the generator is a VAE instead of a WGAN-GP, for which the paper allows. Its inputs are the
normalised ones, on which a Gaussian of variance 1 is assumed. r is 1/t, where the paper leaves it open.
Differences from the reference code: the authors released none. Van de Ven and Tolias train generator and learner at the
same time, on the same minibatches, with a Bernoulli likelihood of pixels.

State: the generator, with d x 400 weights at either end for inputs of d numbers; a copy of backbone and head; the copy
of the generator exists while a task ends. Scenarios: class, domain. Refused: targets other than single labels, another
strategy that owns `encode` or `criterion`.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import unknown
from cl.random import Random
from cl.toolkit.teacher import Teacher
from cl.toolkit.vae import VAE

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

LABELS = ("hard", "soft")


class GenerativeReplay(Strategy):
    """Trains on inputs that a generator draws, with the labels of the last task's learner.

    Args:
        labels: "hard", the most probable class, or "soft", all probabilities at a temperature.
        temperature: T of soft labels.
        hidden: Units of each hidden layer of the generator.
        code: Size of the generator's codes.
        iterations: Steps of the generator's training when a task ends.
        generator_batch: Inputs of each of these steps.
        generator_lr: Learning rate of Adam in these steps.

    Raises:
        InputError: If the kind of labels is unknown, or another strategy implements `encode`.

    Example:
        >>> GenerativeReplay(labels="soft")
        GenerativeReplay(labels='soft')
    """

    scenarios = ("class", "domain")
    needs = ("boundaries",)
    needs_inputs = True

    def __init__(
        self,
        labels: str = "hard",
        temperature: Annotated[float, Gt(0)] = 2.0,
        hidden: Annotated[int, Ge(1)] = 400,
        code: Annotated[int, Ge(1)] = 100,
        iterations: Annotated[int, Ge(1)] = 2000,
        generator_batch: Annotated[int, Ge(1)] = 128,
        generator_lr: Annotated[float, Gt(0)] = 1e-3,
    ) -> None:
        super().__init__()
        if labels not in LABELS:
            raise unknown("kind of labels", labels, LABELS)
        self.labels, self.temperature, self.hidden, self.code = labels, temperature, hidden, code
        self.iterations, self.generator_batch, self.generator_lr = iterations, generator_batch, generator_lr

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the generator and the copy of the learner."""
        self.teacher = Teacher(learner, "GenerativeReplay")
        self.generator = VAE(stream.input_shape, self.hidden, self.code).requires_grad_(False)
        self.random = Random(by_rank=True)

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Copy the learner, and note the classes of earlier tasks."""
        self.teacher.copy_from(learner)
        self._old = learner.seen.nonzero().flatten()

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the cross-entropy of the batch, times the share r of the present task, a scalar."""
        return learner.criterion(logits, batch) / (learner.tasks_learned + 1)

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return the weighted loss of generated inputs, a scalar, or None in the first task."""
        if learner.tasks_learned == 0:
            return None
        with torch.no_grad():
            x = self.generator.sample(batch.num_incoming, self.random)
            taught = self.teacher(x)[:, self._old]
        task = torch.full((len(x),), learner.task_index, device=x.device)
        again = learner(x, task)
        if self.labels == "soft":
            T = self.temperature
            log_p = (learner.mask(again, task, learner.train_mask) / T).log_softmax(1)[:, self._old]
            value: Tensor = -(T**2) * ((taught / T).softmax(1) * log_p).sum(1).mean()
        else:
            value = learner.criterion(again, Batch(x, self._old[taught.argmax(1)], task))
        return (1 - 1 / (learner.tasks_learned + 1)) * value

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Train the generator on inputs of the task and of the generator before."""
        before = deepcopy(self.generator)
        self.generator.fit(self._inputs(learner, task, before), self.generator_lr, self.random)

    def _inputs(self, learner: LearnerLike, task: Task, before: VAE) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs of the task, then as many generated ones after the first task, and their weights."""
        size, r = self.generator_batch, 1 / (learner.tasks_learned + 1)
        for _ in range(self.iterations):
            rows = torch.from_numpy(self.random.generator.integers(len(task.train), size=size))
            x = learner.prepare(task.train.take(rows).tensors()[0].to(learner.device))
            weight = torch.full((size,), r / size, device=x.device)
            if learner.tasks_learned:
                x = torch.cat([x, before.sample(size, self.random)])
                weight = torch.cat([weight, torch.full_like(weight, (1 - r) / size)])
            yield x, weight
