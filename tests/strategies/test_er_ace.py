"""ER with asymmetric cross-entropy: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from by_hand import by_hand, close
from cl.engine.batch import Batch
from cl.engine.strategy import Strategy
from cl.strategies import er_ace
from cl.strategies.er_ace import ERACE
from draws import quick, seeds
from toys import toy


def test_worked_example_21():
    logits, y = torch.tensor([[2.0, 1.0, 0.5, 0.0]]), torch.tensor([2])
    masked = er_ace.without(logits, torch.tensor([True, True, False, False]))
    assert float(F.cross_entropy(masked, y)) == pytest.approx(0.474077, abs=1e-5)
    assert float(F.cross_entropy(logits, y)) == pytest.approx(2.046006, abs=1e-5)


@pytest.mark.parametrize("every_epoch", [False, True])
def test_er_ace_is_the_loop_written_by_hand(every_epoch):
    def loss_of(net, x, y, memory, seen):
        old_x, old_y = memory.some(len(y))[:2] if memory.rows else (x[:0], y[:0])
        logits = net(torch.cat([x, old_x]))
        present = sorted(set(y.tolist()))  # the softmax over them alone
        loss = F.cross_entropy(logits[: len(y)][:, present], torch.tensor([present.index(c) for c in y.tolist()]))
        if len(old_y):
            loss = loss + F.cross_entropy(logits[len(y) :, :seen], old_y)
        return loss, logits[: len(y)]

    learner, _ = toy(ERACE(memory_size=12, every_epoch=every_epoch), range(3), epochs=2)
    close(learner, by_hand(loss_of, every_epoch=every_epoch))


def one_batch(strategy: Strategy, scenario: str, labels, num_old: int = 4, **options):
    """Return a learner in its third task, a batch of incoming rows of the third task with old ones behind, logits."""
    learner, stream = toy(strategy, [0, 1], scenario=scenario, **options)
    learner.before_task(stream[2])
    x, y, task = stream[2].train.tensors()
    rows = torch.tensor([int((y == c).nonzero()[i]) for i, c in enumerate(labels)])
    old = Batch(*(column[:num_old] for column in stream[0].train.tensors()))
    batch = Batch(x[rows], y[rows], task[rows]).append(old)
    batch.view = learner.prepare(batch.x)
    return learner, stream, batch, learner(batch.view)


@pytest.mark.parametrize(
    ("scenario", "train_mask", "labels", "allowed", "old"),
    [
        ("class", None, [4, 4], [4], [0, 1, 2, 3, 4, 5]),
        ("class", None, [4, 5], [4, 5], [0, 1, 2, 3, 4, 5]),
        ("task", None, [5, 5], [5], [0, 1]),
        ("domain", None, [0, 0], [0], [0, 1]),
        ("domain", None, [0, 1], [0, 1], [0, 1]),
    ],
)
def test_incoming_rows_compete_among_what_is_in_the_batch(scenario, train_mask, labels, allowed, old):
    learner, _, batch, logits = one_batch(ERACE(memory_size=12), scenario, labels, train_mask=train_mask)
    logits.retain_grad()
    loss = learner.strategies["method"].criterion(learner, batch, logits)
    expected = F.cross_entropy(logits[:2, allowed], torch.tensor([allowed.index(c) for c in labels]))
    expected = expected + F.cross_entropy(logits[2:, old], batch.y[2:])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    absent = [c for c in range(logits.shape[1]) if c not in allowed]
    assert not logits.grad[:2, absent].any(), "an absent class is not pushed away"


def test_classes_to_come_compete_on_incoming_rows_where_the_mask_says_so():
    learner, stream = toy(ERACE(memory_size=12), [0], train_mask="domain")
    learner.before_task(stream[1])  # 0-3 are seen
    x, y, task = stream[1].train.tensors()
    batch = Batch(*(column[y == 2][:3] for column in (x, y, task)))
    logits = learner(learner.prepare(batch.x))
    expected = F.cross_entropy(logits[:, [2, 4, 5]], torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(learner.strategies["method"].criterion(learner, batch, logits), expected)


@quick
@given(seeds, st.integers(2, 6), st.data())
def test_a_mask_leaves_the_cross_entropy_of_the_rest(seed, num_classes, data):
    y = data.draw(st.integers(0, num_classes - 1))
    out = data.draw(st.lists(st.booleans(), min_size=num_classes, max_size=num_classes))
    out[y] = False
    logits = torch.randn(1, num_classes, generator=torch.Generator().manual_seed(seed))
    left = [c for c in range(num_classes) if not out[c]]
    got = F.cross_entropy(er_ace.without(logits, torch.tensor(out)), torch.tensor([y]))
    torch.testing.assert_close(got, F.cross_entropy(logits[:, left], torch.tensor([left.index(y)])))
