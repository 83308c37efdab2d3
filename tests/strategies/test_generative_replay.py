"""Generative replay: the loss term by term, the mixture that the generator learns, and the generator itself."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import distributions as d

from cl.engine.batch import Batch
from cl.errors import InputError
from cl.random import Random
from cl.strategies.generative_replay import GenerativeReplay
from cl.toolkit.vae import VAE
from toys import toy, vector

Small = partial(GenerativeReplay, hidden=8, code=3, iterations=5, generator_batch=6)


def test_the_loss_of_the_autoencoder_is_its_evidence_bound():
    """-log p(x|z) + KL(q(z|x) | p(z)), by torch.distributions, less the constant of the Gaussian."""
    torch.manual_seed(0)
    vae, x, noise = VAE((2, 3), hidden=5, code=2), torch.randn(4, 2, 3), torch.randn(4, 2)
    with torch.no_grad():
        mean, log_v = vae.encoder(x.flatten(1)).chunk(2, dim=1)
        q = d.Independent(d.Normal(mean, (log_v / 2).exp()), 1)
        prior = d.Independent(d.Normal(torch.zeros(4, 2), torch.ones(4, 2)), 1)
        p = d.Independent(d.Normal(vae.decode(mean + (log_v / 2).exp() * noise), 1.0), 2)
        expected = -p.log_prob(x) - 6 / 2 * np.log(2 * np.pi) + d.kl_divergence(q, prior)
        torch.testing.assert_close(vae.loss(x, noise), expected)


def test_the_autoencoder_learns_the_mean_of_what_it_is_shown():
    """Without use of the code, the best decoder draws the weighted mean: 3/4 of 1 and 1/4 of -1."""
    torch.manual_seed(0)
    vae, random = VAE((1,), hidden=16, code=1), Random()
    x, weight = torch.tensor([[1.0], [-1.0]]).repeat(8, 1), torch.tensor([0.75, 0.25]).repeat(8) / 8
    vae.fit(((x, weight) for _ in range(400)), 1e-2, random)
    assert float(vae.sample(2000, random).mean()) == pytest.approx(0.5, abs=0.15)
    assert not any(p.requires_grad or p.grad is not None for p in vae.parameters()), "the learner does not train it"


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_loss_term_by_term(labels):
    learner, stream = toy(Small(labels, temperature=3.0), range(2))
    method = learner.strategies["method"]
    learner.before_task(stream[2])
    teacher = {name: value.clone() for name, value in learner.trunk().state_dict().items()}
    with torch.no_grad():
        learner.head.weight.mul_(-2)  # as if it had been trained
        batch = Batch(*stream[2].train.tensors()).take(slice(5))
        logits = learner(learner.prepare(batch.x), batch.task)
        first = float(method.criterion(learner, batch, logits))
        assert first == pytest.approx(float(F.cross_entropy(logits, batch.y)) / 3)
        draws = Random()
        draws.load_state_dict(method.random.state_dict())
        second = float(method.loss(learner, batch, logits))
        x = method.generator.sample(5, draws)
        again = learner.head(learner.backbone(x))
        learner.trunk().load_state_dict(teacher)
        taught = learner.head(learner.backbone(x))[:, :4]
        if labels == "hard":
            expected = F.cross_entropy(again, taught.argmax(1))
        else:
            p = (taught / 3).softmax(1)
            expected = 9 * -(p * (again / 3).log_softmax(1)[:, :4]).sum(1).mean()
    assert second == pytest.approx(2 / 3 * float(expected), rel=1e-4)


def test_the_generator_is_shown_a_share_of_each_task():
    """In the third task r = 1/3: rows of the task, and rows that the generator before draws."""
    learner, stream = toy(Small(), range(2))
    method, drawn = learner.strategies["method"], torch.full((6, 1, 4, 4), 7.0)

    class Before:
        def sample(self, n, random):
            return drawn[:n]

    parts = list(method._inputs(learner, stream[2], Before()))
    rows = {row.numpy().tobytes() for row in learner.prepare(stream[2].train.tensors()[0])}
    assert len(parts) == 5
    for x, weight in parts:
        assert {row.numpy().tobytes() for row in x[:6]} <= rows and torch.equal(x[6:], drawn)
        torch.testing.assert_close(weight, torch.tensor([1 / 3 / 6] * 6 + [2 / 3 / 6] * 6))
    learner.tasks_learned = 0
    x, weight = next(method._inputs(learner, stream[0], Before()))
    assert len(x) == 6 and float(weight.sum()) == pytest.approx(1), "there is nothing to draw in the first task"


def test_the_learners_optimizer_leaves_the_generator_alone_and_the_first_task_is_finetuning():
    learner, _ = toy(Small())
    before = {name: p.clone() for name, p in learner.strategies["method"].generator.named_parameters()}
    assert not any(p.requires_grad for p in learner.strategies["method"].parameters())
    one, other = toy(Small(), [0])[0], toy(None, [0])[0]
    assert torch.equal(vector(one), vector(other))
    after = dict(one.strategies["method"].generator.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_it_refuses_labels_that_it_does_not_know():
    with pytest.raises(InputError, match="kind of labels"):
        GenerativeReplay(labels="medium")
