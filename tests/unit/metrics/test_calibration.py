"""Expected calibration error: closed forms, plain loops, torchmetrics, sums that add up, calibrated draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl.errors import InputError
from cl.metrics.calibration import calibration_bins, ece_from_bins, expected_calibration_error

NAN = float("nan")
quick = settings(deadline=None, max_examples=40)
answers = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.integers(0, 15).map(lambda n: n / 15)), st.booleans()),
    min_size=1,
    max_size=30,
)


def by_loops(pairs: list[tuple[float, bool]], bins: int) -> float:
    total = 0.0
    for m in range(1, bins + 1):
        inside = [(c, hit) for c, hit in pairs if (m - 1) < c * bins <= m or (m == 1 and c == 0)]
        if inside:
            confidence, accuracy = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            total += len(inside) / len(pairs) * abs(accuracy - confidence)
    return total


@quick
@given(answers, st.integers(1, 20))
def test_parity_with_loops(pairs: list[tuple[float, bool]], bins: int) -> None:
    confidence, correct = (list(column) for column in zip(*pairs, strict=True))
    value = expected_calibration_error(confidence, correct, bins)
    assert value.shape == () and value.dtype == torch.float64 and value.device.type == "cpu"
    assert abs(value.item() - by_loops(pairs, bins)) < 1e-12 and 0 <= value <= 1 + 1e-12


def test_closed_forms() -> None:
    assert expected_calibration_error([1.0, 1.0, 0.0], [1, 1, 0]).item() == 0.0  # sure and right, or sure of nothing
    assert expected_calibration_error([1.0, 1.0], [0, 0]).item() == 1.0
    assert abs(expected_calibration_error([0.75] * 4, [1, 1, 1, 0]).item()) < 1e-12
    assert abs(expected_calibration_error([0.9] * 10, [1] * 6 + [0] * 4).item() - 0.3) < 1e-12
    # 0.3 is the closed upper end of the third of ten bins, so it shares no bin with 0.31
    assert abs(expected_calibration_error([0.29, 0.31], [0, 1], bins=10).item() - (0.29 + 0.69) / 2) < 1e-12
    assert abs(expected_calibration_error([0.5, 0.51], [0, 1], bins=2).item() - (0.5 + 0.49) / 2) < 1e-12
    assert abs(expected_calibration_error([0.49, 0.5], [0, 1], bins=2).item() - (1 - 0.99) / 2) < 1e-12


@pytest.mark.parametrize("bins", [5, 15])
def test_parity_with_torchmetrics(bins: int) -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    draw = torch.Generator().manual_seed(bins)
    probabilities = (2 * torch.randn(400, 7, generator=draw, dtype=torch.float64)).softmax(1)
    labels = torch.randint(7, (400,), generator=draw)
    sure, answer = probabilities.max(1)
    theirs = multiclass_calibration_error(probabilities, labels, num_classes=7, n_bins=bins, norm="l1")
    assert abs(expected_calibration_error(sure, answer == labels, bins).item() - theirs.item()) < 1e-6


@quick
@given(answers, st.integers(1, 8), st.randoms(use_true_random=False))
def test_invariants(pairs: list[tuple[float, bool]], bins: int, random: Random) -> None:
    confidence, correct = (list(map(float, column)) for column in zip(*pairs, strict=True))
    value = expected_calibration_error(confidence, correct, bins).item()
    shuffled = list(pairs)
    random.shuffle(shuffled)
    sure, right = (list(map(float, column)) for column in zip(*shuffled, strict=True))
    again = expected_calibration_error(sure, right, bins)
    assert abs(again.item() - value) < 1e-12
    assert abs(expected_calibration_error(confidence * 3, correct * 3, bins).item() - value) < 1e-12
    overall = abs(sum(confidence) - sum(correct)) / len(pairs)
    assert abs(expected_calibration_error(confidence, correct, bins=1).item() - overall) < 1e-12
    assert overall - 1e-12 <= value <= expected_calibration_error(confidence, correct, 2 * bins).item() + 1e-12


@quick
@given(st.lists(answers, min_size=1, max_size=4))
def test_sums_of_batches_add_up(batches: list[list[tuple[float, bool]]]) -> None:
    sums = torch.zeros(3, 15, dtype=torch.float64)
    for batch in batches:
        sure, right = torch.tensor(batch, dtype=torch.float64).T
        sums += torch.stack(calibration_bins(sure, right.bool()))
    whole = torch.tensor([pair for batch in batches for pair in batch], dtype=torch.float64).T
    assert sums[0].sum() == whole.shape[1]
    assert abs(ece_from_bins(*sums).item() - expected_calibration_error(*whole).item()) < 1e-12


def test_one_value_a_task_from_stacked_sums() -> None:
    draw = torch.Generator().manual_seed(0)
    sure, right = torch.rand(3, 50, generator=draw), torch.rand(3, 50, generator=draw) < 0.5
    rows = [calibration_bins(sure[t], right[t]) for t in range(3)]
    found = ece_from_bins(*(torch.stack(column) for column in zip(*rows, strict=True)))
    assert found.shape == (3,) and found.dtype == torch.float64
    for t in range(3):
        assert abs(found[t].item() - expected_calibration_error(sure[t], right[t]).item()) < 1e-6


def test_the_sums_keep_dtype_and_device_and_read_nothing_back() -> None:
    sums = calibration_bins(torch.rand(5, dtype=torch.float32), torch.ones(5, dtype=torch.bool))
    assert all(part.dtype == torch.float32 and part.shape == (15,) for part in sums)
    meta = calibration_bins(torch.rand(5, device="meta"), torch.ones(5, device="meta"))  # any read would raise
    assert all(part.device.type == "meta" for part in meta)


def test_calibrated_draws_have_no_error_and_overconfident_ones_theirs() -> None:
    """E[ECE] <= sqrt(M / 4N) = 0.0043 for M = 15; above by 0.006 with probability below exp(-2 N 0.006^2) = 6e-7."""
    draw, N = torch.Generator().manual_seed(0), 200_000
    sure = torch.rand(N, generator=draw, dtype=torch.float64)
    right = torch.rand(N, generator=draw, dtype=torch.float64) < sure
    assert expected_calibration_error(sure, right).item() < math.sqrt(15 / (4 * N)) + 0.006
    above = (sure + 0.2).clamp(max=1)
    expected = (above - sure).mean().item()  # the shift is the gap of every bin
    assert abs(expected_calibration_error(above, right).item() - expected) < math.sqrt(15 / (4 * N)) + 0.006


def test_nothing_counted_is_undefined_and_nan_stays() -> None:
    zero = torch.zeros(2, 15)
    assert ece_from_bins(zero, zero, zero).isnan().all()
    assert expected_calibration_error([0.5, NAN], [1, 1]).isnan()
    assert expected_calibration_error([0.5, 0.5], [1, NAN]).isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_calibration_error([0.5, 0.6], [1]), "correct must be a vector with 2 entries"),
        (lambda: expected_calibration_error([], []), "confidence must be a vector with at least one entry"),
        (lambda: expected_calibration_error([1.5], [1]), "confidence must not hold an entry above 1, got 1.5"),
        (lambda: expected_calibration_error([-0.5], [1]), "confidence must not hold an entry below 0, got -0.5"),
        (lambda: expected_calibration_error([0.5], [2]), "correct must not hold an entry above 1, got 2"),
        (lambda: expected_calibration_error([0.5], [1], bins=0), "needs at least one bin, got bins=0"),
        (lambda: ece_from_bins(torch.ones(2, 15), torch.ones(15), torch.ones(15)), "must have one shape"),
        (lambda: ece_from_bins(torch.ones(()), torch.ones(()), torch.ones(())), r"one shape \(..., bins\)"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
