"""PackNet: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.backbones.networks import MLP
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.random import derive
from cl.strategies.er import ER
from cl.strategies.gpm import GPM
from cl.strategies.packnet import PackNet, smallest
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.isolation import layer_weights
from draws import quick
from old_answers import NETS, OPTIMIZERS, SGD, answers, build, drift, learn
from toys import trainer


def test_worked_example_30():
    weight = torch.tensor([0.1, -0.5, 0.3, -0.05])
    assert (~smallest(weight, torch.ones(4, dtype=torch.bool), 0.5)).tolist() == [False, True, True, False]


@quick
@given(st.lists(st.tuples(st.floats(-2, 2), st.booleans()), min_size=1, max_size=30), st.floats(0, 1))
def test_the_smallest_are_as_many_as_asked_and_none_larger_than_those_left(rows, share):
    weight, among = torch.tensor([w for w, _ in rows]), torch.tensor([a for _, a in rows])
    chosen = smallest(weight, among, share)
    assert not bool((chosen & ~among).any())
    assert int(chosen.sum()) == round(share * int(among.sum()))
    left = weight[among & ~chosen].abs()
    if len(left) and bool(chosen.any()):
        assert float(weight[chosen].abs().max()) <= float(left.min())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_old_answers_of_packnet_are_kept_to_the_bit(net, optimizer):
    """Check 4 of METHODS-CORE, at every task."""
    backbone, data = NETS[net]
    learner, stream = build(PackNet(), backbone, OPTIMIZERS[optimizer], data() if data else None)
    first, weights = [], []
    for task in stream:
        before = [p.detach().clone() for p in layer_weights(learner.backbone).values()]
        learn(learner, stream, [task.index], epochs=3)
        weights.append(
            any(not torch.equal(a, b) for a, b in zip(before, layer_weights(learner.backbone).values(), strict=True))
        )
        first.append(answers(learner, task))
        for old, kept in zip(stream, first, strict=False):
            assert torch.equal(answers(learner, old), kept)
    assert all(weights), "each task trained something"


def test_packnet_says_where_its_weights_run_out():
    def told(share: float, hidden: list[int]) -> str | None:
        learner, _ = build(PackNet(share), partial(MLP, (1, 4, 4), hidden=hidden))
        return learner.strategies["method"].remark(learner)

    assert told(0.5, [16, 12]) is None
    assert told(0.0, [16, 12]) == (
        "PackNet has no free weights left in layers.0, layers.2 from task 2 on: raise packnet.share, or use a wider "
        "backbone."
    ).replace("layers.0, layers.2", "1, 3")
    # 32 weights, a tenth of a tenth is none; 2 of 20 are none at once
    assert "in 3 from task 2 on; 1 from task 3 on" in str(told(0.05, [2, 4]))


def test_what_packnet_refuses_would_change_old_answers(monkeypatch):
    monkeypatch.setattr("cl.toolkit.isolation.check_optimizer", lambda name, learner: None)
    learner, stream = build(PackNet(), optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.01))
    assert max(drift(learner, stream)[:2]) > 1e-3


def test_replay_beside_packnet_changes_nothing_that_is_kept():
    """Old rows go through their own subnetworks, which are frozen, and their own outputs, which are, too."""
    learner, stream = build({"er": ER(20), "packnet": PackNet()})
    assert max(drift(learner, stream)) == 0
    learner, stream = build({"gpm": GPM(0.9), "packnet": PackNet()})
    assert max(drift(learner, stream)) == 0


def test_capacity_is_given_back_task_by_task():
    learner, stream = build(PackNet(share=0.25))
    strategy, total = learner.strategies["method"], 16 * 16
    free = total
    for task in stream:
        learn(learner, stream, [task.index])
        counts = torch.bincount(strategy.owner_0.flatten().long(), minlength=4)
        free = round(0.25 * free)
        assert int(counts[0]) == free and int(counts[task.index + 1]) > 0 and int(counts.sum()) == total


@pytest.mark.parametrize(
    ("prune_after", "epochs", "expected"), [(None, 4, 2), (None, 5, 3), (None, 1, 1), (1, 4, 1), (4, 4, 4)]
)
def test_the_epochs_before_pruning_are_as_many_as_asked(prune_after, epochs, expected):
    class Watch(Strategy):
        def after_epoch(self, learner, task, epoch):
            self.pruned = [*getattr(self, "pruned", []), bool(learner.strategies["packnet"].pruned)]

    watch = Watch()
    learner, stream = build({"packnet": PackNet(prune_after=prune_after), "watch": watch})
    learn(learner, stream, [0], epochs=epochs)
    assert watch.pruned == [epoch + 1 >= expected for epoch in range(epochs)]


def test_pruned_weights_count_as_0_while_the_others_are_retrained():
    learner, stream = build(PackNet(prune_after=1), optimizer=OPTIMIZERS["momentum"])
    learn(learner, stream, [0], epochs=3)
    owner, weight = learner.strategies["method"].owner_0, learner.backbone[1].weight.detach()
    assert float(weight[owner == 0].abs().max()) > 0, "momentum moves them"
    got = answers(learner, stream[0])
    with torch.no_grad():
        weight[owner == 0] = 0
        weight_2 = learner.backbone[3].weight
        weight_2[learner.strategies["method"].owner_1 == 0] = 0
        x = learner.prepare(stream[0].test.x)
        assert torch.equal(learner.head(learner.backbone(x))[:, :2], got), "the network itself, with zeros"


def test_packnet_is_the_loop_written_by_hand():
    """Two tasks of two epochs on a network without biases; prune after the first epoch."""
    import numpy as np

    stream = toy_stream(2, "task")
    torch.manual_seed(0)
    net = nn.Sequential(ToyBackbone(), nn.Linear(16, 4))
    a, b, head = net[0].layers[1].weight, net[0].layers[3].weight, net[1]
    owner = [torch.ones_like(w) for w in (a, b)]
    for task in stream:
        t = task.index + 1
        with torch.no_grad():
            for w, mine in zip((a, b), owner, strict=True):
                w[mine == 0] = 0
                mine[mine == 0] = t
        for epoch in range(2):
            x, y, _ = task.train.tensors()
            order = np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch)).permutation(len(y))
            for start in range(0, len(order), 8):
                rows = order[start : start + 8]
                kept = [w * ((mine > 0) & (mine <= t)) for w, mine in zip((a, b), owner, strict=True)]
                hidden = F.relu(x[rows].float().flatten(1) / 255 @ kept[0].T)
                logits = head(F.relu(hidden @ kept[1].T))[:, 2 * t - 2 : 2 * t]
                parameters = [a, b, head.weight, head.bias]
                gradients = torch.autograd.grad(F.cross_entropy(logits, y[rows] - 2 * t + 2), parameters)
                with torch.no_grad():
                    for p, g, mine in zip(parameters, gradients, [*owner, None, None], strict=True):
                        p -= 0.1 * (g if mine is None else g * (mine == t))
            if epoch == 0:
                for w, mine in zip((a, b), owner, strict=True):
                    own = [(abs(w[i, j].item()), i, j) for i in range(16) for j in range(16) if mine[i, j] == t]
                    for _, i, j in sorted(own)[: round(0.5 * len(own))]:
                        mine[i, j] = 0
    torch.manual_seed(0)
    learner = Learner(stream, ToyBackbone(), {"method": PackNet(prune_after=1)}, SGD, batch_size=8)
    learn(learner, stream)
    strategy = learner.strategies["method"]
    for ours, theirs in ((strategy.owner_0, owner[0]), (strategy.owner_1, owner[1])):
        assert torch.equal(ours.float(), theirs)
    torch.testing.assert_close(learner.backbone.layers[1].weight * (owner[0] > 0), a * (owner[0] > 0))
    torch.testing.assert_close(learner.backbone.layers[3].weight * (owner[1] > 0), b * (owner[1] > 0))
    torch.testing.assert_close(learner.head.weight, head.weight)


def test_packnet_refuses_to_prune_after_the_last_epoch():
    learner, stream = build(PackNet(prune_after=3))
    with pytest.raises(InputError, match=r"packnet\.prune_after=3 is more than the epochs=2 of a task"):
        learn(learner, stream, [0])


def test_a_task_that_ends_early_is_pruned_all_the_same():
    learner, stream = build(PackNet(prune_after=2))
    learner.before_task = lambda task: None
    learner.trainer = trainer(max_epochs=2)
    learner.strategies["method"].before_task(learner, stream[0])
    learner.strategies["method"].after_task(learner, stream[0])
    assert int((learner.strategies["method"].owner_0 == 0).sum()) == 128
