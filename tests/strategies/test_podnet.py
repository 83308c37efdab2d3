"""PODNet: pooling, similarities and the loss worked by hand, and a task written by hand."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from by_hand import ordered
from cl.backbones.networks import ResNet18, SimpleCNN
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies.podnet import PODNet, local_similarity, margin_entropy
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.pooled import features_and_maps, pooled_distance
from draws import quick, seeds
from toys import build, learn, toy


def test_pooling_worked_by_hand():
    a = torch.tensor([[[[1.0, 2.0], [0.0, 2.0]]]])  # squares 1 4 / 0 4: rows 5, 4 and columns 1, 8
    b = torch.tensor([[[[3.0, 0.0], [0.0, 0.0]]]])  # rows 9, 0 and columns 9, 0
    p, q = torch.tensor([5.0, 4.0, 1.0, 8.0]), torch.tensor([9.0, 0.0, 9.0, 0.0])
    expected = float((p / 106**0.5 - q / 162**0.5).norm())
    assert float(pooled_distance([a], [b])) == pytest.approx(expected)
    assert float(pooled_distance([a, a], [b, a])) == pytest.approx(expected / 2), "the mean over stages"
    assert float(pooled_distance([torch.cat([a, a])], [torch.cat([b, a])])) == pytest.approx(expected / 2)


@quick
@given(seeds, st.floats(0.1, 10))
def test_pooling_sees_neither_scale_nor_sign_but_the_place(seed, scale):
    a = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    assert float(pooled_distance([a], [-scale * a])) < 1e-5
    assert float(pooled_distance([a], [a.flip(2)])) > 1e-3 and float(pooled_distance([a], [a.flip(3)])) > 1e-3


def test_stages_are_those_of_the_networks():
    for backbone, shapes in (
        (ResNet18((3, 8, 8), width=4), [(4, 8, 8), (8, 4, 4), (16, 2, 2), (32, 1, 1)]),
        (SimpleCNN((3, 8, 8), channels=(2, 3), hidden=5), [(2, 8, 8), (3, 4, 4)]),
        (ToyBackbone(), []),
    ):
        x = torch.rand(2, *((1, 4, 4) if isinstance(backbone, ToyBackbone) else (3, 8, 8)))
        features, maps = features_and_maps(backbone.eval(), x)
        assert torch.equal(features, backbone(x)) and [tuple(one.shape[1:]) for one in maps] == shapes


def test_one_proxy_is_the_cosine_and_equal_proxies_count_once():
    draw = torch.Generator().manual_seed(0)
    features, proxies = torch.randn(3, 4, generator=draw), torch.randn(5, 1, 4, generator=draw)
    cosines = F.normalize(features, dim=1) @ F.normalize(proxies[:, 0], dim=1).T
    torch.testing.assert_close(local_similarity(features, proxies), cosines)
    torch.testing.assert_close(local_similarity(features, proxies.repeat(1, 3, 1)), cosines)


def test_the_loss_worked_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0, -torch.inf], [0.0, 3.0, 3.0, -torch.inf]])
    first = float(torch.tensor([1.0, 1.0, 0.0]).logsumexp(0)) - 1.0
    second = float(torch.tensor([-1.0, 3.0, 3.0]).logsumexp(0)) + 1.0
    found = margin_entropy(logits, torch.tensor([0, 0]), torch.tensor(1.0))
    assert float(found) == pytest.approx((first + second) / 2)


def test_new_proxies_are_imprinted_and_old_ones_stay():
    learner, stream = toy(PODNet(memory_size=12, num_proxies=1), [0])
    method = learner.strategies["method"]
    before = method.proxies.detach().clone()
    method.before_task(learner, stream[1])
    with torch.no_grad():
        units = F.normalize(learner.backbone(stream[1].train.x.float() / 255), dim=1)
    for c in (2, 3):
        mean = F.normalize(units[stream[1].train.y == c].mean(0), dim=0)  # of one centre
        torch.testing.assert_close(method.proxies[c, 0], mean * before[:2].norm(dim=2).mean())
    assert torch.equal(method.proxies[[0, 1, 4, 5]], before[[0, 1, 4, 5]])


@pytest.fixture
def double():
    """Compute in 64 bits: just after a task's first step, the distances are differences of nearly equal numbers."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("imprint", "spatial"), [(True, 0.5), (False, 2.0)])
def test_the_second_and_third_task_are_those_written_by_hand(imprint, spatial, double):
    stream = toy_stream(3)
    method = PODNet(memory_size=14, num_proxies=2, margin=0.3, spatial=spatial, flat=0.5, imprint=imprint)
    torch.manual_seed(0)
    learner = learn(build(stream, SimpleCNN((1, 4, 4), (3, 4), 8), method), stream, [0], epochs=2)
    for t in (1, 2):
        state = method.random.get_extra_state()
        method.before_task(learner, stream[t])  # imprints, which is tested above
        method.random.set_extra_state(state)
        n, net = 2 * t, nn.Sequential(*deepcopy(learner.backbone))
        teacher, proxies, eta = deepcopy(net), method.proxies.detach().clone(), method.eta.detach().clone()
        x, y = (torch.cat(pair) for pair in zip(stream[t].train.tensors()[:2], method.memory.ranked()[:2], strict=True))
        optimizer = torch.optim.SGD([*net.parameters(), proxies.requires_grad_(), eta.requires_grad_()], lr=0.1)
        for rows in ordered(len(y), t, epochs=2):
            view, label = (x[rows].float() / 255).double(), y[rows]
            maps = [[one[:1](view), one[:4](view)] for one in (net, teacher)]
            f, g = F.normalize(net(view), dim=1), F.normalize(teacher(view), dim=1).detach()
            cosines = torch.einsum("bd,cpd->bcp", f, F.normalize(proxies[: n + 2], dim=2))
            o = eta * (cosines.exp() / cosines.exp().sum(2, keepdim=True) * cosines).sum(2)
            o = o - 0.3 * eta * F.one_hot(label, n + 2)
            moved = pooled_distance(maps[0], [one.detach() for one in maps[1]])
            near = 0.5 * (1 - (f * g).sum(1)).mean() + spatial * moved
            optimizer.zero_grad()
            (F.cross_entropy(o, label) + ((n + 2) / 2) ** 0.5 * near).backward()
            proxies.grad[:n] = 0
            optimizer.step()
        learn(learner, stream, [t], epochs=2)
        for ours, theirs in zip(learner.backbone.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(method.proxies, proxies, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(method.eta, eta, rtol=1e-9, atol=1e-10)
        assert torch.bincount(method.memory.ranked()[1]).tolist() == [14 // (n + 2)] * (n + 2)


def test_where_no_maps_are_distilled_a_remark_says_so():
    assert "the features alone" in PODNet().remark(toy(PODNet())[0])
    stream = toy_stream(2)
    assert PODNet().remark(build(stream, SimpleCNN((1, 4, 4), (3,), 8), PODNet())) is None
    assert PODNet().remark(build(stream, ResNet18((1, 8, 8), width=2), PODNet())) is None


class OwnsEncode(Strategy):
    def encode(self, learner, view):
        return learner.backbone(view)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toy(PODNet(), scenario="task"), "PODNet works with scenario=class, but .* scenario=task"),
        (lambda: toy(PODNet(memory_size=5)), r"podnet\.memory_size=5 leaves some of the 6 classes .* to 6 or more"),
        (lambda: toy({"other": OwnsEncode(), "podnet": PODNet()}), "both define encode"),
        (lambda: PODNet(num_proxies=0), r"podnet\.num_proxies=0 must be 1 or more"),
    ],
)
def test_podnet_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()
