"""The suite of l2metrics: worked numbers, an independent reading of its own logs in plain loops, invariants."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl.errors import InputError
from cl.metrics import lifelong as M
from cl.metrics import transfer
from cl.metrics.transfer import worked_example

NAN = float("nan")
quick = settings(deadline=None, max_examples=40)
unit = st.floats(0.01, 1)
curve = st.lists(unit, min_size=1, max_size=40)

LL2 = [0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.84, 0.86, 0.85, 0.85]
STE2 = [0.2, 0.35, 0.5, 0.55, 0.6, 0.7, 0.8, 0.84, 0.86, 0.88]
CURVES = [[0.2, 0.6, 0.9], LL2, [0.3, 0.5, 0.8]]


def same(found: Tensor, expected: object, tol: float = 1e-6) -> bool:
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == wanted.shape and found.dtype == torch.float64 and found.device.type == "cpu"
    return torch.allclose(found, wanted, rtol=tol, atol=tol, equal_nan=True)


# ------------------------------------------------------------------ worked numbers (METRICS, sec. 9)


def test_performance_maintenance() -> None:
    value, parts = M.performance_maintenance(worked_example())
    assert same(value, 0.01) and same(parts, [-0.01, 0.03, NAN])
    against_training = M.performance_maintenance(worked_example(), terminal=[0.9, 0.8, 0.7])
    assert same(against_training.parts, [(0.04 - 0.06) / 2, 0.08, NAN])


def test_transfer_between_tasks() -> None:
    R = worked_example()
    ratio, contrast = M.forward_transfer_l2(R), M.forward_transfer_l2(R, kind="contrast")
    assert same(ratio.parts, [[NAN, 2.0, 1.2], [NAN, NAN, 1.5], [NAN, NAN, NAN]])
    assert same(contrast.parts, [[NAN, 0.333333, 0.090909], [NAN, NAN, 0.2], [NAN, NAN, NAN]])
    assert same(ratio.value, 1.566667) and same(contrast.value, 0.208081)
    ratio, contrast = M.backward_transfer_l2(R), M.backward_transfer_l2(R, kind="contrast")
    assert same(ratio.parts, [[NAN] * 3, [1.044444, NAN, NAN], [0.893617, 1.035294, NAN]])
    assert same(contrast.parts, [[NAN] * 3, [0.021739, NAN, NAN], [-0.056180, 0.017341, NAN]])
    assert same(ratio.value, 0.991118) and same(contrast.value, -0.005700)


def test_against_a_single_task_expert() -> None:
    assert same(M.relative_performance(LL2, STE2), 1.122611)
    assert same(M.sample_efficiency(LL2, STE2), 1.256494)


def test_performance_recovery() -> None:
    assert same(M.performance_recovery([4, 2, 1]), 1.5)


# ------------------------------------------------------------------ pieces in closed form


def test_recovery_times() -> None:
    blocks = [[0.2, 0.5, 0.8], [0.5, 0.8, 0.9], [0.1, 0.2], [0.3]]
    assert same(M.recovery_times(blocks), [1.0, 3.0, 0.0])  # there at index 1; never: length + 1; at once
    assert M.recovery_times([[0.5], [NAN, 0.6]]).isnan().all() and M.recovery_times([[NAN], [0.6]]).isnan().all()
    assert M.performance_recovery([3.0]).isnan() and M.performance_recovery([3.0, NAN, 1.0]).isnan()


@quick
@given(st.lists(st.integers(0, 50), min_size=2, max_size=9))
def test_theil_sen_against_scipy(times: list[int]) -> None:
    from scipy.stats import theilslopes

    found = M.performance_recovery(times).item()
    assert abs(found + theilslopes(times)[0]) < 1e-9
    assert abs(M.performance_recovery(times[::-1]).item() + found) < 1e-9
    assert abs(M.performance_recovery([3 * t + 7 for t in times]).item() - 3 * found) < 1e-9


@pytest.mark.parametrize(("length", "tail"), [(1, 1), (5, 1), (10, 1), (11, 2), (20, 2), (30, 3), (70, 7), (75, 8)])
def test_terminal_performance_is_the_last_tenth(length: int, tail: int) -> None:
    values = [0.0] * (length - tail) + [1.0] * tail
    assert M.terminal_performance(values).item() == 1.0
    if length > tail:
        assert M.terminal_performance([1.0, *values[: -tail - 1], *([0.0] * tail)]).item() == 0.0


def test_smoothing_keeps_short_curves_and_averages_long_ones() -> None:
    assert same(M.smooth([0.1, 0.9] * 7), [0.1, 0.9] * 7)  # 14 values: a window of 2
    line = torch.arange(40, dtype=torch.float64)
    assert same(M.smooth(line)[8:32], line[8:32] - 0.5)  # an even window reaches one further to the left
    assert same(M.smooth(line, window=5)[8:32], line[8:32] - 1.0)
    assert same(M.smooth(line, window=41), M.smooth(line))  # a window that does not fit is not used
    constant = torch.full((600,), 0.7, dtype=torch.float64)
    assert same(M.smooth(constant), constant)
    spike = torch.zeros(1000, dtype=torch.float64)
    spike[500] = 1.0
    assert same(M.smooth(spike).amax(), 1 / 100) and same(M.smooth(spike).sum(), 1.0)  # 100 at most, and a mean


@quick
@given(st.lists(unit, min_size=1, max_size=60), st.one_of(st.none(), st.integers(1, 70)))
def test_smoothing_against_loops(values: list[float], window: int | None) -> None:
    n = len(values)
    width = min(int(n * 0.2), 100) if window is None or window > n else window

    def mirrored(m: int) -> float:
        return values[-m if m < 0 else m if m < n else 2 * (n - 1) - m]

    around = range(-math.ceil(width / 2), width // 2)
    expected = values if width < 3 else [sum(mirrored(m + d) for d in around) / width for m in range(n)]
    assert same(M.smooth(values, window), expected, 1e-12)


def test_preprocessing() -> None:
    done = M.preprocess([[0.2, 0.4], [0.6]], [0.0, 0.5], experts=[[0.8, 1.0]])
    assert same(done.learning[0], [21.0, 41.0]) and same(done.learning[1], [61.0])
    assert same(done.evaluations, [1.0, 51.0]) and same(done.experts[0], [81.0, 101.0])
    done = M.preprocess([[0.2, 0.4]], [0.0, NAN], data_range=(0.0, 2.0))
    assert same(done.learning[0], [11.0, 21.0]) and same(done.evaluations, [1.0, NAN])
    done = M.preprocess([[0.5, 0.5]], [0.5])  # no spread: all are the lowest
    assert same(done.learning[0], [1.0, 1.0]) and same(done.evaluations, [1.0])
    values = [float(n) for n in range(11)]
    done = M.preprocess([values], [5.0], clamp=True)
    low, high = 1.1, 8.9  # the percentiles of all twelve numbers, entries 1.1 and 9.9 in order
    assert same(done.learning[0], [(min(max(v, low), high) - low) / (high - low) * 100 + 1 for v in values])
    done = M.preprocess([values], [5.0], clamp=True, data_range=(2.0, 4.0))
    assert same(done.learning[0], [(min(max(v, 2.0), 4.0) - 2) * 50 + 1 for v in values])
    assert M.preprocess([[NAN]], [NAN]).evaluations.isnan().all()
    assert (
        M.normalise([0.0], 0.0, 0.0).item() == 1.0
        and M.normalise([0.3, NAN], 0.3, 0.3).tolist()[0] == 1.0
        and M.normalise([NAN], 0.3, 0.3).isnan().all()
    )


# ------------------------------------------------------------------ invariants


@quick
@given(curve, curve, st.floats(0.1, 10))
def test_a_learner_like_its_expert_and_units(own: list[float], expert: list[float], unit_of: float) -> None:
    assert same(M.relative_performance(own, own), 1.0, 1e-12)
    twice = M.relative_performance([unit_of * v for v in own], [unit_of * v for v in expert])
    assert same(twice, M.relative_performance(own, expert), 1e-9)
    found = M.sample_efficiency(own, expert)
    assert same(M.sample_efficiency([4 * v for v in own], [4 * v for v in expert]), found, 1e-9)
    assert found.isnan() or found >= 0
    itself = M.sample_efficiency(own, own)
    assert itself.isnan() or itself == 0 or same(itself, 1.0, 1e-12)


def test_sample_efficiency_at_its_edges() -> None:
    assert M.sample_efficiency([0.9, 0.1, 0.2], [0.1, 0.5]).isnan()  # the best at the start
    assert M.sample_efficiency([0.1, 0.5], [0.9, 0.5]).isnan()
    assert M.sample_efficiency([0.1, 0.5], [-0.1, 0.0]).isnan()
    assert M.sample_efficiency([0.1, NAN], [0.1, 0.5]).isnan() and M.sample_efficiency([0.1, 0.5], [NAN]).isnan()
    assert M.sample_efficiency([0.5, 0.6, 0.1], [0.1, 0.5]).item() == 0.0  # it falls
    assert M.sample_efficiency([0.0, 0.1], [0.1, 0.6]).item() == 0.0  # below a fifth of the expert
    assert M.sample_efficiency([0.0, 0.125], [0.1, 0.625]).item() == 0.2


def test_rounding_does_not_decide_which_of_two_mirrored_peaks_is_first() -> None:
    own = [0.1, 0.2, 0.3, *[0.0] * 12]  # a window of 3 gives entries 0 and 2 the same numbers in another order
    assert (0.1 + 0.2) + 0.3 != (0.3 + 0.2) + 0.1
    assert M.sample_efficiency(own, STE2).isnan() and M.sample_efficiency(LL2, own).isnan()


@st.composite
def lifetimes(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    """Evaluations (L + 1, T), some of them 0, and the task of each of the L learning blocks."""
    T = draw(st.integers(1, 4))
    order = draw(st.lists(st.integers(1, T), min_size=1, max_size=7))
    values = draw(st.lists(st.integers(0, 8), min_size=(len(order) + 1) * T, max_size=(len(order) + 1) * T))
    return torch.tensor(values, dtype=torch.float64).view(-1, T) / 8, order


@quick
@given(lifetimes())
def test_ranges_and_signs(lifetime: tuple[Tensor, list[int]]) -> None:
    E, order = lifetime
    for function in (M.forward_transfer_l2, M.backward_transfer_l2):
        ratio, contrast = function(E, order), function(E, order, "contrast")
        assert not (ratio.parts < 0).any() and not (contrast.parts.abs() > 1).any()
        once = len(set(order)) == len(order)  # else the first block with a denominator may differ
        both = ~ratio.parts.isnan() & ~contrast.parts.isnan() & once
        assert torch.equal((ratio.parts[both] - 1).sign(), contrast.parts[both].sign())
        assert contrast.parts.diagonal().isnan().all()
    assert not (M.performance_maintenance(E, order).parts.abs() > 1).any()
    shifted = M.performance_maintenance(E + 0.25, order)
    assert same(shifted.parts, M.performance_maintenance(E, order).parts, 1e-12)


@quick
@given(lifetimes())
def test_a_stream_of_tasks_learned_once(lifetime: tuple[Tensor, list[int]]) -> None:
    E, _ = lifetime
    T = E.shape[1]
    R = E[torch.arange(T + 1) % len(E)]
    value, parts = M.performance_maintenance(R)
    later = transfer.backward_transfer(R)
    assert same(parts, [later[j + 1 :, j].mean().item() for j in range(T)], 1e-12)
    assert same(value, parts[:-1].mean().item(), 1e-12)
    assert same(M.performance_maintenance(R, list(range(1, T + 1))).parts, parts)
    constant = R[:1].expand_as(R) + 0.1
    for function, neutral in ((M.forward_transfer_l2, 1.0), (M.backward_transfer_l2, 1.0)):
        assert same(function(constant).value, neutral if T > 1 else NAN, 1e-12)


# ------------------------------------------------------------------ l2metrics in plain loops, over blocks of a log

Regime = tuple[int, str, str, list[float]]  # number, train or test, task, values


def read(folder: Path) -> list[Regime]:
    """The log as l2metrics takes it: all files together, in the order of experiences, cut where the task changes."""
    rows = [
        row
        for path in folder.rglob("data-log.tsv")
        for row in csv.DictReader(path.read_text().splitlines(), delimiter="\t")
    ]
    rows.sort(key=lambda row: int(row["exp_num"]))
    regimes: list[Regime] = []
    for row in rows:
        key = (int(row["block_num"]), row["block_type"], row["task_name"])
        if not regimes or regimes[-1][:3] != key:
            regimes.append((*key, []))
        regimes[-1][3].append(float(row["performance"]))
    return regimes


def by_loops(regimes: list[Regime]) -> dict[str, float]:
    """Lifetime values of l2metrics for values as they are."""
    tasks = list(dict.fromkeys(task for _, _, task, _ in regimes))
    final = [
        sum(tail) / len(tail)
        for _, kind, _, values in regimes
        for tail in [values if kind == "test" else values[int(0.9 * len(values)) :]]
    ]

    def where(kind: str, task: str) -> list[int]:
        return [n for n, regime in enumerate(regimes) if regime[1:3] == (kind, task)]

    found: dict[str, list[float]] = {}
    for task in tasks:
        trains, tests = where("train", task), where("test", task)
        firsts = [min(t for t in tests if t > n) for n in trains if any(t > n for t in tests)]
        gaps: dict[str, list[float]] = {"mrlep": [], "mrtlp": []}
        for t in tests:
            if t not in firsts and any(first < t for first in firsts):
                gaps["mrlep"].append(final[t] - final[max(first for first in firsts if first < t)])
                gaps["mrtlp"].append(final[t] - final[max(n for n in trains if n < t)])
        for name, values in gaps.items():
            if values:
                found.setdefault(f"performance_maintenance_{name}", []).append(sum(values) / len(values))
        for other in tasks:
            learned = where("train", other)
            for n in trains if other != task else ():
                way = "forward" if not learned or n < learned[0] else "backward"
                before = max(t for t in where("test", other) if t < n)
                after = min(t for t in where("test", other) if t > n)
                a, b = final[before], final[after]
                for kind, above, below in (("ratio", b, a), ("contrast", b - a, b + a)):
                    if below != 0:
                        found.setdefault(f"{way}_transfer_{kind}/{task}>{other}", []).append(above / below)
    lifetime: dict[str, list[float]] = {}
    for name, values in found.items():
        # the first value of each pair of tasks, every value of a task
        lifetime.setdefault(name.split("/")[0], []).extend(values[:1] if "/" in name else values)
    return {name: sum(values) / len(values) for name, values in lifetime.items()}


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(0, 10**6))
def test_a_log_read_back_gives_the_same_numbers(tmp_path_factory: pytest.TempPathFactory, T: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    R = torch.rand(T + 1, T, generator=draw, dtype=torch.float64)
    R[seed % (T + 1), seed % T] = 0.0
    curves = [torch.rand(1 + (seed + 5 * j) % 14, generator=draw, dtype=torch.float64) for j in range(T)]
    folder = tmp_path_factory.mktemp("log")
    M.write_l2_log(folder, R, curves, [f"Task {j}" for j in range(T)])
    expected = by_loops(read(folder))
    for name, (value, _) in M.l2_suite(R, curves, scale=False).items():
        assert same(value, expected.get(name, NAN), 1e-9), name


@quick
@given(lifetimes(), st.integers(0, 10**6))
def test_tasks_that_come_again_against_loops(lifetime: tuple[Tensor, list[int]], seed: int) -> None:
    E, order = lifetime
    source = random.Random(seed)
    curves = [[source.random() for _ in range(source.randint(1, 14))] for _ in order]
    names = [str(j) for j in range(1, E.shape[1] + 1)]
    regimes: list[Regime] = [(0, "test", name, [float(v)]) for name, v in zip(names, E[0], strict=True)]
    for b, task in enumerate(order, start=1):
        regimes.append((2 * b - 1, "train", str(task), curves[b - 1]))
        regimes += [(2 * b, "test", name, [float(v)]) for name, v in zip(names, E[b], strict=True)]
    expected = by_loops(regimes)
    found = M.l2_suite(E, curves, order=order, scale=False)
    assert expected.keys() <= found.keys()
    for name in found.keys() - {"performance_recovery"}:
        assert same(found[name].value, expected.get(name, NAN), 1e-9), name


def test_the_suite_scales_each_task_alone() -> None:
    R, experts = worked_example(), [[0.05, 0.9, 0.95], STE2, [0.2, 0.3, 0.7]]
    plain, scaled = M.l2_suite(R, CURVES, experts, scale=False), M.l2_suite(R, CURVES, experts)
    assert plain.keys() == scaled.keys() and len(plain) == 9
    assert same(plain["relative_performance"].parts[1], 1.122611)
    assert same(plain["sample_efficiency"].parts[1], 1.256494)
    assert same(plain["forward_transfer_ratio"].value, 1.566667)
    for j, curve in enumerate(CURVES):
        everything = [*curve, *R[:, j].tolist(), *experts[j]]
        spread = max(everything) - min(everything)
        maintained = plain["performance_maintenance_mrlep"].parts[j] * 100 / spread
        assert same(scaled["performance_maintenance_mrlep"].parts[j], maintained.item(), 1e-9)
    # the scale of a task's metric cancels
    moved = [[[7 * v - 2 for v in c] for c in part] for part in (CURVES, experts)]
    stretched = M.l2_suite(R * 7 - 2, moved[0], moved[1])
    for name, (value, _) in scaled.items():
        assert same(stretched[name].value, value.item(), 1e-9), name


def test_the_suite_leaves_out_what_is_undefined_and_not_what_is_unmeasured() -> None:
    R = worked_example()
    falling = [[0.9, 0.5], [0.1, 0.8], [0.1, 0.8]]
    found = M.l2_suite(R, falling, [[0.1, 0.8]] * 3, scale=False)["sample_efficiency"]
    assert found.parts.isnan().tolist() == [True, False, False] and same(found.value, 1.0)
    missing = M.l2_suite(R, [[NAN, 0.5], *falling[1:]], [[0.1, 0.8]] * 3, scale=False)
    assert missing["sample_efficiency"].value.isnan() and missing["relative_performance"].value.isnan()
    assert "sample_efficiency" not in M.l2_suite(R, falling)
    thrice = M.l2_suite(R[:, :1], [[0.5, 0.6], [0.2, 0.6], [0.6, 0.7]], order=[1, 1, 1], scale=False)
    assert same(thrice["performance_recovery"].value, 1.0)  # times 1 and 0


def test_a_missing_evaluation_reaches_exactly_what_reads_it() -> None:
    R = worked_example()
    R[3, 0] = NAN
    value, parts = M.performance_maintenance(R)
    assert value.isnan() and parts.isnan().tolist() == [True, False, True]
    assert not M.forward_transfer_l2(R).value.isnan() and M.backward_transfer_l2(R).value.isnan()
    R = worked_example()
    R[0, 1:] = NAN
    assert M.forward_transfer_l2(R).value.isnan() and same(M.backward_transfer_l2(R).value, 0.991118)
    assert same(M.performance_maintenance(R).value, 0.01)


def test_a_zero_denominator_is_passed_over() -> None:
    R = worked_example()
    R[0, 1] = 0.0
    found = M.forward_transfer_l2(R)
    assert found.parts[0, 1].isnan() and same(found.value, (1.2 + 1.5) / 2)
    E = [[0.5, 0.0], [0.5, 0.25], [0.5, 0.5]]  # task 1 twice before task 2: the second pair has a denominator
    assert same(M.forward_transfer_l2(E, order=[1, 1]).parts, [[NAN, 2.0], [NAN, NAN]])
    assert M.forward_transfer_l2([[0.5], [0.5]]).value.isnan()  # one task has no pair


# ------------------------------------------------------------------ the log itself


def test_the_log_has_the_layout_of_l2logger(tmp_path: Path) -> None:
    R = worked_example()
    R[0, 1] = NAN
    M.write_l2_log(tmp_path / "run", R, CURVES, ["split digits: 0/1", "2-3", "ü"])
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "logger_info.json",
        "scenario_info.json",
        "worker-0",
    ]
    info = json.loads((tmp_path / "run" / "logger_info.json").read_text())
    assert info == {"metrics_columns": ["performance"], "log_format_version": "1.1"}
    assert json.loads((tmp_path / "run" / "scenario_info.json").read_text())["scenario_type"] == "custom"
    blocks = sorted((tmp_path / "run" / "worker-0").iterdir(), key=lambda path: int(path.name.split("-")[0]))
    assert [p.name for p in blocks] == ["0-test", "1-train", "2-test", "3-train", "4-test", "5-train", "6-test"]
    rows = [
        row
        for path in blocks
        for row in csv.DictReader((path / "data-log.tsv").read_text().splitlines(), delimiter="\t")
    ]
    assert [int(row["exp_num"]) for row in rows] == list(range(2 + 3 + 3 + 10 + 3 + 3 + 3))  # the unmeasured is absent
    assert {row["task_name"] for row in rows} == {"splitdigits01_1", "23_2", "task_3"}
    assert {(row["exp_status"], row["block_subtype"], row["task_params"]) for row in rows} == {
        ("complete", "wake", "{}")
    }
    times = [datetime.strptime(row["timestamp"], "%Y%m%dT%H%M%S.%f") for row in rows]
    assert times == sorted(set(times))
    trained = [float(row["performance"]) for row in rows if row["block_num"] == "3"]
    assert trained == LL2
    assert [float(row["performance"]) for row in rows if row["block_num"] == "4"] == R[2].tolist()


def test_an_expert_has_a_log_of_its_own(tmp_path: Path) -> None:
    M.write_l2_expert_log(tmp_path, STE2, "2-3", task=2)
    assert read(tmp_path) == [(0, "train", "23_2", STE2)]


# ------------------------------------------------------------------ bad input


def suite(curves: Sequence[list[float]], experts: list[list[float]] | None = None) -> dict[str, M.Lifetime]:
    return M.l2_suite(worked_example(), curves, experts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: M.performance_maintenance(torch.zeros(3, 3)), r"has shape \(T \+ 1, T\), got \(3, 3\)"),
        (lambda: M.performance_maintenance(torch.zeros(3, 3), [1, 2, 3]), r"E must have shape .* got \(3, 3\)"),
        (
            lambda: M.performance_maintenance(worked_example(), [1, 2, 4]),
            r"order=\[1, 2, 4\] must hold tasks from 1 to 3",
        ),
        (lambda: M.performance_maintenance([[0.5]], []), "must hold tasks from 1 to 1"),
        (
            lambda: M.performance_maintenance(worked_example(), terminal=[1.0]),
            "terminal must be a vector with 3 entries",
        ),
        (lambda: M.forward_transfer_l2(worked_example(), kind="rato"), "did you mean 'ratio'"),
        (lambda: M.backward_transfer_l2(torch.zeros(3)), r"has shape \(T \+ 1, T\)"),
        (lambda: M.relative_performance([], [1.0]), "curve must be a vector with at least one entry"),
        (lambda: M.sample_efficiency([1.0], torch.zeros(1, 1)), "expert must be a vector"),
        (lambda: M.recovery_times([[1.0]]), "learned twice, got 1 learning blocks"),
        (lambda: M.performance_recovery([]), "times must be a vector"),
        (lambda: M.smooth(torch.zeros(1, 1)), "curve must be a vector"),
        (lambda: M.normalise([1.0], 1.0, 0.0), "from low=1 to high=0: give the smaller one first"),
        (lambda: suite(CURVES[:2]), "3 learning blocks but 2 curves"),
        (lambda: suite(CURVES, [STE2]), "3 tasks but 1 curves"),
        (
            lambda: M.write_l2_log("unused", worked_example(), CURVES, ["a"]),
            "3 tasks, but there are 3 curves and 1 task",
        ),
        (lambda: M.write_l2_log("unused", torch.zeros(2, 2), [], []), r"has shape \(T \+ 1, T\)"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
    assert not Path("unused").exists()
