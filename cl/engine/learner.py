"""`Learner`: backbone, head and strategies as one Lightning module, which calls the strategies' hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cl import distributed
from cl.data.augment import to_floats
from cl.data.target import classes_of
from cl.data.task import SCENARIOS, Scenario, Stream, Task, TaskData, shard
from cl.engine.batch import Batch
from cl.engine.closure import Step, loss_again
from cl.engine.fast_path import is_plain
from cl.engine.finite import check_losses
from cl.engine.head import Mask, competing
from cl.engine.loader import TrainLoader, evaluation
from cl.engine.loss_curves import Curves
from cl.engine.network import BackboneFactory, HeadFactory, compile_by, evaluating, network
from cl.engine.optimizer_state import Carried, restart
from cl.engine.preflight import check_hidden, check_rows
from cl.engine.schedules import SchedulerFactory, known_interval, schedule_of, updates
from cl.engine.score import calibrations, matrices, start
from cl.engine.strategy import Composition, OptimizerFactory, Strategy
from cl.engine.update import train_on
from cl.errors import InputError
from cl.random import Random, derive
from cl.ranges import checked


@checked
class Learner(pl.LightningModule):
    """A backbone and a head over all classes that learn a stream under some strategies.

    Args:
        stream: The stream to learn, which gives every shape before training.
        backbone: A module (B, *input) -> (B, num_features) with the attribute `num_features`; or a factory that builds
            one from the shape of an input, such as `MLP`, with weights drawn from the seed.
        strategies: By name, in the order in which batches and gradients chain; empty means fine-tuning.
        optimizer: Builds an optimizer from parameters; called once per task.
        scheduler: Builds a learning-rate schedule from an optimizer, or None. If its length is left open, it is filled
            in, see `cl.engine.schedules.make_schedule`.
        head: A module from features to logits (B, C), or a factory that builds one from the numbers of features and
            classes; None means `Head`.
        batch_size: Incoming examples per step.
        eval_batch_size: Examples of an evaluation batch; None means 256 on a CPU and 1024 elsewhere.
        chunk_size: Steps that Lightning sees as one batch; None lets it grow while a chunk takes less than a tenth of
            a second, up to 64. Results do not depend on it.
        gradient_clip: Largest norm of the gradient, or None.
        train_mask: Classes that compete in the loss: "class" (all seen so far), "task" (those of the example's task),
            "domain" (all); None means the same as at test.
        optimizer_state: Whether, at a boundary between tasks, the new optimizer starts without state ("reset") or with
            the state of the last one ("keep"). Without boundaries, optimizer and schedule continue.
        scheduler_interval: Whether the schedule moves after each "epoch" or each optimizer "step".
        log_every: Steps between two points of the training curves; a point is the mean since the last one.
        updates_per_batch: Updates of the weights on each incoming minibatch, each with newly drawn replayed examples;
            None means 1.
        seed: Seed of every draw. A backbone or head that is given as a module keeps its weights.

    Raises:
        InputError: If the backbone has no `num_features`, two strategies define the same hook with one owner, or a
            strategy refuses the run.

    Example:
        >>> from functools import partial
        >>> from cl.data.task import Task, TaskData
        >>> data = TaskData(torch.randn(8, 3), torch.arange(8) % 2)
        >>> from cl.backbones.networks import MLP
        >>> stream = Stream([Task(0, data, data)], num_classes=2)
        >>> learner = Learner(stream, MLP, {}, partial(torch.optim.SGD, lr=0.1), seed=1)
        >>> learner(torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """

    seen: Tensor
    membership: Tensor
    batch_size: int
    eval_batch_size: int | None
    chunk_size: int | None
    _schedule: LRScheduler | None = None

    def __init__(
        self,
        stream: Stream,
        backbone: nn.Module | BackboneFactory,
        strategies: Mapping[str, Strategy],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        head: nn.Module | HeadFactory | None = None,
        batch_size: Annotated[int, Ge(1)] = 32,
        eval_batch_size: Annotated[int, Ge(1)] | None = None,
        chunk_size: Annotated[int, Ge(1)] | None = None,
        gradient_clip: Annotated[float, Gt(0)] | None = None,
        train_mask: Scenario | None = None,
        optimizer_state: str = "reset",
        scheduler_interval: str = "epoch",
        log_every: Annotated[int, Ge(1)] = 50,
        updates_per_batch: Annotated[int, Ge(1)] | None = None,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__()
        stream.check()
        self.batch_size, self.eval_batch_size, self.chunk_size = batch_size, eval_batch_size, chunk_size
        self.log_every, self.updates_per_batch = log_every, updates_per_batch
        self.updates = updates_per_batch or 1
        if train_mask not in (None, *SCENARIOS):
            raise InputError(f"train_mask={train_mask!r} is unknown: use one of {', '.join(SCENARIOS)}, or null.")
        self.automatic_optimization = False
        self.backbone, self.head = network(stream, backbone, head, seed)
        # A stack of convolutions is faster on channels-last images, by a third on a CPU; a patch embedding is not.
        self._convolves = sum(isinstance(module, nn.Conv2d) for module in self.backbone.modules()) > 1
        # Under __dict__, so that the parameters are not registered twice.
        self.__dict__["_trunk"] = nn.ModuleDict({"backbone": self.backbone, "head": self.head})
        self.scenario: Scenario = stream.scenario
        self.train_mask = train_mask or stream.scenario
        self.gradient_clip, self.seed = gradient_clip, seed
        self.augment, self.shuffle = stream.augment, stream.boundaries
        self.normalize = stream.normalize if not getattr(self.backbone, "normalizes", False) else None
        self._optimizer, self._scheduler, self.augment_random = optimizer, scheduler, Random(by_rank=True)
        self._carried = Carried(optimizer_state, stream.boundaries)
        self.scheduler_interval = known_interval(scheduler_interval)
        self._allocate(stream)

        self._start_counting(stream[0], log_every)
        self.strategies = Composition(strategies)
        self._chains, self._owners = self.strategies.chains, self.strategies.owners
        self.closes = any(strategy.uses_closure for strategy in strategies.values())
        check_hidden(stream, strategies)
        self.strategies.setup(self, stream.without_hidden_labels())

    def _start_counting(self, first: Task, log_every: int) -> None:
        """Set what changes from step to step to what it is before the first one."""
        self.task: Task = first
        self.tasks_learned = 0
        self.step = self.total_steps = 0  # within the task, and over the stream
        self.update_index = 0  # of the update among those on the present minibatch
        self.more_epochs = 0  # epochs of each task that strategies have added to the configured ones
        self.restarted_at = 0  # the step of the task at which the optimizer was last restarted; 0: it was not
        self.truth: Tensor | None = None  # the labels (n,) of a task that hides them, for instruments
        self.rows, self.summed = 0, 0.0  # examples: of the minibatch; of the update, in units of batch_size
        self.last_loss: Tensor | None = None
        self._data: TaskData | None = None
        self.task_labels: Tensor | None = None  # of the examples in `encode`, (B,); None: the present task, or unknown
        self.told: Tensor | None = None  # the task labels that a prediction is given, (B,)
        self._curves, self.in_step = Curves(log_every), False
        self.accumulate, self.limit = 1, 1.0
        self.looks: dict[int, list[Callable[[Learner], None]]] = {}  # measurements, by the step before which they run
        self.before_step: list[Callable[[Learner, Batch], None]] = []  # measurements before every step
        self.plain = self.compiled = False
        self.present: Step | None = None  # the present step, for a strategy that computes its loss again

    def _allocate(self, stream: Stream) -> None:
        """Allocate what depends on the number of tasks: the membership of classes, the masks, R by mask and metric."""
        self.num_tasks, self.num_classes, self.target = len(stream), stream.num_classes, stream.target
        self._rows = [len(task.train) for task in stream]
        membership = torch.zeros(self.num_tasks, self.num_classes, dtype=torch.bool)
        for task in stream:
            membership[task.index, slice(None) if self.target.name == "regression" else list(task.classes)] = True
        self.register_buffer("membership", membership, persistent=False)
        self.mixed = any(bool((task.train.tasks != task.index).any()) for task in stream)  # tasks blend
        self.shared_outputs = bool((membership.sum(0) > 1).any())  # whether tasks have classes in common
        self.register_buffer("seen", torch.zeros(self.num_classes, dtype=torch.bool))
        self.masks = nn.ModuleDict({name: Mask(self.num_tasks, self.num_classes) for name in SCENARIOS})
        self.matrices, self.calibration = matrices(stream), calibrations(stream)
        self._update_masks()

    def __repr__(self) -> str:
        parts = " + ".join([type(self.backbone).__name__, type(self.head).__name__, *self.strategies])
        return f"Learner({parts}: {self.tasks_learned} of {self.num_tasks} tasks learned, {self.scenario}-incremental)"

    # ---- what strategies use: see LearnerLike -------------------------------------------------------------------

    @property
    def task_index(self) -> int:
        """Position of the present task."""
        return self.task.index

    @property
    def steps_per_epoch(self) -> int:
        """Minibatches of an epoch of the present task."""
        return 0 if self._data is None else updates(len(self._data), self.batch_size, self.limit)

    @property
    def epochs(self) -> int:
        """Passes over each task; 0 before the run has begun."""
        return (self._trainer.max_epochs or 0) if self._trainer is not None else 0

    @property
    def num_steps(self) -> int:
        """Minibatches of the present task in all."""
        return self.steps_per_epoch * self.epochs

    def trunk(self) -> nn.ModuleDict:
        """Return backbone and head, without the strategies' own parameters."""
        trunk: nn.ModuleDict = self.__dict__["_trunk"]
        return trunk

    def replace_head(self, head: nn.Module) -> None:
        """Put another head, (B, D) -> (B, C), in the place of the present one; for the `setup` of a strategy."""
        self.head = self.trunk()["head"] = head

    @property
    def keeps_optimizer(self) -> bool:
        """Whether an optimizer starts with the state of the one of the previous task."""
        return self._carried.on

    def forget_optimizer(self) -> None:
        """Let the next optimizer start without state: for a strategy that resets the weights."""
        self._carried.forget()

    def restart_optimizer(self) -> None:
        """Build optimizer and schedule anew for the rest of the task; see `LearnerLike.restart_optimizer`."""
        restart(self)

    def closure(self, batch: Batch | None = None) -> Tensor:
        """Return the total loss of the step's batch under the present weights; see `LearnerLike.closure`."""
        return loss_again(self, batch)

    def new_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Build the configured optimizer over some parameters."""
        return self._optimizer(parameters)

    def learning_rates(self) -> dict[nn.Parameter, float]:
        """Return the present learning rate of each parameter that is trained."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        return {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    def record(self, name: str, value: float | Tensor) -> None:
        """Add a strategy's own number to the training curves, as record/NAME; see `LearnerLike.record`."""
        self._curves.record(name, value, None if self.in_step else (self.task.index + 1, self.total_steps))

    def competing(self, tasks: Task | Tensor) -> Tensor:
        """Return the classes that compete on a task's examples in training, (K,); for task labels (n,), bool (n, C)."""
        among = competing(self.train_mask, self.seen, self.membership)
        return among[tasks] if isinstance(tasks, Tensor) else among[tasks.index].nonzero().flatten()

    def evaluating(self) -> AbstractContextManager[None]:
        """In this context, backbone and head are in evaluation mode and not compiled; then their modes are restored."""
        return evaluating(self.trunk())

    def prepare(self, x: Tensor, augment: bool = False) -> Tensor:
        """Map raw inputs (B, *input) to what the backbone receives: normalised, and augmented if asked for."""
        if augment and self.augment is not None:
            x = self.augment(x, self.augment_random.generator)
        if self._convolves and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        x = to_floats(x) if self.normalize is None else self.normalize(x)
        return x.to(self.dtype)

    def compile(self, mode: str = "default") -> None:
        """Compile backbone and head by torch.compile; results agree with eager ones to rounding, not to the bit.

        Args:
            mode: "default", "reduce-overhead" (CUDA graphs) or "max-autotune".

        Raises:
            InputError: If there is no such mode.
        """
        compile_by(mode, [self.backbone, self.head])
        self.compiled = True

    def forward(self, view: Tensor, task: Tensor | None = None) -> Tensor:
        """Map prepared inputs (B, *input) to logits (B, C).

        Args:
            view: What `prepare` returned.
            task: Task labels (B,); None means those that a prediction is given.
        """
        self.task_labels = self.told if task is None else task
        logits: Tensor = self._owners["classify"](self, self._owners["encode"](self, view))
        return logits

    def with_weights(self, weights: Mapping[str, Tensor], view: Tensor, task: Tensor) -> Tensor:
        """Return the logits of `forward` with some parameters and buffers, given by name, replaced."""
        return functional_call(self, dict(weights), (view, task))  # type: ignore[no-any-return]

    def mask(self, logits: Tensor, task: Tensor, scenario: str | None = None) -> Tensor:
        """Set the logits (B, C) of classes that do not compete to minus infinity; by default in the run's scenario."""
        return self.masks[scenario or self.scenario](logits, task)  # type: ignore[no-any-return]

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss over the competing classes, a scalar; for labels it is the cross-entropy."""
        return self.target.loss(self.mask(logits, batch.task, self.train_mask), batch.y)

    # ---- a task, called by cl.engine.experiment ---------------------------------------------------------------------

    def before_task(self, task: Task) -> None:
        """Begin a task on the training device: call the strategies' hooks, move the data there, update the masks."""
        self.task, self.step, self.restarted_at = task, 0, 0
        self.truth = task.train.labels if task.hidden else None
        task = task.without_hidden_labels()
        torch.manual_seed(derive(self.seed, "torch", task.index))
        self.augment_random.seed(derive(self.seed, "augment", task.index))
        for _, hook in self._chains["before_task"]:
            hook(self, task)
        data: TaskData = self._owners["training_data"](self, task)
        self.seen |= self.membership[task.index]
        if len(data):
            self._data = data.on(self.device)
            if self.truth is None:
                self.seen[list(classes_of(data.labels))] = True
            check_rows(self, len(data))
        self._update_masks()

    @property
    def has_training(self) -> bool:
        """Whether there is anything to train in the present task."""
        return self.steps_per_epoch > 0 and any(p.requires_grad for p in self.parameters())

    def after_task(self, task: Task) -> None:
        """End a task on the training device: call the strategies' hooks."""
        for _, hook in self._chains["after_task"]:
            hook(self, task.without_hidden_labels())
        self._curves.log(self.loggers, task.index + 1, self.total_steps, rest=True)
        self._data = None
        self.tasks_learned = task.index + 1

    def _update_masks(self) -> None:
        for name, mask in self.masks.items():
            mask.set(competing(name, self.seen, self.membership))  # type: ignore[operator, arg-type]

    # ---- training -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer:
        """Build this task's optimizer, and its schedule."""
        optimizer: Optimizer = self._owners["configure_optimizer"](self, self._optimizer)
        rows = [0 if self._data is None else len(self._data)] if self.shuffle else self._rows
        self._schedule = schedule_of(self, optimizer, rows)
        self._carried.take_over(self, optimizer, self._schedule)
        return optimizer

    def train_dataloader(self) -> TrainLoader:
        """Return the present task's minibatches."""
        assert self._data is not None
        seed = derive(self.seed, "task", self.task.index) if self.shuffle else None
        shape = self.batch_size, self.chunk_size, self.steps_per_epoch
        return TrainLoader(self._data, *shape, seed, lambda: self.step, self.device)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch unchanged: the loader has put it on the device."""
        return batch

    def on_train_start(self) -> None:
        """Skip Lightning's wrappers around the optimizer if they do nothing in this run."""
        self.plain = is_plain(self.trainer)

    def on_train_epoch_start(self) -> None:
        """Make the epoch's draws (dropout) a function of seed, task and epoch."""
        torch.manual_seed(derive(self.seed, "torch", self.task.index, self.current_epoch, *distributed.rank_position()))

    def training_step(self, chunk: list[Batch], batch_idx: int) -> None:
        """Train on each minibatch of a chunk, then check and log its losses."""
        optimizer: Any = self.optimizers(use_pl_optimizer=not self.plain)
        losses = []
        for batch in chunk:
            self.look()
            losses.append(train_on(self, batch, optimizer))
        self._check_and_log(distributed.mean(torch.stack(losses).float()))

    def begin_step(self, terms: dict[str, Tensor]) -> None:
        """Begin a step, whose loss terms and recorded numbers go into `terms`."""
        self._curves.add(terms)
        self.in_step = True

    def look(self) -> None:
        """Call the instruments that measure before the present step."""
        for look in self.looks.get(self.step, ()):
            look(self)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let strategies project the unscaled gradients, then clip."""
        for _, project in self._chains["project_gradients"]:
            project(self)
        if self.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.gradient_clip)

    def _check_and_log(self, losses: Tensor) -> None:
        check_losses(self, losses)
        self.last_loss = losses[-1]
        self._curves.log(self.loggers, self.task.index + 1, self.total_steps)

    def on_train_epoch_end(self) -> None:
        """Call the strategies' hooks, then move the schedule."""
        for _, hook in self._chains["after_epoch"]:
            hook(self, self.task.without_hidden_labels(), self.current_epoch)
        if self.more_epochs and self.current_epoch + 1 == self.epochs - self.more_epochs != self.epochs:
            restart(self)
        if self.restarted_at == self.step:
            return  # a new schedule starts with the next epoch
        if isinstance(self._schedule, ReduceLROnPlateau):
            self._schedule.step(self.trainer.callback_metrics["val/loss"])
        elif self._schedule is not None and self.scheduler_interval == "epoch":
            self._schedule.step()

    def on_train_end(self) -> None:
        """Log the rest of the training curves."""
        self._curves.log(self.loggers, self.task.index + 1, self.total_steps, rest=True)

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def val_dataloader(self) -> Iterable[Batch]:
        """Return the present task's validation examples, never augmented."""
        if self.task.val is None:
            return []
        return evaluation(self, [shard(self.task.val)])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss, and for labels the accuracy, on the present task, as means over examples."""
        logits = self.predict(batch)
        values = {"val/loss": self.criterion(logits, batch)}
        if self.target.name == "label":
            values["val/accuracy"] = (self.mask(logits, batch.task).argmax(1) == batch.y).float().mean()
        self.log_dict(values, batch_size=len(batch), on_epoch=True, sync_dist=distributed.world_size() > 1)
        # Lightning uses a metric called "step" as the step of the point.
        where = {"step": float(self.total_steps), "train/task": self.task.index + 1.0}
        self.log_dict(where, batch_size=1, on_epoch=True, reduce_fx="max")

    def on_test_epoch_start(self) -> None:
        """Start the scores of a row of R."""
        self._score = start(self.target, list(self.matrices), self.mask, self.membership)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch, whose examples may be of several tasks."""
        self._score.update(self.predict(batch), batch)

    def on_test_epoch_end(self) -> None:
        """Record the row of R, and that of the calibration errors."""
        for rows, found in ((self._score.rows(), self.matrices), (self._score.errors(), self.calibration)):
            for name, row in rows.items():
                found[name].record(self.tasks_learned, row)  # type: ignore[operator]

    def features(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        """Return the backbone's features (B, D) of raw inputs; task labels (B,) are used in scenario "task" alone."""
        self.task_labels = task if self.scenario == "task" else None
        return self._owners["encode"](self, self.prepare(x))  # type: ignore[no-any-return]

    def predict(self, batch: Batch) -> Tensor:
        """Return the logits of a batch at test, (B, C), unmasked; task labels are used in scenario "task" alone."""
        self.told = batch.task if self.scenario == "task" else None
        logits: Tensor = self._owners["predict"](self, self.prepare(batch.x))
        self.told = None
        return logits

    # ---- state --------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Return the counters, which as buffers would have to be read from the device, and the optimizer's state."""
        carried = {"optimizer": self._carried.state(self)} if self._carried.on else {}
        return {"tasks_learned": self.tasks_learned, "total_steps": self.total_steps, **carried}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        self.tasks_learned, self.total_steps = state["tasks_learned"], state["total_steps"]
        self._carried.load(state.get("optimizer", {}))
        self._update_masks()
