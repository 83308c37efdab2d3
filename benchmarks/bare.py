"""The loop that a careful engineer writes by hand: tensors in memory, index slices, no logging."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import MEAN, STD, Arrays, Workload


def run(workload: Workload, tasks: list[Arrays]) -> tuple[list[float], int]:
    """Learn every task; return the last row of accuracies and the number of steps."""
    model, mean, std = workload.model(), *_moments(workload)

    def prepare(x: Tensor) -> Tensor:
        return x.to(torch.float32).sub_(mean).div_(std)

    sizes = [len(t[3]) for t in tasks]
    test_x, test_y = prepare(torch.cat([t[2] for t in tasks])), torch.cat([t[3] for t in tasks])
    row = _evaluate(model, test_x, test_y, sizes)
    if workload.name == "evaluate":
        for _ in range(4):
            row = _evaluate(model, test_x, test_y, sizes)
        return row, 0
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.lr)
    stored = torch.uint8 if workload.augment else torch.float32
    memory_x = torch.empty(workload.memory, *tasks[0][0].shape[1:], dtype=stored)
    memory_y = torch.empty(workload.memory, dtype=torch.int64)
    seen = steps = 0
    for x, y, _, _ in tasks:
        if not workload.augment:
            x = prepare(x)
        model.train()
        for index in torch.randperm(len(y)).split(workload.batch_size):
            new_x, new_y = x[index], y[index]
            batch_x, batch_y = new_x, new_y
            if workload.replay and seen:
                drawn = torch.randperm(min(seen, workload.memory))[: workload.replay]
                batch_x, batch_y = torch.cat([new_x, memory_x[drawn]]), torch.cat([new_y, memory_y[drawn]])
            if workload.augment:
                batch_x = prepare(_crop_and_flip(batch_x))
            optimizer.zero_grad()
            F.cross_entropy(model(batch_x), batch_y).backward()
            optimizer.step()
            steps += 1
            if workload.replay:
                count = torch.arange(seen, seen + len(new_y))
                slots = torch.where(count < workload.memory, count, (torch.rand(len(count)) * (count + 1)).long())
                kept = slots < workload.memory
                memory_x[slots[kept]], memory_y[slots[kept]] = new_x[kept], new_y[kept]
                seen += len(new_y)
        row = _evaluate(model, test_x, test_y, sizes)
    return row, steps


def _moments(workload: Workload) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v[workload.dataset]).view(-1, 1, 1) * 255 for v in (MEAN, STD))
    return mean, std


def _evaluate(model: nn.Module, x: Tensor, y: Tensor, sizes: list[int]) -> list[float]:
    model.eval()
    with torch.inference_mode():
        right = torch.cat([model(part).argmax(1) for part in x.split(256)]) == y
    return [float(part.float().mean()) for part in right.split(sizes)]


def _crop_and_flip(x: Tensor) -> Tensor:
    """Pad by 4, crop at an offset a row, flip half the rows."""
    rows, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, rows))
    columns = torch.where(torch.rand(rows, 1) < 0.5, torch.arange(width), torch.arange(width - 1, -1, -1))
    i = (top[:, None] + torch.arange(height))[:, :, None]
    j = (left[:, None] + columns)[:, None, :]
    return padded.permute(0, 2, 3, 1)[torch.arange(rows)[:, None, None], i, j].permute(0, 3, 1, 2)
