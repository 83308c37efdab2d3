"""Scalars that need more than R: curves inside tasks, references, resources, calibration, probes, forecasts.

A table like `cl.metrics.transfer.SCALARS`. Each entry names what it needs; a run that has not measured that says so
instead of giving a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl.errors import InputError
from cl.metrics import against_experts as against
from cl.metrics import costs as cost
from cl.metrics import inside_tasks as inside
from cl.metrics import lifelong
from cl.metrics.transfer import average_accuracy, bwt_gem, fwt_gem, intransigence_chaudhry
from cl.report.run import Run
from cl.report.wording import percent

# What a measure may need, and how a run gets it.
NEEDS = {
    "curves": "report.points=10 (or report.every=N) evaluates inside tasks",
    "even": "report.points=10 gives every task's curve the same number of points",
    "rows": "the sizes of the test sets are not known",
    "accuracy": "only an accuracy over all rows is a mean of those of the tasks",
    "experts": "references=[experts] trains one on each task",
    "joint": "references=[joint] trains one on tasks 1 to k",
    "costs": "cl.measure.resources.Resources, an instrument, records what each task takes",
    "flops": "report.flops=true counts operations",
    "labels": "only labels have a confidence",
    "ridge": "probes=[ridge] fits one after each task",
    "estimates": "estimators=[...] forecasts before each task",
}


class Evidence:
    """What a run has measured over its first k tasks, as the metrics want it.

    Args:
        run: The run.

    Attributes:
        R: (k + 1, k) under the mask of the scenario, float64.
        fair_R: The same where only the classes of the task compete, as they do for an expert on it.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.k = run, max(run.tasks_learned, 0)
        self.R, self.fair_R = (m.R[: self.k + 1, : self.k].double().cpu() for m in (run.primary, run.zero_shot))
        self._curves = run.instruments.get("curves")
        self._resources = run.instruments.get("resources")

    def missing(self, need: str) -> bool:
        """Say whether something that a measure needs was not measured."""
        if need == "even":
            return self.missing("curves") or len({len(curve) for curve in self.own_curves}) != 1
        here = {
            "curves": lambda: self._curves is not None and len(self._curves) > 0,
            "rows": lambda: len(self.run.test_rows) >= self.k,
            "accuracy": lambda: self.run.primary.metric == "accuracy",
            "experts": lambda: "experts" in self.run.references,
            "joint": lambda: "joint" in self.run.references,
            "costs": lambda: self._resources is not None,
            "flops": lambda: self._resources is not None and not any(map(math.isnan, self.column("flops"))),
            "labels": lambda: bool(self.run.calibration),
            "ridge": lambda: "ridge" in self.run.matrices,
            "estimates": lambda: "estimates" in self.run.instruments,
        }
        return not here[need]()

    def column(self, name: str) -> list[float]:
        """Return a column of the resources, an entry a task."""
        return list(self._resources.column(name)) if self._resources is not None else []

    @property
    def inside(self) -> tuple[Tensor, list[int]]:
        """Curves (N, k) of all tasks and the task in training at each point, without those at a task's step 0."""
        assert self._curves is not None
        values = self._curves.values()[:, : self.k]
        rows = [n for n, (task, step, _) in enumerate(self._curves.at) if step and task <= self.k]
        return values[rows].double(), [self._curves.at[n][0] for n in rows]

    @property
    def own_curves(self) -> list[list[float]]:
        """The curve of each task while it is trained, from step 0, under the mask of the scenario."""
        return self._own(0)

    @property
    def fair_curves(self) -> list[list[float]]:
        """The same where only the classes of the task compete, as they do for an expert on it."""
        return self._own(list(self.run.calibration or self.run.matrices).index(self.run.zero_shot.mask))

    def _own(self, mask: int) -> list[list[float]]:
        assert self._curves is not None
        return list(self._curves.own(mask)[: self.k])

    @property
    def expert_curves(self) -> list[list[float]]:
        """The curve of each expert, from step 0."""
        return [[value for _, value in one["curve"]] for one in self.run.references["experts"][: self.k]]

    def values(self, kind: str) -> list[float]:
        """Return what each reference reaches on its task."""
        return [one["value"] for one in self.run.references[kind][: self.k]]

    @property
    def forward(self) -> Tensor:
        """What the tasks before j gave to task j (k,): against an expert, else zero-shot; NaN for the first."""
        if not self.missing("experts"):
            gain = self.R[1:].diagonal() - torch.tensor(self.values("experts"), dtype=torch.float64)
        else:
            R = self.run.zero_shot.R[: self.k + 1, : self.k].double().cpu()
            gain = R[:-1].diagonal() - R[0]
        return torch.cat([gain.new_full((1,), math.nan), gain[1:]])


@dataclass(frozen=True)
class Measure:
    """One scalar of a run, and what must be said next to its number.

    Attributes:
        function: Evidence to a number.
        needs: Keys of `NEEDS`.
        formula: One line, tasks numbered from 1.
        source: The paper or library that the definition is from.
        scale: Unit and range.
        divisor: What the sum is divided by.
        higher_is_better: The sign.
        weighting: What counts once in the mean.
        fair: Whether it is read under the mask "task" where there is one, beside experts who know no other classes.
    """

    function: Callable[[Evidence], Tensor | float]
    needs: tuple[str, ...]
    formula: str
    source: str
    scale: str = "fraction, [0, 1]"
    divisor: str = "T"
    higher_is_better: bool = True
    weighting: str = "task mean"
    fair: bool = False


def _mean(values: Iterable[Tensor | float]) -> float:
    """Return the mean of what is defined, NaN of nothing."""
    found = [float(value) for value in values if not math.isnan(float(value))]
    return sum(found) / len(found) if found else math.nan


def _each(function: Callable[[Any, Any], Tensor]) -> Callable[[Evidence], float]:
    """Return the mean over tasks, from the second, of a comparison of a task's curve with its expert's."""
    return lambda e: _mean(function(a, b) for a, b in list(zip(e.fair_curves, e.expert_curves, strict=True))[1:])


def _gap(e: Evidence) -> float:
    return _mean(inside.stability_gap(*e.inside).flatten())


def _recovered(e: Evidence) -> float:
    """Share of the falls that were made good within the task that brought them."""
    falls = inside.stability_gap(*e.inside) > 0
    back = ~inside.recovery(*e.inside).isnan()
    return float((falls & back).sum() / falls.sum()) if bool(falls.any()) else math.nan


_DELANGE, _L2, _LIBERO = "De Lange et al. 2023", "New et al. 2022 (l2metrics)", "Liu et al. 2023 (LIBERO)"
_NEVIS, _DIAZ = "Bornschein et al. 2022 (NEVIS'22)", "Diaz-Rodriguez et al. 2018"
_SIGNED, _RATIO = "fraction, [-1, 1]", "ratio, [0, inf), 1 is neutral"
_BOTH = ("even", "experts")

MEASURES: dict[str, Measure] = {
    "accuracy_all_rows": Measure(
        lambda e: average_accuracy(e.R, e.run.test_rows[: e.k]),
        ("rows", "accuracy"), "sum_j n_j R[T,j] / sum_j n_j, n_j rows of test set j", "Lopez-Paz & Ranzato 2017 (GEM)",
        divisor="test rows", weighting="row mean",
    ),
    "average_anytime_accuracy": Measure(
        lambda e: inside.average_anytime_accuracy(*e.inside),
        ("curves",), "mean_n mean_{j<=k(n)} acc(j, n)", "Caccia et al. 2020", divisor="points, tasks seen inside",
    ),
    "min_accuracy": Measure(
        lambda e: inside.min_accuracy_delange(*e.inside)[-1],
        ("curves",), "mean_{i<T} min_{n after i} acc(i, n)", _DELANGE, divisor="T - 1",
    ),
    "worst_case_accuracy": Measure(
        lambda e: inside.worst_case_accuracy_delange(*e.inside)[-1],
        ("curves",), "acc(T, end) / T + (1 - 1/T) min-ACC", _DELANGE,
    ),
    "windowed_forgetting_10": Measure(
        lambda e: inside.windowed_forgetting(e.inside[0], 10).mean(),
        ("curves",), "mean_i max_{m<=n<m+10} acc(i, m) - acc(i, n)", _DELANGE, higher_is_better=False,
    ),
    "windowed_plasticity_10": Measure(
        lambda e: inside.windowed_plasticity(e.inside[0], 10).mean(),
        ("curves",), "mean_i max_{m<=n<m+10} acc(i, n) - acc(i, m)", _DELANGE,
    ),
    "stability_gap": Measure(
        _gap, ("curves",), "mean_{i<k} acc(i, end of k-1) - min_{n in k} acc(i, n)",
        "clsim, after De Lange et al. 2023", _SIGNED, "T (T - 1) / 2", higher_is_better=False, weighting="pair mean",
    ),
    "recovered_gaps": Measure(
        _recovered, ("curves",), "share of falls made good in the task that brought them", "clsim",
        divisor="pairs that fell", weighting="pair mean",
    ),
    "fwt_libero": Measure(
        lambda e: against.fwt_libero(e.own_curves).mean(),
        ("even",), "mean_k mean_e c_k(e), flat after its first maximum", _LIBERO,
    ),
    "nbt_libero": Measure(
        lambda e: against.nbt_libero(e.R).mean(),
        (), "sum_k mean_{i>k} (R[k,k] - R[i,k])", _LIBERO, _SIGNED, higher_is_better=False,
    ),
    "auc_libero": Measure(
        lambda e: against.auc_libero(e.R, e.own_curves).mean(),
        ("even",), "mean_k (FWT_k + sum_{i>k} R[i,k]) / (T - k + 1)", _LIBERO,
    ),
    "fwt_expert": Measure(
        lambda e: against.fwt_expert(e.fair_R, e.values("experts")),
        ("experts",), "sum_{j>=2} (R[j,j] - s_j), s_j an expert on task j alone", "Wang et al. 2023",
        _SIGNED, "T - 1", fair=True,
    ),
    "fwt_continual_world": Measure(
        lambda e: against.fwt_continual_world(e.fair_curves, e.expert_curves).mean(),
        _BOTH, "sum_j (AUC_j - AUC_j^ref) / (1 - AUC_j^ref)", "Wolczyk et al. 2021 (Continual World)",
        "(-inf, 1]", fair=True,
    ),
    "jump_start": Measure(
        lambda e: against.jump_start(e.fair_curves, e.expert_curves)[1:].mean(),
        _BOTH, "sum_{j>=2} c_j(0) - c_j^ref(0)", "Taylor & Stone 2009", _SIGNED, "T - 1", fair=True,
    ),
    "relative_performance": Measure(
        _each(lifelong.relative_performance),
        ("curves", "experts"), "mean_{j>=2} sum c_j / sum c_j^ref", _L2, _RATIO, "tasks where it is defined", fair=True,
    ),
    "sample_efficiency": Measure(
        _each(lifelong.sample_efficiency),
        ("curves", "experts"), "mean_{j>=2} (sat / sat^ref) (n^ref / n)", _L2, _RATIO,
        "tasks where it is defined", fair=True,
    ),
    "performance_maintenance": Measure(
        lambda e: lifelong.performance_maintenance(e.R).value,
        (), "mean_j mean_{i>j} (R[i,j] - R[j,j])", _L2, _SIGNED, "T, blocks inside",
    ),
    "forward_transfer_ratio": Measure(
        lambda e: lifelong.forward_transfer_l2(e.R).value,
        (), "mean_{i<j} R[i,j] / R[i-1,j]", _L2, _RATIO, "pairs with R[i-1,j] > 0", weighting="pair mean",
    ),
    "backward_transfer_ratio": Measure(
        lambda e: lifelong.backward_transfer_l2(e.R).value,
        (), "mean_{i>j} R[i,j] / R[i-1,j]", _L2, _RATIO, "pairs with R[i-1,j] > 0", weighting="pair mean",
    ),
    "intransigence_chaudhry": Measure(
        lambda e: intransigence_chaudhry(e.R, e.values("joint")),
        ("joint",), "sum_k (a_k - R[k,k]), a_k on task k of a learner of tasks 1..k", "Chaudhry et al. 2018 (RWalk)",
        _SIGNED, higher_is_better=False,
    ),
    "rep_bwt": Measure(
        lambda e: bwt_gem(e.run.matrices["ridge"].R[: e.k + 1, : e.k]),
        ("ridge",), "sum_{j<T} (P[T,j] - P[j,j])", "Davari et al. 2022 (their forgetting, sign turned)",
        _SIGNED, "T - 1",
    ),
    "rep_fwt": Measure(
        lambda e: fwt_gem(e.run.matrices["ridge"].R[: e.k + 1, : e.k]),
        ("ridge",), "sum_{j>=2} (P[j-1,j] - P[0,j])", "Davari et al. 2022", _SIGNED, "T - 1",
    ),
    "calibration_error": Measure(
        lambda e: next(iter(e.run.calibration.values())).R[e.k, : e.k].double().mean(),
        ("labels",), "sum_j ECE[T,j], 15 equal intervals of confidence", "Guo et al. 2017", higher_is_better=False,
    ),
    "seconds": Measure(
        lambda e: sum(e.column("seconds")), ("costs",), "wall time of all tasks, evaluation not counted", "clsim",
        "seconds", "1", higher_is_better=False, weighting="sum",
    ),
    "model_size_efficiency": Measure(
        lambda e: cost.model_size_efficiency_diaz(e.column("parameters")),
        ("costs",), "min(1, mean_i |theta_1| / |theta_i|)", _DIAZ,
    ),
    "sample_storage_efficiency": Measure(
        lambda e: cost.sample_storage_efficiency_diaz(e.column("stored_examples"), sum(e.column("rows"))),
        ("costs",), "1 - min(1, mean_i M_i / D), in examples", _DIAZ,
    ),
    "computational_efficiency": Measure(
        lambda e: cost.computational_efficiency_diaz(e.column("pass_flops"), e.column("flops")),
        ("flops",), "min(1, mean_i ops of one plain pass over task i / (1 + ops spent on it))", _DIAZ,
    ),
    "error_nevis": Measure(
        lambda e: cost.nevis_error(1 - e.R[1:].diagonal()), (), "sum_t (1 - R[t,t])", _NEVIS, higher_is_better=False,
    ),
    "flops_nevis": Measure(
        lambda e: cost.nevis_compute(e.column("flops")), ("flops",), "sum_t training FLOPs of task t", _NEVIS,
        "FLOPs", "1", higher_is_better=False, weighting="sum",
    ),
}  # fmt: skip


def measure(run: Run) -> tuple[dict[str, float], dict[str, str]]:
    """Return the measures of a run over the tasks learned so far, and why the others are absent.

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
    if evidence.k < 1:
        return {}, dict.fromkeys(MEASURES, "no task has been learned yet")
    for name, entry in MEASURES.items():
        missing = [need for need in entry.needs if evidence.missing(need)]
        if missing:
            absent[name] = NEEDS[missing[0]]
            continue
        try:
            value = float(entry.function(evidence))
        except InputError as error:  # at the end of a long run a number may be missing, the others may not
            absent[name] = str(error)
            continue
        if math.isnan(value):
            absent[name] = "undefined for these numbers, or one of them is unmeasured"
        else:
            values[name] = value
    return values, absent


_UNEVEN = 1.2  # of the largest test set to the smallest: where means over tasks and over rows may differ
# Those that a reader looks for first, and whether they are signed.
_HEADLINE = {
    "worst_case_accuracy": ("worst-case accuracy", False),
    "stability_gap": ("stability gap", True),
    "fwt_expert": ("forward transfer against experts", True),
    "intransigence_chaudhry": ("intransigence", True),
    "rep_bwt": ("backward transfer of the features", True),
    "calibration_error": ("calibration error", False),
}


def beside(run: Run) -> str:
    """Return what was measured beside R, as one line in percent; empty before the first task.

    Example:
        >>> from cl.testing import toy_run
        >>> beside(toy_run()).split()[:2]
        ['calibration', 'error']
    """
    values, _ = measure(run)
    found = [f"{words} {percent(values[n], signed)}" for n, (words, signed) in _HEADLINE.items() if n in values]
    sizes = run.test_rows[: run.tasks_learned]
    if "accuracy_all_rows" in values and max(sizes) > _UNEVEN * min(sizes):
        least, most = min(sizes), max(sizes)
        whole = percent(values["accuracy_all_rows"])
        found.insert(0, f"accuracy over all rows {whole} (tasks have {least} to {most} test rows and count alike in R)")
    return ", ".join(found)


def forecasts(run: Run) -> dict[str, dict[str, Any]]:
    """Return what each estimator said of each task beside the forward transfer that was measured, and Kendall's tau.

    Forward transfer is R[j,j] - s_j where experts were trained, else R[j-1,j] - R[0,j], for j >= 2.
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
