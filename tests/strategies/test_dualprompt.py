"""DualPrompt: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl.backbones.vit import Timm
from cl.data.task import SCENARIOS, Stream, Task, TaskData
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies.dualprompt import DualPrompt
from cl.strategies.er import ER
from cl.testing import ToyBackbone, toy_stream
from prompted import (
    all_rows,
    assert_backbone_is_frozen,
    assert_rows_are_independent,
    assert_rows_take_the_part_of_their_task,
    one_batch,
    own_classes,
    prompted,
    queries,
    timm_vit,
    transformer,
)
from toys import learn, weights


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
    assert_rows_take_the_part_of_their_task(learner, stream)


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
