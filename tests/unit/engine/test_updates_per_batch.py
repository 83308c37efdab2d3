"""Several updates on each incoming batch, each with newly drawn replayed examples."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LinearLR

import cl
from cl.engine.experiment import Experiment
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies.er import ER
from cl.strategies.si import SI
from cl.testing import toy_learner, toy_stream
from cl.testing.toys import trainer


class Sees(Strategy):
    """Notes which examples each update is made on."""

    def __init__(self) -> None:
        super().__init__()
        self.incoming: list[list[int]] = []
        self.replayed: list[list[float]] = []
        self.steps: list[int] = []

    def loss(self, learner, batch, logits):
        n = batch.num_incoming
        self.incoming.append(batch.rows.tolist())
        self.replayed.append(batch.x[n:].float().flatten(1).sum(1).tolist())
        return None

    def after_step(self, learner, batch, logits):
        self.steps.append(learner.step)


def test_each_update_has_the_same_incoming_and_other_replayed_examples():
    sees, er = Sees(), ER(memory_size=40)
    learner, stream = toy_learner({"er": er, "sees": sees}, num_tasks=2, updates_per_batch=3)
    Experiment(learner, stream, trainer, epochs=1).run()
    assert len(sees.incoming) == 2 * 6 * 3
    for k in range(0, 36, 3):
        assert sees.incoming[k] == sees.incoming[k + 1] == sees.incoming[k + 2]
    assert sum(sees.replayed[k] != sees.replayed[k + 1] for k in range(3, 36, 3)) >= 10
    assert sees.steps[:7] == [1, 1, 1, 2, 2, 2, 3]
    assert er.memory.num_seen == 96, "each incoming example is offered to the memory once"


def test_it_is_plain_training_on_a_stream_that_repeats_each_batch():
    """Without replay, U updates on each batch are one update on each of U copies; also for a path integral (SI)."""

    def weights(updates, repeats):
        learner, stream = toy_learner({"si": SI()}, num_tasks=1, updates_per_batch=updates)
        stream.boundaries = learner.shuffle = False
        data = stream[0].train
        order = torch.arange(48).view(6, 1, 8).expand(6, repeats, 8).flatten()
        task = stream.derive(lambda t: stream[t].each(lambda d: d if d is not data else d.take(order)))
        experiment = Experiment(learner, task, trainer, epochs=1)
        experiment.run()
        return torch.cat([p.detach().flatten() for p in learner.parameters()]), learner.state_dict()

    (one, state), (other, expected) = weights(3, 1), weights(None, 3)
    assert torch.equal(one, other)
    paths = [name for name in state if name.startswith("strategies.si") and isinstance(state[name], torch.Tensor)]
    assert paths and all(torch.equal(state[name], expected[name]) for name in paths)


def test_per_step_schedules_move_with_each_update():
    rates: list[float] = []

    class Rates(Strategy):
        def project_gradients(self, learner):
            rates.append(next(iter(learner.learning_rates().values())))

    schedule = partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=None)
    learner, stream = toy_learner(
        {"rates": Rates()}, num_tasks=1, updates_per_batch=2, scheduler=schedule, scheduler_interval="step"
    )
    Experiment(learner, stream, trainer, epochs=2).run()
    assert rates == pytest.approx([0.1 * (1 - k / 24) for k in range(24)])


def test_it_does_not_share_updates_with_other_batches():
    with pytest.raises(InputError, match=r"updates_per_batch=2 contradicts trainer\.accumulate_grad_batches=3"):
        trainer_options = {"accelerator": "cpu", "accumulate_grad_batches": 3}
        cl.run(toy_stream(2), [], epochs=1, updates_per_batch=2, trainer=trainer_options, progress=False)


def test_the_costs_count_every_update():
    for updates, steps in ((None, 6), (3, 18)):
        run = cl.run(
            toy_stream(2),
            [],
            epochs=1,
            batch_size=8,
            updates_per_batch=updates,
            progress=False,
            trainer={"accelerator": "cpu"},
        )
        assert run.instruments["resources"].column("steps") == [steps, steps]
