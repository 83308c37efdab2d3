"""O-LoRA: the penalty by hand, a loop by hand, and directions that it makes orthogonal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from by_hand import ordered
from cl.errors import InputError
from cl.strategies.o_lora import OLoRA, overlap
from cl.testing import toy_learner
from cl.toolkit.inject import frozen_weight, low_rank_layers, low_ranks
from draws import quick, seeds
from toys import learn, toy


def test_worked_penalty():
    """Old rows e_1 and 2 e_2, new row (.5, -1, 3): products .5, -2, sums 2.5 and 4.25; the gradient is (1, -2, 0)."""
    old, new = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]]), torch.tensor([[0.5, -1.0, 3.0]], requires_grad=True)
    overlap(old, new).backward()
    assert overlap(old, new).item() == 2.5 and overlap(old, new, squared=True).item() == 4.25
    assert new.grad.tolist() == [[1.0, -2.0, 0.0]]


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_the_penalty_is_zero_where_directions_are_orthogonal_and_only_there(seed, first, second, squared):
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64)).Q
    old, new = basis[:, :first].T, basis[:, first : first + second].T
    assert overlap(old[None], new, squared).item() < 1e-12
    assert overlap(old[None], new + 0.1 * old[:1], squared).item() > 1e-3


@pytest.mark.parametrize("penalty", ["absolute", "squared"])
def test_the_run_is_the_loop_written_by_hand(penalty):
    """Pairs of all tasks are kept; those of later tasks are looked up when their task begins."""
    learner, stream = toy_learner({"method": OLoRA(rank=2, scale=0.5, weight=0.3, penalty=penalty)})
    W = [frozen_weight(layer).detach().clone() for layer in low_rank_layers(learner.backbone)]
    head = nn.Linear(16, 6)
    head.load_state_dict(learner.head.state_dict())
    tasks: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for t, task in enumerate(stream):
        now = [
            (p.A.detach().clone().requires_grad_(), torch.zeros(16, 2).requires_grad_())
            for p in low_ranks(learner.backbone)
        ]
        tasks.append(now)
        optimizer = torch.optim.SGD([*(f for pair in now for f in pair), *head.parameters()], lr=0.1)
        x, y, _ = task.train.tensors()
        for rows in ordered(len(y), t, epochs=2):
            h = x[rows].float().flatten(1) / 255
            for i, weight in enumerate(W):
                h = F.relu(h @ weight.T + sum(0.5 * (h @ pairs[i][0].T @ pairs[i][1].T) for pairs in tasks))
            loss = F.cross_entropy(head(h)[:, : 2 * t + 2], y[rows])
            for pairs in tasks[:-1]:
                for (old, _), (new, _) in zip(pairs, now, strict=True):
                    for a in old:
                        for b in new:
                            loss = loss + 0.3 * ((a @ b) ** 2 if penalty == "squared" else (a @ b).abs())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for pair in now:
            for factor in pair:
                factor.requires_grad_(False)
        learn(learner, stream, [t], epochs=2)
        for i, layer in enumerate(low_rank_layers(learner.backbone)):
            expected = W[i] + sum(0.5 * pairs[i][1] @ pairs[i][0] for pairs in tasks)
            torch.testing.assert_close(frozen_weight(layer), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learner.head.weight, head.weight, rtol=1e-4, atol=1e-5)


def test_a_large_weight_makes_directions_orthogonal():
    overlaps = []
    for weight in (0.0, 0.5):
        learner, _ = toy(OLoRA(rank=2, weight=weight, penalty="squared"), range(2), epochs=20)
        old = learner.strategies["method"].old_1
        overlaps.append(overlap(old[:1], old[1], squared=True).item())
    assert overlaps[1] < 0.1 * overlaps[0], overlaps


def test_what_is_refused():
    with pytest.raises(InputError, match=r"no penalty of O-LoRA called 'l1'"):
        OLoRA(penalty="l1")
