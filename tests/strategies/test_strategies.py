"""What the methods compute: worked examples, closed forms, invariants, and loops written by hand."""

from __future__ import annotations

import math
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from cl.backbones.vit import ViT
from cl.data.task import SCENARIOS, Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.random import Random, derive
from cl.strategies import agem, derpp, ewc, gpm, lwf
from cl.strategies.agem import AGEM
from cl.strategies.cumulative import Cumulative
from cl.strategies.derpp import DERpp
from cl.strategies.er import ER
from cl.strategies.ewc import EWC
from cl.strategies.gpm import GPM
from cl.strategies.joint import Joint
from cl.strategies.l2p import L2P
from cl.strategies.lwf import LwF
from cl.strategies.ncm import NCM
from cl.testing import ToyBackbone, toy_learner, toy_stream
from cl.toolkit.fisher import diagonal_fisher, label_weights
from cl.toolkit.layers import layer_inputs
from cl.toolkit.memory import Memory
from toys import learn, same, toy, trainer, trunk

ALPHA = 1e-4  # error of a statistical test; seeds are fixed
quick = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**31)


def build(
    stream: Stream, backbone: nn.Module, strategy: Strategy, lr: float = 0.1, optimizer=None, **options
) -> Learner:
    optimizer = optimizer or partial(torch.optim.SGD, lr=lr)
    return Learner(stream, backbone, {"method": strategy}, optimizer, **{"batch_size": 8, **options})


def float_stream(xs, ys, scenario="class", num_classes=None) -> Stream:
    tasks = [Task(t, TaskData(x, y, t), TaskData(x.clone(), y, t)) for t, (x, y) in enumerate(zip(xs, ys, strict=True))]
    return Stream(tasks, scenario=scenario, num_classes=num_classes or int(torch.cat(list(ys)).max()) + 1)


class Identity(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


# ------------------------------------------------------------------ loops written by hand: ER, DER, DER++


class Reservoir:
    """Algorithm R on Python lists, with a memory's generator, which draws for 1024 rows at once."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.rows, self.num_seen, self.uniform = capacity, [], 0, []
        self.draw = np.random.Generator(np.random.PCG64(seed))

    def add(self, row) -> None:
        self.uniform = self.uniform or list(self.draw.random(1024))
        u = self.uniform.pop(0)
        if len(self.rows) < self.capacity:
            self.rows.append(row)
        elif (slot := int(u * (self.num_seen + 1))) < self.capacity:
            self.rows[slot] = row
        self.num_seen += 1

    def some(self, size: int):
        size = min(size, len(self.rows))
        picked = [self.rows[i] for i in self.draw.choice(len(self.rows), size, replace=False, shuffle=False)]
        return [torch.stack(column) for column in zip(*picked, strict=True)]


def replay_by_hand(kind: str, alpha: float = 0.0, beta: float = 0.0, size: int = 12, epochs: int = 2):
    """ER and DER(++) in plain PyTorch for the class-incremental toy; only the draws are looked up."""
    stream = toy_stream(3)
    torch.manual_seed(0)
    net = nn.Sequential(ToyBackbone(), nn.Linear(16, 6))
    memory = Reservoir(size, derive(0, "method", "memory.random"))
    for task in stream:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        x, y, _ = task.train.tensors()
        seen = 2 * task.index + 2

        def loss_of(logits, labels, seen=seen):
            return F.cross_entropy(logits[:, :seen], labels)

        for epoch in range(epochs):
            order = np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch)).permutation(len(y))
            for start in range(0, len(order), 8):
                rows = order[start : start + 8]
                bx, by = x[rows].float() / 255, y[rows]
                if kind == "er":
                    old = memory.some(len(by)) if memory.rows else [bx[:0], by[:0]]
                    logits = net(torch.cat([bx, old[0]]))
                    loss = loss_of(logits, torch.cat([by, old[1]]))
                else:
                    logits = net(bx)
                    loss = loss_of(logits, by)
                    if memory.rows and alpha:
                        mx, _, mz = memory.some(len(by))
                        loss = loss + alpha * ((net(mx) - mz) ** 2).mean()
                    if memory.rows and beta:
                        mx, my, _ = memory.some(len(by))
                        loss = loss + beta * loss_of(net(mx), my)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if kind == "der" or epoch == 0:
                    for row in zip(bx, by, logits.detach()[: len(by)], strict=True):
                        memory.add(row if kind == "der" else row[:2])
    return list(net.parameters())


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
    for ours, theirs in zip(learner.trunk().parameters(), replay_by_hand(**hand), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_der_without_both_terms_is_finetuning_to_the_bit():
    assert same(trunk(toy(DERpp(memory_size=12, alpha=0, beta=0), range(3))[0]), trunk(toy(None, range(3))[0]))


def test_worked_example_20_dark_knowledge_is_a_mean_over_rows_and_classes():
    logits, stored = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3)
    assert float(derpp.dark_knowledge(logits, stored)) == pytest.approx(5 / 3)
    assert float(derpp.dark_knowledge(logits.repeat(4, 1), stored.repeat(4, 1))) == pytest.approx(5 / 3)


def test_der_stores_the_logits_from_before_the_step_of_every_class():
    torch.manual_seed(0)
    stream = toy_stream()
    learner = build(stream, ToyBackbone(), DERpp(memory_size=48), batch_size=48)
    before = learner(learner.prepare(stream[0].train.x)).detach()
    learn(learner, stream, [0])
    memory = learner.strategies["method"].memory
    position = {x.numpy().tobytes(): i for i, x in enumerate(stream[0].train.x)}
    drawn = memory.sample(48)
    rows = [position[x.numpy().tobytes()] for x in drawn.x]
    torch.testing.assert_close(drawn.extras["logits"], before[rows])


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


# ------------------------------------------------------------------ A-GEM


def vectors(seed: int, size: int, count: int):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(count)]


def test_worked_example_1():
    projected = agem.project(torch.tensor([1.0, -2.0, 0.0]), torch.ones(3))
    torch.testing.assert_close(projected, torch.tensor([4 / 3, -5 / 3, 1 / 3]))


@quick
@given(seeds, st.integers(1, 12), st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_projection_is_the_nearest_point_without_a_violation(seed, size, scale):
    g, reference, other = vectors(seed, size, 3)
    reference = reference * scale
    projected = agem.project(g, reference)
    assert float(projected @ reference) >= -1e-6 * scale
    if g @ reference >= 0:
        assert torch.equal(projected, g)
    # Karush, Kuhn and Tucker: the step is a non-negative multiple of the constraint's normal, zero where it is slack.
    step = projected - g
    multiplier = step @ reference / (reference @ reference)
    torch.testing.assert_close(step, multiplier * reference)
    assert float(multiplier) >= -1e-12 and abs(float(multiplier * (projected @ reference))) < 1e-9
    feasible = other if other @ reference >= 0 else -other
    assert (projected - g).norm() <= (feasible - g).norm() + 1e-9


def test_a_vanishing_reference_changes_nothing():
    g = torch.tensor([1.0, -2.0])
    assert torch.equal(agem.project(g, torch.zeros(2)), g)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_learners_gradients_are_projected_as_one_vector(scenario):
    learner, stream = toy(AGEM(memory_size=12, batch_size=64), [0, 1], scenario=scenario)
    learner.before_task(stream[2])
    memory: Memory = learner.strategies["method"].memory
    assert len(memory) == 8
    batch = memory.sample(64)  # all of it, so that the draw does not matter
    loss = learner.criterion(learner(learner.prepare(batch.x)), batch)
    parameters = list(learner.parameters())
    reference = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    draw = torch.Generator().manual_seed(1)
    g = torch.randn(len(reference), generator=draw)
    g -= (0.5 + g @ reference) / (reference @ reference) * reference  # a violation: the product is -0.5
    for sign in (1, -1):
        for p, part in zip(parameters, (sign * g).split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p).clone()
        learner.strategies["method"].project_gradients(learner)
        result = torch.cat([p.grad.flatten() for p in parameters])
        expected = g + 0.5 / (reference @ reference) * reference if sign == 1 else -g
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def test_agem_remembers_the_same_number_of_each_class_drawn_at_random():
    learner, stream = toy(AGEM(memory_size=20), range(3))
    batch = learner.strategies["method"].memory.sample(20)
    assert torch.bincount(batch.y).tolist() == [4, 4, 3, 3, 3, 3]
    for task in stream:
        known = {(x.numpy().tobytes(), int(y)) for x, y in zip(task.train.x, task.train.y, strict=True)}
        stored = {
            (x.numpy().tobytes(), int(y))
            for x, y, t in zip(batch.x, batch.y, batch.task, strict=True)
            if t == task.index
        }
        assert stored <= known and len(stored) == (8, 6, 6)[task.index]

    counts, strategy = np.zeros(48), learner.strategies["method"]
    position = {x.numpy().tobytes(): i for i, x in enumerate(stream[0].train.x)}
    for seed in range(300):
        strategy.memory = Memory(20, stream, policy="ring")
        strategy.memory.random.seed(seed)
        strategy.after_task(learner, stream[0])
        counts[[position[x.numpy().tobytes()] for x in strategy.memory.sample(20).x]] += 1
    expected = 300 * 4 / 24
    for part in (counts[::2], counts[1::2]):  # the two classes; four of 24 rows each
        square = ((part - expected) ** 2).sum() / (expected * (20 / 24) * 24 / 23)
        assert stats.chi2.sf(square, 23) > ALPHA


def test_agem_refuses_less_than_one_exemplar_a_class():
    with pytest.raises(InputError, match="memory_size=5 is smaller than the 6 groups"):
        build(toy_stream(), ToyBackbone(), AGEM(memory_size=5))


# ------------------------------------------------------------------ GPM


def test_worked_example_6():
    stream = float_stream([torch.randn(4, 3)] * 2, [torch.tensor([0, 1, 0, 1])] * 2, "domain")
    backbone = nn.Sequential(nn.Linear(3, 2))
    backbone.num_features = 2
    learner = build(stream, backbone, GPM())
    strategy = learner.strategies["method"]
    strategy.projector_0[0, 0] = 1

    def fill():
        for p in learner.parameters():
            p.grad = torch.ones_like(p)
        backbone[0].weight.grad = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    fill()
    strategy.project_gradients(learner)
    assert torch.equal(backbone[0].weight.grad, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])), "free in task 1"
    learner.tasks_learned = 1
    strategy.project_gradients(learner)
    assert torch.equal(backbone[0].weight.grad, torch.tensor([[0.0, 2.0, 3.0], [0.0, 5.0, 6.0]]))
    assert backbone[0].bias.grad is None and learner.head.bias.grad is None


@pytest.mark.parametrize(("threshold", "criterion", "released"), [(0.6, 1, 0), (0.9, 2, 1), (0.95, 3, 2), (1.0, 3, 2)])
def test_worked_example_7(threshold, criterion, released):
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    R = rotation @ torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    for fewer, rank in ((0, criterion), (1, released)):
        M = gpm.new_directions(R, torch.zeros(3, 3), threshold, fewer)
        assert M.shape == (3, rank)
        torch.testing.assert_close((M.T @ rotation.double()).abs(), torch.eye(3).double()[:rank], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("threshold", "added"), [(0.5, 0), (0.6666, 0), (0.6667, 1), (1.0, 1)])
def test_worked_example_8(threshold, added):
    R = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    M = gpm.new_directions(R, torch.diag(torch.tensor([1.0, 0, 0])), threshold)
    assert M.shape[1] == added
    if added:
        torch.testing.assert_close(M[:, 0].abs(), torch.tensor([0.0, 0.5, 0.5]).sqrt().double())


@quick
@given(seeds, st.integers(2, 10), st.integers(1, 12), st.floats(0.1, 1.0))
def test_bases_of_several_tasks_are_orthonormal_and_as_small_as_the_criterion_allows(seed, size, count, threshold):
    draw = torch.Generator().manual_seed(seed)
    projector, rank = torch.zeros(size, size), 0
    for _ in range(4):
        R = torch.randn(size, count, generator=draw) * torch.rand(count, generator=draw)
        M = gpm.new_directions(R, projector, threshold).float()
        torch.testing.assert_close(M.T @ M, torch.eye(M.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(projector @ M, torch.zeros_like(M), atol=1e-4, rtol=0)
        old, projector, rank = projector, projector + M @ M.T, rank + M.shape[1]
        torch.testing.assert_close(projector @ projector, projector, atol=1e-4, rtol=0)
        torch.testing.assert_close(projector, projector.T)
        assert float(projector.trace()) == pytest.approx(rank, abs=1e-3) and rank <= size
        total = R.square().sum()
        assert (projector @ R).square().sum() >= (threshold - 1e-5) * total
        if M.shape[1]:  # one vector fewer is not enough
            fewer = old + M[:, :-1] @ M[:, :-1].T
            assert (fewer @ R).square().sum() < (threshold + 1e-5) * total


CONVOLUTIONS = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "uneven": {"kernel_size": (2, 3), "padding": (0, 1), "stride": (1, 2)},
    "dilation": {"dilation": 2},
    "same": {"padding": "same"},
    "same, dilated": {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)},
    "valid": {"padding": "valid"},
}


class ConvNet(nn.Module):
    """Two convolutions and a linear layer with biases, (16, 5, 5) -> 24; wide, so that few inputs do not span it."""

    num_features = 24

    def __init__(self, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 12, **{"kernel_size": 3, **options})
        size = self.conv(torch.zeros(1, 16, 5, 5)).shape[2:]
        self.second = nn.Conv2d(12, 40, tuple(size))
        self.linear = nn.Linear(40, 24)

    def forward(self, x):
        return self.linear(self.second(self.conv(x).relu()).flatten(1).relu()).relu()


class WideNet(nn.Module):
    """Three linear layers with biases, 30 -> 24, the middle one on tokens."""

    num_features = 24

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tokens, self.last = nn.Linear(30, 48), nn.Linear(24, 24), nn.Linear(48, 24)

    def forward(self, x):
        return self.last(self.tokens(self.first(x).relu().view(-1, 2, 24)).relu().flatten(1)).relu()


def low_rank_stream(shape, num_rows: int = 4, scenario: str = "class", num_tasks: int = 2) -> Stream:
    draw = torch.Generator().manual_seed(3)
    xs = [torch.randn(num_rows, *shape, generator=draw) for _ in range(num_tasks)]
    ys = [torch.arange(num_rows) % 2 + (0 if scenario == "domain" else 2 * t) for t in range(num_tasks)]
    return float_stream(xs, ys, scenario)


def recorded(learner: Learner, x: torch.Tensor) -> dict[nn.Module, torch.Tensor]:
    seen: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0].detach().clone()))
        for m in learner.trunk().modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        learner(x)
    for hook in hooks:
        hook.remove()
    return seen


def moved(layer: nn.Module, x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """What a change of the weight makes of inputs that were kept."""
    if isinstance(layer, nn.Linear):
        return x @ change.T
    return F.conv2d(x, change, None, layer.stride, layer.padding, layer.dilation)


def leak(learner: Learner, stream: Stream, epochs: int = 30) -> tuple[float, float, float]:
    """Learn two tasks; return the largest ||(W2 - W1) x|| / ||x||, the least ||W2 - W1||, and the drift of logits."""
    x = stream[0].train.x
    learn(learner, stream, [0], epochs)
    inputs = recorded(learner, x)
    before = {layer: layer.weight.detach().clone() for layer in inputs}
    old = list(stream[0].classes)
    logits = learner(x).detach()[:, old]
    learn(learner, stream, [1], epochs)
    protected = [m for m in inputs if m is not learner.head or learner.scenario != "task"]
    change = {m: m.weight.detach() - before[m] for m in protected}
    worst = max(float(moved(m, inputs[m], change[m]).norm() / inputs[m].norm()) for m in protected)
    return (
        worst,
        min(float(c.norm()) for c in change.values()),
        float((learner(x).detach()[:, old] - logits).abs().max()),
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch pads one side more, as we must
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("net", ["linear", *CONVOLUTIONS])
def test_gpm_leaves_the_span_of_old_inputs_alone(net, scenario):
    torch.manual_seed(0)
    stream = low_rank_stream((30,) if net == "linear" else (16, 5, 5), scenario=scenario)
    backbone = WideNet() if net == "linear" else ConvNet(**CONVOLUTIONS[net])
    learner = build(stream, backbone, GPM(threshold=1.0), lr=0.05)
    leaked, change, drift = leak(learner, stream)
    assert change > 1e-3, "the second task must have moved every layer"
    assert leaked < 1e-5
    assert drift < 1e-4, "so the network answers the first task as before"
    strategy = learner.strategies["method"]
    for i, (layer, x) in enumerate(recorded(learner, stream[0].train.x).items()):
        if layer is not learner.head or scenario != "task":
            columns = moved(layer, x, layer.weight.detach()).numel() // len(layer.weight)
            assert float(strategy.get_buffer(f"projector_{i}").trace()) <= 2 * columns + 1e-3, (
                "no more than two tasks give"
            )


def test_gpm_protects_every_earlier_task_not_only_the_last():
    torch.manual_seed(0)
    stream = low_rank_stream((30,), num_tasks=3)
    learner = build(stream, WideNet(), GPM(threshold=1.0), lr=0.05)
    answers = []
    for task in stream:
        learn(learner, stream, [task.index], epochs=20)
        answers.append(learner(task.train.x).detach())
    for task, answer in zip(stream, answers, strict=True):
        torch.testing.assert_close(learner(task.train.x).detach(), answer, rtol=0, atol=1e-4)


def test_the_head_is_free_where_task_labels_give_each_task_outputs_of_its_own():
    for scenario, protected in (("class", 3), ("domain", 3), ("task", 2)):
        learner, stream = toy(GPM(threshold=1.0), [0], scenario=scenario)
        assert len(list(learner.strategies["method"].buffers())) == protected
        before = learner.head.bias.detach().clone()
        learn(learner, stream, [1])
        assert torch.equal(learner.head.bias, before) == (scenario != "task")


def test_gpm_projects_gradients_of_any_memory_format():
    torch.manual_seed(0)
    stream = low_rank_stream((16, 5, 5))
    learner = build(stream, ConvNet().to(memory_format=torch.channels_last), GPM(threshold=1.0), lr=0.05)
    leaked, change, _ = leak(learner, stream)
    assert change > 1e-3 and leaked < 1e-5


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.Adam, lr=1e-3),
        partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0),
        partial(torch.optim.SGD, lr=0.05, weight_decay=1e-2),
    ],
    ids=["adam", "adamw", "decay"],
)
def test_what_gpm_refuses_really_leaks(optimizer, monkeypatch):
    torch.manual_seed(0)
    stream = low_rank_stream((30,))
    with pytest.raises(InputError, match="GPM needs plain SGD"):
        build(stream, WideNet(), GPM(threshold=1.0), optimizer=optimizer)
    monkeypatch.setattr(gpm, "check_plain_sgd", lambda learner, name: None)
    torch.manual_seed(0)
    leaked, _, drift = leak(build(stream, WideNet(), GPM(threshold=1.0), optimizer=optimizer), stream)
    torch.manual_seed(0)
    plain, _, plain_drift = leak(build(stream, WideNet(), GPM(threshold=1.0), lr=0.05), stream)
    assert leaked > 1000 * plain and drift > 1000 * plain_drift


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        (partial(torch.optim.Adam, lr=0.1), "Adam"),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), "momentum=0.9"),
        (partial(torch.optim.SGD, lr=0.1, weight_decay=1e-4), "weight_decay=0.0001"),
    ],
)
def test_gpm_refuses_all_but_plain_sgd(optimizer, named):
    with pytest.raises(InputError, match=f"GPM needs plain SGD.*{named}.*use optimizer=sgd"):
        build(toy_stream(), ToyBackbone(), GPM(), optimizer=optimizer)


class Normed(nn.Sequential):
    def __init__(self, **options) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16, **options))
        self.num_features = 16


def test_gpm_refuses_running_statistics_only():
    with pytest.raises(InputError, match=r"running statistics of backbone\.2: set backbone\.norm=batch_no_stats"):
        build(toy_stream(), Normed(), GPM())
    stream = toy_stream()
    learner = learn(build(stream, Normed(track_running_stats=False), GPM()), stream, [0])
    norm = learner.backbone[2]
    before = norm.weight.clone(), norm.bias.clone()
    learn(learner, stream, [1])
    assert torch.equal(norm.weight, before[0]) and torch.equal(norm.bias, before[1]), "frozen after the first task"


def test_gpm_refuses_grouped_convolutions_and_a_wrong_number_of_thresholds():
    stream = low_rank_stream((16, 5, 5))
    with pytest.raises(InputError, match="groups=4"):
        build(stream, ConvNet(groups=4), GPM())
    with pytest.raises(InputError, match=r"gpm\.threshold has 2 values for 4 layers"):
        build(stream, ConvNet(), GPM(threshold=[0.9, 0.9]))


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.97, [[0.97] * 3, [0.973] * 3, [0.976] * 3]),
        ([0.9, 0.998, 0.5], [[0.9, 0.998, 0.5], [0.903, 1.0, 0.503], [0.906, 1.0, 0.506]]),
    ],
)
@pytest.mark.parametrize("released", [False, True])
def test_gpm_raises_its_threshold_a_task_and_drops_a_vector_only_at_the_first(
    threshold, expected, released, monkeypatch
):
    calls = []
    monkeypatch.setattr(
        gpm, "new_directions", lambda R, P, e, fewer: calls.append((e, fewer)) or R.new_zeros(len(P), 0)
    )
    toy(GPM(threshold=threshold, released_rule=released), range(3))
    assert [e for e, _ in calls] == pytest.approx([e for row in expected for e in row])
    assert [fewer for _, fewer in calls] == [int(released)] * 3 + [0] * 6


def test_gpm_measures_in_evaluation_mode_and_puts_the_modes_back():
    class Noisy(ToyBackbone):
        def __init__(self) -> None:
            super().__init__()
            self.layers.append(nn.Dropout(0.9))

    stream = toy_stream()
    projectors = []
    for seed in (0, 1):
        torch.manual_seed(0)
        learner = build(stream, Noisy(), GPM())
        torch.manual_seed(seed)
        learner.strategies["method"].after_task(learner, stream[0])
        assert all(m.training for m in learner.trunk().modules())
        projectors.append(learner.strategies["method"].projector_2.clone())
    assert torch.equal(*projectors) and projectors[0].abs().sum() > 0


# ------------------------------------------------------------------ EWC


def linear_learner(strategy: EWC, x, y, num_classes: int, weight=None, bias=None, scenario="domain") -> Learner:
    """Logistic regression: an identity and a head with given weights."""
    stream = float_stream([x, x], [y, y], scenario, num_classes)
    learner = build(stream, Identity(x.shape[1]), strategy)
    with torch.no_grad():
        if weight is not None:
            learner.head.weight.copy_(weight)
            learner.head.bias.copy_(torch.zeros(num_classes) if bias is None else bias)
    return learner


def problem(seed: int, num_rows: int, size: int, num_classes: int):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, size, generator=draw)
    y = torch.randint(num_classes, (num_rows,), generator=draw)
    y[:num_classes] = torch.arange(num_classes)
    return x, y, torch.randn(num_classes, size, generator=draw), torch.randn(num_classes, generator=draw)


def closed_form(x, y, weight, bias, kind):
    """Diagonal Fisher of multinomial logistic regression, weights then biases.

    d log p_y / d w_ci = ([y = c] - p_c) x_i, whose square has the mean p_c (1 - p_c) x_i^2 under y ~ p.
    """
    p = (x @ weight.T + bias).softmax(1)
    square = p * (1 - p) if kind == "true" else (F.one_hot(y, len(bias)) - p) ** 2
    return torch.cat([(square[:, :, None] * x[:, None] ** 2).mean(0).flatten(), square.mean(0)])


@quick
@given(seeds, st.integers(2, 6), st.sampled_from([2, 3, 5]), st.sampled_from(["true", "empirical"]))
def test_fisher_of_logistic_regression_in_closed_form(seed, size, num_classes, kind):
    x, y, weight, bias = problem(seed, 20, size, num_classes)
    learner = linear_learner(EWC(fisher=kind), x, y, num_classes, weight, bias)
    learner.strategies["method"].after_task(learner, learner.task)
    expected = closed_form(x, y, weight, bias, kind)
    torch.testing.assert_close(learner.strategies["method"].importance, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("held", [1, 200, 10**9])
def test_fisher_does_not_depend_on_how_much_is_held_at_once(held, monkeypatch):
    monkeypatch.setattr("cl.toolkit.fisher._HELD_AT_ONCE", held)
    x, y, weight, bias = problem(1, 20, 3, 4)
    head = nn.Linear(3, 4)
    head.load_state_dict({"weight": weight, "bias": bias})
    new = diagonal_fisher(head, x, torch.arange(4))
    torch.testing.assert_close(new, closed_form(x, y, weight, bias, "true"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("batch_size", "rows"), [(1, 20), (3, 18), (20, 20), (64, 20)])
def test_batches_square_their_mean_gradient(batch_size, rows):
    """One autograd call a batch; what is left over makes no batch, and a batch is at most all examples."""
    x, y, weight, bias = problem(5, 20, 3, 4)
    learner = linear_learner(EWC(fisher="empirical", batch_size=batch_size), x, y, 4, weight, bias)
    learner.strategies["method"].after_task(learner, learner.task)
    squares = []
    for some, labels in zip(x[:rows].split(batch_size), y[:rows].split(batch_size), strict=True):
        gradient = torch.autograd.grad(F.cross_entropy(learner.head(some), labels), list(learner.head.parameters()))
        squares.append(torch.cat([g.flatten() for g in gradient]) ** 2)
    expected = torch.stack(squares).mean(0)
    torch.testing.assert_close(learner.strategies["method"].importance, expected, rtol=1e-4, atol=1e-6)


def test_sampled_fisher_is_right_in_the_mean():
    """E over y ~ p of the sampled Fisher is the true one; within five standard errors (6e-7 for each of 8)."""
    x, y, weight, bias = problem(2, 4000, 3, 2)
    learner = linear_learner(EWC(fisher="sampled", num_samples=None), x, y, 2, weight, bias)
    learner.strategies["method"].after_task(learner, learner.task)
    p = (x @ weight.T + bias).softmax(1)[:, 0]
    # Both classes have the square (y - p)^2, which is (1-p)^2 with probability p and else p^2.
    spread = p * (1 - p) * ((1 - p) ** 2 - p**2) ** 2
    features = torch.cat([x, torch.ones(len(x), 1)], 1)
    error = (spread[:, None] * features**4).sum(0).sqrt() / len(x)
    error = torch.cat([error[:3], error[:3], error[3:], error[3:]])
    true = closed_form(x, y, weight, bias, "true")
    got = learner.strategies["method"].importance
    assert ((got - true).abs() < 5 * error).all()
    assert not torch.allclose(got, true, rtol=1e-4), "it is a draw"
    assert not torch.allclose(got, closed_form(x, y, weight, bias, "empirical"), rtol=1e-2), (
        "and not of the data's labels"
    )


def test_sampled_labels_follow_the_models_distribution():
    probabilities = torch.tensor([0.1, 0.6, 0.3])
    x = torch.ones(3000, 1)
    learner = linear_learner(EWC(fisher="sampled"), x, torch.arange(3000) % 3, 3, probabilities.log()[:, None])
    module = nn.Sequential(learner.backbone, learner.head)
    drawn = label_weights("sampled", module, x, torch.zeros(3000).long(), torch.arange(3), Random())
    assert torch.equal(drawn.sum(1), torch.ones(3000))
    assert stats.chisquare(drawn.sum(0).numpy(), 3000 * probabilities.numpy()).pvalue > ALPHA


class OneWeight(nn.Module):
    """Logits (0, w x) with p(1 | x = 2) = 3/4."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(math.log(3) / 2))

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), self.w * x], 1)


def test_worked_example_15():
    x, classes = torch.tensor([[2.0]]), torch.tensor([0, 1])
    labels = {"y=0": torch.tensor([[1.0, 0.0]]), "y=1": torch.tensor([[0.0, 1.0]])}
    assert float(diagonal_fisher(OneWeight(), x, classes)) == pytest.approx(0.75)
    assert float(diagonal_fisher(OneWeight(), x, classes, labels["y=1"])) == pytest.approx(0.25)
    assert float(diagonal_fisher(OneWeight(), x, classes, labels["y=0"])) == pytest.approx(2.25)
    pair = diagonal_fisher(OneWeight(), x.repeat(2, 1), classes, torch.cat([labels["y=1"], labels["y=0"]]))
    assert float(pair) == pytest.approx(1.25), "single examples; the square of the batch's mean gradient is 0.25"


def test_fisher_of_a_transformer_is_that_of_gradients_taken_one_by_one():
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(ViT((1, 4, 4), patch_size=2, dim=8, depth=1, heads=2), nn.Linear(8, 3)),
        torch.randn(5, 1, 4, 4),
    )
    expected = 0.0
    for one in x:
        log_p = net(one[None])[0].log_softmax(0)
        for p in log_p:
            gradient = torch.autograd.grad(p, list(net.parameters()), retain_graph=True)
            expected += p.exp().detach() / 5 * torch.cat([g.flatten() for g in gradient]) ** 2
    torch.testing.assert_close(diagonal_fisher(net, x, torch.arange(3)), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("train_mask", "classes"), [(None, [0, 1, 2, 3]), ("class", [0, 1, 2, 3]), ("task", [2, 3]), ("domain", range(6))]
)
def test_fisher_counts_the_classes_that_compete_in_training(train_mask, classes):
    x, y, weight, bias = problem(3, 12, 3, 6)
    stream = float_stream([x] * 3, [y % 2 + 2 * t for t in range(3)])
    learner = build(stream, Identity(3), EWC(), train_mask=train_mask)
    learner.head.load_state_dict({"weight": weight, "bias": bias})
    for task in stream[:2]:
        learner.before_task(task)
    learner.strategies["method"].after_task(learner, stream[1])
    expected, rows = torch.zeros(6, 3), list(classes)
    expected[rows] = closed_form(x, y, weight[rows], bias[rows], "true")[: 3 * len(rows)].view(-1, 3)
    got = learner.strategies["method"].importance[:18].view(6, 3)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_fisher_is_measured_on_num_samples_plain_examples_in_evaluation_mode():
    class Noisy(Identity):
        def __init__(self) -> None:
            super().__init__(3)
            self.dropout = nn.Dropout(0.5)
            self.rows = 0

        def forward(self, x):
            return self.dropout(x)

    x, y, weight, bias = problem(4, 30, 3, 2)
    stream = float_stream([x, x], [y, y], "domain", 2)
    learner = build(stream, Noisy(), EWC(num_samples=None))
    learner.head.load_state_dict({"weight": weight, "bias": bias})
    learner.strategies["method"].after_task(learner, stream[0])
    expected = closed_form(x, y, weight, bias, "true")
    torch.testing.assert_close(learner.strategies["method"].importance, expected, rtol=1e-4, atol=1e-6)
    assert learner.backbone.dropout.training

    few = build(stream, Identity(3), EWC(num_samples=1))
    few.head.load_state_dict({"weight": weight, "bias": bias})
    few.strategies["method"].after_task(few, stream[0])
    singles = [closed_form(x[i : i + 1], y[i : i + 1], weight, bias, "true") for i in range(30)]
    assert any(torch.allclose(few.strategies["method"].importance, one, rtol=1e-4, atol=1e-6) for one in singles)


def scripted(monkeypatch, fishers, anchors, **options) -> tuple[Learner, EWC]:
    """A learner whose weights and Fishers after each task are the given vectors."""
    x, y, _, _ = problem(0, 8, 3, 2)
    learner = linear_learner(EWC(**options), x, y, 2)
    strategy, script = learner.strategies["method"], iter(fishers)
    monkeypatch.setattr(ewc, "task_fisher", lambda *args: next(script))
    for anchor in anchors:
        nn.utils.vector_to_parameters(anchor, learner.trunk().parameters())
        strategy.after_task(learner, learner.task)
        learner.tasks_learned += 1
    return learner, strategy


@quick
@given(seeds, st.integers(1, 5), st.floats(0.1, 1000))
def test_one_quadratic_has_the_gradient_of_the_sum_over_tasks(seed, num_tasks, weight):
    draw = torch.Generator().manual_seed(seed)
    fishers = [torch.rand(8, generator=draw) * (torch.rand(8, generator=draw) > 0.3) for _ in range(num_tasks)]
    anchors = [torch.randn(8, generator=draw) for _ in range(num_tasks)]
    theta = torch.randn(8, generator=draw)
    with pytest.MonkeyPatch.context() as patch:
        learner, strategy = scripted(patch, fishers, anchors, weight=weight)
    nn.utils.vector_to_parameters(theta, learner.trunk().parameters())
    loss = strategy.loss(learner, None, None)
    got = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(learner.trunk().parameters()))])
    theta = theta.clone().requires_grad_()
    explicit = weight / 2 * sum((f * (theta - a) ** 2).sum() for f, a in zip(fishers, anchors, strict=True))
    (expected,) = torch.autograd.grad(explicit, theta)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * weight)
    torch.testing.assert_close(strategy.importance, sum(fishers))


def test_the_mean_over_tasks_weighs_every_task_alike(monkeypatch):
    fishers = [torch.full((8,), 6.0), torch.arange(8.0), torch.ones(8)]
    anchors = [torch.zeros(8), torch.ones(8), torch.arange(8.0)]
    _, strategy = scripted(monkeypatch, fishers, anchors, merge="mean")
    torch.testing.assert_close(strategy.importance, (7 + torch.arange(8.0)) / 3)
    torch.testing.assert_close(strategy.anchor, torch.arange(8.0))


class TwoWeights(nn.Module):
    num_features = 2

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.theta.expand(len(x), 2)


class Quadratic(Strategy):
    """A task loss of 1/2 sum h (theta - goal)^2 in place of the cross-entropy."""

    def __init__(self, h, goal) -> None:
        super().__init__()
        self.h, self.goal = torch.tensor(h), torch.tensor(goal)

    def criterion(self, learner, batch, logits):
        return 0.5 * (self.h * (learner.backbone.theta - self.goal) ** 2).sum() + 0 * logits.sum()


@pytest.mark.parametrize(
    ("h", "goal", "fisher", "anchor", "weight"),
    [
        ([2.0, 2.0], [3.0, 3.0], [0.5, 0.5], [1.0, 1.0], 4.0),  # worked example 14
        ([1.0, 0.5], [2.0, -1.0], [0.3, 2.0], [-1.0, 4.0], 2.5),
        ([1.0, 1.0], [2.0, -1.0], [0.0, 1.0], [5.0, 5.0], 1.0),
    ],
)
def test_training_ends_at_the_minimiser_in_closed_form(h, goal, fisher, anchor, weight):
    x, y = torch.zeros(40, 2), torch.arange(40) % 2
    stream = float_stream([x, x], [y, y], "domain")
    strategies = {"ewc": EWC(weight=weight), "task": Quadratic(h, goal)}
    learner = Learner(stream, TwoWeights(), strategies, partial(torch.optim.SGD, lr=0.1), batch_size=1)
    learner.strategies["ewc"].importance[:2] = torch.tensor(fisher)
    learner.strategies["ewc"].anchor[:2] = torch.tensor(anchor)
    learner.tasks_learned = 1
    learn(learner, stream, [1], epochs=8)
    h, goal, fisher, anchor = map(np.array, (h, goal, fisher, anchor))
    expected = (h * goal + weight * fisher * anchor) / (h + weight * fisher)
    np.testing.assert_allclose(learner.backbone.theta.detach(), expected, atol=1e-4)


def test_worked_example_14_the_penalty_has_a_half():
    x, y = torch.zeros(2, 2), torch.arange(2)
    learner = build(float_stream([x, x], [y, y], "domain"), TwoWeights(), EWC(weight=4.0))
    strategy = learner.strategies["method"]
    strategy.importance[0], strategy.anchor[0] = 0.5, 1.0
    learner.backbone.theta.data[0] = 2.0
    assert strategy.loss(learner, None, None) is None, "nothing to hold in the first task"
    learner.tasks_learned = 1
    assert float(strategy.loss(learner, None, None).detach()) == pytest.approx(1.0)


def test_ewc_refuses_what_it_cannot_measure():
    with pytest.raises(InputError, match="no kind of Fisher called 'emprical': did you mean 'empirical'"):
        EWC(fisher="emprical")
    with pytest.raises(InputError, match="no merge of Fishers called 'men': did you mean 'mean'"):
        EWC(merge="men")
    with pytest.raises(InputError, match="batch_size=20 needs one label an example: empirical or sampled"):
        EWC(batch_size=20)
    with pytest.raises(InputError, match="batch_size=0 must be 1 or more"):
        EWC(fisher="empirical", batch_size=0)
    for other in (LwF, EWC, NCM):
        with pytest.raises(InputError, match="another strategy owns encode: drop one"):
            toy({"l2p": L2P(), "other": other()}, backbone="vit")


# ------------------------------------------------------------------ LwF


def test_worked_example_19():
    teacher, student = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    assert float(lwf.distillation(student, teacher, 2.0)) == pytest.approx(0.385120, abs=1e-5)
    assert float(lwf.distillation(student, teacher, 2.0)) / 4 == pytest.approx(0.096280, abs=1e-5)
    assert float(F.cross_entropy(student / 2, (teacher / 2).softmax(1))) == pytest.approx(1.002239, abs=1e-5)


@quick
@given(seeds, st.integers(1, 5), st.integers(2, 6), st.floats(0.5, 8))
def test_distillation_has_the_gradient_of_the_softened_cross_entropy(seed, num_rows, num_classes, temperature):
    draw = torch.Generator().manual_seed(seed)
    teacher = torch.randn(num_rows, num_classes, generator=draw)
    student = torch.randn(num_rows, num_classes, generator=draw).requires_grad_()
    soft = F.cross_entropy(student / temperature, (teacher / temperature).softmax(1)) * temperature**2
    (expected,) = torch.autograd.grad(soft, student)
    value = lwf.distillation(student, teacher, temperature)
    (got,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
    entropy = -((teacher / temperature).softmax(1) * (teacher / temperature).log_softmax(1)).sum(1).mean()
    assert float(value.detach()) == pytest.approx(float((soft - temperature**2 * entropy).detach()), abs=1e-3)
    assert float(value.detach()) >= -1e-5 and float(lwf.distillation(teacher, teacher, temperature)) == pytest.approx(
        0, abs=1e-5
    )


@pytest.mark.parametrize(
    ("scenario", "groups"),
    [("class", [[0, 1, 2, 3]]), ("task", [[0, 1], [2, 3]]), ("domain", [[0, 1]])],
)
def test_what_is_distilled_in_each_scenario(scenario, groups):
    learner, stream = toy(LwF(alpha=0.7, temperature=3.0), [0, 1], scenario=scenario)
    strategy = learner.strategies["method"]
    learner.before_task(stream[2])
    learner.tasks_learned = 2
    x, y, task = (column[:10] for column in stream[2].train.tensors())
    batch = Batch(x, y, task, num_incoming=6, view=learner.prepare(x))  # four replayed rows are not distilled
    with torch.no_grad():
        taught = learner(batch.view)
        for p in learner.trunk().parameters():
            p += 0.1
        logits = learner(batch.view)
        got = strategy.loss(learner, batch, logits)
    expected = sum(
        0.7 * 9 * F.kl_div((logits[:6, g] / 3).log_softmax(1), (taught[:6, g] / 3).softmax(1), reduction="batchmean")
        for g in groups
    )
    assert float(got) == pytest.approx(float(expected), rel=1e-4) and float(got) > 0


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    ("train_mask", "per_task", "times"), [("domain", True, 2), ("domain", False, 1), ("task", True, 1)]
)
def test_lwf_as_in_released_codes(scaled, train_mask, per_task, times):
    """All outputs where all competed when the teacher was trained; without T^2; once for each old task."""
    method = LwF(alpha=0.7, temperature=3.0, scaled=scaled, per_task=per_task)
    learner, stream = toy(method, [0, 1], train_mask=train_mask)
    learner.before_task(stream[2])
    learner.tasks_learned = 2
    x, y, task = (column[:10] for column in stream[2].train.tensors())
    batch = Batch(x, y, task, view=learner.prepare(x))
    with torch.no_grad():
        taught = learner(batch.view)
        for p in learner.trunk().parameters():
            p += 0.1
        logits = learner(batch.view)
        got = method.loss(learner, batch, logits)
    groups = [range(6)] if train_mask == "domain" else [[0, 1], [2, 3]]
    soft = [((logits[:, g] / 3).log_softmax(1), (taught[:, g] / 3).softmax(1)) for g in groups]
    expected = 0.7 * (9 if scaled else 1) * times * sum(float((q * (q.log() - p)).sum(1).mean()) for p, q in soft)
    assert float(got) == pytest.approx(expected, rel=1e-4) and expected > 0


def test_the_teacher_is_the_network_of_before_the_task_all_through_it():
    class Noisy(ToyBackbone):
        def __init__(self) -> None:
            super().__init__()
            self.layers.append(nn.BatchNorm1d(16))
            self.layers.append(nn.Dropout(0.5))

    class Watch(Strategy):
        def after_step(self, learner, batch, logits):
            teacher = learner.strategies["lwf"].teacher
            assert not any(m.training for m in teacher.modules())
            self.steps = getattr(self, "steps", 0) + 1
            self.kept = [t.clone() for t in teacher.state_dict().values()]

    stream, watch = toy_stream(), Watch()
    strategies = {"lwf": LwF(), "watch": watch}
    learner = Learner(stream, Noisy(), strategies, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    learn(learner, stream, [0])
    before = trunk(learner)
    learn(learner, stream, [1], epochs=2)
    assert watch.steps == 18 and same(dict(zip(before, watch.kept, strict=True)), before)
    assert not same(trunk(learner), before)
    assert not any(p.requires_grad for p in learner.strategies["lwf"].parameters())


def test_lwf_without_weight_is_finetuning():
    with_term, without = toy(LwF(alpha=0.0), range(3))[0], toy(None, range(3))[0]
    for a, b in zip(trunk(with_term).values(), trunk(without).values(), strict=True):
        torch.testing.assert_close(a, b)
    assert not same(trunk(toy(LwF(), range(3))[0]), trunk(without))


# ------------------------------------------------------------------ NCM


def test_ncm_does_not_depend_on_the_order_of_tasks():
    base = toy_stream(3)
    results = []
    for order in permutations(range(3)):
        parts = [base[i].train.tensors() for i in order]
        stream = float_stream([p[0] for p in parts], [p[1] for p in parts])
        torch.manual_seed(0)
        learner = learn(build(stream, ToyBackbone(), NCM()), stream)
        results.append((learner.strategies["method"].total, learner.strategies["method"].count))
    for total, count in results[1:]:
        torch.testing.assert_close(total, results[0][0])
        assert torch.equal(count, results[0][1])


def test_ncm_is_the_nearest_centroid_in_angle():
    from sklearn.neighbors import NearestCentroid

    learner, stream = toy(NCM(), range(3))
    x, y, _ = TaskData.concat([t.train for t in stream]).tensors()
    test = TaskData.concat([t.test for t in stream]).tensors()
    features = learner.backbone(learner.prepare(x)).detach().numpy()
    varied = features.std(0) > 0  # scikit-learn warns of the others, which are 0 and add nothing to a cosine
    features = features[:, varied]
    queries = learner.backbone(learner.prepare(test[0])).detach().numpy()
    assert not queries[:, ~varied].any()
    queries = queries[:, varied]
    # The nearest unit-length centroid to a unit-length query is the one of largest cosine.
    centres = NearestCentroid().fit(features, y.numpy())
    centroids = centres.centroids_ / np.linalg.norm(centres.centroids_, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    distances = ((queries[:, None] - centroids[None]) ** 2).sum(2)
    ours = learner.strategies["method"].predict(learner, learner.prepare(test[0])).detach()
    np.testing.assert_allclose(ours, 1 - distances / 2, atol=1e-5)
    assert (ours.argmax(1).numpy() == distances.argmin(1)).all()


def test_ncm_trains_nothing_unless_asked_and_ignores_batch_sizes():
    learner, stream = toy(NCM(), range(3))
    assert same(trunk(learner), trunk(toy(None)[0]))
    torch.manual_seed(0)
    other = Learner(stream, ToyBackbone(), {"method": NCM()}, partial(torch.optim.SGD, lr=0.1), eval_batch_size=7)
    learn(other, stream)
    torch.testing.assert_close(other.strategies["method"].total, learner.strategies["method"].total)
    assert same(trunk(toy(NCM(freeze=False), range(3))[0]), trunk(toy(None, range(3))[0]))


def test_the_means_are_taken_in_evaluation_mode():
    class Noisy(ToyBackbone):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    stream = toy_stream()
    torch.manual_seed(0)
    noisy = learn(build(stream, Noisy(), NCM(freeze=False)), stream, [0], epochs=0)
    torch.manual_seed(0)
    plain = learn(build(stream, ToyBackbone(), NCM(freeze=False)), stream, [0], epochs=0)
    torch.testing.assert_close(noisy.strategies["method"].total, plain.strategies["method"].total)
    assert noisy.backbone.training


def test_a_class_without_a_mean_is_farthest():
    learner, stream = toy(NCM(), [0])
    out = learner.strategies["method"].predict(learner, learner.prepare(stream[2].test.x))
    assert bool((out[:, 2:] == -1).all()) and bool((out[:, :2] >= -1).all())


# ------------------------------------------------------------------ L2P


class Transformer(nn.Module):
    """Two tokens of a linear embedding behind a class token, and one attention layer with dropout."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cls = nn.Linear(8, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)

    def embed(self, x):
        tokens = self.embedding(x.flatten(1).view(len(x), 2, 8))
        return torch.cat([self.cls.expand(len(x), 1, 8), tokens], 1)

    def encode(self, tokens):
        return self.block(tokens)

    def forward(self, x):
        return self.encode(self.embed(x))[:, 0]


def l2p_learner(scenario="class", **options) -> tuple[Learner, Stream, L2P]:
    torch.manual_seed(0)
    stream = toy_stream(3, scenario)
    learner = build(stream, Transformer(), L2P(**{"pool_size": 6, "length": 2, "top_k": 3, **options}))
    return learner, stream, learner.strategies["method"]


def queries(learner: Learner, view: torch.Tensor) -> torch.Tensor:
    learner.backbone.eval()
    with torch.no_grad():
        return learner.backbone(view)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_l2p_on_one_batch_by_hand(scenario):
    learner, stream, strategy = l2p_learner(scenario, pull=0.3)
    for learned in stream[:2]:
        learner.before_task(learned)
    x, y, task = (column[:5] for column in stream[1].train.tensors())
    view = learner.prepare(x)
    batch = Batch(x, y, task, view=view)
    logits = learner(view)
    loss = strategy.criterion(learner, batch, logits).detach()
    query, features, pull = queries(learner, view), [], 0.0
    keys, prompts = strategy.keys.detach(), strategy.prompts.detach()
    for i in range(5):
        cosines = [float(query[i] @ k / (query[i].norm() * k.norm())) for k in keys]
        chosen = sorted(range(6), key=lambda k: -cosines[k])[:3]
        pull += sum(cosines[k] for k in chosen) / 5
        tokens = torch.cat([*(prompts[k] for k in chosen), learner.backbone.embed(view[i : i + 1])[0]])
        features.append(learner.backbone.encode(tokens[None])[0, : 3 * 2].mean(0))
    expected_logits = learner.head(torch.stack(features)).detach()
    torch.testing.assert_close(logits.detach(), expected_logits, rtol=1e-4, atol=1e-5)
    own = slice(0, 2) if scenario == "domain" else slice(2, 4)
    cross_entropy = F.cross_entropy(expected_logits[:, own], y - own.start)
    assert float(loss) == pytest.approx(float(cross_entropy) - 0.3 * pull, rel=1e-4)


def test_only_chosen_keys_are_pulled_towards_their_queries():
    learner, stream, strategy = l2p_learner(pool_size=20, top_k=2)
    view = learner.prepare(stream[0].train.x[:3])
    learner(view)
    cosines = F.cosine_similarity(queries(learner, view)[:, None], strategy.keys[None], dim=2)
    chosen = set(cosines.topk(2, dim=1).indices.flatten().tolist())
    (grad,) = torch.autograd.grad(-strategy._pulled, strategy.keys)
    assert {k for k in range(20) if grad[k].abs().sum() > 0} == chosen and len(chosen) < 20
    before = float(strategy._pulled.detach())
    with torch.no_grad():
        strategy.keys -= 1e-2 * grad
    learner(view)
    assert float(strategy._pulled.detach()) > before


def test_the_frozen_transformer_stays_to_the_bit_and_prompts_learn():
    learner, stream, strategy = l2p_learner()
    before = {name: tensor.clone() for name, tensor in learner.backbone.state_dict().items()}
    prompts, keys = strategy.prompts.detach().clone(), strategy.keys.detach().clone()
    learn(learner, stream, epochs=2)
    assert same(learner.backbone.state_dict(), before)
    assert not torch.equal(strategy.prompts, prompts) and not torch.equal(strategy.keys, keys)
    trained = {id(p) for group in learner.optimizers().param_groups for p in group["params"]}
    assert not trained & {id(p) for p in learner.backbone.parameters()}


def test_a_prediction_of_l2p_does_not_depend_on_its_batch():
    learner, stream, _ = l2p_learner()
    learn(learner, stream, [0])
    learner.train()  # which would switch the transformer's dropout on
    view = learner.prepare(TaskData.concat([t.test for t in stream]).x)
    with torch.no_grad():
        together = learner(view)
        alone = torch.cat([learner(row[None]) for row in view])
        order = torch.randperm(len(view), generator=torch.Generator().manual_seed(0))
        shuffled = learner(view[order])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[order], shuffled, rtol=1e-4, atol=1e-5)


def test_l2p_refuses_other_networks_and_pools_too_small():
    with pytest.raises(InputError, match="ToyBackbone has no embed and encode: use backbone=vit"):
        toy(L2P())
    with pytest.raises(InputError, match=r"l2p\.top_k=11 must lie between 1 and pool_size=10"):
        L2P(top_k=11)
    with pytest.raises(InputError, match=r"l2p\.top_k=0"):
        L2P(top_k=0)


# ------------------------------------------------------------------ joint and cumulative


def test_joint_is_finetuning_on_the_concatenated_stream():
    learner, stream = toy_learner({"joint": Joint()})
    matrices = Experiment(learner, stream, trainer, epochs=2).run().matrices
    for name in ("class", "task"):
        R = matrices[name].R
        assert torch.equal(R[1], R[2]) and torch.equal(R[1], R[3]) and not torch.equal(R[0], R[1])
    union = TaskData.concat([task.train for task in stream])
    whole = Stream([Task(0, TaskData(union.x, union.y), TaskData(union.x, union.y))], num_classes=6)
    torch.manual_seed(0)
    plain = Learner(whole, ToyBackbone(), {}, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    assert same(trunk(learner), trunk(learn(plain, whole, epochs=2)))


@pytest.mark.parametrize("restart", [False, True])
def test_cumulative_trains_on_the_union_so_far(restart):
    learner, stream = toy(Cumulative(restart=restart))
    for t, task in enumerate(stream):
        x, y, label = learner.strategies["method"].training_data(learner, task).tensors()
        parts = [stream[i].train.tensors() for i in range(t + 1)]
        for got, columns in zip((x, y, label), zip(*parts, strict=True), strict=True):
            assert torch.equal(got, torch.cat(columns))


def test_cumulative_starts_from_the_last_weights_or_again_from_the_first():
    only_last = trunk(toy(Cumulative(restart=True), [2])[0])
    assert same(trunk(toy(Cumulative(restart=True), range(3))[0]), only_last), "earlier tasks leave no trace"
    assert not same(trunk(toy(Cumulative(), range(3))[0]), only_last)


# ------------------------------------------------------------------ one task


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(
    "make",
    [Joint, Cumulative, partial(Cumulative, restart=True), AGEM, EWC, LwF, GPM, partial(NCM, freeze=False)],
    ids=["joint", "cumulative", "restart", "agem", "ewc", "lwf", "gpm", "ncm"],
)
def test_on_one_task_methods_are_finetuning_to_the_bit(make, scenario):
    options = {"num_tasks": 1, "scenario": scenario, "epochs": 2}
    assert same(trunk(toy(make(), [0], **options)[0]), trunk(toy(None, [0], **options)[0]))


def test_a_layer_called_twice_is_protected_for_both_inputs_and_a_silent_one_is_refused():
    layer, a, b = nn.Linear(3, 2, bias=False), torch.randn(4, 3), torch.randn(5, 3)
    (R,) = layer_inputs([layer], lambda: (layer(a), layer(b)))
    torch.testing.assert_close(R, torch.cat([a, b]).T)
    with pytest.raises(InputError, match="was not called in a forward pass"):
        layer_inputs([layer, nn.Linear(2, 2)], lambda: layer(a))
