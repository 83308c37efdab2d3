"""Experience Replay: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from by_hand import by_hand, close
from cl.data.augment import ContrastiveView
from cl.engine.batch import Batch
from cl.errors import InputError
from cl.strategies.derpp import DERpp
from cl.strategies.er import ER
from toys import Identity, build, float_stream, toy


def replay_by_hand(kind: str, alpha: float = 0.0, beta: float = 0.0) -> nn.Module:
    """ER and DER(++) in plain PyTorch for the class-incremental toy; only the draws are looked up."""

    def loss_of(net, x, y, memory, seen):
        def cross_entropy(logits, labels):
            return F.cross_entropy(logits[:, :seen], labels)

        if kind == "er":
            old = memory.some(len(y)) if memory.rows else [x[:0], y[:0]]
            logits = net(torch.cat([x, old[0]]))
            return cross_entropy(logits, torch.cat([y, old[1]])), logits[: len(y)]
        logits = net(x)
        loss = cross_entropy(logits, y)
        if memory.rows and alpha:
            mx, _, mz = memory.some(len(y))
            loss = loss + alpha * ((net(mx) - mz) ** 2).mean()
        if memory.rows and beta:
            mx, my, _ = memory.some(len(y))
            loss = loss + beta * cross_entropy(net(mx), my)
        return loss, logits

    return by_hand(loss_of, every_epoch=kind == "der")


@pytest.mark.parametrize(
    ("strategy", "hand"),
    [
        (lambda: ER(memory_size=12), {"kind": "er"}),
        (lambda: DERpp(memory_size=12, alpha=0.3, beta=0.0), {"kind": "der", "alpha": 0.3}),
        (lambda: DERpp(memory_size=12, alpha=0.0, beta=0.5), {"kind": "der", "beta": 0.5}),
        (lambda: DERpp(memory_size=12, alpha=0.3, beta=0.5), {"kind": "der", "alpha": 0.3, "beta": 0.5}),
    ],
    ids=["er", "der", "der++ without alpha", "der++"],
)
def test_replay_is_the_loop_written_by_hand(strategy, hand):
    learner, _ = toy(strategy(), range(3), epochs=2)
    close(learner, replay_by_hand(**hand))


@pytest.mark.parametrize(("every_epoch", "count"), [(False, 48), (True, 144)])
def test_er_offers_each_example_once_or_once_an_epoch(every_epoch, count):
    learner, _ = toy(ER(memory_size=10, every_epoch=every_epoch), [0], epochs=3)
    assert learner.strategies["method"].memory.num_seen == count


@pytest.mark.parametrize(("asked", "incoming", "appended"), [(None, 5, 5), (3, 5, 3), (30, 5, 20)])
def test_er_appends_as_many_rows_as_come_in_or_as_asked(asked, incoming, appended):
    learner, stream = toy(ER(memory_size=20, batch_size=asked), [0])
    x, y, task = (column[:incoming] for column in stream[1].train.tensors())
    batch = learner.strategies["method"].extend_batch(learner, Batch(x, y, task))
    assert (len(batch), batch.num_incoming) == (incoming + appended, incoming)
    assert torch.equal(batch.x[:incoming], x) and batch.x.dtype == torch.uint8
    assert set(batch.y[incoming:].tolist()) <= {0, 1} and set(batch.task[incoming:].tolist()) == {0}


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced", "ring"])
def test_er_passes_its_policy_on(policy):
    learner, _ = toy(ER(memory_size=20, policy=policy), [0, 1])
    memory = learner.strategies["method"].memory
    shares = torch.bincount(memory.sample(20).y, minlength=6).tolist()
    assert {"class_balanced": [5, 5, 5, 5, 0, 0], "ring": [4, 4, 3, 3, 0, 0]}.get(policy, shares) == shares


def test_with_a_second_view_each_example_is_trained_on_twice():
    view = ContrastiveView(flip=False)
    learner, stream = toy(ER(memory_size=10, second_view=view), [0])
    strategy, incoming = learner.strategies["method"], Batch(*(column[:5] for column in stream[1].train.tensors()))
    learner.augment_random.seed(3)
    batch = strategy.extend_batch(learner, incoming)
    assert len(batch) == 20 and batch.num_incoming == 5 and batch.x.dtype == torch.uint8
    assert batch.y[:10].tolist() == batch.y[10:].tolist() and batch.task[:10].tolist() == batch.task[10:].tolist()
    expected = view(batch.x[:10], np.random.Generator(np.random.PCG64(3)))
    assert float((batch.x[10:] / 255 - expected).abs().max()) <= 0.5 / 255 + 1e-6
    assert strategy.memory.num_seen == 48, "no second view is stored"
    with pytest.raises(InputError, match=r"er\.second_view crops images, but the inputs of .* are \(3,\)"):
        build(float_stream([torch.zeros(4, 3)], [torch.arange(4) % 2]), Identity(3), ER(second_view=view))
