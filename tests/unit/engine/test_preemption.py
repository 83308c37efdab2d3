"""A task taken up again in its middle: optimizers, schedules, accumulation, dropout, curves, signals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

from cl.data.task import Task
from cl.engine import checkpoint
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.preemption import TaskCheckpoints, cadence
from cl.engine.strategy import Strategy
from cl.errors import InputError, Preempted
from cl.measure.learning_curves import LearningCurves
from cl.report.tables import FileReport
from cl.report.training import TrainingReport
from cl.report.wandb import WandbReport
from cl.strategies.er import ER
from cl.strategies.lwf import LwF
from cl.testing import toy_learner
from wandb_file import items, parse

EPOCHS, STEPS = 3, 6  # an epoch
trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
}
SCHEDULES: dict[str, Callable[..., Any] | None] = {
    "constant": None,
    "cosine": partial(CosineAnnealingLR),
    "multistep": partial(MultiStepLR, milestones=[1, 2]),
    "one cycle": partial(OneCycleLR, max_lr=0.1, total_steps=EPOCHS + 1),
}


class Stop(Exception):
    """Ends a run from outside."""


class StopAt(pl.Callback):
    """Acts before a step of the stream."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.total_steps >= self.step:
            self.step = 10**9
            self.act()


class Counting(pl.Callback):
    """A callback with a state of its own."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.count += len(batch)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def experiment(
    folder: Path | None, optimizer: str = "sgd", schedule: str = "constant", accumulate: int = 1, **options: Any
) -> Experiment:
    learner, stream = toy_learner({"er": ER(memory_size=10), "lwf": LwF()}, chunk_size=options.pop("chunk_size", 1))
    torch.manual_seed(1)
    learner.backbone.layers.append(nn.Dropout(0.3))
    learner.log_every = learner._curves.every = 4
    learner._optimizer, learner._scheduler = OPTIMIZERS[optimizer], SCHEDULES[schedule]
    make = partial(trainer, accumulate_grad_batches=accumulate)
    training, more = TrainingReport(), options.pop("reports", [])
    return Experiment(
        learner,
        stream,
        make,
        epochs=EPOCHS,
        directory=folder,
        reports=[FileReport(), training, *more] if folder is not None else [],
        logger=[training.logger, *(report.logger for report in more)],
        instruments={"curves": LearningCurves(stream, every=4)},
        **options,
    )


def same(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the names of what differs."""
    tensors = {k: v for k, v in a.items() if isinstance(v, torch.Tensor)}
    return [k for k, v in tensors.items() if not torch.equal(v.nan_to_num(-7.0), b[k].nan_to_num(-7.0))]


def stop_and_go_on(folder: Path, at: int, every: int | str | None, **options: Any) -> Experiment:
    def stop() -> None:
        raise Stop

    halted = experiment(folder, every=every, callbacks=[StopAt(at, stop)], **options)
    with pytest.raises(Stop):
        halted.run()
    again = experiment(folder, every=every, **options)
    again.run()
    return again


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    at=st.integers(1, 3 * EPOCHS * STEPS - 1),
    every=st.sampled_from([1, 2, 5]),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    accumulate=st.sampled_from([1, 4]),
    chunk_size=st.sampled_from([1, 3, None]),
)
def test_a_run_that_stops_anywhere_ends_with_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory,
    at: int,
    every: int,
    optimizer: str,
    schedule: str,
    accumulate: int,
    chunk_size: int | None,
) -> None:
    place = tmp_path_factory.mktemp("pause")
    options = {"optimizer": optimizer, "schedule": schedule, "accumulate": accumulate}
    whole = experiment(place / "whole", **options)
    whole.run()
    again = stop_and_go_on(place / "cut", at, every, chunk_size=chunk_size, **options)
    assert same(whole.learner.state_dict(), again.learner.state_dict()) == []
    for name in ("transfer.csv", "learning_curves.csv", "training.csv"):
        assert (place / "cut" / name).read_bytes() == (place / "whole" / name).read_bytes(), name


class Halt(Strategy):
    """Ends the run when a task has been trained."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at = at

    def after_task(self, learner: Learner, task: Task) -> None:
        if task.index == self.at:
            raise Stop


def test_stopping_early_begins_anew_with_each_task_and_stays_stopped(tmp_path: Path) -> None:
    def stopping(folder: Path, halt: int | None) -> Experiment:
        learner, stream = toy_learner({"halt": Halt(halt)})
        watched = stream.derive(lambda t: replace(stream[t], val=stream[t].test))
        patient = pl.callbacks.EarlyStopping("val/loss", min_delta=9.0, patience=1)  # nothing is better than the first
        return Experiment(
            learner, watched, trainer, epochs=5, directory=folder, every=1, callbacks=[patient], config={}
        )

    whole = stopping(tmp_path / "whole", None)
    whole.run()
    assert whole.learner.total_steps == 3 * 2 * STEPS
    with pytest.raises(Stop):
        stopping(tmp_path / "cut", 1).run()
    again = stopping(tmp_path / "cut", None)
    again.run()
    assert again.learner.total_steps == 3 * 2 * STEPS
    assert same(whole.learner.state_dict(), again.learner.state_dict()) == []


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("max_epochs", 7, "epochs"),
        ("max_steps", 3, "limit_train_batches"),
        ("max_time", "00:00:01:00", "epochs"),
        ("callbacks", [pl.Callback()], "callbacks"),
        ("val_check_interval", 0.5, r"report\.every"),
    ],
)
def test_what_a_trainer_cannot_be_told_in_a_stream_is_named(key: str, value: object, instead: str) -> None:
    learner, stream = toy_learner()
    with pytest.raises(InputError, match=rf"trainer\.{key}=.*{instead}"):
        Experiment(learner, stream, partial(trainer, **{key: value}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_goes_on_inside_a_task_with_its_curves(tmp_path: Path) -> None:
    def make(folder: Path, **options: Any) -> Experiment:
        found = experiment(folder, every=1, **options)
        found._trainer = partial(pl.Trainer, accelerator="gpu", devices=1)
        return found

    def stop() -> None:
        raise Stop

    make(tmp_path / "whole").run()
    with pytest.raises(Stop):
        make(tmp_path / "cut", callbacks=[StopAt(25, stop)]).run()
    make(tmp_path / "cut").run()
    for name in ("transfer.csv", "learning_curves.csv", "training.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(("at", "steps"), [(5, 4), (8, 8), (25, 24), (18 + 15, 18 + 14)])
def test_it_goes_on_from_the_last_multiple_of_the_cadence(tmp_path: Path, at: int, steps: int) -> None:
    def stop() -> None:
        raise Stop

    halted = experiment(tmp_path, every=2, callbacks=[StopAt(at, stop)])
    with pytest.raises(Stop):
        halted.run()
    learned = (at - 1) // 18
    found = checkpoint.inside(tmp_path / "checkpoints", learned)
    assert found is not None and checkpoint.steps(found) + 18 * learned == steps
    assert len(list((tmp_path / "checkpoints").glob("in_task_*"))) <= 2


def test_the_end_of_a_task_lets_those_inside_it_go(tmp_path: Path) -> None:
    experiment(tmp_path, every=1).run()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"after_task_{k:03d}.ckpt" for k in range(4)
    ]


def test_a_torn_one_inside_a_task_falls_back_to_the_one_before(tmp_path: Path) -> None:
    whole = experiment(None)
    whole.run()
    for torn in (1, 2):
        place = tmp_path / str(torn)

        def stop() -> None:
            raise Stop

        with pytest.raises(Stop):
            experiment(place, every=3, callbacks=[StopAt(31, stop)]).run()
        inside = sorted((place / "checkpoints").glob("in_task_*"), reverse=True)
        assert len(inside) == 2
        for path in inside[:torn]:
            path.write_bytes(path.read_bytes()[:-200])
        again = experiment(place, every=3)
        with pytest.warns(UserWarning, match="torn or changed"):
            again.run()
        assert same(whole.learner.state_dict(), again.learner.state_dict()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_the_task_and_ends_the_run(tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    send = StopAt(22, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Preempted) as stopped:
        experiment(tmp_path, every=None, callbacks=[send]).run()
    assert stopped.value.saved and stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert checkpoint.steps(checkpoint.inside(tmp_path / "checkpoints", 1)) == 5  # the step that was begun is whole
    whole, again = experiment(None), experiment(tmp_path)
    whole.run()
    again.run()
    assert same(whole.learner.state_dict(), again.learner.state_dict()) == []


def test_a_signal_between_tasks_ends_the_run_at_once_and_others_are_told(tmp_path: Path) -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: told.append(number))
    try:
        cut = experiment(tmp_path)
        evaluate = cut.evaluate

        def send() -> None:
            evaluate()
            if cut.learner.tasks_learned == 1:
                os.kill(os.getpid(), signal.SIGUSR2)

        cut.evaluate = send  # type: ignore[method-assign]
        with pytest.raises(Preempted) as stopped:
            cut.run()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not stopped.value.saved and told == [signal.SIGUSR2]
    whole, again = experiment(None), experiment(tmp_path)
    whole.run()
    again.run()
    assert same(whole.learner.state_dict(), again.learner.state_dict()) == []


def test_ctrl_c_saves_too(tmp_path: Path) -> None:
    send = StopAt(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        experiment(tmp_path, callbacks=[send]).run()
    assert checkpoint.steps(checkpoint.inside(tmp_path / "checkpoints", 0)) == 5


def test_other_callbacks_go_on_with_their_state(tmp_path: Path) -> None:
    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        experiment(tmp_path, every=1, callbacks=[Counting(), StopAt(10, stop)]).run()
    counting = Counting()
    last = experiment(tmp_path, every=1, callbacks=[counting])
    with pytest.raises(Stop):
        last._callbacks.append(StopAt(12, stop))
        last.run()
    assert counting.count == 12


def test_weights_and_biases_gets_every_point_once(offline: Path) -> None:
    def stop() -> None:
        raise Stop

    whole = WandbReport()
    experiment(offline / "whole", reports=[whole]).run()
    for at in (9, 30, 47, None):
        report = WandbReport()
        callbacks = [StopAt(at, stop)] if at is not None else []
        cut = experiment(offline / "cut", every=5, reports=[report], callbacks=callbacks)
        if at is None:
            cut.run()
        else:
            with pytest.raises(Stop):
                cut.run()
    expected, found = history(offline / "whole"), history(offline / "cut")
    assert len(expected) > 30
    assert [key for key in sorted(found, key=str)] == [key for key in sorted(expected, key=str)]


def history(directory: Path) -> list[tuple[Any, ...]]:
    """Return the points of all offline parts: where they stand, and the curves in them."""
    found = []
    for path in sorted(directory.glob("wandb/offline-run-*/run-*.wandb")):
        for _ in range(600):
            entries = list(parse(path.read_bytes()))
            if entries and entries[-1].WhichOneof("record_type") == "exit":
                break
            time.sleep(0.1)
        for entry in entries:
            if entry.WhichOneof("record_type") == "history":
                point = items(entry.history.item)
                kept = {k: v for k, v in point.items() if k.startswith(("train/", "curve/")) or k == "tasks_learned"}
                found.append((point["_step"], tuple(sorted(kept.items()))))
    return found


def test_a_cadence_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("cl.engine.preemption.time.monotonic", lambda: now[0])
    pause = TaskCheckpoints("2min", lambda state: None)
    now[0] = 119.9
    assert not pause.due
    now[0] = 120.0
    assert pause.due


@pytest.mark.parametrize("every", [0, -1, "soon", "10", "10 days", 1.5, True, "0.5.1s"])
def test_a_cadence_that_is_none_is_told(every: Any) -> None:
    with pytest.raises(InputError, match=r"checkpoint\.every=.* is no cadence"):
        cadence(every)
