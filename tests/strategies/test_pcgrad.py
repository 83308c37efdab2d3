"""PCGrad and GradVac: the worked pair, the invariants of a projection, the gradient of a batch without conflict."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl.engine.experiment import Experiment
from cl.errors import InputError
from cl.random import Random
from cl.strategies.er import ER
from cl.strategies.pcgrad import PCGrad, _all_changed, vaccinated, without_conflict
from cl.testing import toy_learner
from cl.testing.toys import trainer

numbers = st.floats(-3, 3, width=32).map(lambda v: v if abs(v) > 1e-3 else 0.0)  # squares of the others vanish
vectors = st.lists(numbers, min_size=4, max_size=4).map(lambda v: torch.tensor(v).double())


def changed(*gradients: torch.Tensor) -> list[torch.Tensor]:
    return _all_changed(
        list(gradients), list(range(len(gradients))), lambda g, o, i, j: without_conflict(g, o), Random()
    )


def test_the_worked_pair():
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    first, second = changed(one, two)
    assert torch.allclose(first, torch.tensor([0.5, 0.5])) and torch.allclose(second, torch.tensor([0.0, 1.0]))
    assert torch.allclose(first + second, torch.tensor([0.5, 1.5])), "the plain sum is (0, 1)"


def test_the_other_gradient_is_the_one_before_its_own_projection():
    """Of three gradients: each is projected on the originals of the others, so (algorithm 1) the order can matter."""
    a, b, c = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.2], [-1.0, 0.5], [0.1, -1.0]))
    found = changed(a, b, c)[1]
    by_hand = [without_conflict(without_conflict(b, x), y) for x, y in ((a, c), (c, a))]
    assert any(torch.allclose(found, each) for each in by_hand)


@given(vectors, vectors)
def test_what_is_left_does_not_conflict(g, other):
    result = without_conflict(g, other)
    assert float(result @ other) >= -1e-6 * float(other.norm())
    if float(g @ other) >= 0:
        assert torch.equal(result, g)
    assert float(result.norm()) <= float(g.norm()) + 1e-9


@given(vectors, vectors, st.floats(0.0, 0.9))
@settings(max_examples=50)
def test_gradvac_raises_the_cosine_to_its_target(g, other, target):
    if min(float(g.norm()), float(other.norm())) < 1e-2:
        return
    cosine = torch.nn.functional.cosine_similarity(g, other, dim=0)
    if float(cosine) < -0.999:
        return  # opposite directions have no combination at an angle
    result = vaccinated(g, other, cosine, torch.tensor(target).double())
    reached = float(torch.nn.functional.cosine_similarity(result, other, dim=0))
    assert reached == pytest.approx(max(float(cosine), target), abs=1e-4)


def test_the_worked_coefficient_of_gradvac():
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    result = vaccinated(one, two, torch.tensor(-(0.5**0.5)), torch.tensor(0.2))
    torch.testing.assert_close(result, torch.tensor([0.397938, 0.602062]), atol=1e-6, rtol=0)


def weights(*strategies: PCGrad, **options: object) -> torch.Tensor:
    named = {type(s).__name__.lower(): s for s in strategies}
    learner, stream = toy_learner({"er": ER(20), **named}, num_tasks=2, **options)
    Experiment(learner, stream, trainer, epochs=1).run()
    return torch.cat([p.detach().flatten() for p in learner.parameters()])


def test_without_conflicts_it_is_the_gradient_of_the_batch(monkeypatch: pytest.MonkeyPatch):
    plain = weights()
    assert not torch.allclose(weights(PCGrad()), plain, atol=1e-4), "there are conflicts in this stream"
    monkeypatch.setattr("cl.strategies.pcgrad.without_conflict", lambda g, other: g)
    torch.testing.assert_close(weights(PCGrad()), plain, rtol=1e-4, atol=1e-5)


def test_gradvac_follows_the_cosines_of_each_pair():
    method = PCGrad(rule="gradvac", beta=1.0)
    weights(method)
    assert method.cosines.diagonal().eq(0).all()
    assert (method.cosines.abs() <= 1).all() and method.cosines[1, 0] == pytest.approx(float(method.cosines[0, 1]))
    assert float(method.cosines[0, 1]) != 0


def test_another_rule_is_refused():
    with pytest.raises(InputError, match="no rule of PCGrad called 'pcgrads'"):
        PCGrad(rule="pcgrads")
