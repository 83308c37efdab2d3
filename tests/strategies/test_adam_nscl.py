"""Training in the null space of feature covariance: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.errors import InputError
from cl.strategies import adam_nscl
from cl.strategies.adam_nscl import AdamNSCL
from cl.testing import toy_stream
from draws import normal, quick, seeds
from subspaces import ConvNet, build, leak, random_stream
from toys import Identity, learn


def test_worked_example_13():
    covariance = torch.diag(torch.tensor([100.0, 1.0, 0.5]))
    axes = torch.tensor([0.0, 1.0, 1.0]).double()
    torch.testing.assert_close(adam_nscl.null_projector(covariance, 10), torch.diag(axes))
    torch.testing.assert_close(adam_nscl.null_projector(covariance, 10, True), torch.diag(axes * 0.5**0.5))


@quick
@given(seeds, st.integers(2, 10), st.integers(1, 12), st.sampled_from([1.0, 10.0, 1e3]))
def test_the_null_space_is_orthogonal_to_all_larger_directions(seed, size, count, ratio):
    X = normal(seed, size, count)
    P = adam_nscl.null_projector(X @ X.T, ratio)
    torch.testing.assert_close(P @ P, P, atol=1e-9, rtol=0)
    values = torch.linalg.svdvals(X @ X.T)
    free = int((values <= ratio * values[-1].clamp_min(1e-10 * values[0])).sum())
    assert round(float(P.trace())) == free >= max(1, size - count)
    if count < size and free == size - count:
        assert (P @ X).abs().max() < 1e-4 * X.abs().max()


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "decay": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_no_moment_and_no_decay_leaves_the_null_space(optimizer):
    torch.manual_seed(0)
    stream = random_stream((16, 5, 5))
    leaked, change, drift = leak(build(stream, ConvNet(stride=2, padding=1), AdamNSCL(), optimizer=optimizer), stream)
    assert change > 1e-3 and leaked < 1e-5 and drift < 1e-4


@pytest.mark.parametrize("released", [False, True])
def test_adam_nscl_is_the_loop_written_by_hand(released):
    stream = random_stream((10,), num_rows=6, scenario="domain", num_tasks=3)
    learner = build(stream, Identity(10), AdamNSCL(1e4, released_rule=released), optimizer=OPTIMIZERS["adam"])
    learner.batch_size = 6
    W, b = learner.head.weight.detach().clone().requires_grad_(), learner.head.bias.detach().clone().requires_grad_()
    learn(learner, stream, epochs=7)
    covariance = torch.zeros(10, 10).double()
    for task in stream:
        x, y, _ = task.train.tensors()
        optimizer = torch.optim.Adam([W, b], lr=1e-2)
        for _ in range(7):
            old = W.detach().clone(), b.detach().clone()
            optimizer.zero_grad()
            F.cross_entropy(x @ W.T + b, y).backward()
            optimizer.step()
            if task.index:
                U, S, _ = torch.linalg.svd(covariance)
                U = U[:, 1e4 * max(S[-1], 1e-10 * S[0]) >= S]
                P = (U @ U.T / ((U @ U.T).norm() if released else 1)).float()
                with torch.no_grad():
                    W.copy_(old[0] + (W - old[0]) @ P)
                    b.copy_(old[1])
        covariance += x.double().T @ x.double()
    torch.testing.assert_close(learner.strategies["method"].covariance_0, covariance)
    torch.testing.assert_close(learner.head.weight.detach(), W.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(learner.head.bias.detach(), b.detach(), atol=1e-5, rtol=0)


def test_adam_nscl_refuses():
    class Normed(nn.Sequential):
        num_features = 16

    with pytest.raises(InputError, match=r"Adam-NSCL cannot protect the running statistics of backbone\.2"):
        build(toy_stream(), Normed(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16)), AdamNSCL())
    with pytest.raises(InputError, match=r"adam_nscl\.ratio=0\.5 must be 1 or more"):
        AdamNSCL(ratio=0.5)
