"""Supermasks in Superposition: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.backbones.networks import MLP
from cl.data.task import SCENARIOS, Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.random import derive
from cl.strategies.supsup import SupSup, entropy_slopes, supermask
from cl.streams.boundary_free import boundary_free
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.isolation import layer_weights
from draws import quick
from old_answers import NETS, OPTIMIZERS, SGD, build, drift, learn
from toys import trainer

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
    with pytest.raises(InputError, match=r"SupSup learns masks by task, but .* has no boundaries"):
        build(SupSup(), stream=boundary_free(toy_stream(3, "task")))
    with pytest.raises(InputError, match=r"supsup\.density=0 must be above 0 and at most 1"):
        SupSup(density=0)
