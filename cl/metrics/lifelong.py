"""The suite of l2metrics (New et al. 2022; Baker et al. 2023, arXiv 2301.07799) and its log format.

A lifetime alternates evaluation blocks (EX, every task) and learning blocks (LX, one task): row 0 of `E` (L + 1, T) is
the EX before any learning and row b the EX after the b-th LX, so a transfer matrix is the E of a stream whose tasks
are learned once. `order` (L,) is the task 1..T of each LX, by default 1..T. The formulas are those of the code of
l2metrics 3.1.0, which also leaves the same terms out of a mean; the docstrings say which.

Before all else, l2metrics smooths each LX and scales the values of a task to [1, 101]: `preprocess`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cl.errors import InputError, unknown
from cl.files import write_text
from cl.metrics.checks import Table, Values, keep, ratio, table, transfer_matrix, vector

KINDS = ("ratio", "contrast")


class Lifetime(NamedTuple):
    """A metric over a lifetime, and the values per task or pair whose mean it is.

    Attributes:
        value: 0-d; NaN if there is no part or an input of a part is NaN.
        parts: One per task (T,) or per pair of tasks (T, T), NaN if it is undefined.

    Example:
        >>> performance_maintenance([[0.1, 0.1], [0.9, 0.4], [0.8, 0.9]]).parts
        tensor([-0.1000,     nan], dtype=torch.float64)
    """

    value: Tensor
    parts: Tensor


# --------------------------------------------------------------------------- preprocessing


class Preprocessed(NamedTuple):
    """The curves of one task after `preprocess`: learning blocks, evaluations, experts."""

    learning: list[Tensor]
    evaluations: Tensor
    experts: list[Tensor]


def smooth(curve: Values, window: int | None = None) -> Tensor:
    """Return a curve (n,) as its moving average, mirrored at both ends.

    By default, and if the given window is longer than the curve, the window W is min(n / 5, 100) rounded down. With W
    below 3 the curve is returned unchanged. Entry m is the mean of the W entries from m - ceil(W / 2) on, as in
    l2metrics, so that the window is not centred.

    Raises:
        InputError: if the curve is no vector.

    Example:
        >>> smooth([0.0, 3.0, 0.0, 3.0], window=3)
        tensor([1., 2., 1., 2.], dtype=torch.float64)
    """
    values = vector("curve", curve)
    width = min(len(values) // 5, 100) if window is None or window > len(values) else window
    if width < 3:
        return values
    mirrored = torch.nn.functional.pad(values[None], (width - 1, width - 1), mode="reflect")[0]
    start = width // 2 - 1
    return mirrored.unfold(0, width, 1).mean(1)[start : start + len(values)]


def normalise(values: Values, low: float, high: float) -> Tensor:
    """Return values (n,) scaled from [low, high] to [1, 101]; where the two are equal, all ones.

    100 (x - low) / (high - low) + 1: the 1 keeps a ratio of two performances finite.

    Raises:
        InputError: if values is no vector or high is below low.

    Example:
        >>> normalise([0.25, 0.5], low=0, high=1)
        tensor([26., 51.], dtype=torch.float64)
    """
    found = vector("values", values)
    if high < low:
        raise InputError(f"The range of a task goes from low={low:g} to high={high:g}: give the smaller one first.")
    return 100 * (found - low) / (high - low) + 1 if high != low else 0 * found + 1


def preprocess(
    learning: Sequence[Values],
    evaluations: Values,
    experts: Sequence[Values] = (),
    clamp: bool = False,
    data_range: tuple[float, float] | None = None,
) -> Preprocessed:
    """Smooth the learning curves of one task, clamp outliers, and scale everything to [1, 101].

    The range is that of all values of the task after smoothing, unless it is given. Clamping goes to the 10th and 90th
    percentile of all of them (or to the given range) and is off by default, as in l2metrics.

    Args:
        learning: The curves of its learning blocks.
        evaluations: Its value in each evaluation block.
        experts: The learning curves of single-task experts.
        clamp: Whether outliers are moved to the bounds.
        data_range: The lowest and the highest value.

    Raises:
        InputError: if a curve is no vector or the range is reversed.

    Example:
        >>> preprocess([[0.2, 0.4]], [0.0, 0.5]).learning[0]
        tensor([41., 81.], dtype=torch.float64)
    """
    blocks = [smooth(curve) for curve in learning]
    tests = vector("evaluations", evaluations)
    alone = [smooth(curve) for curve in experts]
    everything = torch.cat([*blocks, tests, *alone])
    everything = everything[~everything.isnan()]  # unmeasured values do not count for the range
    if not len(everything):
        return Preprocessed(blocks, tests, alone)
    if clamp:
        bounds = torch.tensor(data_range or _percentiles(everything), dtype=torch.float64)
        blocks, alone = ([curve.clamp(*bounds) for curve in part] for part in (blocks, alone))
        tests, everything = tests.clamp(*bounds), everything.clamp(*bounds)
    low, high = data_range or (everything.amin().item(), everything.amax().item())
    blocks, alone = ([normalise(curve, low, high) for curve in part] for part in (blocks, alone))
    return Preprocessed(blocks, normalise(tests, low, high), alone)


def _percentiles(values: Tensor) -> tuple[float, float]:
    """Return the 10th and the 90th percentile, interpolated linearly between values."""
    return values.quantile(0.1).item(), values.quantile(0.9).item()


def terminal_performance(curve: Values) -> Tensor:
    """Terminal performance of a learning block: the mean of the last tenth of its values, at least of the last one.

    Raises:
        InputError: if the curve is no vector.

    Example:
        >>> terminal_performance([0.1] * 18 + [0.7, 0.9]).item()
        0.8
    """
    values = vector("curve", curve)
    return values[int((1 - 0.1) * len(values)) :].mean()  # rounded as l2metrics does


# --------------------------------------------------------------------------- evaluation blocks


def performance_maintenance(E: Table, order: Sequence[int] | None = None, terminal: Values | None = None) -> Lifetime:
    """Performance maintenance: how far later evaluations of a task are from the first one after it was learned.

    PM_j = mean_b (E[b,j] - E[l,j]) over the rows b > l, l the last learning block of task j up to b; the value is the
    mean over the tasks that have such a row. In the unit of E; 0 is nothing forgotten, below is forgetting. That is
    l2metrics' default (MRLEP); with `terminal` (L,), the `terminal_performance` of each learning block, that stands in
    the place of E[l,j] (MRTLP).

    Raises:
        InputError: if a shape is wrong or `order` holds no task.

    Example:
        >>> from cl.metrics.transfer import worked_example
        >>> f"{performance_maintenance(worked_example()).value:.6f}"
        '0.010000'
    """
    rows, blocks = _lifetime(E, order)
    ends = None if terminal is None else vector("terminal", terminal, len(blocks))
    found: dict[tuple[int, ...], Tensor] = {}
    for j in set(blocks):
        own = [b for b, task in enumerate(blocks, start=1) if task == j]
        later = [(b, max(block for block in own if block <= b)) for b in range(own[0], len(rows))]
        changes = [
            rows[b, j - 1] - (rows[last, j - 1] if ends is None else ends[last - 1]) for b, last in later if b > last
        ]
        if changes:
            found[(j - 1,)] = torch.stack(changes).mean()
    return _mean(found, (rows.shape[1],))


def forward_transfer_l2(E: Table, order: Sequence[int] | None = None, kind: str = "ratio") -> Lifetime:
    """Forward transfer between tasks: what learning task i did to a task j that had not been learned.

    "ratio": E[b,j] / E[b-1,j], in [0, inf), 1 is neutral; "contrast": (E[b,j] - E[b-1,j]) / (E[b,j] + E[b-1,j]), in
    [-1, 1], 0 is neutral; b is the first learning block of i before the first of j. Higher is better. A block whose
    denominator is 0 is passed over. The value is the mean over all pairs; parts[i-1, j-1] is the pair (i, j).

    Raises:
        InputError: if E is not (L + 1, T), `order` holds no task, or there is no such kind.

    Example:
        >>> from cl.metrics.transfer import worked_example
        >>> transfer = forward_transfer_l2(worked_example())
        >>> print(transfer.parts)
        tensor([[   nan, 2.0000, 1.2000],
                [   nan,    nan, 1.5000],
                [   nan,    nan,    nan]], dtype=torch.float64)
        >>> f"{transfer.value:.6f}"
        '1.566667'
    """
    return _pairs(E, order, kind, forward=True)


def backward_transfer_l2(E: Table, order: Sequence[int] | None = None, kind: str = "ratio") -> Lifetime:
    """Backward transfer between tasks: what learning task i did to a task j that had been learned before.

    As `forward_transfer_l2`, with b the first learning block of i after the first of j.

    Raises:
        InputError: as `forward_transfer_l2`.

    Example:
        >>> from cl.metrics.transfer import worked_example
        >>> f"{backward_transfer_l2(worked_example(), kind='contrast').value:.6f}"
        '-0.005700'
    """
    return _pairs(E, order, kind, forward=False)


def _pairs(E: Table, order: Sequence[int] | None, kind: str, forward: bool) -> Lifetime:
    rows, blocks = _lifetime(E, order)
    if kind not in KINDS:
        raise unknown("kind of transfer", kind, KINDS)
    num_tasks, found = rows.shape[1], dict[tuple[int, ...], Tensor]()
    for j in range(1, num_tasks + 1):
        first = blocks.index(j) + 1 if j in blocks else len(rows)  # never learned: all blocks are before
        for b in range(1, first) if forward else range(first + 1, len(rows)):
            before, after, pair = rows[b - 1, j - 1], rows[b, j - 1], (blocks[b - 1] - 1, j - 1)
            above, below = (after, before) if kind == "ratio" else (after - before, after + before)
            if below != 0 and pair not in found and pair[0] != pair[1]:
                found[pair] = above / below
    return _mean(found, (num_tasks, num_tasks))


# --------------------------------------------------------------------------- learning blocks


def relative_performance(curve: Values, expert: Values) -> Tensor:
    """Relative performance: the area under a task's learning curve over that of a single-task expert.

    RP = sum_{m<n} curve[m] / sum_{m<n} expert[m] with n the length of the shorter, in [0, inf), above 1 is better; NaN
    where the expert's sum is 0. Average it over several experts. `curve` joins all learning blocks of the task.

    Raises:
        InputError: if one is no vector.

    Example:
        >>> relative_performance([0.25, 0.5], [0.125, 0.375, 0.9]).item()
        1.5
    """
    own, other = vector("curve", curve), vector("expert", expert)
    points = min(len(own), len(other))
    return ratio(own[:points].sum(), other[:points].sum())


def sample_efficiency(curve: Values, expert: Values) -> Tensor:
    """Sample efficiency: how much higher and how much earlier a task's curve peaks than a single-task expert's.

    SE = (peak / peak_expert) (n_expert / n) with n the index, from 0, of the first peak of the smoothed curve; in
    [0, inf), above 1 is better. It is 0 by definition where the peak is below a fifth of the expert's or the curve
    falls on average (the slope of its least-squares line over its own positions, where l2metrics counts the evaluations
    between two blocks too), NaN where a curve peaks at its start or the expert at 0.

    Raises:
        InputError: if one is no vector.

    Example:
        >>> sample_efficiency([0.2, 0.4, 0.8], [0.1, 0.2, 0.4]).item()
        2.0
    """
    own = vector("curve", curve)
    (peak, at), (peak_expert, at_expert) = _peak(own), _peak(vector("expert", expert))
    steps = torch.arange(len(own), dtype=torch.float64)
    slope = ((steps - steps.mean()) * own).sum()  # has the sign of the slope
    value = keep(ratio(peak, peak_expert) * ratio(at_expert, at), at_expert > 0)
    failed = (slope < 0) | (peak < 0.2 * peak_expert)
    return torch.where(failed & ~value.isnan(), torch.zeros_like(value), value)


def recovery_times(curves: Sequence[Values]) -> Tensor:
    """Recovery times (n - 1,): how long each learning block of a task takes to be where the one before ended.

    The index, from 0, of the first value at or above the `terminal_performance` of the block before; its length + 1
    where there is none, NaN where one of its values is. `curves` are the n blocks of one task, in order.

    Raises:
        InputError: if there are fewer than two blocks or one is no vector.

    Example:
        >>> recovery_times([[0.5, 0.8], [0.6, 0.8, 0.9], [0.2, 0.3]])
        tensor([1., 3.], dtype=torch.float64)
    """
    blocks = [vector("curves", curve) for curve in curves]
    if len(blocks) < 2:
        raise InputError(f"Recovery needs a task that is learned twice, got {len(blocks)} learning blocks.")
    return torch.stack([_time_to(b, terminal_performance(a)) for a, b in pairwise(blocks)])


def performance_recovery(times: Values) -> Tensor:
    """Performance recovery: how much faster each learning block of a task recovers than the one before.

    PR = -median of (times[n] - times[m]) / (n - m) over m < n (the Theil-Sen slope), above 0 is better; the unit is
    that of `times`. NaN for a single time: the task must be learned three times.

    Raises:
        InputError: if times is no vector.

    Example:
        >>> performance_recovery([4, 2, 1]).item()
        1.5
    """
    found = vector("times", times)
    m, n = torch.triu_indices(len(found), len(found), 1)
    slopes = (found[n] - found[m]) / (n - m)
    return -slopes.quantile(0.5) if len(slopes) else torch.full_like(found[0], math.nan)


# --------------------------------------------------------------------------- all of it


def l2_suite(
    E: Table,
    curves: Sequence[Values],
    experts: Sequence[Values] | None = None,
    order: Sequence[int] | None = None,
    scale: bool = True,
    clamp: bool = False,
) -> dict[str, Lifetime]:
    """Return every metric of l2metrics over a lifetime, after its preprocessing.

    Each is the mean over the tasks or pairs where it is defined; one that lacks an input makes it NaN.

    Args:
        E: (L + 1, T) the evaluation blocks.
        curves: The learning curve of each of the L learning blocks, on the task that it trains.
        experts: The learning curve of one single-task expert a task; without, what needs them is absent.
        order: The task of each learning block, by default 1..T.
        scale: Whether each task is scaled to [1, 101]; without, its curves are smoothed alone.
        clamp: Whether outliers are clamped before.

    Raises:
        InputError: if a shape is wrong, or there is not one curve a block and one expert a task.

    Example:
        >>> from cl.metrics.transfer import worked_example
        >>> curves = [[0.1, 0.9], [0.4, 0.8], [0.4, 0.8]]
        >>> found = l2_suite(worked_example(), curves, scale=False)
        >>> f"{found['performance_maintenance_mrlep'].value:.6f}"
        '0.010000'
    """
    rows, blocks = _lifetime(E, order)
    num_tasks = rows.shape[1]
    for name, given, wanted in (("learning blocks", curves, len(blocks)), ("tasks", experts, num_tasks)):
        if given is not None and len(given) != wanted:
            raise InputError(f"There are {wanted} {name} but {len(given)} curves: give one curve each.")
    tests, learning, alone = _prepared(rows, blocks, curves, experts, scale, clamp)
    terminal = torch.stack([terminal_performance(curve) for _, curve in learning])
    found = {
        "performance_maintenance_mrlep": performance_maintenance(tests, blocks),
        "performance_maintenance_mrtlp": performance_maintenance(tests, blocks, terminal),
    }
    for kind in KINDS:
        found[f"forward_transfer_{kind}"] = forward_transfer_l2(tests, blocks, kind)
        found[f"backward_transfer_{kind}"] = backward_transfer_l2(tests, blocks, kind)
    by_task = {j: [curve for task, curve in learning if task == j] for j in sorted(set(blocks))}
    parts: dict[str, dict[tuple[int, ...], Tensor]] = {"performance_recovery": {}}
    for j, own in by_task.items():
        if len(own) > 2:
            parts["performance_recovery"][(j - 1,)] = performance_recovery(recovery_times(own))
        for measure in (relative_performance, sample_efficiency) if alone else ():
            value, measured = measure(torch.cat(own), alone[j]), not torch.cat([*own, alone[j]]).isnan().any()
            values = parts.setdefault(measure.__name__, {})
            if not (value.isnan() and measured):  # an undefined task is left out, an unmeasured one is not
                values[(j - 1,)] = value
    return found | {name: _mean(values, (num_tasks,)) for name, values in parts.items()}


def _prepared(
    rows: Tensor,
    blocks: Sequence[int],
    curves: Sequence[Values],
    experts: Sequence[Values] | None,
    scale: bool,
    clamp: bool,
) -> tuple[Tensor, list[tuple[int, Tensor]], dict[int, Tensor]]:
    """Return the evaluations (L + 1, T), the (task, curve) of each learning block and each task's expert."""
    tests = rows.clone()
    learning = [(task, smooth(curve)) for task, curve in zip(blocks, curves, strict=True)]
    alone = {} if experts is None else {j: smooth(curve) for j, curve in enumerate(experts, start=1)}
    for j in range(1, rows.shape[1] + 1) if scale else ():
        own = [b for b, task in enumerate(blocks) if task == j]
        expert = [] if experts is None else [experts[j - 1]]
        done = preprocess([curves[b] for b in own], rows[:, j - 1], expert, clamp)
        tests[:, j - 1] = done.evaluations
        for b, curve in zip(own, done.learning, strict=True):
            learning[b] = (j, curve)
        if done.experts:
            alone[j] = done.experts[0]
    return tests, learning, alone


# --------------------------------------------------------------------------- log


_STANDARD = (
    "block_num",
    "exp_num",
    "worker_id",
    "block_type",
    "block_subtype",
    "task_name",
    "task_params",
    "exp_status",
)
_COLUMNS = (*_STANDARD, "timestamp", "performance")


def write_l2_log(folder: Path | str, R: Table, curves: Sequence[Values], task_names: Sequence[str]) -> None:
    """Write a run as a log of l2logger, format 1.1, which l2metrics reads (`--perf-measure performance`).

    Block 0 tests every task, block 2 k - 1 trains task k and block 2 k tests every task again: a row of R. A value is
    one experience; what was not measured (NaN) is absent. Names become `<letters and digits>_<number>`, the form that
    l2metrics asks for. The timestamps count experiences in seconds: a matrix has no clock.

    Args:
        folder: A folder of its own, made if there is none.
        R: (T + 1, T).
        curves: The learning curve of each task while it is trained.
        task_names: One a task.

    Raises:
        InputError: if there is not one curve and one name a task.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_l2_log(folder, [[0.1], [0.9]], curves=[[0.5, 0.8]], task_names=["digits"])
        >>> sorted(path.parent.name for path in folder.rglob("data-log.tsv"))
        ['0-test', '1-train', '2-test']
    """
    rows = transfer_matrix(R)
    names = [_task_name(name, j) for j, name in enumerate(task_names, start=1)]
    if not len(names) == len(curves) == rows.shape[1]:
        raise InputError(
            f"R has {rows.shape[1]} tasks, but there are {len(curves)} curves and {len(names)} task names."
        )
    tests = [[(name, value) for name, value in zip(names, row, strict=True)] for row in rows.tolist()]
    trains = [[(name, v) for v in vector("curves", c).tolist()] for name, c in zip(names, curves, strict=True)]
    blocks = [("test", tests[0])]
    for train, test in zip(trains, tests[1:], strict=True):
        blocks += [("train", train), ("test", test)]
    _write_log(Path(folder), blocks)


def write_l2_expert_log(folder: Path | str, curve: Values, task_name: str, task: int) -> None:
    """Write the learning curve of a single-task expert as a log, which `l2metrics --ste-store-mode w` stores.

    Args:
        folder: A folder of its own, made if there is none.
        curve: Its learning curve.
        task_name: The name of the task in `write_l2_log`.
        task: Its number there, from 1.

    Raises:
        InputError: if curve is no vector.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_l2_expert_log(folder, [0.5, 0.8], "digits", task=1)
        >>> print((folder / "worker-0" / "0-train" / "data-log.tsv").read_text().splitlines()[2])
        0 1 worker-0 train wake digits_1 {} complete 20000101T000001.000000 0.8
    """
    name = _task_name(task_name, task)
    _write_log(Path(folder), [("train", [(name, value) for value in vector("curve", curve).tolist()])])


def _task_name(name: str, task: int) -> str:
    return f"{re.sub('[^0-9a-zA-Z]', '', name).lower() or 'task'}_{task}"


def _write_log(folder: Path, blocks: Sequence[tuple[str, list[tuple[str, float]]]]) -> None:
    """Write (type, [(task name, value)]) blocks and the two files of information."""
    about = {"metrics_columns": ["performance"], "log_format_version": "1.1"}
    write_text(folder / "logger_info.json", json.dumps(about, indent=2))
    write_text(folder / "scenario_info.json", json.dumps({"author": "clsim", "scenario_type": "custom"}, indent=2))
    start, experience = datetime(2000, 1, 1), 0
    for number, (kind, values) in enumerate(blocks):
        text = io.StringIO()
        lines = csv.writer(text, delimiter="\t", lineterminator="\n")
        lines.writerow(_COLUMNS)
        for name, value in values:
            if not math.isnan(value):
                time = (start + timedelta(seconds=experience)).strftime("%Y%m%dT%H%M%S.%f")
                lines.writerow([number, experience, "worker-0", kind, "wake", name, "{}", "complete", time, value])
                experience += 1
        if any(not math.isnan(value) for _, value in values):
            write_text(folder / "worker-0" / f"{number}-{kind}" / "data-log.tsv", text.getvalue())


# --------------------------------------------------------------------------- helpers


def _lifetime(E: Table, order: Sequence[int] | None) -> tuple[Tensor, list[int]]:
    """Return E and the task of every learning block."""
    if order is None:
        rows = transfer_matrix(E)
        return rows, list(range(1, len(rows)))
    rows = table("E", E, "learning blocks + 1", "tasks", (len(order) + 1, None))
    wrong = [task for task in order if task not in range(1, rows.shape[1] + 1)]
    if wrong or not order:
        raise InputError(f"order={list(order)} must hold tasks from 1 to {rows.shape[1]}, one a learning block.")
    return rows, [int(task) for task in order]


def _mean(found: dict[tuple[int, ...], Tensor], shape: tuple[int, ...]) -> Lifetime:
    parts = torch.full(shape, math.nan, dtype=torch.float64)
    for position, value in found.items():
        parts[position] = value
    return Lifetime(torch.stack(list(found.values())).mean() if found else parts.new_tensor(math.nan), parts)


def _peak(curve: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest value of the smoothed curve and the index of the first one; both NaN if a value is."""
    smoothed = smooth(curve)
    peak = smoothed.amax()
    # Mirroring at the ends makes equal means, which may differ by rounding.
    at = (smoothed >= peak - 1e-12 * peak.abs()).double().argmax().double()
    return peak, keep(at, ~peak.isnan())


def _time_to(curve: Tensor, target: Tensor) -> Tensor:
    there = (curve >= target).nonzero().flatten()
    time = float(there[0]) if len(there) else len(curve) + 1
    return keep(curve.new_tensor(time), ~(target.isnan() | curve.isnan().any()))
