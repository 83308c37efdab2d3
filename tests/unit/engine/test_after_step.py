"""What an instrument sees after a training step: the rows that came in, and their logits before the weights moved."""

from __future__ import annotations

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from cl.data.task import Stream, Task, TaskData
from cl.engine.experiment import Experiment
from cl.engine.instrument import Instrument
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies.er import ER
from cl.testing import toy_learner

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)


class Identity(nn.Identity):
    num_features = 3


class Seen(Instrument):
    """Keeps all that it is shown, and computes as an online accuracy would."""

    file, columns = "seen", ("right",)

    def __init__(self) -> None:
        super().__init__()
        self.steps_seen: list[tuple] = []

    def after_step(self, learner, batch, logits):
        assert not logits.requires_grad and logits.shape == (len(batch), learner.num_classes)
        self.steps_seen.append((learner.step, batch.rows, batch.x.clone(), batch.y.clone(), logits.clone()))
        self.add((float((logits.argmax(1) == batch.y).float().mean()),))


def test_the_logits_of_two_examples_by_hand():
    """Softmax regression by its equations: the second example is scored by weights that learned the first alone."""
    x, y = torch.tensor([[1.0, 0.0, 2.0], [0.5, -1.0, 1.0]]), torch.tensor([0, 1])
    data = TaskData(x, y)
    stream = Stream([Task(0, data, data)], num_classes=2)
    head = nn.Linear(3, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.1, 0.2, -0.1], [0.0, -0.3, 0.2]]))
        head.bias.copy_(torch.tensor([0.05, -0.05]))
    W, b = head.weight.detach().clone(), head.bias.detach().clone()
    learner = Learner(stream, Identity(), {}, partial(torch.optim.SGD, lr=0.5), head=head, batch_size=1)
    seen = Seen()
    Experiment(learner, stream, trainer, epochs=1, instruments={"seen": seen}).run()
    assert [step for step, *_ in seen.steps_seen] == [1, 2]
    assert sorted(int(rows[0]) for _, rows, *_ in seen.steps_seen) == [0, 1]
    for _, rows, own_x, own_y, logits in seen.steps_seen:
        i = int(rows[0])
        assert torch.equal(own_x, x[i : i + 1]) and torch.equal(own_y, y[i : i + 1])
        expected = W @ x[i] + b
        torch.testing.assert_close(logits[0], expected)
        error = expected.softmax(0) - nn.functional.one_hot(y[i], 2)
        W, b = W - 0.5 * torch.outer(error, x[i]), b - 0.5 * error
    torch.testing.assert_close(learner.head.weight.detach(), W)


@pytest.mark.parametrize(
    ("strategies", "options", "accumulate"),
    [({}, {}, 1), ({"er": partial(ER, memory_size=20)}, {"chunk_size": 3}, 1), ({}, {"gradient_clip": 0.1}, 2)],
    ids=["plain", "beside replayed rows", "accumulated"],
)
def test_it_sees_what_came_in_and_changes_no_bit(strategies, options, accumulate):
    def run(instruments):
        own = {name: make() for name, make in strategies.items()}
        learner, stream = toy_learner(own, num_tasks=2, **options)
        job = partial(trainer, accumulate_grad_batches=accumulate)
        done = Experiment(learner, stream, job, epochs=2, instruments=instruments).run()
        return done, learner, stream

    seen = Seen()
    (plain, one, _), (watched, two, stream) = run({}), run({"seen": seen})
    for mask, matrix in plain.matrices.items():
        assert torch.equal(matrix.R, watched.matrices[mask].R)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), name
    steps = 2 * 48 // 8
    assert [step for step, *_ in seen.steps_seen] == 2 * list(range(1, steps + 1))
    for n, (_, rows, x, y, _) in enumerate(seen.steps_seen):
        train = stream[n // steps].train
        assert torch.equal(train.labels[rows], y) and torch.equal(train.take(torch.from_numpy(rows)).tensors()[0], x)


def test_nobody_who_does_not_ask_is_called():
    """The chain of a learner is that of its strategies before and after, and of a run without such instruments."""
    learner, stream = toy_learner(num_tasks=1)
    lengths = []

    class Peek(Instrument):
        def steps(self, learner):
            return [1]

        def look(self, learner):
            lengths.append(len(learner.strategies.chains["after_step"]))

    Experiment(learner, stream, trainer, instruments={"peek": Peek()}).run()
    assert lengths == [0]
    learner, stream = toy_learner(num_tasks=1)
    Experiment(learner, stream, trainer, instruments={"peek": Peek(), "seen": Seen()}).run()
    assert lengths == [0, 1] and learner.strategies.chains["after_step"] == []


class Doubled(Instrument):
    file, columns = "two", ("a", "b")

    def after_task(self, learner, task):
        self.add((1.0,))


class Tensors(Doubled):
    def after_task(self, learner, task):
        self.add((1.0, learner.last_loss))


class Misspelt(Instrument):
    def after_steps(self, learner, batch, logits):
        raise AssertionError


class Overwrites(Instrument):
    def transfer_matrices(self):
        from cl.metrics.transfer import TransferMatrix

        return {"class": TransferMatrix(1)}


class Climbs(Instrument):
    file, columns = "../two", ("a",)


@pytest.mark.parametrize(
    ("instruments", "sentence"),
    [
        ({"one": Doubled()}, r"Doubled adds the record \(1.0,\): give a plain number .* columns a, b"),
        ({"one": Tensors()}, "Tensors adds the record"),
        ({"one": Misspelt()}, "there is no hook called after_steps; did you mean after_step"),
        ({"one": Overwrites()}, "'one' has a transfer matrix called 'class', as another is"),
        ({"one": Doubled(), "two": Doubled()}, "'two' cannot write 'two'.csv"),
        ({"one": Climbs()}, "cannot write '../two'.csv"),
        ({"a.b": Instrument()}, "cannot be called 'a.b'"),
        ({"one": nn.Identity()}, r"'one' is Identity\(\): derive its class from cl.Instrument"),
    ],
)
def test_what_cannot_be_recorded_is_refused(instruments, sentence):
    learner, stream = toy_learner(num_tasks=1)
    with pytest.raises(InputError, match=sentence):
        Experiment(learner, stream, trainer, instruments=instruments).run()
