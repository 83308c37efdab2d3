"""Elastic Weight Consolidation: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from cl.engine.learner import Learner
from cl.errors import InputError
from cl.random import Random
from cl.strategies import ewc
from cl.strategies.ewc import EWC
from cl.strategies.l2p import L2P
from cl.strategies.lwf import LwF
from cl.strategies.ncm import NCM
from cl.toolkit.fisher import label_weights
from draws import ALPHA, quick, seeds
from logistic import closed_form, problem
from toys import Identity, Quadratic, build, float_stream, learn, toy


def linear_learner(strategy: EWC, x, y, num_classes: int, weight=None, bias=None, scenario="domain") -> Learner:
    """Logistic regression: an identity and a head with given weights."""
    stream = float_stream([x, x], [y, y], scenario, num_classes)
    learner = build(stream, Identity(x.shape[1]), strategy)
    with torch.no_grad():
        if weight is not None:
            learner.head.weight.copy_(weight)
            learner.head.bias.copy_(torch.zeros(num_classes) if bias is None else bias)
    return learner


@quick
@given(seeds, st.integers(2, 6), st.sampled_from([2, 3, 5]), st.sampled_from(["true", "empirical"]))
def test_fisher_of_logistic_regression_in_closed_form(seed, size, num_classes, kind):
    x, y, weight, bias = problem(seed, 20, size, num_classes)
    learner = linear_learner(EWC(fisher=kind), x, y, num_classes, weight, bias)
    learner.strategies["method"].after_task(learner, learner.task)
    expected = closed_form(x, y, weight, bias, kind)
    torch.testing.assert_close(learner.strategies["method"].importance, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("batch_size", "rows"), [(1, 20), (3, 18), (20, 20), (64, 20)])
def test_batches_square_their_mean_gradient(batch_size, rows):
    """One autograd call a batch; what is left over makes no batch, and a batch is at most all examples."""
    x, y, weight, bias = problem(5, 20, 3, 4)
    learner = linear_learner(EWC(fisher="empirical", batch_size=batch_size), x, y, 4, weight, bias)
    learner.strategies["method"].after_task(learner, learner.task)
    squares = []
    for some, labels in zip(x[:rows].split(batch_size), y[:rows].split(batch_size), strict=True):
        gradient = torch.autograd.grad(F.cross_entropy(learner.head(some), labels), list(learner.head.parameters()))
        squares.append(torch.cat([g.flatten() for g in gradient]) ** 2)
    expected = torch.stack(squares).mean(0)
    torch.testing.assert_close(learner.strategies["method"].importance, expected, rtol=1e-4, atol=1e-6)


def test_sampled_fisher_is_right_in_the_mean():
    """E over y ~ p of the sampled Fisher is the true one; within five standard errors (6e-7 for each of 8)."""
    x, y, weight, bias = problem(2, 4000, 3, 2)
    learner = linear_learner(EWC(fisher="sampled", num_samples=None), x, y, 2, weight, bias)
    learner.strategies["method"].after_task(learner, learner.task)
    p = (x @ weight.T + bias).softmax(1)[:, 0]
    # Both classes have the square (y - p)^2, which is (1-p)^2 with probability p and else p^2.
    spread = p * (1 - p) * ((1 - p) ** 2 - p**2) ** 2
    features = torch.cat([x, torch.ones(len(x), 1)], 1)
    error = (spread[:, None] * features**4).sum(0).sqrt() / len(x)
    error = torch.cat([error[:3], error[:3], error[3:], error[3:]])
    true = closed_form(x, y, weight, bias, "true")
    got = learner.strategies["method"].importance
    assert ((got - true).abs() < 5 * error).all()
    assert not torch.allclose(got, true, rtol=1e-4), "it is a draw"
    assert not torch.allclose(got, closed_form(x, y, weight, bias, "empirical"), rtol=1e-2), (
        "and not of the data's labels"
    )


def test_sampled_labels_follow_the_models_distribution():
    probabilities = torch.tensor([0.1, 0.6, 0.3])
    x = torch.ones(3000, 1)
    learner = linear_learner(EWC(fisher="sampled"), x, torch.arange(3000) % 3, 3, probabilities.log()[:, None])
    module = nn.Sequential(learner.backbone, learner.head)
    drawn = label_weights("sampled", module, x, torch.zeros(3000).long(), torch.arange(3), Random())
    assert torch.equal(drawn.sum(1), torch.ones(3000))
    assert stats.chisquare(drawn.sum(0).numpy(), 3000 * probabilities.numpy()).pvalue > ALPHA


@pytest.mark.parametrize(
    ("train_mask", "classes"), [(None, [0, 1, 2, 3]), ("class", [0, 1, 2, 3]), ("task", [2, 3]), ("domain", range(6))]
)
def test_fisher_counts_the_classes_that_compete_in_training(train_mask, classes):
    x, y, weight, bias = problem(3, 12, 3, 6)
    stream = float_stream([x] * 3, [y % 2 + 2 * t for t in range(3)])
    learner = build(stream, Identity(3), EWC(), train_mask=train_mask)
    learner.head.load_state_dict({"weight": weight, "bias": bias})
    for task in stream[:2]:
        learner.before_task(task)
    learner.strategies["method"].after_task(learner, stream[1])
    expected, rows = torch.zeros(6, 3), list(classes)
    expected[rows] = closed_form(x, y, weight[rows], bias[rows], "true")[: 3 * len(rows)].view(-1, 3)
    got = learner.strategies["method"].importance[:18].view(6, 3)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_fisher_is_measured_on_num_samples_plain_examples_in_evaluation_mode():
    class Noisy(Identity):
        def __init__(self) -> None:
            super().__init__(3)
            self.dropout = nn.Dropout(0.5)
            self.rows = 0

        def forward(self, x):
            return self.dropout(x)

    x, y, weight, bias = problem(4, 30, 3, 2)
    stream = float_stream([x, x], [y, y], "domain", 2)
    learner = build(stream, Noisy(), EWC(num_samples=None))
    learner.head.load_state_dict({"weight": weight, "bias": bias})
    learner.strategies["method"].after_task(learner, stream[0])
    expected = closed_form(x, y, weight, bias, "true")
    torch.testing.assert_close(learner.strategies["method"].importance, expected, rtol=1e-4, atol=1e-6)
    assert learner.backbone.dropout.training

    few = build(stream, Identity(3), EWC(num_samples=1))
    few.head.load_state_dict({"weight": weight, "bias": bias})
    few.strategies["method"].after_task(few, stream[0])
    singles = [closed_form(x[i : i + 1], y[i : i + 1], weight, bias, "true") for i in range(30)]
    assert any(torch.allclose(few.strategies["method"].importance, one, rtol=1e-4, atol=1e-6) for one in singles)


def scripted(monkeypatch, fishers, anchors, **options) -> tuple[Learner, EWC]:
    """A learner whose weights and Fishers after each task are the given vectors."""
    x, y, _, _ = problem(0, 8, 3, 2)
    learner = linear_learner(EWC(**options), x, y, 2)
    strategy, script = learner.strategies["method"], iter(fishers)
    monkeypatch.setattr(ewc, "task_fisher", lambda *args: next(script))
    for anchor in anchors:
        nn.utils.vector_to_parameters(anchor, learner.trunk().parameters())
        strategy.after_task(learner, learner.task)
        learner.tasks_learned += 1
    return learner, strategy


@quick
@given(seeds, st.integers(1, 5), st.floats(0.1, 1000))
def test_one_quadratic_has_the_gradient_of_the_sum_over_tasks(seed, num_tasks, weight):
    draw = torch.Generator().manual_seed(seed)
    fishers = [torch.rand(8, generator=draw) * (torch.rand(8, generator=draw) > 0.3) for _ in range(num_tasks)]
    anchors = [torch.randn(8, generator=draw) for _ in range(num_tasks)]
    theta = torch.randn(8, generator=draw)
    with pytest.MonkeyPatch.context() as patch:
        learner, strategy = scripted(patch, fishers, anchors, weight=weight)
    nn.utils.vector_to_parameters(theta, learner.trunk().parameters())
    loss = strategy.loss(learner, None, None)
    got = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(learner.trunk().parameters()))])
    theta = theta.clone().requires_grad_()
    explicit = weight / 2 * sum((f * (theta - a) ** 2).sum() for f, a in zip(fishers, anchors, strict=True))
    (expected,) = torch.autograd.grad(explicit, theta)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * weight)
    torch.testing.assert_close(strategy.importance, sum(fishers))


def test_the_mean_over_tasks_weighs_every_task_alike(monkeypatch):
    fishers = [torch.full((8,), 6.0), torch.arange(8.0), torch.ones(8)]
    anchors = [torch.zeros(8), torch.ones(8), torch.arange(8.0)]
    _, strategy = scripted(monkeypatch, fishers, anchors, merge="mean")
    torch.testing.assert_close(strategy.importance, (7 + torch.arange(8.0)) / 3)
    torch.testing.assert_close(strategy.anchor, torch.arange(8.0))


class TwoWeights(nn.Module):
    num_features = 2

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.theta.expand(len(x), 2)


@pytest.mark.parametrize(
    ("h", "goal", "fisher", "anchor", "weight"),
    [
        ([2.0, 2.0], [3.0, 3.0], [0.5, 0.5], [1.0, 1.0], 4.0),  # worked example 14
        ([1.0, 0.5], [2.0, -1.0], [0.3, 2.0], [-1.0, 4.0], 2.5),
        ([1.0, 1.0], [2.0, -1.0], [0.0, 1.0], [5.0, 5.0], 1.0),
    ],
)
def test_training_ends_at_the_minimiser_in_closed_form(h, goal, fisher, anchor, weight):
    x, y = torch.zeros(40, 2), torch.arange(40) % 2
    stream = float_stream([x, x], [y, y], "domain")
    strategies = {"ewc": EWC(weight=weight), "task": Quadratic(h, goal)}
    learner = Learner(stream, TwoWeights(), strategies, partial(torch.optim.SGD, lr=0.1), batch_size=1)
    learner.strategies["ewc"].importance[:2] = torch.tensor(fisher)
    learner.strategies["ewc"].anchor[:2] = torch.tensor(anchor)
    learner.tasks_learned = 1
    learn(learner, stream, [1], epochs=8)
    h, goal, fisher, anchor = map(np.array, (h, goal, fisher, anchor))
    expected = (h * goal + weight * fisher * anchor) / (h + weight * fisher)
    np.testing.assert_allclose(learner.backbone.theta.detach(), expected, atol=1e-4)


def test_worked_example_14_the_penalty_has_a_half():
    x, y = torch.zeros(2, 2), torch.arange(2)
    learner = build(float_stream([x, x], [y, y], "domain"), TwoWeights(), EWC(weight=4.0))
    strategy = learner.strategies["method"]
    strategy.importance[0], strategy.anchor[0] = 0.5, 1.0
    learner.backbone.theta.data[0] = 2.0
    assert strategy.loss(learner, None, None) is None, "nothing to hold in the first task"
    learner.tasks_learned = 1
    assert float(strategy.loss(learner, None, None).detach()) == pytest.approx(1.0)


def test_ewc_refuses_what_it_cannot_measure():
    with pytest.raises(InputError, match="no kind of Fisher called 'emprical': did you mean 'empirical'"):
        EWC(fisher="emprical")
    with pytest.raises(InputError, match="no merge of Fishers called 'men': did you mean 'mean'"):
        EWC(merge="men")
    with pytest.raises(InputError, match="batch_size=20 needs one label for each example: use empirical or sampled"):
        EWC(batch_size=20)
    with pytest.raises(InputError, match="batch_size=0 must be 1 or more"):
        EWC(fisher="empirical", batch_size=0)
    for other in (LwF, EWC, NCM):
        with pytest.raises(InputError, match="another strategy owns encode: drop one"):
            toy({"l2p": L2P(), "other": other()}, backbone="vit")
