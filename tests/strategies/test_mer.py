"""MER: it is replay when nothing is taken back, and Reptile written by hand when something is."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from by_hand import Reservoir, by_hand, close
from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.random import derive
from cl.strategies.er import ER
from cl.strategies.mer import MER
from cl.testing import ToyBackbone, toy_learner, toy_stream
from toys import learn, toy, vector


@pytest.mark.parametrize("updates", [1, 3])
def test_with_beta_and_gamma_1_it_is_plain_replay_with_s_steps(updates):
    one, other = (
        toy(method, range(3), updates_per_batch=updates)[0] for method in (MER(20, beta=1.0, gamma=1.0), ER(20))
    )
    assert torch.equal(vector(one), vector(other))


def test_one_plain_step_is_scaled_by_beta_and_gamma():
    found = [
        vector(toy(method, range(3), lr=lr)[0])
        for method, lr in ((MER(20, beta=0.5, gamma=0.25), 0.8), (MER(20, beta=1.0, gamma=1.0), 0.1))
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_mer_is_the_loop_written_by_hand():
    """Two tasks, three updates on each minibatch, with momentum, which makes beta more than a factor of the rate."""
    s, beta, gamma = 3, 0.6, 0.7
    torch.manual_seed(0)
    net = nn.Sequential(ToyBackbone(), nn.Linear(16, 4))
    weights = list(net.parameters())
    memory = Reservoir(12, derive(0, "method", "memory.random"))
    for task in toy_stream(2):
        optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.5)
        x, y, _ = task.train.tensors()
        for epoch in range(2):
            order = np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch)).permutation(len(y))
            for rows in order.reshape(-1, 8):
                first = [w.detach().clone() for w in weights]
                for _ in range(s):
                    before = [w.detach().clone() for w in weights]
                    bx, by = x[rows].float() / 255, y[rows]
                    if memory.rows:
                        old = memory.some(5)
                        bx, by = torch.cat([bx, old[0]]), torch.cat([by, old[1]])
                    optimizer.zero_grad()
                    F.cross_entropy(net(bx)[:, : 2 * task.index + 2], by).backward()
                    optimizer.step()
                    for w, b in zip(weights, before, strict=True):
                        w.data.copy_(b + beta * (w.data - b))
                for w, b in zip(weights, first, strict=True):
                    w.data.copy_(b + gamma * (w.data - b))
                if epoch == 0:
                    for row in zip(x[rows].float() / 255, y[rows], strict=True):
                        memory.add(row)
    stream, method = toy_stream(2), MER(12, 5, beta, gamma)
    torch.manual_seed(0)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.5)
    learner = Learner(stream, ToyBackbone(), {"method": method}, sgd, batch_size=8, updates_per_batch=s)
    close(learn(learner, stream, epochs=2), net)
    assert method._start == method._first == [], "nothing is left to take back between minibatches"


def test_a_step_without_examples_of_its_own_is_taken_back_too():
    """A process whose last minibatch is empty gets no after_step; the end of the epoch takes the step back."""
    learner, stream = toy_learner({"method": MER(20, beta=0.5, gamma=1.0)})
    method, before = learner.strategies["method"], vector(learner)
    method.extend_batch(learner, Batch(*stream[0].train.tensors()).take(slice(4)))
    with torch.no_grad():
        for w in learner.parameters():
            w.add_(1.0)
    method.after_epoch(learner, stream[0], 0)
    torch.testing.assert_close(vector(learner), before + 0.5)
    method.after_epoch(learner, stream[0], 0)
    torch.testing.assert_close(vector(learner), before + 0.5)


def test_by_default_the_reservoir_is_that_of_replay():
    def loss_of(net, x, y, memory, seen):
        logits = net(x)
        if memory.rows:
            old = memory.some(8)
            return F.cross_entropy(net(torch.cat([x, old[0]]))[:, :seen], torch.cat([y, old[1]])), logits
        return F.cross_entropy(logits[:, :seen], y), logits

    close(toy(MER(12, beta=1.0, gamma=1.0), range(3), epochs=2)[0], by_hand(loss_of))


def test_mer_refuses_to_stand_still():
    with pytest.raises(InputError, match=r"mer\.beta=0"):
        MER(beta=0)
    with pytest.raises(InputError, match=r"mer\.gamma=1\.5"):
        MER(gamma=1.5)
