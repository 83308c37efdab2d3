"""The Fisher information: closed forms, gradients taken one by one, and networks that see batches."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from cl.backbones.vit import ViT
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.random import Random
from cl.strategies.ewc import EWC
from cl.strategies.mas import MAS
from cl.strategies.ogd import OGD
from cl.strategies.online_ewc import OnlineEWC
from cl.testing import ToyBackbone, toy_stream
from cl.toolkit.fisher import diagonal_fisher, label_weights
from logistic import closed_form, problem
from toys import learn


@pytest.mark.parametrize("held", [1, 200, 10**9])
def test_fisher_does_not_depend_on_how_much_is_held_at_once(held, monkeypatch):
    monkeypatch.setattr("cl.toolkit.fisher._HELD_AT_ONCE", held)
    x, y, weight, bias = problem(1, 20, 3, 4)
    head = nn.Linear(3, 4)
    head.load_state_dict({"weight": weight, "bias": bias})
    new = diagonal_fisher(head, x, torch.arange(4))
    torch.testing.assert_close(new, closed_form(x, y, weight, bias, "true"), rtol=1e-4, atol=1e-6)


class OneWeight(nn.Module):
    """Logits (0, w x) with p(1 | x = 2) = 3/4."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(math.log(3) / 2))

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), self.w * x], 1)


def test_worked_example_15():
    x, classes = torch.tensor([[2.0]]), torch.tensor([0, 1])
    labels = {"y=0": torch.tensor([[1.0, 0.0]]), "y=1": torch.tensor([[0.0, 1.0]])}
    assert float(diagonal_fisher(OneWeight(), x, classes)) == pytest.approx(0.75)
    assert float(diagonal_fisher(OneWeight(), x, classes, labels["y=1"])) == pytest.approx(0.25)
    assert float(diagonal_fisher(OneWeight(), x, classes, labels["y=0"])) == pytest.approx(2.25)
    pair = diagonal_fisher(OneWeight(), x.repeat(2, 1), classes, torch.cat([labels["y=1"], labels["y=0"]]))
    assert float(pair) == pytest.approx(1.25), "single examples; the square of the batch's mean gradient is 0.25"


def test_fisher_of_a_transformer_is_that_of_gradients_taken_one_by_one():
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(ViT((1, 4, 4), patch_size=2, dim=8, depth=1, heads=2), nn.Linear(8, 3)),
        torch.randn(5, 1, 4, 4),
    )
    expected = 0.0
    for one in x:
        log_p = net(one[None])[0].log_softmax(0)
        for p in log_p:
            gradient = torch.autograd.grad(p, list(net.parameters()), retain_graph=True)
            expected += p.exp().detach() / 5 * torch.cat([g.flatten() for g in gradient]) ** 2
    torch.testing.assert_close(diagonal_fisher(net, x, torch.arange(3)), expected, rtol=1e-3, atol=1e-6)


class BatchNormed(ToyBackbone):
    def __init__(self) -> None:
        super().__init__()
        self.layers.append(nn.BatchNorm1d(self.num_features, track_running_stats=False))


@pytest.mark.parametrize("strategy", [EWC, OnlineEWC, MAS, OGD])
def test_gradients_of_single_examples_of_a_network_that_sees_batches_are_refused(strategy: type[Strategy]) -> None:
    with pytest.raises(InputError, match="by the rest of its batch: "):
        Learner(toy_stream(), BatchNormed(), {"method": strategy()}, partial(torch.optim.SGD, lr=0.1))


@pytest.mark.parametrize("strategy", [EWC, OnlineEWC])
def test_the_fisher_of_batches_takes_such_a_network(strategy: type[Strategy]) -> None:
    method = strategy(batch_size=8, fisher="empirical")
    learner = Learner(toy_stream(), BatchNormed(), {"method": method}, partial(torch.optim.SGD, lr=0.1), batch_size=8)
    learn(learner, toy_stream(), [0])
    assert (
        sum(float(buffer.sum()) for name, buffer in method.named_buffers() if name in ("importance", "precision")) > 0
    )


@pytest.mark.parametrize("kind", ["true", "sampled"])
def test_the_models_own_labels_do_not_depend_on_how_many_rows_pass_at_once(kind: str) -> None:
    torch.manual_seed(0)
    net, x, classes = nn.Linear(3, 4), torch.randn(600, 3), torch.tensor([0, 2, 3])
    found = label_weights(kind, net, x, torch.zeros(600, dtype=torch.long), classes, Random())
    p = net(x)[:, classes].softmax(1).detach()
    if found is None:
        whole = diagonal_fisher(net, x, classes)
        parts = [diagonal_fisher(net, part, classes) * len(part) / 600 for part in x.split(100)]
        torch.testing.assert_close(whole, torch.stack(parts).sum(0))
    else:
        counts = found.sum(0) / 600
        assert (counts - p.mean(0)).abs().max() < 4 * (0.25 / 600) ** 0.5, "four standard errors"
