"""Replay written in plain PyTorch: a reservoir on lists, the loop around it, and herding in loops."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from cl.engine.learner import Learner
from cl.random import derive
from cl.testing import ToyBackbone, toy_stream


def close(learner: Learner, net: nn.Module) -> None:
    for ours, theirs in zip(learner.trunk().parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Reservoir:
    """Algorithm R on Python lists, with a memory's generator, which draws for 1024 rows at once."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.rows, self.num_seen, self.uniform = capacity, [], 0, []
        self.draw = np.random.Generator(np.random.PCG64(seed))

    def add(self, row) -> None:
        self.uniform = self.uniform or list(self.draw.random(1024))
        u = self.uniform.pop(0)
        if len(self.rows) < self.capacity:
            self.rows.append(row)
        elif (slot := int(u * (self.num_seen + 1))) < self.capacity:
            self.rows[slot] = row
        self.num_seen += 1

    def some(self, size: int):
        size = min(size, len(self.rows))
        picked = [self.rows[i] for i in self.draw.choice(len(self.rows), size, replace=False, shuffle=False)]
        return [torch.stack(column) for column in zip(*picked, strict=True)]


def by_hand(loss_of, capacity: int = 12, epochs: int = 2, every_epoch: bool = False) -> nn.Module:
    """Learn the class-incremental toy in plain PyTorch; only the draws are looked up.

    `loss_of(net, x, y, memory, seen)` returns the loss and the logits of the incoming rows, which are then offered.
    """
    stream = toy_stream(3)
    torch.manual_seed(0)
    net = nn.Sequential(ToyBackbone(), nn.Linear(16, 6))
    memory = Reservoir(capacity, derive(0, "method", "memory.random"))
    for task in stream:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        x, y, _ = task.train.tensors()
        for epoch in range(epochs):
            order = np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch)).permutation(len(y))
            for start in range(0, len(order), 8):
                rows = order[start : start + 8]
                bx, by = x[rows].float() / 255, y[rows]
                loss, logits = loss_of(net, bx, by, memory, 2 * task.index + 2)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if every_epoch or epoch == 0:
                    for row in zip(bx, by, logits.detach(), strict=True):
                        memory.add(row)
    return net


def slow_herding(features: np.ndarray, size: int) -> list[tuple[int, float]]:
    """Algorithm 4 as it is printed."""
    chosen: list[tuple[int, float]] = []
    for k in range(1, size + 1):
        total = sum((features[i] for i, _ in chosen), np.zeros(features.shape[1]))
        left = [i for i in range(len(features)) if i not in {j for j, _ in chosen}]
        gaps = {i: float(np.linalg.norm(features.mean(0) - (features[i] + total) / k)) for i in left}
        best = min(gaps, key=gaps.__getitem__)
        chosen.append((best, gaps[best]))
    return chosen


def ordered(num_rows: int, task: int, epochs: int = 1, batch_size: int = 8, seed: int = 0):
    """Yield the positions of the examples of each step of a task, in the order of a run."""
    for epoch in range(epochs):
        order = np.random.default_rng(derive(derive(seed, "task", task), "order", epoch)).permutation(num_rows)
        yield from (order[start : start + batch_size] for start in range(0, num_rows, batch_size))
