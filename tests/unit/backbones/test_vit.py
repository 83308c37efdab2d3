"""The transformer with prefixes, against explicit attention."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from cl.backbones.vit import Timm
from prompted import timm_vit, transformer


def images(backbone: nn.Module, rows: int = 4) -> torch.Tensor:
    shape = (3, 32, 32) if isinstance(backbone, Timm) else (1, 4, 4)
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))


TRANSFORMERS = {
    "vit": transformer,
    "timm": timm_vit,
    "timm, layer scale, average pooling": partial(timm_vit, init_values=0.5, global_pool="avg"),
    "timm, normed queries and keys": partial(timm_vit, qk_norm=True),
}


@pytest.mark.parametrize("make", TRANSFORMERS.values(), ids=TRANSFORMERS)
@pytest.mark.parametrize("training", [True, False])
def test_a_prefix_of_no_length_changes_nothing(make, training):
    backbone = make().train(training)
    x = images(backbone)
    empty = torch.zeros(4, 2, 0, backbone.num_features)
    plain = backbone(x)
    for prefixes in (None, {}, {0: empty}, dict.fromkeys(range(backbone.num_blocks), empty)):
        torch.testing.assert_close(backbone(x, prefixes), plain, rtol=1e-5, atol=1e-6)
        tokens = backbone.encode(backbone.embed(x), prefixes)
        torch.testing.assert_close(tokens, backbone.encode(backbone.embed(x)), rtol=1e-5, atol=1e-6)


def explicit_block(block: nn.Module, x: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
    """One block for tokens (N, D) of one image and prefix (2, L, D), head by head and token by token."""
    attention = block.attn
    heads, width = attention.num_heads, attention.head_dim
    projected = attention.qkv(block.norm1(x))
    q, k, v = projected.chunk(3, dim=1)
    out = torch.zeros_like(x)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        keys = [attention.k_norm(row) for row in k[:, part]]
        values = list(v[:, part])
        if prefix is not None:
            keys, values = [*prefix[0, :, part], *keys], [*prefix[1, :, part], *values]
        for n in range(len(x)):
            query = attention.q_norm(q[n, part])
            weight = torch.stack([(query @ key) / math.sqrt(width) for key in keys]).exp()
            out[n, part] = sum(w * value for w, value in zip(weight / weight.sum(), values, strict=True))
    x = x + block.ls1(attention.proj(out))
    return x + block.ls2(block.mlp(block.norm2(x)))


@pytest.mark.parametrize("make", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_attention_with_prefixes_is_the_explicit_computation(make):
    backbone = make().eval()
    x, D, last = images(backbone, 2), backbone.num_features, backbone.num_blocks - 1
    draw = torch.Generator().manual_seed(2)
    prefixes = {0: torch.randn(2, 2, 3, D, generator=draw), last: torch.randn(2, 2, 5, D, generator=draw)}
    with torch.no_grad():
        tokens = backbone.embed(x)
        ours = backbone.encode(tokens, prefixes)
        expected = []
        for i, image in enumerate(tokens):
            for b, block in enumerate(backbone.model.blocks):
                image = explicit_block(block, image, prefixes[b][i] if b in prefixes else None)
            expected.append(backbone.model.norm(image))
        torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=1e-5)
        pooled = backbone.model.forward_head(ours, pre_logits=True)
        torch.testing.assert_close(backbone(x, prefixes), pooled)
        assert not torch.allclose(pooled, backbone(x), atol=1e-3)


def test_gradients_reach_prefixes_through_a_frozen_transformer_and_dropout_is_timms():
    backbone = transformer(dropout=0.2, drop_path=0.3).requires_grad_(False)
    prefix = torch.randn(4, 2, 3, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(backbone.eval()(images(backbone), {1: prefix}).square().sum(), prefix)
    assert bool((gradient.abs().sum((1, 3)) > 0).all())
    runs = []
    for prefixes in (None, {1: torch.zeros(4, 2, 0, 16)}):  # the same draws in the same places
        torch.manual_seed(3)
        runs.append(backbone.train()(images(backbone), prefixes))
    torch.testing.assert_close(*runs)
