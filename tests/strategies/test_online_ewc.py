"""Online EWC: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies import online_ewc
from cl.strategies.ewc import EWC
from cl.strategies.online_ewc import OnlineEWC
from cl.toolkit.fisher import diagonal_fisher
from draws import quick
from toys import learn, toy, vector


def scripted(monkeypatch, fishers, optima, **options) -> tuple[Learner, OnlineEWC]:
    """A learner of 614 weights whose optima and Fishers after each task are the given numbers."""
    learner, _ = toy(OnlineEWC(**options))
    strategy, script = learner.strategies["method"], iter(fishers)
    monkeypatch.setattr(online_ewc, "task_fisher", lambda *args: torch.full((614,), next(script)))
    for optimum in optima:
        nn.utils.vector_to_parameters(torch.full((614,), optimum), learner.trunk().parameters())
        strategy.after_task(learner, learner.task)
        learner.tasks_learned += 1
    return learner, strategy


def test_worked_example_16(monkeypatch):
    learner, strategy = scripted(monkeypatch, [2.0, 1.0], [0.5, -0.25], gamma=0.9, weight=4.0)
    torch.testing.assert_close(strategy.precision, torch.full((614,), 2.8))
    assert torch.equal(strategy.mean, torch.full((614,), -0.25))
    assert float(strategy.loss(learner, None, None).detach()) == 0, "the penalty is 0 at the last optimum"
    nn.utils.vector_to_parameters(torch.full((614,), 0.75), learner.trunk().parameters())
    penalty = float(strategy.loss(learner, None, None).detach())
    assert penalty == pytest.approx(614 * 4 / 2 * 0.9 * 2.8), "with a half, and gamma once more (equation 2)"


@quick
@given(st.floats(0, 1), st.lists(st.floats(0, 5), min_size=1, max_size=6))
def test_the_precision_is_a_fading_sum(gamma, fishers):
    with pytest.MonkeyPatch.context() as patch:
        _, strategy = scripted(patch, fishers, [0.0] * len(fishers), gamma=gamma)
    expected = sum(gamma ** (len(fishers) - 1 - i) * f for i, f in enumerate(fishers))
    assert float(strategy.precision[0]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_without_fading_the_second_task_is_that_of_ewc_and_the_third_is_not():
    runs = [toy(m(weight=5.0, num_samples=None, **o), [0, 1]) for m, o in ((EWC, {}), (OnlineEWC, {"gamma": 1.0}))]
    torch.testing.assert_close(*(vector(learner) for learner, _ in runs), rtol=1e-3, atol=1e-5)
    after = [vector(learn(learner, stream, [2])) for learner, stream in runs]
    assert not torch.allclose(*after)


def test_online_ewc_measures_the_fisher_of_each_task_at_its_optimum():
    learner, stream = toy(OnlineEWC(num_samples=None, gamma=0.5))
    strategy, total = learner.strategies["method"], 0.0
    for task in stream:
        learn(learner, stream, [task.index])
        module = nn.Sequential(learner.backbone, learner.head)
        view = learner.prepare(task.train.tensors()[0])
        total = 0.5 * total + diagonal_fisher(module, view, torch.arange(2 * task.index + 2))
        torch.testing.assert_close(strategy.precision, total, rtol=1e-3, atol=1e-7)
        assert torch.equal(strategy.mean, vector(learner))


def test_online_ewc_refuses_what_it_cannot_measure():
    with pytest.raises(InputError, match=r"online_ewc\.gamma=1\.5 must be between 0 and 1"):
        OnlineEWC(gamma=1.5)
    with pytest.raises(InputError, match="no kind of Fisher called 'emprical': did you mean 'empirical'"):
        OnlineEWC(fisher="emprical")
    with pytest.raises(InputError, match="batch_size=20 needs one label for each example: use empirical or sampled"):
        OnlineEWC(batch_size=20)
