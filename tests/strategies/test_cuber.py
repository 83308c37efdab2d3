"""Continual learning with Backward knowledge transfer: worked examples, closed forms, and loops written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cl.data.task import Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies import cuber
from cl.strategies.cuber import CUBER
from cl.strategies.trgp import TRGP
from cl.testing import ToyBackbone, toy_learner, toy_stream
from cl.toolkit.subspace import Subspaces
from subspaces import TwoLayers, build, random_stream
from toys import learn


@pytest.mark.parametrize(
    ("sufficient", "positive", "regime"), [(0.5, 0.0, 3), (0.5, 0.2, 2), (0.9, 0.0, 1), (0.8, 0.14142, 3)]
)
def test_worked_example_12(sufficient, positive, regime):
    subspaces, g = Subspaces(2, 2), torch.tensor([[0.8, 0.6]])
    subspaces.basis[0, 0], subspaces.member[0, 0] = 1, True
    old = torch.tensor([[[1.0, -1.0]], [[0.0, 0.0]]]) / 2**0.5
    cosine = cuber.correlation(old, g)
    torch.testing.assert_close(cosine, torch.tensor([0.141421, 0.0]), atol=1e-6, rtol=0)
    energies, total = subspaces.energies(g), g.square().sum()
    assert cuber.regimes(energies, total, cosine, sufficient - 1e-6, positive, 2).tolist() == [regime, 1]


def test_only_the_tasks_of_most_energy_leave_regime_1():
    energies, cosine = torch.tensor([0.3, 0.5, 0.4, 0.0]), torch.tensor([0.9, -0.1, 0.2, 0.0])
    assert cuber.regimes(energies, torch.tensor(1.0), cosine, 0.5, 0.0, 2).tolist() == [1, 2, 3, 1]
    assert cuber.regimes(energies, torch.tensor(1.0), cosine, 0.5, 0.0, 1).tolist() == [1, 2, 1, 1]
    assert cuber.regimes(energies, torch.tensor(1.0), cosine, 0.5, 0.0, 9).tolist() == [3, 2, 3, 1]


def test_cuber_without_regime_3_is_trgp():
    stream, weights = random_stream((10,), num_rows=6, scenario="task", num_tasks=4), []
    for make in (TRGP(0.9, 0.0, 0.5, num_samples=6), CUBER(0.9, 0.0, 0.5, positive=2.0, num_samples=6)):
        torch.manual_seed(0)
        learner = learn(build(stream, TwoLayers(), make, lr=0.2, batch_size=6), stream, epochs=5)
        x = torch.cat([learner.predict(Batch(*task.train.tensors())).detach() for task in stream])
        weights.append(torch.cat([x.flatten(), *(p.detach().flatten() for p in learner.trunk().parameters())]))
    torch.testing.assert_close(weights[1], weights[0], atol=1e-4, rtol=1e-3)


def in_the_middle(**arguments) -> tuple[Learner, Stream]:
    """A learner at the beginning of its third task, with both old ones in regime 3."""
    stream = random_stream((10,), num_rows=4, scenario="task", num_tasks=3)
    torch.manual_seed(0)
    strategy = CUBER(0.8, 0.0, sufficient=0.0, positive=-1.0, num_samples=4, **arguments)
    learner = learn(build(stream, TwoLayers(), strategy, lr=0.1), stream, [0, 1], 3)
    learner.before_task(stream[2])
    strategy.positive = 0.0
    return learner, stream


def test_gradients_of_old_tasks_are_stored_with_length_1():
    """The threshold on the cosine with a new gradient must not depend on how steep an old task was."""
    strategy = in_the_middle()[0].strategies["method"]
    for gradients in (strategy.gradients_0, strategy.gradients_1):
        lengths = gradients.flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, torch.tensor([1.0, 1.0, 0.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("smoothing", "steps"), [(0.0, 1), (0.9, 7)])
def test_a_task_falls_back_to_regime_2_when_the_mean_gradient_turns_against_it(smoothing, steps):
    """From a mean of G and steps of -G the mean is 2 * .9^n - 1, which is below 0 from the seventh on."""
    learner, _ = in_the_middle(smoothing=smoothing, penalty=0.0)
    strategy, W = learner.strategies["method"], learner.backbone.one.weight
    G = strategy.gradients_0
    G[1] = -G[0]
    strategy.mean_0.copy_(G[0])
    strategy.regime_0.copy_(torch.tensor([3, 1, 1]))
    for step in range(1, 10):
        W.grad = -G[0].clone()
        strategy.project_gradients(learner)
        assert strategy.regime_0.tolist() == [3 if step < steps else 2, 1, 1]


def test_steps_are_free_in_the_columns_of_regime_3_alone():
    learner, _ = in_the_middle(penalty=0.0)
    strategy, W = learner.strategies["method"], learner.backbone.one.weight
    own = strategy.subspaces[0]
    strategy.positive = -1.0
    for regime in ([3, 3, 1], [2, 3, 1], [1, 2, 1]):
        strategy.regime_0.copy_(torch.tensor(regime))
        g = torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
        W.grad = g.clone()
        strategy.project_gradients(learner)
        closed = [own.basis[:, own.member[j]] for j in range(2) if regime[j] < 3]
        expected = g
        if closed:
            U, S, _ = torch.linalg.svd(torch.cat(closed, 1).double(), full_matrices=False)
            U = U[:, S > 1e-6]
            expected = (g.double() - g.double() @ U @ U.T).float()
        torch.testing.assert_close(W.grad, expected, atol=1e-5, rtol=0)


def test_the_penaltys_gradient_is_that_of_the_formula():
    learner, _ = in_the_middle(penalty=0.7)
    strategy, W = learner.strategies["method"], learner.backbone.one.weight
    own, anchor = strategy.subspaces[0], strategy.anchor_0
    strategy.positive = -1.0
    with torch.no_grad():
        W += 0.1 * torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
    free = W.detach().clone().requires_grad_()
    bases = [own.basis[:, own.member[j]] for j in range(2)]
    penalty = 0.7 * sum(((free - anchor) @ B @ B.T).norm() for B in bases)
    (expected,) = torch.autograd.grad(penalty, free)
    W.grad = torch.zeros_like(W)
    strategy.project_gradients(learner)
    torch.testing.assert_close(W.grad, expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        W.copy_(anchor)
    W.grad = torch.zeros_like(W)
    strategy.project_gradients(learner)
    assert not W.grad.any(), "where it has no gradient it pulls nowhere"


def test_an_old_task_gains_from_a_new_one_that_pulls_its_way():
    """The same examples come again with other labels and the same head: TRGP leaves the old loss, CUBER lowers it."""
    gains = []
    for make in (TRGP(0.99, num_samples=4), CUBER(0.99, num_samples=4, penalty=0.0)):
        draw = torch.Generator().manual_seed(3)
        x, y = torch.randn(4, 10, generator=draw), torch.arange(4) % 2
        tasks = [Task(t, TaskData(x, y + 2 * t, t), TaskData(x.clone(), y + 2 * t, t)) for t in range(2)]
        stream = Stream(tasks, scenario="task", num_classes=4)
        torch.manual_seed(0)
        learner = learn(build(stream, TwoLayers(), make, lr=0.1), stream, [0], 5)
        with torch.no_grad():
            learner.head.weight[2:], learner.head.bias[2:] = learner.head.weight[:2], learner.head.bias[:2]
        batch = Batch(*stream[0].train.tensors())
        before = learner.criterion(learner.predict(batch), batch).item()
        learn(learner, stream, [1], 5)
        gains.append(before - learner.criterion(learner.predict(batch), batch).item())
    assert abs(gains[0]) < 1e-3 < 0.01 < gains[1]


@pytest.mark.parametrize("scenario", ["class", "domain"])
def test_cuber_refuses_other_scenarios(scenario):
    with pytest.raises(InputError, match=f"CUBER works with scenario=task, but this run has scenario={scenario}"):
        toy_learner({"method": CUBER()}, scenario=scenario)


@pytest.mark.parametrize(
    ("arguments", "optimizer", "message"),
    [
        ({}, partial(torch.optim.SGD, lr=0.1, momentum=0.1), "CUBER needs plain SGD.*momentum=0.1"),
        ({"threshold": [0.9] * 3}, None, r"cuber\.threshold has 3 values for 2 layers"),
        ({"smoothing": 1.5}, None, r"cuber\.smoothing=1\.5 must be between 0 and 1"),
        ({"positive": -2.0}, None, r"cuber\.positive=-2\.0 must be -1 or more"),
    ],
)
def test_cuber_refuses(arguments, optimizer, message):
    with pytest.raises(InputError, match=message):
        build(toy_stream(scenario="task"), ToyBackbone(), CUBER(**arguments), optimizer=optimizer)


@pytest.mark.parametrize("strategy", [TRGP, CUBER])
def test_what_is_selected_by_another_loss_than_is_trained_is_refused(strategy: type[Strategy]) -> None:
    with pytest.raises(InputError, match="train_mask=class"):
        build(toy_stream(3, "task"), ToyBackbone(), strategy(), train_mask="class")
