"""InfLoRA: the designed directions by hand, what old inputs keep, and the bases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl.strategies.inflora import InfLoRA, design
from cl.testing import ToyBackbone, toy_learner
from cl.toolkit.inject import frozen_weight, low_rank_inputs, low_rank_layers, low_ranks
from draws import quick, seeds
from toys import build, float_stream, learn, toy


def test_worked_directions():
    """Inputs 5 e_1, 3 e_2, 2 e_3, where e_1 is protected: e_2, then e_3, then nothing is left; all over sqrt 3."""
    H, P = torch.diag(torch.tensor([5.0, 3.0, 2.0])), torch.diag(torch.tensor([1.0, 0.0, 0.0]))
    expected = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(3**0.5 * design(H, P, 3).abs(), expected)


@quick
@given(seeds, st.integers(0, 6), st.integers(1, 6))
def test_directions_are_orthonormal_and_leave_the_subspace_alone(seed, protected, rank):
    draw = torch.Generator().manual_seed(seed)
    M = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64)).Q[:, :protected]
    H = torch.randn(6, 9, generator=draw, dtype=torch.float64)
    B = 3**0.5 * design(H, M @ M.T, rank)
    assert (B @ M).abs().max() < 1e-9 if protected else True
    kept = min(rank, 6 - protected)
    torch.testing.assert_close(B @ B.T, torch.diag((torch.arange(rank) < kept).double()), rtol=0, atol=1e-8)
    if kept:
        rest = H - M @ M.T @ H
        energies = torch.linalg.svdvals(rest).square()
        torch.testing.assert_close((B @ rest).square().sum(), energies[:kept].sum())


def subspaces():
    """Two tasks whose inputs lie in different halves of the pixels."""
    draw = torch.Generator().manual_seed(3)
    y = torch.arange(48) % 2
    xs = []
    for half in (slice(0, 8), slice(8, 16)):
        x = torch.zeros(48, 16)
        x[:, half] = (3 * torch.rand(2, 8, generator=draw))[y] + 0.3 * torch.randn(48, 8, generator=draw)
        xs.append(x.view(48, 1, 4, 4))
    return float_stream(xs, [y, y + 2])


@pytest.mark.parametrize(("threshold", "kept"), [(1.0, True), (0.0, False)])
def test_outputs_on_old_inputs_stay_where_all_of_their_energy_is_protected(threshold, kept):
    """The second task has the pixels of the first, too, so that without protection it changes them."""
    stream = subspaces()
    both = float_stream(
        [stream[0].train.tensors()[0], stream[1].train.tensors()[0] + stream[0].train.tensors()[0].flip(0)],
        [stream[0].train.labels, stream[1].train.labels],
    )
    torch.manual_seed(0)
    method = InfLoRA(rank=4, threshold=threshold, last_threshold=threshold, num_samples=48, layers=("layers.1",))
    learner = build(both, ToyBackbone(), method)
    learn(learner, both, [0], epochs=2)
    old, new = (learner.prepare(task.train.tensors()[0]) for task in both)
    before = [learner.backbone(x).detach() for x in (old, new)]
    learn(learner, both, [1], epochs=4)
    moved = [(learner.backbone(x) - b).abs().max().item() for x, b in zip((old, new), before, strict=True)]
    assert moved[1] > 0.05
    assert (moved[0] < 1e-4) == kept, moved


def test_a_task_starts_from_the_same_network_and_trains_one_factor():
    learner, stream = toy(InfLoRA(rank=3), range(1), epochs=2)
    view = learner.prepare(stream[1].train.tensors()[0])
    before = learner.backbone.eval()(view)
    learner.before_task(stream[1])
    assert torch.equal(learner.backbone.eval()(view), before)
    for pair in low_ranks(learner.backbone):
        assert not pair.A.requires_grad and pair.B.requires_grad and not pair.B.any()


@pytest.mark.parametrize(("released", "threshold"), [(False, 0.9), (True, 0.9), (True, 0.999)])
def test_bases_and_directions_are_those_written_by_hand(released, threshold):
    """All inputs are used, and bases are kept as in GPM, by singular value decompositions.

    With a threshold of 0.9 one direction is enough for the first task, and the released rule keeps it.
    """
    method = InfLoRA(rank=3, threshold=threshold, last_threshold=1.0, num_samples=48, released_rule=released)
    learner, stream = toy_learner({"method": method})
    bases = [torch.zeros(16, 0, dtype=torch.float64) for _ in range(2)]
    for t, task in enumerate(stream):
        learner.before_task(task)
        inputs = [H.double() for H in low_rank_inputs(learner, task, 48, method.random)]
        for M, H, pair in zip(bases, inputs, low_ranks(learner.backbone), strict=True):
            U = torch.linalg.svd(H - M @ M.T @ H).U[:, :3]
            # directions of little energy are not determined by float32
            torch.testing.assert_close(3 * pair.A.double().T @ pair.A.double(), U @ U.T, rtol=0, atol=1e-3)
        learn(learner, stream, [t], epochs=2)
        share = threshold + (1 - threshold) * t / 3
        for i, H in enumerate(low_rank_inputs(learner, task, 48, method.random)):
            R = H.double() @ H.double().T if released else H.double()
            rest = R - bases[i] @ bases[i].T @ R
            U, S, _ = torch.linalg.svd(rest)
            total = R.square().sum()
            covered = [(total - rest.square().sum() + S[:k].square().sum()) / total for k in range(len(S) + 1)]
            k = next(k for k, c in enumerate(covered) if c >= share - 1e-9)
            k = max(k - 1, 1) if released and t == 0 else k
            bases[i] = torch.cat([bases[i], U[:, :k]], dim=1)
            P = method.get_buffer(f"projector_{i}").double()
            torch.testing.assert_close(P, bases[i] @ bases[i].T, rtol=0, atol=1e-3)
    assert bases[0].shape[1] > 0


def test_the_loss_runs_over_the_tasks_own_classes_and_w_takes_the_product():
    learner, stream = toy_learner({"method": InfLoRA(rank=3)})
    learn(learner, stream, [0])
    W, rows = [frozen_weight(layer).clone() for layer in low_rank_layers(learner.backbone)], learner.head.weight.clone()
    learn(learner, stream, [1])
    assert torch.equal(learner.head.weight[:2], rows[:2]) and not torch.equal(learner.head.weight[2:4], rows[2:4])
    for layer, before, pair in zip(low_rank_layers(learner.backbone), W, low_ranks(learner.backbone), strict=True):
        assert not torch.equal(frozen_weight(layer), before) and not pair.B.any()
        change = frozen_weight(layer) - before
        torch.testing.assert_close(change @ (3 * pair.A.T @ pair.A), change, rtol=1e-3, atol=1e-5)
