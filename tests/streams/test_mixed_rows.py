"""Streams in which a task's examples are those of several: each row counts under its own task's classes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from cl.app.protocol import first, rest
from cl.backbones.networks import MLP, SimpleCNN, ViT
from cl.data.sources import digits
from cl.data.task import Stream
from cl.engine.experiment import Experiment
from cl.engine.instrument import own_examples
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.measure.references import References
from cl.random import Random
from cl.strategies.cuber import CUBER
from cl.strategies.ewc import EWC
from cl.strategies.hat import HAT
from cl.strategies.mas import MAS
from cl.strategies.ogd import OGD
from cl.strategies.online_ewc import OnlineEWC
from cl.strategies.packnet import PackNet
from cl.strategies.s_prompts import SPrompts
from cl.strategies.supsup import SupSup
from cl.strategies.trgp import TRGP
from cl.streams.boundary_free import boundary_free
from cl.streams.i_blurry import i_blurry
from cl.streams.split import split
from cl.toolkit.fisher import _of_linear_layers, _one_by_one, diagonal_fisher, gradient_sum, label_weights, task_fisher
from cl.toolkit.weights import flat

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)


def stream_of(kind: str) -> Stream:
    if kind == "i-blurry":
        return i_blurry(digits(), num_tasks=3, disjoint=0.0, blur=0.5, scenario="task")
    return boundary_free(split(digits(), num_tasks=3, classes=range(9), scenario="task"))


def learner_of(stream: Stream, method: Strategy, **options: Any) -> Learner:
    torch.manual_seed(0)
    body = MLP(stream.input_shape, [12])
    return Learner(stream, body, {"method": method}, partial(torch.optim.SGD, lr=0.1), batch_size=32, **options)


def own_classes(stream: Stream, label: int) -> list[int]:
    return list(stream[label].classes)


def rows_of(learner: Learner, stream: Stream, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y, labels = stream[position].train.tensors()
    assert len(labels.unique()) > 1
    return learner.prepare(x), y, labels


def double_loop(learner: Learner, stream: Stream, position: int, kind: str, batch: int) -> torch.Tensor:
    """Row by row and class by class, each with a backward pass of its own."""
    net = nn.Sequential(learner.backbone, learner.head)
    x, y, labels = rows_of(learner, stream, position)
    total, count = torch.zeros(sum(p.numel() for p in net.parameters())), 0
    for start in range(0, len(x) // batch * batch, batch):
        logs = []
        for n in range(start, start + batch):
            allowed = own_classes(stream, int(labels[n]))
            log_p = net(x[n : n + 1])[0, allowed].log_softmax(0)
            logs.append((allowed, log_p))
        if kind == "true":
            for c in range(len(logs[0][0])):
                g = torch.autograd.grad(logs[0][1][c], list(net.parameters()), retain_graph=True)
                total += float(logs[0][1][c].detach().exp()) * flat(g).square()
        else:
            mean = sum(log_p[allowed.index(int(y[start + i]))] for i, (allowed, log_p) in enumerate(logs)) / batch
            total += flat(torch.autograd.grad(mean, list(net.parameters()))).square()
        count += 1
    return total / count


@pytest.mark.parametrize("stream", ["i-blurry", "boundary-free"])
@pytest.mark.parametrize(("kind", "batch"), [("true", 1), ("empirical", 1), ("empirical", 20)])
def test_the_fisher_takes_each_rows_own_classes(stream, kind, batch):
    stream = stream_of(stream)
    learner = learner_of(stream, Strategy())
    Experiment(learner, stream, trainer).learn(stream[0])
    found = task_fisher(learner, stream[1], kind, None, batch, Random())
    torch.testing.assert_close(found, double_loop(learner, stream, 1, kind, batch), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stream", ["i-blurry", "boundary-free"])
@pytest.mark.parametrize(
    "method",
    [
        lambda: EWC(weight=1.0),
        lambda: EWC(weight=1.0, fisher="empirical", batch_size=20),
        lambda: EWC(weight=1.0, fisher="sampled"),
        lambda: OnlineEWC(weight=1.0, fisher="empirical", batch_size=20),
        lambda: MAS(weight=0.01),
        lambda: OGD(num_samples=6, logits="all"),
        lambda: OGD(num_samples=6, logits="mean"),
    ],
)
def test_methods_that_measure_run_on_rows_of_many_tasks(stream, method):
    stream = stream_of(stream)
    learner = learner_of(stream, method())
    Experiment(learner, stream, trainer).run()
    assert all(bool(p.isfinite().all()) for p in learner.parameters())


@pytest.mark.parametrize("stream", ["i-blurry", "boundary-free"])
def test_sampled_labels_are_drawn_among_each_rows_own_classes(stream):
    stream = stream_of(stream)
    learner = learner_of(stream, Strategy())
    x, y, labels = rows_of(learner, stream, 1)
    among = learner.competing(labels)
    net = nn.Sequential(learner.backbone, learner.head)
    found = label_weights("sampled", net, x, y, among, Random())
    assert bool((found.sum(1) == 1).all()) and not bool((found.bool() & ~among).any())
    assert found[:, among.any(0)].sum(0).min() > 0


@pytest.mark.parametrize("stream", ["i-blurry", "boundary-free"])
def test_mas_takes_each_rows_own_outputs(stream):
    stream = stream_of(stream)
    learner = learner_of(stream, MAS(num_samples=None))
    net = nn.Sequential(learner.backbone, learner.head)
    x, _, labels = rows_of(learner, stream, 1)
    expected = torch.zeros(sum(p.numel() for p in net.parameters()))
    for n in range(len(x)):
        energy = net(x[n : n + 1])[0, own_classes(stream, int(labels[n]))].square().sum()
        expected += flat(torch.autograd.grad(energy, list(net.parameters()))).abs() / len(x)
    learner.strategies["method"].after_task(learner, stream[1])
    torch.testing.assert_close(learner.strategies["method"].importance, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("logits", ["mean", "all", "truth"])
def test_ogd_keeps_the_gradients_of_each_rows_own_outputs(logits):
    stream = stream_of("i-blurry")
    method = OGD(num_samples=8, logits=logits)
    learner = learner_of(stream, method)
    kept = []
    gradients = method._gradients
    method._gradients = lambda learner, view, weights: kept.append(weights) or gradients(learner, view, weights)
    method.after_task(learner, stream[1])
    (weights,) = kept
    for row in weights:
        owners = {t for t in range(3) for c in own_classes(stream, t) if row[c]}
        assert len(owners) == 1
        if logits == "mean":
            assert row.count_nonzero() == len(own_classes(stream, owners.pop())) and float(row.sum()) == pytest.approx(
                1
            )
        else:
            assert row.count_nonzero() == 1


@pytest.mark.parametrize("stream", ["i-blurry", "boundary-free"])
@pytest.mark.parametrize("method", [HAT, PackNet, SupSup, TRGP, CUBER, SPrompts])
def test_methods_that_learn_task_after_task_refuse_rows_of_many(stream, method):
    stream = stream_of(stream)
    torch.manual_seed(0)
    image = stream.input_shape
    body = ViT(image, patch_size=4, dim=8, depth=1, heads=2) if method is SPrompts else MLP(image, [12])
    with pytest.raises(InputError, match=r"tasks come together|ha(s|ve) no .*boundaries"):
        Learner(stream, body, {"method": method()}, partial(torch.optim.SGD, lr=0.1))


def test_what_is_measured_of_a_task_is_measured_on_its_own_rows():
    stream = stream_of("boundary-free")
    own = own_examples(stream[1])
    assert 0 < len(own) < len(stream[1].train) and bool((own.tasks == 1).all())
    plain = split(digits(), num_tasks=2)[0]
    assert own_examples(plain) is plain.train


@pytest.mark.parametrize("kind", ["i-blurry", "boundary-free"])
def test_references_and_protocols_leave_out_rows_of_tasks_that_they_do_not_have(kind, tmp_path):
    stream, made = stream_of(kind), []

    def make(part: Stream, strategies: dict[str, Strategy]) -> Experiment:
        made.append(part)
        return Experiment(learner_of(part, Strategy()) if not strategies else joint_of(part, strategies), part, trainer)

    def joint_of(part: Stream, strategies: dict[str, Strategy]) -> Learner:
        torch.manual_seed(0)
        sgd = partial(torch.optim.SGD, lr=0.1)
        return Learner(part, MLP(part.input_shape, [12]), strategies, sgd, batch_size=32)

    found = References(["experts", "joint"], make, tmp_path, {}).measure(stream)
    assert all(row["value"] > 0.5 for kind in found.values() for row in kind)
    assert [len(part) for part in made] == [1, 1, 1, 1, 2, 3]
    for t, alone in enumerate(made[:3]):
        assert len(alone[0].train) == int((stream[t].train.tasks == t).sum())
    for part in made:
        for task in part:
            assert int(task.train.tasks.max()) < len(part)
    with_val = stream.derive([replace(task, val=task.test) for task in stream].__getitem__)
    for part in (first(with_val, 2), rest(stream, 1)):
        assert len(part) == 2 and {int(label) for task in part for label in task.train.tasks} == {0, 1}
        part.check()


# ------------------------------------------------------------------ linear layers in closed form


class Inplace(nn.Sequential):
    """An activation that overwrites what the layer before it returned; a layer that is called twice; a frozen one."""

    def __init__(self) -> None:
        twice = nn.Linear(6, 6)
        super().__init__(nn.Linear(5, 6), nn.ReLU(inplace=True), twice, nn.Tanh(), twice, nn.Linear(6, 4, bias=False))
        self[0].bias.requires_grad_(False)


NETS = {
    "mlp": lambda: nn.Sequential(MLP((5,), [7, 6]), nn.Linear(6, 4)),
    "in place": Inplace,
    "convolutions": lambda: nn.Sequential(SimpleCNN((1, 8, 8), channels=(3, 4), hidden=6), nn.Linear(6, 4)),
    "transformer": lambda: nn.Sequential(ViT((1, 8, 8), patch_size=4, dim=8, depth=1, heads=2), nn.Linear(8, 4)),
}


@pytest.mark.parametrize("name", sorted(NETS))
@pytest.mark.parametrize("shape", [torch.square, torch.abs])
def test_the_closed_form_is_the_sum_row_by_row(name, shape):
    torch.manual_seed(0)
    net = NETS[name]().eval()
    x = torch.randn(300, 5) if name in ("mlp", "in place") else torch.rand(300, 1, 8, 8)
    rows, weights, y = torch.arange(300)[:, None], torch.rand(300), torch.randint(4, (300, 1))

    def log_p(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return outputs.log_softmax(1).gather(1, y[:, None]).mean()

    theta = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    expected = _one_by_one(net, theta, log_p, shape, x, rows, weights, (y,))
    found = _of_linear_layers(net, log_p, shape, x, weights, (y,))
    assert found.keys() <= expected.keys()
    assert found.keys() == {"0.weight", "5.weight"} if name == "in place" else "1.weight" in found
    scale = float(flat(list(expected.values())).max())
    for key, value in found.items():
        torch.testing.assert_close(value / scale, expected[key] / scale, rtol=1e-5, atol=1e-7)
    whole = gradient_sum(net, log_p, shape, x, rows, weights, y)
    assert not whole.requires_grad
    torch.testing.assert_close(whole / scale, flat(list(expected.values())) / scale, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_backpack_finds_the_same_fisher():
    backpack = pytest.importorskip("backpack")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 7))
    x = torch.randn(64, 20)
    ours = diagonal_fisher(net, x, torch.arange(7))
    extended, loss = backpack.extend(net), backpack.extend(nn.CrossEntropyLoss())
    value = loss(extended(x), torch.zeros(64, dtype=torch.int64))
    with backpack.backpack(backpack.extensions.DiagGGNExact()):  # of the softmax, the Fisher
        value.backward()
    theirs = flat([p.diag_ggn_exact for p in net.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
