"""R on a terminal and without one: every number, no line too wide, long streams summarised."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
import torch

from cl.metrics.transfer import (
    backward_transfer,
    forward_transfer,
    step_effect,
)
from cl.report.terminal import DIVERGING, SEQUENTIAL, TerminalReport, accuracy_grid, colour, difference_grid, layout
from cl.report.wording import headline, percent, remarks
from example_runs import coloured, example_run, make_run, plain


def numbers(line: str) -> list[str]:
    return [word for word in line.split() if word == "-" or word.lstrip("+-").replace(".", "").isdigit()]


def shown(values: torch.Tensor, signed: bool = False, blank: bool = False) -> list[list[str]]:
    kept = [[value for value in row if not (blank and math.isnan(value))] for row in values.tolist()]
    return [[percent(value, signed) for value in row] for row in kept]


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_plain_output_has_every_number_and_no_decoration(rows: int) -> None:
    run = make_run(5, rows=rows)
    console, text = plain(width=30)
    report = TerminalReport(console)
    report.start(run, -1)
    for i in range(rows):
        report.row(run, i)
    report.finish(run)
    lines = text.getvalue().splitlines()
    assert text.getvalue().isascii() and "\x1b" not in text.getvalue()
    assert lines[0] == "class-incremental, 5 tasks"
    assert "1: part-0" in lines[1] and "5: part-4" in lines[1]
    for mask, matrix in run.matrices.items():
        for i in range(rows):
            label = f"after {i} ({mask}):" if i else f"untrained ({mask}):"
            row = next(line for line in lines if line.startswith(label))
            assert numbers(row.removeprefix(label)) == shown(matrix.R)[i]
        assert headline(run, mask) in lines
    expected = [
        (f"accuracy in %, {mask} mask", run.matrices[mask].R, False, ["untrained", *range(1, 6)])
        for mask in run.matrices
    ] + [
        ("backward transfer", backward_transfer(run.primary.R), True, range(1, 6)),
        ("forward transfer", forward_transfer(run.matrices["task"].R), True, range(1, 6)),
        ("step effect", step_effect(run.primary.R), True, range(1, 6)),
    ]
    for title, values, signed, labels in expected:
        at = next(k for k, line in enumerate(lines) if line.startswith(title) and "mask" in line)
        assert numbers(lines[at + 1]) == ["1", "2", "3", "4", "5"]
        for i, label in enumerate(labels):
            words = str(label) if label == "untrained" else f"after {label}"
            line = lines[at + 2 + i].strip()
            assert line.startswith(words)
            assert numbers(line.removeprefix(words)) == shown(values, signed, blank=signed)[i]
    assert remarks(run)[-1] in lines


def test_plain_output_of_the_worked_example() -> None:
    console, text = plain()
    TerminalReport(console).finish(example_run())
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert "after 2 94.0 85.0 45.0" in lines
    assert "after 3 -6.0 +3.0" in lines
    assert "after 1 +20.0 +5.0" in lines
    assert "after 3 -10.0 +3.0 +35.0" in lines


def test_on_a_terminal_R_fills_in_with_the_current_row_marked() -> None:
    console, text = coloured()
    run = make_run(3, rows=2)
    TerminalReport(console).row(run, 1)
    whole = accuracy_grid(run, "class", console, current=1)
    assert whole is not None
    lines = whole.plain.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["untrained", shown(run.primary.R)[0][0]],
        [">", "after"],
        ["after", "2"],
        ["after", "3"],
    ]
    assert numbers(lines[4])[1:] == ["-", "-", "-"]
    red, green, blue = colour(float(run.primary.R[1, 0]), SEQUENTIAL)
    assert f"48;2;{red};{green};{blue}m" in text.getvalue()


def num_grids(text: io.StringIO) -> int:
    return len(re.findall(r"^[> ] untrained", re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue()), re.MULTILINE))


def test_the_last_R_is_not_printed_twice_on_a_terminal() -> None:
    run = make_run(2, rows=3)
    console, text = coloured()
    report = TerminalReport(console)
    report.row(run, 2)
    report.finish(run)
    assert num_grids(text) == 2  # one mask each
    console, text = coloured()
    TerminalReport(console).finish(run)  # a run that was complete when it was started again
    assert num_grids(text) == 2


def test_differences_are_coloured_from_a_centre_at_zero() -> None:
    console, text = coloured()
    grid = difference_grid(torch.tensor([[0.0, 0.4], [-0.4, math.nan]]), console)
    assert grid is not None
    console.print(grid)
    for share, shade in ((0.5, DIVERGING[2]), (1.0, DIVERGING[-1]), (0.0, DIVERGING[0])):
        assert colour(share, DIVERGING) == shade
        assert "48;2;{};{};{}m".format(*shade) in text.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("num_tasks", [1, 2, 9, 10, 20, 21, 100])
def test_no_line_is_wider_than_the_terminal(num_tasks: int, width: int) -> None:
    run = make_run(num_tasks)
    console, _ = coloured(width)
    grids = [accuracy_grid(run, "class", console, 1), difference_grid(step_effect(run.primary.R), console)]
    for grid in grids:
        assert grid is None or max(map(len, grid.plain.splitlines())) <= width
    assert (grids[0] is None) == (num_tasks > 20 or 12 + 3 * num_tasks > width)
    cell = layout(console, num_tasks, narrowest=4)
    assert cell is None or 12 + num_tasks * cell[0] <= width


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_stream_is_summarised(terminal: bool) -> None:
    run = make_run(30)
    console, text = coloured() if terminal else plain()
    TerminalReport(console).row(run, 3)
    TerminalReport(console).finish(run)
    row = run.primary.R[3]
    low = int(row[:3].argmin())
    expected = (
        f"after 3/30 (class): mean {percent(float(row[:3].mean()))}, lowest {percent(float(row[low]))} "
        f"on task {low + 1}, newest task {percent(float(row[2]))}"
    )
    assert expected in text.getvalue()
    assert max(map(len, text.getvalue().splitlines())) < 250


def test_the_end_names_the_picture(tmp_path: Path) -> None:
    run = make_run(2, directory=tmp_path)
    for name, expected in (("", f"files: {tmp_path}"), ("transfer.png", f"picture: {tmp_path / 'transfer.png'}")):
        if name:
            (tmp_path / name).touch()
        console, text = plain()
        TerminalReport(console).finish(run)
        assert text.getvalue().splitlines()[-1] == expected
