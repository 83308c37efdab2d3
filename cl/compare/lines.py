"""Figures with axes: intervals, accuracy over tasks, learning curves, and accuracy against resources."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cl.compare.align import Comparison, Stage
from cl.compare.figures import (
    Block,
    Figure,
    Panel,
    Style,
    View,
    axis,
    choice,
    differences,
    keys,
    line,
    matrices,
    points,
    styles,
)
from cl.compare.forecasts import Forecast
from cl.compare.forecasts import block as forecasts
from cl.compare.leaderboard import Board, Column, column
from cl.compare.numbers import Number, Numbers
from cl.compare.read import LOWER_IS_BETTER
from cl.rundir import RECORD

RESOURCES = ("seconds", "flops", "steps", "parameters", "memory_bytes", "state_bytes", "peak_memory_bytes")


def blocks(
    comparison: Comparison,
    stage: Stage,
    board: Board,
    numbers: Numbers,
    bases: Sequence[str],
    found: Sequence[Forecast],
    prefix: str,
) -> list[Block]:
    """Return the blocks of figures of one stream; those without figures are left out.

    Args:
        comparison: The aligned runs.
        stage: The stream.
        board: Its leaderboard.
        numbers: All numbers; nothing else is drawn.
        bases: The groups whose matrices are subtracted from the others; the first is shown first.
        found: The forecasts of its runs.
        prefix: Prefix of the blocks' identifiers on the page.
    """
    look = styles(comparison)
    stage = replace(stage, runs={row.group: stage.runs[row.group] for row in board.rows})  # the best first
    found_blocks = [
        intervals(board, numbers, look),
        matrices(stage, numbers),
        differences(stage, numbers, bases),
        over_tasks(stage, numbers, look),
        curves(stage, numbers, look),
        records(stage, numbers, look),
        resources(stage, board, numbers, look),
        forecasts(found, look),
    ]
    for block in found_blocks:
        block.id, block.caption = f"{prefix}-{block.id}", board.title
    return [block for block in found_blocks if block.views]


def intervals(board: Board, numbers: Numbers, look: Mapping[str, Style]) -> Block:
    """Return a block with the leading column: means with their intervals, and single runs as small marks."""
    lead = board.columns[0]
    traces: list[Figure] = []
    for row in reversed(board.rows):
        name, style, cell = html.escape(row.group), look[row.group], row.cells[0]
        if cell is None:
            continue
        runs = [n.mean for n in numbers.runs(board.stream, row.group, lead.quantity, lead.mask)]
        if not math.isnan(cell.low):
            traces.append(line([cell.low, cell.high], [name, name], row.group, style, dash="solid", width=3))
        traces.append(points(runs, [name] * len(runs), row.group, style, size=7, opacity=0.55))
        traces.append(points([cell.mean], [name], row.group, style, size=12, opacity=1.0))
    for trace in traces:
        trace["hovertemplate"] = f"%{{y}}: %{{x:{_format(lead)}}}<extra></extra>"
    title = _title(lead)
    layout = {
        "xaxis": axis(title, tickformat=_format(lead)),
        "yaxis": axis("", type="category", showgrid=False),
        "height": 90 + 44 * len(board.rows),
    }
    words = f"{title} of {len(board.rows)} groups, best on top."
    panel = Panel(f"{title}, by group", {"data": traces, "layout": layout}, words)
    about = (
        f"Large marks are means, bars are {100 * numbers.level:g}% t intervals (logit scale) over the runs, small"
        " marks single runs."
    )
    return Block("intervals", "Means and intervals", about, [View({}, [panel])] if traces else [])


def _title(c: Column) -> str:
    return f"{c.title}, {c.mask} mask" if c.mask else c.title


def _format(c: Column) -> str:
    return ".3~%" if c.entry.scale.startswith("fraction") else ".3~s"


def _banded(x: Sequence[int], cells: Sequence[Number], group: str, style: Style, marked: bool) -> list[Figure]:
    """Return a line of means and, where there are intervals, a band of them."""
    name = html.escape(group)
    mean = line(x, [n.mean for n in cells], group, style)
    mean |= {"legendgroup": name, "showlegend": True, "hovertemplate": f"{name}: %{{y:.1%}}<extra></extra>"}
    if marked:
        mean |= {"mode": "lines+markers", "marker": {"symbol": style.marker, "size": 8, "color": style.colour}}
    inside = [(a, n) for a, n in zip(x, cells, strict=True) if not math.isnan(n.low)]
    if not inside:
        return [mean]
    around = [a for a, _ in inside] + [a for a, _ in reversed(inside)]
    edge = [n.low for _, n in inside] + [n.high for _, n in reversed(inside)]
    band = line(around, edge, group, style, dash="solid", width=0)
    band |= {"fill": "toself", "fillcolor": style.colour, "opacity": 0.18, "legendgroup": name, "hoverinfo": "skip"}
    return [band, mean]


def over_tasks(stage: Stage, numbers: Numbers, look: Mapping[str, Style]) -> Block:
    """Return a block with the mean of the metric over the tasks learned so far, after each task."""
    about = (
        "The mean of the metric over the tasks learned so far, after each task, as the mean over runs; bands are"
        f" {100 * numbers.level:g}% t intervals (logit scale), pointwise."
        + (" Runs of all orders are averaged here." if len(stage.layouts) > 1 else "")
    )
    block = Block("over-tasks", "Over the tasks", about)
    for mask, metric in keys(stage):
        traces: list[Figure] = []
        for group in stage.runs:
            cells = [n for n in numbers.find(stage.name, group, f"average_{metric}", mask) if n.after_task is not None]
            traces += _banded([n.after_task or 0 for n in cells], cells, group, look[group], True) if cells else []
        if not traces:
            continue
        traces.sort(key=lambda trace: "fill" not in trace)  # lines above bands
        top = max(n for trace in traces for n in trace["x"])
        layout = {
            "xaxis": axis("tasks learned", **({"dtick": 1} if top <= 15 else {})),
            "yaxis": axis(f"mean {metric} so far", tickformat=".0%", **_range(metric, traces)),
            "height": 420,
            "hovermode": "x unified",
        }
        words = f"Mean {metric} so far after 1 to {top} tasks, one line for each group, {mask} mask."
        panel = Panel(f"mean {metric} so far, {mask} mask", {"data": traces, "layout": layout}, words)
        block.views.append(View(choice(mask, metric), [panel]))
    return block


def _range(metric: str, traces: Sequence[Figure]) -> dict[str, object]:
    """Return a range of the axis that shows all means in [0, 1]; wide intervals of few runs do not extend it."""
    if metric in LOWER_IS_BETTER:
        return {}
    means = [y for trace in traces if "fill" not in trace for y in trace["y"]]
    return {"range": [min(0.0, *means), 1.02]} if 0 <= max(means) <= 1 else {}


def curves(stage: Stage, numbers: Numbers, look: Mapping[str, Style]) -> Block:
    """Return a block of learning curves: the metric on each task over the run's steps, with a drawing for each task."""
    about = (
        "Accuracy on a fixed subset of each task's test set during training, as the mean over runs."
        " A dotted line marks the beginning of a task."
    )
    block = Block("curves", "Learning curves", about)
    every = [run for units in stage.runs.values() for run in units.values()]
    for mask, metric in dict.fromkeys((mask, metric) for run in every for mask, metric, _ in run.curves):
        for layout in stage.layouts:
            starts = {run.starts for run in stage.layouts[layout] if run.starts}
            found = {
                group: numbers.find(stage.name, group, f"{metric}_curve", mask, layout=layout) for group in stage.runs
            }
            panels = [
                _curve(task, metric, found, look, next(iter(starts)) if len(starts) == 1 else ())
                for task in sorted({n.task or 0 for part in found.values() for n in part})
            ]
            if panels:
                block.views.append(View(choice(mask, metric, layout), panels))
    return block


def _curve(
    task: int,
    metric: str,
    found: Mapping[str, Sequence[Number]],
    look: Mapping[str, Style],
    starts: Sequence[int],
) -> Panel:
    traces: list[Figure] = []
    for group, part in found.items():
        cells = [n for n in part if n.task == task]
        traces += _banded([n.step or 0 for n in cells], cells, group, look[group], False) if cells else []
    traces.sort(key=lambda trace: "fill" not in trace)
    shape = {
        "type": "line",
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "opacity": 0.6,
        "line": {"dash": "dot", "width": 1, "color": "#808080"},
    }
    layout = {
        "xaxis": axis("step of the run"),
        "yaxis": axis(metric, tickformat=".0%", **_range(metric, traces)),
        "height": 280,
        "hovermode": "x unified",
        "showlegend": False,  # the page has one legend for all drawings
        "shapes": [{**shape, "x0": step, "x1": step} for step in starts],
    }
    return Panel(
        f"task {task}", {"data": traces, "layout": layout}, f"{metric} on task {task} by step, one line for each group."
    )


def records(stage: Stage, numbers: Numbers, look: Mapping[str, Style]) -> Block:
    """Return a block with the numbers that strategies and instruments recorded, over the run's steps."""
    about = "What strategies and instruments recorded during training, as the mean over runs."
    block = Block("records", "Recorded numbers", about)
    names = dict.fromkeys(name for units in stage.runs.values() for run in units.values() for name in run.records)
    for name in names:
        for layout in stage.layouts:
            traces: list[Figure] = []
            for group in stage.runs:
                cells = numbers.find(stage.name, group, RECORD + name, layout=layout)
                traces += _banded([n.step or 0 for n in cells], cells, group, look[group], False) if cells else []
            if not traces:
                continue
            for trace in traces:
                trace["hovertemplate"] = trace["name"] + ": %{y:.4~g}<extra></extra>"
            traces.sort(key=lambda trace: "fill" not in trace)
            shape = {"xaxis": axis("step of the run"), "yaxis": axis(name), "height": 420, "hovermode": "x unified"}
            words = f"{name} by step, one line for each group."
            block.views.append(
                View(
                    {"number": name, **({"order": layout} if layout else {})},
                    [Panel(name, {"data": traces, "layout": shape}, words)],
                )
            )
    return block


def resources(stage: Stage, board: Board, numbers: Numbers, look: Mapping[str, Style]) -> Block:
    """Return a block with the leading column over each resource, and the Pareto front of the groups."""
    lead = board.columns[0]
    about = (
        "Each mark is the mean of a group, with the interval of the scalar. The dotted line is the Pareto front: no"
        " group is both better and cheaper than one on it."
    )
    block = Block("resources", "Against resources", about)
    for name in RESOURCES:
        cost = column(stage, name)
        marks = [
            (group, x, y)
            for group in stage.runs
            if cost
            and (x := numbers.one(stage.name, group, name))
            and (y := numbers.one(stage.name, group, lead.quantity, lead.mask))
        ]
        if cost is None or not marks:
            continue
        layout = {
            "xaxis": axis(
                cost.title, tickformat=".3~s" if max(x.mean for _, x, _ in marks) >= 1e4 else "", rangemode="tozero"
            ),
            "yaxis": axis(_title(lead), tickformat=_format(lead)),
            "height": 420,
        }
        figure = {"data": _front(marks, lead) + _marks(marks, lead, look), "layout": layout}
        words = f"{_title(lead)} against {cost.title}, one mark for each group."
        block.views.append(
            View({"resource": cost.title}, [Panel(f"{_title(lead)} against {cost.title}", figure, words)])
        )
    return block


def _marks(marks: Sequence[tuple[str, Number, Number]], lead: Column, look: Mapping[str, Style]) -> list[Figure]:
    traces: list[Figure] = []
    for group, x, y in marks:
        name, style = html.escape(group), look[group]
        if not math.isnan(y.low):
            traces.append(line([x.mean, x.mean], [y.low, y.high], group, style, dash="solid", width=1.5))
        mark = points([x.mean], [y.mean], group, style, size=13, opacity=1.0)
        mark |= {"showlegend": True, "hovertemplate": f"{name}: %{{x:.4~g}}, %{{y:{_format(lead)}}}<extra></extra>"}
        traces.append(mark)
    return traces


def front(marks: Sequence[tuple[str, Number, Number]], higher_is_better: bool) -> list[tuple[float, float]]:
    """Return the Pareto front, the points (cost, merit) that no other point beats in both, the cheapest first.

    Example:
        >>> from cl.compare.numbers import Number
        >>> def mark(x: float, y: float):
        ...     return "", *(Number("group", "", "", "", "", "", "", "", mean=value) for value in (x, y))
        >>> front([mark(1.0, 0.5), mark(2.0, 0.4), mark(3.0, 0.9)], higher_is_better=True)
        [(1.0, 0.5), (3.0, 0.9)]
    """
    sign = 1 if higher_is_better else -1
    best, found = -math.inf, []
    for _, x, y in sorted(marks, key=lambda mark: (mark[1].mean, -sign * mark[2].mean)):
        if sign * y.mean > best:
            best = sign * y.mean
            found.append((x.mean, y.mean))
    return found


def _front(marks: Sequence[tuple[str, Number, Number]], lead: Column) -> list[Figure]:
    """Return the Pareto front as a line of steps."""
    found = front(marks, lead.entry.higher_is_better)
    trace = line([x for x, _ in found], [y for _, y in found], "front", Style("#808080", "dot", "circle"), width=1.5)
    trace |= {"hoverinfo": "skip"}
    trace["line"]["shape"] = "hv"
    return [trace]
