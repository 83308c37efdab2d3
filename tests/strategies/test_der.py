"""Dark Experience Replay: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from by_hand import by_hand, close
from cl.data.stream_checks import same as equal
from cl.data.task import SCENARIOS
from cl.engine.batch import Batch
from cl.strategies.der import DER
from cl.strategies.derpp import DERpp
from toys import same, toy, trunk


def der_by_hand(alpha):
    def loss_of(net, x, y, memory, seen):
        logits = net(x)
        loss = F.cross_entropy(logits[:, :seen], y)
        if memory.rows and alpha:
            old_x, _, old_z = memory.some(len(y))
            loss = loss + alpha * ((net(old_x) - old_z) ** 2).mean()
        return loss, logits

    return by_hand(loss_of, every_epoch=True)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_der_is_the_loop_written_by_hand(alpha):
    close(toy(DER(memory_size=12, alpha=alpha), range(3), epochs=2)[0], der_by_hand(alpha))


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("size", [None, 5])
def test_der_is_derpp_without_beta_to_the_bit(scenario, size):
    def run(strategy):
        return toy(strategy, range(3), epochs=2, scenario=scenario)[0].state_dict()

    der = run(DER(memory_size=12, alpha=0.4, batch_size=size))
    derpp = run(DERpp(memory_size=12, alpha=0.4, beta=0.0, batch_size=size))
    assert equal(der, derpp)
    assert not equal(der, run(DERpp(memory_size=12, alpha=0.4, beta=0.5, batch_size=size)))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_der_without_alpha_is_finetuning_to_the_bit(scenario):
    plain = trunk(toy(None, range(3), scenario=scenario)[0])
    assert same(trunk(toy(DER(memory_size=12, alpha=0.0), range(3), scenario=scenario)[0]), plain)
    assert not same(trunk(toy(DER(memory_size=12, alpha=0.1), range(3), scenario=scenario)[0]), plain)


def test_worked_example_20():
    """The mean over rows and classes: 5/3, where the sum would be 5."""
    learner, stream = toy(DER(memory_size=1, alpha=1.0), num_tasks=2)
    strategy = learner.strategies["method"]
    x, y, task = (column[:1] for column in stream[0].train.tensors())
    with torch.no_grad():
        logits = learner(learner.prepare(x))
        stored = logits - torch.tensor([[0.0, 1.0, 2.0, 0.0]])
        strategy.after_step(learner, Batch(x, y, task), stored)
        loss = strategy.loss(learner, Batch(x, y, task), logits)
    assert float(loss) == pytest.approx(5 / 4), "of four classes; of three it would be 5 / 3"
    assert float(F.mse_loss(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3))) == pytest.approx(1.666667, abs=1e-5)


def test_der_uses_no_stored_label():
    learner, stream = toy(DER(memory_size=12), [0])
    strategy, batch = learner.strategies["method"], Batch(*stream[1].train.tensors())
    losses = []
    for label in (0, 3):
        strategy.memory.random.seed(0)
        strategy.memory.column("y").fill_(label)
        losses.append(strategy.loss(learner, batch, learner(learner.prepare(batch.x))))
    assert torch.equal(*losses) and float(losses[0].detach()) > 0
