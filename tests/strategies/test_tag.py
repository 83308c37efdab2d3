"""Task-based Accumulated Gradients: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl.data.task import Stream
from cl.engine.experiment import Experiment
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies import tag
from cl.strategies.gpm import GPM
from cl.strategies.l2p import L2P
from cl.strategies.tag import TAG
from cl.testing import ToyBackbone, toy_learner, toy_stream
from subspaces import WideNet, build, random_stream
from toys import Identity, learn, trainer


@pytest.mark.parametrize(
    ("g", "agreement", "alpha", "step"),
    [([0.2, -0.1], 0.316228, 0.205741, [-0.0022, 0.0011]), ([0.2, 0.1], 0.948683, 0.008709, [-0.0107, -0.0054])],
)
def test_worked_example_of_tag(g, agreement, alpha, step):
    """One tensor in its second task, of which nothing is known but the first's V = .04 and its direction (1, 1)."""
    g, direction = torch.tensor(g), tag.unit(torch.tensor([[1.0, 1.0]]))
    m, V = 0.1 * g, 0.01 * g.square()
    assert float(direction[0] @ tag.unit(m)) == pytest.approx(agreement, abs=1e-6)
    D = tag.denominator(torch.stack([torch.full((2,), 0.04), V]), m, direction, 5.0)
    torch.testing.assert_close(D.square(), alpha * 0.04 + 0.006738 * V, atol=1e-7, rtol=1e-3)
    torch.testing.assert_close(-0.001 * g / (D + 1e-8), torch.tensor(step), atol=6e-5, rtol=0)


def test_a_direction_of_zero_agrees_with_none():
    squares, zero = torch.ones(2, 3), torch.zeros(3)
    expected = torch.full((3,), 1 + float(torch.exp(torch.tensor(-5.0)))).sqrt()
    torch.testing.assert_close(tag.denominator(squares, zero, torch.eye(3)[:1], 5.0), expected)
    torch.testing.assert_close(tag.denominator(squares, torch.ones(3), zero[None], 5.0), expected)


def tag_by_hand(stream: Stream, weights, form: str, b: float, lr: float, epochs: int):
    """The reference's procedure, tensor by tensor, on full batches of a linear model."""
    beta2 = {"rmsprop": 0.99, "adam": 0.999, "adagrad": None}[form]
    weights, kept = [w.clone() for w in weights], []
    for task in stream:
        m, v = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
        x, y, _ = task.train.tensors()
        for n in range(1, epochs + 1):
            live = [w.clone().requires_grad_() for w in weights]
            gradients = torch.autograd.grad(F.cross_entropy(x @ live[0].T + live[1], y), live)
            for k, g in enumerate(gradients):
                m[k] = 0.9 * m[k] + 0.1 * g
                v[k] = v[k] + g**2 if beta2 is None else beta2 * v[k] + (1 - beta2) * g**2
                total = v[k].clone()
                if kept:
                    total = total * torch.exp(torch.tensor(-b))
                    for old_v, old_m in kept:
                        total += torch.exp(-b * (m[k] / m[k].norm() * old_m[k]).sum()) * old_v[k]
                top, bias = (m[k] / (1 - 0.9**n), 1 - 0.999**n) if form == "adam" else (g, 1.0)
                weights[k] = weights[k] - lr * top / (total.sqrt() / bias**0.5 + 1e-8)
        kept.append((v, [one / one.norm() for one in m]))
    return weights


@pytest.mark.parametrize("b", [0.0, 5.0])
@pytest.mark.parametrize("form", tag.FORMS)
def test_tag_is_the_loop_written_by_hand(form, b):
    stream = random_stream((10,), num_rows=6, scenario="domain", num_tasks=3)
    learner = build(stream, Identity(10), TAG(form, b), lr=0.01, batch_size=6)
    expected = tag_by_hand(stream, [p.detach() for p in learner.head.parameters()], form, b, 0.01, 6)
    learn(learner, stream, epochs=6)
    for ours, theirs in zip(learner.head.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", tag.FORMS)
def test_tag_of_one_task_is_its_base_optimizer(form):
    stream = random_stream((30,), num_rows=8, num_tasks=1)
    base = {
        "rmsprop": partial(torch.optim.RMSprop, lr=0.001),
        "adam": partial(torch.optim.Adam, lr=0.001),
        "adagrad": partial(torch.optim.Adagrad, lr=0.001, eps=1e-8),
    }[form]
    weights = []
    for strategy in (TAG(form), Strategy()):
        torch.manual_seed(0)
        learner = learn(build(stream, WideNet(), strategy, optimizer=base), stream, epochs=3)
        weights.append(torch.cat([p.detach().flatten() for p in learner.trunk().parameters()]))
    torch.testing.assert_close(*weights, atol=2e-5, rtol=1e-4)


def test_tag_follows_the_schedule_and_counts_the_steps_of_a_task():
    learner, stream = toy_learner(
        {"method": TAG("adam")}, scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    )
    experiment = Experiment(learner, stream, trainer, epochs=3)
    for task in list(stream)[:2]:
        experiment.learn(task)
        (group,) = learner.trainer.optimizers[0].param_groups
        assert group["lr"] == pytest.approx(0.1 / 8) and group["num_steps"] == 18
    lengths = learner.strategies["method"].directions.norm(dim=1).square()
    assert lengths[:2].round().tolist() == [4, 4] and lengths[2] == 0, "a unit vector for each of four tensors"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: TAG("sgd"), {}, "no form of TAG called 'sgd'"),
        (lambda: TAG(b=-1.0), {}, r"tag\.b=-1\.0 must be 0 or more"),
        (
            TAG,
            {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
            r"momentum=0\.9: set optimizer\.momentum=0",
        ),
        (TAG, {"optimizer": partial(torch.optim.AdamW, lr=0.1)}, r"weight_decay=0\.01: set"),
    ],
)
def test_tag_refuses(make, options, message):
    with pytest.raises(InputError, match=message):
        build(toy_stream(), ToyBackbone(), make(), **options)


def test_tag_refuses_weights_of_others_and_projections_refuse_tag():
    learner, stream = toy_learner({"tag": TAG(), "l2p": L2P(4, 2, 2)}, backbone="vit")
    with pytest.raises(InputError, match="TAG steps backbone and head, but another strategy trains weights"):
        learn(learner, stream, [0])
    with pytest.raises(InputError, match="GPM projects gradients, but another strategy owns configure_optimizer"):
        toy_learner({"gpm": GPM(), "tag": TAG()})
