"""LST: the ladder by hand, its start, and the backbone that no gradient enters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.backbones.blocks import blocks
from cl.strategies.lst import LST, Step, pooled
from cl.testing import toy_learner, toy_stream
from draws import quick, seeds
from prompted import all_rows
from toys import build, learn, same, toy, weights


def test_a_step_by_hand():
    """Gate .1 ln 3 at tau .1: share 3/4; D z = 2 (1 + 2) = 6, h = 4: mixed 5.5, and the body adds its last bias .25."""
    step = Step(2, 3, tau=0.1)
    with torch.no_grad():
        step.gate.fill_(0.1 * torch.tensor(3.0).log())
        step.down.weight.fill_(2.0)
        step.down.bias.zero_()
        step.body[1].bias.fill_(1.0)
        step.body[3].weight.zero_()
        step.body[3].bias.fill_(0.25)
    found = step(torch.tensor([[1.0, 2.0]]), torch.full((1, 3), 4.0))
    torch.testing.assert_close(found, torch.full((1, 3), 5.75))


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 4))
def test_outputs_are_pooled_over_places_and_tokens(seed, batch, channels):
    draw = torch.Generator().manual_seed(seed)
    maps = torch.randn(batch, channels, 2, 3, generator=draw)
    torch.testing.assert_close(pooled(maps), maps.mean((2, 3)))
    tokens = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled(tokens), maps.mean((2, 3)))
    assert pooled(maps[:, :, 0, 0]).equal(maps[:, :, 0, 0])


def make(backbone: str):
    if backbone == "maps":
        stream = toy_stream(3)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 2), nn.Flatten())
        net.num_features = 6
        return build(stream, net, LST(4)), stream
    return toy_learner({"method": LST(4)}, backbone=backbone)


@pytest.mark.parametrize("backbone", ["mlp", "vit", "maps", "restless"])
def test_it_starts_as_the_backbone_and_ends_as_the_ladder_written_by_hand(backbone):
    learner, stream = make(backbone)
    method, view = learner.strategies["method"], all_rows(learner, stream)
    learner.eval()
    assert torch.equal(method.encode(learner, view), learner.backbone(view))
    learn(learner, stream, epochs=2)
    learner.eval()
    z, h, seen = view, torch.zeros(len(view), 4), 0
    for block in blocks(learner.backbone):
        z = block(z)
        if not list(block.parameters()):
            continue
        places = z.flatten(2).mean(2) if z.ndim == 4 else z.mean(1) if z.ndim == 3 else z
        step = method.steps[seen]
        share = 1 / (1 + torch.exp(-step.gate / 0.1))
        h = share * step.down(places) + (1 - share) * h
        inner = F.gelu(step.body[1](F.layer_norm(h, (4,), step.body[0].weight, step.body[0].bias)))
        h, seen = h + step.body[3](inner), seen + 1
    assert seen == len(method.steps)
    torch.testing.assert_close(method.encode(learner, view), z + method.up(h), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(method.up(h), torch.zeros(()), atol=1e-3)


@pytest.mark.parametrize("backbone", ["mlp", "vit", "maps"])
def test_no_gradient_enters_the_backbone_even_where_it_asks_for_one(backbone):
    learner, stream = make(backbone)
    learner.backbone.requires_grad_()
    method, view = learner.strategies["method"], all_rows(learner, stream)
    torch.nn.init.ones_(method.up.weight)
    method.encode(learner, view).sum().backward()
    assert all(p.grad is None for p in learner.backbone.parameters())
    assert all(p.grad is not None for p in method.parameters())


def test_the_backbone_keeps_its_weights_and_statistics():
    before = weights(toy_learner(backbone="restless")[0].backbone)
    assert same(weights(toy(LST(4), range(3), backbone="restless")[0].backbone), before)
