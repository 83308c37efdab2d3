"""The leaderboard of a stream: its columns, the best group, tests against the best, and ranks over streams."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cl.compare.align import Comparison, Stage
from cl.compare.numbers import Number, Numbers, entries
from cl.compare.read import Entry
from cl.compare.tuning import MARKS, mark
from cl.errors import unknown
from cl.metrics.statistics import average_ranks, cliques, critical_difference, pairwise_tests
from cl.report.caption import caption
from cl.report.wording import percent

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("average_accuracy", "bwt_gem", "fwt_gem", "forgetting_chaudhry", "learning_accuracy_riemer", "seconds")
TITLES = {
    "average_accuracy": "average accuracy",
    "bwt_gem": "backward transfer",
    "fwt_gem": "forward transfer",
    "forgetting_chaudhry": "forgetting",
    "learning_accuracy_riemer": "learning accuracy",
}
ALPHA = 0.05


@dataclass(frozen=True)
class Column:
    """A quantity of the leaderboard.

    Attributes:
        quantity: Its name in the files of runs.
        mask: The mask under which it was computed; "" for none.
        entry: Its definition, scale and direction.
    """

    quantity: str
    mask: str
    entry: Entry

    @property
    def title(self) -> str:
        """The quantity in words."""
        return TITLES.get(self.quantity, self.quantity.replace("_", " "))

    def show(self, value: float, spread: bool = False) -> str:
        """Return a value as it is printed: fractions in percent, "-" for NaN; a spread with two digits, no sign."""
        if self.entry.scale.startswith("fraction"):
            signed = "[-" in self.entry.scale and self.entry.higher_is_better
            return percent(value, signed=signed and not spread)
        return number(float(f"{value:.2g}") if spread else value)


def number(value: float) -> str:
    """Return a number that is not a fraction with three significant digits, and a unit from ten thousand on.

    Example:
        >>> number(1.5), number(1234567.0), number(2.4e15), number(float("nan"))
        ('1.5', '1.23 M', '2.4e+15', '-')
    """
    if math.isnan(value):
        return "-"
    for size, unit in ((1e12, None), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value:.3g}" if unit is None else f"{value / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


@dataclass
class Row:
    """One group of a leaderboard.

    Attributes:
        group: Its name.
        bound: "upper bound", "lower bound" or "".
        num: Number of its runs.
        cells: Its number in each column, None where unmeasured.
        best: For each column, whether the group is the best one that is not a bound.
        test: Its test against the best group in the leading column, None for the best group itself.
        tuning: A remark on how its hyper-parameters were chosen, or "".
    """

    group: str
    bound: str
    num: int
    cells: list[Number | None]
    best: list[bool] = field(default_factory=list)
    test: Number | None = None
    tuning: str = ""

    @property
    def result(self) -> bool:
        """Whether its numbers are a result, and not only those of a search for hyper-parameters."""
        return self.tuning != MARKS["tune_first"]

    @property
    def remarks(self) -> list[str]:
        """The remarks below its name: the bound that it is, and how it was tuned."""
        return [remark for remark in (self.bound, self.tuning) if remark]


@dataclass
class Board:
    """The leaderboard of one stream, the best group first.

    Attributes:
        stream: The name of the stream.
        caption: The setting of the runs of all groups.
        columns: Its columns; the first ranks the groups.
        rows: A row for each group.
        best: The name of the best group, "" if none has a result.
    """

    stream: str
    caption: str
    columns: list[Column]
    rows: list[Row]
    best: str

    @property
    def title(self) -> str:
        """The caption, after the name of the stream unless the caption contains it."""
        return self.caption if self.stream in self.caption else f"{self.stream}: {self.caption}"


@dataclass
class Ranks:
    """Average ranks over streams, the best group first.

    Attributes:
        groups: The average rank of each group.
        critical: The critical difference: ranks that are further apart differ significantly.
        cliques: Sets of groups whose ranks do not differ significantly.
        num_streams: Number of streams.
    """

    groups: dict[str, Number]
    critical: Number
    cliques: list[tuple[str, ...]]
    num_streams: int


def column(stage: Stage, quantity: str) -> Column | None:
    """Return the column of a quantity, or None if no run has it.

    Its mask is that of the scenario; but if the quantity has a caveat there and none under the mask "task", it is
    "task".
    """
    found: dict[str, Entry] = {}
    for units in stage.runs.values():
        for run in units.values():
            for (mask, name), entry in entries(run).items():
                if name == quantity:
                    found.setdefault(mask, entry)
    if not found:
        return None
    mask = next(iter(found))
    if found[mask].caveat and "task" in found and not found["task"].caveat:
        mask = "task"
    return Column(quantity, mask, found[mask])


def leaderboard(comparison: Comparison, stage: Stage, numbers: Numbers, scalar: str) -> Board:
    """Return the leaderboard of one stream, and add the tests against the best to the numbers.

    Args:
        comparison: The aligned runs.
        stage: The stream.
        numbers: All numbers, from `summarise`.
        scalar: The scalar that ranks the groups and is tested.

    Raises:
        InputError: If no run has that scalar.
    """
    lead = column(stage, scalar)
    all_runs = [run for units in stage.runs.values() for run in units.values()]
    every = {name: entry for run in all_runs for (_, name), entry in entries(run).items()}
    if lead is None:
        raise unknown("scalar", scalar, every)
    shown = [*COLUMNS, *(name for name, entry in every.items() if entry.own)]
    columns = [lead, *(c for name in shown if name != scalar and (c := column(stage, name)) is not None)]
    rows = []
    for group, units in stage.runs.items():
        cells = [numbers.one(stage.name, group, c.quantity, c.mask) for c in columns]
        rows.append(Row(group, comparison.groups[group].bound, len(units), cells, tuning=mark(units.values())))
    rows.sort(key=lambda row: _merit(lead, row.cells[0]), reverse=True)
    rivals = _rivals(comparison, rows)
    for i, c in enumerate(columns):
        top = max((_merit(c, row.cells[i]) for row in rivals), default=-math.inf)
        for row in rows:
            row.best.append(row in rivals and math.isfinite(top) and _merit(c, row.cells[i]) == top)
    best = next((row.group for row in rows if row.best[0]), "")
    tests = _against(stage, numbers, lead, best)
    for row in rows:
        row.test = tests.get(row.group)
    runs = [run for row in rows for run in stage.runs[row.group].values()]
    return Board(stage.name, caption(*runs), columns, rows, best)


def _rivals(comparison: Comparison, rows: Sequence[Row]) -> list[Row]:
    """Return the rows that may be best: results of finished runs that are not bounds, or all results without these."""
    results = [row for row in rows if row.result]
    finished = [row for row in results if comparison.groups[row.group].learned is None] or results
    return [row for row in finished if not row.bound] or finished


def _merit(column: Column, cell: Number | None) -> float:
    if cell is None:
        return -math.inf
    return cell.mean if column.entry.higher_is_better else -cell.mean


def _against(stage: Stage, numbers: Numbers, lead: Column, best: str) -> dict[str, Number]:
    """Return the paired test of each group against the best one, on the units that both have, by group.

    The best group was chosen from the same runs, so Holm's correction is over all pairs of groups, and not only over
    those with the best.
    """
    positions = {unit: i for i, unit in enumerate(dict.fromkeys(u for units in stage.runs.values() for u in units))}
    table: dict[str, dict[int, float]] = {}
    for group, units in stage.runs.items():
        values = {positions[u]: entries(run).get((lead.mask, lead.quantity)) for u, run in units.items()}
        table[group] = {i: entry.value for i, entry in values.items() if entry and math.isfinite(entry.value)}
    tests = {}
    for result in pairwise_tests(table, level=numbers.level):
        if best not in (result.a, result.b):
            continue
        group, sign = (result.b, -1) if result.a == best else (result.a, 1)
        found = vars(result.difference) | {"mean": sign * result.difference.mean}
        if sign < 0:
            found |= {"low": -result.difference.high, "high": -result.difference.low}
        of = (stage.name, "", group, best, "", lead.mask, lead.quantity)
        tests[group] = numbers.add(Number("test", *of, **found, p=result.p_holm))
    return tests


def ranks(comparison: Comparison, boards: Sequence[Board], numbers: Numbers) -> Ranks | None:
    """Return average ranks over the streams with results; None if these are fewer than two, or share fewer groups."""
    boards = [board for board in boards if board.best]
    table: dict[str, dict[str, float]] = {}
    for name, group in comparison.groups.items():
        cells = {board.stream: row.cells[0] for board in boards for row in board.rows if row.group == name}
        if group.learned is None and len(cells) == len(boards) and all(cells.values()):
            table[name] = {stream: cell.mean for stream, cell in cells.items() if cell}
    if len(boards) < 2 or len(table) < 2:
        return None
    lead = boards[0].columns[0]
    found = average_ranks(table, lead.entry.higher_is_better)

    def add(group: str, quantity: str, value: float) -> Number:
        return numbers.add(Number("rank", "", "", group, "", "", lead.mask, quantity, mean=value, num=len(boards)))

    groups = {name: add(name, lead.quantity, found[name]) for name in sorted(found, key=found.__getitem__)}
    critical = add("", "critical_difference", critical_difference(len(table), len(boards), ALPHA))
    several = [clique for clique in cliques(found, critical.mean) if len(clique) > 1]
    return Ranks(groups, critical, several, len(boards))


def significance(test: Number | None, best: str, group: str) -> str:
    """Return the p-value of a test against the best group as it is printed; "best" for that group itself."""
    if group == best:
        return "best"
    if test is None or math.isnan(test.p):
        return "-"
    return f"p < {1e-4:g}" if test.p < 1e-4 else f"p = {test.p:.2g}"


def terminal_tables(board: Board, width: int) -> list[Table]:
    """Return a leaderboard as tables of rich that fit into a terminal: mean ± sd over the runs, and the interval below.

    Columns that do not fit go to further tables, each with the names of the groups, so that no number is cut. The best
    of a column is bold.

    Args:
        board: The leaderboard.
        width: The width of the terminal, in characters.
    """
    from rich.text import Text

    columns: list[tuple[Text | str, list[Text | str]]] = [("runs", [str(row.num) for row in board.rows])]
    for i, c in enumerate(board.columns):
        arrow = "↑" if c.entry.higher_is_better else "↓"
        cells: list[Text | str] = [
            Text(cell_text(c, row.cells[i]), style="bold" if row.best[i] else "") for row in board.rows
        ]
        columns.append(
            (Text(f"{c.title.replace(' ', chr(10), 1)} {arrow}\n{f'{c.mask} mask' if c.mask else ''}"), cells)
        )
        if i == 0:
            tests: list[Text | str] = [significance(row.test, board.best, row.group) for row in board.rows]
            columns.append((Text("against best\n(Holm)"), tests))
    groups = ["\n".join([row.group, *row.remarks]) for row in board.rows]
    first = min(_width(["group", *groups]), max(12, width // 3))
    parts: list[list[tuple[Text | str, list[Text | str]]]] = [[]]
    room = width - first - 4
    for title, cells in columns:
        needs = _width([title, *cells]) + 3
        if needs > room and parts[-1]:
            parts.append([])
            room = width - first - 4
        parts[-1].append((title, cells))
        room -= needs
    return [_table(board.title if n == 0 else "", groups, first, part) for n, part in enumerate(parts)]


def _table(name: str, groups: Sequence[str], first: int, columns: Sequence[tuple[Any, Sequence[Any]]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(name) if name else None, title_justify="left", show_lines=False, pad_edge=False)
    table.add_column("group", width=first, overflow="fold")
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for i, group in enumerate(groups):
        table.add_row(Text(group), *(cells[i] for _, cells in columns))
    return table


def _width(cells: Iterable[Any]) -> int:
    from rich.cells import cell_len

    return max(cell_len(line) for cell in cells for line in str(cell).splitlines() or [""])


def cell_text(c: Column, cell: Number | None) -> str:
    """Return "mean ± sd" and, on the next line, the interval; only the mean if there is a single run."""
    if cell is None:
        return "-"
    if math.isnan(cell.sd):
        return c.show(cell.mean)
    return f"{c.show(cell.mean)} ± {c.show(cell.sd, True)}\n[{c.show(cell.low)}, {c.show(cell.high)}]"


def caveats(boards: Sequence[Board]) -> list[str]:
    """Return the caveats of the quantities in the columns, a sentence each."""
    found: Mapping[str, None] = dict.fromkeys(
        f"{c.title.capitalize()}, {c.entry.caveat.rstrip('.')}."
        for board in boards
        for c in board.columns
        if c.entry.caveat
    )
    return list(found)
