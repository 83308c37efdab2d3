"""SAM: the gradient at the point of highest loss nearby."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from cl.data.task import Stream, Task, TaskData
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.strategies.sam import SAM, perturbation
from cl.testing import toy_learner
from cl.testing.toys import trainer


class Weights(nn.Module):
    """Features are the input times two weights."""

    num_features = 2

    def __init__(self, w: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w


class Same(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def stepped(w: list[float], lr: float, **options: float | bool) -> torch.Tensor:
    """Return the weights after one step on f = w1^2 + 10 w2^2, as a mean of squared errors of two columns."""
    scale = torch.tensor([[2**0.5, 20**0.5]])  # the loss is the mean over two columns
    data = TaskData(scale, torch.zeros(1, 2))
    stream = Stream([Task(0, data, data)], num_classes=2, target="regression", scenario="domain")
    body = Weights(w)
    learner = Learner(stream, body, {"sam": SAM(**options)}, partial(torch.optim.SGD, lr=lr), head=Same())
    Experiment(learner, stream, trainer, epochs=1).run()
    return body.w.detach()


def test_the_worked_step():
    """f = w1^2 + 10 w2^2 at (1, 1), rho .05: e (.004975, .049752), g_SAM (2.009950, 20.995037)."""
    w, g = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 20.0])
    torch.testing.assert_close(perturbation([w], [g], 0.05)[0], torch.tensor([0.004975, 0.049752]), atol=1e-6, rtol=0)
    sharp = (w - stepped([1.0, 1.0], lr=1.0)).double()
    torch.testing.assert_close(sharp, torch.tensor([2.009950, 20.995037]).double(), atol=2e-5, rtol=0)
    torch.testing.assert_close(sharp - g.double(), torch.tensor([0.009950, 0.995037]).double(), atol=2e-5, rtol=0)


def test_the_adaptive_step_does_not_depend_on_the_scale_of_the_weights():
    """With w -> w / c and x -> c x the loss is the same function of (w x); its worst point moves alike (Kwon 2021)."""
    w, g = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 20.0])
    scale = torch.tensor([4.0, 0.5])
    one = perturbation([w], [g], 0.05, adaptive=True)[0] / w
    other = perturbation([w / scale], [g * scale], 0.05, adaptive=True)[0] / (w / scale)
    torch.testing.assert_close(one, other)
    assert not torch.allclose(*(perturbation([w / s], [g * s], 0.05)[0] * s for s in (scale, torch.ones(2))))


def test_a_vanishing_distance_is_plain_descent_and_the_weights_move_back_to_the_bit():
    heads = []
    for strategies in ({}, {"sam": SAM(rho=1e-12)}):
        learner, stream = toy_learner(strategies, num_tasks=2)
        Experiment(learner, stream, trainer, epochs=1).run()
        heads.append(learner.head.weight.detach())
    torch.testing.assert_close(*heads, rtol=1e-5, atol=1e-6)
    kept = stepped([1.0, 1.0], lr=0.0)
    assert torch.equal(kept, torch.ones(2))


def test_a_zero_gradient_moves_nothing():
    assert torch.equal(stepped([0.0, 0.0], lr=1.0), torch.zeros(2))
    assert torch.isfinite(stepped([0.0, 1.0], lr=0.1, adaptive=True)).all()


@pytest.mark.parametrize("adaptive", [False, True])
def test_it_descends_to_flatter_minima(adaptive):
    """Of two minima of equal height on a line the sharp one is left: in f = min over wells the flat well wins.

    g_SAM of a quadratic with curvature c is c (w + rho sign(w)): near the minimum of a sharp well it bounces with an
    amplitude of at least rho / 2 c lr, so that its loss stays above that of the flat well.
    """

    def last(curvature: float) -> float:
        w = 1.0
        for _ in range(200):
            point = torch.tensor([w])
            e = perturbation([point], [torch.tensor([curvature * w])], 0.05, adaptive)[0]
            w -= 0.1 * curvature * float(point + e)
        return 0.5 * curvature * w * w

    if adaptive:
        assert last(8.0) < 1e-6, "measured in units of the weights it converges"
    else:
        assert last(8.0) > 10 * last(0.5)
