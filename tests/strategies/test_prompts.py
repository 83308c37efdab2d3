"""Prompts and pre-trained features: worked examples, closed forms, and independence of the batch."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from checkout import CONF
from cl.app.build import build as build_experiment
from cl.backbones.vit import Timm, ViT
from cl.data.task import SCENARIOS, Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies.coda_prompt import CODAPrompt, agreement, apart
from cl.strategies.dualprompt import DualPrompt
from cl.strategies.er import ER
from cl.strategies.l2p import L2P
from cl.strategies.ncm import NCM
from cl.strategies.ranpac import RanPAC, ridge_regression
from cl.strategies.s_prompts import SPrompts, distances
from cl.testing import ToyBackbone, toy_learner, toy_stream
from toys import learn, same, toy, trainer, weights

quick = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**31)


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


# ------------------------------------------------------------------ RanPAC


def test_worked_example_33():
    H, Y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    expected = torch.tensor([[0.352941, 0.176471], [-0.058824, 0.470588]], dtype=torch.float64)
    torch.testing.assert_close(ridge_regression(H.T @ H, H.T @ Y, torch.tensor([1.0]))[0], expected, rtol=0, atol=1e-6)


@quick
@given(seeds, st.integers(1, 12), st.integers(1, 8), st.floats(-2, 4))
def test_the_regression_is_scikit_learns(seed, num_rows, size, exponent):
    from sklearn.linear_model import Ridge

    draw = np.random.default_rng(seed)
    H, Y = draw.standard_normal((num_rows, size)), draw.standard_normal((num_rows, 3))
    theirs = Ridge(alpha=10.0**exponent, fit_intercept=False).fit(H, Y).coef_
    h, y = torch.from_numpy(H), torch.from_numpy(Y)
    ours = ridge_regression(h.T @ h, h.T @ y, torch.tensor([10.0**exponent]))[0]
    np.testing.assert_allclose(ours.numpy(), np.reshape(theirs, (3, size)).T, rtol=1e-5, atol=1e-7)


def ranpac_by_hand(learner: Learner, stream: Stream) -> tuple[torch.Tensor, list[float]]:
    """Keep all features, split them as the strategy does, solve anew for each lambda by elimination."""
    projection = learner.strategies["method"].projection.double()
    draws = np.random.Generator(np.random.PCG64())
    draws.bit_generator.state = learner.strategies["method"].random.generator.bit_generator.state
    G = Q = 0.0
    chosen, strengths = [], [10.0**k for k in range(-8, 9)]

    def solve(h, y, strength):
        return torch.linalg.solve(h.T @ h + strength * torch.eye(h.shape[1], dtype=h.dtype), h.T @ y)

    for task in stream:
        x, labels, _ = task.train.tensors()
        h = F.relu(learner.backbone(learner.prepare(x)).double() @ projection).detach()
        y = F.one_hot(labels, stream.num_classes).double()
        order = torch.from_numpy(draws.permutation(len(y)))
        fit, held = order[: int(0.8 * len(y))], order[int(0.8 * len(y)) :]
        errors = [float((h[held] @ solve(h[fit], y[fit], s) - y[held]).square().mean()) for s in strengths]
        chosen.append(strengths[int(np.argmin(errors))])
        G, Q = G + h.T @ h, Q + h.T @ y
    return torch.linalg.solve(G + chosen[-1] * torch.eye(len(G), dtype=G.dtype), Q), chosen


@pytest.mark.parametrize("seed", range(4))
def test_ranpac_is_the_regression_written_by_hand(seed):
    learner, stream = toy(RanPAC(num_projections=40), seed=seed)
    expected, chosen = ranpac_by_hand(learner, stream)
    learn(learner, stream)
    strategy, view = learner.strategies["method"], all_rows(learner, stream)
    h = F.relu(learner.backbone(view) @ strategy.projection).detach()
    torch.testing.assert_close(strategy.predict(learner, view).double(), h.double() @ expected, rtol=1e-3, atol=1e-3)
    assert 1e-8 < chosen[-1] < 1e8, "a lambda in the middle, or the choice shows nothing"


def test_ranpac_does_not_depend_on_the_order_of_tasks():
    base, results = toy_stream(3), []
    for order in permutations(range(3)):
        tasks = [Task(t, base[i].train, base[i].test) for t, i in enumerate(order)]
        torch.manual_seed(0)
        stream = Stream(tasks, num_classes=6)
        learner = Learner(
            stream, ToyBackbone(), {"method": RanPAC(30, ridge=1.0)}, partial(torch.optim.SGD, lr=0.1), batch_size=8
        )
        results.append(weights(learn(learner, stream).strategies["method"]))
    for result in results[1:]:
        for name in ("G", "Q", "weight"):
            torch.testing.assert_close(result[name], results[0][name], rtol=1e-4, atol=1e-4)


def test_without_projections_ranpac_regresses_on_the_features_themselves():
    learner, stream = toy(RanPAC(num_projections=0, ridge=0.5), range(3))
    x = TaskData.concat([task.train for task in stream]).tensors()[0]
    f = learner.backbone(learner.prepare(x)).detach()
    torch.testing.assert_close(learner.strategies["method"].G, f.T @ f, rtol=1e-4, atol=1e-4)
    assert learner.strategies["method"].weight.shape == (16, 6)


def test_ranpac_trains_nothing_unless_it_adapts_and_then_in_the_first_task_only():
    plain = weights(toy_learner()[0].trunk())
    assert same(weights(toy(RanPAC(20), range(3))[0].trunk()), plain)
    first = weights(toy(RanPAC(20, adapt=True), range(1))[0].trunk())
    assert not same(first, plain)
    assert same(weights(toy(RanPAC(20, adapt=True), range(3))[0].trunk()), first)


class Same(nn.Module):
    num_features = 2

    def forward(self, x):
        return x


def test_random_projections_separate_what_the_features_do_not():
    """Two classes as XOR of two features: no linear rule tells them apart, one on projections does."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=draw)
    y = (x.prod(1) > 0).long()

    found = []
    for size in (0, 200):
        stream = Stream([Task(0, TaskData(x, y), TaskData(x, y))], num_classes=2)
        learner = Learner(stream, Same(), {"method": RanPAC(size)}, partial(torch.optim.SGD, lr=0.1))
        learn(learner, stream)
        found.append(float((learner.strategies["method"].predict(learner, x).argmax(1) == y).float().mean()))
    assert found[0] < 0.65 and found[1] > 0.95


def test_half_precision_is_the_backbones_alone():
    x, y = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    stream = Stream([Task(0, TaskData(x, y), TaskData(x, y))], num_classes=2)
    learner = Learner(stream, Same(), {"method": RanPAC(30)}, partial(torch.optim.SGD, lr=0.1))
    strategy = learn(learner, stream).strategies["method"]
    plain = strategy.predict(learner, x)
    with torch.autocast("cpu", torch.bfloat16):  # as Lightning does around a test step
        torch.testing.assert_close(strategy.predict(learner, x), plain)


def test_a_class_that_was_never_seen_scores_zero_and_rows_are_independent():
    learner, stream = toy(RanPAC(20), [0])
    out = learner.strategies["method"].predict(learner, all_rows(learner, stream))
    assert not out[:, 2:].any() and bool(out[:, :2].any())
    assert_rows_are_independent(learner, stream)


def test_ranpac_refuses_a_lambda_of_zero_and_anothers_features():
    with pytest.raises(InputError, match=r"ranpac\.ridge=0\.0 must be above 0"):
        RanPAC(ridge=0.0)
    with pytest.raises(InputError, match=r"ranpac\.num_projections=-1 must be 0 or more"):
        RanPAC(num_projections=-1)
    with pytest.raises(InputError, match="RanPAC sums the backbone's features, but another strategy owns encode"):
        toy_learner({"ranpac": RanPAC(20), "l2p": L2P(4, 2, 2)}, backbone="vit")


# ------------------------------------------------------------------ SimpleCIL: nearest class mean by its defaults


def test_ncm_is_simplecils_cosine_classifier():
    """A linear layer whose weights are replaced by class means, both sides of the product normalised, scale 1."""
    learner, stream = toy(NCM(), backbone="vit")
    layer = nn.Linear(16, 6, bias=False)
    nn.init.constant_(layer.weight, -1.0)
    for task in stream:
        x, y, _ = task.train.tensors()
        features = learner.backbone(learner.prepare(x)).detach()
        for c in task.classes:
            layer.weight.data[c] = features[y == c].mean(0)
        learn(learner, stream, [task.index])
        view = all_rows(learner, stream)
        theirs = F.linear(F.normalize(learner.backbone(view), dim=1), F.normalize(layer.weight, dim=1))
        ours = learner.strategies["method"].predict(learner, view)
        seen = slice(0, 2 * task.index + 2)
        torch.testing.assert_close(ours[:, seen], theirs[:, seen], rtol=1e-4, atol=1e-5)
    assert_rows_are_independent(learner, stream)


def test_the_mean_of_a_class_that_returns_is_that_of_all_its_examples():
    learner, stream = toy(NCM(), range(3), scenario="domain")
    x, y, _ = TaskData.concat([task.train for task in stream]).tensors()
    features = learner.backbone(learner.prepare(x)).detach()
    means = torch.stack([features[y == c].mean(0) for c in range(2)])
    view = all_rows(learner, stream)
    expected = F.cosine_similarity(learner.backbone(view)[:, None], means[None], dim=2)
    torch.testing.assert_close(learner.strategies["method"].predict(learner, view), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ prefixes


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


def test_a_transformer_of_other_attention_takes_no_prefixes():
    kinds = {
        "parallel blocks": Timm((3, 32, 32), "vit_small_patch16_18x2_224", depth=1, embed_dim=16, num_heads=2),
        "convolutions": Timm((3, 32, 32), "test_resnet"),
        "a gate": timm_vit(),
    }
    kinds["a gate"].model.blocks[0].attn.gate = nn.Linear(64, 64)
    for kind, backbone in kinds.items():
        assert not hasattr(backbone, "num_blocks"), kind
        with pytest.raises(InputError, match=r"no embed and encode|no blocks that take them"):
            prompted(DualPrompt(general_blocks=(), expert_blocks=(0,)), backbone=backbone)
    assert timm_vit().num_blocks == 6 and transformer().num_blocks == 3


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


# ------------------------------------------------------------------ DualPrompt

DUAL = partial(DualPrompt, general_length=4, expert_length=6, general_blocks=(0, 1), expert_blocks=(1, 2))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_dualprompt_on_one_batch_by_hand(scenario):
    learner, stream = prompted(DUAL(pull=0.3), scenario)
    strategy = learner.strategies["method"]
    for task in stream[:2]:
        learner.before_task(task)
    batch, logits, loss = one_batch(learner, stream[1])
    g, e, key = strategy.general.detach(), strategy.experts[1].detach(), strategy.keys[1].detach()
    assert g.shape == (2, 2, 2, 16) and e.shape == (2, 2, 3, 16)
    distance, features = 0.0, []
    for row, query in zip(batch.view, queries(learner.backbone, batch.view), strict=True):
        distance += float(1 - query @ key / (query.norm() * key.norm())) / 5
        prefixes = {0: g[0][None], 1: torch.cat([g[1], e[0]], dim=1)[None], 2: e[1][None]}
        features.append(learner.backbone(row[None], prefixes)[0])
    expected = learner.head(torch.stack(features)).detach()
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-4, atol=1e-5)
    own = own_classes(scenario, 1)
    cross_entropy = F.cross_entropy(expected[:, own], batch.y - own.start)
    assert float(loss.detach()) == pytest.approx(float(cross_entropy) + 0.3 * distance, rel=1e-4)


def test_replayed_rows_get_the_prompt_of_their_own_task():
    learner, stream = prompted(DUAL())
    for task in stream:
        learner.before_task(task)
    tasks = torch.tensor([0, 2, 1, 1, 0])
    _, mixed, _ = one_batch(learner, stream[2], tasks=tasks)
    for t in range(3):
        _, single, _ = one_batch(learner, stream[2], tasks=torch.full((5,), t))
        torch.testing.assert_close(mixed[tasks == t], single[tasks == t], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mixed[tasks != t], single[tasks != t], atol=1e-3)


def test_at_test_the_nearest_key_of_a_task_begun_chooses():
    learner, stream = prompted(DUAL())
    learn(learner, stream, [0, 1])
    learner.eval()
    strategy, view = learner.strategies["method"], all_rows(learner, stream)
    query = queries(learner.backbone, view)
    with torch.no_grad():
        strategy.keys[0].copy_(query[0] - query[1])
        strategy.keys[1].copy_(query[1] - query[0])
        strategy.keys[2].copy_(query.mean(0))  # the nearest by far, of a task to come
        cosine = F.cosine_similarity(query[:, None], torch.stack(tuple(strategy.keys))[None], dim=2)
        nearest = cosine[:, :2].argmax(1)
        assert 0 < int(nearest.sum()) < len(view) and bool((cosine.argmax(1) == 2).any())
        ours = learner(view)
        for t in range(2):
            told = learner(view, torch.full((len(view),), t))
            torch.testing.assert_close(ours[nearest == t], told[nearest == t], rtol=1e-4, atol=1e-5)


def test_rows_are_independent_unless_a_batch_votes():
    learner, stream = prompted(DUAL())
    learn(learner, stream)
    with torch.no_grad():  # keys that divide the rows
        query = queries(learner.backbone, all_rows(learner, stream))
        for t, key in enumerate(learner.strategies["method"].keys):
            key.copy_(query[24 * t] - query.mean(0))
    assert_rows_are_independent(learner, stream)
    learner.strategies["method"].batch_vote = True
    with pytest.raises(AssertionError, match="not close"):
        assert_rows_are_independent(learner, stream)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, partial(torch.optim.AdamW, weight_decay=0.5)])
def test_only_the_present_tasks_prompt_and_key_learn(optimizer):
    learner, stream = prompted(DUAL(), optimizer=partial(optimizer, lr=0.05))
    strategy = learner.strategies["method"]
    for task in stream:
        before = weights(strategy)
        learn(learner, stream, [task.index])
        changed = {name for name, value in weights(strategy).items() if not torch.equal(value, before[name])}
        assert changed == {"general", "known", f"experts.{task.index}", f"keys.{task.index}"}


def test_dualprompt_leaves_the_transformer_and_draws_keys_to_queries():
    learner = assert_backbone_is_frozen(DUAL())
    strategy, stream = learner.strategies["method"], toy_stream(3)
    query = queries(learner.backbone, learner.prepare(stream[1].train.x))
    torch.manual_seed(0)
    fresh = prompted(DUAL())[0].strategies["method"]
    near = [float(F.cosine_similarity(query, s.keys[1].detach()[None]).mean()) for s in (fresh, strategy)]
    assert near[1] > near[0] + 0.1


def test_dualprompt_refuses():
    with pytest.raises(InputError, match=r"dualprompt\.general_length=5 has no half .* make it even"):
        DualPrompt(general_length=5)
    with pytest.raises(InputError, match=r"dualprompt\.expert_blocks=\[2, 3, 4\], but the blocks of ViT are 0 to 2"):
        prompted(DualPrompt())
    with pytest.raises(InputError, match=r"dualprompt\.general_blocks=\[1, 1\]"):
        prompted(DUAL(general_blocks=(1, 1)))
    with pytest.raises(InputError, match="ToyBackbone has no embed and encode: use backbone=vit"):
        prompted(DualPrompt(), backbone=ToyBackbone())


def test_dualprompt_learns_beside_replay_on_a_vit_of_timm():
    stream = Stream(
        [
            Task(t, *(TaskData(part.x.repeat(1, 3, 8, 8), part.y, part.task) for part in (task.train, task.test)))
            for t, task in enumerate(toy_stream(2))
        ],
        num_classes=4,
    )
    torch.manual_seed(0)
    strategies = {"er": ER(20), "method": DualPrompt(4, 4, (0,), (1, 5))}
    learner = Learner(stream, timm_vit(), strategies, partial(torch.optim.Adam, lr=0.01), batch_size=16)
    learn(learner, stream)
    assert learner.tasks_learned == 2


# ------------------------------------------------------------------ CODA-Prompt

CODA = partial(CODAPrompt, num_components=7, length=4, blocks=(0, 2))


def test_worked_example_32():
    query, attention, key = torch.tensor([[1.0, 2.0]]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    assert float(agreement(query, attention, key)) == pytest.approx(0.707107, abs=1e-6)


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))
def test_agreement_is_the_cosine_of_attended_queries(seed, num_rows, num_components, size):
    draw = torch.Generator().manual_seed(seed)
    query, A, K = (
        torch.randn(*shape, generator=draw) for shape in ((num_rows, size), *[(num_components, 3, size)] * 2)
    )
    expected = F.cosine_similarity(query[:, None, None] * A[None], K[None], dim=3, eps=1e-6)
    torch.testing.assert_close(agreement(query, A, K), expected, rtol=1e-4, atol=1e-5)


def test_components_to_come_weigh_nothing_and_have_finite_gradients():
    A, K = (torch.zeros(2, 3, 4, requires_grad=True) for _ in range(2))
    weights = agreement(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), A, K)
    gradients = torch.autograd.grad(weights.sum(), (A, K))
    assert not weights.any() and all(bool(torch.isfinite(g).all()) for g in gradients)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_coda_prompt_on_one_batch_by_hand(scenario):
    learner, stream = prompted(CODA(penalty=0.2), scenario)
    strategy = learner.strategies["method"]
    learn(learner, stream, [0])
    learner.before_task(stream[1])
    batch, logits, loss = one_batch(learner, stream[1])
    assert strategy.components[0].shape == (2, 2, 2, 2, 16), "two components a task, the seventh is nobody's"
    rows = [(t, m) for t in range(2) for m in range(2)]
    features = []
    for view, query in zip(batch.view, queries(learner.backbone, batch.view), strict=True):
        prefixes = {}
        for i, block in enumerate(strategy.blocks):
            prefix = 0.0
            for t, m in rows:
                attended = query * strategy.attention[t][m, i].detach()
                key = strategy.keys[t][m, i].detach()
                alpha = attended @ key / (attended.norm() * key.norm())
                prefix = prefix + alpha * strategy.components[t][m, i].detach()
            prefixes[block] = prefix[None]
        features.append(learner.backbone(view[None], prefixes)[0])
    expected = learner.head(torch.stack(features)).detach()
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-4, atol=1e-5)
    own, penalty = own_classes(scenario, 1), 0.0
    for parts in (strategy.components, strategy.keys, strategy.attention):
        for i in range(2):
            B = torch.stack([parts[t][m, i].detach().flatten() for t, m in rows])
            penalty += float((B @ B.T - torch.eye(4)).square().mean())
    cross_entropy = F.cross_entropy(expected[:, own], batch.y - own.start)
    assert penalty > 1e-3, "trained components are not orthonormal"
    assert float(loss.detach()) == pytest.approx(float(cross_entropy) + 0.2 * penalty, rel=1e-4)


def gram_schmidt(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Of rows one by one, in double precision; the old ones need not be orthogonal."""
    basis: list[torch.Tensor] = []
    for row in torch.cat([old, new]).double():
        for _ in range(2):
            row = row - sum(((row @ u) * u for u in basis), torch.zeros_like(row))
        basis.append(row / row.norm())
    return torch.stack(basis[len(old) :]).to(new.dtype)


def test_new_components_are_gram_schmidts_of_all_before_them():
    learner, stream = prompted(CODA())
    strategy = learner.strategies["method"]
    for task in stream:
        draws = np.random.Generator(np.random.PCG64())
        draws.bit_generator.state = strategy.random.generator.bit_generator.state
        before = copy.deepcopy(strategy)
        learner.before_task(task)
        for name in ("components", "keys", "attention"):
            new = getattr(strategy, name)[task.index].detach()
            draw = torch.from_numpy(draws.standard_normal(new.shape)).to(new)
            for i in range(2):
                old = [part[:, i].flatten(1) for part in getattr(before, name)[: task.index]]
                old = torch.cat(old).detach() if old else torch.zeros(0, new[0, 0].numel())
                mine, theirs = new[:, i].flatten(1), gram_schmidt(old, draw[:, i].flatten(1))
                torch.testing.assert_close((mine * theirs).sum(1).abs(), torch.ones(2), rtol=0, atol=1e-5)
                torch.testing.assert_close(mine @ mine.T, torch.eye(2), rtol=0, atol=1e-5)
                if len(old):
                    assert float((mine @ old.T).abs().max()) < 1e-5
        assert not any(part.any() for part in strategy.components[task.index + 1 :])
        learner.after_task(task)
        learn(learner, stream, [task.index])  # which leaves the components neither orthogonal nor of length 1


def test_the_penalty_vanishes_on_orthonormal_rows_only():
    rows = torch.eye(6)[:4].view(4, 1, 6).expand(4, 3, 6)
    assert float(apart(rows)) == 0
    assert float(apart(2 * rows)) == pytest.approx(3 * 4 * 9 / 16)  # 4 of 16 entries are 3, in each of 3 blocks


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, partial(torch.optim.AdamW, weight_decay=0.5)])
def test_only_the_present_tasks_components_learn(optimizer):
    learner, stream = prompted(CODA(), optimizer=partial(optimizer, lr=0.05))
    strategy = learner.strategies["method"]
    for task in stream:
        before = weights(strategy)
        learn(learner, stream, [task.index])
        after = {name: v for name, v in weights(strategy).items() if isinstance(v, torch.Tensor)}
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed - {"random._extra_state"} == {
            f"{part}.{task.index}" for part in ("components", "keys", "attention")
        }


def test_coda_prompt_leaves_the_transformer_and_rows_are_independent():
    learner = assert_backbone_is_frozen(CODA())
    assert_rows_are_independent(learner, toy_stream(3))


def test_coda_prompt_refuses():
    with pytest.raises(InputError, match=r"coda_prompt\.length=3 has no half .* make it even"):
        CODAPrompt(length=3)
    for count in (2, 17):
        with pytest.raises(InputError, match=rf"coda_prompt\.num_components={count} must be from 3, .* to 16"):
            prompted(CODA(num_components=count))
    with pytest.raises(InputError, match=r"coda_prompt\.blocks=\[0, 3\], but the blocks of ViT are 0 to 2"):
        prompted(CODA(blocks=(0, 3)))
    with pytest.raises(InputError, match="ToyBackbone has no embed and encode: use backbone=vit"):
        prompted(CODA(), backbone=ToyBackbone())


# ------------------------------------------------------------------ S-Prompts


def domains(num_rows: int = 48) -> Stream:
    """The same two classes in three domains that look different, the labels of the second exchanged."""
    draw = torch.Generator().manual_seed(0)
    tasks = []
    for t in range(3):
        place = torch.randn(1, 4, 4, generator=draw) * 2
        parts = []
        for n in (num_rows, 24):
            y = torch.arange(n) % 2
            sign = (2 * y - 1) * (-1 if t == 1 else 1)
            x = place + sign[:, None, None, None] * 0.7 + torch.randn(n, 1, 4, 4, generator=draw) * 0.3
            parts.append(TaskData(x, y, t))
        tasks.append(Task(t, train=parts[0], test=parts[1]))
    return Stream(tasks, scenario="domain", num_classes=2)


def s_prompts_learner(stream: Stream, strategy: Strategy, backbone=None, optimizer=None) -> Learner:
    torch.manual_seed(0)
    optimizer = optimizer or partial(torch.optim.SGD, lr=0.01)
    return Learner(stream, backbone or transformer(), {"method": strategy}, optimizer, batch_size=8)


def test_worked_example_34():
    f, centres = torch.tensor([[1.2, -0.1]]), torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]])
    torch.testing.assert_close(distances(f, centres, 1), torch.tensor([[1.3, 1.3]]), rtol=0, atol=1e-5)
    torch.testing.assert_close(distances(f, centres, 2), torch.tensor([[1.20416, 1.11803]]), rtol=0, atol=1e-5)


@quick
@given(seeds, st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1.0, 2.0]))
def test_distances_are_those_written_out(seed, num_rows, num_domains, num_centres, norm):
    draw = torch.Generator().manual_seed(seed)
    f, centres = torch.randn(num_rows, 5, generator=draw), torch.randn(num_domains, num_centres, 5, generator=draw)
    difference = (f[:, None, None] - centres[None]).abs()
    expected = (difference**norm).sum(3) ** (1 / norm)
    torch.testing.assert_close(distances(f, centres, norm), expected.amin(2), rtol=1e-4, atol=1e-5)


def test_centres_are_k_means_of_unit_length_features_without_prompts():
    from sklearn.cluster import KMeans

    stream = domains()
    strategy = SPrompts(length=3, num_centres=2)
    learner = learn(s_prompts_learner(stream, strategy), stream)
    for task in stream:
        features = F.normalize(queries(learner.backbone, learner.prepare(task.train.x)), dim=1).numpy()
        theirs = KMeans(2, n_init=20, random_state=0).fit(features).cluster_centers_
        ours = strategy.centres[task.index].numpy()
        gaps = np.abs(ours[:, None] - theirs[None]).max(2).min(1)
        assert gaps.max() < 1e-3, "two clear clusters, a class each"


def test_fewer_examples_than_centres_fill_the_rest_with_themselves():
    stream, strategy = domains(num_rows=3), SPrompts(num_centres=5)
    learner = s_prompts_learner(stream, strategy)
    learner.before_task(stream[0])
    rows = F.normalize(queries(learner.backbone, learner.prepare(stream[0].train.x)), dim=1)
    assert float(torch.cdist(strategy.centres[0], rows).min(1).values.max()) < 1e-5


@pytest.mark.parametrize("make", [transformer, timm_vit], ids=["vit", "timm"])
def test_s_prompts_predicts_by_the_nearest_domains_prompts_and_head(make):
    stream = domains()
    if make is timm_vit:
        parts = [[TaskData(part.x.repeat(1, 3, 8, 8), part.y, part.task) for part in (t.train, t.test)] for t in stream]
        stream = Stream([Task(t, *part) for t, part in enumerate(parts)], scenario="domain", num_classes=2)
    strategy = SPrompts(length=3, num_centres=2, norm=2.0)
    learner = learn(s_prompts_learner(stream, strategy, make()), stream).eval()
    view = all_rows(learner, stream)
    with torch.no_grad():
        query = F.normalize(queries(learner.backbone, view), dim=1)
        expected, chosen = [], []
        for row, q in zip(view, query, strict=True):
            t = min(range(3), key=lambda t: min(float((q - c).norm()) for c in strategy.centres[t]))
            embedded = learner.backbone.embed(row[None])
            tokens = torch.cat([embedded[:, :1], strategy.prompts[t][None], embedded[:, 1:]], dim=1)
            expected.append(strategy.heads[t](learner.backbone.encode(tokens)[:, 0])[0])
            chosen.append(t)
        ours = learner(view)
    assert set(chosen) == {0, 1, 2}
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert_rows_are_independent(learner, stream)


def test_s_prompts_on_one_batch_by_hand_and_replay_teaches_nothing():
    learner, stream = prompted(SPrompts(length=3), "domain")
    strategy = learner.strategies["method"]
    learn(learner, stream, [0])
    learner.before_task(stream[1])
    batch, logits, loss = one_batch(learner, stream[1])
    features = [
        learner.backbone.encode(torch.cat([learner.backbone.embed(row[None]), strategy.prompts[1][None]], dim=1))[0, 0]
        for row in batch.view
    ]
    torch.testing.assert_close(logits, strategy.heads[1](torch.stack(features)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.y))
    x, y, label = (column[5:8] for column in stream[0].train.tensors())
    both = batch.append(Batch(x, y, label))
    both.view = learner.prepare(both.x)
    logits = learner(both.view, both.task)
    torch.testing.assert_close(strategy.criterion(learner, both, logits), loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_domains_are_learned_independently(decay):
    """Prompts and head of a domain are those of learning it alone; the others stay as they are, to the bit."""
    stream, optimizer = domains(), partial(torch.optim.SGD, lr=0.01, weight_decay=decay)
    learner = s_prompts_learner(stream, SPrompts(length=3), optimizer=optimizer)
    strategy = learner.strategies["method"]
    for task in stream:
        before = weights(strategy)
        learn(learner, stream, [task.index])
        for name, value in weights(strategy).items():
            if isinstance(value, torch.Tensor) and name.startswith(("prompts", "heads")):
                assert torch.equal(value, before[name]) == (f".{task.index}" not in name.replace("weight", "")), name
    alone = s_prompts_learner(stream, SPrompts(length=3), optimizer=optimizer)
    learn(alone, stream, [2])
    assert torch.equal(alone.strategies["method"].prompts[2], strategy.prompts[2])
    assert same(weights(alone.strategies["method"].heads[2]), weights(strategy.heads[2]))


def test_s_prompts_learns_domains_that_contradict_each_other_and_forgets_none():
    stream, strategy = domains(), SPrompts(length=3)
    learner = s_prompts_learner(stream, strategy, optimizer=partial(torch.optim.Adam, lr=0.01))
    R = Experiment(learner, stream, trainer, epochs=20).run().matrices["domain"].R
    assert bool((R.diagonal(-1) > 0.9).all()), R
    for t in range(3):
        assert bool((R[t + 1 :, t] == R[t + 1, t]).all()), R


def test_in_the_midst_of_a_domain_its_rows_are_predicted_by_the_head_in_training():
    stream = domains()
    learner = s_prompts_learner(stream, SPrompts(length=3))
    learn(learner, stream, [0])
    learner.before_task(stream[1])
    learner.eval()
    head = learner.strategies["method"].heads[1]
    nn.init.constant_(head.bias, 7.0)
    nn.init.zeros_(head.weight)
    assert bool((learner(learner.prepare(stream[1].test.x)) == 7).all())
    assert not bool((learner(learner.prepare(stream[0].test.x)) == 7).any())
    learner.strategies["method"].centres[0] += 9.0  # farther than the centres of the domain to come, which are 0
    learner.strategies["method"].centres[1] += 8.0
    assert bool((learner(learner.prepare(stream[0].test.x)) == 7).all())


def test_classes_of_other_tasks_stand_below_those_of_the_one_told():
    learner, stream = prompted(SPrompts(length=2, num_centres=2), "class")
    learn(learner, stream)
    out = learner.eval()(all_rows(learner, stream)).detach()
    assert bool(torch.isfinite(out).all())
    task = out.argmax(1) // 2
    for row, t in zip(out, task.tolist(), strict=True):
        others = [c for c in range(6) if c // 2 != t]
        own = row[2 * t : 2 * t + 2]
        torch.testing.assert_close(row[others], (own.min() - 1).expand(4))


def test_where_task_labels_are_given_no_domain_is_told_from_centres():
    learner, stream = prompted(SPrompts(length=2), "task")
    learn(learner, stream)
    learner.strategies["method"].centres.zero_()
    batch = Batch(*TaskData.concat([task.test for task in stream]).tensors())
    out = learner.eval().predict(batch).detach()
    assert bool((out.argmax(1) // 2 == batch.task).all())
    untold = learner(learner.prepare(batch.x)).detach()
    assert bool((untold.argmax(1) // 2 == 0).all()), "all centres are as far"


def test_s_prompts_leaves_the_transformer_and_refuses_other_backbones():
    assert_backbone_is_frozen(SPrompts(length=2), "domain", optimizer=partial(torch.optim.SGD, lr=0.05))
    with pytest.raises(InputError, match=r"s_prompts puts prompts .* ToyBackbone has no embed and encode"):
        prompted(SPrompts(), backbone=ToyBackbone())
    with pytest.raises(InputError, match=r"s_prompts\.norm=0\.5 must be 1 or more"):
        SPrompts(norm=0.5)


# ------------------------------------------------------------------ the recipe, and the rows that start from it

ROWS = sorted(path.stem for path in (CONF / "experiment").glob("cifar100_vit_*.yaml") if "pretrain" not in path.stem)


def run(folder: Path, *overrides: str) -> Learner:
    with initialize_config_module("cl.conf", version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, "report=quiet", "logger=none", "epochs=1"])
    folder.mkdir()
    experiment = build_experiment(cfg, folder)
    experiment.run()
    return experiment.learner


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of images of 54 classes, and the checkpoint that the recipe makes on the first 50."""
    from PIL import Image

    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for c in range(54):
        for part, count in (("train", 2), ("test", 1)):
            place = root / part / f"class_{c:02d}"
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{i}.png")
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    run(folder, "experiment=cifar100_vit_pretrain", f"dataset.root={root}")
    return root, folder / "checkpoints" / "after_task_001.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_every_row_starts_from_the_weights_that_the_recipe_makes(row, pretrained, tmp_path):
    root, checkpoint = pretrained
    small = ["stream.num_tasks=2", "stream.classes=[50,51,52,53]"]
    small += ["strategy.ranpac.num_projections=50"] * row.endswith("ranpac")
    learner = run(tmp_path / "run", f"experiment={row}", f"dataset.root={root}", f"weights={checkpoint}", *small)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    kept = all(torch.equal(w, saved[f"backbone.{name}"]) for name, w in learner.backbone.state_dict().items())
    assert learner.tasks_learned == 2 and kept == (row not in ("cifar100_vit_finetune", "cifar100_vit_joint"))


def test_no_weights_are_kept_among_the_sources():
    """A checkpoint lies where the recipe's command puts it, in runs/, which git ignores."""
    recipe = (CONF / "experiment" / "cifar100_vit_pretrain.yaml").read_text()
    assert "hydra.run.dir=runs/" in recipe and "/runs/" in (CONF.parent / ".gitignore").read_text().split()
    for folder in ("cl", "strategies", "streams", "conf", "tests", "benchmarks"):
        found = [p for end in ("ckpt", "pt", "pth", "safetensors") for p in (CONF.parent / folder).rglob(f"*.{end}")]
        assert not found
