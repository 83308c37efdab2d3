"""CODA-Prompt: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cl.data.task import SCENARIOS
from cl.errors import InputError
from cl.strategies.coda_prompt import CODAPrompt, agreement, apart
from cl.testing import ToyBackbone, toy_stream
from draws import quick, seeds
from prompted import assert_backbone_is_frozen, assert_rows_are_independent, one_batch, own_classes, prompted, queries
from toys import learn, weights

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
