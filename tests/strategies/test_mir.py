"""Maximally interfered retrieval: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from by_hand import by_hand, close
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies import mir
from cl.strategies.mir import MIR
from cl.testing import toy_stream
from cl.testing.toys import Normed
from toys import learn, toy


def test_worked_example_25():
    before, after = torch.tensor([0.2, 0.5, 0.1]), torch.tensor([0.9, 0.6, 0.7])
    torch.testing.assert_close(after - before, torch.tensor([0.7, 0.1, 0.6]))
    assert mir.most_raised(before, after, 2).tolist() == [0, 2]
    assert mir.most_raised(before, after, 9).tolist() == [0, 2, 1]


def test_mir_is_the_loop_written_by_hand():
    def loss_of(net, x, y, memory, seen):
        logits = net(x)
        loss = F.cross_entropy(logits[:, :seen], y)
        if memory.rows:
            old_x, old_y, _ = memory.some(10)
            virtual = deepcopy(net)
            virtual.zero_grad()
            F.cross_entropy(virtual(x)[:, :seen], y).backward()
            torch.optim.SGD(virtual.parameters(), lr=0.1).step()
            with torch.no_grad():
                rises = [
                    float(F.cross_entropy(virtual(r[None])[:, :seen], c[None]))
                    - float(F.cross_entropy(net(r[None])[:, :seen], c[None]))
                    for r, c in zip(old_x, old_y, strict=True)
                ]
            worst = sorted(range(len(rises)), key=lambda i: -rises[i])[:4]
            loss = loss + F.cross_entropy(net(old_x[worst])[:, :seen], old_y[worst])
        return loss, logits

    learner, _ = toy(MIR(memory_size=12, batch_size=4, num_candidates=10), range(3), epochs=2)
    close(learner, by_hand(loss_of))


class Recorder(Strategy):
    """Looks at what batch norm kept, and at the gradients, around another strategy's loss."""

    def loss(self, learner, batch, logits):
        norm = learner.backbone.layers[-1]
        self.kept = [*getattr(self, "kept", []), int(norm.num_batches_tracked)]
        self.grads = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in learner.parameters()]
        return None


def test_scores_leave_no_trace_in_batch_norm_nor_in_the_gradients():
    stream, first, last = toy_stream(), Recorder(), Recorder()
    strategies = {"first": first, "mir": MIR(memory_size=20), "last": last}
    learner = Learner(stream, Normed(), strategies, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    learn(learner, stream, [0])
    # A forward pass of the incoming rows, from the second step on one of the chosen rows, and none for the scores.
    assert first.kept == [1, 2, 4, 6, 8, 10] and last.kept == [1, 3, 5, 7, 9, 11]
    assert all(torch.equal(a, b) for a, b in zip(first.grads, last.grads, strict=True))


def test_candidates_are_scored_in_training_mode_with_the_rate_of_each_parameter():
    class TwoRates(MIR):
        def configure_optimizer(self, learner, factory):
            head = {"params": list(learner.head.parameters()), "lr": 0.7}
            return torch.optim.SGD([{"params": list(learner.backbone.parameters()), "lr": 0.2}, head], momentum=0.9)

        def loss(self, learner, batch, logits):
            if len(self.memory) >= 16 and not hasattr(self, "seen"):
                net = deepcopy(nn.Sequential(learner.backbone, learner.head))
                candidates = self.memory.rows()
                view, rows = learner.prepare(candidates.x), torch.arange(16)
                before = net(view)[:, :2].log_softmax(1)[rows, candidates.y]
                F.cross_entropy(net(batch.view)[:, :2], batch.y).backward()
                for part, rate in zip(net, (0.2, 0.7), strict=True):
                    torch.optim.SGD(part.parameters(), lr=rate).step()  # no momentum
                rise = before - net(view)[:, :2].log_softmax(1)[rows, candidates.y]
                self.seen = candidates.x[rise.argsort(descending=True)[:5]]
                chosen = []
                handle = learner.backbone.register_forward_pre_hook(lambda _, args: chosen.append(args[0]))
                super().loss(learner, batch, logits)
                handle.remove()
                self.chosen = chosen[-1]
                assert len(chosen) == 3 and len(chosen[0]) == len(chosen[1]) == 16
            return super().loss(learner, batch, logits)

    stream, strategy = toy_stream(), TwoRates(memory_size=16, batch_size=5)
    torch.manual_seed(0)
    learner = Learner(stream, Normed(), {"method": strategy}, partial(torch.optim.SGD, lr=9.0), batch_size=8)
    learn(learner, stream, [0])
    expected = sorted(x.numpy().tobytes() for x in learner.prepare(strategy.seen))
    assert sorted(x.numpy().tobytes() for x in strategy.chosen) == expected


def test_mir_refuses_what_leaves_no_choice():
    with pytest.raises(InputError, match=r"mir\.num_candidates=4 is less than the 8 examples to replay: raise it"):
        toy(MIR(num_candidates=4))
    with pytest.raises(InputError, match=r"mir\.batch_size=0"):
        MIR(batch_size=0)
