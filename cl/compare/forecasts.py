"""Compare the estimates of transferability before each task with the forward transfer that was measured."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cl.compare.align import Stage
from cl.compare.figures import Block, Figure, Panel, Style, View, axis, points
from cl.compare.markup import datum, table, term, text
from cl.compare.numbers import Number, Numbers, order_of
from cl.compare.read import RunFiles
from cl.metrics.statistics import kendall_tau

RESAMPLES = 2_000
_EFFORT = 50_000_000  # most pairs of points in all resamples, which takes seconds
_MAX_LEGEND = 6  # drawings of up to so many groups have a legend
_AGAINST = {
    "experts": "R[j,j] - s_j, s_j the accuracy of an expert on task j alone",
    "zero-shot": "R[j-1,j] - R[0,j], under the mask task where there is one",
}


@dataclass(frozen=True)
class Point:
    """The estimate for one task of one run, and the forward transfer that was measured."""

    group: str
    seed: str
    estimate: Number
    forward_transfer: Number


@dataclass(frozen=True)
class Forecast:
    """All estimates of one estimator on one stream.

    Attributes:
        estimator: Its name.
        against: How forward transfer was measured: "experts" or "zero-shot", see `_AGAINST`; the two are never pooled.
        points: The tasks of runs for which both estimate and forward transfer are known.
        tau: Kendall's tau over the points.
    """

    estimator: str
    against: str
    points: list[Point]
    tau: Number


def forecasts(stage: Stage, numbers: Numbers) -> list[Forecast]:
    """Return the forecasts of a stream, one for each estimator and measure of forward transfer.

    Points and tau are added to the numbers. tau is `cl.metrics.statistics.kendall_tau` over the points of all runs. Its
    interval resamples the points as if they were independent, although those of one run are not. More than 158 points
    are resampled less than 2000 times, but at least 100 times.
    """
    found: dict[tuple[str, str], list[Point]] = {}
    for group, units in stage.runs.items():
        for run in units.values():
            of = (stage.name, order_of(run, units), group)
            for key, pairs in _points(of, run, numbers).items():
                found.setdefault(key, []).extend(pairs)
    return [
        Forecast(estimator, against, pairs, _tau(stage.name, estimator, against, pairs, numbers))
        for (estimator, against), pairs in sorted(found.items(), key=lambda item: item[0][1])
    ]


def _points(of: tuple[str, str, str], run: RunFiles, numbers: Numbers) -> dict[tuple[str, str], list[Point]]:
    """Add a run's estimates and forward transfer to the numbers; return its points by estimator and measure.

    Args:
        of: Stream, layout and group of the run.
        run: The run.
        numbers: Forward transfer is added to it once, although several estimators are compared with it.
    """
    known: dict[tuple[str, int, float], Number] = {}
    found: dict[tuple[str, str], list[Point]] = {}

    def add(against: str, quantity: str, task: int, value: float) -> Number:
        return numbers.add(Number("run", *of, against, run.seed, "", quantity, None, task, mean=value))

    for name, forecast in run.forecasts.items():
        pairs = found.setdefault((name, forecast.against), [])
        for task, (guess, gain) in enumerate(zip(forecast.estimate, forecast.forward_transfer, strict=True), start=1):
            estimate = add("", f"{name}_estimate", task, guess) if math.isfinite(guess) else None
            key = (forecast.against, task, gain)
            if math.isfinite(gain) and key not in known:
                known[key] = add(forecast.against, "forward_transfer", task, gain)
            if estimate and key in known:
                pairs.append(Point(of[2], run.seed, estimate, known[key]))
    return found


def _tau(stream: str, estimator: str, against: str, pairs: Sequence[Point], numbers: Numbers) -> Number:
    x, y = [point.estimate.mean for point in pairs], [point.forward_transfer.mean for point in pairs]
    num_resamples = min(RESAMPLES, max(100, _EFFORT // max(1, len(pairs)) ** 2))
    found = kendall_tau(x, y, level=numbers.level, num_resamples=num_resamples)
    of = (stream, "", "", against, "", "", f"{estimator}_tau")
    spread = Number("forecast", *of, mean=found.tau, low=found.low, high=found.high, num=found.num, p=found.p)
    return numbers.add(spread)


def block(found: Sequence[Forecast], look: Mapping[str, Style]) -> Block:
    """Return a block with a drawing for each estimator: forward transfer over the estimate, by task and run."""
    kinds = dict.fromkeys(forecast.against for forecast in found)
    about = (
        "The estimate for a task before it was learned, and the forward transfer that was measured afterwards:"
        f" {'; or '.join(_AGAINST.get(kind, kind) for kind in kinds)}. Each mark is a task of a run, from the second"
        " task. Points of one run share a learner, so the intervals of tau, which assume independent points, are rough."
    )
    if len(kinds) > 1:
        about += " Runs measured against experts and runs measured zero-shot are never pooled: each has its own rows."
    shown = Block("forecasts", "Forecasts", about)
    for kind in kinds:
        panels = [_panel(forecast, look) for forecast in found if forecast.against == kind and forecast.points]
        if panels:
            shown.views.append(View({"against": kind}, panels))
    return shown


def _panel(forecast: Forecast, look: Mapping[str, Style]) -> Panel:
    name = _name(forecast.estimator)
    groups = dict.fromkeys(point.group for point in forecast.points)
    traces: list[Figure] = []
    for group in groups:
        part = [point for point in forecast.points if point.group == group]
        x, y = [point.estimate.mean for point in part], [point.forward_transfer.mean for point in part]
        trace = points(x, y, group, look[group], size=9, opacity=1.0)
        shown = f"{html.escape(group)}, seed %{{customdata[0]}}, task %{{customdata[1]}}: %{{x:.4~g}}, %{{y:+.1%}}"
        more = {"customdata": [[p.seed, p.estimate.task] for p in part], "hovertemplate": f"{shown}<extra></extra>"}
        traces.append(trace | more | {"showlegend": True})
    layout = {
        "xaxis": axis(f"{name} before the task"),
        "yaxis": axis("forward transfer, points", tickformat="+.3~%"),
        "height": 340,
        "showlegend": len(groups) <= _MAX_LEGEND,
    }
    title = f"{name}, against {forecast.against}"
    words = f"Forward transfer against {name}, {len(forecast.points)} points, one mark for each task of a run."
    return Panel(title, {"data": traces, "layout": layout}, words)


def taus(found: Sequence[Forecast], stream: str, level: float) -> str:
    """Return a table of Kendall's tau between estimates and forward transfer, with a row for each estimator."""
    rows = "".join(_row(forecast) for forecast in found)
    tau = term("forecast-tau", "Kendall's tau")
    heads = ("estimator", "forward transfer against", "points", tau, f"{100 * level:g}% interval", "p")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return table(f"Rank correlation of estimates and forward transfer on {stream}", head, rows)


def _row(forecast: Forecast) -> str:
    tau = forecast.tau
    low, high = datum(tau.low, f"{tau.low:+.2f}"), datum(tau.high, f"{tau.high:+.2f}")
    cells = (
        text(forecast.against),
        str(tau.num),
        datum(tau.mean, f"{tau.mean:+.2f}"),
        "–" if math.isnan(tau.low) else f"[{low}, {high}]",
        datum(tau.p, f"{tau.p:.2g}" if tau.p >= 1e-4 else "< 0.0001"),
    )
    name = term(_anchor(forecast.estimator), _name(forecast.estimator))
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def meanings(found: Sequence[Forecast], level: float) -> dict[str, str]:
    """Return the definitions of the terms of the table, by their anchors on the page."""
    from cl.metrics.transferability import ESTIMATORS

    if not found:
        return {}
    known = {name: (e.formula, e.source, e.higher_means) for name, e in ESTIMATORS.items()}
    known["covariance"] = (
        "mean over the earlier tasks of the similarity of their feature covariance to this task's",
        "Wu, Zhang & Re 2020",
        "more similar",
    )
    items = {}
    for name in dict.fromkeys(forecast.estimator for forecast in found):
        formula, source, higher = known.get(name, ("An estimator that this version does not know", "", "unknown"))
        items[_anchor(name)] = " ".join(f"{part}." for part in (formula, source, f"Higher means {higher}") if part)
    items["forecast-tau"] = (
        "Kendall's tau-b between estimates and measured forward transfer over the points of all runs: 1 if both give"
        " the points the same order, -1 if the reverse. Kendall 1945. The interval is the percentile bootstrap over"
        f" points at {100 * level:g}%. It is rough, and so is p, since points of one run share a learner."
    )
    return items


def _name(estimator: str) -> str:
    return estimator.replace("_", " ")


def _anchor(estimator: str) -> str:
    return f"estimator-{estimator}"
