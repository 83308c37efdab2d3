"""The transfer matrix of a continual learner, and every scalar that papers and libraries read from it.

`R` has shape (T + 1, T). Its row index counts the tasks learned so far (row 0: the untrained learner), its column
names a task, NaN means unmeasured, and a higher entry is better. Formulas number the tasks from 1, as the papers do:
`R[i,j]` in a formula is the metric on the j-th task after i tasks, stored in `R[i, j - 1]`. Names carry their source
(`bwt_gem`, `bwt_diaz`) because many different quantities share one name in the field.

Every function is pure and computes in float64 on the CPU. It returns NaN, never 0, when the quantity is undefined
(backward transfer of a single task) or when a cell that it reads is unmeasured; other cells have no influence. Ranges
hold for metrics in [0, 1], such as accuracy. The decorator of a function gives formula, source, range, divisor and
sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ParamSpec

import torch
from torch import Tensor, nn

from cl.errors import InputError, unknown
from cl.metrics.checks import keep, learned, ratio, transfer_matrix, vector
from cl.metrics.scalar import AnyScalar, Scalar

# SCALARS: the scalars of R alone, which are written to transfer.json. LIBRARY_VARIANTS: what libraries compute as
# backward transfer, forward transfer and forgetting, to compare with their numbers; these are not reported.
SCALARS: dict[str, AnyScalar] = {}
LIBRARY_VARIANTS: dict[str, AnyScalar] = {}

_UNIT, _SIGNED = "fraction, [0, 1]", "fraction, [-1, 1]"
_PAIRS, _CELLS = "T (T - 1) / 2", "T (T + 1) / 2"
_GEM, _DIAZ = "Lopez-Paz & Ranzato 2017 (GEM)", "Diaz-Rodriguez et al. 2018"
_RWALK, _MER = "Chaudhry et al. 2018 (RWalk)", "Riemer et al. 2019 (MER)"
_ZSCL, _WORLD = "Zheng et al. 2023 (ZSCL)", "Wolczyk et al. 2021 (Continual World)"
P = ParamSpec("P")


def _of_R(
    formula: str,
    source: str,
    scale: str,
    divisor: str,
    higher_is_better: bool = True,
    table: dict[str, AnyScalar] = SCALARS,
) -> Callable[[Callable[P, Tensor]], Scalar[P, Tensor]]:
    """Decorate a function of R (T + 1, T) as a scalar that is a mean over tasks, and add it to a table."""

    def decorate(function: Callable[P, Tensor]) -> Scalar[P, Tensor]:
        found = Scalar(
            function.__name__, function, formula, source, scale, divisor, higher_is_better, weighting="task mean"
        )
        table[found.name] = found
        return found

    return decorate


# --------------------------------------------------------------------------- helpers


def worked_example() -> Tensor:
    """Return the (4, 3) matrix that all examples below use; its bwt_gem and bwt_diaz differ in sign.

    Example:
        >>> worked_example().shape
        torch.Size([4, 3])
    """
    rows = [[0.10, 0.20, 0.25], [0.90, 0.40, 0.30], [0.94, 0.85, 0.45], [0.84, 0.88, 0.80]]
    return torch.tensor(rows, dtype=torch.float64)


def _lower(square: Tensor, offset: int = 0) -> Tensor:
    """Return the entries on and below the diagonal with this offset, as a vector."""
    i, j = torch.tril_indices(len(square), len(square), offset)
    return square[i, j]


# --------------------------------------------------------------------------- Lopez-Paz & Ranzato 2017


@_of_R("sum_j R[T,j]", _GEM, _UNIT, "T")
def average_accuracy(R: Tensor, num_samples: Tensor | Sequence[float] | None = None) -> Tensor:
    """Average accuracy: the mean over all tasks after the last one.

    Also called last, final or retained accuracy. With `num_samples` (T,), the size of each test set, the mean is
    weighted by it, which is the accuracy over the union of the test sets.

    Example:
        >>> f"{average_accuracy(worked_example()):.6f}"
        '0.840000'
    """
    last = transfer_matrix(R)[-1]
    if num_samples is None:
        return last.mean()
    weights = vector("num_samples", num_samples, len(last), low=1)
    return (last * weights).sum() / weights.sum()


@_of_R("sum_{j<T} (R[T,j] - R[j,j])", _GEM, _SIGNED, "T - 1")
def bwt_gem(R: Tensor) -> Tensor:
    """Backward transfer of GEM: how far the earlier tasks moved from just learned to the end.

    NaN for T = 1.

    Example:
        >>> f"{bwt_gem(worked_example()):.6f}"
        '-0.015000'
    """
    rows, diagonal = learned(R)
    return (rows[-1] - diagonal)[:-1].mean()


@_of_R("sum_{j>=2} (R[j-1,j] - R[0,j])", _GEM, _SIGNED, "T - 1")
def fwt_gem(R: Tensor) -> Tensor:
    """Forward transfer of GEM: zero-shot metric just before a task is learned, above the untrained learner.

    NaN for T = 1 or without row 0.

    Example:
        >>> f"{fwt_gem(worked_example()):.6f}"
        '0.200000'
    """
    R = transfer_matrix(R)
    return (R[1:].diagonal(1) - R[0, 1:]).mean()


# --------------------------------------------------------------------------- Diaz-Rodriguez et al. 2018


@_of_R("sum_{i>=j} R[i,j]", _DIAZ, _UNIT, _CELLS)
def accuracy_diaz(R: Tensor) -> Tensor:
    """Accuracy over time: the mean over every task at every moment since it was learned.

    Example:
        >>> f"{accuracy_diaz(worked_example()):.6f}"
        '0.868333'
    """
    return _lower(learned(R)[0]).mean()


@_of_R("sum_{i>j} (R[i,j] - R[j,j])", _DIAZ, _SIGNED, _PAIRS)
def bwt_diaz(R: Tensor) -> Tensor:
    """Backward transfer over time: bwt_gem taken after every later task, not after the last one alone.

    NaN for T = 1.

    Example:
        >>> f"{bwt_diaz(worked_example()):.6f}"
        '0.003333'
    """
    rows, diagonal = learned(R)
    return _lower(rows - diagonal, -1).mean()


@_of_R("max(0, bwt_diaz)", _DIAZ, _UNIT, _PAIRS)
def bwt_plus_diaz(R: Tensor) -> Tensor:
    """Positive backward transfer: the improving half of bwt_diaz.

    NaN for T = 1.

    Example:
        >>> f"{bwt_plus_diaz(worked_example()):.6f}"
        '0.003333'
    """
    return bwt_diaz(R).clamp(min=0)


@_of_R("1 - |min(0, bwt_diaz)|", _DIAZ, _UNIT, _PAIRS)
def rem_diaz(R: Tensor) -> Tensor:
    """Remembering: the forgetting half of bwt_diaz, 1 when nothing was forgotten on average.

    NaN for T = 1.

    Example:
        >>> f"{rem_diaz(worked_example()):.6f}"
        '1.000000'
    """
    return 1 - bwt_diaz(R).clamp(max=0).abs()


@_of_R("sum_{1<=i<j} R[i,j]", _DIAZ, _UNIT, _PAIRS)
def fwt_diaz(R: Tensor) -> Tensor:
    """Forward transfer over time: the mean zero-shot metric on all future tasks, no baseline subtracted.

    NaN for T = 1.

    Example:
        >>> f"{fwt_diaz(worked_example()):.6f}"
        '0.383333'
    """
    return _lower(learned(R)[0].T, -1).mean()


@_of_R("sum_{j>=2} R[j-1,j]", "continuum (code)", _UNIT, "T - 1")
def fwt_continuum(R: Tensor) -> Tensor:
    """Forward transfer as the library continuum computes it: fwt_gem without its baseline.

    As in continuum's repository since 2023 (its last release, 1.2.7, averages the cells below the diagonal instead);
    NaN for T = 1.

    Example:
        >>> f"{fwt_continuum(worked_example()):.6f}"
        '0.425000'
    """
    return learned(R)[0].diagonal(1).mean()


# --------------------------------------------------------------------------- Chaudhry et al. 2018


def _best(R: Tensor, zero_shot: bool, final: bool) -> Tensor:
    """Return max_l R[l,j] for each task j, with l from j (1 if zero_shot) to T - 1 (T if final); needs T > 1."""
    rows, _ = learned(R)
    if not zero_shot:
        rows = keep(rows, torch.ones_like(rows, dtype=torch.bool).tril(), -math.inf)
    return (rows if final else rows[:-1]).amax(0)


@_of_R("sum_{j<T} (max_{j<=l<T} R[l,j] - R[T,j])", _RWALK, _SIGNED, "T - 1", higher_is_better=False)
def forgetting_chaudhry(R: Tensor, zero_shot: bool = False) -> Tensor:
    """Forgetting: how far each earlier task ended below its best earlier moment.

    Negative where tasks improved, NaN for T = 1. In the paper, eq. 3, l starts at 1 (`zero_shot=True`): the moments
    before task j was learned count too, which differs only where zero-shot beats trained.

    Example:
        >>> f"{forgetting_chaudhry(worked_example()):.6f}"
        '0.035000'
    """
    last = transfer_matrix(R)[-1]
    if len(last) == 1:
        return torch.full_like(last[0], math.nan)
    return (_best(R, zero_shot, final=False) - last)[:-1].mean()


def intransigence_chaudhry(R: Tensor, joint: Tensor | Sequence[float]) -> Tensor:
    """Intransigence: how far each task, just learned, is below a joint learner of tasks 1..k; mean over k.

    `joint` (T,) holds, for each k, the metric on task k of a learner that was trained on tasks 1..k together. The
    formula is in `cl.report.scalars`.

    Example:
        >>> f"{intransigence_chaudhry(worked_example(), [0.92, 0.89, 0.86]):.6f}"
        '0.040000'
    """
    _, diagonal = learned(R)
    return (vector("joint", joint, len(diagonal)) - diagonal).mean()


# --------------------------------------------------------------------------- Riemer et al. 2019


@_of_R("sum_j R[j,j]", _MER, _UNIT, "T")
def learning_accuracy_riemer(R: Tensor) -> Tensor:
    """Learning accuracy: the mean over tasks, each right after it was learned.

    Example:
        >>> f"{learning_accuracy_riemer(worked_example()):.6f}"
        '0.850000'
    """
    return learned(R)[1].mean()


@_of_R("sum_j (R[T,j] - R[j,j])", _MER, _SIGNED, "T")
def bti_riemer(R: Tensor) -> Tensor:
    """Backward transfer and interference: retained minus learning accuracy, (T-1)/T of bwt_gem.

    NaN for T = 1 (nothing could be interfered with).

    Example:
        >>> f"{bti_riemer(worked_example()):.6f}"
        '-0.010000'
    """
    return _over_all_tasks(R, bwt_gem(R))


def _over_all_tasks(R: Tensor, mean: Tensor) -> Tensor:
    """Return a mean over T - 1 tasks as the mean over T whose missing term is 0."""
    return mean * (R.shape[1] - 1) / R.shape[1]


# --------------------------------------------------------------------------- incremental accuracy


@_of_R("mean_k mean_{j<=k} R[k,j]", "Rebuffi et al. 2017 (iCaRL) and later", _UNIT, "T, k inside")
def average_incremental_accuracy(R: Tensor, num_samples: Tensor | Sequence[float] | None = None) -> Tensor:
    """Average incremental accuracy: the mean over k of the average accuracy on the first k tasks after task k.

    Class-incremental papers usually weight the accuracy after task k by the size of each test set: give `num_samples`
    (T,) for that.

    Example:
        >>> f"{average_incremental_accuracy(worked_example()):.6f}"
        '0.878333'
    """
    rows, _ = learned(R)
    sizes = torch.ones(len(rows)) if num_samples is None else num_samples
    weights = vector("num_samples", sizes, len(rows), low=1)
    seen = keep(rows, torch.ones_like(rows, dtype=torch.bool).tril(), 0.0)
    return ((seen * weights).sum(1) / weights.cumsum(0)).mean()


# --------------------------------------------------------------------------- later papers


@_of_R("sum_{j>=2} mean_{1<=i<j} R[i,j]", _ZSCL, _UNIT, "T - 1, j - 1 inside")
def transfer_zscl(R: Tensor) -> Tensor:
    """Transfer of ZSCL: the mean over tasks of the metric on each at the moments before it was learned.

    NaN for T = 1. Each task counts once, where in fwt_diaz each cell does. From the paper's code.

    Example:
        >>> f"{transfer_zscl(worked_example()):.6f}"
        '0.387500'
    """
    future = _future(R)
    return (future.sum(0)[1:] / torch.arange(1, len(future))).mean()


def _future(R: Tensor) -> Tensor:
    """Return R[i,j] for 1 <= i < j as a (T, T) matrix with 0 elsewhere."""
    rows, _ = learned(R)
    return keep(rows, torch.ones_like(rows, dtype=torch.bool).triu(1), 0.0)


@_of_R("sum_{i>=1} sum_j R[i,j]", _ZSCL, _UNIT, "T^2")
def average_zscl(R: Tensor) -> Tensor:
    """Average of ZSCL: the mean over every task at every moment, before and after it was learned.

    Row 0 does not count. From the paper's code.

    Example:
        >>> f"{average_zscl(worked_example()):.6f}"
        '0.706667'
    """
    return learned(R)[0].mean()


@_of_R("sum_j (R[j,j] - R[T,j])", _WORLD, _SIGNED, "T", higher_is_better=False)
def forgetting_continual_world(R: Tensor) -> Tensor:
    """Forgetting of Continual World: from the moment of learning to the end, the last task counted too: -bti_riemer.

    Negative where tasks improved, NaN for T = 1. From a secondary account of the paper.

    Example:
        >>> f"{forgetting_continual_world(worked_example()):.6f}"
        '0.010000'
    """
    return -bti_riemer(R)


@_of_R(
    "2 a / (D a + 1), a = mean_j R[T,j], D = R[1,1] - R[T,1]",
    "Learning to Learn (curriculum paper)",
    "ratio, [0, inf)",
    "T in a",
)
def curriculum_effectiveness(R: Tensor) -> Tensor:
    """Curriculum effectiveness: the harmonic mean of the final accuracy and the inverse of the first task's loss.

    2 a where nothing was lost; NaN for T = 1.

    Example:
        >>> f"{curriculum_effectiveness(worked_example()):.6f}"
        '1.599391'
    """
    rows, _ = learned(R)
    final, lost = rows[-1].mean(), rows[0, 0] - rows[-1, 0]
    return ratio(2 * final, lost * final + 1) if len(rows) > 1 else final * math.nan


# --------------------------------------------------------------------------- what released code computes

LIBRARY_VARIANTS["bwt_gem_code"] = replace(bti_riemer, name="bwt_gem_code", source="GEM (code)")


@_of_R("sum_{j>=2} (R[j-1,j] - R[0,j])", "GEM (code)", _SIGNED, "T", table=LIBRARY_VARIANTS)
def fwt_gem_code(R: Tensor) -> Tensor:
    """Forward transfer as GEM's released code averages it: over T tasks, so (T-1)/T of fwt_gem.

    Example:
        >>> f"{fwt_gem_code(worked_example()):.6f}"
        '0.133333'
    """
    return _over_all_tasks(R, fwt_gem(R))


@_of_R("sum_{i<T} mean_{j>i} R[i,j]", "mammoth (code)", _UNIT, "T - 1, T - i inside", table=LIBRARY_VARIANTS)
def transfer_mammoth(R: Tensor) -> Tensor:
    """Transfer of ZSCL as mammoth computes it: over the rows first, so each moment counts once, not each task.

    Example:
        >>> f"{transfer_mammoth(worked_example()):.6f}"
        '0.400000'
    """
    future = _future(R)
    return (future.sum(1)[:-1] / torch.arange(len(future) - 1, 0, -1)).mean()


@_of_R(
    "sum_{j<T} (R[j,j] - R[T,j])", "Avalanche (code)", _SIGNED, "T - 1", higher_is_better=False, table=LIBRARY_VARIANTS
)
def forgetting_avalanche(R: Tensor) -> Tensor:
    """Forgetting as Avalanche computes it: from the moment of learning, not from the best one, so -bwt_gem.

    Example:
        >>> f"{forgetting_avalanche(worked_example()):.6f}"
        '0.015000'
    """
    return -bwt_gem(R)


@_of_R(
    "sum_{j<T} (max_{j<=l<=T} R[l,j] - R[T,j])",
    "mammoth, PyCIL, LAMDA-PILOT (code)",
    _UNIT,
    "T - 1",
    higher_is_better=False,
    table=LIBRARY_VARIANTS,
)
def forgetting_mammoth(R: Tensor) -> Tensor:
    """Forgetting as mammoth, PyCIL and LAMDA-PILOT compute it: the best includes the last row, so never negative.

    Example:
        >>> f"{forgetting_mammoth(worked_example()):.6f}"
        '0.050000'
    """
    return (_best(R, zero_shot=False, final=True) - transfer_matrix(R)[-1])[:-1].mean()


@_of_R(
    "sum_{j<T} (max_{j<=l<=T} R[l,j] - R[T,j])",
    "PCR, HPCR (code)",
    _UNIT,
    "T",
    higher_is_better=False,
    table=LIBRARY_VARIANTS,
)
def forgetting_online_cl(R: Tensor) -> Tensor:
    """Forgetting as the online-CL code base (PCR, HPCR) computes it: forgetting_mammoth averaged over T tasks.

    Example:
        >>> f"{forgetting_online_cl(worked_example()):.6f}"
        '0.033333'
    """
    return _over_all_tasks(R, forgetting_mammoth(R))


@_of_R(
    "sum_{j<=T-2} (R[j,j] - R[T,j])",
    "LibContinual (code)",
    _SIGNED,
    "T - 1",
    higher_is_better=False,
    table=LIBRARY_VARIANTS,
)
def forgetting_libcontinual(R: Tensor) -> Tensor:
    """Forgetting as LibContinual computes it: tasks 1..T-2 alone, still divided by T - 1; NaN for T < 3.

    Example:
        >>> f"{forgetting_libcontinual(worked_example()):.6f}"
        '0.030000'
    """
    rows, diagonal = learned(R)
    drops = (diagonal - rows[-1])[:-2]
    return drops.mean() * len(drops) / max(1, len(rows) - 1)


@_of_R("sum_{i>=j+2} (R[i,j] - R[j,j])", "LibContinual (code)", _SIGNED, _PAIRS, table=LIBRARY_VARIANTS)
def bwt_libcontinual(R: Tensor) -> Tensor:
    """Backward transfer as LibContinual computes it: bwt_diaz without its pairs (i, i-1), divisor kept; NaN for T < 3.

    Example:
        >>> f"{bwt_libcontinual(worked_example()):.6f}"
        '-0.020000'
    """
    rows, diagonal = learned(R)
    gains = _lower(rows - diagonal, -2)
    return gains.mean() * len(gains) / max(1, len(rows) * (len(rows) - 1) // 2)


# --------------------------------------------------------------------------- matrices


def backward_transfer(R: Tensor) -> Tensor:
    """Backward transfer matrix (T, T): what all learning since task j did to task j.

    B[i,j] = R[i,j] - R[j,j] for i > j, NaN elsewhere, in [-1, 1], higher is better; row i - 1 is after task i.
    Its last row averages to bwt_gem, its whole triangle to bwt_diaz.

    Example:
        >>> print(backward_transfer(worked_example()))
        tensor([[    nan,     nan,     nan],
                [ 0.0400,     nan,     nan],
                [-0.0600,  0.0300,     nan]], dtype=torch.float64)
    """
    rows, diagonal = learned(R)
    return keep(rows - diagonal, torch.ones_like(rows, dtype=torch.bool).tril(-1))


def forward_transfer(R: Tensor) -> Tensor:
    """Forward transfer matrix (T, T): what learning tasks 1..i did to a task j that is still to come.

    F[i,j] = R[i,j] - R[0,j] for 1 <= i < j, NaN elsewhere, in [-1, 1], higher is better; row i - 1 is after task i.
    Its superdiagonal averages to fwt_gem.

    Example:
        >>> print(forward_transfer(worked_example()))
        tensor([[   nan, 0.2000, 0.0500],
                [   nan,    nan, 0.2000],
                [   nan,    nan,    nan]], dtype=torch.float64)
    """
    R = transfer_matrix(R)
    return keep(R[1:] - R[0], torch.ones_like(R[1:], dtype=torch.bool).triu(1))


def step_effect(R: Tensor) -> Tensor:
    """Step effect matrix (T, T): what learning task i alone did to every task j, old, current or to come.

    E[i,j] = R[i,j] - R[i-1,j], in [-1, 1], higher is better; row i - 1 is the step of task i. Below the diagonal a
    negative entry is interference, on it is what was learned, above it is what the step gave to the future.

    Example:
        >>> print(step_effect(worked_example()))
        tensor([[ 0.8000,  0.2000,  0.0500],
                [ 0.0400,  0.4500,  0.1500],
                [-0.1000,  0.0300,  0.3500]], dtype=torch.float64)
    """
    return transfer_matrix(R).diff(dim=0)


def to_records(R: Tensor) -> list[tuple[int, int, float]]:
    """Return every cell as (after_task, task, value), row by row: after_task 0..T, task 1..T, NaN if unmeasured.

    Example:
        >>> to_records(torch.tensor([[0.5], [0.75]]))
        [(0, 1, 0.5), (1, 1, 0.75)]
    """
    rows: list[list[float]] = transfer_matrix(R).tolist()
    return [(i, j, value) for i, row in enumerate(rows) for j, value in enumerate(row, start=1)]


# --------------------------------------------------------------------------- caveats

# Whether a matrix, and which scalars, read R[i,j] with 1 <= i < j: the metric on a task that is not learned yet.
_MATRICES = {"backward_transfer": False, "forward_transfer": True, "step_effect": True}
READS_UNSEEN = {"fwt_gem", "fwt_diaz", "fwt_continuum", "fwt_gem_code"}
READS_UNSEEN |= {"transfer_zscl", "average_zscl", "transfer_mammoth", "forward_transfer_ratio"}


def caveat(name: str, mask: str) -> str | None:
    """Return the caveat to show beside the scalar or matrix `name` measured under `mask`, or None.

    Under the mask "class" a task to come is scored by outputs that no example has trained yet. So quantities that read
    those cells (`fwt_*`, `transfer_*`, average_zscl, forward_transfer, step_effect) do not measure zero-shot knowledge.

    Raises:
        InputError: if no scalar and no matrix has that name.

    Example:
        >>> caveat("fwt_gem", mask="task") is None, caveat("bwt_gem", mask="class") is None
        (True, True)
        >>> caveat("fwt_gem", mask="class")[:57]
        'class-incremental: the classes of a task to come have no '
    """
    known = SCALARS.keys() | LIBRARY_VARIANTS.keys() | _MATRICES.keys() | READS_UNSEEN
    if name not in known:
        raise unknown("transfer metric", name, known)
    if mask != "class" or not (name in READS_UNSEEN or _MATRICES.get(name, False)):
        return None
    return (
        "class-incremental: the classes of a task to come have no trained output, "
        "so the cells before a task is learned are no transfer; read this under the mask 'task' or 'domain'"
    )


# --------------------------------------------------------------------------- module


class TransferMatrix(nn.Module):
    """The transfer matrix of one run: a float32 buffer `R` (T + 1, T), NaN where unmeasured, and its scalars.

    R[i, j] is the metric on the task of index j after i tasks; row 0 is the untrained learner. The buffer is the whole
    state: it moves with the parent module and loads strictly with `weights_only=True`.

    Args:
        num_tasks: T.
        mask: Which classes competed: "class", "task" or "domain".
        metric: The name of the metric; higher is better.

    Raises:
        InputError: if num_tasks is below 1.

    Example:
        >>> matrix = TransferMatrix(num_tasks=3)
        >>> for i, row in enumerate(worked_example()):
        ...     matrix.record(i, row)
        >>> round(matrix.scalars()["bwt_gem"], 6), round(matrix.scalars(after_task=2)["forgetting_chaudhry"], 6)
        (-0.015, -0.04)
    """

    R: Tensor

    def __init__(self, num_tasks: int, mask: str = "class", metric: str = "accuracy") -> None:
        super().__init__()
        if num_tasks < 1:
            raise InputError(f"A transfer matrix needs at least one task, got num_tasks={num_tasks}.")
        self.num_tasks = num_tasks
        self.mask = mask
        self.metric = metric
        self.register_buffer("R", torch.full((num_tasks + 1, num_tasks), math.nan, dtype=torch.float32))
        # A copy on the host, so that record() can refuse to write a row twice without reading the device.
        self._rows: set[int] = set()
        self.register_load_state_dict_post_hook(_find_rows)  # type: ignore[no-untyped-call]

    @property
    def measured_rows(self) -> tuple[int, ...]:
        """The rows recorded so far, ascending; 0 is the untrained learner."""
        return tuple(sorted(self._rows))

    @property
    def num_measured(self) -> int:
        """The number of recorded rows, 0 to T + 1."""
        return len(self._rows)

    @torch.no_grad()
    def record(self, after_task: int, values: Tensor) -> None:
        """Write a row of R, once; it does not synchronise with the device if `values` is on the device of R.

        Args:
            after_task: The number of tasks learned, 0..T; it is the number of the row.
            values: (T,) the metric on every task, NaN where it was not measured.

        Raises:
            InputError: if there is no such row, it is already recorded, or the shape is not (T,).
        """
        self._check_row(after_task)
        if after_task in self._rows:
            raise InputError(f"Row {after_task} of the transfer matrix is already recorded: reset({after_task}) first.")
        if values.shape != (self.num_tasks,):
            raise InputError(
                f"Row {after_task} of the transfer matrix takes one value per task, shape ({self.num_tasks},), "
                f"got {tuple(values.shape)}: put NaN where a task was not measured."
            )
        self.R[after_task].copy_(values)
        self._rows.add(after_task)

    @torch.no_grad()
    def reset(self, after_task: int | None = None) -> None:
        """Mark one row, or all rows, as unmeasured, so that they can be recorded again.

        Raises:
            InputError: if there is no such row.
        """
        if after_task is None:
            self.R.fill_(math.nan)
            self._rows.clear()
            return
        self._check_row(after_task)
        self.R[after_task].fill_(math.nan)
        self._rows.discard(after_task)

    def scalars(self, after_task: int | None = None) -> dict[str, float]:
        """Return every entry of `SCALARS` for the stream cut to its first `after_task` tasks (default: all).

        Raises:
            InputError: if after_task is not in 1..T.
        """
        k = self.num_tasks if after_task is None else after_task
        if not 1 <= k <= self.num_tasks:
            raise InputError(f"Scalars exist after 1 to {self.num_tasks} tasks, got after_task={k}.")
        cut = transfer_matrix(self.R[: k + 1, :k])  # one read of the device for all scalars
        return {name: scalar.function(cut).item() for name, scalar in SCALARS.items()}

    def extra_repr(self) -> str:
        """Return the text between the brackets of the module's repr."""
        return f"num_tasks={self.num_tasks}, mask={self.mask!r}, metric={self.metric!r}, measured={self.num_measured}"

    def _check_row(self, after_task: int) -> None:
        if not 0 <= after_task <= self.num_tasks:
            raise InputError(f"The transfer matrix has rows 0 to {self.num_tasks}, got after_task={after_task}.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TransferMatrix:
        before = self.R
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.R.dtype != before.dtype:  # R stays float32: after .bfloat16() of the parent it would have three digits
            self.R = before.to(self.R.device)
        return self


def _find_rows(module: nn.Module, _: object) -> None:
    """Find the recorded rows of a loaded buffer: those with a number; it synchronises with the device."""
    assert isinstance(module, TransferMatrix)
    module._rows = set(module.R.isnan().all(1).logical_not().nonzero().flatten().tolist())
