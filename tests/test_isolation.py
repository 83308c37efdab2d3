"""What the methods compute that give each task weights of its own, and that old answers stay."""

from __future__ import annotations

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cl.backbones import MLP, ResNet18, SimpleCNN
from cl.compose import repeat
from cl.errors import InputError
from cl.experiment import Experiment
from cl.isolation import encode_by_task, layer_weights
from cl.learner import Learner
from cl.random import derive
from cl.strategies.er import ER
from cl.strategies.gpm import GPM
from cl.strategies.packnet import PackNet, smallest
from cl.strategy import Batch, Strategy
from cl.task import Stream, Task, TaskData
from cl.testing import ToyBackbone, toy_stream

quick = settings(deadline=None, max_examples=50)
trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)
SGD = partial(torch.optim.SGD, lr=0.1)


def learn(learner: Learner, stream: Stream, tasks=None, epochs: int = 2) -> Learner:
    experiment = Experiment(learner, stream, trainer, epochs=epochs)
    for index in range(len(stream)) if tasks is None else tasks:
        experiment.learn(stream[index])
    return learner


def build(strategy, backbone=None, optimizer=SGD, stream=None, **options) -> tuple[Learner, Stream]:
    torch.manual_seed(0)
    stream = stream or toy_stream(3, "task")
    strategies = strategy if isinstance(strategy, dict) else {"method": strategy}
    body = backbone() if backbone else MLP((1, 4, 4), hidden=[16, 12])
    return Learner(stream, body, strategies, optimizer, batch_size=8, **options), stream


def images(num_tasks: int = 3, size: int = 8) -> Stream:
    draw = torch.Generator().manual_seed(1)
    tasks = []
    for t in range(num_tasks):
        y = torch.arange(24) % 2 + 2 * t
        x = torch.randint(0, 256, (24, 3, size, size), generator=draw, dtype=torch.uint8)
        tasks.append(Task(t, TaskData(x, y, t), TaskData(255 - x, y, t)))
    return Stream(tasks, scenario="task", num_classes=2 * num_tasks)


def answers(learner: Learner, task: Task) -> torch.Tensor:
    """The logits of a task's own classes on its test set, in the present state."""
    with torch.no_grad(), learner.evaluating():
        return learner.predict(Batch(*task.test.tensors()))[:, list(task.classes)]


def drift(learner: Learner, stream: Stream, epochs: int = 2) -> list[float]:
    """Learn the tasks; return for each how far its answers moved after it was learned."""
    first = []
    for task in stream:
        learn(learner, stream, [task.index], epochs)
        first.append(answers(learner, task))
    return [float((answers(learner, task) - old).abs().max()) for task, old in zip(stream, first, strict=True)]


NETS = {
    "mlp": (lambda: MLP((1, 4, 4), hidden=[16, 12]), None),
    "cnn": (lambda: SimpleCNN((3, 8, 8), channels=(4, 6), hidden=10), images),
    "residual": (lambda: ResNet18((3, 8, 8), width=2, norm="group"), images),
    "batch norm": (lambda: ResNet18((3, 8, 8), width=2, norm="batch_no_stats"), images),
}
OPTIMIZERS = {
    "sgd": SGD,
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


# ------------------------------------------------------------------ what they share


def test_each_row_is_encoded_with_the_weights_of_its_task():
    learner, stream = build(Strategy(), ToyBackbone)
    view = learner.prepare(stream[0].train.x[:7])
    labels = torch.tensor([2, 0, 1, 2, 2, 0, 1])
    own = learner.backbone.layers[1].weight
    learner.strategies["other"] = Strategy()  # alone, a strategy meets no rows of other tasks in training

    def weights(task: int):
        return {"layers.1.weight": own * (task + 1)}

    learner.task_labels = labels
    got = encode_by_task(learner, view, weights)
    expected = torch.stack([learner.backbone(view[i : i + 1] * float(labels[i] + 1))[0] for i in range(7)])
    torch.testing.assert_close(got, expected)
    learner.task_labels, learner.task = None, stream[1]
    torch.testing.assert_close(encode_by_task(learner, view, weights), learner.backbone(view * 2))
    del learner.strategies["other"]
    learner.task_labels = labels
    torch.testing.assert_close(encode_by_task(learner, view, weights), learner.backbone(view * 2))
    learner.eval()
    torch.testing.assert_close(encode_by_task(learner, view, weights), expected)


METHODS = [PackNet]


@pytest.mark.parametrize("method", METHODS)
def test_what_would_change_old_answers_is_refused(method):
    name = method.__name__
    for scenario in ("class", "domain"):
        with pytest.raises(InputError, match=f"{name} has to be given the task at test.* is {scenario}: use task"):
            build(method(), stream=toy_stream(3, scenario))
    with pytest.raises(InputError, match=f"{name} keeps the weights .* weight_decay=0.01 .*weight_decay=0"):
        build(method(), optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.01))
    again = repeat(toy_stream(2, "task"), visits=[0, 1, 0])
    with pytest.raises(InputError, match=f"{name} gives each task outputs of its own, .* tasks share classes"):
        build(method(), stream=again)


@pytest.mark.parametrize("method", [PackNet])
def test_running_statistics_are_refused(method):
    with pytest.raises(InputError, match=rf"{method.__name__} cannot protect the running statistics of backbone\."):
        build(method(), partial(ResNet18, (3, 8, 8), width=2), stream=images())


# ------------------------------------------------------------------ PackNet


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


def test_what_packnet_refuses_would_change_old_answers(monkeypatch):
    monkeypatch.setattr("cl.isolation.check_optimizer", lambda name, learner: None)
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
    learn(learner, stream, [0], epochs)
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
    with pytest.raises(InputError, match=r"packnet\.prune_after=3 lies beyond the epochs=2 of a task"):
        learn(learner, stream, [0])


def test_a_task_that_ends_early_is_pruned_all_the_same():
    learner, stream = build(PackNet(prune_after=2))
    learner.before_task = lambda task: None
    learner.trainer = trainer(max_epochs=2)
    learner.strategies["method"].before_task(learner, stream[0])
    learner.strategies["method"].after_task(learner, stream[0])
    assert int((learner.strategies["method"].owner_0 == 0).sum()) == 128
