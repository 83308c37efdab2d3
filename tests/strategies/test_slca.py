"""SLCA: the two learning rates, the Gaussians and the alignment by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from by_hand import ordered
from cl.errors import InputError
from cl.random import Random, derive
from cl.strategies.slca import SLCA, normalised
from cl.testing import ToyBackbone, toy_learner
from cl.toolkit.gaussians import ClassGaussians
from draws import quick, seeds
from toys import same, toy, weights


def test_worked_logits():
    """Lengths 5 and 1, mean 3: (3, 4, 1) / (0.1 * 3)."""
    members = torch.tensor([[True, True, False], [False, False, True]])
    found = normalised(torch.tensor([[3.0, 4.0, 1.0]]), members, 0.1)
    torch.testing.assert_close(found, torch.tensor([[10.0, 13.333333, 3.333333]]))


@quick
@given(seeds, st.floats(0.1, 50))
def test_normalised_logits_do_not_depend_on_their_size(seed, factor):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, generator=draw)
    members = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    found = normalised(factor * logits, members, 0.1)
    torch.testing.assert_close(found, normalised(logits, members, 0.1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_gaussians_have_the_moments_of_the_features(covariance):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=draw) @ torch.tensor([[1.0, 0.8, 0.0], [0.0, 0.5, 0.3], [0.0, 0.0, 2.0]])
    gaussians = ClassGaussians(2, 3, covariance)
    gaussians.describe(1, x)
    cov = torch.from_numpy(np.cov(x.double().numpy().T)).float() + 1e-4 * torch.eye(3)
    L = gaussians.factor[1]
    if covariance == "diagonal":
        L, cov = L.diag(), cov.diag().diag()
    torch.testing.assert_close(L @ L.T, cov, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gaussians.mean[1], x.mean(0))
    drawn = gaussians.draw(torch.tensor([1]), 40000, Random())[0]
    torch.testing.assert_close(drawn.T.cov(), cov, rtol=0.1, atol=0.08)
    gaussians.describe(0, x[:1])
    assert gaussians.factor.isfinite().all(), "one example has no covariance"


@pytest.mark.parametrize(("tau", "shrink", "ratio"), [(0.1, 0.1, 0.05), (None, 0.0, 0.5)])
def test_the_run_is_the_loop_written_by_hand(tau, shrink, ratio):
    method = SLCA(ratio, align_epochs=2, per_class=4, align_lr=0.05, tau=tau, shrink=shrink)
    learner, stream = toy(method, range(3), epochs=2)
    torch.manual_seed(0)
    body, head = ToyBackbone(), nn.Linear(16, 6)
    draws = np.random.Generator(np.random.PCG64(derive(0, "method", "random")))
    classes: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
    for t, task in enumerate(stream):
        groups = [{"params": head.parameters()}, {"params": body.parameters(), "lr": ratio * 0.1}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        x, y, _ = task.train.tensors()
        for rows in ordered(len(y), t, epochs=2):
            optimizer.zero_grad()
            logits = head(body(x[rows].float() / 255))
            F.cross_entropy(logits[:, 2 * t : 2 * t + 2], y[rows] - 2 * t).backward()
            optimizer.step()
        with torch.no_grad():
            features = body(x.float() / 255).double()
        for c in (2 * t, 2 * t + 1):
            own = features[y == c]
            cov = own.T.cov() + 1e-4 * torch.eye(16)
            classes[c] = own.mean(0).float(), torch.linalg.cholesky(cov).float(), t
        if t == 0:
            continue
        optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        for epoch in range(2):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 + np.cos(np.pi * epoch / 2)) / 2
            z = torch.from_numpy(draws.standard_normal((len(classes), 4, 16), dtype="float32"))
            drawn = [(1 - shrink + shrink * (j + 1) / (t + 1)) * m + z[c] @ L.T for c, (m, L, j) in classes.items()]
            samples, labels = torch.cat(drawn), torch.arange(len(classes)).repeat_interleave(4)
            order = torch.from_numpy(draws.permutation(len(labels)))
            for i in range(0, len(order), 4):
                rows = order[i : i + 4]
                logits = head(samples[rows])[:, : 2 * t + 2]
                if tau is not None:
                    lengths = torch.stack([logits[:, 2 * j : 2 * j + 2].norm(dim=1) for j in range(t + 1)])
                    logits = logits / (tau * lengths.mean(0)[:, None])
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[rows]).backward()
                optimizer.step()
    for ours, theirs in zip(learner.trunk().parameters(), [*body.parameters(), *head.parameters()], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_ratio_of_0_freezes_the_backbone_and_alignment_can_be_left_out():
    learner, _ = toy(SLCA(ratio=0.0, align_epochs=0), range(3))
    assert same(weights(learner.backbone), weights(toy_learner()[0].backbone))
    assert not same(weights(learner.head), weights(toy_learner()[0].head))


def test_alignment_moves_the_head_alone_and_from_the_second_task_on():
    heads, bodies = [], []
    for epochs in (0, 2):
        method = SLCA(align_epochs=epochs, per_class=8)
        learner, _ = toy(method, range(1))
        first = weights(learner.trunk())
        learner, _ = toy(SLCA(align_epochs=epochs, per_class=8), range(2))
        heads.append((first, weights(learner.head)))
        bodies.append(weights(learner.backbone))
    assert same(heads[0][0], heads[1][0]) and same(*bodies) and not same(heads[0][1], heads[1][1])


def test_what_is_refused():
    with pytest.raises(InputError, match=r"no covariance called 'spherical'.*Known: diagonal, full"):
        toy(SLCA(covariance="spherical"))
    with pytest.raises(InputError, match="tau"):
        SLCA(tau=0.0)
