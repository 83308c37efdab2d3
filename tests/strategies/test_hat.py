"""Hard Attention to the Task: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.backbones.networks import MLP, ResNet18, SimpleCNN
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.random import derive
from cl.strategies.er import ER
from cl.strategies.hat import HAT, _gate, annealed, compensation, new_share
from cl.testing import toy_stream
from draws import quick
from old_answers import NETS, SGD, build, drift, images, learn
from toys import trainer


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
        with pytest.raises(InputError, match=r"is not a chain of layers without norms.*use backbone=mlp, simple_cnn"):
            build(HAT(), backbone, stream=data)
    with pytest.raises(InputError, match=r"HAT needs plain SGD.*Adam"):
        build(HAT(), optimizer=partial(torch.optim.Adam, lr=0.01))
