"""Figures of a comparison in plotly's JSON, with the colours of the data; the page's script adds those of its theme."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cl.compare.align import Comparison, Stage
from cl.compare.numbers import Number, Numbers
from cl.compare.read import LOWER_IS_BETTER, PROBES
from cl.report.terminal import DIVERGING, SEQUENTIAL

# The palette of Okabe and Ito 2008 without black, which is invisible on a dark page, and with a darker yellow, last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A800")
DASHES = ("solid", "dash", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "hexagon")
BOUND_STYLES = {
    "upper bound": ("#808080", "dot", "triangle-up-open"),
    "lower bound": ("#808080", "dash", "triangle-down-open"),
}
MAX_WRITTEN = 8  # matrices of up to so many tasks have a number in each cell

Figure = dict[str, Any]


@dataclass
class Panel:
    """One drawing.

    Attributes:
        title: Its title, in plain text.
        figure: Data and layout for plotly.
        words: A description for readers who do not see it.
    """

    title: str
    figure: Figure
    words: str


@dataclass
class View:
    """The drawings of a block that are shown together.

    Attributes:
        choice: The values under which a reader selects this view, such as that of the mask.
        panels: Its drawings.
    """

    choice: dict[str, str]
    panels: list[Panel]


@dataclass
class Block:
    """A titled part of the page with figures.

    Attributes:
        id: Its identifier on the page.
        title: Its title.
        about: A paragraph that explains its figures.
        views: Its figures, of which the reader selects one view at a time.
        caption: The setting of the runs, which a saved figure carries.
    """

    id: str
    title: str
    about: str
    views: list[View] = field(default_factory=list)
    caption: str = ""

    def json(self) -> dict[str, Any]:
        """Return the block as plain data, which the page's script reads."""
        return asdict(self)


@dataclass(frozen=True)
class Style:
    """The colour, dash and marker of a group in all figures."""

    colour: str
    dash: str
    marker: str


def styles(comparison: Comparison) -> dict[str, Style]:
    """Return a style for each group; up to 35 groups that are not bounds, no two have the same."""
    found: dict[str, Style] = {}
    i = 0
    for name, group in comparison.groups.items():
        if group.bound and BOUND_STYLES[group.bound] not in [(s.colour, s.dash, s.marker) for s in found.values()]:
            found[name] = Style(*BOUND_STYLES[group.bound])
            continue
        colour = i % len(COLOURS)
        dash = DASHES[(colour + i // len(COLOURS)) % len(DASHES)]
        found[name] = Style(COLOURS[colour], dash, MARKERS[i % len(MARKERS)])
        i += 1
    return found


def palette(colours: Sequence[tuple[int, int, int]]) -> list[list[Any]]:
    """Return a palette of RGB colours, such as those of the terminal report, as a colour scale of plotly.

    Example:
        >>> palette([(0, 0, 0), (255, 255, 255)])
        [[0.0, 'rgb(0,0,0)'], [1.0, 'rgb(255,255,255)']]
    """
    return [[i / (len(colours) - 1), f"rgb({r},{g},{b})"] for i, (r, g, b) in enumerate(colours)]


def plain(value: float | None) -> float | None:
    """Return a number for JSON, which has no NaN: None in its place."""
    return None if value is None or math.isnan(value) else value


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis of plotly with a title and further properties."""
    return {"title": {"text": html.escape(title)}, "automargin": True, "zeroline": False, **more}


def line(x: Sequence[Any], y: Sequence[Any], group: str, style: Style, dash: str = "", width: float = 2) -> Figure:
    """Return a line in the style of a group; `meta` keeps the group's name unescaped."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": list(y),
        "name": html.escape(group),
        "meta": group,
        "line": {"color": style.colour, "dash": dash or style.dash, "width": width},
        "showlegend": False,
    }


def points(x: Sequence[Any], y: Sequence[Any], group: str, style: Style, size: int, opacity: float) -> Figure:
    """Return points in the style of a group."""
    symbol = style.marker if opacity == 1 or style.marker.endswith("-open") else f"{style.marker}-open"
    marker = {"color": style.colour, "symbol": symbol, "size": size, "opacity": opacity, "line": {"width": 1.5}}
    trace = {"type": "scatter", "mode": "markers", "x": list(x), "y": list(y), "marker": marker, "showlegend": False}
    return trace | {"name": html.escape(group), "meta": group}


# --------------------------------------------------------------------------- matrices


def keys(stage: Stage) -> list[tuple[str, str]]:
    """Return all (mask, metric) of the runs on a stream, that of the scenario first."""
    every = (run for units in stage.runs.values() for run in units.values())
    return list(dict.fromkeys(key for run in every for key in run.matrices))


def choice(mask: str, metric: str, layout: str = "") -> dict[str, str]:
    """Return the choice of a view by metric and mask, and by the order of tasks if there are several."""
    found = {"metric": f"{metric}, {mask} {'probe' if mask in PROBES else 'mask'}"}
    return found | ({"order": layout.removeprefix("order ")} if layout else {})


def heatmap(cells: Sequence[Number], scale: dict[str, Any], signed: bool) -> Figure:
    """Return a matrix as a heat map: rows are tasks learned, columns tasks tested; unmeasured cells stay empty.

    Args:
        cells: The numbers of its cells.
        scale: The colour scale, with `zmin` and `zmax`.
        signed: Whether numbers are written with their sign.
    """
    height = max(n.after_task or 0 for n in cells) + 1
    width = max(n.task or 0 for n in cells)
    values: list[list[float | None]] = [[None] * width for _ in range(height)]
    extra: list[list[list[float | None]]] = [[[None, None] for _ in range(width)] for _ in range(height)]
    for n in cells:
        assert n.after_task is not None and n.task is not None
        values[n.after_task][n.task - 1] = n.mean
        extra[n.after_task][n.task - 1] = [plain(n.sd), n.num]
    shown = "%{z:+.1%}" if signed else "%{z:.1%}"
    sd = ", sd %{customdata[0]:.1%} over %{customdata[1]} runs" if any(n.num > 1 for n in cells) else ", one run"
    trace = {
        "type": "heatmap",
        "x": list(range(1, width + 1)),
        "y": list(range(height)),
        "z": values,
        "customdata": extra,
        "hovertemplate": f"after %{{y}} tasks, task %{{x}}: {shown}{sd}<extra></extra>",
        "xgap": int(width <= 12),
        "ygap": int(width <= 12),
        "colorbar": {"thickness": 10, "tickformat": "+.0%" if signed else ".0%", "outlinewidth": 0, "xpad": 4},
        **scale,
    }
    if width <= MAX_WRITTEN:
        trace |= {"texttemplate": "%{z:+.0%}" if signed else "%{z:.0%}", "textfont": {"size": 11 if width <= 5 else 9}}
    dense = {"dtick": 1} if width <= 12 else {}
    axes = {
        "xaxis": axis("task tested", showgrid=False, **dense),
        "yaxis": axis("tasks learned", showgrid=False, autorange="reversed", **dense),
    }
    return {"data": [trace], "layout": {**axes, "height": 330}}


def _title(group: str, cells: Sequence[Number]) -> str:
    num = max(n.num for n in cells)
    return f"{group} ({num} run{'s' * (num > 1)})"


def matrices(stage: Stage, numbers: Numbers) -> Block:
    """Return a block with R of every group, on one colour scale."""
    about = (
        "Each cell is the metric on one task (column) after so many tasks have been learned (row; 0 is the untrained"
        " learner), as the mean over runs. Its standard deviation is shown on hover. All groups share one colour scale."
    )
    block = Block("matrices", "Transfer matrices", about)
    for mask, metric in keys(stage):
        for layout in stage.layouts:
            found = {g: numbers.find(stage.name, g, metric, mask, layout=layout) for g in stage.runs}
            top = max([1.0 if metric not in LOWER_IS_BETTER else 0.0, *_means(found.values())])
            scale = {"colorscale": palette(SEQUENTIAL), "zmin": 0, "zmax": top}
            panels = [
                Panel(_title(g, cells), heatmap(cells, scale, False), f"Matrix of {metric} of {g}, {mask} mask.")
                for g, cells in found.items()
                if cells
            ]
            if panels:
                block.views.append(View(choice(mask, metric, layout), panels))
    return block


def _means(parts: Iterable[Sequence[Number]]) -> list[float]:
    return [abs(n.mean) for part in parts for n in part]


def differences(stage: Stage, numbers: Numbers, bases: Sequence[str]) -> Block:
    """Return a block with R of every group minus that of each base, over the runs of shared seeds."""
    about = (
        "Each cell is the mean over the runs that the group and the base share (same seed, same order) of the group's"
        " entry minus the base's. Purple is above the base, orange below."
    )
    block = Block("differences", "Differences of matrices", about)
    for mask, metric in keys(stage):
        for layout in stage.layouts:
            for base in bases:
                found = {
                    g: numbers.find(stage.name, g, metric, mask, kind="difference", layout=layout, base=base)
                    for g in stage.runs
                }
                limit = max([0.05, *_means(found.values())])  # at least 5 percentage points, so that noise is pale
                scale = {"colorscale": palette(DIVERGING), "zmin": -limit, "zmax": limit}
                panels = [
                    Panel(
                        f"{_title(g, cells)} minus {base}",
                        heatmap(cells, scale, True),
                        f"Matrix of differences in {metric}, {g} minus {base}, {mask} mask.",
                    )
                    for g, cells in found.items()
                    if cells
                ]
                if panels:
                    block.views.append(View({"minus": base, **choice(mask, metric, layout)}, panels))
    return block
