"""The parts of the page that concern all streams: ranks, configurations, runs and definitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cl.compare.align import Comparison, Stage, brief
from cl.compare.forecasts import Forecast, meanings
from cl.compare.leaderboard import Board, Column, Ranks
from cl.compare.leaderboard import number as shown_number
from cl.compare.markup import datum, table, term, text
from cl.compare.notes import listed
from cl.compare.numbers import Numbers, entries
from cl.compare.read import COSTS, Entry
from cl.compare.tuning import chosen, found


def ranks(over: Ranks | None) -> str:
    """Return a table of average ranks, and the groups whose ranks do not differ significantly; "" for one stream."""
    if over is None:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th><td>{datum(n.mean, f"{n.mean:.2f}")}</td></tr>'
        for name, n in over.groups.items()
    )
    head = f'<th scope="col">group</th><th scope="col">{term("average-rank", "average rank")}</th>'
    made = table(f"Average rank over {over.num_streams} streams, 1 is best", head, rows)
    critical = datum(over.critical.mean, f"{over.critical.mean:.2f}")
    cliques = "; ".join(listed(clique) for clique in over.cliques)
    apart = f"{term('critical-difference', 'Critical difference')} (Nemenyi, 5%): {critical}."
    return (
        f'<section id="ranks"><h2>Ranks over streams</h2>{made}'
        f"<p>{apart} Not significantly different: {text(cliques or 'none')}.</p></section>"
    )


def configurations(comparison: Comparison, numbers: Numbers) -> str:
    """Return a table of the settings in which groups differ, and one of how their hyper-parameters were chosen."""

    def shown(values: dict[str, Any], group: str) -> str:
        return text(brief(values[group])) if group in values else '<span class="none">–</span>'

    rows = "".join(
        f'<tr><th scope="row"><code>{text(key)}</code></th>'
        + "".join(f"<td>{shown(values, group)}</td>" for group in comparison.groups)
        + "</tr>"
        for key, values in comparison.differences.items()
    )
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in ["key", *comparison.groups])
    what = table("Settings in which the groups differ", head, rows) if rows else "<p>There is one group.</p>"
    return f'<section id="configurations"><h2>Configurations</h2>{what}{_tuning(comparison, numbers)}</section>'


def _tuning(comparison: Comparison, numbers: Numbers) -> str:
    """Return a table of how hyper-parameters were chosen and of the search's cost; "" if no run was tuned."""
    tuned = [
        (stage, group)
        for stage in comparison.stages
        for group, units in stage.runs.items()
        if any(run.tuning for run in units.values())
    ]
    costs = [name for name in COSTS if any(numbers.one(s.name, group, f"tuning_{name}") for s, group in tuned)]
    rows = "".join(_choice(stage, group, costs, numbers) for stage, group in tuned)
    names = ("group", "stream", "hyper-parameters", "values found")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    titles = {"flops": "FLOPs"}
    head += "".join(f'<th scope="col">{term(f"tuning_{name}", titles.get(name, name))}</th>' for name in costs)
    shown = table("How hyper-parameters were chosen, and the cost of all trials of the search", head, rows)
    return f"<h3>Tuning</h3>{shown}" if tuned else ""


def _choice(stage: Stage, group: str, costs: Sequence[str], numbers: Numbers) -> str:
    runs = list(stage.runs[group].values())
    ways = dict.fromkeys(chosen(run) for run in runs)
    values = dict.fromkeys(f"{key} = {brief(value)}" for run in runs for key, value in found(run).items())
    cells = [text(stage.name), text("; ".join(ways)), "<br>".join(f"<code>{text(v)}</code>" for v in values) or "–"]
    for name in costs:
        cost = numbers.one(stage.name, group, f"tuning_{name}")
        shown = datum(cost.mean, shown_number(cost.mean)) if cost else "–"
        # the runs of a group may come from several searches, whose costs differ
        cells.append(f"{shown} ± {datum(cost.sd, shown_number(cost.sd))}" if cost and cost.sd > 0 else shown)
    return f'<tr><th scope="row">{text(group)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def provenance(comparison: Comparison) -> str:
    """Return a table of every run."""
    rows = "".join(
        f'<tr><th scope="row">{text(group)}</th><td>{text(stage.name)}</td><td>{text(run.seed)}</td>'
        f"<td>{text(' '.join(str(i + 1) for i in run.order))}</td><td><code>{text(run.directory)}</code></td></tr>"
        for stage in comparison.stages
        for group, units in stage.runs.items()
        for run in units.values()
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("group", "stream", "seed", "order", "directory"))
    shown = table("Every run of the comparison", head, rows)
    return f'<section id="runs"><h2>Runs</h2><details><summary>Directories</summary>{shown}</details></section>'


def definitions(
    comparison: Comparison, boards: Sequence[Board], numbers: Numbers, forecasts: Sequence[Forecast]
) -> str:
    """Return the definitions of all terms on the page."""
    known: dict[str, Entry] = {}
    for run in comparison.runs:
        known = {name: entry for (_, name), entry in entries(run).items()} | known
    items = {
        name: " ".join(
            part
            for part in (
                f"{entry.definition}." if entry.definition else "",
                f"{entry.source}." if entry.source else "",
                f"{entry.scale.capitalize()}." if entry.scale != "count" else "",
                "Higher is better." if entry.higher_is_better else "Lower is better.",
                f"Caveat, {entry.caveat.rstrip('.')}." if entry.caveat else "",
            )
            if part
        )
        for name, entry in known.items()
    }
    items["against-best"] = (
        "Mean difference from the best group over the runs that both have (same stream, seed and order), its"
        f" {100 * numbers.level:g}% t interval, and the p of the paired t test after Holm's correction over all pairs"
        " of groups, because the best is chosen from the same runs. The interval is that of one comparison alone."
    )
    items["average-rank"] = "Rank of a group's mean on each stream, 1 is best, averaged over the streams. Demsar 2006."
    items["critical-difference"] = (
        "Groups whose average ranks are closer than this do not differ significantly: q sqrt(k (k + 1) / (6 N)) for k"
        " groups and N streams. Nemenyi 1963; Demsar 2006. With few streams the test finds few differences."
    )
    if len(boards) < 2:
        del items["average-rank"], items["critical-difference"]
    items |= meanings(forecasts, numbers.level)
    shown = "".join(
        f'<dt id="term-{text(name)}">{text(Column(name, "", Entry(0)).title.replace("-", " "))}</dt>'
        f'<dd id="def-{text(name)}">{text(definition)}</dd>'
        for name, definition in items.items()
    )
    about = "<p>R[i,j] is the metric on task j after i tasks, row 0 the untrained learner, T the number of tasks.</p>"
    return f'<section id="definitions"><h2>Definitions</h2>{about}<dl>{shown}</dl></section>'
