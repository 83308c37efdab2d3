"""Continual backprop: which units are replaced, when, and that outputs do not notice; dormant units."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from cl.backbones.networks import MLP, ResNet18, SimpleCNN
from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.random import Random
from cl.strategies.cbp import CBP
from cl.testing import toy_stream
from cl.toolkit.layers import trainable_layers
from cl.toolkit.units import activities, outgoing, start_anew
from toys import Identity, build, float_stream, learn, toy, vector


def test_without_a_rate_it_is_finetuning_to_the_bit():
    assert torch.equal(vector(toy(CBP(rate=0.0), range(3))[0]), vector(toy(None, range(3))[0]))


@pytest.mark.parametrize("make", [MLP, SimpleCNN])
def test_a_new_unit_changes_no_output_whatever_its_incoming_weights(make):
    torch.manual_seed(0)
    body = make((1, 4, 4), [6, 5] if make is MLP else (6, 5))
    net, x, random = nn.Sequential(body, nn.Linear(body.num_features, 3)), torch.randn(7, 1, 4, 4), Random()
    layers = trainable_layers(net)
    for layer, following in pairwise(layers):
        rest = [p.clone() for p in (layer.weight, following.weight)]
        units = torch.tensor([4, 1])
        start_anew(layer, following, units, random)
        before = net(x)
        start_anew(layer, following, units, random)
        torch.testing.assert_close(net(x), before, rtol=0, atol=0)
        assert not torch.equal(layer.weight[units], rest[0][units]) and (layer.bias[units] == 0).all()
        bound = (6 / layer.weight[0].numel()) ** 0.5
        assert bound / 2 < float(layer.weight[units].detach().abs().max()) <= bound
        others = [i for i in range(len(layer.weight)) if i not in (1, 4)]
        assert torch.equal(layer.weight[others], rest[0][others])
        taken = outgoing(following, len(layer.weight))
        assert (taken[units] == 0).all() and (taken[others] > 0).all()
        before_all = rest[1].abs().reshape(len(following.weight), len(layer.weight), -1).sum((0, 2))
        torch.testing.assert_close(taken[others], before_all[others])


def test_activities_are_means_over_examples_and_positions():
    torch.manual_seed(0)
    body, x = SimpleCNN((1, 8, 8), (3, 2), 4), torch.randn(5, 1, 8, 8)
    layers = trainable_layers(body)
    found = activities(layers, lambda: body(x))
    first = nn.Sequential(*list(body)[:3])(x)
    second = nn.Sequential(*list(body)[3:6])(first)
    for ours, h in zip(found, (first, second), strict=True):
        torch.testing.assert_close(ours, h.abs().mean((0, 2, 3)))
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_it_replaces_what_the_loop_written_by_hand_replaces():
    """Eight steps by hand on units of the first layer of the toy, whose weights stay where they are (rate 0)."""
    eta, m, rho = 0.9, 2, 0.05
    learner, stream = toy(CBP(rho, eta, m))
    method, layers = learner.strategies["method"], trainable_layers(learner.trunk())
    learner.record = lambda name, value: None
    utility, age, due = [0.0] * 16, [0] * 16, 0.0
    x, y, task = stream[0].train.tensors()
    for step in range(8):
        batch = Batch(x[step : step + 3], y[step : step + 3], task[step : step + 3])
        batch.view = learner.prepare(batch.x)
        weight, after = layers[0].weight.detach().clone(), layers[1].weight.detach().clone()
        method.after_step(learner, batch, None)
        h = (batch.view.flatten(1) @ weight.T).relu()
        for i in range(16):
            age[i] += 1
            contribution = float(h[:, i].mean()) * float(after[:, i].abs().sum())
            utility[i] = eta * utility[i] + (1 - eta) * contribution
        mature = [i for i in range(16) if age[i] > m]
        due += rho * len(mature)
        expected = []
        while due >= 1:
            lowest = min((i for i in mature if i not in expected), key=lambda i: utility[i] / (1 - eta ** age[i]))
            expected.append(lowest)
            due -= 1
        changed = (layers[0].weight != weight).any(1).nonzero().flatten().tolist()
        assert changed == sorted(expected)
        for i in expected:
            utility[i], age[i] = 0.0, 0
        torch.testing.assert_close(method.utility_0, torch.tensor(utility), rtol=1e-4, atol=1e-6)
        assert method.age_0.tolist() == age
        assert float(method.due[0]) == pytest.approx(due, abs=1e-5)
    assert min(age) < 8, "some were replaced"


def test_no_unit_is_replaced_before_it_is_mature():
    one, other = (toy(CBP(rate=1.0, maturity=m), [0])[0] for m in (5, 6))  # six steps in a task
    plain = vector(toy(None, [0])[0])
    assert torch.equal(vector(other), plain) and not torch.equal(vector(one), plain)


def test_it_refuses_shortcuts_and_networks_without_hidden_units():
    x, y = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(InputError, match="no trainable hidden layer: add one"):
        build(float_stream([x], [y]), Identity(3), CBP())
    image = float_stream([torch.rand(4, 3, 8, 8)], [y])
    with pytest.raises(InputError, match="such as a shortcut around"):
        build(image, ResNet18((3, 8, 8), width=2), CBP())
    build(image, MLP((3, 8, 8), [4, 4], norm=True), CBP())


def test_it_learns_with_a_replay_and_counts_what_it_replaced():
    stream = toy_stream(2)
    torch.manual_seed(0)
    learner = Learner(stream, MLP((1, 4, 4), [20]), {"cbp": CBP(0.1, 0.9, 2)}, partial(torch.optim.SGD, lr=0.1))
    learn(learner, stream, epochs=4)
    assert (learner.strategies["cbp"].age_0 < 8).any()
