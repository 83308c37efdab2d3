"""Orthogonal Gradient Descent: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl.data.task import SCENARIOS
from cl.errors import InputError
from cl.strategies import ogd
from cl.strategies.l2p import L2P
from cl.strategies.ogd import OGD
from cl.testing import ToyBackbone, toy_learner, toy_stream
from draws import normal, quick, seeds
from subspaces import WideNet, build, random_stream
from toys import Identity, learn


def test_worked_example_5():
    S = ogd.orthonormal(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), torch.zeros(0, 3))
    torch.testing.assert_close(ogd.project(torch.tensor([3.0, 4.0, 5.0]), S), torch.tensor([0.0, 0.0, 5.0]))


def gram_schmidt(vectors, basis):
    """The paper's procedure, one vector at a time."""
    for v in vectors:
        for u in basis:
            v = v - (v @ u) * u
        if v.norm() > 1e-8:
            basis = [*basis, v / v.norm()]
    return basis


@quick
@given(seeds, st.integers(1, 6), st.integers(0, 4), st.integers(6, 12))
def test_directions_span_what_gram_schmidt_spans(seed, count, dependent, size):
    old, new = normal(seed, 3, size), normal(seed + 1, count, size)
    new = torch.cat([new, normal(seed + 2, dependent, count) @ new + normal(seed + 3, dependent, 3) @ old])
    S = ogd.orthonormal(old, torch.zeros(0, size).double())
    S = torch.cat([S, ogd.orthonormal(new, S)])
    theirs = gram_schmidt(new, gram_schmidt(old, []))
    torch.testing.assert_close(S @ S.T, torch.eye(len(S)).double(), atol=1e-6, rtol=0)
    g = normal(seed + 4, size)
    if len(theirs) == len(S):  # Gram and Schmidt's rounding makes a vector of its own now and then
        expected = g - sum((g @ u) * u for u in theirs)
        torch.testing.assert_close(ogd.project(g, S), expected, atol=1e-6, rtol=0)
    assert len(S) == min(3 + count, size)
    assert (torch.cat([old, new]) @ ogd.project(g, S)).abs().max() < 1e-5


@pytest.mark.parametrize("logits", ogd.LOGITS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_steps_are_orthogonal_to_the_gradients_of_old_logits(logits, scenario):
    torch.manual_seed(0)
    stream = random_stream(scenario=scenario)
    learner = learn(build(stream, WideNet(), OGD(num_samples=4, logits=logits)), stream, [0], 5)
    strategy = learner.strategies["method"]
    theta = list((learner.backbone if scenario == "task" else learner.trunk()).parameters())
    x, y, _ = stream[0].train.tensors()
    classes = learner.competing(stream[0])
    gradients = []
    for row, label in zip(learner(x), y, strict=True):
        some = {"truth": row[label][None], "mean": row[classes].mean()[None], "all": row[classes]}[logits]
        for z in some:
            parts = torch.autograd.grad(z, theta, retain_graph=True, allow_unused=True, materialize_grads=True)
            gradients.append(torch.cat([p.flatten() for p in parts]))
    gradients = torch.stack(gradients)
    used = strategy.basis.norm(dim=1) > 0.5
    assert int(used.sum()) == int(torch.linalg.matrix_rank(gradients.double(), rtol=1e-5))
    for p in learner.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    head = learner.head.weight.grad.clone()
    before = torch.cat([p.grad.flatten() for p in theta])
    strategy.project_gradients(learner)
    after = torch.cat([p.grad.flatten() for p in theta])
    assert (gradients @ before).abs().max() > 0.1 and (gradients @ after).abs().max() < 1e-4
    _, sizes, span = torch.linalg.svd(gradients.double(), full_matrices=False)
    span = span[sizes > 1e-5 * sizes.max()]
    torch.testing.assert_close(after, (before - (span @ before.double()) @ span).float(), atol=1e-4, rtol=0)
    assert torch.equal(learner.head.weight.grad, head) == (scenario == "task"), "a head of its own is free"


def test_a_linear_model_answers_the_old_examples_as_before():
    stream = random_stream(scenario="domain")
    learner = learn(build(stream, Identity(30), OGD(num_samples=4, logits="all")), stream, [0], 20)
    x = stream[0].train.x
    before = learner(x).detach()
    learn(learner, stream, [1], 20)
    assert (learner(stream[1].train.x).argmax(1) == stream[1].train.y).all()
    assert ((learner(x) - before).norm(dim=1) <= 1e-5 * x.norm(dim=1)).all()
    truth = learn(build(stream, Identity(30), OGD(num_samples=4)), stream, [0], 20)
    before, y = truth(x).detach(), stream[0].train.y
    learn(truth, stream, [1], 20)
    moved = (truth(x) - before).abs()
    assert moved.gather(1, y[:, None]).max() < 1e-4 < 1e-2 < moved.gather(1, 1 - y[:, None]).max()


def test_ogd_keeps_nothing_of_the_last_task_and_no_more_than_it_has():
    learner, stream = toy_learner({"method": OGD(num_samples=60)})
    learn(learner, stream)
    basis = learner.strategies["method"].basis
    assert basis.shape == (120, 16 * 16 * 2 + 17 * 6)
    used = basis.norm(dim=1) > 0.5
    assert 0 < int(used[:60].sum()) <= 48 and 0 < int(used[60:].sum()) <= 48
    torch.testing.assert_close(basis[used] @ basis[used].T, torch.eye(int(used.sum())), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (OGD, {"optimizer": partial(torch.optim.Adam, lr=0.1)}, "OGD needs plain SGD.*Adam"),
        (OGD, {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}, "OGD needs plain SGD.*momentum=0.9"),
        (lambda: OGD(logits="every"), {}, "no choice of logits called 'every'"),
        (lambda: OGD(num_samples=0), {}, r"ogd\.num_samples=0 must be 1 or more"),
    ],
)
def test_ogd_refuses(make, options, message):
    with pytest.raises(InputError, match=message):
        build(toy_stream(), ToyBackbone(), make(), **options)


def test_ogd_refuses_another_encoder():
    with pytest.raises(InputError, match="OGD differentiates backbone and head, but another strategy owns encode"):
        toy_learner({"l2p": L2P(4, 2, 2), "ogd": OGD()}, backbone="vit")
