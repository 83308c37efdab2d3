"""LingoCL: the loop written by hand, fixed rows and a fixed eta, logits that know no other class, and its partners."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from by_hand import ordered
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies.er import ER
from cl.strategies.ewc import EWC
from cl.strategies.lingocl import LingoCL
from cl.strategies.lucir import LUCIR
from cl.strategies.lwf import LwF
from cl.testing import ToyBackbone, toy_stream
from toys import learn, toy

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox")
VECTORS = {name: [1.0, float(i), float(i % 2)] for i, name in enumerate(NAMES)}


def named(strategies, optimizer=None, num_tasks=3, freeze=False, **options):
    stream = toy_stream(num_tasks)
    stream.class_names = NAMES[: 2 * num_tasks]
    torch.manual_seed(0)
    backbone = ToyBackbone().requires_grad_(not freeze)
    optimizer = optimizer or partial(torch.optim.SGD, lr=0.1)
    return Learner(stream, backbone, strategies, optimizer, batch_size=8, **options), stream


@pytest.mark.parametrize("when", ["first", "always", "never"])
def test_three_tasks_are_those_written_by_hand(when):
    learner, stream = named({"it": LingoCL(VECTORS, eta=3.0, learn_eta=when)})
    net, P = deepcopy(learner.backbone), learner.head.projection.weight.detach().clone().requires_grad_()
    rows = F.normalize(torch.tensor([VECTORS[name] for name in NAMES]), dim=1)
    eta = torch.tensor(3.0, requires_grad=True)
    for t in range(3):
        learned = when == "always" or (when == "first" and t == 0)
        optimizer = torch.optim.SGD([*net.parameters(), P, *([eta] if learned else [])], lr=0.1)
        x, y, _ = stream[t].train.tensors()
        for chosen in ordered(len(y), t):
            z = net(x[chosen].float() / 255) @ P.T
            logits = eta * (z / z.norm(dim=1, keepdim=True)) @ rows.T
            optimizer.zero_grad()
            F.cross_entropy(logits[:, : 2 * t + 2], y[chosen]).backward()
            optimizer.step()
    learn(learner, stream)
    torch.testing.assert_close(learner.head.projection.weight, P, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learner.head.eta, eta, rtol=1e-4, atol=1e-5)
    assert (float(learner.head.eta.detach()) != 3.0) == (when != "never")


def test_neither_momentum_nor_weight_decay_nor_a_penalty_moves_rows_or_a_fixed_eta():
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.05)
    strategies = {"it": LingoCL(VECTORS, eta=3.0), "ewc": EWC(weight=0.1, num_samples=20)}
    learner, stream = named(strategies, optimizer, optimizer_state="keep")
    rows = learner.head.rows.clone()
    eta = learn(learner, stream, [0]).head.eta.detach().clone()
    learn(learner, stream, [1, 2])
    assert torch.equal(learner.head.rows, rows) and torch.equal(learner.head.eta.detach(), eta) and eta != 3.0


def test_more_classes_change_no_logit_of_the_others():
    few, many = (named({"it": LingoCL(VECTORS)}, num_tasks=n)[0] for n in (2, 3))
    many.load_state_dict({**many.state_dict(), **{k: v for k, v in few.state_dict().items() if "projection" in k}})
    view = toy_stream()[0].test.x.float() / 255
    torch.testing.assert_close(many(view)[:, :4], few(view), rtol=0, atol=0)


def test_on_a_frozen_backbone_the_projection_is_what_learns():
    learner, stream = named({"it": LingoCL("orthogonal")}, freeze=True)
    assert isinstance(learner.head.projection, nn.Linear)
    before, body = learner.head.projection.weight.detach().clone(), deepcopy(learner.backbone.state_dict())
    learn(learner, stream)
    assert not torch.equal(learner.head.projection.weight, before)
    assert all(torch.equal(body[name], value) for name, value in learner.backbone.state_dict().items())


def test_a_distilling_method_sees_these_logits():
    learner, stream = named({"it": LingoCL(VECTORS), "lwf": LwF()})
    learn(learner, stream, [0])
    teacher, view = learner.strategies["lwf"].teacher, learner.prepare(stream[0].test.x)
    assert teacher["head"] is not learner.head
    teacher.copy_from(learner)
    assert torch.equal(teacher(view), learner(view))


def test_remarks_name_the_nearest_classes_or_the_control():
    learner, _ = named({"it": LingoCL(VECTORS)})
    said = learner.strategies["it"].remark(learner)
    assert said.startswith("Of the class vectors those of 'dog' and 'fox' are nearest: cosine 0.99")
    learner, _ = named({"it": LingoCL()})
    assert "are random and orthogonal, the control" in learner.strategies["it"].remark(learner)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LingoCL(learn_eta="once"), "time to learn eta"),
        (lambda: LingoCL(eta=0.0), r"lingocl\.eta=0\.0 must be"),
        (lambda: toy({"ewc": EWC(), "lingocl": LingoCL()}), "ewc before it has state .*: name lingocl first"),
        (lambda: toy({"lwf": LwF(), "lingocl": LingoCL()}), "lwf before it has state .*: name lingocl first"),
        (lambda: toy({"lingocl": LingoCL(), "lucir": LUCIR(12)}), "the head LanguageHead has no weight"),
        (lambda: toy({"a": LingoCL(), "b": LingoCL()}), "as another strategy does: drop one"),
        (lambda: toy(LingoCL(VECTORS)), "have no names to look vectors up by"),
    ],
)
def test_lingocl_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_memory_may_come_before_it():
    learner, _ = toy({"er": ER(12), "lingocl": LingoCL()}, range(2))
    assert learner.tasks_learned == 2
