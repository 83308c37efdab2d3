"""LUCIR: margins, weights and embeddings worked by hand, and a task written by hand."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from by_hand import close, ordered
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies.lucir import LUCIR, margin_ranking
from cl.testing import ToyBackbone, toy_stream
from draws import quick, seeds
from toys import build, learn, toy


def test_margins_worked_by_hand():
    """Rows of old classes 0 and 1; of the new classes 2, 3 and 4 the two nearest count."""
    cosines = torch.tensor([[0.8, 0.1, 0.5, 0.4, -0.9], [0.3, 0.2, 0.1, 0.0, 0.6], [0.0, 0.0, 0.9, 0.0, 0.0]])
    y, old, new = torch.tensor([0, 1, 2]), torch.arange(5) < 2, torch.tensor([2, 3, 4])
    first, second = 0.2 + 0.1, 0.4 + 0.9
    assert float(margin_ranking(cosines, y, old, new, 0.5, 2)) == pytest.approx((first + second) / 2)
    assert float(margin_ranking(cosines, y, old, new, 0.5, 1)) == pytest.approx((0.2 + 0.9) / 2)
    assert float(margin_ranking(cosines, y, old, new, 0.5, 9)) == pytest.approx((first + second + 0.3) / 2)
    assert float(margin_ranking(cosines[2:], y[2:], old, new, 0.5, 2)) == 0, "no example of an old class"


@quick
@given(seeds, st.integers(1, 6), st.floats(0, 1))
def test_no_margin_is_missed_exactly_where_all_new_classes_are_far(seed, rows, margin):
    draw = torch.Generator().manual_seed(seed)
    cosines, y = 2 * torch.rand(rows, 5, generator=draw) - 1, torch.randint(3, (rows,), generator=draw)
    old, new = torch.arange(5) < 3, torch.tensor([3, 4])
    missed = (cosines.gather(1, y[:, None]) - cosines[:, 3:] < margin).any()
    assert bool(margin_ranking(cosines, y, old, new, margin, 2) > 0) == bool(missed)


def test_the_weight_grows_with_the_root_of_old_classes_for_each_new_one():
    learner, stream = toy(LUCIR(memory_size=12, weight=3.0))
    method, found = learner.strategies["method"], []
    for task in stream:
        learn(learner, stream, [task.index])
        found.append(method._weight)
    assert found == pytest.approx([0, 3, 3 * 2**0.5])


def test_new_embeddings_are_imprinted_and_old_ones_stay():
    learner, stream = toy(LUCIR(memory_size=12), [0], epochs=2)
    before = learner.head.weight.detach().clone()
    learner.strategies["method"].before_task(learner, stream[1])
    with torch.no_grad():
        features = learner.backbone(stream[1].train.x.float() / 255)
    for c in (2, 3):
        units = [row / row.norm() for row in features[stream[1].train.y == c]]
        mean = sum(units) / len(units)
        expected = mean / mean.norm() * (before[0].norm() + before[1].norm()) / 2
        torch.testing.assert_close(learner.head.weight[c], expected)
    assert torch.equal(learner.head.weight[[0, 1, 4, 5]], before[[0, 1, 4, 5]])


def test_without_imprinting_and_in_the_first_task_embeddings_start_as_they_are():
    for learner, stream, index in ((*toy(LUCIR(memory_size=12, imprint=False), [0]), 1), (*toy(LUCIR(12)), 0)):
        before = learner.head.weight.detach().clone()
        learner.strategies["method"].before_task(learner, stream[index])
        assert torch.equal(learner.head.weight, before)


def test_old_embeddings_keep_their_directions_under_momentum_and_weight_decay():
    stream = toy_stream(2)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.05)
    learner = learn(build(stream, ToyBackbone(), LUCIR(memory_size=12), optimizer=optimizer), stream, [0])
    before = F.normalize(learner.head.weight.detach(), dim=1)
    learn(learner, stream, [1], epochs=2)
    after = F.normalize(learner.head.weight.detach(), dim=1)
    torch.testing.assert_close(after[:2], before[:2])
    assert float((after[2:] - before[2:]).norm()) > 0.1
    assert learner.strategies["method"].eta != 1


def test_the_first_task_is_learned_by_scaled_cosines_alone():
    learner, stream = toy(LUCIR(memory_size=12))
    net, weight = deepcopy(learner.backbone), learner.head.weight.detach().clone().requires_grad_()
    eta = torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD([*net.parameters(), weight, eta], lr=0.1)
    x, y, _ = stream[0].train.tensors()
    for rows in ordered(len(y), 0):
        f = net(x[rows].float() / 255)
        cosines = (f / f.norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=1, keepdim=True)).T
        optimizer.zero_grad()
        F.cross_entropy(eta * cosines[:, :2], y[rows]).backward()
        optimizer.step()
    learn(learner, stream, [0])
    torch.testing.assert_close(learner.head.weight, weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learner.strategies["method"].eta, eta)


def test_the_second_and_third_task_are_those_written_by_hand():
    method = LUCIR(memory_size=14, weight=2.0, margin=0.4, nearest=1)
    learner, stream = toy(method, [0], epochs=2)
    for t in (1, 2):
        method.before_task(learner, stream[t])  # imprints, which is tested above
        net = deepcopy(nn.Sequential(learner.backbone, learner.head))
        teacher, n, eta = deepcopy(net[0]), 2 * t, method.eta.detach().clone().requires_grad_()
        x, y = (torch.cat(pair) for pair in zip(stream[t].train.tensors()[:2], method.memory.ranked()[:2], strict=True))
        optimizer = torch.optim.SGD([*net.parameters(), eta], lr=0.1)
        for rows in ordered(len(y), t, epochs=2):
            view, label = x[rows].float() / 255, y[rows]
            f, g = (F.normalize(each, dim=1) for each in (net[0](view), teacher(view).detach()))
            cosines = f @ F.normalize(net[1].weight, dim=1).T
            missed = [
                F.relu(0.4 - row[c] + row[n : n + 2].max()) for row, c in zip(cosines, label, strict=True) if c < n
            ]
            loss = F.cross_entropy(eta * cosines[:, : n + 2], label) + 2 * (n / 2) ** 0.5 * (1 - (f * g).sum(1)).mean()
            optimizer.zero_grad()
            (loss + (sum(missed) / len(missed) if missed else 0)).backward()
            net[1].weight.grad[:n] = 0
            optimizer.step()
        learn(learner, stream, [t], epochs=2)
        close(learner, net)
        torch.testing.assert_close(method.eta, eta, rtol=1e-4, atol=1e-5)
        assert torch.bincount(method.memory.ranked()[1]).tolist() == [14 // (n + 2)] * (n + 2)


def test_predictions_depend_neither_on_lengths_of_embeddings_nor_on_the_bias():
    learner, stream = toy(LUCIR(memory_size=12), range(2))
    view = learner.prepare(stream[0].test.x)
    before = learner(view)
    with torch.no_grad():
        learner.head.weight *= torch.arange(1.0, 7.0)[:, None]
        learner.head.bias += torch.arange(6.0)
    torch.testing.assert_close(learner(view), before)


class OwnsEncode(Strategy):
    def encode(self, learner, view):
        return learner.backbone(view)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toy(LUCIR(), scenario="task"), "LUCIR works with scenario=class, but .* scenario=task"),
        (lambda: toy(LUCIR(memory_size=5)), r"lucir\.memory_size=5 leaves some of the 6 classes .* to 6 or more"),
        (lambda: toy({"other": OwnsEncode(), "lucir": LUCIR()}), "LUCIR distils .* another strategy owns encode"),
        (lambda: toy(LUCIR(), head=nn.Sequential(nn.Linear(16, 6))), "LUCIR compares .* use head=linear"),
        (lambda: LUCIR(nearest=0), r"lucir\.nearest=0 must be 1 or more"),
    ],
)
def test_lucir_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()
