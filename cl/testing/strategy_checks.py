"""Checks that a strategy keeps its contract."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from cl.backbones.blocks import blocks
from cl.backbones.frozen import past_blocks
from cl.data.stream_checks import same
from cl.data.target import TARGETS
from cl.data.task import SCENARIOS, Scenario, Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import NEEDS, Strategy, misspelt
from cl.errors import InputError
from cl.testing.toys import Halt, Halted, Replay, reaches, toy_learner, trainer

Build = Callable[[], Mapping[str, Strategy]]
Toy = Callable[..., tuple[Learner, Stream]]


def check_strategy(
    make: Callable[..., Strategy | Mapping[str, Strategy]],
    *,
    scenarios: tuple[Scenario, ...] | None = None,
    backbone: str = "mlp",
    first_task_is_finetuning: bool = False,
    **options: Any,
) -> None:
    """Check that a strategy keeps the contract; raise an AssertionError that says where it does not.

    In each scenario the strategy must train, a single one also together with a replay, and resume at a task boundary in
    a newly built learner with the same bits and predictions, from a file that loads strictly with `weights_only=True`.
    It must resume inside a task with the same bits, give the same weights for every chunk size, keep the shapes of its
    state, and only append examples to a batch. It must not draw from torch's global generator, leave modules in
    evaluation mode, or store the learner. On a frozen backbone, it must learn the same from the backbone's outputs as
    from inputs, unless it says that it `needs_inputs`. A run in a scenario that its class does not list must be
    refused.

    Args:
        make: Builds the strategy, or several by name: a class or a function.
        scenarios: The scenarios to train in; None means all that its class lists.
        backbone: "mlp", "vit" or "normed", see `toy_learner`.
        first_task_is_finetuning: Whether to check that the weights after the first task equal those of fine-tuning, to
            the bit.
        options: Passed to `make`.

    Raises:
        AssertionError: With one sentence on what is wrong.

    Example:
        >>> check_strategy(Strategy, first_task_is_finetuning=True)
    """

    def build() -> Mapping[str, Strategy]:
        made = make(**options)
        return made if isinstance(made, Mapping) else {"method": made}

    supported = _check_card(build)
    for scenario in SCENARIOS:
        if scenario not in supported:
            _check_refused(build, partial(toy_learner, scenario=scenario, backbone=backbone), scenario)
    scenarios = scenarios or supported
    _check_manners(build, partial(toy_learner, scenario=scenarios[0], backbone=backbone))
    for scenario in scenarios:
        toy = partial(toy_learner, scenario=scenario, backbone=backbone)
        states = _check_run(build, toy, scenario)
        if len(build()) == 1:
            beside = partial(toy, num_tasks=2), f"{scenario}, beside a replay"
            _check_run(lambda: {"replay": Replay(), **build()}, *beside)
        if all(not strategy.needs_labels for strategy in build().values()):
            _check_hidden(build, backbone, scenario)
        if scenario == scenarios[0]:
            _check_frozen(build, backbone, scenario)
            _check_chunks(build, toy, states[2])
            _check_inside(build, toy, states[3])
        if first_task_is_finetuning:
            _check_first_task(states[1], scenario, backbone)


def _check_card(build: Build) -> tuple[Scenario, ...]:
    """Check the class attributes of the strategies; return the scenarios that all of them work in."""
    for strategy in build().values():
        message = misspelt(type(strategy))
        assert message is None, message
        for name, words, known in (
            ("scenarios", strategy.scenarios, SCENARIOS),
            ("targets", strategy.targets, TARGETS),
            ("needs", strategy.needs, NEEDS),
            ("bound", (strategy.bound,), ("upper", "lower", "")),
        ):
            strange = [word for word in words if word not in known]
            assert not strange, (
                f"{type(strategy).__name__}.{name} has {strange[0]!r}: use words of {', '.join(map(repr, known))}."
            )
        for option in strategy.test_options:
            known_argument = option in inspect.signature(type(strategy)).parameters and option in vars(strategy)
            assert known_argument, (
                f"{type(strategy).__name__}.test_options has {option!r}: name arguments of its constructor that are "
                "attributes, too."
            )
    return tuple(each for each in SCENARIOS if all(each in strategy.scenarios for strategy in build().values()))


def _check_refused(build: Build, toy: Toy, scenario: Scenario) -> None:
    strategies = build()
    names = " + ".join(type(strategy).__name__ for strategy in strategies.values())
    with suppress(InputError):
        toy(strategies)
        raise AssertionError(f"{names} does not list scenario={scenario} and takes a run in it: let setup refuse it.")


def _learn(learner: Learner, stream: Stream, tasks: range) -> None:
    experiment = Experiment(learner, stream, trainer, epochs=2)
    for index in tasks:
        experiment.learn(stream[index])


def _names(learner: Learner) -> str:
    return " + ".join(type(s).__name__ for s in learner.strategies.values() if not isinstance(s, Replay))


# ---- what a strategy may not change ---------------------------------------------------------------------------------


def _check_manners(build: Build, toy: Toy) -> None:
    learner, stream = toy(build())
    _check_no_reference(learner)
    with suppress(RecursionError):  # if the learner became a sub-module of its strategy, which is checked below
        _learn(learner, stream, range(1))
    learner.trainer = None
    _check_no_reference(learner)
    x, y, task = columns = [column[:8] for column in stream[1].train.tensors()]
    for strategy in learner.strategies.values():
        batch: Batch = strategy.extend_batch(learner, Batch(x.clone(), y.clone(), task.clone()))  # type: ignore[operator]
        unchanged = batch.num_incoming == 8 and all(
            torch.equal(new[:8], old) for new, old in zip((batch.x, batch.y, batch.task), columns, strict=True)
        )
        assert unchanged, f"{type(strategy).__name__}.extend_batch changes incoming rows: only append to them."


def _check_no_reference(learner: Learner) -> None:
    for strategy in learner.strategies.values():
        assert not reaches(strategy, learner), (
            f"{type(strategy).__name__} keeps a reference to the learner: pass it, never store it."
        )


def _check_leftovers(learner: Learner, where: str) -> None:
    """Check that nothing was drawn from torch's global generator, and that all modules are in training mode."""
    state = torch.get_rng_state()
    torch.manual_seed(torch.initial_seed())
    assert torch.equal(state, torch.get_rng_state()), (
        f"{_names(learner)} ({where}) draws from torch's global generator: keep a cl.random.Random and draw from it."
    )
    for name, part in learner.trunk().items():
        asleep = not part.training and any(p.requires_grad for p in part.parameters())
        assert not asleep, f"{_names(learner)} ({where}) leaves the {name} in eval mode: use `learner.evaluating()`."


# ---- running and resuming -------------------------------------------------------------------------------------------


def _check_run(build: Build, toy: Toy, where: str) -> list[dict[str, Any]]:
    """Compare a toy run with one resumed before its last task; return the states of its checkpoints."""
    with TemporaryDirectory() as folder:
        whole, stream = toy(build())
        before = _shapes(whole)
        try:
            Experiment(whole, stream, trainer, epochs=2, directory=Path(folder)).run()
        except InputError as error:
            raise AssertionError(f"{_names(whole)} ({where}): {error}") from error
        after = _shapes(whole)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        assert not changed, f"{_names(whole)} ({where}) changes the shape of {changed}: allocate it in setup, once."
        _check_leftovers(whole, where)
        for mask, matrix in whole.matrices.items():
            R: Tensor = matrix.R  # type: ignore[assignment]
            assert bool(torch.isfinite(R).all()), f"R under the {mask} mask has unmeasured entries: {R.tolist()}."
        files = sorted(Path(folder).rglob("*.ckpt"))
        states = [torch.load(file, weights_only=True)["state_dict"] for file in files]
        files[-1].unlink()
        resumed, stream = toy(build())
        Experiment(resumed, stream, trainer, epochs=2, directory=Path(folder)).run()
    _checksame(whole, resumed, stream, where)
    return states


def _shapes(learner: Learner) -> dict[str, torch.Size | None]:
    return {name: value.shape if isinstance(value, Tensor) else None for name, value in learner.state_dict().items()}


def _checksame(whole: Learner, resumed: Learner, stream: Stream, where: str) -> None:
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        # calibration errors are computed from the predictions, which are compared below
        assert name.startswith("calibration.") or same(a, b), (
            f"{_names(whole)} ({where}): {name} differs after resuming at a task boundary: keep all state in buffers."
        )
    batch = Batch(*TaskData.concat([task.test for task in stream]).tensors())
    with torch.no_grad():
        a, b = (learner.eval().predict(batch) for learner in (whole, resumed))
    assert torch.equal(a, b), (
        f"{_names(whole)} ({where}): predictions differ after resuming at a task boundary: keep all state in buffers."
    )


def _check_hidden(build: Build, backbone: str, scenario: Scenario) -> None:
    """Compare two runs that differ in labels that a task hides."""
    found = []
    for turned in (False, True):
        learner, shown = toy_learner(scenario=scenario, backbone=backbone)
        stream = shown.derive(partial(_hidden, shown, turned))
        learner = Learner(stream, learner.backbone, build(), learner._optimizer, batch_size=8)
        _learn(learner, stream, range(len(stream)))
        found.append(learner.state_dict())
    different = [name for name, value in found[0].items() if not same(value, found[1][name])]
    assert not different, (
        f"{_names(learner)} ({scenario}): {different[0]} depend on labels that the task hides: use those of the batch."
    )


def _hidden(stream: Stream, turned: bool, position: int) -> Task:
    """Return a task of a stream, the second with hidden labels, each that of the other class if `turned`."""
    task = stream[position]
    if position != 1:
        return task
    classes = torch.tensor(task.classes)
    y = classes.flip(0)[torch.searchsorted(classes, task.train.labels)] if turned else task.train.labels
    return replace(task, train=TaskData(task.train.tensors()[0], y, 1), hidden=True)


def _check_frozen(build: Build, backbone: str, scenario: Scenario) -> None:
    """Compare a run on a frozen backbone with one on the outputs of the backbone in place of inputs."""
    found: list[Tensor] = []
    for once in (False, True):
        learner, inputs = toy_learner(num_tasks=2, scenario=scenario, backbone=backbone)
        body = learner.backbone.requires_grad_(False).eval()
        stream = past_blocks(inputs, body, len(blocks(body)), folder=None) if once else inputs
        try:
            learner = Learner(stream, body, build(), learner._optimizer, batch_size=8)
            if learner.strategies.owned("encode") or any(method.needs_inputs for method in build().values()):
                return
            _learn(learner, stream, range(len(stream)))
        except InputError:  # it trains the backbone, or needs images
            return
        with torch.no_grad():
            found.append(learner.eval().predict(Batch(*TaskData.concat([task.test for task in inputs]).tensors())))
    one, other = found
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True), (
        f"{_names(learner)} ({scenario}) predicts otherwise if it gets the outputs of a frozen backbone in place of "
        "inputs: set `needs_inputs = True` if it uses inputs or layers by itself."
    )


def _check_chunks(build: Build, toy: Toy, state: dict[str, Any]) -> None:
    for chunk_size in (7, 64):  # a run in chunks of 1 is compared by _check_inside
        learner, stream = toy(build(), chunk_size=chunk_size)
        _learn(learner, stream, range(2))
        for name, value in learner.state_dict().items():
            assert name.startswith(("matrices.", "calibration.")) or same(value, state[name]), (
                f"{_names(learner)}: {name} depends on chunk_size: count steps in a buffer, not by chunks."
            )


def _check_inside(build: Build, toy: Toy, state: dict[str, Any]) -> None:
    """Stop a run inside a task, resume it, and compare its final state with that of a run that was not stopped."""
    with TemporaryDirectory() as folder:
        learner, stream = toy(build(), chunk_size=1)
        options: dict[str, Any] = {"epochs": 2, "directory": Path(folder)}
        with suppress(Halted):
            Experiment(learner, stream, trainer, every=1, callbacks=[Halt()], **options).run()
        learner, stream = toy(build(), chunk_size=1)
        Experiment(learner, stream, trainer, **options).run()
    for name, value in learner.state_dict().items():
        assert name.startswith("calibration.") or same(value, state[name]), (
            f"{_names(learner)}: {name} differs after resuming inside a task: keep state that changes there in buffers."
        )


@functools.cache
def _finetuned(scenario: Scenario, backbone: str) -> dict[str, Any]:
    learner, stream = toy_learner(scenario=scenario, backbone=backbone)
    _learn(learner, stream, range(1))
    return {name: v for name, v in learner.state_dict().items() if name.startswith(("backbone.", "head."))}


def _check_first_task(state: dict[str, Any], scenario: Scenario, backbone: str) -> None:
    for name, tensor in _finetuned(scenario, backbone).items():
        assert torch.equal(tensor, state[name]), f"{scenario}: {name} differs from fine-tuning after one task."
