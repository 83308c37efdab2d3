"""Trust Region Gradient Projection: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cl.data.task import Stream, TaskData
from cl.engine.batch import Batch
from cl.errors import InputError
from cl.strategies.cuber import CUBER
from cl.strategies.trgp import TRGP
from cl.testing import ToyBackbone, toy_learner, toy_stream
from cl.toolkit.subspace import Subspaces, protected_layers
from draws import quick, seeds
from subspaces import ConvNet, TwoLayers, build, random_stream
from toys import learn


def test_worked_example_11():
    subspaces, W = Subspaces(2, 2), torch.tensor([[1.0, 2.0]])
    subspaces.basis[0, 0], subspaces.member[0, 0] = 1, True
    subspaces.begin(torch.tensor([True, False]))
    assert torch.equal(subspaces.weight(W, 1, True), W), "Q begins as the identity"
    subspaces.shift.data[0, 0] = 0.5
    assert subspaces.weight(W, 1, True).tolist() == [[1.5, 2.0]]
    assert torch.equal(subspaces.weight(W, 0, False), W), "the old task has none"
    subspaces.end(1, torch.tensor([[0.0], [1.0]]), 1.0)
    assert subspaces.weight(W, 1, True).tolist() == subspaces.weight(W, 1, False).tolist() == [[1.5, 2.0]]
    assert not subspaces.shift.any() and subspaces.member.tolist() == [[True, False], [False, True]]


@quick
@given(seeds, st.integers(2, 10), st.integers(1, 12), st.floats(0.1, 1.0))
def test_a_tasks_own_subspace_is_as_small_as_the_criterion_allows(seed, size, count, threshold):
    draw = torch.Generator().manual_seed(seed)
    subspaces = Subspaces(size, 3)
    for task in range(3):
        R = torch.randn(size, count, generator=draw) * torch.rand(count, generator=draw)
        before = subspaces.basis.clone()
        subspaces.end(task, R, threshold)
        basis, own = subspaces.basis, subspaces.basis[:, subspaces.member[task]]
        used = int(subspaces.member.any(0).sum())
        torch.testing.assert_close(basis.T @ basis, torch.diag((torch.arange(size) < used).float()), atol=1e-4, rtol=0)
        kept = before.any(0)
        assert torch.equal(basis[:, kept], before[:, kept]), "directions are added, never changed"
        total, energy = R.square().sum(), (own.T @ R).square().sum(1)
        assert float(energy.sum()) >= (threshold - 1e-4) * float(total)
        assert float(energy.sum() - energy.min()) < (threshold + 1e-4) * float(total), "one fewer is not enough"


def trgp_by_hand(stream: Stream, weights, lr: float, epochs: int, trust: float, threshold: float, most: int = 2):
    """Two linear layers with a ReLU each and a head, full batches, Q for each selected task as in the paper."""
    layers, head = [w.clone() for w in weights[:2]], [w.clone() for w in weights[2:]]
    union = [torch.zeros(len(w.T), 0) for w in layers]
    bases: list[list[torch.Tensor]] = []
    scales: list[list[list[tuple[int, torch.Tensor]]]] = []

    def forward(x, layers, head, scale):
        inputs = []
        for i, W in enumerate(layers):
            for j, Q in scale[i]:
                W = W + layers[i] @ bases[j][i] @ (Q - torch.eye(len(Q))) @ bases[j][i].T
            inputs.append(x.detach().T)
            x = (x @ W.T).relu()
        return x @ head[0].T + head[1], inputs

    for t, task in enumerate(stream):
        x, y, _ = task.train.tensors()
        classes = list(task.classes)

        def loss_of(layers, head, scale, x=x, y=y, classes=classes):
            return F.cross_entropy(forward(x, layers, head, scale)[0][:, classes], y - classes[0])

        live = [w.clone().requires_grad_() for w in layers]
        gradients = torch.autograd.grad(loss_of(live, head, [[], []]), live)
        scale = []
        for i, g in enumerate(gradients):
            norms = {j: float((g @ bases[j][i] @ bases[j][i].T).norm()) for j in range(t)}
            first = sorted(norms, key=lambda j: -norms[j])[:most]
            scale.append([(j, torch.eye(bases[j][i].shape[1])) for j in first if norms[j] > trust * float(g.norm())])
        for _ in range(epochs):
            live = [w.clone().requires_grad_() for w in (*layers, *head)]
            steps = [[(j, Q.clone().requires_grad_()) for j, Q in some] for some in scale]
            everything = [*live, *(Q for some in steps for _, Q in some)]
            gradients = list(torch.autograd.grad(loss_of(live[:2], live[2:], steps), everything))
            for i in range(2):
                gradients[i] = gradients[i] - gradients[i] @ union[i] @ union[i].T
            new = [p.detach() - lr * g for p, g in zip(everything, gradients, strict=True)]
            layers, head, rest = new[:2], new[2:4], iter(new[4:])
            scale = [[(j, next(rest)) for j, _ in some] for some in steps]
        own = []
        for i, R in enumerate(forward(x, layers, head, scale)[1]):
            U, S, _ = torch.linalg.svd(R - union[i] @ union[i].T @ R, full_matrices=False)
            every = torch.cat([union[i], U], 1)
            score = torch.cat([(union[i].T @ R).square().sum(1), S**2])
            taken, have = [], 0.0
            for c in score.argsort(descending=True).tolist():
                if have < threshold * float(R.square().sum()):
                    taken, have = [*taken, c], have + float(score[c])
            own.append(every[:, taken])
            union[i] = torch.cat([union[i], every[:, [c for c in taken if c >= union[i].shape[1]]]], 1)
        bases.append(own)
        scales.append(scale)
    return layers, [forward(task.train.x, layers, head, s)[0] for task, s in zip(stream, scales, strict=True)], scales


@pytest.mark.parametrize("trust", [0.0, 0.7, 2.0])
def test_trgp_is_the_loop_written_by_hand(trust):
    torch.manual_seed(0)
    stream = random_stream((10,), num_rows=6, scenario="task", num_tasks=4)
    learner = build(stream, TwoLayers(), TRGP(0.9, 0.0, trust, num_samples=6), lr=0.2, batch_size=6)
    start = [p.detach().clone() for p in learner.trunk().parameters()]
    learn(learner, stream, epochs=8)
    layers, logits, scales = trgp_by_hand(stream, start, 0.2, 8, trust, 0.9)
    sizes = [len(some) for task in scales for some in task]
    assert set(sizes) == {0.0: {0, 1, 2}, 0.7: {0, 1, 2}, 2.0: {0}}[trust]
    assert trust != 0.7 or 0 in sizes[2:] or 1 in sizes[4:], "not all that could be is trusted"
    for ours, theirs in zip((learner.backbone.one.weight, learner.backbone.two.weight), layers, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-4, rtol=1e-3)
    for task, theirs in zip(stream, logits, strict=True):
        ours = learner.predict(Batch(*task.train.tensors())).detach()
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_rows_of_several_tasks_are_each_answered_under_their_own_weights():
    stream = random_stream((10,), num_rows=6, scenario="task", num_tasks=3)
    torch.manual_seed(0)
    learner = learn(build(stream, TwoLayers(), TRGP(0.9, trust=0.0, num_samples=6), lr=0.2), stream, epochs=5)
    own = [learner.predict(Batch(*task.train.tensors())).detach() for task in stream]
    mixed = TaskData.concat([task.train for task in stream])
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    x, y, label = (column[order] for column in mixed.tensors())
    together = learner.predict(Batch(x, y, label)).detach()
    torch.testing.assert_close(together, torch.cat(own)[order], atol=1e-6, rtol=1e-5)
    plain = learner.head(learner.backbone(mixed.tensors()[0])).detach()
    changed = (plain - torch.cat(own)).abs().amax(1).view(3, 6)
    assert changed[0].max() == 0 and changed[1:].min() > 1e-3


@quick
@given(seeds)
def test_a_linear_layers_inputs_may_be_scaled_in_place_of_its_weight(seed):
    draw = torch.Generator().manual_seed(seed)
    subspaces, found = Subspaces(6, 3), []
    for task in range(2):
        subspaces.end(task, torch.randn(6, 3, generator=draw), 0.9)
    subspaces.begin(torch.tensor([True, True, False]))
    subspaces.shift.data[:] = torch.randn(6, 6, generator=draw)
    W, x = torch.randn(4, 6, generator=draw, requires_grad=True), torch.randn(5, 6, generator=draw)
    for y in (F.linear(subspaces.inputs(x, 2, True), W), F.linear(x, subspaces.weight(W, 2, True))):
        found.append((y, *torch.autograd.grad(y.square().sum(), (W, subspaces.shift))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    used = subspaces.member[:2].any(0)
    assert found[0][2][used][:, used].any() and not found[0][2][~used].any() and not found[0][2][:, ~used].any()


def test_convolutions_are_scaled_too():
    stream = random_stream((16, 5, 5), num_rows=3, scenario="task", num_tasks=3)
    torch.manual_seed(0)
    learner = build(
        stream, ConvNet(stride=2, padding=1), TRGP(1.0, 0.0, trust=0.0, num_samples=3), lr=0.1, batch_size=3
    )
    first = learn(learner, stream, [0], 5).predict(Batch(*stream[0].train.tensors())).detach()[:, :2]
    now = learn(learner, stream, [1, 2], 5).predict(Batch(*stream[0].train.tensors())).detach()[:, :2]
    torch.testing.assert_close(now, first, atol=1e-5, rtol=1e-4)
    x, _, label = stream[2].train.tensors()
    assert all(part.scaling[2].any() for part in learner.strategies["method"].subspaces)
    assert (learner.features(x, label) - learner.backbone(x)).abs().max() > 1e-3


@pytest.mark.parametrize("make", [TRGP, CUBER])
def test_one_head_for_all_tasks_is_a_layer_like_the_others(make):
    stream = random_stream((10,), num_rows=3, scenario="task", num_tasks=3, shared=True)
    torch.manual_seed(0)
    never = {"trust": 0.0} if make is TRGP else {"sufficient": 0.0, "positive": 2.0}  # regime 2 alone
    learner = build(stream, TwoLayers(), make(1.0, num_samples=3, **never), lr=0.2, batch_size=3)
    assert learner.head.weight.shape == (2, 8) and len(protected_layers(learner)) == 3
    first = learn(learner, stream, [0], 5).predict(Batch(*stream[0].train.tensors())).detach()
    kept = {name: p.detach().clone() for name, p in learner.head.named_parameters()}
    learn(learner, stream, [1, 2], 20)
    own = [learner.predict(Batch(*task.train.tensors())).detach() for task in stream]
    torch.testing.assert_close(own[0], first, atol=1e-5, rtol=1e-4)
    assert torch.equal(learner.head.bias, kept["bias"]) and not torch.equal(learner.head.weight, kept["weight"])
    head = learner.strategies["method"].subspaces[2]
    assert not head.scaling[0].any() and head.scaling[1].any() and head.scaling[2].any()
    mixed = TaskData.concat([task.train for task in stream])
    torch.testing.assert_close(learner.predict(Batch(*mixed.tensors())).detach(), torch.cat(own), atol=1e-6, rtol=1e-5)
    features = learner.features(stream[2].train.tensors()[0], torch.full((3,), 2))
    assert (learner.head(features) - own[2]).abs().max() > 1e-3, "the head is scaled as well"
    assert max(F.cross_entropy(logits, task.train.labels) for logits, task in zip(own, stream, strict=True)) < 0.69


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_trgp_refuses_other_scenarios(scenario):
    message = f"TRGP works with scenario=task, but this run has scenario={scenario}, .* use scenario=task"
    with pytest.raises(InputError, match=message):
        toy_learner({"method": TRGP()}, scenario=scenario)


@pytest.mark.parametrize(
    ("arguments", "optimizer", "message"),
    [
        ({}, partial(torch.optim.SGD, lr=0.1, weight_decay=0.1), "TRGP needs plain SGD.*weight_decay=0.1"),
        ({"threshold": [0.9] * 3}, None, r"trgp\.threshold has 3 values for 2 layers"),
        ({"max_tasks": 0}, None, r"trgp\.max_tasks=0 must be 1 or more"),
        ({"trust": -1.0}, None, r"trgp\.trust=-1\.0 must be 0 or more"),
    ],
)
def test_trgp_refuses(arguments, optimizer, message):
    with pytest.raises(InputError, match=message):
        build(toy_stream(scenario="task"), ToyBackbone(), TRGP(**arguments), optimizer=optimizer)
