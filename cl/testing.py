"""Conformance checks that the author of an outside strategy or stream can call: `check_strategy`, `check_stream`."""

from __future__ import annotations

import gc
import io
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from cl.experiment import Experiment
from cl.learner import Learner
from cl.report import Run
from cl.strategy import Batch, Strategy
from cl.task import SCENARIOS, Scenario, Stream, Task, TaskData

_trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False, barebones=False)


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
        from cl.backbones import ViT

        body: nn.Module = ViT((1, 4, 4), patch_size=2, dim=16, depth=1, heads=2)
    else:
        body = ToyBackbone()
    optimizer = partial(torch.optim.SGD, lr=lr)
    return Learner(stream, body, strategies or {}, optimizer, batch_size=8, seed=seed, **options), stream


def toy_run(*strategies: Strategy, epochs: int = 2, **options: Any) -> Run:
    """Run a small experiment on the CPU; the options are those of `toy_learner`.

    Example:
        >>> R = toy_run(epochs=5).matrices["task"].R
        >>> bool(R.diagonal(-1).mean() > 0.8)
        True
    """
    learner, stream = toy_learner({type(s).__name__.lower(): s for s in strategies}, **options)
    return Experiment(learner, stream, _trainer, epochs=epochs).run()


def check_strategy(
    make: Callable[..., Strategy],
    *,
    scenarios: tuple[Scenario, ...] = SCENARIOS,
    backbone: str = "mlp",
    first_task_is_finetuning: bool = False,
    **options: Any,
) -> None:
    """Check that a strategy keeps the contract; raise an AssertionError that says where it does not.

    It must train in each scenario; resume bit-equal at a task boundary in a newly built learner, from a file that
    loads strictly with `weights_only=True`; compose with replay; keep no reference to the learner; and, where the
    author says so, be plain fine-tuning in the first task.

    Args:
        make: Builds the strategy: a class or a function.
        scenarios: Those that the strategy supports.
        backbone: "mlp" or "vit", see `toy_learner`.
        first_task_is_finetuning: Whether the weights after the first task must be those of fine-tuning, to the bit.
        options: Passed to `make`.

    Raises:
        AssertionError: One sentence.

    Example:
        >>> check_strategy(Strategy, first_task_is_finetuning=True)
    """
    build = partial(make, **options)
    for scenario in scenarios:
        _check_run(build, scenario, backbone)
        _check_resume(lambda: {"method": build()}, scenario, backbone)
        _check_resume(lambda: {"replay": _Replay(), "method": build()}, scenario, backbone)
        if first_task_is_finetuning:
            _check_first_task(build, scenario, backbone)
    _check_no_reference(build, scenarios[0], backbone)


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


def _check_run(build: Callable[[], Strategy], scenario: Scenario, backbone: str) -> None:
    learner, stream = toy_learner({"method": build()}, scenario=scenario, backbone=backbone)
    before = {name: tensor.shape for name, tensor in learner.state_dict().items() if isinstance(tensor, Tensor)}
    Experiment(learner, stream, _trainer, epochs=2).run()
    after = {name: tensor.shape for name, tensor in learner.state_dict().items() if isinstance(tensor, Tensor)}
    assert before == after, f"State changed its names or shapes while learning: {sorted(before.keys() ^ after.keys())}."
    for name, matrix in learner.matrices.items():
        R: Tensor = matrix.R  # type: ignore[assignment]
        assert bool(torch.isfinite(R).all()), f"R under the {name} mask has unmeasured entries: {R.tolist()}."
        assert bool(((R >= 0) & (R <= 1)).all()), f"R under the {name} mask leaves [0, 1]: {R.tolist()}."


def _check_resume(build: Callable[[], Mapping[str, Strategy]], scenario: Scenario, backbone: str) -> None:
    whole, stream = toy_learner(build(), scenario=scenario, backbone=backbone)
    _learn(whole, stream, range(2))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    _learn(whole, stream, range(2, 3))

    file.seek(0)
    resumed, stream = toy_learner(build(), scenario=scenario, backbone=backbone, seed=0)
    for parameter in resumed.parameters():
        nn.init.zeros_(parameter)  # so that nothing can come from the initial weights by luck
    resumed.load_state_dict(torch.load(file, weights_only=True), strict=True)
    _learn(resumed, stream, range(2, 3))
    names = "+".join(build())
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert _same(a, b), (
            f"{names}, {scenario}: {name} differs after resuming at a task boundary: keep it in a buffer."
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return torch.equal(
            a.view(-1).nan_to_num(-7.0) if a.is_floating_point() else a.view(-1),
            b.view(-1).nan_to_num(-7.0) if b.is_floating_point() else b.view(-1),
        )
    return bool(a == b)


def _check_first_task(build: Callable[[], Strategy], scenario: Scenario, backbone: str) -> None:
    weights = []
    for strategies in ({}, {"method": build()}):
        learner, stream = toy_learner(strategies, num_tasks=1, scenario=scenario, backbone=backbone)
        _learn(learner, stream, range(1))
        weights.append(learner.trunk().state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), f"{scenario}: {name} differs from fine-tuning after one task."


def _check_no_reference(build: Callable[[], Strategy], scenario: Scenario, backbone: str) -> None:
    strategy = build()
    learner, stream = toy_learner({"method": strategy}, scenario=scenario, backbone=backbone)
    _learn(learner, stream, range(1))
    learner.trainer = None
    seen: set[int] = set()
    frontier: list[Any] = [value for module in strategy.modules() for value in vars(module).values()]
    while frontier:
        item = frontier.pop()
        assert item is not learner, (
            f"{type(strategy).__name__} keeps a reference to the learner: pass it, never store it."
        )
        if id(item) in seen or isinstance(item, Tensor | type | nn.Module):
            continue
        seen.add(id(item))
        if isinstance(item, dict | list | tuple | set):
            frontier.extend(itertools.chain(item, item.values() if isinstance(item, dict) else ()))
        elif callable(item):
            frontier.extend(gc.get_referents(item))


def check_stream(stream: Stream) -> None:
    """Check that a stream keeps the contract; raise an error that says where it does not.

    It can be iterated twice and nested, is the same each time, tells its shapes before training, has every task in
    range, and no example of a test set in any training set.

    Raises:
        InputError: From `Stream.check`.
        AssertionError: One sentence.

    Example:
        >>> check_stream(toy_stream())
    """
    stream.check()
    pairs = [(a.index, b.index) for a in stream for b in stream]
    expected = list(itertools.product(range(len(stream)), repeat=2))
    assert pairs == expected, f"Nested iteration of {stream.name!r} gives {pairs[:5]}: return a new iterator each time."
    assert stream[-1].index == len(stream) - 1, f"stream[-1] of {stream.name!r} is not its last task."
    for task in stream:
        for part, data in (("train", task.train), ("test", task.test), ("val", task.val)):
            if data is None:
                continue
            first, second = data.tensors(), data.tensors()
            same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            assert same, f"The {part} set of task {task.index} differs when read twice: draw from a fixed seed."
            lengths = {len(column) for column in (*first, data.labels)}
            assert lengths == {len(data)}, f"The {part} set of task {task.index} has columns of lengths {lengths}."
            labels = first[2].unique().tolist()
            assert labels == [task.index], f"The {part} set of task {task.index} carries the task labels {labels}."
            if first[0].is_floating_point():
                assert bool(torch.isfinite(first[0]).all()), f"The {part} set of task {task.index} has NaN or infinity."
        if task.val is not None:
            shared = _shared_rows(task.train, task.val)
            assert not shared, f"{shared} validation examples of task {task.index} are trained on: keep them apart."
        shared = _shared_rows(task.train, task.test)
        assert not shared, f"{shared} test examples of task {task.index} are trained on: keep them apart."


def _shared_rows(a: TaskData, b: TaskData) -> int:
    """Count the rows of two views that are one row of one base array."""
    if a.x.data_ptr() != b.x.data_ptr():
        return 0
    rows = [torch.arange(len(d.y)) if d.index is None else d.index for d in (a, b)]
    return int(torch.isin(rows[0], rows[1]).sum())
