"""SD-LoRA: directions and magnitudes by hand, and what goes on learning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from by_hand import ordered
from cl.random import Random
from cl.strategies.sd_lora import Directions, SDLoRA
from cl.testing import toy_learner
from cl.toolkit.inject import frozen_weight, low_rank_layers, low_ranks
from draws import quick, seeds
from toys import learn, toy


@quick
@given(seeds, st.integers(1, 3))
def test_the_end_of_a_task_keeps_the_weight_and_makes_a_direction_of_length_one(seed, rank):
    torch.manual_seed(seed)
    part = Directions(torch.zeros(4, 5), rank, 3)
    for t in range(3):
        part.B.data.normal_()
        part.scale.data.fill_(0.7)
        before = part.product
        part.end(t, Random())
        torch.testing.assert_close(part.product, before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((part.old_B[t] @ part.old_A[t]).norm(), torch.tensor(1.0))
        assert part.scale.item() == 1.0 and not part.B.any()


def test_a_task_that_trains_nothing_has_a_direction_of_zero():
    part = Directions(torch.zeros(4, 5), 2, 3)
    part.end(0, Random())
    assert part.alpha[0] == 0 and part.product.isfinite().all() and not part.product.any()


def test_the_run_is_the_loop_written_by_hand():
    learner, stream = toy_learner({"method": SDLoRA(rank=2)})
    W = [frozen_weight(layer).detach().clone() for layer in low_rank_layers(learner.backbone)]
    head = nn.Linear(16, 6)
    head.load_state_dict(learner.head.state_dict())
    old: list[list[list[torch.Tensor]]] = [[], []]  # for each layer, (magnitude, direction) of each task
    for t, task in enumerate(stream):
        now = [[p.A.detach().clone(), torch.zeros(16, 2), torch.ones(())] for p in low_ranks(learner.backbone)]
        trained = [part.requires_grad_() for parts in now for part in parts]
        trained += [pair[0].requires_grad_() for pairs in old for pair in pairs]
        optimizer = torch.optim.SGD([*trained, *head.parameters()], lr=0.1)
        x, y, _ = task.train.tensors()
        for rows in ordered(len(y), t, epochs=2):
            h = x[rows].float().flatten(1) / 255
            for weight, (A, B, scale), pairs in zip(W, now, old, strict=True):
                h = F.relu(h @ (weight + scale * B @ A + sum(a * direction for a, direction in pairs)).T)
            optimizer.zero_grad()
            F.cross_entropy(head(h)[:, 2 * t : 2 * t + 2], y[rows] - 2 * t).backward()
            optimizer.step()
        for (A, B, scale), pairs in zip(now, old, strict=True):
            change = (B @ A).detach()
            pairs.append([(scale * change.norm()).detach(), change / change.norm()])
        learn(learner, stream, [t], epochs=2)
        for layer, weight, pairs in zip(low_rank_layers(learner.backbone), W, old, strict=True):
            expected = weight + sum(a * direction for a, direction in pairs)
            torch.testing.assert_close(layer.weight, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(frozen_weight(layer), weight)
    torch.testing.assert_close(learner.head.weight, head.weight, rtol=1e-4, atol=1e-5)


def test_old_directions_stay_and_old_magnitudes_learn():
    learner, stream = toy(SDLoRA(rank=2), range(1), epochs=2)
    part = low_ranks(learner.backbone)[0]
    direction, alpha = part.old_B[0] @ part.old_A[0], part.alpha.detach().clone()
    learn(learner, stream, [1], epochs=2)
    assert torch.equal(part.old_B[0] @ part.old_A[0], direction)
    assert part.alpha[0] != alpha[0] and part.alpha[1] != 0 and part.alpha[2] == 0
