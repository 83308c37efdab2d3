"""Learning to Prompt: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl.data.task import SCENARIOS, Stream, TaskData
from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies.l2p import L2P
from cl.testing import toy_stream
from toys import build, learn, queries, same, toy


class Transformer(nn.Module):
    """Two tokens of a linear embedding behind a class token, and one attention layer with dropout."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cls = nn.Linear(8, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)

    def embed(self, x):
        tokens = self.embedding(x.flatten(1).view(len(x), 2, 8))
        return torch.cat([self.cls.expand(len(x), 1, 8), tokens], 1)

    def encode(self, tokens):
        return self.block(tokens)

    def forward(self, x):
        return self.encode(self.embed(x))[:, 0]


def l2p_learner(scenario="class", **options) -> tuple[Learner, Stream, L2P]:
    torch.manual_seed(0)
    stream = toy_stream(3, scenario)
    learner = build(stream, Transformer(), L2P(**{"pool_size": 6, "length": 2, "top_k": 3, **options}))
    return learner, stream, learner.strategies["method"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_l2p_on_one_batch_by_hand(scenario):
    learner, stream, strategy = l2p_learner(scenario, pull=0.3)
    for learned in stream[:2]:
        learner.before_task(learned)
    x, y, task = (column[:5] for column in stream[1].train.tensors())
    view = learner.prepare(x)
    batch = Batch(x, y, task, view=view)
    logits = learner(view)
    loss = strategy.criterion(learner, batch, logits).detach()
    query, features, pull = queries(learner, view), [], 0.0
    keys, prompts = strategy.keys.detach(), strategy.prompts.detach()
    for i in range(5):
        cosines = [float(query[i] @ k / (query[i].norm() * k.norm())) for k in keys]
        chosen = sorted(range(6), key=lambda k: -cosines[k])[:3]
        pull += sum(cosines[k] for k in chosen) / 5
        tokens = torch.cat([*(prompts[k] for k in chosen), learner.backbone.embed(view[i : i + 1])[0]])
        features.append(learner.backbone.encode(tokens[None])[0, : 3 * 2].mean(0))
    expected_logits = learner.head(torch.stack(features)).detach()
    torch.testing.assert_close(logits.detach(), expected_logits, rtol=1e-4, atol=1e-5)
    own = slice(0, 2) if scenario == "domain" else slice(2, 4)
    cross_entropy = F.cross_entropy(expected_logits[:, own], y - own.start)
    assert float(loss) == pytest.approx(float(cross_entropy) - 0.3 * pull, rel=1e-4)


def test_only_chosen_keys_are_pulled_towards_their_queries():
    learner, stream, strategy = l2p_learner(pool_size=20, top_k=2)
    view = learner.prepare(stream[0].train.x[:3])
    learner(view)
    cosines = F.cosine_similarity(queries(learner, view)[:, None], strategy.keys[None], dim=2)
    chosen = set(cosines.topk(2, dim=1).indices.flatten().tolist())
    (grad,) = torch.autograd.grad(-strategy._pulled, strategy.keys)
    assert {k for k in range(20) if grad[k].abs().sum() > 0} == chosen and len(chosen) < 20
    before = float(strategy._pulled.detach())
    with torch.no_grad():
        strategy.keys -= 1e-2 * grad
    learner(view)
    assert float(strategy._pulled.detach()) > before


def test_the_frozen_transformer_stays_to_the_bit_and_prompts_learn():
    learner, stream, strategy = l2p_learner()
    before = {name: tensor.clone() for name, tensor in learner.backbone.state_dict().items()}
    prompts, keys = strategy.prompts.detach().clone(), strategy.keys.detach().clone()
    learn(learner, stream, epochs=2)
    assert same(learner.backbone.state_dict(), before)
    assert not torch.equal(strategy.prompts, prompts) and not torch.equal(strategy.keys, keys)
    trained = {id(p) for group in learner.optimizers().param_groups for p in group["params"]}
    assert not trained & {id(p) for p in learner.backbone.parameters()}


def test_a_prediction_of_l2p_does_not_depend_on_its_batch():
    learner, stream, _ = l2p_learner()
    learn(learner, stream, [0])
    learner.train()  # which would switch the transformer's dropout on
    view = learner.prepare(TaskData.concat([t.test for t in stream]).x)
    with torch.no_grad():
        together = learner(view)
        alone = torch.cat([learner(row[None]) for row in view])
        order = torch.randperm(len(view), generator=torch.Generator().manual_seed(0))
        shuffled = learner(view[order])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[order], shuffled, rtol=1e-4, atol=1e-5)


def test_l2p_refuses_other_networks_and_pools_too_small():
    with pytest.raises(InputError, match="ToyBackbone has no embed and encode: use backbone=vit"):
        toy(L2P())
    with pytest.raises(InputError, match=r"l2p\.top_k=11 must lie between 1 and pool_size=10"):
        L2P(top_k=11)
    with pytest.raises(InputError, match=r"l2p\.top_k=0"):
        L2P(top_k=0)
