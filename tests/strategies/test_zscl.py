"""ZSCL: worked numbers, the loop written by hand, the average of weights, and zero-shot predictions that stay."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from by_hand import ordered
from cl.data.dataset import Dataset
from cl.data.task import Stream, TaskData
from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.random import derive
from cl.strategies.lingocl import LingoCL
from cl.strategies.zscl import ZSCL, smoothed, softened
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.weights import flat
from toys import learn, toy, vector

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox")
VECTORS = {name: [1.0, float(i), float(i % 2)] for i, name in enumerate(NAMES)}
ROWS = F.normalize(torch.tensor([VECTORS[name] for name in NAMES]), dim=1)


def reference(stream: Stream, rows: int = 10) -> Dataset:
    x = torch.cat([task.test.x for task in stream])[:rows]
    y = torch.zeros(len(x), dtype=torch.int64)
    return Dataset("reference", x, y, x, y, ("any",))


def named(backbone=None, lr=0.1, num_tasks=3, scenario="class", **options):
    stream = toy_stream(num_tasks, scenario)
    stream.class_names = NAMES[: 2 * num_tasks]
    torch.manual_seed(0)
    body = backbone or ToyBackbone()
    method = ZSCL(**{"vectors": VECTORS, "eta": 5.0, "reference": reference(stream), **options})
    return Learner(stream, body, {"method": method}, partial(torch.optim.SGD, lr=lr), batch_size=8), stream


def test_worked_example_of_the_distillation_and_its_gradient():
    student, teacher = torch.zeros(1, 2, requires_grad=True), torch.tensor([[2.0, 0.0]])
    value = softened(student, teacher, 2.0)
    assert float(value.detach()) == pytest.approx(2.772589, abs=1e-6)
    (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(gradient, torch.tensor([[-0.462117, 0.462117]]), atol=1e-6, rtol=0)
    twice = softened(student.expand(3, 2), teacher.expand(3, 2), 2.0)
    torch.testing.assert_close(twice, value)


def test_smoothing_is_that_of_torch_over_the_classes_that_compete():
    logits, y = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 0])
    expected = F.cross_entropy(logits[:, :3], y, label_smoothing=0.2)
    masked = logits.masked_fill(torch.arange(5) > 2, -torch.inf).requires_grad_()
    found = smoothed(masked, y, 0.2)
    torch.testing.assert_close(found, expected)
    assert bool(torch.autograd.grad(found, masked)[0].isfinite().all())


def cosines(net, P, view):
    z = net(view) @ P.T
    return 5.0 * (z / z.norm(dim=1, keepdim=True)) @ ROWS.T


def by_hand(learner, stream, epochs, every, image, text, weight, batch_size):
    """Learn every task in plain PyTorch; return the weights."""
    net, P = deepcopy(learner.backbone), learner.head.projection.weight.detach().clone().requires_grad_()
    weights, teacher, old_P = [*net.parameters(), P], deepcopy(net), P.detach().clone()
    draw = np.random.Generator(np.random.PCG64(derive(0, "method", "random")))
    images = learner.strategies["method"].reference.train_x.float() / 255
    for t in range(len(stream)):
        optimizer = torch.optim.SGD(weights, lr=0.1)
        start = [w.detach().clone() for w in weights]
        snapshots = [start]
        x, y, _ = stream[t].train.tensors()
        for step, chosen in enumerate(ordered(len(y), t, epochs)):
            view = images[draw.integers(len(images), size=batch_size)]
            new, old = cosines(net, P, view), cosines(teacher, old_P, view).detach()
            loss = F.cross_entropy(cosines(net, P, x[chosen].float() / 255)[:, : 2 * t + 2], y[chosen])
            for factor, a, b in ((image, new, old), (text, new.T, old.T)):
                p, log_q = (b / 2).softmax(1), (a / 2).log_softmax(1)
                loss = loss - factor * 4 * (p * log_q).sum(1).mean()
            loss = loss + weight * sum((w - s).square().sum() for w, s in zip(weights, start, strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % every == 0:
                snapshots.append([w.detach().clone() for w in weights])
        with torch.no_grad():
            for w, *values in zip(weights, *snapshots, strict=True):
                w.copy_(torch.stack(values).mean(0))
    return flat([w.detach() for w in weights])


def test_three_tasks_are_those_written_by_hand():
    options = {"image": 0.5, "text": 0.3, "weight": 0.2, "every": 4, "batch_size": 5}
    learner, stream = named(smoothing=0.0, **options)
    expected = by_hand(learner, stream, epochs=2, **options)
    learn(learner, stream, epochs=2)
    found = flat([p.detach() for name, p in learner.trunk().named_parameters() if "eta" not in name])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert float(learner.head.eta) == 5.0


def test_the_average_counts_the_start_once():
    """Of one task of six steps with N = 2: the start, and the weights after steps 1, 3 and 5."""
    learner, stream = named(every=2, image=0.0, text=0.0)
    seen = [vector(learner)]

    class Watch(Strategy):
        def after_step(self, learner, batch, logits):
            seen.append(vector(learner))

    learner.strategies.chains["after_step"].append(("watch", Watch().after_step))
    learn(learner, stream, [0])
    assert len(seen) == 7 and int(learner.strategies["method"].count) == 4
    torch.testing.assert_close(vector(learner), torch.stack([seen[0], seen[1], seen[3], seen[5]]).mean(0))


def trained_on_everything(stream) -> nn.Module:
    """Return a network whose first six features tell the classes of all tasks."""
    torch.manual_seed(1)
    net, rows = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), torch.eye(16)[:6]
    net.num_features = 16
    x, y, _ = TaskData.concat([task.train for task in stream]).tensors()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(10 * F.normalize(net(x.float() / 255), dim=1) @ rows.T, y).backward()
        optimizer.step()
    return net


def zero_shot(learner, task) -> float:
    x, y, label = task.test.tensors()
    with torch.no_grad():
        return float((learner.eval().predict(Batch(x, y, label)).argmax(1) == y).float().mean())


def test_a_large_weight_keeps_what_the_network_could_do_before_and_none_does_not():
    """The labels of the first task are exchanged, so that it pulls against what the network knows."""
    stream = toy_stream(3, "task")
    net, rows = trained_on_everything(stream), torch.eye(16)[:6].tolist()
    options = {"vectors": dict(zip(NAMES, rows, strict=True)), "text": 0.0, "weight": 0.0, "smoothing": 0.0}
    options |= {"every": 4, "reference": reference(stream, 72), "batch_size": 72}
    x, y, _ = stream[0].train.tensors()
    first = replace(stream[0], train=TaskData(x, 1 - y, 0))
    drift, change = {}, {}
    for weight in (0.0, 1.0, 30.0):
        learner, _ = named(deepcopy(net), lr=0.005, scenario="task", image=weight, **options)
        view = learner.prepare(torch.cat([task.test.x for task in stream]))
        before, right = learner(view).softmax(1).detach(), [zero_shot(learner, task) for task in stream]
        learn(learner.train(), Stream([first, *stream[1:]], scenario="task", num_classes=6), [0], epochs=25)
        drift[weight] = float((learner.eval()(view).softmax(1).detach() - before).abs().max())
        change[weight] = [zero_shot(learner, task) - old for task, old in zip(stream, right, strict=True)]
    assert drift[0.0] > drift[1.0] > drift[30.0] and drift[0.0] > 3 * drift[30.0], drift
    assert change[30.0] == [0, 0, 0] and max(change[0.0][1:]) < -0.3, change


def test_reference_data_are_the_data_set_else_unlabelled_inputs_else_the_incoming_ones():
    for expected, make in ((0.25, "given"), (0.5, "unlabelled"), (None, "incoming")):
        learner, stream = named(batch_size=4)
        method, task = learner.strategies["method"], stream[0]
        full = torch.full((9, 1, 4, 4), 255, dtype=torch.uint8)
        y = torch.zeros(9, dtype=torch.int64)
        method.reference = Dataset("r", full // 4, y, full // 4, y, ("any",)) if make == "given" else None
        unlabelled = TaskData(full // 2, y - 1, 0) if make != "incoming" else None
        method.before_task(learner, task.each(lambda d: d, unlabelled=unlabelled))
        batch = Batch(*(column[:5] for column in task.train.tensors()))
        batch.view = learner.prepare(batch.x)
        view = method._view(learner, batch)
        if expected is None:
            assert torch.equal(view, batch.view)
        else:
            assert view.shape == (4, 1, 4, 4) and float(view.mean()) == pytest.approx(expected, abs=0.01)


def test_the_teacher_is_the_network_at_the_very_start():
    learner, stream = named()
    view = learner.prepare(stream[0].test.x)
    before = learner(view).detach()
    learn(learner, stream)
    torch.testing.assert_close(learner.strategies["method"].teacher(view), before)
    assert not torch.allclose(learner(view), before, atol=1e-2)


class OwnsEncode(Strategy):
    def encode(self, learner, view):
        return learner.backbone(view)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toy({"other": OwnsEncode(), "zscl": ZSCL()}), "ZSCL distils .* another strategy owns encode"),
        (lambda: toy({"lingocl": LingoCL(), "zscl": ZSCL()}), "as another strategy does: drop one"),
        (lambda: ZSCL(every=0), r"zscl\.every=0 must be 1 or more"),
        (lambda: ZSCL(smoothing=1.0), r"zscl\.smoothing=1\.0 must be"),
        (
            lambda: named(
                reference=Dataset(
                    "r", torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2, 3), torch.zeros(2).long(), ("a",)
                )
            ),
            r"zscl\.reference has inputs \(3,\) of torch.float32, but those of .* \(1, 4, 4\) of torch.uint8",
        ),
    ],
)
def test_zscl_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_remarks_say_what_the_reference_data_are():
    learner, _ = named()
    assert learner.strategies["method"].remark(learner).startswith("ZSCL learns from 10 reference inputs besides")
    learner, _ = toy(ZSCL())
    assert "has no zscl.reference" in learner.strategies["method"].remark(learner)
