"""Conformance checks that the author of an outside strategy or stream can call: `check_strategy`, `check_stream`."""

from __future__ import annotations

import functools
import gc
import itertools
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from cl.errors import InputError
from cl.experiment import Experiment
from cl.learner import Learner
from cl.report import Run
from cl.rows import Mapped
from cl.strategy import Batch, Strategy
from cl.target import classes_of
from cl.task import SCENARIOS, Scenario, Stream, Task, TaskData

_trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False, barebones=False)
Build = Callable[[], Mapping[str, Strategy]]
Toy = Callable[..., tuple[Learner, Stream]]


class ToyBackbone(nn.Module):
    """Two small layers without biases, (B, 1, 4, 4) -> (B, 16); a stand-in that every strategy can take."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, 16)."""
        return self.layers(x).relu()  # type: ignore[no-any-return]


def toy_stream(num_tasks: int = 3, scenario: Scenario = "class", num_rows: int = 48, seed: int = 0) -> Stream:
    """Return separable uint8 images (1, 4, 4), two classes a task.

    Example:
        >>> [task.classes for task in toy_stream(2)]
        [(0, 1), (2, 3)]
    """
    draw = torch.Generator().manual_seed(seed)
    tasks = []
    for t in range(num_tasks):
        centres = torch.randint(30, 220, (2, 1, 4, 4), generator=draw)
        parts = []
        for n in (num_rows, 24):
            y = torch.arange(n) % 2
            noise = torch.randn(n, 1, 4, 4, generator=draw) * 20
            x = (centres[y] + noise).clamp(0, 255).to(torch.uint8)
            parts.append(TaskData(x, y if scenario == "domain" else y + 2 * t, t))
        tasks.append(Task(t, train=parts[0], test=parts[1]))
    return Stream(tasks, scenario=scenario, num_classes=2 if scenario == "domain" else 2 * num_tasks)


def toy_learner(
    strategies: Mapping[str, Strategy] | None = None,
    num_tasks: int = 3,
    scenario: Scenario = "class",
    backbone: str = "mlp",
    seed: int = 0,
    lr: float = 0.1,
    **options: Any,
) -> tuple[Learner, Stream]:
    """Return a small learner and its stream, the same for the same arguments.

    Args:
        strategies: By name.
        num_tasks: T.
        scenario: "class", "task" or "domain".
        backbone: "mlp", or "vit" for strategies that need a transformer.
        seed: Seed of weights and draws.
        lr: Learning rate of SGD.
        options: For `Learner`.

    Example:
        >>> learner, stream = toy_learner(num_tasks=2)
        >>> len(stream), learner.num_classes
        (2, 4)
    """
    stream = toy_stream(num_tasks, scenario)
    torch.manual_seed(seed)
    if backbone == "vit":
        from cl.vit import ViT

        body: nn.Module = ViT((1, 4, 4), patch_size=2, dim=16, depth=1, heads=2)
    else:
        body = ToyBackbone()
    optimizer = partial(torch.optim.SGD, lr=lr)
    return Learner(stream, body, strategies or {}, optimizer, batch_size=8, seed=seed, **options), stream


def toy_run(*strategies: Strategy, epochs: int = 2, **options: Any) -> Run:
    """Run a small experiment on the CPU; the options are those of `toy_learner`.

    Example:
        >>> R = toy_run(epochs=10).matrices["task"].R
        >>> bool(R.diagonal(-1).mean() > 0.8)
        True
    """
    learner, stream = toy_learner({type(s).__name__.lower(): s for s in strategies}, **options)
    return Experiment(learner, stream, _trainer, epochs=epochs).run()


def check_strategy(
    make: Callable[..., Strategy | Mapping[str, Strategy]],
    *,
    scenarios: tuple[Scenario, ...] = SCENARIOS,
    backbone: str = "mlp",
    first_task_is_finetuning: bool = False,
    **options: Any,
) -> None:
    """Check that a strategy keeps the contract; raise an AssertionError that says where it does not.

    It must train in each scenario; resume at a task boundary, in a newly built learner, to the same bits and the same
    predictions, from a file that loads strictly with `weights_only=True`; do so beside a replay too; give the same
    weights for every chunk size; keep its state's shapes; only append rows to a batch; leave the global generator, the
    modules' modes and the learner where they are; and, where the author says so, be fine-tuning in the first task.

    Args:
        make: Builds the strategy, or several by name: a class or a function.
        scenarios: Those that the strategy supports.
        backbone: "mlp" or "vit", see `toy_learner`.
        first_task_is_finetuning: Whether the weights after the first task must be those of fine-tuning, to the bit.
        options: Passed to `make`.

    Raises:
        AssertionError: One sentence.

    Example:
        >>> check_strategy(Strategy, first_task_is_finetuning=True)
    """

    def build() -> Mapping[str, Strategy]:
        made = make(**options)
        return made if isinstance(made, Mapping) else {"method": made}

    _check_manners(build, partial(toy_learner, scenario=scenarios[0], backbone=backbone))
    for scenario in scenarios:
        toy = partial(toy_learner, scenario=scenario, backbone=backbone)
        states = _check_run(build, toy, scenario)
        _check_run(lambda: {"replay": _Replay(), **build()}, partial(toy, num_tasks=2), f"{scenario}, beside a replay")
        if scenario == scenarios[0]:
            _check_chunks(build, toy, states[2])
        if first_task_is_finetuning:
            _check_first_task(states[1], scenario, backbone)


class _Replay(Strategy):
    """A replay that any strategy must live beside: appends the last batch."""

    x: Tensor
    y: Tensor
    task: Tensor
    full: Tensor

    def setup(self, learner: Learner, stream: Stream) -> None:
        self.register_buffer("x", torch.zeros(4, *stream.input_shape, dtype=stream.input_dtype))
        self.register_buffer("y", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("task", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("full", torch.zeros((), dtype=torch.bool))

    def extend_batch(self, learner: Learner, batch: Batch) -> Batch:
        return batch.append(Batch(self.x, self.y, self.task)) if bool(self.full) else batch

    def after_step(self, learner: Learner, batch: Batch, logits: Tensor) -> None:
        for old, new in ((self.x, batch.x), (self.y, batch.y), (self.task, batch.task)):
            old.copy_(new[:4])
        self.full.fill_(True)


def _learn(learner: Learner, stream: Stream, tasks: range) -> None:
    experiment = Experiment(learner, stream, _trainer, epochs=2)
    for index in tasks:
        experiment.learn(stream[index])


def _names(learner: Learner) -> str:
    return " + ".join(type(s).__name__ for s in learner.strategies.values() if not isinstance(s, _Replay))


# ---- what a strategy may not touch ----------------------------------------------------------------------------------


def _check_manners(build: Build, toy: Toy) -> None:
    learner, stream = toy(build())
    _check_no_reference(learner)
    with suppress(RecursionError):  # of a learner that became a module of its own strategy: found two lines on
        _learn(learner, stream, range(1))
    learner.trainer = None
    _check_no_reference(learner)
    x, y, task = columns = [column[:8] for column in stream[1].train.tensors()]
    for strategy in learner.strategies.values():
        batch: Batch = strategy.extend_batch(learner, Batch(x.clone(), y.clone(), task.clone()))  # type: ignore[operator]
        kept = batch.num_incoming == 8 and all(
            torch.equal(new[:8], old) for new, old in zip((batch.x, batch.y, batch.task), columns, strict=True)
        )
        assert kept, f"{type(strategy).__name__}.extend_batch changes incoming rows: only append to them."


def _check_no_reference(learner: Learner) -> None:
    for strategy in learner.strategies.values():
        assert not _reaches(strategy, learner), (
            f"{type(strategy).__name__} keeps a reference to the learner: pass it, never store it."
        )


def _reaches(strategy: nn.Module, learner: Learner) -> bool:
    """Follow what a strategy's attributes hold: containers, objects, closures, bound methods."""
    seen: set[int] = set()
    frontier: list[Any] = [value for module in strategy.modules() for value in vars(module).values()]
    while frontier:
        item = frontier.pop()
        if item is learner:
            return True
        if id(item) in seen or isinstance(item, Tensor | nn.Module | type | types.ModuleType):
            continue
        seen.add(id(item))
        if isinstance(item, types.FunctionType):  # without its globals
            frontier.extend((item.__closure__, item.__defaults__))
        else:
            frontier.extend(gc.get_referents(item))
    return False


def _check_leftovers(learner: Learner, where: str) -> None:
    """Check what a run leaves behind: the engine seeds torch's generator and a toy draws nothing from it."""
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
    """Run a toy experiment whole and resumed; return the state before the first task and after each."""
    with TemporaryDirectory() as folder:
        whole, stream = toy(build())
        before = _shapes(whole)
        try:
            Experiment(whole, stream, _trainer, epochs=2, directory=Path(folder)).run()
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
        Experiment(resumed, stream, _trainer, epochs=2, directory=Path(folder)).run()
    _check_same(whole, resumed, stream, where)
    return states


def _shapes(learner: Learner) -> dict[str, torch.Size | None]:
    return {name: value.shape if isinstance(value, Tensor) else None for name, value in learner.state_dict().items()}


def _check_same(whole: Learner, resumed: Learner, stream: Stream, where: str) -> None:
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        # the errors of calibration follow the predictions, which are compared below
        assert name.startswith("calibration.") or _same(a, b), (
            f"{_names(whole)} ({where}): {name} differs after resuming at a task boundary: keep all state in buffers."
        )
    batch = Batch(*TaskData.concat([task.test for task in stream]).tensors())
    with torch.no_grad():
        a, b = (learner.eval().predict(batch) for learner in (whole, resumed))
    assert torch.equal(a, b), (
        f"{_names(whole)} ({where}): predictions differ after resuming at a task boundary: keep all state in buffers."
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) if a.is_floating_point() else torch.equal(a, b)
    return bool(a == b)


def _check_chunks(build: Build, toy: Toy, state: dict[str, Any]) -> None:
    for chunk_size in (1, 7, 64):
        learner, stream = toy(build(), chunk_size=chunk_size)
        _learn(learner, stream, range(2))
        for name, value in learner.state_dict().items():
            assert name.startswith(("matrices.", "calibration.")) or _same(value, state[name]), (
                f"{_names(learner)}: {name} depends on chunk_size: count steps in a buffer, not by chunks."
            )


@functools.cache
def _finetuned(scenario: Scenario, backbone: str) -> dict[str, Any]:
    learner, stream = toy_learner(scenario=scenario, backbone=backbone)
    _learn(learner, stream, range(1))
    return {name: v for name, v in learner.state_dict().items() if name.startswith(("backbone.", "head."))}


def _check_first_task(state: dict[str, Any], scenario: Scenario, backbone: str) -> None:
    for name, tensor in _finetuned(scenario, backbone).items():
        assert torch.equal(tensor, state[name]), f"{scenario}: {name} differs from fine-tuning after one task."


# ---- streams --------------------------------------------------------------------------------------------------------


def check_stream(stream: Stream | Callable[[], Stream]) -> None:
    """Check that a stream keeps the contract; raise an error that says where it does not.

    It can be iterated twice and nested; reads the same every time, and when built anew; has every label, task label and
    number in range; keeps test examples out of every training and validation set, and validation examples out of their
    task's training set; and its augmentation and normalisation leave their input alone.

    Args:
        stream: A stream, or the function that builds it, which is then called twice.

    Raises:
        InputError: From `Stream.check`.
        AssertionError: One sentence.

    Example:
        >>> check_stream(toy_stream)
    """
    stream, again = (stream, None) if isinstance(stream, Stream) else (stream(), stream())
    stream.check()
    _check_iteration(stream)
    for task in stream:
        for part in ("train", "val", "test"):
            if getattr(task, part) is not None:
                _check_part(f"The {part} set of task {task.index} of {stream.name!r}", stream, task, part)
                if again is not None:
                    same = _equal(getattr(task, part).tensors(), getattr(again[task.index], part).tensors())
                    assert same, f"{stream.name!r} differs when built twice: draw from its seed alone."
    _check_leaks(stream)
    x = stream[0].train.take(torch.arange(min(8, len(stream[0].train)))).tensors()[0]
    if stream.augment is not None:
        augment = stream.augment
        views = [_apply("augment", lambda rows: augment(rows, np.random.default_rng(0)), x) for _ in range(2)]
        assert torch.equal(*views), "augment differs for one generator state: draw from the generator it is given."
        alike = views[0].shape == x.shape and views[0].dtype == x.dtype
        assert alike, (
            f"augment gives {views[0].dtype} {tuple(views[0].shape)} for {x.dtype} {tuple(x.shape)}: keep both."
        )
    if stream.normalize is not None:
        view = _apply("normalize", stream.normalize, x)
        assert view.is_floating_point() and bool(view.isfinite().all()), "normalize does not give finite floats."


def _check_iteration(stream: Stream) -> None:
    pairs = [(a.index, b.index) for a in stream for b in stream]
    expected = list(itertools.product(range(len(stream)), repeat=2))
    assert pairs == expected, f"Nested iteration of {stream.name!r} gives {pairs[:5]}: return a new iterator each time."
    assert stream[-1].index == len(stream) - 1, f"stream[-1] of {stream.name!r} is not its last task."
    names = len(stream.class_names)
    assert names in (0, stream.num_classes), f"{stream.name!r} names {names} of {stream.num_classes} classes: name all."


def _check_part(what: str, stream: Stream, task: Task, part: str) -> None:
    data: TaskData = getattr(task, part)
    first = [column.clone() for column in data.tensors()]  # a transform in place would change both readings
    assert _equal(first, data.tensors()), (
        f"{what} differs when read twice: draw from a fixed seed, copy before changing."
    )
    lengths = {len(column) for column in (*first, data.labels)}
    assert lengths == {len(data)}, f"{what} has columns of lengths {sorted(lengths)} and says {len(data)}."
    shape, dtype = stream.target.row(stream.num_classes)
    assert (first[1].dtype, first[1].shape[1:]) == (dtype, shape), (
        f"{what} has labels of {first[1].dtype}: make them {dtype}."
    )
    labels = first[2].unique().tolist()
    if part != "train" or not stream.repeats:
        assert labels == [task.index], f"{what} carries the task labels {labels}: give its rows the task's index."
    for label in labels:  # rows that come in another task keep the label of their own
        strange = set(classes_of(first[1][first[2] == label])) - set(stream[label].classes)
        assert not strange, (
            f"{what} has rows of classes {sorted(strange)} labelled as task {label}, which has none such."
        )
    if first[0].is_floating_point():
        assert bool(torch.isfinite(first[0]).all()), f"{what} has NaN or infinity: clean the data."


def _equal(a: Any, b: Any) -> bool:
    return all(_same(left, right) for left, right in zip(a, b, strict=True))


def _apply(what: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    kept = x.clone()
    out = function(x)
    assert torch.equal(x, kept), f"{what} changes its input in place, which memories store raw: work on a copy."
    return out


def _check_leaks(stream: Stream) -> None:
    """Look for shared rows of one storage, exactly, and for copies, of which real data hold some by chance."""
    trained = torch.cat([_addresses(task.train) for task in stream])
    for task in stream:
        test = _addresses(task.test)
        shared = int(torch.isin(test, trained).sum())
        if not shared and _copies(task.test, task.train) > len(task.test) / 2:
            shared = _copies(task.test, task.train)
        assert not shared, f"{shared} test examples of task {task.index} are trained on: keep them apart."
        if task.val is not None:
            val = _addresses(task.val)
            shared = int(torch.isin(val, _addresses(task.train)).sum())
            assert not shared, f"{shared} validation examples of task {task.index} are trained on: keep them apart."
            shared = int(torch.isin(val, torch.cat([_addresses(t.test) for t in stream])).sum())
            assert not shared, f"{shared} validation examples of task {task.index} are tested on: take them from train."


def _addresses(data: TaskData) -> Tensor:
    """Return where each row begins in memory, (n,)."""
    index = torch.arange(len(data.y)) if data.index is None else data.index.cpu()
    if isinstance(data.x, Tensor):
        return data.x.data_ptr() + index * data.x.stride(0) * data.x.element_size()
    source = data.x.path.resolve() if isinstance(data.x, Mapped) else id(getattr(data.x, "dataset", data.x))
    return (hash(source) % 2**31 << 32) + index


def _copies(a: TaskData, b: TaskData) -> int:
    known = {row.numpy().tobytes() for row in b.tensors()[0]}
    return sum(row.numpy().tobytes() in known for row in a.tensors()[0])
