"""The transfer matrix: published examples, closed forms, parity with plain loops, and the state of the module."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cl.errors import InputError
from cl.metrics import transfer
from cl.metrics.transfer import LIBRARY_VARIANTS, SCALARS, TransferMatrix, worked_example

ALL = SCALARS | LIBRARY_VARIANTS
NAN = float("nan")
quick = settings(deadline=None, max_examples=25)


def close(a: Tensor | float, b: float, tol: float = 1e-6) -> bool:
    return (math.isnan(float(a)) and math.isnan(b)) or abs(float(a) - b) < tol


@st.composite
def matrices(draw: st.DrawFn, min_tasks: int = 1, max_tasks: int = 6) -> Tensor:
    num_tasks = draw(st.integers(min_tasks, max_tasks))
    size = (num_tasks + 1) * num_tasks
    values = draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float64).reshape(num_tasks + 1, num_tasks)


# ------------------------------------------------------------------ published examples

EXAMPLES = {
    "average_accuracy": 0.84,
    "bwt_gem": -0.015,
    "fwt_gem": 0.20,
    "accuracy_diaz": 0.868333,
    "bwt_diaz": 0.003333,
    "bwt_plus_diaz": 0.003333,
    "rem_diaz": 1.0,
    "fwt_diaz": 0.383333,
    "fwt_continuum": 0.425,
    "forgetting_chaudhry": 0.035,
    "learning_accuracy_riemer": 0.85,
    "bti_riemer": -0.01,
    "average_incremental_accuracy": 0.878333,
    "transfer_zscl": 0.3875,
    "average_zscl": 0.706667,
    "forgetting_continual_world": 0.01,
    "curriculum_effectiveness": 1.599391,
    "bwt_gem_code": -0.01,
    "fwt_gem_code": 0.133333,
    "bwt_libcontinual": -0.02,
    "transfer_mammoth": 0.40,
    "forgetting_avalanche": 0.015,
    "forgetting_mammoth": 0.05,
    "forgetting_online_cl": 0.033333,
    "forgetting_libcontinual": 0.03,
}


def test_every_scalar_has_a_published_example() -> None:
    assert EXAMPLES.keys() == ALL.keys()


@pytest.mark.parametrize("name", ALL)
def test_published_example(name: str) -> None:
    value = ALL[name].function(worked_example())
    assert value.shape == () and value.dtype == torch.float64 and value.device.type == "cpu"
    assert abs(value.item() - EXAMPLES[name]) < 1e-6


def test_forgetting_after_two_tasks_is_negative() -> None:
    assert close(transfer.forgetting_chaudhry(worked_example()[:3, :2]), -0.04)


def test_incremental_accuracies_of_the_example() -> None:
    R = worked_example()
    assert [round(transfer.average_accuracy(R[: k + 1, :k]).item(), 6) for k in (1, 2, 3)] == [0.9, 0.895, 0.84]


def test_intransigence() -> None:
    R, joint = worked_example(), torch.tensor([0.92, 0.89, 0.86], dtype=torch.float64)
    assert close(transfer.intransigence_chaudhry(R, joint), 0.04)
    cut = [transfer.intransigence_chaudhry(R[: k + 1, :k], joint[:k]).item() * k for k in (1, 2, 3)]
    assert [round(b - a, 6) for a, b in zip([0.0, *cut], cut, strict=False)] == [0.02, 0.04, 0.06]
    assert math.isnan(transfer.intransigence_chaudhry(R, [0.9, NAN, 0.9]))
    with pytest.raises(InputError, match="joint must be a vector with 3 entries"):
        transfer.intransigence_chaudhry(R, [0.9, 0.9])


@pytest.mark.parametrize(("final", "lost", "value"), [(0.6, 0.3, 1.016949), (0.6, 0.6, 0.882353), (0.6, 0.0, 1.2)])
def test_curriculum_effectiveness_of_two_numbers(final: float, lost: float, value: float) -> None:
    R = torch.tensor([[NAN, NAN], [0.3 + lost, NAN], [0.3, 2 * final - 0.3]], dtype=torch.float64)
    assert close(transfer.curriculum_effectiveness(R), value)
    if lost:
        assert close(transfer.curriculum_effectiveness(R), 2 / (1 / final + lost), 1e-12)  # harmonic mean of a and 1/D


def test_curriculum_effectiveness_without_a_denominator_is_nan() -> None:
    assert math.isnan(transfer.curriculum_effectiveness(torch.tensor([[NAN, NAN], [0.0, NAN], [1.0, 1.0]])))


def test_zscl_weighs_tasks_and_mammoth_weighs_moments() -> None:
    R = (
        worked_example()
    )  # columns 2 and 3 are [.40] and [.30, .45] above the diagonal, rows 1 and 2 [.40, .30] and [.45]
    assert close(transfer.transfer_zscl(R), (0.40 + 0.375) / 2) and close(
        transfer.transfer_mammoth(R), (0.35 + 0.45) / 2
    )
    columns = [sum(float(R[i, j]) for i in (1, 2, 3)) / 3 for j in range(3)]
    assert [round(column, 6) for column in columns] == [0.893333, 0.71, 0.516667]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transfer.average_accuracy(worked_example(), [1, 1]), "num_samples must be a vector with 3 entries"),
        (lambda: transfer.average_accuracy(worked_example(), [1, 1, 0]), "num_samples must not hold an entry below 1"),
    ],
)
def test_bad_vectors_are_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


# ------------------------------------------------------------------ parity with plain loops over 1-based tasks


def loops(R: Tensor) -> dict[str, float]:
    """Every scalar for T >= 3, written from the definitions with sums over Python floats."""
    T = R.shape[1]

    def r(i: int, j: int) -> float:
        return float(R[i, j - 1])

    def best(j: int, stop: int) -> float:
        return max(r(l, j) for l in range(j, stop + 1))  # noqa: E741

    tasks, old = range(1, T + 1), range(1, T)
    pairs = [(i, j) for i in tasks for j in tasks if i > j]
    bwt = sum(r(i, j) - r(j, j) for i, j in pairs) / len(pairs)
    gem = sum(r(T, j) - r(j, j) for j in old)
    zero = sum(r(j - 1, j) - r(0, j) for j in range(2, T + 1))
    peak = sum(best(j, T) - r(T, j) for j in old)
    last = sum(r(T, j) for j in tasks) / T
    return {
        "average_accuracy": last,
        "bwt_gem": gem / (T - 1),
        "fwt_gem": zero / (T - 1),
        "accuracy_diaz": sum(r(i, j) for i in tasks for j in tasks if i >= j) / (T * (T + 1) / 2),
        "bwt_diaz": bwt,
        "bwt_plus_diaz": max(0.0, bwt),
        "rem_diaz": 1 - abs(min(0.0, bwt)),
        "fwt_diaz": sum(r(j, i) for i, j in pairs) / len(pairs),
        "fwt_continuum": sum(r(j - 1, j) for j in range(2, T + 1)) / (T - 1),
        "forgetting_chaudhry": sum(best(j, T - 1) - r(T, j) for j in old) / (T - 1),
        "learning_accuracy_riemer": sum(r(j, j) for j in tasks) / T,
        "bti_riemer": sum(r(T, j) - r(j, j) for j in tasks) / T,
        "average_incremental_accuracy": sum(sum(r(k, j) for j in range(1, k + 1)) / k for k in tasks) / T,
        "transfer_zscl": sum(sum(r(i, j) for i in range(1, j)) / (j - 1) for j in range(2, T + 1)) / (T - 1),
        "average_zscl": sum(r(i, j) for i in tasks for j in tasks) / T**2,
        "forgetting_continual_world": sum(r(j, j) - r(T, j) for j in tasks) / T,
        "curriculum_effectiveness": 2 * last / ((r(1, 1) - r(T, 1)) * last + 1),
        "bwt_gem_code": gem / T,
        "fwt_gem_code": zero / T,
        "bwt_libcontinual": sum(r(i, j) - r(j, j) for i, j in pairs if i - j >= 2) / len(pairs),
        "transfer_mammoth": sum(sum(r(i, j) for j in range(i + 1, T + 1)) / (T - i) for i in old) / (T - 1),
        "forgetting_avalanche": -gem / (T - 1),
        "forgetting_mammoth": peak / (T - 1),
        "forgetting_online_cl": peak / T,
        "forgetting_libcontinual": sum(r(j, j) - r(T, j) for j in range(1, T - 1)) / (T - 1),
    }


@quick
@given(matrices(min_tasks=3))
def test_parity_with_loops(R: Tensor) -> None:
    assume(R[1, 0] > 0.01)  # else the denominator of curriculum effectiveness may vanish
    expected = loops(R)
    before = R.clone()
    for name, scalar in ALL.items():
        assert close(scalar.function(R), expected[name], 1e-12), name
    assert torch.equal(R, before)


@quick
@given(matrices(min_tasks=2))
def test_forgetting_from_the_first_row(R: Tensor) -> None:
    T = R.shape[1]
    drops = [float(R[1:T, j].max() - R[T, j]) for j in range(T - 1)]
    assert close(transfer.forgetting_chaudhry(R, zero_shot=True), sum(drops) / (T - 1), 1e-12)
    assert transfer.forgetting_chaudhry(R, zero_shot=True) >= transfer.forgetting_chaudhry(R) - 1e-12


def test_forgetting_from_the_first_row_differs_where_zero_shot_beats_trained() -> None:
    R = worked_example()
    R[1, 1] = 0.95
    assert close(transfer.forgetting_chaudhry(R), 0.035)
    assert close(transfer.forgetting_chaudhry(R, zero_shot=True), (0.10 + 0.07) / 2)


@quick
@given(matrices(), st.lists(st.integers(1, 1000), min_size=6, max_size=6))
def test_sample_weights(R: Tensor, sizes: list[int]) -> None:
    T = R.shape[1]
    sizes = sizes[:T]
    hits = [[float(R[k, j]) * sizes[j] for j in range(k)] for k in range(1, T + 1)]
    pooled = [sum(row) / sum(sizes[: len(row)]) for row in hits]
    assert close(transfer.average_accuracy(R, sizes), pooled[-1], 1e-12)
    assert close(transfer.average_incremental_accuracy(R, sizes), sum(pooled) / T, 1e-12)
    assert close(transfer.average_accuracy(R, [7] * T), transfer.average_accuracy(R).item(), 1e-12)


# ------------------------------------------------------------------ invariants


@quick
@given(matrices(min_tasks=2))
def test_identities_between_scalars(R: Tensor) -> None:
    T = R.shape[1]
    value = {name: scalar.function(R).item() for name, scalar in ALL.items()}
    first, last = R[1:].diagonal()[:-1], R[-1, :-1]
    assert close(value["bwt_gem"], -(first - last).mean().item(), 1e-12)
    assert close(value["bwt_plus_diaz"] - (1 - value["rem_diaz"]), value["bwt_diaz"], 1e-12)
    assert close(value["bti_riemer"], value["average_accuracy"] - value["learning_accuracy_riemer"], 1e-12)
    assert close(value["bti_riemer"], value["bwt_gem"] * (T - 1) / T, 1e-12)
    assert close(value["forgetting_continual_world"], -value["bti_riemer"], 1e-12)
    assert close(value["fwt_continuum"] - R[0, 1:].mean().item(), value["fwt_gem"], 1e-12)
    assert value["forgetting_chaudhry"] >= -value["bwt_gem"] - 1e-12
    assert value["forgetting_mammoth"] >= max(0.0, value["forgetting_chaudhry"]) - 1e-12


@quick
@given(matrices(min_tasks=3))
def test_values_stay_in_the_stated_range(R: Tensor) -> None:
    assume(R[1, 0] > 0.01)
    for name, scalar in ALL.items():
        low, high = map(float, scalar.scale[scalar.scale.index("[") + 1 : -1].split(","))
        assert low - 1e-12 <= scalar.function(R).item() <= high + 1e-12, name


DIFFERENCES = [n for n in ALL if n.startswith(("bwt_", "bti_", "forgetting_")) or n in ("fwt_gem", "fwt_gem_code")]


@quick
@given(matrices(min_tasks=3), st.lists(st.floats(-0.5, 0.5), min_size=6, max_size=6))
def test_the_difficulty_of_a_task_cancels_in_transfer(R: Tensor, shift: list[float]) -> None:
    moved = R + torch.tensor(shift, dtype=torch.float64)[: R.shape[1]]
    for name in DIFFERENCES:
        assert close(ALL[name].function(moved), ALL[name].function(R).item(), 1e-12), name
    for matrix in (transfer.backward_transfer, transfer.forward_transfer, transfer.step_effect):
        torch.testing.assert_close(matrix(moved), matrix(R), equal_nan=True)


@quick
@given(matrices(min_tasks=3))
def test_a_learner_that_never_moves_has_no_transfer(R: Tensor) -> None:
    constant = R[:1].expand_as(R)
    for name in DIFFERENCES:
        assert ALL[name].function(constant).item() == 0.0, name
    for matrix in (transfer.backward_transfer, transfer.forward_transfer, transfer.step_effect):
        entries = matrix(constant)
        assert (entries[~entries.isnan()] == 0).all()
    assert ALL["rem_diaz"].function(constant).item() == 1.0


@quick
@given(matrices(min_tasks=2), st.permutations(range(6)))
def test_the_order_of_the_columns_is_free_where_no_diagonal_is_read(R: Tensor, permutation: list[int]) -> None:
    order = [j for j in permutation if j < R.shape[1]]
    assert close(transfer.average_accuracy(R[:, order]), transfer.average_accuracy(R).item(), 1e-12)
    torch.testing.assert_close(transfer.step_effect(R[:, order]), transfer.step_effect(R)[:, order])


@pytest.mark.parametrize("name", ALL)
def test_the_sign_is_the_stated_one(name: str) -> None:
    """A learner that keeps and foresees more scores better, one that decays scores worse."""
    T = 4
    trained = torch.ones(T + 1, T).tril(-1).bool()
    age = (torch.arange(T + 1)[:, None] - torch.arange(T) - 1).clamp(min=0)
    good = torch.where(trained, 0.9 - 0.01 * age, torch.tensor(0.5))
    bad = torch.where(trained, 0.9 - 0.2 * age - 0.01, torch.tensor(0.2))
    good[0] = bad[0] = 0.1
    if name == "bwt_plus_diaz":
        good += 0.05 * age
    difference = ALL[name].function(good) - ALL[name].function(bad)
    assert (difference > 0) if ALL[name].higher_is_better else (difference < 0)


# ------------------------------------------------------------------ NaN


def reads(name: str, T: int = 4) -> set[tuple[int, int]]:
    """The cells that a scalar reads: those whose loss changes it."""
    torch.manual_seed(0)
    R = torch.rand(T + 1, T, dtype=torch.float64)
    found = set()
    for i in range(T + 1):
        for j in range(T):
            hole = R.clone()
            hole[i, j] = NAN
            value = ALL[name].function(hole).item()
            if math.isnan(value):
                found.add((i, j + 1))
            else:
                assert value == ALL[name].function(R).item()  # a cell either counts or does not
    return found


CELLS = [(i, j) for i in range(5) for j in range(1, 5)]
LAST, DIAGONAL, ABOVE = (
    {(4, j) for j in range(1, 5)},
    {(j, j) for j in range(1, 5)},
    {(j - 1, j) for j in range(2, 5)},
)
BASE, LOWER = {(0, j) for j in range(2, 5)}, {(i, j) for i, j in CELLS if i >= j}
OLD = {(i, j) for i, j in LAST | DIAGONAL if j < 4}
OLD_LOWER = {(i, j) for i, j in LOWER if j < 4}
NEEDS = {
    "average_accuracy": LAST,
    "bwt_gem": OLD,
    "fwt_gem": ABOVE | BASE,
    "accuracy_diaz": LOWER,
    "bwt_diaz": OLD_LOWER,
    "bwt_plus_diaz": OLD_LOWER,
    "rem_diaz": OLD_LOWER,
    "fwt_diaz": {(i, j) for i, j in CELLS if 1 <= i < j},
    "fwt_continuum": ABOVE,
    "forgetting_chaudhry": OLD_LOWER,
    "learning_accuracy_riemer": DIAGONAL,
    "bti_riemer": OLD,
    "average_incremental_accuracy": LOWER,
    "transfer_zscl": {(i, j) for i, j in CELLS if 1 <= i < j},
    "average_zscl": {(i, j) for i, j in CELLS if i >= 1},
    "forgetting_continual_world": OLD,
    "curriculum_effectiveness": LAST | {(1, 1)},
    "bwt_gem_code": OLD,
    "fwt_gem_code": ABOVE | BASE,
    "bwt_libcontinual": {(1, 1), (3, 1), (4, 1), (2, 2), (4, 2)},
    "transfer_mammoth": {(i, j) for i, j in CELLS if 1 <= i < j},
    "forgetting_avalanche": OLD,
    "forgetting_mammoth": OLD_LOWER,
    "forgetting_online_cl": OLD_LOWER,
    "forgetting_libcontinual": {(1, 1), (2, 2), (4, 1), (4, 2)},
}


@pytest.mark.parametrize("name", ALL)
def test_nan_in_a_needed_cell_and_only_there(name: str) -> None:
    assert reads(name) == NEEDS[name]


@pytest.mark.parametrize("name", ALL)
def test_the_caveat_belongs_to_what_reads_unseen_tasks(name: str) -> None:
    unseen = any(1 <= i < j for i, j in reads(name))
    assert (transfer.caveat(name, "class") is not None) == unseen
    assert transfer.caveat(name, "task") is None and transfer.caveat(name, "domain") is None


def test_caveat_of_a_matrix_and_of_a_wrong_name() -> None:
    assert transfer.caveat("backward_transfer", "class") is None
    text = transfer.caveat("forward_transfer", "class")
    assert text is not None and "no trained output" in text
    assert transfer.caveat("step_effect", "class") == text
    with pytest.raises(InputError, match="did you mean 'fwt_gem'"):
        transfer.caveat("fwt_gme", "class")


def test_zero_shot_forgetting_reads_the_rows_before_learning() -> None:
    R = worked_example()
    R[1, 1] = NAN
    assert math.isnan(transfer.forgetting_chaudhry(R, zero_shot=True))
    assert close(transfer.forgetting_chaudhry(R), 0.035)


@pytest.mark.parametrize("name", ALL)
def test_one_task_has_accuracy_but_no_transfer(name: str) -> None:
    value = ALL[name].function(torch.tensor([[0.1], [0.9]], dtype=torch.float64)).item()
    accuracies = {
        "average_accuracy",
        "accuracy_diaz",
        "learning_accuracy_riemer",
        "average_incremental_accuracy",
        "average_zscl",
    }
    assert close(value, 0.9 if name in accuracies else NAN)


def test_one_task_matrices_and_zero_shot_forgetting() -> None:
    R = torch.tensor([[0.1], [0.9]], dtype=torch.float64)
    assert transfer.backward_transfer(R).isnan().all() and transfer.forward_transfer(R).isnan().all()
    assert close(transfer.step_effect(R).item(), 0.8)
    assert math.isnan(transfer.forgetting_chaudhry(R, zero_shot=True))


@pytest.mark.parametrize("name", ["forgetting_libcontinual", "bwt_libcontinual"])
def test_libcontinual_variants_need_three_tasks(name: str) -> None:
    assert math.isnan(ALL[name].function(worked_example()[:3, :2]))


@pytest.mark.parametrize("name", ALL)
def test_everything_unmeasured_is_nan(name: str) -> None:
    assert math.isnan(ALL[name].function(torch.full((4, 3), NAN)))


@pytest.mark.parametrize("shape", [(3, 3), (3,), (1, 0), (3, 4), (5, 3)])
def test_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    for function in (*[s.function for s in ALL.values()], transfer.step_effect, transfer.backward_transfer):
        with pytest.raises(InputError, match="shape \\(T \\+ 1, T\\), got"):
            function(torch.zeros(shape))


def test_the_input_may_require_grad_and_be_half_precision() -> None:
    R = worked_example().requires_grad_()
    assert not transfer.bwt_gem(R).requires_grad
    assert transfer.bwt_gem(worked_example().half()).dtype == torch.float64


# ------------------------------------------------------------------ matrices


@quick
@given(matrices(min_tasks=2))
def test_matrices_against_their_definitions(R: Tensor) -> None:
    T, before = R.shape[1], R.clone()
    B, F, E = transfer.backward_transfer(R), transfer.forward_transfer(R), transfer.step_effect(R)
    assert torch.equal(R, before)
    assert B.shape == F.shape == E.shape == (T, T)
    for i in range(1, T + 1):
        for j in range(1, T + 1):
            cell = float(R[i, j - 1])
            assert close(B[i - 1, j - 1], cell - float(R[j, j - 1]) if i > j else NAN, 1e-12)
            assert close(F[i - 1, j - 1], cell - float(R[0, j - 1]) if i < j else NAN, 1e-12)
            assert close(E[i - 1, j - 1], cell - float(R[i - 1, j - 1]), 1e-12)


@quick
@given(matrices(min_tasks=2))
def test_matrices_and_scalars_agree(R: Tensor) -> None:
    B, F, E = transfer.backward_transfer(R), transfer.forward_transfer(R), transfer.step_effect(R)
    assert close(B[-1, :-1].mean(), transfer.bwt_gem(R).item(), 1e-12)
    assert close(B.nanmean(), transfer.bwt_diaz(R).item(), 1e-12)
    assert close(F.diagonal(1).mean(), transfer.fwt_gem(R).item(), 1e-12)
    torch.testing.assert_close(E.sum(0), R[-1] - R[0])  # the steps telescope
    last = [E[j + 1 :, j].sum() for j in range(R.shape[1] - 1)]
    torch.testing.assert_close(torch.stack(last), B[-1, :-1])


def test_the_sign_of_a_step() -> None:
    E = transfer.step_effect(worked_example())
    assert close(E[2, 0], -0.10)  # learning task 3 hurt task 1 ...
    assert close(E[1, 0], 0.04)  # ... learning task 2 had helped it
    assert close(E[0, 0], 0.80)  # what learning task 1 did to task 1, from the untrained learner
    assert close(E[0, 2], 0.05)  # what learning task 1 gave to task 3


def test_records_keep_every_cell() -> None:
    R = torch.tensor([[0.5, NAN], [0.75, 0.25], [NAN, 1.0]])
    records = transfer.to_records(R)
    assert [(i, j) for i, j, _ in records] == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert [v for _, _, v in records if not math.isnan(v)] == [0.5, 0.75, 0.25, 1.0]
    assert math.isnan(records[1][2]) and math.isnan(records[4][2])


# ------------------------------------------------------------------ the module


def filled() -> TransferMatrix:
    matrix = TransferMatrix(3)
    for i, row in enumerate(worked_example()):
        matrix.record(i, row)
    return matrix


def test_a_new_matrix_is_unmeasured() -> None:
    matrix = TransferMatrix(3)
    assert matrix.R.shape == (4, 3) and matrix.R.dtype == torch.float32 and matrix.R.isnan().all()
    assert matrix.num_measured == 0 and matrix.measured_rows == ()
    assert all(math.isnan(v) for v in matrix.scalars().values())
    assert not list(matrix.parameters())
    assert "mask='class'" in repr(matrix)
    with pytest.raises(InputError, match="at least one task, got num_tasks=0"):
        TransferMatrix(0)


def test_the_buffer_is_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert TransferMatrix(2).R.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_row_0_is_recorded() -> None:
    matrix = TransferMatrix(3)
    matrix.record(0, torch.tensor([0.1, NAN, 0.3]))
    assert torch.equal(matrix.R[0, [0, 2]], torch.tensor([0.1, 0.3])) and matrix.R[0, 1].isnan()
    assert matrix.R[1:].isnan().all()
    assert matrix.measured_rows == (0,)


def test_a_row_is_recorded_once_and_reset_frees_it() -> None:
    matrix = filled()
    with pytest.raises(InputError, match=r"Row 2 .* already recorded: reset\(2\) first"):
        matrix.record(2, torch.zeros(3))
    assert torch.equal(matrix.R, worked_example().float())
    matrix.reset(2)
    assert matrix.R[2].isnan().all() and matrix.measured_rows == (0, 1, 3)
    assert math.isnan(matrix.scalars()["bwt_gem"])  # its diagonal entry is gone
    matrix.record(2, worked_example()[2])
    assert torch.equal(matrix.R, worked_example().float())
    matrix.reset()
    assert matrix.R.isnan().all() and matrix.num_measured == 0


def test_bad_rows_are_refused() -> None:
    matrix = TransferMatrix(3)
    for values in (torch.zeros(2), torch.zeros(1, 3), torch.zeros(())):
        with pytest.raises(InputError, match=r"shape \(3,\), got"):
            matrix.record(1, values)
    for row in (-1, 4):
        with pytest.raises(InputError, match=f"rows 0 to 3, got after_task={row}"):
            matrix.record(row, torch.zeros(3))
        with pytest.raises(InputError, match=f"rows 0 to 3, got after_task={row}"):
            matrix.reset(row)
    assert matrix.num_measured == 0 and matrix.R.isnan().all()


def test_record_copies_and_cuts_the_graph() -> None:
    matrix, values = TransferMatrix(2), torch.rand(2, requires_grad=True)
    matrix.record(0, values)
    assert not matrix.R.requires_grad
    with torch.inference_mode():
        matrix.record(1, torch.ones(2))
    matrix.record(2, torch.ones(2, dtype=torch.float64))
    before = matrix.R.clone()
    with torch.no_grad():
        values.zero_()
    assert torch.equal(matrix.R, before)


def test_record_and_reset_never_read_the_device() -> None:
    matrix = TransferMatrix(2).to("meta")  # a meta tensor has no values, so any read raises
    matrix.record(1, torch.zeros(2, device="meta"))
    matrix.reset(1)
    matrix.record(1, torch.zeros(2, device="meta"))
    assert matrix.measured_rows == (1,)


def test_scalars_of_the_whole_and_of_the_cut_stream() -> None:
    matrix = filled()
    scalars = matrix.scalars()
    assert list(scalars) == list(SCALARS) and all(type(v) is float for v in scalars.values())
    for name, value in scalars.items():
        assert close(value, EXAMPLES[name]), name
    for k in (1, 2, 3):
        for name, value in matrix.scalars(k).items():
            assert close(value, SCALARS[name].function(worked_example()[: k + 1, :k]).item()), (k, name)
    assert close(matrix.scalars(2)["forgetting_chaudhry"], -0.04)


def test_the_scalars_of_a_prefix_do_not_wait_for_the_end() -> None:
    matrix = TransferMatrix(3)
    for i in range(3):
        matrix.record(i, worked_example()[i])
    assert not any(math.isnan(v) for v in matrix.scalars(2).values())
    assert math.isnan(matrix.scalars()["average_accuracy"])


@pytest.mark.parametrize("k", [0, -1, 4])
def test_scalars_of_no_such_prefix(k: int) -> None:
    with pytest.raises(InputError, match=f"after 1 to 3 tasks, got after_task={k}"):
        filled().scalars(k)


def test_scalars_are_computed_in_float64() -> None:
    # 1000 + 1/8192 is exact in float32; its float32 sums are not
    matrix = TransferMatrix(3)
    rows = torch.full((4, 3), 1000 + 2.0**-13)
    for i, row in enumerate(rows):
        matrix.record(i, row)
    assert matrix.scalars()["average_incremental_accuracy"] == 1000 + 2.0**-13


def test_strict_weights_only_round_trip() -> None:
    source = filled()
    source.reset(3)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == ["R"]
    target = TransferMatrix(3)
    target.record(3, torch.zeros(3))
    target.load_state_dict(state, strict=True)
    torch.testing.assert_close(target.R, source.R, rtol=0, atol=0, equal_nan=True)
    assert target.measured_rows == (0, 1, 2)
    with pytest.raises(InputError, match="already recorded"):
        target.record(2, torch.zeros(3))
    target.record(3, worked_example()[3])
    assert target.scalars() == filled().scalars()


@pytest.mark.parametrize("assign", [False, True])
def test_round_trip_inside_a_parent(assign: bool) -> None:
    parent = nn.ModuleDict({"class": TransferMatrix(3), "task": filled()})
    other = nn.ModuleDict({"class": TransferMatrix(3), "task": TransferMatrix(3)})
    other.load_state_dict(parent.state_dict(), strict=True, assign=assign)
    assert other["task"].num_measured == 4 and other["class"].num_measured == 0


def test_a_partly_measured_row_counts_as_recorded_after_loading() -> None:
    source, target = TransferMatrix(2), TransferMatrix(2)
    source.record(1, torch.tensor([0.5, NAN]))
    target.load_state_dict(source.state_dict())
    assert target.measured_rows == (1,)


def test_a_state_of_another_stream_length_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        TransferMatrix(4).load_state_dict(filled().state_dict())


def test_a_copy_is_independent() -> None:
    source = TransferMatrix(2)
    twin = copy.deepcopy(source)
    twin.record(1, torch.ones(2))
    assert source.num_measured == 0 and source.R.isnan().all()
    source.load_state_dict(twin.state_dict())
    assert source.measured_rows == (1,) and twin.measured_rows == (1,)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_a_cast_of_the_parent_keeps_every_digit(cast: str) -> None:
    parent = nn.ModuleDict({"R": filled(), "layer": nn.Linear(2, 2)})
    getattr(parent, cast)()
    assert parent["layer"].weight.dtype != torch.float32
    assert parent["R"].R.dtype == torch.float32 and torch.equal(parent["R"].R, worked_example().float())
    assert list(parent["R"].state_dict()) == ["R"]
