"""GSS-Greedy: its score, its rule of replacement, and the loop written by hand."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl.engine.batch import Batch
from cl.errors import InputError
from cl.random import derive
from cl.strategies.gss import GSS, _gradients, largest_cosine
from cl.testing import toy_stream
from toys import toy


def test_the_score_is_one_plus_the_largest_cosine():
    g, others = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[4.0, 3.0], [-3.0, -4.0]])
    torch.testing.assert_close(largest_cosine(g, others), torch.tensor([1.96, 1.0]))
    torch.testing.assert_close(largest_cosine(g[:1], others[1:]), torch.zeros(1), atol=1e-6, rtol=0)
    draw = torch.Generator().manual_seed(0)
    g, others = torch.randn(5, 7, generator=draw), torch.randn(4, 7, generator=draw)
    slow = [max(1 + float(F.cosine_similarity(a, b, dim=0)) for b in others) for a in g]
    torch.testing.assert_close(largest_cosine(10 * g, others / 3), torch.tensor(slow))


def test_gradients_are_those_of_single_examples_without_dropout():
    learner, stream = toy(GSS(20), [0], backbone="restless")
    batch = Batch(*stream[0].train.tensors()).take(slice(3))
    net = deepcopy(nn.Sequential(learner.backbone, learner.head)).eval()
    for row, found in zip(range(3), _gradients(learner, batch), strict=True):
        loss = F.cross_entropy(net(batch.x[row : row + 1] / 255)[:, :2], batch.y[row : row + 1])
        expected = torch.autograd.grad(loss, list(net.parameters()))
        torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-6)
    assert learner.backbone.training


def filled(scores: list[float]) -> GSS:
    learner, stream = toy(GSS(len(scores)))
    method, batch = learner.strategies["method"], Batch(*stream[0].train.tensors()).take(slice(len(scores)))
    batch.extras["score"] = torch.tensor(scores)
    method.memory.put(batch, np.arange(len(scores)))
    return method


def test_a_full_memory_replaces_in_proportion_to_the_scores():
    """C = (0.4, 1.2), c = 0.4: exemplar 0 goes with 1/4 * 1/2, exemplar 1 with 3/4 * 3/4, and 5/16 are not stored."""
    method, n = filled([0.4, 1.2]), 4000
    slots = [int(method._slots(np.array([0.4]))[0]) for _ in range(n)]
    shares = np.bincount(np.array(slots) + 1, minlength=3) / n
    np.testing.assert_allclose(shares, [5 / 16, 1 / 8, 9 / 16], atol=4 * 0.5 / n**0.5)


def test_an_example_like_a_stored_one_never_replaces_and_one_against_all_always_does():
    method = filled([0.5, 2.0, 0.1])
    assert all(method._slots(np.array([1.0, 1.7])).tolist() == [-1, -1] for _ in range(50))
    assert all(method._slots(np.array([0.0]))[0] >= 0 for _ in range(50)), "C / (C + 0) = 1"
    assert filled([0.0, 0.0])._slots(np.array([0.5])).tolist() == [-1], "no score to draw by"


def test_gss_is_the_loop_written_by_hand():
    learner, _ = toy(GSS(memory_size=14, batch_size=4, num_compared=5), range(3), epochs=2)
    torch.manual_seed(0)
    net = deepcopy(toy()[0].trunk())
    net = nn.Sequential(net["backbone"], net["head"])
    draw, choose = (np.random.Generator(np.random.PCG64(derive(0, "method", n))) for n in ("memory.random", "random"))

    def pick(size):
        size = min(size, len(memory))
        if size * size < len(memory):
            while len(set(rows := draw.integers(len(memory), size=size).tolist())) < size:
                pass
            return [memory[i] for i in rows]
        return [memory[i] for i in draw.choice(len(memory), size, replace=False, shuffle=False)]

    def gradient(x, y, seen):
        found = torch.autograd.grad(F.cross_entropy(net(x[None])[:, :seen], y[None]), list(net.parameters()))
        return torch.cat([g.flatten() for g in found])

    memory, scores = [], []
    for task in toy_stream(3):
        optimizer, seen = torch.optim.SGD(net.parameters(), lr=0.1), 2 * task.index + 2
        x, y, _ = task.train.tensors()
        for epoch in range(2):
            order = np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch)).permutation(len(y))
            for rows in order.reshape(-1, 8):
                fresh = [(x[i].float() / 255, y[i]) for i in rows]
                both = fresh + (pick(4) if memory else [])
                bx, by = (torch.stack(column) for column in zip(*both, strict=True))
                optimizer.zero_grad()
                F.cross_entropy(net(bx)[:, :seen], by).backward()
                optimizer.step()
                if epoch:
                    continue
                others = [gradient(*one, seen) for one in pick(5)] if memory else []
                for one in fresh:
                    g = gradient(*one, seen)
                    c = 1 + max((float(F.cosine_similarity(g, o, dim=0)) for o in others), default=-0.9)
                    if len(memory) < 14:
                        memory.append(one)
                        scores.append(c)
                    elif c < 1:
                        i = int(choose.choice(14, p=np.array(scores) / sum(scores)))
                        if choose.random() < scores[i] / (scores[i] + c):
                            memory[i], scores[i] = one, c
    method = learner.strategies["method"]
    for ours, theirs in zip(learner.trunk().parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert method.memory.column("y").tolist() == [int(label) for _, label in memory]
    torch.testing.assert_close(method.memory.column("score"), torch.tensor(scores), rtol=1e-3, atol=1e-4)
    assert len(set(method.memory.column("y").tolist())) > 2, "later classes came in"


def test_gss_refuses_to_compare_with_nothing():
    with pytest.raises(InputError, match=r"gss\.num_compared=0 must be 1 or more"):
        GSS(num_compared=0)
