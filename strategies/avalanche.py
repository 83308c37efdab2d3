"""A strategy of Avalanche, on our data and in our R (Lomonaco et al. 2021, "Avalanche"; Carta et al. 2023).

Avalanche's strategy trains backbone and head by its own loop, with its plugins, its data loader, its loss and one
optimizer for the whole stream, built as configured. It gets each task as an experience of normalised inputs, with the
stream's augmentation as its training transform. Lightning trains nothing; R is measured as for every other strategy.

Differences from our own strategies: the loss is Avalanche's. By default it is the cross-entropy over all outputs of the
head, including those of classes to come; only if the run trains under the mask "task" are the outputs of other tasks
masked, as by Avalanche's multi-head classifier. The run's scheduler, precision and training curves are not used; use
plugins of Avalanche instead. A method's own rule of prediction is not used either: R is measured on backbone and head.
Differences from Avalanche: every random draw is a function of seed and task.
No checkpoint contains what Avalanche's strategy stores, so a run that was stopped between tasks cannot be continued.
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
    """Lets a strategy of Avalanche train on each task.

    Args:
        path: Import path of the class of Avalanche's strategy.
        epochs: Passes over a task; None means the `epochs` of the run.
        batch_size: Incoming examples per step; None means the `batch_size` of the run.
        options: Other arguments of that class, such as `mem_size` or `plugins`.

    Raises:
        InputError: If there is no such class, the class does not take the options, there are other strategies in the
            run, the run has a setting that Avalanche's loop cannot follow, or a stopped run is continued.

    Example:
        >>> from cl.testing import toy_run
        >>> R = toy_run(Avalanche("avalanche.training.Replay", epochs=20, mem_size=50), lr=0.2).matrices["class"].R
        >>> bool(R[-1].mean() > 0.5)
        True
    """

    needs = ("boundaries",)
    needs_inputs = True
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
        """Instantiate Avalanche's strategy with the learner's backbone and head as its model."""
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
                if "criterion" in inspect.signature(kind).parameters:  # required by some classes, unknown to others
                    arguments["criterion"] = torch.nn.CrossEntropyLoss()
                self._inner: Any = kind(**{**arguments, **self.options})
            except (ImportError, AttributeError, ValueError, TypeError) as error:
                raise InputError(
                    f"{self.path} cannot be built ({error}): name a class of avalanche.training, and its arguments as "
                    "+strategy.avalanche.NAME=VALUE."
                ) from error

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Refuse to continue a stopped run, and settings that Avalanche's loop would ignore."""
        if learner.tasks_learned != self._learned:
            raise InputError(
                f"No checkpoint contains what {self.path} stored in the {learner.tasks_learned} tasks learned, so the "
                "run cannot be continued: start it again in another hydra.run.dir."
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
            raise InputError(f"{self.path} needs a number of epochs: set strategy.avalanche.epochs=5.")
        self._inner.train_epochs = epochs

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return an empty data set, so that Lightning trains nothing."""
        return task.train.take(task.train.labels[:0])

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Train Avalanche's strategy on the task, and copy the weights back to the learner."""
        how = self._prepare, self._augment, learner.augment_random
        experience = to_experience(task.train, task.index, self._classes, self._aware, *how)
        self._inner.device = learner.device
        with quietly(), drawing(derive(learner.seed, "avalanche", task.index)):
            self._inner.train(experience, eval_streams=[], shuffle=self._shuffle)
        take_back(self._inner.model, learner.backbone, learner.head)
        if not all(bool(torch.isfinite(p).all()) for p in learner.trunk().parameters()):
            raise DivergenceError(f"Weights are not finite after task {task.index + 1}: lower the learning rate.")
        self._learned = task.index + 1
