"""What estimators of transferability said before each task, beside the forward transfer that came."""

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
_EFFORT = 50_000_000  # pairs of points over all resamples: seconds, for thousands of points too
_MAX_LEGEND = 6  # groups up to which each drawing names its marks
_AGAINST = {
    "experts": "R[j,j] - s_j, s_j the accuracy of an expert on task j alone",
    "zero-shot": "R[j-1,j] - R[0,j], under the mask task where there is one",
}


@dataclass(frozen=True)
class Point:
    """One task of one run."""

    group: str
    seed: str
    estimate: Number
    forward_transfer: Number


@dataclass(frozen=True)
class Forecast:
    """An estimator on one stream.

    Attributes:
        estimator: Its name.
        against: What forward transfer was measured against, "experts" or "zero-shot"; the two are never pooled.
        points: Tasks of runs of which both are measured.
        tau: Kendall's tau over the points.
    """

    estimator: str
    against: str
    points: list[Point]
    tau: Number


def forecasts(stage: Stage, numbers: Numbers) -> list[Forecast]:
    """Return every estimator of a stream by what it is measured against, and add its points and tau to the numbers.

    tau is `cl.metrics.statistics.kendall_tau` over the points of all runs. Its interval resamples points as if they
    were independent; those of one run are not. Above 158 points it takes fewer resamples than 2000, at least 100.
    """
    found: dict[tuple[str, str], list[Point]] = {}
    for group, units in stage.runs.items():
        for run in units.values():
            place = (stage.name, order_of(run, units), group)
            for key, made in _points(place, run, numbers).items():
                found.setdefault(key, []).extend(made)
    return [
        Forecast(estimator, against, made, _tau(stage.name, estimator, against, made, numbers))
        for (estimator, against), made in sorted(found.items(), key=lambda item: item[0][1])
    ]


def _points(place: tuple[str, str, str], run: RunFiles, numbers: Numbers) -> dict[tuple[str, str], list[Point]]:
    """Add what a run says of each task, its forward transfer once, and return the pairs that are whole."""
    known: dict[tuple[str, int, float], Number] = {}
    found: dict[tuple[str, str], list[Point]] = {}

    def add(against: str, quantity: str, task: int, value: float) -> Number:
        return numbers.add(Number("run", *place, against, run.seed, "", quantity, None, task, mean=value))

    for name, forecast in run.forecasts.items():
        made = found.setdefault((name, forecast.against), [])
        for task, (guess, gain) in enumerate(zip(forecast.estimate, forecast.forward_transfer, strict=True), start=1):
            estimate = add("", f"{name}_estimate", task, guess) if math.isfinite(guess) else None
            key = (forecast.against, task, gain)
            if math.isfinite(gain) and key not in known:
                known[key] = add(forecast.against, "forward_transfer", task, gain)
            if estimate and key in known:
                made.append(Point(place[2], run.seed, estimate, known[key]))
    return found


def _tau(stream: str, estimator: str, against: str, made: Sequence[Point], numbers: Numbers) -> Number:
    x, y = [point.estimate.mean for point in made], [point.forward_transfer.mean for point in made]
    num_resamples = min(RESAMPLES, max(100, _EFFORT // max(1, len(made)) ** 2))
    found = kendall_tau(x, y, level=numbers.level, num_resamples=num_resamples)
    place = (stream, "", "", against, "", "", f"{estimator}_tau")
    spread = Number("forecast", *place, mean=found.tau, low=found.low, high=found.high, num=found.num, p=found.p)
    return numbers.add(spread)


def block(found: Sequence[Forecast], look: Mapping[str, Style]) -> Block:
    """Return a drawing an estimator: estimate against forward transfer, one mark a task of a run."""
    kinds = dict.fromkeys(forecast.against for forecast in found)
    about = (
        "What each estimator said of a task before it was learned, against the forward transfer that was measured:"
        f" {'; or '.join(_AGAINST.get(kind, kind) for kind in kinds)}. One mark a task of a run, from the second task."
        " Points of one run share a learner, so the intervals of tau, which take them as independent, are rough ones."
    )
    if len(kinds) > 1:
        about += " Runs measured against experts and runs measured zero-shot are never pooled: each has its own rows."
    made = Block("forecasts", "Forecasts", about)
    for kind in kinds:
        panels = [_panel(forecast, look) for forecast in found if forecast.against == kind and forecast.points]
        if panels:
            made.views.append(View({"against": kind}, panels))
    return made


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
    words = f"Forward transfer against {name}, {len(forecast.points)} points, one mark a task of a run."
    return Panel(title, {"data": traces, "layout": layout}, words)


def taus(found: Sequence[Forecast], stream: str, level: float) -> str:
    """Return a table of how estimates and forward transfer agree in order, a row an estimator."""
    rows = "".join(_row(forecast) for forecast in found)
    tau = term("forecast-tau", "Kendall's tau")
    heads = ("estimator", "forward transfer against", "points", tau, f"{100 * level:g}% interval", "p")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return table(f"How estimates order the tasks of the runs on {stream}", head, rows)


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
    """Return what the terms of the table mean, by the name of the definition."""
    from cl.metrics.transferability import ESTIMATORS

    if not found:
        return {}
    known = {name: (e.formula, e.source, e.higher_means) for name, e in ESTIMATORS.items()}
    known["covariance"] = (
        "mean over the tasks before of the similarity of their feature covariance to this task's",
        "Wu, Zhang & Re 2020",
        "more alike",
    )
    items = {}
    for name in dict.fromkeys(forecast.estimator for forecast in found):
        formula, source, higher = known.get(name, ("An estimator that this version does not know", "", "unknown"))
        items[_anchor(name)] = " ".join(f"{part}." for part in (formula, source, f"Higher means {higher}") if part)
    items["forecast-tau"] = (
        "Kendall's tau-b between estimates and measured forward transfer over the points of all runs: 1 where they"
        " order the points alike, -1 where in reverse. Kendall 1945. The interval is the percentile bootstrap over"
        f" points at {100 * level:g}%. It is a rough one, and so is p: points of one run share a learner."
    )
    return items


def _name(estimator: str) -> str:
    return estimator.replace("_", " ")


def _anchor(estimator: str) -> str:
    return f"estimator-{estimator}"
