"""A strategy of Avalanche, on our data and in our R (Lomonaco et al. 2021, "Avalanche"; Carta et al. 2023).

After each task the strategy named trains backbone and head by its own loop: its plugins, its loader, its loss, one
optimizer for the whole stream, made as configured. It sees an experience a task, of normalised inputs, and the stream's
augmentation as its training transform. Lightning fits nothing, and we measure as always.

Differences from our own strategies: the loss is Avalanche's, by default the cross-entropy over all outputs of the head,
those of classes to come included; only where the run trains under the mask "task" are those of other tasks' classes
masked, as by Avalanche's multi-head classifier. A scheduler, precision and the training curves have no part: give
Avalanche's plugins. A method's own way of predicting has none either: R is measured on backbone and head.
Differences from Avalanche: every draw is a function of seed and task.
What a strategy remembers is in no checkpoint, so that a run stopped between tasks cannot be continued.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge

from cl.data.avalanche import drawing, preparation, quietly, take_back, to_experience, to_network
from cl.data.task import TaskData
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import DivergenceError, InputError
from cl.random import derive

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


class Avalanche(Strategy):
    """Hands each task to an Avalanche strategy.

    Args:
        path: Its class, to be imported.
        epochs: Passes over a task; None means the run's own.
        batch_size: Incoming rows a step; None means the run's own.
        options: Its other arguments, such as `mem_size` or `plugins`.

    Raises:
        InputError: If there is no such class, it does not take the options, it is not alone, the run asks for what its
            loop does not know, or a stopped run is continued.

    Example:
        >>> from cl.testing import toy_run
        >>> R = toy_run(Avalanche("avalanche.training.Replay", epochs=20, mem_size=50), lr=0.2).matrices["class"].R
        >>> bool(R[-1].mean() > 0.5)
        True
    """

    needs = ("boundaries",)
    distributed = False

    def __init__(
        self,
        path: str = "avalanche.training.Naive",
        epochs: Annotated[int, Ge(1)] | None = None,
        batch_size: Annotated[int, Ge(1)] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.path, self.epochs, self.batch_size, self.options = path, epochs, batch_size, options

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Build the strategy around the learner's backbone and head."""
        if len(learner.strategies) > 1:
            raise InputError(f"{self.path} trains by a loop of its own: drop the strategies beside strategy=avalanche.")
        self._classes, self._learned = [task.classes for task in stream], 0
        self._aware, self._prepare = learner.train_mask == "task", preparation(stream.normalize)
        self._augment, self._shuffle = stream.augment, stream.boundaries
        competing = learner.membership.clone() if self._aware else None
        with quietly(), drawing(derive(learner.seed, "avalanche")):
            from avalanche.training.plugins import EvaluationPlugin

            arguments = {
                "model": to_network(learner.backbone, learner.head, competing),
                "optimizer": learner.new_optimizer(learner.trunk().parameters()),
                "train_mb_size": self.batch_size or learner.batch_size,
                "evaluator": EvaluationPlugin(loggers=[]),
            }
            try:
                module, _, name = self.path.rpartition(".")
                kind = getattr(importlib.import_module(module), name)
                if "criterion" in inspect.signature(kind).parameters:  # some have no default, some none to choose
                    arguments["criterion"] = torch.nn.CrossEntropyLoss()
                self._inner: Any = kind(**{**arguments, **self.options})
            except (ImportError, AttributeError, ValueError, TypeError) as error:
                raise InputError(
                    f"{self.path} cannot be built ({error}): name a class of avalanche.training, and its arguments as "
                    "+strategy.avalanche.NAME=VALUE."
                ) from error

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Refuse what would be lost without a word."""
        if learner.tasks_learned != self._learned:
            raise InputError(
                f"What {self.path} remembered of the {learner.tasks_learned} tasks learned is in no checkpoint, and so "
                "the run cannot be continued: begin it anew in another hydra.run.dir."
            )
        asked = {
            "gradient_clip": learner.gradient_clip is not None,
            "trainer.accumulate_grad_batches": learner.accumulate > 1,
            "trainer.limit_train_batches": learner.limit != 1.0,
        }
        for name in (name for name, given in asked.items() if given):
            raise InputError(f"{self.path} trains by a loop of its own, which knows no {name}: drop it.")
        epochs = self.epochs or learner.epochs
        if not epochs:
            raise InputError(f"{self.path} is not told the run's epochs: say strategy.avalanche.epochs=5.")
        self._inner.train_epochs = epochs

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return nothing: Lightning has nothing to fit."""
        return task.train.take(task.train.labels[:0])

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Train on the task as an experience."""
        how = self._prepare, self._augment, learner.augment_random
        experience = to_experience(task.train, task.index, self._classes, self._aware, *how)
        self._inner.device = learner.device
        with quietly(), drawing(derive(learner.seed, "avalanche", task.index)):
            self._inner.train(experience, eval_streams=[], shuffle=self._shuffle)
        take_back(self._inner.model, learner.backbone, learner.head)
        if not all(bool(torch.isfinite(p).all()) for p in learner.trunk().parameters()):
            raise DivergenceError(f"Weights are not finite after task {task.index + 1}: lower the learning rate.")
        self._learned = task.index + 1
