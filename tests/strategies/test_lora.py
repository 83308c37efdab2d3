"""LoRA and its null-space initialisation: worked numbers, a loop by hand, and what old inputs keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from by_hand import ordered
from cl.errors import InputError
from cl.strategies.ewc import EWC
from cl.strategies.lora import LoRA, null_space_pair
from cl.strategies.mas import MAS
from cl.strategies.online_ewc import OnlineEWC
from cl.strategies.rwalk import RWalk
from cl.strategies.si import SI
from cl.testing import ToyBackbone, toy_learner
from cl.toolkit.inject import frozen_weight, low_rank_layers, low_ranks
from draws import quick, seeds
from toys import build, float_stream, learn, same, toy, weights

# ------------------------------------------------------------------ plain LoRA


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_run_is_the_loop_written_by_hand(scale):
    learner, stream = toy_learner({"method": LoRA(rank=3, scale=scale)})
    W = [frozen_weight(layer).detach().clone() for layer in low_rank_layers(learner.backbone)]
    pairs = [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in low_ranks(learner.backbone)]
    factors = [factor.requires_grad_() for pair in pairs for factor in pair]
    head = nn.Linear(16, 6)
    head.load_state_dict(learner.head.state_dict())
    for t, task in enumerate(stream):
        optimizer = torch.optim.SGD([*factors, *head.parameters()], lr=0.1)
        x, y, _ = task.train.tensors()
        for rows in ordered(len(y), t, epochs=1):
            h = x[rows].float().flatten(1) / 255
            for weight, (A, B) in zip(W, pairs, strict=True):
                h = (h @ weight.T + scale * (h @ A.T @ B.T)).relu()
            optimizer.zero_grad()
            F.cross_entropy(head(h)[:, : 2 * t + 2], y[rows]).backward()
            optimizer.step()
    learn(learner, stream)
    ours = [factor for pair in low_ranks(learner.backbone) for factor in (pair.A, pair.B)]
    for a, b in zip([*ours, *learner.head.parameters()], [*factors, *head.parameters()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for layer, weight in zip(low_rank_layers(learner.backbone), W, strict=True):
        assert torch.equal(frozen_weight(layer), weight)


def test_a_run_starts_as_the_backbone_was():
    plain, stream = toy_learner()
    learner, _ = toy_learner({"method": LoRA(rank=2)})
    view = learner.prepare(stream[0].train.tensors()[0])
    assert torch.equal(learner.backbone(view), plain.backbone(view))


# ------------------------------------------------------------------ the null space


def test_worked_example_of_kore():
    """Old inputs along e_1: A C = 0, W - BA = [[1, 0, 0], [0, 0, 0]], and BA has the singular values 3.618, 1.382."""
    W, C = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]]), torch.diag(torch.tensor([4.0, 0.0, 0.0]))
    B, A = null_space_pair(W, C, 2)
    torch.testing.assert_close(W - B @ A, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.linalg.svdvals(B @ A), torch.tensor([3.6180, 1.3820]), rtol=0, atol=1e-4)
    torch.testing.assert_close(A @ C, torch.zeros(2, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 6), st.integers(2, 6))
def test_the_pair_is_silent_on_inputs_that_leave_enough_directions(seed, out, used, size):
    """With inputs in a subspace of dimension d - r or less, A x = 0 for each; BA is the best rank-r part of W U U^T."""
    draw = torch.Generator().manual_seed(seed)
    rank = min(out, size)
    x = torch.randn(size, min(used, size - rank), generator=draw) @ torch.randn(
        min(used, size - rank), 9, generator=draw
    )
    W = torch.randn(out, size, generator=draw)
    B, A = null_space_pair(W, x @ x.T, rank)
    assert B.shape == (out, rank) and A.shape == (rank, size)
    assert (A @ x).abs().max() < 1e-2 * (1 + x.abs().max())
    U = torch.linalg.eigh((x @ x.T).double()).eigenvectors[:, :rank]
    torch.testing.assert_close((B @ A).double(), W.double() @ U @ U.T, rtol=1e-3, atol=1e-4)


def halves(scenario="class"):
    """Two tasks whose inputs have no pixel in common."""
    draw = torch.Generator().manual_seed(3)
    y = torch.arange(48) % 2
    xs = []
    for half in (slice(0, 8), slice(8, 16)):
        x = torch.zeros(48, 16)
        centres = 3 * torch.rand(2, 8, generator=draw)
        x[:, half] = centres[y] + 0.3 * torch.randn(48, 8, generator=draw)
        xs.append(x.view(48, 1, 4, 4))
    return float_stream(xs, [y, y + 2], scenario)


@pytest.mark.parametrize(
    ("init", "scale", "kept"), [("null_space", 1.0, True), ("null_space", 0.5, True), ("zero", 1.0, False)]
)
def test_outputs_on_old_inputs_are_kept_and_new_ones_are_learned(init, scale, kept):
    stream = halves()
    torch.manual_seed(0)
    method = LoRA(rank=8, scale=scale, layers=("layers.1",), init=init, num_samples=48)
    learner = build(stream, ToyBackbone(), method)
    learn(learner, stream, [0], epochs=2)
    old, new = (learner.prepare(task.train.tensors()[0]) for task in stream)
    before = [learner.backbone(x).detach() for x in (old, new)]
    learn(learner, stream, [1], epochs=4)
    after = [learner.backbone(x).detach() for x in (old, new)]
    moved = [(b - a).abs().max().item() for a, b in zip(before, after, strict=True)]
    assert moved[1] > 0.05
    assert (moved[0] < 1e-4) == kept, moved


def test_before_a_task_the_network_stays_the_same_and_a_is_frozen():
    learner, stream = toy(LoRA(rank=4, init="null_space"), range(1), epochs=2)
    view = learner.prepare(stream[1].train.tensors()[0])
    before = learner.backbone.eval()(view)
    learner.before_task(stream[1])
    torch.testing.assert_close(learner.backbone(view), before, rtol=1e-4, atol=1e-5)
    pairs = low_ranks(learner.backbone)
    assert all(pair.A.any() and pair.B.any() and not pair.A.requires_grad and pair.B.requires_grad for pair in pairs)


def test_nothing_but_pairs_and_head_changes():
    learner, stream = toy_learner({"method": LoRA(rank=2)}, backbone="restless")
    before = weights(learner.backbone)
    learn(learner, stream)
    after = weights(learner.backbone)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith((".A", ".B")) for name in changed)
    assert not same(weights(learner.head), weights(toy_learner()[0].head))


def test_what_is_refused():
    with pytest.raises(InputError, match=r"no initialisation of LoRA called 'nul'.*Known: null_space, zero"):
        LoRA(init="nul")
    for holder in (EWC, OnlineEWC, MAS, SI, RWalk):
        with pytest.raises(InputError, match=f"another strategy has changed which ones: put {holder.__name__} last"):
            toy({"a": holder(), "b": LoRA(2)}, range(1))
        toy({"b": LoRA(2), "a": holder()}, range(2))
    with pytest.raises(InputError, match="Two strategies add LoRA to the backbone"):
        toy({"a": LoRA(), "b": LoRA()})
    with pytest.raises(InputError, match=r"LoRA finds no modules for layers=\('qvk',\)"):
        toy(LoRA(layers=("qvk",)))
