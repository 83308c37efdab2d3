"""What optimizer and schedule keep from task to task, and where a stream has no boundaries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau

from cl.data.task import Stream, Task
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.optimizer_state import Carried
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.random import derive
from cl.strategies.gdumb import GDumb
from cl.streams.boundary_free import boundary_free
from cl.testing import ToyBackbone, toy_stream

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)
BATCH, EPOCHS = 8, 2
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "momentum": partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "fused": partial(torch.optim.Adam, lr=0.01, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
}


def stream_of(boundaries: bool) -> Stream:
    stream = toy_stream(3, "domain")
    return stream if boundaries else boundary_free(stream)


def learner_of(
    stream: Stream, optimizer: str, strategies: dict[str, Strategy] | None = None, **options: Any
) -> Learner:
    torch.manual_seed(0)
    return Learner(stream, ToyBackbone(), strategies or {}, OPTIMIZERS[optimizer], batch_size=BATCH, **options)


def by_hand(stream: Stream, optimizer: str, steps: int | None = None) -> list[torch.Tensor]:
    """One optimizer for the whole stream; where steps are given, one cosine over them."""
    torch.manual_seed(0)
    net = nn.Sequential(ToyBackbone(), nn.Linear(16, stream.num_classes))
    made = OPTIMIZERS[optimizer](net.parameters())
    schedule = CosineAnnealingLR(made, T_max=steps) if steps else None
    for task in stream:
        x, y, _ = task.train.tensors()
        for epoch in range(EPOCHS):
            rows = torch.arange(len(y))
            if stream.boundaries:
                draw = np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch))
                rows = torch.from_numpy(draw.permutation(len(y)))
            for some in rows.split(BATCH):
                made.zero_grad()
                F.cross_entropy(net(x[some].float() / 255), y[some]).backward()
                made.step()
                if schedule is not None:
                    schedule.step()
    return list(net.parameters())


def trained(learner: Learner) -> list[torch.Tensor]:
    return [*learner.backbone.parameters(), *learner.head.parameters()]


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("boundaries", [True, False])
def test_an_optimizer_that_is_kept_is_one_optimizer_for_the_whole_stream(optimizer, boundaries):
    stream = stream_of(boundaries)
    learner = learner_of(stream, optimizer, optimizer_state="keep" if boundaries else "reset")
    Experiment(learner, stream, trainer, epochs=EPOCHS).run()
    for ours, theirs in zip(trained(learner), by_hand(stream, optimizer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    again = learner_of(stream, optimizer)
    Experiment(again, stream, trainer, epochs=EPOCHS).run()
    assert boundaries != torch.equal(trained(again)[0], trained(learner)[0])


def test_without_boundaries_one_schedule_goes_over_all_steps():
    stream = stream_of(False)
    steps = EPOCHS * sum(-(-len(task.train) // BATCH) for task in stream)
    learner = learner_of(stream, "momentum", scheduler=partial(CosineAnnealingLR), scheduler_interval="step")
    Experiment(learner, stream, trainer, epochs=EPOCHS).run()
    for ours, theirs in zip(trained(learner), by_hand(stream, "momentum", steps), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


class Stop(Exception):
    """Ends a run from outside."""


class StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.total_steps == self.step:
            raise Stop


STEPS, CADENCES = [1, 7, 12, 13, 20, 30], [None, 1, 5]
KILLS = [
    pytest.param(at, every, marks=[] if (i + j) % 6 == 2 else [pytest.mark.slow])
    for i, at in enumerate(STEPS)
    for j, every in enumerate(CADENCES)
]


@pytest.mark.parametrize("boundaries", [True, False])
@pytest.mark.parametrize(("at", "every"), KILLS)
def test_a_run_killed_anywhere_goes_on_with_what_its_optimizer_held(tmp_path: Path, boundaries, at, every):
    def experiment(folder: Path | None, *callbacks: pl.Callback) -> Experiment:
        stream = stream_of(boundaries)
        options = {"scheduler": partial(CosineAnnealingLR), "scheduler_interval": "step", "chunk_size": 1}
        learner = learner_of(stream, "adam", optimizer_state="keep", **options)
        return Experiment(learner, stream, trainer, epochs=EPOCHS, directory=folder, every=every, callbacks=callbacks)

    whole = experiment(None)
    whole.run()
    with pytest.raises(Stop):
        experiment(tmp_path, StopAt(at)).run()
    again = experiment(tmp_path)
    again.run()
    for ours, theirs in zip(trained(again.learner), trained(whole.learner), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_that_join_later_begin_anew_and_the_others_go_on():
    class Late(Strategy):
        def before_task(self, learner: Learner, task: Task) -> None:
            learner.backbone.requires_grad_(task.index > 0)

    stream = stream_of(True)
    learner = learner_of(stream, "adam", {"late": Late()}, optimizer_state="keep")
    Experiment(learner, stream, trainer, epochs=1).run()
    kept = learner.get_extra_state()["optimizer"]["weights"]
    steps = [-(-len(task.train) // BATCH) for task in stream]
    assert int(kept["head.weight"]["step"]) == sum(steps)
    assert {int(kept[name]["step"]) for name in kept if name.startswith("backbone")} == {sum(steps[1:])}


def test_a_strategy_that_goes_back_to_initial_weights_begins_with_a_new_optimizer():
    found = []
    for state in ("reset", "keep"):
        stream = stream_of(True)
        learner = learner_of(stream, "adam", {"gdumb": GDumb(memory_size=12)}, optimizer_state=state)
        Experiment(learner, stream, trainer, epochs=1).run()
        found.append(trained(learner)[0])
    assert torch.equal(*found)


def test_an_optimizer_of_another_kind_takes_nothing_over():
    stream, carried = stream_of(True), Carried("keep", boundaries=True)
    learner = learner_of(stream, "momentum")
    carried.load({"kind": "Adam", "weights": {"head.weight": {"step": torch.tensor(3.0)}}})
    optimizer = learner.new_optimizer(learner.parameters())
    carried.take_over(learner, optimizer, None)
    assert not optimizer.state


def test_what_is_unknown_is_refused():
    for options in ({"optimizer_state": "forget"}, {"scheduler_interval": "hour"}):
        with pytest.raises(InputError, match="is unknown: use"):
            learner_of(stream_of(True), "adam", **options)


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
    ("schedule", "epochs", "interval", "told"),
    [
        (partial(CosineAnnealingLR), 1, "epoch", "leaves the learning rate at 0.01"),
        (partial(CosineAnnealingLR, T_max=None), 1, "step", None),
        (partial(CosineAnnealingLR), 2, "epoch", None),
        (partial(OneCycleLR, max_lr=0.1, total_steps=10), 1, "epoch", "leaves the learning rate at 0.004"),
        (partial(OneCycleLR, max_lr=0.1, total_steps=2), 1, "step", "cannot step"),
        (partial(OneCycleLR, max_lr=0.1), 1, "step", None),
        (partial(OneCycleLR, max_lr=0.1, epochs=5, steps_per_epoch=6), 1, "step", None),
        (partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=None), 1, "step", None),
        (partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[30]), 5, "epoch", "5 epochs"),
        (partial(torch.optim.lr_scheduler.LinearLR), 1, "epoch", "leaves the learning rate at 0.0033"),
        (partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0), 1, "epoch", None),
        (partial(ReduceLROnPlateau), 3, "epoch", "ReduceLROnPlateau leaves"),
        (partial(ReduceLROnPlateau, patience=0), 3, "step", "every epoch"),
    ],
)
def test_a_schedule_that_cannot_move_is_told_before_anything_is_trained(schedule, epochs, interval, told):
    stream = stream_of(True)
    learner = learner_of(stream, "adam", scheduler=schedule, scheduler_interval=interval)
    if told is not None and told in ("cannot step", "every epoch"):
        with pytest.raises(InputError, match=told):
            Experiment(learner, stream, trainer, epochs=epochs)
        return
    notes = " ".join(Experiment(learner, stream, trainer, epochs=epochs).run_view.notes)
    assert "does not move" not in notes if told is None else told in notes


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_cosine_by_steps_ends_where_the_task_does(accumulate):
    stream, rates = stream_of(True), []

    class Watch(Strategy):
        def project_gradients(self, learner: Learner) -> None:
            rates.append(learner.optimizers().param_groups[0]["lr"])

    learner = learner_of(stream, "adam", {"watch": Watch()}, scheduler=CosineAnnealingLR, scheduler_interval="step")
    Experiment(learner, stream, partial(trainer, accumulate_grad_batches=accumulate), epochs=EPOCHS).run()
    steps = EPOCHS * -(-len(stream[0].train) // BATCH // accumulate)
    expected = [0.005 * (1 + torch.cos(torch.tensor(torch.pi * k / steps))) for k in range(steps)]
    assert rates[:steps] == pytest.approx([float(rate) for rate in expected], abs=1e-6)
    assert rates[steps] == pytest.approx(0.01)
