"""The comparison as one HTML file that needs no network: tables, figures, definitions, and the code of plotly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from importlib.metadata import version

from cl.compare.align import Comparison, Stage
from cl.compare.appendix import configurations, definitions, provenance, ranks
from cl.compare.figures import Block, Style, styles
from cl.compare.forecasts import Forecast, taus
from cl.compare.leaderboard import Board, Column, Ranks, Row, caveats, significance
from cl.compare.lines import blocks
from cl.compare.markup import datum, table, term, text
from cl.compare.notes import listed
from cl.compare.numbers import Number, Numbers, entries
from cl.compare.read import Entry

_SVG_DASHES = {
    "solid": "",
    "dash": "6 3",
    "dot": "2 3",
    "dashdot": "6 3 2 3",
    "longdash": "9 3",
    "longdashdot": "9 3 2 3",
}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


def page(
    comparison: Comparison,
    boards: Sequence[Board],
    over: Ranks | None,
    numbers: Numbers,
    bases: Sequence[str],
    forecasts: Mapping[str, Sequence[Forecast]],
) -> str:
    """Return the whole page.

    Args:
        comparison: The aligned runs.
        boards: The leaderboard of each stream.
        over: Ranks over the streams, if there are several.
        numbers: All numbers; the page shows no others.
        bases: The groups whose matrices can be subtracted from the others.
        forecasts: The forecasts of each stream, by its name.
    """
    stages = {stage.name: stage for stage in comparison.stages}
    parts, drawn = [], []
    for i, board in enumerate(boards, start=1):
        found = forecasts[board.stream]
        figures = blocks(comparison, stages[board.stream], board, numbers, bases, found, f"stream{i}")
        drawn += figures
        parts.append(_stream(board, stages[board.stream], figures, found, numbers, i))
    runs = comparison.runs
    title = f"{len(runs)} runs of {listed(comparison.groups)}"
    body = [
        f'<header><h1>{text(title)}</h1><button id="theme" type="button">Dark theme</button></header>',
        _contents(boards, over),
        f"<p>{text(_summary(comparison, boards, numbers))}</p>",
        _notes([*caveats(boards), *comparison.notes]),
        _legend(comparison),
        *parts,
        ranks(over),
        configurations(comparison, numbers),
        provenance(comparison),
        definitions(comparison, boards, numbers, [forecast for part in forecasts.values() for forecast in part]),
        f"<footer><p>clsim {text(version('clsim'))}. Every number of this page is in comparison.csv.</p></footer>",
    ]
    data = json.dumps([block.json() for block in drawn], allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_asset('report.css')}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n<a class="skip" href="#main">Skip to the'
        f' leaderboard</a>\n<div class="page">\n{chr(10).join(part for part in body if part)}\n</div>\n'
        f'<script type="application/json" id="figures">{data}</script>\n'
        f"<script>{_asset('plotly-cartesian.min.js')}</script>\n"
        f"<script>{_asset('report.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("cl.compare").joinpath(name).read_text(encoding="utf-8")


def _summary(comparison: Comparison, boards: Sequence[Board], numbers: Numbers) -> str:
    lead = boards[0].columns[0]
    streams = f"{len(boards)} streams" if len(boards) > 1 else f"the stream {boards[0].stream}"
    return (
        f"{len(comparison.groups)} groups on {streams}, ranked by {lead.title}. A cell shows mean ± standard deviation"
        f" over the runs and, below it, the {100 * numbers.level:g}% t interval of the mean. If a metric has a range,"
        " the interval is computed on the logit scale, so that it stays inside. Fractions are in percent."
    )


def _contents(boards: Sequence[Board], over: Ranks | None) -> str:
    links = [(f"stream{i}", board.stream) for i, board in enumerate(boards, start=1)]
    links += [("ranks", "Ranks over streams")] if over else []
    links += [("configurations", "Configurations"), ("runs", "Runs"), ("definitions", "Definitions")]
    items = "".join(f'<li><a href="#{target}">{text(name)}</a></li>' for target, name in links)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _notes(notes: Iterable[str]) -> str:
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return (
        f'<section class="notes" aria-labelledby="notes"><h2 id="notes">Read this first</h2><ul>{items}</ul></section>'
        * bool(items)
    )


def _legend(comparison: Comparison) -> str:
    items = []
    for name, style in styles(comparison).items():
        bound = comparison.groups[name].bound
        items.append(f"<li>{_swatch(style)} {text(name)}{f' <small>{bound}</small>' if bound else ''}</li>")
    return f'<ul class="legend" aria-label="Groups and their colours">{"".join(items)}</ul>'


def _swatch(style: Style) -> str:
    dash = _SVG_DASHES[style.dash]
    return (
        '<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true"><line x1="1" y1="6" x2="33" y2="6"'
        f' stroke="{style.colour}" stroke-width="3" stroke-dasharray="{dash}"/></svg>'
    )


# --------------------------------------------------------------------------- one stream


def _stream(
    board: Board, stage: Stage, figures: Sequence[Block], found: Sequence[Forecast], numbers: Numbers, number: int
) -> str:
    first = ' id="main" tabindex="-1"' if number == 1 else ""
    parts = [
        f'<section id="stream{number}"><div{first}><h2>{text(board.stream)}</h2>',
        _caption(board),
        leaderboard_table(board, numbers),
        "</div>",
    ]
    beside = {f"stream{number}-forecasts": taus(found, board.stream, numbers.level)}
    parts += [_block(block, beside.get(block.id, "")) for block in figures]
    return "\n".join([*parts, _every_scalar(board, stage, numbers), "</section>"])


def _caption(board: Board) -> str:
    return f'<p class="caption">{text(board.caption)}</p>'


def leaderboard_table(board: Board, numbers: Numbers) -> str:
    """Return the leaderboard of one stream as a table."""
    head = ['<th scope="col">group</th>', '<th scope="col">runs</th>']
    for i, c in enumerate(board.columns):
        direction = ("↑", "higher is better") if c.entry.higher_is_better else ("↓", "lower is better")
        arrow = f'<span aria-hidden="true">{direction[0]}</span><span class="hidden">{direction[1]}</span>'
        mask = f"<small>{text(c.mask)} mask</small>" if c.mask else ""
        head.append(f'<th scope="col">{term(c.quantity, c.title)}&nbsp;{arrow}{mask}</th>')
        if i == 0:
            head.append(f'<th scope="col">{term("against-best", "against the best")}</th>')
    rows = "".join(_row(row, board) for row in board.rows)
    left_out = "bounds left out" if all(row.result for row in board.rows) else "bounds and tuning left out"
    caption = f"Leaderboard of {board.stream}; the best of each column, {left_out}, is bold."
    return table(caption, "".join(head), rows)


def _row(row: Row, board: Board) -> str:
    remarks = "".join(f"<small>{remark}</small>" for remark in row.remarks)
    cells = [f'<th scope="row">{text(row.group)}{remarks}</th>', f"<td>{row.num}</td>"]
    for i, (c, cell) in enumerate(zip(board.columns, row.cells, strict=True)):
        best = ' class="best"' if row.best[i] else ""
        cells.append(f"<td{best}>{_cell(c, cell)}</td>")
        if i == 0:
            cells.append(f"<td>{_test(c, row, board.best)}</td>")
    return f"<tr{' class=aside' if row.bound or not row.result else ''}>{''.join(cells)}</tr>"


def _cell(c: Column, cell: Number | None) -> str:
    if cell is None:
        return "–"
    mean = datum(cell.mean, c.show(cell.mean))
    if math.isnan(cell.sd):
        return mean
    low, high = datum(cell.low, c.show(cell.low)), datum(cell.high, c.show(cell.high))
    return f"<b>{mean}</b> ± {datum(cell.sd, c.show(cell.sd, True))}<small>[{low}, {high}]</small>"


def _test(c: Column, row: Row, best: str) -> str:
    test = row.test
    if test is None or math.isnan(test.mean):
        return text(significance(test, best, row.group))

    def signed(value: float) -> str:
        return datum(value, f"{100 * value:+.1f}" if c.entry.scale.startswith("fraction") else f"{value:+.3g}")

    shown = signed(test.mean)
    if not math.isnan(test.p):
        shown += f", {datum(test.p, significance(test, best, row.group))}"
    return shown + (f"<small>[{signed(test.low)}, {signed(test.high)}]</small>" if not math.isnan(test.low) else "")


def _block(block: Block, beside: str) -> str:
    """Return a block, with a table before its figures unless that is ""."""
    return (
        f'<section class="block" aria-labelledby="{block.id}"><h3 id="{block.id}">{text(block.title)}</h3>'
        f'<p>{text(block.about)}</p>{beside}<div class="choices"></div><div class="panels" data-block="{block.id}">'
        "<noscript>Figures need JavaScript; their numbers are in comparison.csv.</noscript></div></section>"
    )


def _every_scalar(board: Board, stage: Stage, numbers: Numbers) -> str:
    """Return a table of all scalars of the stream, by mask, and the reasons why some were not measured."""
    groups = [row.group for row in board.rows]
    found: dict[tuple[str, str], Entry] = {}
    for units in stage.runs.values():
        for run in units.values():
            found = entries(run) | found
    rows = []
    for (mask, name), entry in found.items():
        c = Column(name, mask, entry)
        cells = [numbers.one(stage.name, group, name, mask) for group in groups]
        if any(cells):
            row = "".join(f"<td>{_cell(c, cell)}</td>" for cell in cells)
            rows.append(f'<tr><th scope="row">{term(name, c.title)}</th><td>{text(mask) or "–"}</td>{row}</tr>')
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in ["scalar", "mask", *groups])
    shown = table(f"All scalars of {stage.name}, mean ± standard deviation and interval", head, "".join(rows))
    absent = {name: why for units in stage.runs.values() for run in units.values() for name, why in run.absent.items()}
    why = "".join(f"<li>{text(Column(name, '', Entry(0)).title)}: {text(why)}</li>" for name, why in absent.items())
    left_out = f"<p>Not measured in every run:</p><ul>{why}</ul>" if why else ""
    return f"<details><summary>All scalars</summary>{shown}{left_out}</details>"
