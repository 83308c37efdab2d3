"""Gradient Projection Memory: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.data.task import SCENARIOS, Stream
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies import gpm
from cl.strategies.gpm import GPM
from cl.testing import ToyBackbone, toy_stream
from draws import quick, seeds
from subspaces import ConvNet, WideNet, moved, random_stream
from toys import build, float_stream, learn, toy


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
    stream = random_stream((30,) if net == "linear" else (16, 5, 5), scenario=scenario)
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
    stream = random_stream((30,), num_tasks=3)
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
    stream = random_stream((16, 5, 5))
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
    stream = random_stream((30,))
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
    stream = random_stream((16, 5, 5))
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
