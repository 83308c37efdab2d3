"""What the methods compute that give each task weights of its own, and that old answers stay."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import toys
from cl.backbones.networks import MLP, ResNet18, SimpleCNN
from cl.compose import repeat
from cl.data.task import SCENARIOS, Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.random import derive
from cl.strategies.er import ER
from cl.strategies.gpm import GPM
from cl.strategies.hat import HAT, _gate, annealed, compensation, new_share
from cl.strategies.packnet import PackNet, smallest
from cl.strategies.supsup import SupSup, entropy_slopes, supermask
from cl.streams.boundary_free import boundary_free
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.by_task import run_by_task
from cl.toolkit.isolation import chained_layers, layer_weights
from toys import trainer

quick = settings(deadline=None, max_examples=50)
learn = partial(toys.learn, epochs=2)
SGD = partial(torch.optim.SGD, lr=0.1)


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
        learn(learner, stream, [task.index], epochs=epochs)
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
    got = run_by_task(learner, learner.backbone, view, weights)
    expected = torch.stack([learner.backbone(view[i : i + 1] * float(labels[i] + 1))[0] for i in range(7)])
    torch.testing.assert_close(got, expected)
    learner.task_labels, learner.task = None, stream[1]
    torch.testing.assert_close(run_by_task(learner, learner.backbone, view, weights), learner.backbone(view * 2))
    del learner.strategies["other"]
    learner.task_labels = labels
    torch.testing.assert_close(run_by_task(learner, learner.backbone, view, weights), learner.backbone(view * 2))
    learner.eval()
    torch.testing.assert_close(run_by_task(learner, learner.backbone, view, weights), expected)


METHODS = [PackNet, HAT]


@pytest.mark.parametrize("method", METHODS)
def test_what_would_change_old_answers_is_refused(method):
    name = method.__name__
    for scenario in ("class", "domain"):
        with pytest.raises(
            InputError,
            match=f"{name} works with scenario=task, but .*={scenario}, where .* is not told: use scenario=task",
        ):
            build(method(), stream=toy_stream(3, scenario))
    with pytest.raises(InputError, match=f"{name} keeps the weights .* weight_decay=0.01 .*weight_decay=0"):
        build(method(), optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.01))
    deep = nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 6))
    with pytest.raises(InputError, match=f"{name} .* Sequential has weights that are no class's own: use head=linear"):
        build(method(), head=deep)
    again = repeat(toy_stream(2, "task"), visits=[0, 1, 0])
    with pytest.raises(InputError, match=f"{name} gives each task outputs of its own, .* tasks share classes"):
        build(method(), stream=again)


@pytest.mark.parametrize("method", [PackNet, SupSup])
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


@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_that_moves_weights_without_a_gradient_is_refused(method):
    """By what it does: ASGD calls its decay lambd, and has no argument that is known for one."""

    class Drifting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p *= 0.999

    for factory in (partial(torch.optim.ASGD, lr=0.1), partial(Drifting, lr=0.1)):
        with pytest.raises(InputError, match=r"by gradients of 0, and (ASGD|Drifting) moves them all the same"):
            build(method(), optimizer=factory)
    for factory in (partial(torch.optim.Adam, lr=0.01), partial(torch.optim.SGD, lr=0.1, momentum=0.9)):
        with pytest.raises(InputError, match=r"of the task before moves them .* use optimizer_state=reset"):
            build(method(), optimizer=factory, optimizer_state="keep")
    build(method(), optimizer=partial(torch.optim.SGD, lr=0.1), optimizer_state="keep")


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
    with pytest.raises(InputError, match=r"packnet\.prune_after=3 lies beyond the epochs=2 of a task"):
        learn(learner, stream, [0])


def test_a_task_that_ends_early_is_pruned_all_the_same():
    learner, stream = build(PackNet(prune_after=2))
    learner.before_task = lambda task: None
    learner.trainer = trainer(max_epochs=2)
    learner.strategies["method"].before_task(learner, stream[0])
    learner.strategies["method"].after_task(learner, stream[0])
    assert int((learner.strategies["method"].owner_0 == 0).sum()) == 128


# ------------------------------------------------------------------ HAT


def test_worked_example_26_s_rises_within_an_epoch():
    assert annealed(400, 4, 10) == pytest.approx(177.779, abs=1e-3)
    assert annealed(400, 0, 10) == 1 / 400 and annealed(400, 9, 10) == 400
    assert annealed(400, 0, 1) == 1 / 400, "an epoch of one batch"


def test_worked_example_27_weights_between_used_units_are_held():
    learner, stream = build(HAT(), partial(MLP, (1, 4, 4), hidden=[2, 1]))
    strategy = learner.strategies["method"]
    strategy.used.copy_(torch.tensor([0.3, 0.9, 0.8]))  # of two units, then of one
    learner.task = stream[1]
    for parameter in learner.parameters():
        parameter.grad = torch.ones_like(parameter)
    strategy.project_gradients(learner)
    first, second = learner.backbone[1], learner.backbone[3]
    torch.testing.assert_close(second.weight.grad, torch.tensor([[0.7, 0.2]]))
    torch.testing.assert_close(second.bias.grad, torch.tensor([0.2]))
    torch.testing.assert_close(first.weight.grad, torch.tensor([[0.7], [0.1]]).expand(2, 16))
    torch.testing.assert_close(first.bias.grad, torch.tensor([0.7, 0.1]))
    assert learner.head.weight.grad[:, 0].tolist() == [0, 0, 1, 1, 0, 0] == learner.head.bias.grad.tolist()
    assert strategy.embedding.grad.any(1).tolist() == [False, True, False]


def test_channels_hold_the_columns_that_they_are_flattened_to():
    learner, stream = build(HAT(), partial(SimpleCNN, (3, 8, 8), channels=(2, 2), hidden=3), stream=images())
    strategy = learner.strategies["method"]
    strategy.used.copy_(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]))
    learner.task = stream[1]
    for parameter in learner.parameters():
        parameter.grad = torch.ones_like(parameter)
    strategy.project_gradients(learner)
    second, linear = (learner.backbone.get_submodule(name).weight.grad for name in strategy._names[1:])
    assert second[:, :, 0, 0].tolist() == [[1, 1], [0, 1]]
    assert linear.tolist() == [[1] * 4 + [0] * 4] * 2 + [[1] * 8], "the second channel makes the last four columns"


def test_worked_example_28_the_embeddings_gradient_is_compensated():
    factor = compensation(torch.tensor([0.5, 0.0, 6.0]), 2.0, 400.0)
    assert factor[:2].tolist() == pytest.approx([239.053, 200.0], abs=1e-3)
    assert torch.isfinite(compensation(torch.tensor([6.0, -6.0]), 400.0, 400.0)).all()


@quick
@given(st.floats(-1, 1), st.floats(0.5, 8))
def test_compensated_gradients_do_not_depend_on_s(e, s):
    """d sigma(s e) / de times the factor is s_max d sigma(e) / de."""
    embedding = torch.tensor([e], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(torch.sigmoid(s * embedding).sum(), embedding)
    (plain,) = torch.autograd.grad(torch.sigmoid(embedding).sum(), embedding)
    torch.testing.assert_close(gradient * compensation(embedding.detach(), s, 400.0), 400 * plain)


def test_all_minibatches_of_one_update_have_one_steepness():
    learner, stream = build(HAT())
    learner.trainer, learner.accumulate = trainer(max_epochs=1), 4
    learner.before_task(stream[0])
    learner.backbone.train()
    found = []
    for step in range(learner.steps_per_epoch):
        learner.step = step
        found.append(learner.strategies["method"]._steepness(learner, 0))
    assert learner.steps_per_epoch == 6
    assert found == [1 / 400] * 4 + [400.0] * 2, "from the first update of an epoch to its last"


def test_worked_example_29():
    assert float(new_share(torch.ones(3), torch.tensor([1.0, 0.0, 0.5]))) == 1.0
    assert float(new_share(torch.tensor([1.0, 0.5, 0.0]), torch.zeros(3))) == 0.5
    assert float(new_share(torch.ones(3), torch.ones(3))) == 0.0


def test_hat_is_the_loop_written_by_hand():
    """Gates behind the ReLUs, masks of gradients, and the embedding's, as the paper has them; two tasks."""
    import numpy as np

    stream, c, s_max = toy_stream(2, "task"), 0.75, 50.0
    torch.manual_seed(0)
    net, head = MLP((1, 4, 4), hidden=[16, 12]), nn.Linear(12, 4)
    embedding = torch.randn(2, 28)
    E = [[row[:16].clone().requires_grad_(), row[16:].clone().requires_grad_()] for row in embedding]
    first, second = net[1], net[3]
    A = [torch.zeros(16), torch.zeros(12)]
    for task in stream:
        e1, e2 = E[task.index]
        own = slice(2 * task.index, 2 * task.index + 2)
        for epoch in range(3):
            x, y, _ = task.train.tensors()
            order = np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch)).permutation(len(y))
            for b in range(6):
                rows = order[8 * b : 8 * b + 8]
                s = 1 / s_max + (s_max - 1 / s_max) * b / 5
                a1, a2 = torch.sigmoid(s * e1), torch.sigmoid(s * e2)
                h = F.relu(first(x[rows].float().flatten(1) / 255)) * a1
                h = F.relu(second(h)) * a2
                loss = F.cross_entropy(head(h)[:, own], y[rows] - own.start)
                free = sum((1 - w).sum() for w in A)
                loss = loss + c * ((a1 * (1 - A[0])).sum() + (a2 * (1 - A[1])).sum()) / free
                parameters = [first.weight, first.bias, second.weight, second.bias, *head.parameters(), e1, e2]
                g = list(torch.autograd.grad(loss, parameters))
                g[0], g[1] = g[0] * (1 - A[0])[:, None], g[1] * (1 - A[0])
                g[2], g[3] = g[2] * (1 - torch.minimum(A[1][:, None], A[0][None])), g[3] * (1 - A[1])
                for i, e in ((6, e1), (7, e2)):
                    e = e.detach()
                    g[i] = g[i] * s_max / s * ((s * e).clamp(-50, 50).cosh() + 1) / (e.cosh() + 1)
                with torch.no_grad():
                    for p, d in zip(parameters, g, strict=True):
                        p -= 0.1 * d
                    e1.clamp_(-6, 6)
                    e2.clamp_(-6, 6)
        A = [torch.maximum(w, torch.sigmoid(s_max * e.detach())) for w, e in zip(A, (e1, e2), strict=True)]
    torch.manual_seed(0)
    learner = Learner(stream, MLP((1, 4, 4), hidden=[16, 12]), {"method": HAT(c, s_max)}, SGD, batch_size=8)
    with torch.no_grad():
        learner.strategies["method"].embedding.copy_(embedding)
    learn(learner, stream, epochs=3)
    strategy = learner.strategies["method"]
    expected = torch.stack([torch.cat(pair).detach() for pair in E])
    torch.testing.assert_close(strategy.embedding.detach(), expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(strategy.used, torch.cat(A), rtol=1e-2, atol=1e-3)
    for ours, theirs in zip(learner.trunk().parameters(), [*net.parameters(), *head.parameters()], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_closed_gate_lets_through_no_denormal_numbers_and_keeps_its_gradient():
    e = torch.tensor([-0.1, 0.0, 0.1], requires_grad=True)
    out = _gate(torch.sigmoid(400 * e), nn.Identity(), (), torch.tensor([[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]]))
    torch.testing.assert_close(out.detach()[1], torch.tensor([1e-12, 0.5, 1.0]), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(out.sum(), e)
    slope = 400 / (2 + 2 * torch.cosh(400 * e.detach()))
    torch.testing.assert_close(gradient[:2], 3 * slope[:2], rtol=1e-4, atol=0)


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_old_answers_of_hat_drift_within_its_bound(net):
    """Check 4 of METHODS-CORE."""
    backbone, data = NETS[net]
    learner, stream = build(HAT(), backbone, partial(torch.optim.SGD, lr=0.05), data() if data else None)
    assert max(drift(learner, stream, epochs=5)) < 1e-3
    free = Learner(stream, backbone(), {}, partial(torch.optim.SGD, lr=0.05), batch_size=8)
    assert drift(free, stream, epochs=5)[0] > 0.01


def test_with_binary_gates_old_answers_stay_to_the_bit():
    """Each task uses a third of the units beside those of the tasks before it, and its gates are 0 or 1."""
    learner, stream = build(HAT(), optimizer=partial(torch.optim.SGD, lr=0.05))
    strategy = learner.strategies["method"]
    with torch.no_grad():
        units = torch.arange(28)
        for t in range(3):
            strategy.embedding[t] = torch.where(units % 3 <= t, 6.0, -6.0)
    strategy.embedding.requires_grad_(False)
    before = [p.detach().clone() for p in learner.backbone.parameters()]
    assert max(drift(learner, stream, epochs=5)) == 0
    assert not any(torch.equal(p, old) for p, old in zip(learner.backbone.parameters(), before, strict=True))


def test_replayed_rows_and_gates_of_old_tasks_are_left_alone():
    learner, stream = build({"er": ER(20), "hat": HAT()}, optimizer=partial(torch.optim.SGD, lr=0.05))
    kept = []
    for task in stream:
        learn(learner, stream, [task.index], epochs=4)
        kept.append(learner.strategies["hat"].embedding[task.index].detach().clone())
        assert float(kept[-1].abs().max()) <= 6.5
    for t, row in enumerate(kept):
        assert torch.equal(learner.strategies["hat"].embedding[t].detach(), row)


def test_gates_are_soft_in_training_and_hard_at_test():
    learner, stream = build(HAT())
    learner.before_task(stream[0])
    strategy = learner.strategies["method"]
    learner.trainer = trainer(max_epochs=1)
    learner.train()
    assert [round(strategy._steepness(learner, 0)), strategy._steepness(learner, 1)] == [0, 400]
    learner.step = 5  # the last of six
    assert strategy._steepness(learner, 0) == 400
    learner.step = 6
    with learner.evaluating():
        assert strategy._steepness(learner, 0) == 400


def test_embeddings_are_kept_within_6():
    learner, stream = build(HAT())
    with torch.no_grad():
        learner.strategies["method"].embedding[:, :3] = torch.tensor([9.0, -9.0, 5.0])
    with learner.evaluating():
        learner(learner.prepare(stream[0].test.x))
    assert float(learner.strategies["method"].embedding.detach().max()) == 9
    learner(learner.prepare(stream[0].test.x))
    assert learner.strategies["method"].embedding.detach()[0, :3].tolist() == [6, -6, 5]


class Skip(MLP):
    def forward(self, x):
        x = x.flatten(1)
        return x @ torch.ones(16, self.num_features) + super().forward(x)


def test_what_gates_do_not_isolate_is_refused():
    for backbone, data in (
        (lambda: ResNet18((3, 8, 8), width=2, norm="group"), images()),
        (lambda: ResNet18((3, 8, 8), width=2, norm="batch_no_stats"), images()),
        (lambda: Skip((1, 4, 4), hidden=[16, 12]), None),
    ):
        with pytest.raises(InputError, match=r"is no chain of layers without norms.*use backbone=mlp, simple_cnn"):
            build(HAT(), backbone, stream=data)
    with pytest.raises(InputError, match=r"HAT needs plain SGD.*Adam"):
        build(HAT(), optimizer=partial(torch.optim.Adam, lr=0.01))


@pytest.mark.parametrize("hidden", [[50, 50], [150, 150], [250, 250], [300, 200, 100], [33]])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28)])
def test_the_rounding_of_a_matrix_product_is_no_path_past_a_layer(hidden, shape):
    """A row's features can differ in their last bits with its place in the batch."""
    for seed in range(3):
        torch.manual_seed(seed)
        assert len(chained_layers(MLP(shape, hidden), shape)) == len(hidden)


def test_layers_are_chained_in_the_order_of_their_calls():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(3, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.second(self.first(x).relu())

    assert list(chained_layers(Backwards(), (4,))) == ["first", "second"]


# ------------------------------------------------------------------ SupSup

torch_own = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")  # of its forward derivatives


def with_masks(learner: Learner, *masks: torch.Tensor) -> SupSup:
    """As if tasks had been learned, with these masks of the head."""
    strategy = learner.strategies["method"]
    strategy.masks_0[: len(masks)] = torch.stack(masks)
    learner.tasks_learned = len(masks)
    learner.seen.fill_(True)
    return strategy


class Inputs(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


def vectors(size: int, num_classes: int, num_tasks: int = 3) -> Stream:
    x, y = torch.randn(8, size, generator=torch.Generator().manual_seed(0)), torch.arange(8) % num_classes
    tasks = [Task(t, TaskData(x, y, t), TaskData(x + 1, y, t)) for t in range(num_tasks)]
    return Stream(tasks, scenario="domain", num_classes=num_classes)


@torch_own
def test_worked_example_31():
    slopes = entropy_slopes(torch.tensor([[1.0, 0.5]]), torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]]))
    torch.testing.assert_close(slopes, torch.tensor([[-0.235004, 0.117502]]), rtol=0, atol=1e-6)
    learner, _ = build(SupSup(), partial(Inputs, 2), stream=vectors(2, 2))
    learner.head.weight.data = torch.eye(2)
    strategy = with_masks(learner, torch.tensor([[1, 0], [0, 0]]).bool(), torch.tensor([[0, 0], [0, 1]]).bool())
    assert strategy.infer(learner, torch.tensor([[2.0, 1.0], [1.0, 2.0]])).tolist() == [0, 1]
    with learner.evaluating():
        got = strategy.predict(learner, torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    assert got.tolist() == [[2, 0], [0, 2]], "each row in the subnetwork that it chose"


@torch_own
def test_classes_of_other_tasks_than_the_inferred_one_come_last():
    stream = vectors(2, 4, num_tasks=2)
    data = [task.train for task in stream]
    tasks = [Task(t, *(TaskData(d.x, torch.arange(8) % 2 + 2 * t, t) for _ in (0, 1))) for t, d in enumerate(data)]
    learner, _ = build(SupSup(), partial(Inputs, 2), stream=Stream(tasks, scenario="class", num_classes=4))
    learner.head.weight.data = torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 3]])
    strategy = with_masks(learner, torch.ones(4, 2).bool(), torch.ones(4, 2).bool())  # alike: the first is inferred
    with learner.evaluating():
        (got,) = strategy.predict(learner, torch.tensor([[2.0, 1.0]])).tolist()
    assert got == pytest.approx([2, 1, 4 - 1e4, 3 - 1e4])


@torch_own
@quick
@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(1, 4))
def test_slopes_are_the_derivatives_by_alpha(seed, num_classes, num_tasks):
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(num_classes, 3, generator=draw)
    M = (torch.rand(num_tasks, num_classes, 3, generator=draw) < 0.5).float()
    for x in torch.randn(4, 3, generator=draw):
        alpha = torch.full((num_tasks,), 1 / num_tasks, requires_grad=True)
        z = (W * (alpha[:, None, None] * M).sum(0)) @ x
        (expected,) = torch.autograd.grad(torch.distributions.Categorical(logits=z).entropy(), alpha)
        changes = torch.stack([((W * m) @ x)[None] for m in M])
        torch.testing.assert_close(entropy_slopes(z.detach()[None], changes)[0], expected, rtol=1e-3, atol=1e-5)


@torch_own
def test_the_task_is_inferred_through_a_deep_network_as_by_autograd():
    learner, stream = build(SupSup(), stream=toy_stream(3, "domain"))
    learn(learner, stream)
    strategy, view = learner.strategies["method"], learner.prepare(stream[1].test.x)
    first, second = learner.backbone[1].weight, learner.backbone[3].weight
    expected = []
    for x in view:
        alpha = torch.full((3, 1, 1), 1 / 3, requires_grad=True)
        W1, W2, W3 = (
            w * (alpha * strategy.get_buffer(f"masks_{i}")).sum(0)
            for i, w in enumerate((first, second, learner.head.weight))
        )
        z = W3 @ F.relu(W2 @ F.relu(W1 @ x.flatten()))
        (slopes,) = torch.autograd.grad(torch.distributions.Categorical(logits=z).entropy(), alpha)
        expected.append(int(slopes.flatten().argmin()))
    assert strategy.infer(learner, view).tolist() == expected and len(set(expected)) > 1


@quick
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=30, unique=True), st.floats(0.01, 1))
def test_a_mask_keeps_the_largest_and_passes_gradients_on(values, density):
    scores = torch.tensor(values, requires_grad=True)
    mask = supermask(scores, density)
    kept = mask.detach() > 0
    assert set(mask.tolist()) <= {0.0, 1.0}
    assert int(kept.sum()) == len(values) - int((1 - density) * len(values))
    if not bool(kept.all()) and bool(kept.any()):
        assert float(scores.detach().abs()[kept].min()) >= float(scores.detach().abs()[~kept].max())
    weights = torch.arange(1.0, len(values) + 1)
    (gradient,) = torch.autograd.grad((mask * weights).sum(), scores)
    torch.testing.assert_close(gradient, weights * scores.detach().sign())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_old_answers_of_supsup_are_kept_to_the_bit(net, optimizer):
    backbone, data = NETS[net]
    learner, stream = build(SupSup(0.4), backbone, OPTIMIZERS[optimizer], data() if data else None)
    before = {name: value.clone() for name, value in learner.trunk().state_dict().items()}
    assert drift(learner, stream, epochs=1) == [0, 0, 0]
    for name, value in learner.trunk().state_dict().items():
        assert torch.equal(value, before[name]), "weights are never trained"
    masks = learner.strategies["method"].masks_1
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    assert masks.flatten(1).float().mean(1).tolist() == pytest.approx([0.4] * 3, abs=0.02)


def test_the_random_weights_are_signed_constants():
    torch.manual_seed(0)
    plain = MLP((1, 4, 4), hidden=[16, 12])
    learner, _ = build(SupSup())
    for name, weight in layer_weights(learner.backbone).items():
        fan = weight.shape[1]
        assert torch.equal(weight, plain.get_parameter(name).sign() * (2 / fan) ** 0.5)
    assert not any(learner.backbone[i].bias.any() for i in (1, 3)) and not learner.head.bias.any()
    assert not any(p.requires_grad for p in learner.trunk().parameters())


def own_pixels(scenario: str) -> Stream:
    """Three tasks whose inputs have little in common: each has pixels of its own."""
    draw = torch.Generator().manual_seed(2)
    tasks = []
    for t in range(3):
        parts = []
        for n in (48, 24):
            y = torch.arange(n) % 2
            x = torch.zeros(n, 3, 16)
            x[:, t] = torch.randn(n, 16, generator=draw) * 0.2 + torch.where(y[:, None] == 1, 1.0, -1.0)
            parts.append(TaskData(x, y if scenario == "domain" else y + 2 * t, t))
        tasks.append(Task(t, *parts))
    return Stream(tasks, scenario=scenario, num_classes=2 if scenario == "domain" else 6)


@torch_own
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_supsup_knows_or_infers_the_task(scenario):
    body, adam = partial(MLP, (3, 16), hidden=[128]), partial(torch.optim.Adam, lr=0.01)
    learner, stream = build(SupSup(0.2), body, adam, own_pixels(scenario))
    R = Experiment(learner, stream, trainer, epochs=12).run().matrices[scenario].R
    assert float(R[3].min()) > 0.9
    for task in stream if scenario == "class" else ():
        with torch.no_grad(), learner.evaluating():
            x, y, label = task.test.tensors()
            logits, inferred = learner.predict(Batch(x, y, label)), learner.strategies["method"].infer(learner, x)
        assert torch.equal(logits.argmax(1) // 2, inferred), "the classes of the inferred task come first"


def test_supsup_is_the_loop_written_by_hand():
    """Two tasks; scores are drawn anew for each, by the strategy's generator; gradients pass to them straight."""
    import numpy as np

    stream = toy_stream(2, "task")
    torch.manual_seed(0)
    net, head = ToyBackbone(), nn.Linear(16, 4)
    layers = (net.layers[1], net.layers[3], head)
    W = [layer.weight.detach().sign() * (2 / 16) ** 0.5 for layer in layers]
    generator, kept = np.random.Generator(np.random.PCG64(derive(0, "method", "random"))), []
    for task in stream:
        own = slice(2 * task.index, 2 * task.index + 2)
        S = [torch.from_numpy(generator.uniform(-1, 1, w.shape) / 4).float() for w in W]
        for epoch in range(2):
            x, y, _ = task.train.tensors()
            order = np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch)).permutation(len(y))
            for start in range(0, len(order), 8):
                rows = order[start : start + 8]
                M = [masked_by_hand(s).requires_grad_() for s in S]
                h = x[rows].float().flatten(1) / 255
                h = F.relu(F.relu(h @ (W[0] * M[0]).T) @ (W[1] * M[1]).T) @ (W[2] * M[2]).T
                gradients = torch.autograd.grad(F.cross_entropy(h[:, own], y[rows] - own.start), M)
                S = [s - 0.1 * g * s.sign() for s, g in zip(S, gradients, strict=True)]
        kept.append([masked_by_hand(s) for s in S])
    torch.manual_seed(0)
    learner = Learner(stream, ToyBackbone(), {"method": SupSup(0.5)}, SGD, batch_size=8)
    learn(learner, stream)
    for i in range(3):
        ours = learner.strategies["method"].get_buffer(f"masks_{i}").float()
        assert float((ours - torch.stack([masks[i] for masks in kept])).abs().mean()) < 0.01


def masked_by_hand(scores: torch.Tensor) -> torch.Tensor:
    order = scores.abs().flatten().sort().indices
    mask = torch.ones(scores.numel())
    mask[order[: scores.numel() // 2]] = 0
    return mask.view_as(scores)


def test_supsup_refuses_streams_without_boundaries_and_empty_masks():
    with pytest.raises(InputError, match=r"SupSup learns a mask a task, but .* has no boundaries"):
        build(SupSup(), stream=boundary_free(toy_stream(3, "task")))
    with pytest.raises(InputError, match=r"supsup\.density=0 must be above 0 and at most 1"):
        SupSup(density=0)
