"""Costs: worked numbers, bounds, and what is undefined."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl.errors import InputError
from cl.metrics import costs as M
from cl.metrics.transfer import learning_accuracy_riemer, worked_example

NAN = float("nan")
quick = settings(deadline=None, max_examples=40)
amounts = st.lists(st.tuples(st.floats(1, 1e12), st.floats(1, 1e12)), min_size=1, max_size=6)
rates = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6)


def close(found: Tensor, expected: float, tol: float = 1e-6) -> bool:
    assert found.shape == () and found.dtype == torch.float64 and found.device.type == "cpu"
    return abs(found.item() - expected) < tol


# ------------------------------------------------------------------ Diaz-Rodriguez et al. 2018 (METRICS, sec. 2)


def test_resource_efficiencies() -> None:
    assert close(M.model_size_efficiency_diaz([10, 12, 15]), 0.833333)
    assert close(M.sample_storage_efficiency_diaz(torch.tensor([100, 200, 300]), 3000), 0.933333)
    assert close(M.computational_efficiency_diaz([1e9] * 3, [5e9, 10e9, 4e9]), 0.183333)
    assert close(M.computational_efficiency_diaz([1e9] * 3, [5e9, 10e9, 4e9], scale=2), 0.366667)
    assert close(M.computational_efficiency_diaz([1.0], [1.0]), 0.5)  # the constant 1 in the denominator


def test_resource_efficiencies_stay_in_the_unit_interval() -> None:
    assert M.model_size_efficiency_diaz([15, 10, 5]).item() == 1.0  # a shrinking model
    assert M.sample_storage_efficiency_diaz([900, 900], 100).item() == 0.0
    assert M.sample_storage_efficiency_diaz([0, 0], 100).item() == 1.0
    assert M.computational_efficiency_diaz([1e9], [1e9], scale=5).item() == 1.0
    assert math.isnan(M.model_size_efficiency_diaz([10, NAN]))


@quick
@given(amounts, st.floats(1, 100))
def test_efficiencies_against_loops(pairs: list[tuple[float, float]], scale: float) -> None:
    a, b = (list(column) for column in zip(*pairs, strict=True))
    size = min(1.0, sum(a[0] / v for v in a) / len(a))
    assert math.isclose(M.model_size_efficiency_diaz(a).item(), size, rel_tol=1e-9)
    assert math.isclose(M.model_size_efficiency_diaz([7 * v for v in a]).item(), size, rel_tol=1e-9)  # any unit
    stored = 1 - min(1.0, sum(v / b[0] for v in a) / len(a))
    assert math.isclose(M.sample_storage_efficiency_diaz(a, b[0]).item(), stored, rel_tol=1e-9, abs_tol=1e-9)
    spent = min(1.0, sum(scale * x / (1 + y) for x, y in pairs) / len(a))
    assert math.isclose(M.computational_efficiency_diaz(a, b, scale).item(), spent, rel_tol=1e-9)


def test_score_and_stability() -> None:
    assert close(M.cl_score_diaz([0.9, 0.5], [0.75, 0.25]), 0.8)
    assert close(M.cl_score_diaz([0.9, 0.5]), 0.7)
    assert close(M.cl_stability_diaz([0.04, 0.08], [0.75, 0.25]), 0.95)
    assert close(M.cl_stability_diaz([0.0, 0.0]), 1.0)
    assert math.isnan(M.cl_score_diaz([0.9, NAN], [1.0, 0.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: M.cl_score_diaz([0.9, 0.5], [0.5, 0.6]), "weights must sum to 1, got 1.1"),
        (lambda: M.cl_score_diaz([0.9, 0.5], [1.5, -0.5]), "weights must not hold an entry below 0, got -0.5"),
        (lambda: M.cl_score_diaz([0.9, 0.5], [1.0]), "weights must be a vector with 2 entries"),
        (lambda: M.cl_stability_diaz([-0.1]), "stds must not hold an entry below 0"),
        (lambda: M.model_size_efficiency_diaz([]), "params must be a vector with at least one entry"),
        (lambda: M.model_size_efficiency_diaz([10, 0]), "params must not hold an entry below 1"),
        (lambda: M.sample_storage_efficiency_diaz([1], 0), "lifetime must not hold an entry below 1"),
        (lambda: M.sample_storage_efficiency_diaz([-1], 5), "stored must not hold an entry below 0"),
        (lambda: M.computational_efficiency_diaz([1], [1, 2]), "pass_ops must be a vector with 2 entries"),
        (lambda: M.computational_efficiency_diaz([1], [1], 0.5), "scale must not hold an entry below 1"),
        (lambda: M.nevis_error(torch.zeros(1, 1)), "errors must be a vector with at least one entry"),
        (lambda: M.nevis_error([-0.1]), "errors must not hold an entry below 0"),
        (lambda: M.nevis_error([0.1], [1, 2]), "num_samples must be a vector with 1 entries"),
        (lambda: M.nevis_compute([-1]), "flops must not hold an entry below 0"),
        (lambda: M.nevis_compute([1, 2], [1]), "reference must be a vector with 2 entries"),
        (lambda: M.regret([0.1, 0.2], [0.1]), "reference must be a vector with 2 entries"),
    ],
)
def test_bad_vectors_are_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


# ------------------------------------------------------------------ NEVIS (METRICS, sec. 11)

ERRORS, REFERENCE = [0.10, 0.15, 0.20], [0.10, 0.20, 0.22]
FLOPS, REFERENCE_FLOPS = [2e15, 3e15, 1e15], [4e15, 4e15, 4e15]


def test_error_compute_and_regret() -> None:
    assert close(M.nevis_error(ERRORS), 0.15)
    assert M.nevis_compute(FLOPS).item() == 6e15
    assert close(M.nevis_compute(FLOPS, REFERENCE_FLOPS), 0.5)
    found = M.regret(ERRORS, REFERENCE)
    assert torch.allclose(found, torch.tensor([0, -0.05, -0.07], dtype=torch.float64), atol=1e-12)
    assert close(found[-1] / 3, -0.023333)
    assert close(
        M.nevis_error(1 - worked_example()[1:].diagonal()), 1 - learning_accuracy_riemer(worked_example()).item()
    )


@quick
@given(rates, st.integers(0, 5))
def test_error_and_regret_against_loops(pairs: list[tuple[float, float]], shift: int) -> None:
    own, other = (list(column) for column in zip(*pairs, strict=True))
    weights = [1 + (n + shift) % 4 for n in range(len(own))]
    pooled = sum(e * w for e, w in zip(own, weights, strict=True)) / sum(weights)
    assert close(M.nevis_error(own, weights), pooled, 1e-12) and close(M.nevis_error(own), sum(own) / len(own), 1e-12)
    found, total = M.regret(own, other).tolist(), 0.0
    for t, (a, b) in enumerate(pairs):
        total += a - b
        assert abs(found[t] - total) < 1e-12 and abs(found[t]) <= t + 1
    assert torch.equal(M.regret(own, other), -M.regret(other, own)) and M.regret(own, own).eq(0).all()
    assert close(M.regret(own, other)[-1], len(own) * (M.nevis_error(own) - M.nevis_error(other)).item(), 1e-12)


def test_what_is_unmeasured_stays_so() -> None:
    assert M.nevis_error([0.1, NAN]).isnan() and M.nevis_compute([1, NAN]).isnan()
    assert M.nevis_compute([1, 2], [0, 0]).isnan()
    assert M.regret([0.1, NAN, 0.1], REFERENCE).isnan().tolist() == [False, True, True]
