"""MULTI-LANE: summaries and pathways by hand, and old logits that stay the same to the bit."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies.multilane import MultiLane, summaries
from cl.testing import ToyBackbone, toy_stream
from draws import quick, seeds
from prompted import (
    all_rows,
    assert_backbone_is_frozen,
    assert_rows_are_independent,
    assert_rows_take_the_part_of_their_task,
    one_batch,
    prompted,
    transformer,
)
from toys import learn, weights

LANE = partial(MultiLane, num_selectors=3, length=2, blocks=(0, 2))


def test_worked_summaries():
    """A selector of sqrt(2) on the first axis weights tokens by softmax(1, 0), one of zeros by their mean."""
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[3.0, 1.0], [3.0, 1.0]]])
    found = summaries(torch.tensor([[math.sqrt(2), 0.0], [0.0, 0.0]]), tokens)
    torch.testing.assert_close(found[0], torch.tensor([[0.731059, 0.268941], [0.5, 0.5]]))
    torch.testing.assert_close(found[1], torch.tensor([[3.0, 1.0]]).expand(2, 2))


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 5))
def test_summaries_are_means_of_tokens_in_any_order(seed, num_selectors, num_tokens):
    draw = torch.Generator().manual_seed(seed)
    selectors, tokens = torch.randn(num_selectors, 3, generator=draw), torch.randn(2, num_tokens, 3, generator=draw)
    found = summaries(selectors, tokens)
    low, high = tokens.amin(1, keepdim=True), tokens.amax(1, keepdim=True)
    assert found.shape == (2, num_selectors, 3) and (found >= low - 1e-5).all() and (found <= high + 1e-5).all()
    torch.testing.assert_close(summaries(selectors, tokens.flip(1)), found, rtol=1e-4, atol=1e-5)


def attention_by_hand(attn, x: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """The outputs (N, D) of an attention on one image's tokens (N, D), head by head."""
    W, b = attn.qkv.weight.detach(), attn.qkv.bias.detach()
    q, k, v = (x @ W.T + b).chunk(3, dim=1)
    k, v = torch.cat([prefix[0], k]), torch.cat([prefix[1], v])
    width = q.shape[1] // attn.num_heads
    heads = []
    for i in range(attn.num_heads):
        part = slice(i * width, (i + 1) * width)
        heads.append((q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(1) @ v[:, part])
    return torch.cat(heads, dim=1) @ attn.proj.weight.detach().T + attn.proj.bias.detach()


def pathway_by_hand(learner: Learner, image: torch.Tensor, task: int) -> torch.Tensor:
    """The feature (D,) of one image in the pathway of a task."""
    method, model = learner.strategies["method"], learner.backbone.model.eval()
    x, c, S = learner.backbone.embed(image[None])[0], model.cls_token[0, 0], method.S[task]
    for b, block in enumerate(model.blocks):
        tokens, s = block.norm1(x), block.norm1(S)
        Z = torch.stack([(tokens @ row / 4).softmax(0) @ tokens for row in s])  # 4 is the root of D = 16
        prefix = method.P[task][{0: 0, 2: 1}[b]] if b != 1 else torch.zeros(2, 0, 16)
        c = c + attention_by_hand(block.attn, torch.cat([block.norm1(c)[None], Z]), prefix)[0]
        c = c + block.mlp(block.norm2(c))
        if method.selectors == "released":
            S = S + s
            S = S + block.mlp(block.norm2(S))
        x = block(x[None])[0]
    c = model.norm(c)
    return c / c.norm() if method.normalize else c


@pytest.mark.parametrize("scenario", ["class", "task"])
@pytest.mark.parametrize("options", [{}, {"selectors": "fixed", "normalize": False}])
def test_multilane_by_hand(scenario, options):
    learner, stream = prompted(LANE(**options), scenario)
    learn(learner, stream, [0, 1])
    learner.before_task(stream[2])
    batch, logits, loss = one_batch(learner, stream[2])
    expected = learner.head(torch.stack([pathway_by_hand(learner, row, 2) for row in batch.view])).detach()
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-4, atol=1e-4)
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(expected[:, 4:], batch.y - 4)), rel=1e-3)
    learner.after_task(stream[2])

    learner.eval()
    x, _, told = (column[:9] for column in stream[1].test.tensors())
    view = learner.prepare(x)
    with torch.no_grad():
        found = learner.strategies["method"].predict(learner, view)
        for row, logits in zip(view[:3], found, strict=False):
            for t, own in enumerate((slice(0, 2), slice(2, 4), slice(4, 6))):
                pathway = learner.head(pathway_by_hand(learner, row, t))
                torch.testing.assert_close(logits[own], pathway[own], rtol=1e-4, atol=1e-4)
        alone = learner(view, told)
    torch.testing.assert_close(alone[:, 2:4], found[:, 2:4], rtol=0, atol=1e-5)


def test_released_selectors_differ_from_fixed_after_the_first_block_and_not_before():
    features = {}
    for depth in (1, 2):
        for kind in ("released", "fixed"):
            learner, stream = prompted(LANE(selectors=kind, blocks=(0,)), backbone=transformer(depth))
            learner.before_task(stream[0])
            method, view = learner.strategies["method"], all_rows(learner, stream)
            features[depth, kind] = method.lane(learner, method.frozen(learner, view), 0).detach()
    assert torch.equal(features[1, "released"], features[1, "fixed"])
    assert not torch.allclose(features[2, "released"], features[2, "fixed"], atol=1e-3)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_old_logits_stay_the_same_to_the_bit(optimizer):
    learner, stream = prompted(LANE(), optimizer=partial(optimizer, lr=0.05), optimizer_state="keep")
    method, view, old = learner.strategies["method"], all_rows(learner, stream), {}
    for t, task in enumerate(stream):
        before = weights(method)
        learn(learner, stream, [task.index], epochs=2)
        changed = {name for name, value in weights(method).items() if not torch.equal(value, before[name])}
        assert changed == {f"S.{t}", f"P.{t}"}
        assert [part.requires_grad for part in method.S] == [s == t for s in range(3)]
        with torch.no_grad():
            logits = method.predict(learner.eval(), view)
        for s, kept in old.items():
            assert torch.equal(logits[:, 2 * s : 2 * s + 2], kept), (s, t)
        old[t] = logits[:, 2 * t : 2 * t + 2].clone()


def test_a_task_starts_from_the_pathway_of_the_one_before_and_the_first_from_orthogonal_rows():
    learner, stream = prompted(LANE())
    method = learner.strategies["method"]
    torch.testing.assert_close(method.S[0] @ method.S[0].T, torch.eye(3))
    learn(learner, stream, [0])
    kept, other = (method.S[0].clone(), method.P[0].clone()), method.S[1].clone()
    learner.before_task(stream[1])
    assert torch.equal(method.S[1], kept[0]) and torch.equal(method.P[1], kept[1])
    assert not torch.equal(other, kept[0])


def test_rows_are_independent_and_replayed_ones_take_the_pathway_of_their_task():
    learner, stream = prompted(LANE())
    learn(learner, stream)
    assert_rows_are_independent(learner, stream)
    assert_rows_take_the_part_of_their_task(learner, stream)


def multilabel(num_tasks: int):
    """The toy stream with a 1 for the label: each task annotates classes of its own."""
    stream = toy_stream(num_tasks)
    hot = partial(F.one_hot, num_classes=stream.num_classes)
    return stream.derive(
        lambda t: stream[t].each(lambda part: replace(part, y=hot(part.y).float())), target="multilabel"
    )


def test_several_labels_at_once():
    """All logits 0: the loss over the task's own classes is ln 2, and columns of other classes have no gradient."""
    stream = multilabel(3)
    torch.manual_seed(0)
    learner = Learner(stream, transformer(), {"method": LANE()}, partial(torch.optim.Adam, lr=0.05), batch_size=8)
    nn.init.zeros_(learner.head.weight)
    nn.init.zeros_(learner.head.bias)
    learner.before_task(stream[1])
    _, _, loss = one_batch(learner, stream[1])
    assert float(loss.detach()) == pytest.approx(math.log(2))
    loss.backward()
    moved = learner.head.weight.grad.abs().sum(1) > 0
    assert moved.tolist() == [False, False, True, True, False, False]


def test_what_it_leaves_and_refuses():
    assert_backbone_is_frozen(LANE())
    with pytest.raises(InputError, match=r"no kind of selectors called 'relased': did you mean 'released'"):
        MultiLane(selectors="relased")
    with pytest.raises(InputError, match=r"multilane\.blocks=\[0, 1, 2, 3, 4\], but the blocks of ViT are 0 to 2"):
        prompted(MultiLane())
    with pytest.raises(InputError, match="ToyBackbone has no embed and encode: use backbone=vit"):
        prompted(LANE(), backbone=ToyBackbone())
    backbone = transformer()
    backbone.model.cls_token = None
    with pytest.raises(InputError, match="class token, but ViT has none: use backbone=vit"):
        prompted(LANE(), backbone=backbone)
