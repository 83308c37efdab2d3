"""Metrics against experts and other references, and composite scores: worked numbers, plain loops, invariants."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl.errors import InputError
from cl.metrics import against_experts as M
from cl.metrics import transfer
from cl.metrics.composite import hars_kore
from cl.metrics.transfer import worked_example

NAN = float("nan")
quick = settings(deadline=None, max_examples=40)
unit = st.floats(0, 1)

EXPERTS = [0.88, 0.86, 0.83]
WORLD = [[0.0, 0.6, 0.9], [0.2, 0.7, 0.8], [0.3, 0.5, 0.9]]
WORLD_EXPERTS = [[0.0, 0.6, 0.9], [0.0, 0.5, 0.8], [0.1, 0.6, 0.8]]
LIBERO = [[0.0, 0.4, 0.7, 0.9, 0.8], [0.1, 0.5, 0.9, 0.7, 0.9], [0.2, 0.3, 0.5, 0.6, 0.8]]
LIBERO_R = [[NAN] * 3, [0.9, NAN, NAN], [0.6, 0.9, NAN], [0.5, 0.7, 0.8]]
LL2 = [0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.84, 0.86, 0.85, 0.85]
STE2 = [0.2, 0.35, 0.5, 0.55, 0.6, 0.7, 0.8, 0.84, 0.86, 0.88]


def same(found: Tensor, expected: object, tol: float = 1e-6) -> bool:
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == wanted.shape and found.dtype == torch.float64 and found.device.type == "cpu"
    return torch.allclose(found, wanted, rtol=0, atol=tol, equal_nan=True)


def square(num_tasks: int, diagonal: list[float]) -> Tensor:
    """A transfer matrix of which the diagonal R[j,j] alone is measured."""
    R = torch.full((num_tasks + 1, num_tasks), NAN, dtype=torch.float64)
    R[1:].fill_diagonal_(0)
    R[1:] += torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    return R


@st.composite
def tables(draw: st.DrawFn, min_tasks: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """R (T + 1, T), curves (T, E) and experts' curves (T, E), on a grid so that ties are common."""
    T, E = draw(st.integers(min_tasks, 5)), draw(st.integers(1, 6))
    shapes = ((T + 1, T), (T, E), (T, E))
    drawn = [draw(st.lists(st.integers(0, 8), min_size=a * b, max_size=a * b)) for a, b in shapes]
    R, curves, experts = (torch.tensor(v, dtype=torch.float64).view(s) / 8 for v, s in zip(drawn, shapes, strict=True))
    return R, curves, experts


# ------------------------------------------------------------------ worked numbers (METRICS, secs. 8, 10, 12, 13, 13b)


def test_experts() -> None:
    assert same(M.fwt_expert(worked_example(), EXPERTS), -0.02)
    assert same(M.fwt_expert(worked_example(), EXPERTS, from_first=True), -0.006667)


def test_continual_world() -> None:
    gains = M.fwt_continual_world(WORLD, WORLD_EXPERTS)
    assert same(gains, [0.0, 0.235294, 0.133333])
    assert same(gains.mean(), 0.122876) and same(gains[1:].mean(), 0.184314)
    assert same(transfer.forgetting_continual_world(worked_example()), 0.01)


def test_libero() -> None:
    forward, backward, area = M.fwt_libero(LIBERO), M.nbt_libero(LIBERO_R), M.auc_libero(LIBERO_R, LIBERO)
    assert same(forward, [0.58, 0.66, 0.48]) and same(forward.mean(), 0.573333)
    assert same(backward, [0.35, 0.20, 0.0]) and same(backward.mean(), 0.183333)
    assert same(backward[:-1].mean(), 0.275)  # with the divisor K - 1
    assert same(area, [0.56, 0.68, 0.48]) and same(area.mean(), 0.573333)


def test_jump_start_and_time_to_threshold() -> None:
    assert same(M.jump_start([LL2]), [0.3]) and same(M.jump_start([LL2], experts=[STE2]), [0.1])
    assert same(M.time_to_threshold(LL2, STE2, threshold=0.80), 6 / 5)


def test_relative_to_another_method() -> None:
    ours, theirs = square(3, [0.90, 0.85, 0.80]), square(3, [0.88, 0.85, 0.76])
    assert same(M.fwt_relative(ours, theirs), 0.02)


def test_retention_and_adaptability() -> None:
    assert same(M.rai_duet([0.54, 0.44], [0.60, 0.50], [0.30, 0.24], [0.50, 0.48]), 0.72)
    assert same(M.rai_duet([0.54, 0.44], [0.60, 0.50], [0.5], [0.5]), (0.89 + 1) / 2)
    assert same(M.rai_duet([0.6], [0.6], [0.30, 0.24], [0.50, 0.48]), (1 + 0.55) / 2)


def test_few_shots() -> None:
    P = [[NAN, 0.33, 0.30], [NAN, 0.55, NAN], [NAN, NAN, 0.52], [NAN, NAN, NAN]]
    assert same(M.few_shot_transfer(P), 0.22)


def test_harmonic_score() -> None:
    assert same(hars_kore(gain=150, change=-5), 73.548387)


# ------------------------------------------------------------------ parity with plain loops


@quick
@given(tables())
def test_parity_with_loops(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    R, curves, experts = drawn
    K, E = curves.shape
    copies = [part.clone() for part in drawn]
    forward, backward, area, world = [], [], [], []
    for k in range(1, K + 1):
        c = curves[k - 1].tolist()
        star = c.index(max(c))
        held = [c[star] if e >= star else c[e] for e in range(E)]
        forward.append(sum(held) / E)
        later = [float(R[tau, k - 1]) for tau in range(k + 1, K + 1)]
        own = float(R[k, k - 1])
        backward.append(sum(own - v for v in later) / len(later) if later else 0.0)
        area.append((forward[-1] + sum(later)) / (K - k + 1))
        mean, reference = sum(c) / E, sum(experts[k - 1].tolist()) / E
        world.append((mean - reference) / (1 - reference) if reference < 1 else NAN)
    assert same(M.fwt_libero(curves), forward, 1e-12)
    assert same(M.nbt_libero(R), backward if K > 1 else [NAN], 1e-12)
    assert same(M.auc_libero(R, curves), area, 1e-12)
    assert same(M.fwt_continual_world(curves, experts), world, 1e-12)
    gains = [float(R[j, j - 1] - experts[j - 1, 0]) for j in range(1, K + 1)]
    assert same(M.fwt_expert(R, experts[:, 0], from_first=True), sum(gains) / K, 1e-12)
    assert same(M.fwt_expert(R, experts[:, 0]), sum(gains[1:]) / (K - 1) if K > 1 else NAN, 1e-12)
    assert all(torch.equal(a, b) for a, b in zip(drawn, copies, strict=True))


@quick
@given(st.lists(unit, min_size=1, max_size=8), st.lists(unit, min_size=1, max_size=8), unit)
def test_time_to_threshold_against_a_search(own: list[float], expert: list[float], threshold: float) -> None:
    def first(curve: list[float]) -> float:
        return next((float(n) for n, value in enumerate(curve) if value >= threshold), NAN)

    n, n_expert = first(own), first(expert)
    expected = NAN if math.isnan(n) or n == 0 else n_expert / n
    assert same(M.time_to_threshold(own, expert, threshold), expected, 1e-12)


# ------------------------------------------------------------------ invariants


@quick
@given(tables(min_tasks=2))
def test_ranges_and_signs(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    R, curves, experts = drawn
    forward, backward, area = M.fwt_libero(curves), M.nbt_libero(R), M.auc_libero(R, curves)
    assert ((forward >= curves.mean(1) - 1e-12) & (forward <= curves.amax(1) + 1e-12)).all()
    assert ((backward.abs() <= 1) & (area >= 0) & (area <= 1)).all() and backward[-1] == 0
    world = M.fwt_continual_world(curves, experts)
    assert (world[~world.isnan()] <= 1).all()
    swapped = M.fwt_continual_world(experts, curves)
    both = ~world.isnan() & ~swapped.isnan()
    assert (world[both].sign() == -swapped[both].sign()).all()
    assert M.fwt_continual_world(curves, curves)[curves.mean(1) < 1].eq(0).all()
    for value in (M.fwt_expert(R, experts[:, 0]), M.jump_start(curves, experts), M.fwt_relative(R, R.flip(0))):
        assert (value.abs() <= 1).all()


@quick
@given(tables(min_tasks=2))
def test_identities(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    R, curves, _ = drawn
    diagonal = R[1:].diagonal()
    assert same(M.fwt_expert(R, diagonal), 0.0) and same(M.fwt_relative(R, R), 0.0)
    assert same(M.fwt_relative(R, R - 0.25), 0.25, 1e-12)
    ours, theirs = R, R.flip(1)
    assert same(M.fwt_relative(ours, theirs), -M.fwt_relative(theirs, ours), 1e-12)
    assert same(M.fwt_relative(ours, theirs), M.fwt_expert(ours, theirs[1:].diagonal(), from_first=True), 1e-12)
    # with two tasks there is one pair, which all backward transfers agree on
    two = R[:3, :2]
    assert same(M.nbt_libero(two)[0], -transfer.bwt_gem(two), 1e-12)
    assert same(M.few_shot_transfer(R), transfer.fwt_gem(R))
    assert same(M.jump_start(curves, curves), [0.0] * len(curves))
    constant = curves[:, :1].expand_as(curves)
    assert same(M.fwt_libero(constant), constant[:, 0], 1e-12)


@quick
@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=5), st.lists(st.tuples(unit, unit), min_size=1, max_size=5))
def test_retention_stays_in_the_unit_interval(old: list[tuple[float, float]], new: list[tuple[float, float]]) -> None:
    now, before = zip(*old, strict=True)
    unseen, reference = zip(*new, strict=True)
    value = M.rai_duet(now, before, unseen, reference)
    if 0 in before or 0 in reference:
        assert value.isnan()
        return
    kept = sum(min(1.0, a / b) for a, b in old) / len(old)
    reached = sum(min(1.0, a / b) for a, b in new) / len(new)
    assert same(value, (kept + reached) / 2, 1e-12) and 0 <= value <= 1
    assert same(M.rai_duet(before, before, reference, reference), 1.0)


@quick
@given(st.floats(0, 1e4), st.floats(-100, 0))
def test_the_harmonic_score(gain: float, change: float) -> None:
    value = hars_kore(gain, change)
    adapted, retained = 100 * gain / (gain + 100), change + 100
    if adapted + retained == 0:
        assert value.isnan()
    else:
        assert same(value, 2 * adapted * retained / (adapted + retained), 1e-9) and 0 <= value <= 100
        assert value <= 2 * min(adapted, retained) + 1e-9  # a harmonic mean is near the smaller
        assert hars_kore(gain + 1, change) >= value - 1e-9


@pytest.mark.parametrize(("gain", "change"), [(-1, -5), (150, -101), (0, -100), (NAN, -5), (150, NAN)])
def test_the_harmonic_score_is_undefined(gain: float, change: float) -> None:
    assert hars_kore(gain, change).isnan()


# ------------------------------------------------------------------ undefined and missing


def test_one_task_alone() -> None:
    R = [[0.1], [0.9]]
    assert M.fwt_expert(R, [0.8]).isnan() and same(M.fwt_expert(R, [0.8], from_first=True), 0.1)
    assert M.nbt_libero(R).isnan().all() and M.few_shot_transfer(R).isnan()
    assert same(M.auc_libero(R, [[0.5, 0.9]]), [0.7])


def test_a_perfect_expert_leaves_nothing_to_gain() -> None:
    gains = M.fwt_continual_world([[0.5, 0.5], [0.5, 0.5]], [[1.0, 1.0], [0.0, 0.5]])
    assert gains[0].isnan() and same(gains[1], 0.25 / 0.75)
    assert (
        M.fwt_continual_world([[0.5]], [[1 - 1e-7]]).isnan() and not M.fwt_continual_world([[0.5]], [[0.999]]).isnan()
    )


def test_a_missing_number_reaches_exactly_what_reads_it() -> None:
    R = worked_example()
    R[0] = NAN  # no reference reads the untrained learner
    R[1, 1:] = NAN  # nor a task that is to come
    R[2, 2] = NAN
    curves = [[0.5, 0.9], [0.5, 0.9], [0.5, NAN]]
    assert same(M.fwt_expert(R, EXPERTS), -0.02)
    assert not M.nbt_libero(R).isnan().any()
    assert M.fwt_libero(curves)[2].isnan() and not M.fwt_libero(curves)[:2].isnan().any()
    assert M.auc_libero(R, curves).isnan().tolist() == [False, False, True]
    assert same(M.jump_start(curves), [0.5] * 3)
    assert M.fwt_continual_world(curves, [[0.1, 0.2]] * 3).isnan().tolist() == [False, False, True]
    assert M.fwt_expert(R, [0.88, NAN, 0.83]).isnan() and same(M.fwt_expert(R, [NAN, 0.86, 0.83]), -0.02)
    R[3, 1] = NAN
    assert M.nbt_libero(R).isnan().tolist() == [False, True, False]
    assert M.rai_duet([NAN], [0.5], [0.5], [0.5]).isnan()
    assert M.time_to_threshold([0.1, NAN, 0.9], [0.1, 0.9], 0.8).isnan()
    assert same(M.time_to_threshold([0.1, 0.9, NAN], [0.1, 0.9], 0.8), 1.0)  # nothing is read after the threshold


@pytest.mark.parametrize(
    ("own", "expert"), [([0.1, 0.2], [0.1, 0.9]), ([0.1, 0.9], [0.1, 0.2]), ([0.9, 0.9], [0.1, 0.9])]
)
def test_no_time_to_a_threshold_that_is_never_or_at_once_reached(own: list[float], expert: list[float]) -> None:
    assert M.time_to_threshold(own, expert, 0.8).isnan()


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: M.fwt_expert(torch.zeros(3, 3), [1, 1, 1]), r"has shape \(T \+ 1, T\), got \(3, 3\)"),
        (lambda: M.fwt_expert(worked_example(), [1, 1]), "experts must be a vector with 3 entries"),
        (lambda: M.fwt_continual_world(torch.zeros(2), [[0.1]]), r"curves must have shape \(tasks, points\)"),
        (lambda: M.fwt_continual_world(WORLD, WORLD[:2]), r"experts must have shape \(tasks, points\) = \(3, points\)"),
        (lambda: M.fwt_libero([[]]), "curves must have shape"),
        (lambda: M.nbt_libero(torch.zeros(3)), r"has shape \(T \+ 1, T\)"),
        (lambda: M.auc_libero(worked_example(), LIBERO[:2]), r"\(3, points\), got \(2, 5\)"),
        (lambda: M.jump_start(LIBERO, LIBERO[:2]), r"\(3, points\), got \(2, 5\)"),
        (lambda: M.time_to_threshold([], [0.1], 0.8), "curve must be a vector with at least one entry"),
        (lambda: M.time_to_threshold([0.1], torch.zeros(1, 1), 0.8), r"expert must be a vector .* got shape \(1, 1\)"),
        (lambda: M.fwt_relative(worked_example(), torch.zeros(3, 2)), "reference must be a vector with 3 entries"),
        (lambda: M.fwt_relative(worked_example(), torch.zeros(3, 3)), "The reference's transfer matrix has shape"),
        (lambda: M.rai_duet([0.5], [0.5, 0.5], [0.5], [0.5]), "now must be a vector with 2 entries"),
        (lambda: M.rai_duet([0.5], [0.5], [0.5], [-0.5]), "reference must not hold an entry below 0, got -0.5"),
        (lambda: M.few_shot_transfer(torch.zeros(2, 2)), r"has shape \(T \+ 1, T\)"),
        (lambda: hars_kore("much", 0), "gain must hold numbers"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
