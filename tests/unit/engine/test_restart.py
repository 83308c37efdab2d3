"""A strategy that restarts optimizer and schedule inside a task, and asks for epochs of its own."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from cl.data.stream_checks import same
from cl.engine.experiment import Experiment
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.testing import check_strategy, toy_learner
from cl.testing.toys import Halt, Halted, trainer

MOMENTUM = {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}


class TwoPasses(Strategy):
    """Learns each task twice, the second time with a new optimizer and the head alone."""

    def before_task(self, learner, task):
        learner.backbone.requires_grad_(True)

    def more_epochs(self, epochs):
        return epochs

    def after_epoch(self, learner, task, epoch):
        if epoch + 1 == learner.epochs // 2:
            learner.backbone.requires_grad_(False)


class Restarts(Strategy):
    """Restarts the optimizer after the first epoch of each task."""

    def after_epoch(self, learner, task, epoch):
        if epoch == 0:
            learner.restart_optimizer()


class Rates(Strategy):
    """Notes the learning rate and the momentum of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []
        self.fresh: list[bool] = []

    def project_gradients(self, learner):
        optimizer: Any = learner.optimizers(use_pl_optimizer=False)
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.fresh.append(not optimizer.state)


def learner_of(strategies: dict[str, Strategy], **options: Any) -> Any:
    learner, stream = toy_learner(strategies, num_tasks=2, chunk_size=1, **options)
    learner._optimizer = MOMENTUM["optimizer"]
    return learner, stream


def test_the_second_pass_begins_with_a_new_optimizer_and_a_new_schedule():
    rates = Rates()
    learner, stream = learner_of({"two": TwoPasses(), "rates": rates}, scheduler=CosineAnnealingLR)
    Experiment(learner, stream, trainer, epochs=2).run()
    steps = 6
    cosine = [0.1, 0.05]  # over two epochs, from .1 down
    assert rates.rates == pytest.approx(2 * [rate for rate in 2 * cosine for _ in range(steps)])
    assert [n for n, fresh in enumerate(rates.fresh) if fresh] == [0, 12, 24, 36]


def test_per_step_schedules_span_what_is_left():
    rates = Rates()
    learner, stream = learner_of(
        {"two": TwoPasses(), "rates": rates}, scheduler=CosineAnnealingLR, scheduler_interval="step"
    )
    Experiment(learner, stream, trainer, epochs=2).run()
    one = [0.05 * (1 + torch.cos(torch.tensor(torch.pi * k / 12)).item()) for k in range(12)]
    assert rates.rates == pytest.approx(4 * one, abs=1e-6)


def test_a_restart_spans_the_epochs_that_are_left():
    rates = Rates()
    learner, stream = learner_of({"one": Restarts(), "rates": rates}, scheduler=CosineAnnealingLR)
    Experiment(learner, stream, trainer, epochs=3).run()
    assert rates.rates == pytest.approx(2 * [rate for rate in (0.1, 0.1, 0.05) for _ in range(6)])
    assert [n for n, fresh in enumerate(rates.fresh) if fresh] == [0, 6, 18, 24]


def test_added_epochs_need_boundaries():
    learner, stream = learner_of({"two": TwoPasses()})
    stream.boundaries = False
    with pytest.raises(InputError, match="two adds 2 epochs to each task"):
        Experiment(learner, stream, trainer, epochs=2)


def test_the_phase_reaches_only_the_weights_that_it_leaves_free():
    learner, stream = learner_of({"two": TwoPasses()})
    seen: list[torch.Tensor] = []

    class Watch(Strategy):
        def after_epoch(self, learner, task, epoch):
            seen.append(torch.cat([p.detach().flatten() for p in learner.backbone.parameters()]))

    learner, stream = learner_of({"two": TwoPasses(), "watch": Watch()})
    Experiment(learner, stream, trainer, epochs=2).run()
    moved = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moved == [True, False, False, True, True, False, False], "epochs 1-2 of 4 move the backbone"


@pytest.mark.parametrize("at", [3, 8, 14, 20])
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("method", [TwoPasses, Restarts])
def test_it_resumes_with_the_same_bits_before_and_after_the_restart(at, interval, method, tmp_path: Path):
    class HaltAt(Halt):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.task_index == 1 and pl_module.step == at:
                raise Halted

    def experiment(directory: Path, **more: Any) -> Experiment:
        learner, stream = learner_of(
            {"own": method()}, scheduler=CosineAnnealingLR, scheduler_interval=interval, optimizer_state="keep"
        )
        return Experiment(learner, stream, trainer, epochs=4 if method is Restarts else 2, directory=directory, **more)

    whole = experiment(tmp_path / "whole")
    whole.run()
    with suppress(Halted):
        experiment(tmp_path / "stopped", every=1, callbacks=[HaltAt()]).run()
    resumed = experiment(tmp_path / "stopped")
    resumed.run()
    for name, value in whole.learner.state_dict().items():
        assert same(value, resumed.learner.state_dict()[name]), name


def test_it_keeps_the_contract():
    check_strategy(TwoPasses, scenarios=("class",))


def test_elsewhere_it_is_refused():
    class Early(Strategy):
        def before_task(self, learner, task):
            learner.restart_optimizer()

    class InStep(Strategy):
        def after_step(self, learner, batch, logits):
            learner.restart_optimizer()

    for strategy in (Early(), InStep()):
        learner, stream = toy_learner({"one": strategy})
        with pytest.raises(InputError, match=r"restart_optimizer\(\) is for after_epoch"):
            Experiment(learner, stream, trainer, epochs=1).run()
