"""Metrics of evaluations inside the tasks: worked numbers, parity with plain loops, invariants, missing cells."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl.errors import InputError
from cl.metrics import inside_tasks as C

NAN = float("nan")
quick = settings(deadline=None, max_examples=40)

CURVES = torch.tensor(
    [
        [0.50, NAN, NAN],
        [0.80, NAN, NAN],
        [0.90, NAN, NAN],
        [0.60, 0.45, NAN],
        [0.85, 0.70, NAN],
        [0.94, 0.85, NAN],
        [0.55, 0.40, 0.50],
        [0.80, 0.75, 0.70],
        [0.84, 0.88, 0.80],
    ],
    dtype=torch.float64,
)
TRAINING = [1, 1, 1, 2, 2, 2, 3, 3, 3]
ZERO_SHOT = CURVES.clone()  # with the numbers of tasks 2 and 3 before they are trained
ZERO_SHOT[:3, 1] = torch.tensor([0.20, 0.30, 0.40], dtype=torch.float64)
ZERO_SHOT[:6, 2] = torch.tensor([0.25, 0.27, 0.30, 0.35, 0.40, 0.45], dtype=torch.float64)
OF_TRAINING = (
    C.average_anytime_accuracy,
    C.min_accuracy_delange,
    C.worst_case_accuracy_delange,
    C.stability_gap,
    C.recovery,
)


def same(found: Tensor, expected: object, tol: float = 1e-6) -> bool:
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == wanted.shape and found.dtype == torch.float64 and found.device.type == "cpu"
    return torch.allclose(found, wanted, rtol=0, atol=tol, equal_nan=True)


@st.composite
def runs(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    """Curves of 1 to 4 tasks with 1 to 4 evaluations each, on a grid so that ties are common."""
    training = [k for k in range(1, draw(st.integers(1, 4)) + 1) for _ in range(draw(st.integers(1, 4)))]
    size = len(training) * max(training)
    values = draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float64).reshape(len(training), -1) / 8, training


# ------------------------------------------------------------------ worked numbers (METRICS, secs. 5 and 6)


@pytest.mark.parametrize("curves", [CURVES, ZERO_SHOT], ids=["seen", "zero-shot"])
def test_average_anytime_accuracy(curves: Tensor) -> None:
    assert same(C.average_anytime_accuracy(curves, TRAINING), 0.718704)
    points = [0.50, 0.80, 0.90, 0.525, 0.775, 0.895, 0.483333, 0.75, 0.84]
    for n, point in enumerate(points):
        assert same(C.average_anytime_accuracy(curves[n : n + 1], TRAINING[n : n + 1]), point)


@pytest.mark.parametrize("curves", [CURVES, ZERO_SHOT], ids=["seen", "zero-shot"])
def test_worst_case_accuracy(curves: Tensor) -> None:
    assert same(C.min_accuracy_delange(curves, TRAINING), [NAN, 0.60, 0.475])
    assert same(C.worst_case_accuracy_delange(curves, TRAINING), [0.90, 0.725, 0.583333])


def test_windowed_forgetting_and_plasticity() -> None:
    assert same(C.windowed_forgetting(ZERO_SHOT, window=2), [0.39, 0.45, 0.0])
    assert same(C.windowed_plasticity(ZERO_SHOT, window=2), [0.30, 0.35, 0.20])


def test_stability_gap_and_recovery() -> None:
    gap = [[NAN, NAN, NAN], [0.30, NAN, NAN], [0.39, 0.45, NAN]]
    back = [[NAN, NAN, NAN], [3.0, NAN, NAN], [NAN, 3.0, NAN]]
    for curves in (CURVES, ZERO_SHOT):
        assert same(C.stability_gap(curves, TRAINING), gap)
        assert same(C.recovery(curves, TRAINING), back)


# ------------------------------------------------------------------ parity with plain loops


def by_loops(curves: Tensor, training: list[int]) -> dict[str, object]:
    """Every metric from its definition, with numbers of tasks from 1 and Python floats."""
    T, N = curves.shape[1], range(len(training))

    def acc(i: int, n: int) -> float:
        return float(curves[n, i - 1])

    end = {k: max(n for n in N if training[n] == k) for k in range(1, T + 1)}
    anytime = [sum(acc(i, n) for i in range(1, training[n] + 1)) / training[n] for n in N]
    low, worst = [NAN], [acc(1, end[1])]
    gap = [[NAN] * T for _ in range(T)]
    back = [[NAN] * T for _ in range(T)]
    for k in range(2, T + 1):
        minima = [min(acc(i, n) for n in N if end[i] < n <= end[k]) for i in range(1, k)]
        low.append(sum(minima) / (k - 1))
        worst.append(acc(k, end[k]) / k + (1 - 1 / k) * low[-1])
        for i in range(1, k):
            inside = [acc(i, n) for n in N if training[n] == k]
            before = acc(i, end[k - 1])
            gap[k - 1][i - 1] = before - min(inside)
            if min(inside) < before:
                lowest = inside.index(min(inside))
                again = [n for n in range(lowest + 1, len(inside)) if inside[n] >= before]
                back[k - 1][i - 1] = float(again[0] + 1) if again else NAN
    return {
        "average_anytime_accuracy": sum(anytime) / len(anytime),
        "min_accuracy_delange": low,
        "worst_case_accuracy_delange": worst,
        "stability_gap": gap,
        "recovery": back,
    }


@quick
@given(runs())
def test_parity_with_loops(run: tuple[Tensor, list[int]]) -> None:
    curves, training = run
    before = curves.clone()
    for name, expected in by_loops(curves, training).items():
        assert same(getattr(C, name)(curves, training), expected, 1e-12), name
    assert torch.equal(curves, before)


@quick
@given(runs(), st.integers(2, 6))
def test_windows_against_all_pairs(run: tuple[Tensor, list[int]], window: int) -> None:
    curves, training = run
    N = len(training)
    for i in range(curves.shape[1]):
        pairs = [(float(curves[m, i]), float(curves[n, i])) for m in range(N) for n in range(m, min(N, m + window))]
        falls = max(a - b for a, b in pairs) if N > 1 else NAN
        rises = max(b - a for a, b in pairs) if N > 1 else NAN
        assert same(C.windowed_forgetting(curves, window)[i], falls, 1e-12)
        assert same(C.windowed_plasticity(curves, window)[i], rises, 1e-12)


# ------------------------------------------------------------------ invariants


@quick
@given(runs())
def test_ranges_and_orderings(run: tuple[Tensor, list[int]]) -> None:
    curves, training = run
    low, worst = C.min_accuracy_delange(curves, training), C.worst_case_accuracy_delange(curves, training)
    assert ((worst >= 0) & (worst <= 1)).all() and ((low[1:] >= 0) & (low[1:] <= 1)).all() and low[0].isnan()
    fall, rise = (f(curves, 3) for f in (C.windowed_forgetting, C.windowed_plasticity))
    if len(training) > 1:
        assert ((fall >= 0) & (fall <= 1) & (rise >= 0) & (rise <= 1)).all()
        assert (C.windowed_forgetting(curves, 4) >= fall).all()  # a wider window sees every narrow one
        backwards = C.windowed_plasticity(curves.flip(0), 3)
        assert torch.equal(backwards, fall)  # a fall is a rise in reversed time
    gap, back = C.stability_gap(curves, training), C.recovery(curves, training)
    below = torch.ones_like(gap, dtype=torch.bool).tril(-1)
    assert torch.equal(gap.isnan(), ~below) and ((gap[below] >= -1) & (gap[below] <= 1)).all()
    assert (back[~back.isnan()] >= 2).all()  # the lowest point itself is the first at the earliest
    assert not (~back.isnan() & ~(gap > 0)).any()


@quick
@given(runs(), st.integers(0, 10))
def test_denser_evaluations_never_raise_a_minimum(run: tuple[Tensor, list[int]], extra: int) -> None:
    curves, training = run
    n = extra % len(training)
    row = torch.rand(1, curves.shape[1], generator=torch.Generator().manual_seed(extra), dtype=torch.float64)
    denser = torch.cat([curves[:n], row, curves[n:]])
    labels = [*training[:n], training[n], *training[n:]]
    assert (C.min_accuracy_delange(denser, labels)[1:] <= C.min_accuracy_delange(curves, training)[1:] + 1e-12).all()
    gap, denser_gap = C.stability_gap(curves, training), C.stability_gap(denser, labels)
    assert (denser_gap >= gap - 1e-12)[~gap.isnan()].all()


@quick
@given(runs(), st.floats(-0.5, 0.5))
def test_the_difficulty_of_a_task_cancels_in_falls(run: tuple[Tensor, list[int]], shift: float) -> None:
    curves, training = run
    moved = curves + shift
    for found, before in (
        (C.stability_gap(moved, training), C.stability_gap(curves, training)),
        (C.windowed_forgetting(moved, 2), C.windowed_forgetting(curves, 2)),
        (C.min_accuracy_delange(moved, training), C.min_accuracy_delange(curves, training) + shift),
        (C.average_anytime_accuracy(moved, training), C.average_anytime_accuracy(curves, training) + shift),
    ):
        assert same(found, before, 1e-12)


def test_a_learner_that_never_moves_has_no_gap() -> None:
    curves = torch.tensor([0.5, 0.7, 0.9]).expand(9, 3)
    gap = C.stability_gap(curves, TRAINING)
    assert (gap[~gap.isnan()] == 0).all() and C.recovery(curves, TRAINING).isnan().all()
    assert (C.windowed_forgetting(curves, 5) == 0).all()


# ------------------------------------------------------------------ missing cells


@pytest.mark.parametrize("cell", [(4, 0), (8, 2), (3, 1)])
def test_an_unmeasured_seen_task_makes_anytime_accuracy_nan(cell: tuple[int, int]) -> None:
    curves = CURVES.clone()
    curves[cell] = NAN
    assert math.isnan(C.average_anytime_accuracy(curves, TRAINING))


def test_a_missing_evaluation_reaches_exactly_what_reads_it() -> None:
    curves = CURVES.clone()
    curves[4, 0] = NAN  # task 1 inside task 2
    assert same(C.min_accuracy_delange(curves, TRAINING), [NAN, NAN, NAN])
    assert same(C.worst_case_accuracy_delange(curves, TRAINING), [0.90, NAN, NAN])
    gap = C.stability_gap(curves, TRAINING)
    assert gap[1, 0].isnan() and same(gap[2, :2], [0.39, 0.45])
    assert C.recovery(curves, TRAINING)[1, 0].isnan()
    assert C.windowed_forgetting(curves, 2)[0].isnan() and same(C.windowed_forgetting(curves, 2)[1], 0.45)
    curves = CURVES.clone()
    curves[8, 1] = NAN  # task 2 at the end of task 3
    assert same(C.min_accuracy_delange(curves, TRAINING), [NAN, 0.60, NAN])
    curves = CURVES.clone()
    curves[1, 0] = NAN  # inside its own training: no minimum reads it
    assert same(C.min_accuracy_delange(curves, TRAINING), [NAN, 0.60, 0.475])
    curves[5, 0] = NAN  # at the end of task 2, where the gap of task 3 starts
    assert C.stability_gap(curves, TRAINING)[2, 0].isnan()


def test_a_curve_starts_at_its_first_number() -> None:
    assert same(C.windowed_forgetting(CURVES, 2), [0.39, 0.45, 0.0])
    assert same(C.windowed_plasticity(CURVES, 2), [0.30, 0.35, 0.20])
    assert C.windowed_forgetting(CURVES[:4], 2)[1:].isnan().all()  # one number, and none
    assert C.windowed_forgetting(CURVES[:1], 2).isnan().all()


def test_tasks_to_come_are_undefined() -> None:
    assert same(C.min_accuracy_delange(CURVES[:6], TRAINING[:6]), [NAN, 0.60, NAN])
    assert same(C.worst_case_accuracy_delange(CURVES[:6], TRAINING[:6]), [0.90, 0.725, NAN])
    assert C.stability_gap(CURVES[:6], TRAINING[:6])[2].isnan().all()
    without = [0, 1, 2, 6, 7, 8]  # no evaluation while task 2 was trained
    labels = [TRAINING[n] for n in without]
    assert C.min_accuracy_delange(CURVES[without], labels)[1].isnan()
    assert C.stability_gap(CURVES[without], labels).isnan().all()


def test_plain_lists_and_half_precision_are_taken() -> None:
    assert same(C.average_anytime_accuracy(CURVES.tolist(), torch.tensor(TRAINING)), 0.718704)
    assert C.stability_gap(CURVES.half().requires_grad_(), TRAINING).dtype == torch.float64


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("function", OF_TRAINING)
def test_bad_shapes_are_refused(function: Callable[..., Tensor]) -> None:
    for curves in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 2, 2)):
        with pytest.raises(InputError, match=r"curves must have shape \(evaluations, tasks\)"):
            function(curves, [1, 2])
    with pytest.raises(InputError, match="curves must hold numbers in rows of one length"):
        function([[0.1, 0.2], [0.3]], [1, 2])
    with pytest.raises(InputError, match="training must be a vector with 9 entries"):
        function(CURVES, [1, 2])
    with pytest.raises(InputError, match="training holds 4, but curves has 3 tasks"):
        function(CURVES, [4] * 9)
    with pytest.raises(InputError, match="training must not hold an entry below 1, got 0"):
        function(CURVES, [0] * 9)
    for training in ([*TRAINING[:8], 2], [*TRAINING[:8], NAN], [1.5] * 9):
        with pytest.raises(InputError, match="whole numbers that never fall: give the evaluations in order"):
            function(CURVES, training)


@pytest.mark.parametrize("function", [C.windowed_forgetting, C.windowed_plasticity])
def test_a_window_without_a_pair_is_refused(function: Callable[..., Tensor]) -> None:
    with pytest.raises(InputError, match="window=1 holds no two evaluations: use at least 2"):
        function(CURVES, 1)
    with pytest.raises(InputError, match="curves must have shape"):
        function(torch.zeros(3), 2)
