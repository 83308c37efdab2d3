"""Scalars that need more than R: curves inside tasks, references, resources, calibration, probes, forecasts.

`MEASURES` is a table like `cl.metrics.transfer.SCALARS`; the user's own scalars are treated like its entries. Each
scalar lists what it needs. If a run has not measured that, reports show the reason instead of a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from cl.errors import InputError, unknown
from cl.metrics import against_experts as against
from cl.metrics import costs as cost
from cl.metrics import inside_tasks as inside
from cl.metrics import lifelong
from cl.metrics.scalar import AnyScalar, Scalar, range_of_metric
from cl.metrics.transfer import (
    LIBRARY_VARIANTS,
    SCALARS,
    average_accuracy,
    bwt_gem,
    fwt_gem,
    intransigence_chaudhry,
)
from cl.report.evidence import INSTRUMENT, NEEDS, Evidence, remedy
from cl.report.run import Run
from cl.report.wording import percent
from cl.rundir import RESOURCES


def _measured(
    name: str,
    function: Callable[[Evidence], Tensor | float],
    needs: tuple[str, ...],
    formula: str,
    source: str,
    scale: str = "fraction, [0, 1]",
    divisor: str = "T",
    weighting: str = "task mean",
    **flags: bool,
) -> AnyScalar:
    return Scalar(name, function, formula, source, scale, divisor, weighting=weighting, needs=needs, **flags)


def _mean(values: Iterable[Tensor | float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there is none."""
    found = [float(value) for value in values if not math.isnan(float(value))]
    return sum(found) / len(found) if found else math.nan


def _each(function: Callable[[Any, Any], Tensor]) -> Callable[[Evidence], float]:
    """Return the mean over tasks, from the second, of a comparison of a task's curve with its expert's."""
    return lambda e: _mean(function(a, b) for a, b in list(zip(e.fair_curves, e.expert_curves, strict=True))[1:])


def _gap(e: Evidence) -> float:
    return _mean(inside.stability_gap(*e.inside).flatten())


def _recovered(e: Evidence) -> float:
    """Return the share of the falls of stability_gap from which the accuracy recovered within the same task."""
    falls = inside.stability_gap(*e.inside) > 0
    back = ~inside.recovery(*e.inside).isnan()
    return float((falls & back).sum() / falls.sum()) if bool(falls.any()) else math.nan


def _prequential(e: Evidence, column: str) -> list[float]:
    """Return a column of the last record of each task so far; NaN alone if there is none."""
    last = {row["task"]: row[column] for row in e.records("prequential") if row["task"] <= e.k}
    return list(last.values()) or [math.nan]


_DELANGE, _L2, _LIBERO = "De Lange et al. 2023", "New et al. 2022 (l2metrics)", "Liu et al. 2023 (LIBERO)"
_NEVIS, _DIAZ = "Bornschein et al. 2022 (NEVIS'22)", "Diaz-Rodriguez et al. 2018"
_SIGNED, _RATIO = "fraction, [-1, 1]", "ratio, [0, inf), 1 is neutral"
_BOTH = ("even", "experts")

_BUILT_IN = [
    _measured("accuracy_all_rows",
        lambda e: average_accuracy(e.R, e.run.test_rows[: e.k]),
        ("rows", "accuracy"), "sum_j n_j R[T,j] / sum_j n_j, n_j rows of test set j", "Lopez-Paz & Ranzato 2017 (GEM)",
        divisor="test rows", weighting="row mean",
    ),
    _measured("average_anytime_accuracy",
        lambda e: inside.average_anytime_accuracy(*e.inside),
        ("curves",), "mean_n mean_{j<=k(n)} acc(j, n)", "Caccia et al. 2020", divisor="points, tasks seen inside",
    ),
    _measured("min_accuracy",
        lambda e: inside.min_accuracy_delange(*e.inside)[-1],
        ("curves",), "mean_{i<T} min_{n after i} acc(i, n)", _DELANGE, divisor="T - 1",
    ),
    _measured("worst_case_accuracy",
        lambda e: inside.worst_case_accuracy_delange(*e.inside)[-1],
        ("curves",), "acc(T, end) / T + (1 - 1/T) min-ACC", _DELANGE,
    ),
    _measured("windowed_forgetting_10",
        lambda e: inside.windowed_forgetting(e.inside[0], 10).mean(),
        ("curves",), "mean_i max_{m<=n<m+10} acc(i, m) - acc(i, n)", _DELANGE, higher_is_better=False,
    ),
    _measured("windowed_plasticity_10",
        lambda e: inside.windowed_plasticity(e.inside[0], 10).mean(),
        ("curves",), "mean_i max_{m<=n<m+10} acc(i, n) - acc(i, m)", _DELANGE,
    ),
    _measured("stability_gap",
        _gap, ("curves",), "mean_{i<k} acc(i, end of k-1) - min_{n in k} acc(i, n)",
        "clsim, after De Lange et al. 2023", _SIGNED, "T (T - 1) / 2", higher_is_better=False, weighting="pair mean",
    ),
    _measured("recovered_gaps",
        _recovered, ("curves",), "share of falls made good in the task that brought them", "clsim",
        divisor="pairs that fell", weighting="pair mean",
    ),
    _measured("fwt_libero",
        lambda e: against.fwt_libero(e.own_curves).mean(),
        ("even",), "mean_k mean_e c_k(e), flat after its first maximum", _LIBERO,
    ),
    _measured("nbt_libero",
        lambda e: against.nbt_libero(e.R).mean(),
        (), "sum_k mean_{i>k} (R[k,k] - R[i,k])", _LIBERO, _SIGNED, higher_is_better=False,
    ),
    _measured("auc_libero",
        lambda e: against.auc_libero(e.R, e.own_curves).mean(),
        ("even",), "mean_k (FWT_k + sum_{i>k} R[i,k]) / (T - k + 1)", _LIBERO,
    ),
    _measured("fwt_expert",
        lambda e: against.fwt_expert(e.fair_R, e.values("experts")),
        ("experts",), "sum_{j>=2} (R[j,j] - s_j), s_j an expert on task j alone", "Wang et al. 2023",
        _SIGNED, "T - 1", fair=True,
    ),
    _measured("fwt_continual_world",
        lambda e: against.fwt_continual_world(e.fair_curves, e.expert_curves).mean(),
        _BOTH, "sum_j (AUC_j - AUC_j^ref) / (1 - AUC_j^ref)", "Wolczyk et al. 2021 (Continual World)",
        "(-inf, 1]", fair=True,
    ),
    _measured("jump_start",
        lambda e: against.jump_start(e.fair_curves, e.expert_curves)[1:].mean(),
        _BOTH, "sum_{j>=2} c_j(0) - c_j^ref(0)", "Taylor & Stone 2009", _SIGNED, "T - 1", fair=True,
    ),
    _measured("relative_performance",
        _each(lifelong.relative_performance),
        ("curves", "experts"), "mean_{j>=2} sum c_j / sum c_j^ref", _L2, _RATIO, "tasks where it is defined", fair=True,
    ),
    _measured("sample_efficiency",
        _each(lifelong.sample_efficiency),
        ("curves", "experts"), "mean_{j>=2} (sat / sat^ref) (n^ref / n)", _L2, _RATIO,
        "tasks where it is defined", fair=True,
    ),
    _measured("performance_maintenance",
        lambda e: lifelong.performance_maintenance(e.R).value,
        (), "mean_j mean_{i>j} (R[i,j] - R[j,j])", _L2, _SIGNED, "T, blocks inside",
    ),
    _measured("forward_transfer_ratio",
        lambda e: lifelong.forward_transfer_l2(e.R).value,
        (), "mean_{i<j} R[i,j] / R[i-1,j]", _L2, _RATIO, "pairs with R[i-1,j] > 0", weighting="pair mean",
    ),
    _measured("backward_transfer_ratio",
        lambda e: lifelong.backward_transfer_l2(e.R).value,
        (), "mean_{i>j} R[i,j] / R[i-1,j]", _L2, _RATIO, "pairs with R[i-1,j] > 0", weighting="pair mean",
    ),
    _measured("intransigence_chaudhry",
        lambda e: intransigence_chaudhry(e.R, e.values("joint")),
        ("joint",), "sum_k (a_k - R[k,k]), a_k on task k of a learner of tasks 1..k", "Chaudhry et al. 2018 (RWalk)",
        _SIGNED, higher_is_better=False,
    ),
    _measured("rep_bwt",
        lambda e: bwt_gem(e.run.matrices["ridge"].R[: e.k + 1, : e.k]),
        ("ridge",), "sum_{j<T} (P[T,j] - P[j,j])", "Davari et al. 2022 (their forgetting, sign turned)",
        _SIGNED, "T - 1",
    ),
    _measured("rep_fwt",
        lambda e: fwt_gem(e.run.matrices["ridge"].R[: e.k + 1, : e.k]),
        ("ridge",), "sum_{j>=2} (P[j-1,j] - P[0,j])", "Davari et al. 2022", _SIGNED, "T - 1",
    ),
    _measured("prequential_accuracy",
        lambda e: _prequential(e, "accuracy_so_far")[-1],
        (f"{INSTRUMENT}prequential",), "share of incoming rows that were predicted rightly before their step",
        "Gama et al. 2013", divisor="rows of the tasks so far", weighting="row mean",
    ),
    _measured("prequential_accuracy_by_task",
        lambda e: _mean(_prequential(e, "accuracy_in_task")),
        (f"{INSTRUMENT}prequential",), "sum_j share of the rows of task j predicted rightly before their step",
        "Gama et al. 2013",
    ),
    _measured("calibration_error",
        lambda e: next(iter(e.run.calibration.values())).R[e.k, : e.k].double().mean(),
        ("labels",), "sum_j ECE[T,j], 15 equal intervals of confidence", "Guo et al. 2017", higher_is_better=False,
    ),
    _measured("seconds",
        lambda e: sum(e.column("seconds")), ("costs",), "wall time of all tasks, evaluation not counted", "clsim",
        "seconds", "1", higher_is_better=False, weighting="sum",
    ),
    _measured("model_size_efficiency",
        lambda e: cost.model_size_efficiency_diaz(e.column("parameters")),
        ("costs",), "min(1, mean_i |theta_1| / |theta_i|)", _DIAZ,
    ),
    _measured("sample_storage_efficiency",
        lambda e: cost.sample_storage_efficiency_diaz(e.column("stored_examples"), sum(e.column("rows"))),
        ("costs",), "1 - min(1, mean_i M_i / D), in examples", _DIAZ,
    ),
    _measured("computational_efficiency",
        lambda e: cost.computational_efficiency_diaz(e.column("pass_flops"), e.column("flops")),
        ("flops",), "min(1, mean_i ops of one plain pass over task i / (1 + ops spent on it))", _DIAZ,
    ),
    _measured("error_nevis",
        lambda e: cost.nevis_error(1 - e.R[1:].diagonal()), (), "sum_t (1 - R[t,t])", _NEVIS, higher_is_better=False,
    ),
    _measured("flops_nevis",
        lambda e: cost.nevis_compute(e.column("flops")), ("flops",), "sum_t training FLOPs of task t", _NEVIS,
        "FLOPs", "1", higher_is_better=False, weighting="sum",
    ),
]  # fmt: skip
MEASURES: dict[str, AnyScalar] = {one.name: one for one in _BUILT_IN}


def measure(run: Run) -> tuple[dict[str, float], dict[str, str]]:
    """Return the values of the scalars over the tasks learned so far, and for the others the reason why they have none.

    Example:
        >>> from cl.testing import toy_run
        >>> values, absent = measure(toy_run())
        >>> absent["fwt_expert"]
        'references=[experts] trains one on each task'
    """
    key = run.tasks_learned, len(run.references)
    if key not in run.measures:
        run.measures.clear()
        run.measures[key] = _measure(run)
    return run.measures[key]


def _measure(run: Run) -> tuple[dict[str, float], dict[str, str]]:
    values: dict[str, float] = {}
    absent: dict[str, str] = {}
    evidence = Evidence(run)
    for name, scalar in known(run).items():
        try:
            values[name] = value_of(scalar, evidence)
        except InputError as error:  # a missing number must not cost the other ones
            absent[name] = str(error)
        except Exception as error:
            if name in MEASURES:
                raise
            absent[name] = f"its function failed ({type(error).__name__}: {' '.join(str(error).split())})"
    return values, absent


def value_of(scalar: AnyScalar, evidence: Evidence) -> float:
    """Return the value of a scalar.

    Raises:
        InputError: If it has none: no task is learned, a need is missing, it is NaN, or outside of its range.
    """
    if evidence.k < 1:
        raise InputError("no task has been learned yet")
    for need in scalar.needs:
        if evidence.missing(need):
            raise InputError(remedy(need))
    value = float(scalar.function(evidence))
    if math.isnan(value):
        raise InputError("undefined for these numbers, or one of them is unmeasured")
    low, high = scalar.range
    fractions = range_of_metric(evidence.run.primary.metric) == (0.0, 1.0)  # the ranges hold for such metrics alone
    if fractions and not low - _ROUNDING <= value <= high + _ROUNDING:
        raise InputError(f"{value:g} is outside of its range, {scalar.scale}")
    return value


def recall(run: Run, summary: Mapping[str, Any]) -> None:
    """Give a run that is read from its directory the scalars in its `transfer.json`.

    The user's own scalars are restored from the definitions in the file, without their code.

    Args:
        run: The run, which is changed.
        summary: The content of `transfer.json`.
    """
    if "measures" not in summary or summary.get("tasks_learned") != run.tasks_learned:
        return
    found = {name: raw for name, raw in summary["measures"].items() if raw.get("value") is not None}
    fields = ("source", "scale", "divisor", "higher_is_better", "weighting")
    values = {name: float(raw["value"]) for name, raw in found.items()}
    own = {}
    for name, raw in found.items():
        if "defined_in" in raw:
            definition = {key: raw[key] for key in fields}
            own[name] = Scalar(name, lambda _, value=values[name]: value, raw["definition"], **definition)
            own[name].__module__ = raw["defined_in"]
    run.own_scalars = own
    run.measures[run.tasks_learned, len(run.references)] = values, dict(summary.get("absent", {}))


def known(run: Run) -> dict[str, AnyScalar]:
    """Return all scalars that need more than R, by name: the built-in ones, then the user's own."""
    return {**MEASURES, **run.own_scalars}


def checked_scalars(scalars: Iterable[Any]) -> dict[str, AnyScalar]:
    """Check the user's own scalars, and return them by name.

    Args:
        scalars: Functions decorated by `cl.scalar`.

    Raises:
        InputError: If one is no scalar, its name is taken or not allowed, or a need is unknown.

    Example:
        >>> checked_scalars([print])
        Traceback (most recent call last):
        cl.errors.InputError: <built-in function print> is no scalar: put @cl.scalar(formula=..., source=...) above it.
    """
    found: dict[str, AnyScalar] = {}
    taken = {*SCALARS, *LIBRARY_VARIANTS, *MEASURES, *RESOURCES.columns}
    for one in scalars:
        if not isinstance(one, Scalar):
            raise InputError(f"{one!r} is no scalar: put @cl.scalar(formula=..., source=...) above it.")
        if not re.fullmatch(r"[\w-]+", one.name) or one.name.startswith("tuning_"):
            raise InputError(f"A scalar cannot be called {one.name!r}: give its function a name in words.")
        if one.name in taken:
            raise InputError(f"There is a scalar called {one.name!r} already: give the function another name.")
        for need in one.needs:
            if need not in NEEDS and not need.startswith(INSTRUMENT):
                raise unknown("need of a scalar", need, [*NEEDS, f"{INSTRUMENT}NAME"])
        taken.add(one.name)
        found[one.name] = one
    return found


_ROUNDING = 1e-6  # how far rounding of float32 may put a value outside of its range
_UNEVEN = 1.2  # ratio of the largest to the smallest test set from which the mean over all examples is shown too
# The scalars that reports show in one line: their words, and whether they are signed.
_HEADLINE = {
    "worst_case_accuracy": ("worst-case accuracy", False),
    "stability_gap": ("stability gap", True),
    "fwt_expert": ("forward transfer against experts", True),
    "intransigence_chaudhry": ("intransigence", True),
    "rep_bwt": ("backward transfer of the features", True),
    "calibration_error": ("calibration error", False),
}


def beside(run: Run) -> str:
    """Return the main scalars that need more than R as one line, fractions in percent; empty before the first task.

    Example:
        >>> from cl.testing import toy_run
        >>> beside(toy_run()).split()[:2]
        ['calibration', 'error']
    """
    values, absent = measure(run)
    found = [f"{words} {percent(values[n], signed)}" for n, (words, signed) in _HEADLINE.items() if n in values]
    if run.tasks_learned > 0:
        found += [_shown(scalar, values, absent) for scalar in run.own_scalars.values()]
    sizes = run.test_rows[: run.tasks_learned]
    if "accuracy_all_rows" in values and max(sizes) > _UNEVEN * min(sizes):
        least, most = min(sizes), max(sizes)
        whole = percent(values["accuracy_all_rows"])
        found.insert(0, f"accuracy over all rows {whole} (tasks have {least} to {most} test rows and count alike in R)")
    return ", ".join(found)


def _shown(scalar: AnyScalar, values: dict[str, float], absent: dict[str, str]) -> str:
    """Return one of the user's own scalars as text, or the reason why it has no value."""
    if scalar.name not in values:
        return f"no {scalar.name} ({absent[scalar.name]})"
    value = values[scalar.name]
    is_fraction = scalar.scale.startswith("fraction")
    return f"{scalar.name} {percent(value, scalar.range[0] < 0) if is_fraction else f'{value:.3g}'}"


def forecasts(run: Run) -> dict[str, dict[str, Any]]:
    """Return, for each estimator of transferability, its values, the measured forward transfer, and Kendall's tau.

    Forward transfer is R[j,j] - s_j if experts were trained, else R[j-1,j] - R[0,j]; tau is over the tasks j >= 2.
    """
    from cl.metrics.statistics import kendall_tau

    estimates, evidence = run.instruments.get("estimates"), Evidence(run)
    if estimates is None or evidence.k < 1:
        return {}
    gain = evidence.forward.tolist()
    found = {}
    for kind in estimates.kinds:
        guess = estimates.column(kind)[: evidence.k]
        tau = kendall_tau(guess[1:], gain[1:])
        interval = {"tau": tau.tau, "low": tau.low, "high": tau.high, "p": tau.p}
        against_what = "zero-shot" if evidence.missing("experts") else "experts"
        found[kind] = {"estimate": guess, "forward_transfer": gain, "against": against_what, **interval}
    return found
