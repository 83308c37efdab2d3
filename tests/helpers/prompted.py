"""A small transformer for methods that learn prompts, and what must hold of all of them."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from cl.backbones.vit import Timm, ViT
from cl.data.task import Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.testing import toy_stream
from toys import learn, same, weights


def all_rows(learner: Learner, stream: Stream) -> torch.Tensor:
    return learner.prepare(TaskData.concat([task.test for task in stream]).tensors()[0])


def assert_rows_are_independent(learner: Learner, stream: Stream) -> None:
    """A batch of one, a shuffled batch and the whole batch must say the same of a row."""
    learner.eval()
    view, predict = all_rows(learner, stream), partial(learner._owners["predict"], learner)
    with torch.no_grad():
        together = predict(view)
        alone = torch.cat([predict(row[None]) for row in view])
        order = torch.randperm(len(view), generator=torch.Generator().manual_seed(0))
        shuffled = predict(view[order])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-5)
    assert float(together.std(0).max()) > 1e-4, "they must differ to show anything"


def transformer(depth: int = 3, **options) -> ViT:
    """A small transformer whose weights are large enough for all parts to show."""
    torch.manual_seed(0)
    vit = ViT((1, 4, 4), patch_size=2, dim=16, depth=depth, heads=2, **options)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit


def timm_vit(**options) -> Timm:
    torch.manual_seed(0)
    return Timm((3, 32, 32), "test_vit", **options)


def prompted(strategy: Strategy | dict[str, Strategy], scenario="class", backbone=None, optimizer=None, **options):
    """A learner with a strategy of prompts, and its stream."""
    backbone = backbone or transformer()
    stream = toy_stream(3, scenario)
    torch.manual_seed(0)
    strategies = strategy if isinstance(strategy, dict) else {"method": strategy}
    optimizer = optimizer or partial(torch.optim.Adam, lr=0.05)
    return Learner(stream, backbone, strategies, optimizer, batch_size=8, **options), stream


def one_batch(learner: Learner, task: Task, rows: int = 5, tasks: torch.Tensor | None = None) -> tuple:
    """Run a minibatch as the learner does in training; return it with logits and loss."""
    x, y, label = (column[:rows] for column in task.train.tensors())
    batch = Batch(x, y, label if tasks is None else tasks, view=learner.prepare(x))
    logits = learner(batch.view, batch.task)
    return batch, logits, learner.strategies["method"].criterion(learner, batch, logits)


def own_classes(scenario: str, task: int) -> slice:
    return slice(0, 2) if scenario == "domain" else slice(2 * task, 2 * task + 2)


def queries(backbone: nn.Module, view: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(backbone).eval()(view)


def assert_backbone_is_frozen(strategy: Strategy, scenario="class", **options) -> Learner:
    learner, stream = prompted(strategy, scenario, transformer(dropout=0.1), **options)
    before, others = weights(learner.backbone), weights(strategy)
    learn(learner, stream, epochs=2)
    assert same(weights(learner.backbone), before) and not same(weights(strategy), others)
    return learner


def assert_rows_take_the_part_of_their_task(learner: Learner, stream: Stream) -> None:
    """Rows of several tasks in one minibatch get what they get among rows of their own, and not that of others."""
    tasks = torch.tensor([0, 2, 1, 1, 0])
    _, mixed, _ = one_batch(learner, stream[2], tasks=tasks)
    for t in range(3):
        _, single, _ = one_batch(learner, stream[2], tasks=torch.full((5,), t))
        torch.testing.assert_close(mixed[tasks == t], single[tasks == t], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mixed[tasks != t], single[tasks != t], atol=1e-3)
