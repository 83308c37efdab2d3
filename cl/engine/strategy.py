"""The contract of a strategy: its hooks, `Strategy`, and what it may use of the learner, `LearnerLike`.

Read this page first; it is the whole training protocol. This is a run, with the place where each hook is called; the
code is in `cl/engine/experiment.py` and `cl/engine/learner.py`::

    strategy.setup(learner, stream)                        # once: allocate every tensor, refuse what cannot work
    measure row 0 of R                                     # the untrained learner, on every task
    for task in stream:
        strategy.before_task(learner, task)                # teacher copy, masks
        data = strategy.training_data(learner, task)       # one owner; default: task.train
        optimizer = strategy.configure_optimizer(learner, factory)       # one owner; default: factory(parameters)
        load the last optimizer's state                        # if optimizer_state=keep, or without boundaries
        for epoch in range(epochs):
            for batch in shuffled(data):                   # raw, on the device; order from (seed, task, epoch)
                batch = strategy.extend_batch(learner, batch)            # may only append examples: replay
                batch.view = normalize(augment(batch.x))                 # once, replayed examples included
                features = strategy.encode(learner, batch.view)          # one owner; default: learner.backbone
                logits = strategy.classify(learner, features)            # one owner; default: learner.head
                loss = strategy.criterion(learner, batch, logits)        # one owner; default: the target's masked loss
                loss += strategy.loss(learner, batch, logits)            # every strategy; None adds nothing
                loss.backward()
                strategy.project_gradients(learner)                      # in place on .grad, before clipping
                optimizer.step()
                strategy.after_step(learner, incoming, their_logits)     # fill a memory, path integrals
            strategy.after_epoch(learner, task, epoch)     # phases inside a task
        strategy.after_task(learner, task)                 # Fisher, bases, class means
        measure row i of R with strategy.predict(learner, view)          # one owner; default: learner(view)
        report, checkpoint

Every hook is optional, and one that no strategy overrides costs nothing in the loop. Loss terms add up; batches and
gradients chain in the order of the configuration; two strategies that define the same hook with one owner are refused.
The engine alone calls `zero_grad`, `backward` and `step`: a strategy computes further gradients by
`torch.autograd.grad`. The learner is an argument of each hook and never stored. After `setup`, all state is in
registered buffers, parameters or sub-modules of final shape, so that a strategy needs no checkpoint code. `remark`
returns a sentence that reports show beside the results.

In several processes (`trainer=ddp`) each process sees its share of every minibatch, and `project_gradients` sees in
`.grad` the mean gradient over all examples. Hooks between tasks see the whole task in every process, and the state that
they leave is taken from process 0, except that of a `Memory`, of which each process has its own share. A strategy that
computes its own gradient calls `cl.distributed.mean_gradients`; one that accumulates in `after_step` calls `total`; one
that draws a number of examples calls `share`. A strategy that cannot learn in several processes sets
`distributed = False`.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl.distributed import world_size
from cl.engine.batch import Batch
from cl.errors import InputError
from cl.random import Random, derive
from cl.ranges import checked

if TYPE_CHECKING:
    from cl.data.target import Target
    from cl.data.task import Scenario, Stream, Task, TaskData

# What a method may need from a run, for `Strategy.needs`.
NEEDS = {
    "memory": "room for examples of earlier tasks, which it stores",
    "boundaries": "tasks with a beginning and an end, where it acts",
    "transformer": "a backbone that takes prompts, such as backbone=vit",
    "batch_norm": "a backbone with batch norm, such as backbone=resnet18",
    "sgd": "plain SGD, without momentum and weight decay, whose steps stay where gradients are projected",
}
_WITHIN = {  # ends the sentence that refuses a scenario: why a method may not work in it
    "class": "where the task of a test example is not told",
    "domain": "where all tasks have the same classes, and the task of a test example is not told",
    "task": "where the task of each test example is told",
}

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


class LearnerLike(Protocol):
    """The members of the learner that a strategy may use; of these it may change the weights and replace the head.

    In the shapes, B is the number of examples in a batch, C of the classes in the whole stream, K of the classes that
    compete, D of the features, and T of the tasks.

    Attributes:
        backbone: Prepared inputs (B, *input) to features (B, D), with the attribute `num_features`, D.
        head: Features (B, D) to logits (B, C).
        strategies: All strategies of the run by name; `strategies.owned(hook)` says whether one of them defines a hook
            with one owner.
        scenario: "class", "task" or "domain".
        train_mask: The scenario by which classes compete in the loss; by default that of the run.
        target: The kind of the stream's targets, see `cl.data.target`.
        num_tasks: T.
        num_classes: C.
        membership: The classes of each task, bool (T, C).
        seen: The classes of the tasks so far, those of the present task included once its training begins, bool (C,).
        shared_outputs: Whether tasks have classes in common.
        mixed: Whether the training data of a task hold examples of other tasks.
        tasks_learned: The number of finished tasks, 0 to T.
        step: The number of finished minibatches of the present task.
        task_labels: The task labels (B,) of the examples in `encode` and `classify`: in training, and at test if the
            scenario gives them. None means that all are of the present task, or that the labels are not given.
        told: The task labels (B,) that a prediction is given; None in training, and if the scenario gives none.
        batch_size: Incoming examples per step.
        eval_batch_size: Examples of an evaluation minibatch; None leaves it to `EvalLoader`.
        accumulate: Minibatches per update of the weights.
        limit: Share (float) or number (int) of an epoch's minibatches that are trained on.
        gradient_clip: Largest norm of the gradient, or None.
        seed: The seed of the run. A strategy draws from its own `cl.random.Random`, which is seeded from this.
        augment_random: The generator of the augmentation, seeded at the start of each task.
    """

    backbone: nn.Module
    head: nn.Module
    strategies: Composition
    scenario: Scenario
    train_mask: Scenario
    target: Target
    num_tasks: int
    num_classes: int
    membership: Tensor
    seen: Tensor
    shared_outputs: bool
    mixed: bool
    tasks_learned: int
    step: int
    task_labels: Tensor | None
    told: Tensor | None
    batch_size: int
    eval_batch_size: int | None
    accumulate: int
    limit: int | float
    gradient_clip: float | None
    seed: int
    augment_random: Random

    @property
    def device(self) -> torch.device:
        """The device of backbone and head."""

    @property
    def task_index(self) -> int:
        """Position of the present task, from 0."""

    @property
    def current_epoch(self) -> int:
        """Epoch of the present task, from 0."""

    @property
    def epochs(self) -> int:
        """Passes over each task; 0 before the run has begun."""

    @property
    def steps_per_epoch(self) -> int:
        """Minibatches of an epoch of the present task."""

    def trunk(self) -> nn.ModuleDict:
        """Return backbone and head, without the strategies' own parameters."""

    def replace_head(self, head: nn.Module) -> None:
        """In `setup`, put another head, (B, D) -> (B, C), in the place of the configured one."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all parameters, those of the strategies included."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield all parameters with their names."""

    def __call__(self, view: Tensor, task: Tensor | None = None) -> Tensor:
        """Map prepared inputs (B, *input) to logits (B, C); task labels (B,) are needed for examples of other tasks."""

    def with_weights(self, weights: Mapping[str, Tensor], view: Tensor, task: Tensor) -> Tensor:
        """Return the logits of a call with some parameters and buffers, given by name, replaced."""

    def features(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        """Return features (B, D) of raw inputs; task labels (B,) are used in scenario "task" alone."""

    def prepare(self, x: Tensor, augment: bool = False) -> Tensor:
        """Map raw inputs (B, *input) to what the backbone receives: normalised, and augmented if asked for."""

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of the stream's target over the classes that compete, a scalar."""

    def mask(self, logits: Tensor, task: Tensor, scenario: str | None = None) -> Tensor:
        """Set the logits (B, C) of classes that do not compete to minus infinity; by default in the run's scenario."""

    def competing(self, tasks: Task | Tensor) -> Tensor:
        """Return the classes that compete on a task's examples in training, (K,); for task labels (B,), bool (B, C)."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context in which backbone and head are in evaluation mode; on exit their modes are restored."""

    def new_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Build the configured optimizer over some parameters."""

    def learning_rates(self) -> dict[nn.Parameter, float]:
        """Return the present learning rate of each parameter that is trained."""

    @property
    def keeps_optimizer(self) -> bool:
        """Whether an optimizer starts with the state of the one of the previous task."""

    def forget_optimizer(self) -> None:
        """Let the next optimizer start without state: for a strategy that resets the weights."""

    def restart_optimizer(self) -> None:
        """In `after_epoch`, build the optimizer and its schedule anew for the rest of the task, without state.

        The new schedule spans the configured epochs that are left; among the epochs that `more_epochs` adds, those.

        Raises:
            InputError: If it is called elsewhere, or the stream has no boundaries.
        """

    def closure(self, batch: Batch | None = None) -> Tensor:
        """Return the total loss of this step's batch under the present weights, a scalar with a graph.

        It is the criterion plus the losses of all strategies, as in the step: the same augmented examples, and the same
        draws of dropout and of the strategies. It may be called in `project_gradients` and `after_step`, any number of
        times, by a strategy whose class has `uses_closure = True`. It leaves no trace: generators, statistics of batch
        norm, memories and the strategies' attributes are as before. Take gradients by `torch.autograd.grad`.

        Args:
            batch: Some of the step's examples, from `Batch.part`; None means all.

        Raises:
            InputError: If it is called elsewhere, or a strategy writes a buffer while its loss is computed.
        """

    def record(self, name: str, value: float | Tensor) -> None:
        """Add a number of the method's own to the training curves, as record/NAME, in any hook from `before_task` on.

        Recorded in a step it is averaged over `log_every` steps, as a loss is; recorded between steps, such as in
        `after_task`, it is a point of its own at the last step. It is written where the curves are: to `training.csv`,
        to every logger, and to the pictures of `cl-compare`. In several processes that of process 0 is written.

        Raises:
            InputError: If the name has other characters than letters, digits, _, -, . and /, or the value is not one
                number.
        """


class Strategy(nn.Module):
    """A method of continual learning; see the module's docstring for when each hook is called.

    The class attributes below must be literals, because `cl-list strategy scenario=class memory=no` reads them from the
    source.

    Attributes:
        scenarios: The scenarios that the method works in, of "class", "task" and "domain"; others are refused.
        targets: The kinds of targets that it can learn, of "label", "multilabel" and "regression"; others are refused.
        needs: What it needs from a run: keys of `NEEDS`.
        bound: "upper" or "lower" if its results bound those of the compared methods; else "".
        distributed: Whether it can learn in several processes.
        uses_task: Whether its features or outputs use the task labels that a scenario gives at test.
        test_options: Names of those arguments of its constructor that `predict` alone reads, from attributes of the
            same name: a saved learner can be scored with other values of them (`cl-run score=DIR`).
        needs_labels: Whether it learns from labels. A method that sets this to False may be given tasks that hide them.
        uses_closure: Whether it calls `learner.closure`.
        needs_inputs: Whether it uses inputs, or the layers of the backbone, other than by `learner.prepare` and the
            whole `learner.backbone`, as augmentation does. A method that does not may get the outputs of a frozen
            backbone in place of inputs, and the backbone then passes them on.

    Example:
        A method that shrinks the weights a little, in full:

        >>> class Shrink(Strategy):
        ...     def loss(self, learner, batch, logits):
        ...         return 1e-3 * sum(p.pow(2).sum() for p in learner.trunk().parameters())
        >>> overrides(Shrink(), "loss"), overrides(Shrink(), "after_step")
        (True, False)
    """

    scenarios: tuple[str, ...] = ("class", "task", "domain")
    targets: tuple[str, ...] = ("label",)
    needs: tuple[str, ...] = ()
    bound: str = ""
    distributed: bool = True
    uses_task: bool = False
    test_options: tuple[str, ...] = ()
    needs_labels: bool = True
    uses_closure: bool = False
    needs_inputs: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Make the constructor refuse arguments outside of the ranges in its annotations."""
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            checked(cls)

    def __repr__(self) -> str:
        """Return the constructor call, with the arguments that differ from their defaults."""
        plain = (bool, int, float, str, tuple, list, type(None))
        known = inspect.signature(type(self)).parameters.items()
        found = {name: getattr(self, name) for name, p in known if getattr(self, name, p.default) != p.default}
        given = [f"{name}={value!r}" for name, value in found.items() if isinstance(value, plain)]
        return f"{type(self).__name__}({', '.join(given)})"

    def check_scenario(self, stream: Stream) -> None:
        """Refuse a scenario that the method does not work in.

        Raises:
            InputError: Naming method and scenario.
        """
        if stream.scenario not in self.scenarios:
            those = " or ".join(self.scenarios)
            raise InputError(
                f"{type(self).__name__} works with scenario={those}, but this run has scenario={stream.scenario}, "
                f"{_WITHIN[stream.scenario]}: use scenario={those}, or another strategy."
            )

    def check_target(self, stream: Stream) -> None:
        """Refuse a stream whose kind of targets the method cannot learn.

        Raises:
            InputError: Naming both.
        """
        if stream.target.name not in self.targets:
            raise InputError(
                f"{type(self).__name__} learns from targets of kind {' or '.join(self.targets)}, but those of "
                f"{stream.name!r} are {stream.target.name}: choose another strategy or another stream."
            )

    def check_processes(self) -> None:
        """Refuse several processes if the method cannot learn in them.

        Raises:
            InputError: Naming the method.
        """
        if not self.distributed and world_size() > 1:
            raise InputError(
                f"{type(self).__name__} cannot learn in {world_size()} processes: use trainer=default, with one device."
            )

    def remark(self, learner: LearnerLike) -> str | None:
        """Return a sentence that reports show beside the results, such as why the method cannot work well in this run.

        Called once, after the `setup` of all strategies.
        """
        return None

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate every tensor at its final shape and refuse what cannot work."""

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Act before the first batch of a task, on the training device."""

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Act after the last batch of a task, on the training device."""

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return the examples to train on in this task; one owner."""
        return task.train

    def configure_optimizer(self, learner: LearnerLike, factory: OptimizerFactory) -> Optimizer:
        """Return the optimizer of this task; one owner."""
        return factory(p for p in learner.parameters() if p.requires_grad)

    def extend_batch(self, learner: LearnerLike, batch: Batch) -> Batch:
        """Return the batch with examples appended; the incoming ones must stay first and unchanged."""
        return batch

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Map prepared inputs (B, *input) to features (B, D); one owner.

        `learner.task_labels` holds the task labels (B,) in training, and at test if the scenario gives them. None means
        that all examples are of the present task, or that the labels are not given.
        """
        features: Tensor = learner.backbone(view)
        return features

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Map features (B, D) to logits (B, C) over all classes; one owner."""
        logits: Tensor = learner.head(features)
        return logits

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the classification loss in place of the default; one owner."""
        return learner.criterion(logits, batch)

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return a scalar, already weighted, that is added to the loss; None adds nothing."""
        return None

    def project_gradients(self, learner: LearnerLike) -> None:
        """Change `.grad` in place, once per optimizer step, after unscaling and before clipping."""

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Act after a step.

        Args:
            learner: With the weights after the step.
            batch: The incoming examples, without those that `extend_batch` appended.
            logits: Their logits (B, C) from the forward pass of the step, so before the update; detached.
        """

    def after_epoch(self, learner: LearnerLike, task: Task, epoch: int) -> None:
        """Act after an epoch."""

    def more_epochs(self, epochs: int) -> int:
        """Return how many epochs the method adds to the configured ones of each task, for phases of its own.

        Optimizer and schedule start anew when the added epochs begin, and the schedule spans them. A phase must follow
        from `learner.current_epoch`, so that a run can resume inside it.
        """
        return 0

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Map prepared inputs to logits (B, C) at test; one owner."""
        logits: Tensor = learner(view)
        return logits


CHAINED = ("before_task", "after_task", "extend_batch", "loss", "project_gradients", "after_step", "after_epoch")
ONE_OWNER = ("training_data", "configure_optimizer", "encode", "classify", "criterion", "predict")
HOOKS = (*CHAINED, *ONE_OWNER, "setup", "remark", "more_epochs")


def misspelt(kind: type, base: type = Strategy, hooks: Sequence[str] = HOOKS) -> str | None:
    """Return a message about a method whose name is nearly that of a hook and that the class does not call; else None.

    Args:
        kind: The class to check.
        base: The base class that defines the hooks.
        hooks: The names of the hooks.

    Example:
        >>> class Mine(Strategy):
        ...     def after_tasks(self, learner, task):
        ...         pass
        >>> misspelt(Mine)
        'Mine: there is no hook called after_tasks; did you mean after_task?'
    """
    for part in kind.__mro__[: kind.__mro__.index(base)]:
        for name, method in vars(part).items():
            if hasattr(base, name) or not inspect.isfunction(method):
                continue
            near = difflib.get_close_matches(name.strip("_"), hooks, n=1, cutoff=0.85)
            takes_learner = list(inspect.signature(method).parameters)[1:2] == ["learner"]
            if near and takes_learner and not _calls(part, name):
                return f"{kind.__name__}: there is no hook called {name}; did you mean {near[0]}?"
    return None


def _calls(kind: type, name: str) -> bool:
    """Say whether the source of a class mentions a method outside of its definition; True if it cannot be read."""
    try:
        return len(re.findall(rf"\b{name}\b", inspect.getsource(kind))) > 1
    except (OSError, TypeError):
        return False


def overrides(strategy: Strategy, hook: str) -> bool:
    """Say whether a strategy's class overrides a hook."""
    return getattr(type(strategy), hook) is not getattr(Strategy, hook)


class Composition(nn.ModuleDict):
    """Strategies by name, and for each hook the methods to call, collected once.

    Attributes:
        chains: For each chained hook, the (name, method) pairs of the strategies that override it, in order.
        owners: For each hook with one owner, its method; the default of `Strategy` if no strategy overrides it.

    Raises:
        InputError: If two strategies override the same hook with one owner, a name is not allowed, or the name of a
            hook is misspelt.

    Example:
        >>> Composition({"plain": Strategy()}).chains["loss"]
        []
    """

    def __init__(self, strategies: Mapping[str, Strategy]) -> None:
        super().__init__()
        for name in strategies:
            if not re.fullmatch(r"[\w-]+", name) or name == "loss" or hasattr(self, name):
                raise InputError(
                    f"A strategy cannot be called {name!r}, which names its part of a checkpoint and a curve: choose a "
                    "word of letters, digits, _ and - that is not taken."
                )
        for strategy in strategies.values():
            said = misspelt(type(strategy))
            if said is not None:
                raise InputError(said)
        self.update(dict(strategies))
        self.chains = {h: [(n, getattr(s, h)) for n, s in strategies.items() if overrides(s, h)] for h in CHAINED}
        self.owners = {h: self._owner(h, strategies) for h in ONE_OWNER}

    @staticmethod
    def _owner(hook: str, strategies: Mapping[str, Strategy]) -> Callable[..., Any]:
        names = [name for name, strategy in strategies.items() if overrides(strategy, hook)]
        if len(names) > 1:
            raise InputError(
                f"Strategies {names[0]!r} and {names[1]!r} both define {hook}, which has one owner: drop one of them."
            )
        owner: Callable[..., Any] = getattr(strategies[names[0]] if names else Strategy(), hook)
        return owner

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Check each strategy against the stream, call its `setup`, and seed its generators from its name."""
        for name, strategy in self.items():
            assert isinstance(strategy, Strategy)
            strategy.check_scenario(stream)
            strategy.check_target(stream)
            strategy.check_processes()
            strategy.setup(learner, stream)
            for path, module in strategy.named_modules():
                if isinstance(module, Random):
                    module.seed(derive(learner.seed, name, path))

    def more_epochs(self, epochs: int) -> int:
        """Return how many epochs the strategies add to the configured ones of each task."""
        return sum(strategy.more_epochs(epochs) for strategy in self.values())  # type: ignore[operator]

    @property
    def bound(self) -> str:
        """The `bound` of the strategies if all have the same, else ""."""
        found = {strategy.bound for strategy in self.values()}
        return str(found.pop()) if len(found) == 1 else ""

    def remarks(self, learner: LearnerLike) -> list[str]:
        """Return the strategies' remarks on a run, without duplicates."""
        found = [strategy.remark(learner) for strategy in self.values()]  # type: ignore[operator]
        by_task = [type(strategy).__name__ for strategy in self.values() if strategy.uses_task]
        if by_task and learner.scenario == "task":
            found.append(
                f"{' and '.join(by_task)} has weights for each task and is told the task: R under the mask of all "
                "classes is no class-incremental accuracy."
            )
        return list(dict.fromkeys(text for text in found if text))

    def owned(self, hook: str) -> bool:
        """Say whether a strategy overrides a hook."""
        return any(overrides(s, hook) for s in self.values())  # type: ignore[arg-type]
