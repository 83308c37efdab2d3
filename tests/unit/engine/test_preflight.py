"""What is refused before the first step: a minibatch, or a memory's draw, of one row that batch norm cannot take."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from cl.backbones.networks import MLP, ResNet18
from cl.data.task import Stream, Task, TaskData
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.preflight import takes_single_row
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies.agem import AGEM
from cl.strategies.der import DER
from cl.strategies.derpp import DERpp
from cl.strategies.er import ER
from cl.strategies.gem import GEM
from cl.strategies.joint import Joint
from cl.strategies.mir import MIR

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)


def stream_of(*sizes: int, shape: tuple[int, ...] = (3, 8, 8)) -> Stream:
    draw = torch.Generator().manual_seed(0)
    tasks = []
    for t, size in enumerate(sizes):
        y = torch.arange(size) % 2 + 2 * t
        data = TaskData(torch.rand(size, *shape, generator=draw), y, t)
        tasks.append(Task(t, data, data))
    return Stream(tasks, num_classes=2 * len(sizes), scenario="class", name="sizes")


def learner_of(stream: Stream, method: Strategy | None = None, batch_size: int = 64, **options: Any) -> Learner:
    torch.manual_seed(0)
    body = options.pop("body", None) or ResNet18(stream.input_shape, width=2)
    methods = {"method": method} if method is not None else {}
    return Learner(stream, body, methods, partial(torch.optim.SGD, lr=0.01), batch_size=batch_size)


@pytest.mark.parametrize("norm", ["batch", "batch_no_stats", "group"])
def test_a_last_minibatch_of_one_row_is_told_before_the_first_task(norm):
    stream = stream_of(64, 64, 65)
    learner = learner_of(stream, body=ResNet18((3, 8, 8), width=2, norm=norm))
    before = {name: value.clone() for name, value in learner.state_dict().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(InputError, match=r"batch_size=64 a minibatch .* row \(task 3 of 'sizes' has 65 rows\)"):
        Experiment(learner, stream, trainer)
    for name, value in learner.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value.nan_to_num(), before[name].nan_to_num())


@pytest.mark.parametrize(
    ("sizes", "options", "job"),
    [
        ((64, 66), {}, {}),
        ((64, 65), {"batch_size": 32}, {"limit_train_batches": 2}),  # the single row is not reached
        ((64, 65), {"body": MLP((3, 8, 8), [4])}, {}),
        ((65, 65), {"body": ResNet18((3, 8, 8), width=2).eval()}, {}),  # its statistics stay
        ((17, 17), {"batch_size": 16, "method": ER(8)}, {}),  # its replay joins the row, but in the first step
    ],
)
def test_what_no_single_row_meets_is_trained(sizes, options, job):
    stream = stream_of(*sizes)
    Experiment(learner_of(stream, **options), stream, partial(trainer, **job)).run()


def test_larger_images_leave_batch_norm_more_than_one_value():
    stream = stream_of(9, shape=(3, 32, 32))
    learner = learner_of(stream, batch_size=8)
    assert takes_single_row(learner, stream[0].train)
    Experiment(learner, stream, trainer).run()
    assert not takes_single_row(learner_of(stream_of(9)), stream_of(9)[0].train)


def test_rows_that_a_strategy_chose_are_told_before_its_task():
    stream = stream_of(32, 33)
    learner = learner_of(stream, Joint())
    with pytest.raises(InputError, match=r"single row \(there are 65 rows in this task\)"):
        Experiment(learner, stream, trainer).run()
    assert learner.total_steps == 0


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (lambda: GEM(memory_size=5), r"gem\.memory_size=5 passes remembered .* set it to 6 or more"),
        (lambda: AGEM(memory_size=12, batch_size=1), r"agem\.batch_size=1 passes remembered .* set it to 2 or more"),
        (lambda: DER(batch_size=1), r"der\.batch_size=1 passes remembered"),
        (lambda: DER(memory_size=1), r"der\.memory_size=1 passes remembered"),
        (lambda: DERpp(batch_size=1), r"derpp\.batch_size=1 passes remembered"),
        (lambda: MIR(batch_size=1), r"mir\.batch_size=1 passes remembered"),
    ],
)
def test_a_memory_that_is_drawn_from_one_by_one_is_named(method, named):
    stream = stream_of(16, 16, 16)
    with pytest.raises(InputError, match=named):
        learner_of(stream, method(), batch_size=8)
    learner_of(stream, method(), batch_size=8, body=MLP((3, 8, 8), [4]))
