"""The one plug-in contract: `Strategy`, and `LearnerLike`, what it may use of the learner that it is given.

Read this page first; it is the whole training protocol. A run, with each hook marked where it is called, which
`cl/engine/experiment.py` and `cl/engine/learner.py` do::

    strategy.setup(learner, stream)                        # once: allocate every tensor, refuse what cannot work
    measure row 0 of R                                     # the untrained learner, on every task
    for task in stream:
        strategy.before_task(learner, task)                # teacher copy, masks
        data = strategy.training_data(learner, task)       # one owner; default: task.train
        optimizer = strategy.configure_optimizer(learner, factory)       # one owner; default: factory(parameters)
        optimizer goes on with the last one's state            # where optimizer_state=keep or there are no boundaries
        for epoch in range(epochs):
            for batch in shuffled(data):                   # raw rows on the device: a function of (seed, task, epoch)
                batch = strategy.extend_batch(learner, batch)            # may only append rows: replay
                batch.view = normalize(augment(batch.x))                 # once, after the replayed rows are in
                features = strategy.encode(learner, batch.view)          # one owner; default: learner.backbone
                logits = strategy.classify(learner, features)            # one owner; default: learner.head
                loss = strategy.criterion(learner, batch, logits)        # one owner; default: the target's masked loss
                loss += strategy.loss(learner, batch, logits)            # every strategy; None adds nothing
                loss.backward()
                strategy.project_gradients(learner)                      # in place on .grad, before clipping
                optimizer.step()
                strategy.after_step(learner, incoming_rows, their_logits)    # fill a memory, path integrals
            strategy.after_epoch(learner, task, epoch)     # phases inside a task
        strategy.after_task(learner, task)                 # Fisher, bases, class means
        measure row i of R with strategy.predict(learner, view)          # one owner; default: learner(view)
        report, checkpoint

Every hook is optional, and one that no strategy overrides costs nothing in the loop. Loss terms add; batches and
gradients chain in the order of the configuration; a hook with one owner refuses two and names both. The engine alone
calls `zero_grad`, `backward` and `step`: a strategy's extra gradients come from `torch.autograd.grad`. The learner is
passed in and never stored. All state is a registered buffer, parameter or sub-module of final shape after `setup`, so
a strategy has no checkpoint code of its own. What should be known beside a run's numbers, `remark` says.

In several processes (`trainer=ddp`) each sees its rows of every minibatch, and `.grad` is that of all rows when it is
projected. Hooks between tasks see the whole task everywhere, and what they leave is taken from process 0, but for a
`Memory`, which each has a share of. So little is left to say: `cl.distributed.mean_gradients` where a strategy takes a
gradient of its own, `total` where it adds up in `after_step`, `share` for a number of rows to draw, and the attribute
`distributed = False` where it cannot.
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

# What a method may need of a run, for `Strategy.needs`.
NEEDS = {
    "memory": "room for examples of earlier tasks, which it stores",
    "boundaries": "tasks with a beginning and an end, where it acts",
    "transformer": "a backbone that takes prompts, such as backbone=vit",
    "sgd": "plain SGD, without momentum and weight decay, whose steps stay where gradients are projected",
}
_WITHIN = {  # what a method finds, or misses, in a scenario that it does not work in
    "class": "where the task of a test example is not told",
    "domain": "where all tasks have the same classes, and the task of a test example is not told",
    "task": "where the task of each test example is told",
}

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


class LearnerLike(Protocol):
    """What a strategy may use of the learner that each hook is given; it changes nothing here but weights.

    B is the rows of a batch, C the classes of the whole stream, K those that compete, D the features, T the tasks.

    Attributes:
        backbone: Prepared inputs (B, *input) to features (B, D), with the attribute `num_features`, D.
        head: Features (B, D) to logits (B, C).
        strategies: All strategies of the run by name; `strategies.owned(hook)` says whether one of them owns a hook.
        scenario: "class", "task" or "domain".
        train_mask: The scenario by which classes compete in the loss; by default the same.
        target: The kind of the stream's targets, see `cl.data.target`.
        num_tasks: T.
        num_classes: C.
        membership: The classes of each task, bool (T, C).
        seen: The classes of the tasks so far, the present one among them once its training begins, bool (C,).
        shared_outputs: Whether tasks have classes in common.
        mixed: Whether rows of several tasks come together in one.
        tasks_learned: Tasks that are finished, 0 to T.
        step: Minibatches of the present task that are done.
        task_labels: The rows' task labels (B,) in `encode` and `classify`: in training, and at test where the scenario
            gives them; None means rows of the present task, or that nobody may know.
        told: The task labels (B,) that a prediction is given; None in training, and where they are not told.
        batch_size: Incoming rows a step.
        eval_batch_size: Rows of a minibatch that is evaluated; None leaves it to `EvalLoader`.
        accumulate: Minibatches that make one update of the weights.
        limit: Share (float) or number (int) of an epoch's minibatches that are trained on.
        gradient_clip: Largest norm of the gradient, or None.
        seed: Of the run; strategies draw from a `cl.random.Random` of their own, which is seeded by it.
        augment_random: What the augmentation draws from, seeded anew with each task.
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
        """Where backbone and head are."""

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

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all parameters, those of the strategies among them."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the same with their names."""

    def __call__(self, view: Tensor, task: Tensor | None = None) -> Tensor:
        """Map prepared inputs (B, *input) to logits (B, C), with task labels (B,) where rows are of other tasks."""

    def with_weights(self, weights: Mapping[str, Tensor], view: Tensor, task: Tensor) -> Tensor:
        """Return the same logits under other values of some parameters and buffers, by name."""

    def features(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        """Return features (B, D) of raw inputs, under the task labels (B,) that may be told."""

    def prepare(self, x: Tensor, augment: bool = False) -> Tensor:
        """Map raw inputs (B, *input) to what the backbone receives, augmented or not."""

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of the stream's target over the classes that compete, a scalar."""

    def mask(self, logits: Tensor, task: Tensor, scenario: str | None = None) -> Tensor:
        """Send the logits of classes that do not compete to minus infinity; by default in the run's scenario."""

    def competing(self, tasks: Task | Tensor) -> Tensor:
        """Return the classes that compete on a task's examples in training, (K,); for task labels (B,), bool (B, C)."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Put backbone and head in evaluation mode for a while, and back as they were."""

    def new_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Build the configured optimizer over some parameters."""

    def learning_rates(self) -> dict[nn.Parameter, float]:
        """Return the present learning rate of each parameter that is trained."""

    @property
    def keeps_optimizer(self) -> bool:
        """Whether an optimizer goes on with what the one of the task before held."""

    def forget_optimizer(self) -> None:
        """Let the next optimizer begin anew: for a strategy that goes back to initial weights."""


class Strategy(nn.Module):
    """A method of continual learning; see the module's docstring for when each hook is called.

    What a class says of itself is written as literals, so that `cl-list strategy scenario=class memory=no` reads it
    from the source.

    Attributes:
        scenarios: Those that it works in, of "class", "task" and "domain"; a run in another one is refused.
        targets: What it can learn, of "label", "multilabel" and "regression"; a stream of others is refused.
        needs: What it needs of a run, words of `NEEDS`.
        bound: "upper" or "lower" where its results bound those of the methods that are compared; else "".
        distributed: Whether it can learn in several processes.
        uses_task: Whether its features or outputs use the task labels that a scenario gives at test.

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

    def __init_subclass__(cls, **options: Any) -> None:
        """Let the constructor of each strategy refuse arguments outside of the ranges in its annotations."""
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            checked(cls)

    def __repr__(self) -> str:
        """Return the call that makes the strategy, with the arguments that differ from their defaults."""
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
        """Refuse a stream whose targets the method does not know.

        Raises:
            InputError: Naming both.
        """
        if stream.target.name not in self.targets:
            raise InputError(
                f"{type(self).__name__} learns from targets of kind {' or '.join(self.targets)}, but those of "
                f"{stream.name!r} are {stream.target.name}: choose another strategy or another stream."
            )

    def check_processes(self) -> None:
        """Refuse several processes where the method does not know them.

        Raises:
            InputError: Naming the method.
        """
        if not self.distributed and world_size() > 1:
            raise InputError(
                f"{type(self).__name__} cannot learn in {world_size()} processes: use trainer=default, with one device."
            )

    def remark(self, learner: LearnerLike) -> str | None:
        """Return a sentence that belongs beside the numbers of a run, such as why the method cannot work there.

        It is asked for once, after every strategy's `setup`, and shown where the run's notes are.
        """
        return None

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate every tensor at its final shape and refuse what cannot work."""

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Act before the first batch of a task, on the training device."""

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Act after the last batch of a task, on the training device."""

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return what is trained on in this task; one owner."""
        return task.train

    def configure_optimizer(self, learner: LearnerLike, factory: OptimizerFactory) -> Optimizer:
        """Return the optimizer of this task; one owner."""
        return factory(p for p in learner.parameters() if p.requires_grad)

    def extend_batch(self, learner: LearnerLike, batch: Batch) -> Batch:
        """Return the batch with rows appended."""
        return batch

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Map prepared inputs (B, *input) to features (B, D); one owner.

        `learner.task_labels` has the rows' task labels (B,) in training, and at test where the scenario gives them;
        None means rows of the present task, or that nobody may know.
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
        """Return a scalar, already weighted, to be added; None where there is nothing to add yet."""
        return None

    def project_gradients(self, learner: LearnerLike) -> None:
        """Change `.grad` in place, once per optimizer step, after unscaling and before clipping."""

    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Act after a step; sees the rows that came from the stream and their logits before the step, detached."""

    def after_epoch(self, learner: LearnerLike, task: Task, epoch: int) -> None:
        """Act after an epoch."""

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Map prepared inputs to logits (B, C) at test; one owner."""
        logits: Tensor = learner(view)
        return logits


CHAINED = ("before_task", "after_task", "extend_batch", "loss", "project_gradients", "after_step", "after_epoch")
ONE_OWNER = ("training_data", "configure_optimizer", "encode", "classify", "criterion", "predict")
HOOKS = (*CHAINED, *ONE_OWNER, "setup", "remark")


def misspelt(kind: type, base: type = Strategy, hooks: Sequence[str] = HOOKS) -> str | None:
    """Return a sentence on a method that nobody calls and whose name is nearly a hook's, None where there is none.

    Args:
        kind: The class.
        base: What defines its hooks.
        hooks: Their names.

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
    """Say whether the source of a class mentions one of its methods beside its definition, or cannot be read."""
    try:
        return len(re.findall(rf"\b{name}\b", inspect.getsource(kind))) > 1
    except (OSError, TypeError):
        return False


def overrides(strategy: Strategy, hook: str) -> bool:
    """Say whether a strategy's class defines a hook itself."""
    return getattr(type(strategy), hook) is not getattr(Strategy, hook)


class Composition(nn.ModuleDict):
    """Strategies by name, and for each hook the methods to call, found once.

    Attributes:
        chains: Hook to the (name, method) pairs of the strategies that define it, in order.
        owners: Hook with one owner to its method, which is the default where nobody defines it.

    Raises:
        InputError: If two strategies own one hook, a name cannot be one, or a hook's is misspelt.

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
        """Let each strategy refuse the stream or allocate, and seed its generators by its name."""
        for name, strategy in self.items():
            assert isinstance(strategy, Strategy)
            strategy.check_scenario(stream)
            strategy.check_target(stream)
            strategy.check_processes()
            strategy.setup(learner, stream)
            for path, module in strategy.named_modules():
                if isinstance(module, Random):
                    module.seed(derive(learner.seed, name, path))

    @property
    def bound(self) -> str:
        """The bound that all strategies agree on, "upper" or "lower"; else ""."""
        found = {strategy.bound for strategy in self.values()}
        return str(found.pop()) if len(found) == 1 else ""

    def remarks(self, learner: LearnerLike) -> list[str]:
        """Return the strategies' sentences on a run, each once."""
        found = [strategy.remark(learner) for strategy in self.values()]  # type: ignore[operator]
        told = [type(strategy).__name__ for strategy in self.values() if strategy.uses_task]
        if told and learner.scenario == "task":
            found.append(
                f"{' and '.join(told)} has weights for each task and is told the task: R under the mask of all classes "
                "is no class-incremental accuracy."
            )
        return list(dict.fromkeys(text for text in found if text))

    def owned(self, hook: str) -> bool:
        """Say whether a strategy defines a hook with one owner."""
        return any(overrides(s, hook) for s in self.values())  # type: ignore[arg-type]
