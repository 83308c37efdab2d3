from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.style import Style

from cl.files import replace_file, write_text
from cl.metrics.transfer import (
    SCALARS,
    TransferMatrix,
    backward_transfer,
    caveat,
    forward_transfer,
    step_effect,
    worked_example,
)
from cl.report import progress as progress_module
from cl.report.contract import Report
from cl.report.manifest import versions, write_manifest
from cl.report.picture import PictureReport, draw, draw_accuracy, panels
from cl.report.progress import ProgressBar
from cl.report.run import Run
from cl.report.tables import FileReport, strict_json, transfer_json
from cl.report.terminal import DIVERGING, SEQUENTIAL, TerminalReport, accuracy_grid, colour, difference_grid, layout
from cl.report.wandb import WandbReport
from cl.report.wording import headline, percent, remarks
from wandb_file import items, parse


def make_run(num_tasks: int, scenario: str = "class", rows: int | None = None, directory: Path = Path("run")) -> Run:
    """Return a run whose first `rows` rows (default: all) are measured with random numbers."""
    generator = torch.Generator().manual_seed(num_tasks)
    masks = {"class": ["class", "task"], "task": ["task", "class"], "domain": ["domain"]}[scenario]
    matrices = {mask: TransferMatrix(num_tasks, mask) for mask in masks}
    for matrix in matrices.values():
        for i in range(num_tasks + 1 if rows is None else rows):
            matrix.record(i, torch.rand(num_tasks, generator=generator))
    return Run(directory, {}, [f"part-{j}" for j in range(num_tasks)], scenario, matrices, ["A note."])


def example_run(directory: Path = Path("run"), mask: str = "task") -> Run:
    run = Run(directory, {}, ["a", "b", "c"], mask, {mask: TransferMatrix(3, mask)})
    for i, row in enumerate(worked_example()):
        run.primary.record(i, row)
    return run


# --------------------------------------------------------------------------- what every report sees


def test_run_says_how_far_it_is_and_which_mask_measures_forward_transfer() -> None:
    run = make_run(3, rows=2)
    assert run.tasks_learned == 1
    assert make_run(3, rows=0).tasks_learned == -1
    assert run.primary.mask == "class" and run.zero_shot.mask == "task"
    assert make_run(3, "task").zero_shot.mask == "task"
    assert make_run(3, "domain").zero_shot.mask == "domain"


def test_run_scalars_are_those_of_the_tasks_learned() -> None:
    run = make_run(4, rows=3)
    assert run.scalars("task") == pytest.approx(run.matrices["task"].scalars(after_task=2), nan_ok=True)
    assert all(math.isnan(value) for value in make_run(4, rows=1).scalars("task").values())


def test_headline_of_the_worked_example() -> None:
    expected = "task: average accuracy 84.0, backward transfer -1.5, forward transfer +20.0, forgetting 3.5"
    assert headline(example_run(), "task") == expected


def test_unmeasured_is_a_dash_and_never_zero() -> None:
    assert headline(make_run(2, rows=1), "class").count(" -") == 4
    assert percent(math.nan) == percent(math.nan, signed=True) == "-"


def test_forward_transfer_comes_with_its_caveat_in_class_incremental_runs_only() -> None:
    about = caveat("fwt_gem", "class")
    assert about is not None
    assert [line for line in remarks(make_run(2, "class")) if about.rstrip(".") in line]
    assert remarks(make_run(2, "task")) == remarks(make_run(2, "domain")) == ["A note."]


def test_versions_name_what_is_installed_and_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = versions()
    assert found["numpy"] == np.__version__ and found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "platform", "pytorch_lightning", "torchmetrics", "hydra", "clsim"} <= found.keys()
    assert "git_commit" not in found
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert versions()["git_commit"] == head
    (tmp_path / "file").write_text("2")
    assert versions()["git_commit"] == f"{head}-dirty"


def test_looking_for_versions_imports_nothing_heavy() -> None:
    look = "print(sorted({'wandb','timm','avalanche'} & set(sys.modules)))"
    code = f"import sys; from cl.report.manifest import versions; versions(); {look}"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize("rows", [0, 1, 3, 6])
def test_csv_reads_back_as_R_to_the_last_bit(tmp_path: Path, rows: int) -> None:
    run = make_run(5, rows=rows, directory=tmp_path)
    report = FileReport()
    report.start(run, min(rows - 1, 1))  # as if resumed there
    for row in range(min(rows, 2), rows):
        report.row(run, row)
    with open(tmp_path / "transfer.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * rows * 5
    for mask, matrix in run.matrices.items():
        back = np.full((6, 5), np.nan, dtype=np.float32)
        for line in table:
            if line["mask"] == mask:
                assert line["metric"] == "accuracy"
                back[int(line["after_task"]), int(line["task"]) - 1] = np.float32(line["value"])
        np.testing.assert_array_equal(back, matrix.R.numpy())


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize(("num_tasks", "rows"), [(1, 2), (4, 1), (4, 3), (4, 5)])
def test_json_is_strict_and_holds_every_scalar_with_its_definition(num_tasks: int, rows: int) -> None:
    run = make_run(num_tasks, rows=rows)
    content = json.loads(transfer_json(run), parse_constant=refuse)
    assert content["scenario"] == "class" and content["tasks_learned"] == rows - 1
    assert content["task_names"] == run.task_names and content["notes"] == ["A note."]
    assert list(content["masks"]) == ["class", "task"]
    for mask, part in content["masks"].items():
        assert part["scalars"].keys() == SCALARS.keys()
        for name, value in run.scalars(mask).items():
            entry = part["scalars"][name]
            assert entry["value"] is None if math.isnan(value) else entry["value"] == value
            scalar = SCALARS[name]
            assert (entry["definition"], entry["source"]) == (scalar.formula, scalar.source)
            assert (entry["scale"], entry["divisor"]) == (scalar.scale, scalar.divisor)
            assert entry["higher_is_better"] is scalar.higher_is_better
            assert entry["caveat"] == caveat(name, mask)
    ratio = content["measures"].get("forward_transfer_ratio")
    assert ratio is None or ratio["caveat"] == caveat("forward_transfer_ratio", ratio["mask"])


def test_strict_json_has_no_word_for_what_is_not_finite() -> None:
    text = strict_json({"a": [math.nan, (math.inf, -math.inf)], "b": 0.5, "c": True})
    assert json.loads(text, parse_constant=refuse) == {"a": [None, [None, None]], "b": 0.5, "c": True}


def test_file_report_writes_nothing_but_its_files(tmp_path: Path) -> None:
    run = make_run(2, directory=tmp_path / "new")
    report = FileReport()
    report.start(run, -1)
    report.row(run, 2)
    report.finish(run)
    assert sorted(p.name for p in run.directory.iterdir()) == ["transfer.csv", "transfer.json"]


def test_a_manifest_tells_of_every_sitting(tmp_path: Path) -> None:
    run = make_run(2, directory=tmp_path / "new")
    write_manifest(run, -1)
    write_manifest(run, 1)
    found = json.loads((run.directory / "manifest.json").read_text())
    assert found["versions"] == versions() and [s["after_task"] for s in found["sittings"]] == [0, 1]
    write_manifest(run, -1)
    assert len(json.loads((run.directory / "manifest.json").read_text())["sittings"]) == 1


def test_a_crash_while_writing_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "transfer.csv"
    write_text(path, "old, whole")

    def crash(temporary: Path) -> None:
        temporary.write_text("ne")
        assert path.read_text() == "old, whole"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, crash)
    assert [p.name for p in tmp_path.iterdir()] == ["transfer.csv"]
    assert path.read_text() == "old, whole"


def test_a_crash_while_renaming_leaves_the_old_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(2, rows=2, directory=tmp_path)
    FileReport().start(run, 1)
    FileReport().finish(run)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for matrix in run.matrices.values():
        matrix.record(2, torch.rand(2))

    def crash(*_: object) -> None:
        raise OSError("power failure")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power failure"):
            FileReport().row(run, 2)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    table = after.pop("transfer.csv")
    assert table.startswith(before.pop("transfer.csv")) and after == before
    FileReport().start(run, 2)  # as a continued run does
    assert (tmp_path / "transfer.csv").read_bytes() == table


# --------------------------------------------------------------------------- terminal


def plain(width: int = 80) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=False, width=width), text


def coloured(width: int = 100) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    Style.parse.cache_clear()  # a style keeps the codes of the console that printed it first
    Style._add.cache_clear()
    return Console(file=text, force_terminal=True, color_system="truecolor", width=width), text


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


# --------------------------------------------------------------------------- picture


@pytest.mark.parametrize(("num_tasks", "rows"), [(1, 2), (2, 2), (5, 1), (5, 4), (5, 6), (20, 21)])
def test_the_numbers_in_the_cells_are_those_of_the_matrices(num_tasks: int, rows: int) -> None:
    run = make_run(num_tasks, rows=rows)
    old, new = run.matrices["class"].R, run.matrices["task"].R
    maps = [axes for axes in draw(run).axes if len(axes.images) == 2]
    expected = [old, backward_transfer(old), forward_transfer(new), step_effect(old)]
    assert len(maps) == len(expected)
    for axes, values, signed in zip(maps, expected, (False, True, True, True), strict=True):
        cells = {
            tuple(map(int, text.get_position())): text.get_text()
            for text in axes.texts
            if text.get_transform() == axes.transData
        }
        assert cells == {
            (j, i): percent(value, signed, 1 if num_tasks <= 10 else 0)
            for i, row in enumerate(values.tolist())
            for j, value in enumerate(row)
            if not math.isnan(value)
        }
        np.testing.assert_array_equal(np.ma.filled(axes.images[1].get_array(), np.nan), values.numpy())


def test_unmeasured_cells_are_grey_and_meaningless_ones_blank() -> None:
    run = make_run(3, rows=3)  # the row after the last task is missing
    below = [[False] * 3, [False] * 3, [True, True, False]]
    expected = [[[False] * 3] * 3 + [[True] * 3], below, [[False] * 3] * 3, [[False] * 3] * 2 + [[True] * 3]]
    for axes, panel, grey in zip([a for a in draw(run).axes if len(a.images) == 2], panels(run), expected, strict=True):
        assert panel.region.tolist() == grey
        assert (~np.ma.getmaskarray(axes.images[0].get_array())).tolist() == grey


def test_stairs_part_old_tasks_from_new_ones() -> None:
    # over column 0: the line is the top of the cell that was just learned, or the edge of the triangle
    maps = [axes for axes in draw(make_run(3)).axes if len(axes.images) == 2]
    assert [list(axes.lines[0].get_xydata()[0]) for axes in maps[:3]] == [[-0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5]]
    assert not maps[3].lines


def test_scales_are_centred_at_zero_and_do_not_shout_about_noise() -> None:
    run = make_run(4)
    maps = [axes for axes in draw(run).axes if len(axes.images) == 2]
    for axes in maps[1:]:
        assert axes.images[1].norm(0.0) == pytest.approx(0.5)
        assert axes.images[1].cmap.name == "RdBu"
    assert (maps[0].images[1].norm.vmin, maps[0].images[1].norm.vmax) == (0.0, 1.0)
    effect = step_effect(run.primary.R)
    assert maps[3].images[1].norm.vmax == pytest.approx(float((effect - effect.diag().diag()).abs().max()))
    still = Run(Path(), {}, ["a", "b"], "domain", {"domain": TransferMatrix(2, "domain")})
    for i in range(3):
        still.primary.record(i, torch.tensor([0.50, 0.50 + 0.001 * i]))
    assert panels(still)[2].limit == 0.05


def test_the_picture_says_what_a_row_counts_and_names_the_metric():
    run = make_run(3)
    assert {panel.row for panel in panels(run)[:3]} == {"tasks learned"}
    drifting = dataclasses.replace(run, boundaries=False)
    assert {panel.row for panel in panels(drifting)[:3]} == {"evaluation points passed"}
    several = dataclasses.replace(run, matrices={"class": TransferMatrix(3, "class", "mAP")})
    assert panels(run)[0].title.startswith("Accuracy") and panels(several)[0].title.startswith("mAP")


def text_of(run: Run) -> str:
    figure = draw(run)
    texts = [
        *figure.texts,
        *(text for axes in figure.axes for text in [*axes.texts, axes.xaxis.label, axes.yaxis.label]),
    ]
    return "\n".join(text.get_text() for text in texts)


def test_the_forward_panel_says_which_mask_it_shows_and_class_runs_carry_the_caveat() -> None:
    both, domain, alone = make_run(3), make_run(3, "domain"), make_run(3)
    del alone.matrices["task"]
    start = (caveat("fwt_gem", "class") or "")[:50]
    assert "Forward transfer, in points  [task mask]" in text_of(both)
    assert "task mask: classes of other tasks do not compete" in text_of(both)
    assert "Forward transfer, in points  [domain mask]" in text_of(domain)
    assert "Forward transfer, in points  [class mask]" in text_of(alone)
    assert start in text_of(both) and start in text_of(alone) and start not in text_of(domain)


def test_the_foot_has_scalars_names_and_notes() -> None:
    run = make_run(4, rows=3)
    text = text_of(run)
    assert headline(run, "class") in text and headline(run, "task") in text
    assert "after 2 of 4 tasks" in text and "A note." in text and "2: part-1" in text
    for words in ("tasks learned", "task tested", "earlier task", "task still to come", "task learned in this step"):
        assert words in text


@pytest.mark.parametrize(("num_tasks", "rows"), [(1, 2), (2, 3), (5, 3), (10, 11), (20, 21), (100, 101)])
def test_nothing_overlaps_or_leaves_the_picture(num_tasks: int, rows: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    run = make_run(num_tasks, rows=rows)
    for matrix in run.matrices.values():
        matrix.R.round_()  # 0 and 1 give the longest numbers, "+100.0"
    figure = draw(run)
    FigureCanvasAgg(figure).draw()
    texts = list(figure.texts)
    for axes in figure.axes:
        ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
        if not axes.images:  # a colour bar does not draw the labels beyond its ends
            low, high = axes.get_ylim()
            ticks = [tick for tick in ticks if low <= tick.get_position()[1] <= high]
        texts += [*ticks, axes.xaxis.label, axes.yaxis.label, *axes.texts]
    texts = [text for text in texts if text.get_text()]
    x0, y0, x1, y1 = np.array([text.get_window_extent().extents for text in texts]).T
    outside = (x0 < 0) | (y0 < 0) | (x1 > figure.bbox.width) | (y1 > figure.bbox.height)
    assert [text.get_text() for text, out in zip(texts, outside, strict=True) if out] == []
    overlap = (np.minimum(x1[:, None], x1) - np.maximum(x0[:, None], x0) > 1) & (
        np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0) > 1
    )
    pairs = zip(*np.nonzero(np.triu(overlap, 1)), strict=True)
    assert [(texts[i].get_text(), texts[j].get_text()) for i, j in pairs] == []


def test_drawing_leaves_pyplot_alone() -> None:
    import matplotlib.pyplot

    draw(make_run(2))
    assert matplotlib.pyplot.get_fignums() == []


def test_draw_accuracy_shows_one_mask() -> None:
    run = make_run(3)
    axes = draw_accuracy(run, "task").axes[0]
    np.testing.assert_array_equal(axes.images[1].get_array(), run.matrices["task"].R.numpy())


def test_picture_report_draws_seldom_but_always_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from cl.report import contract as pace
    from cl.report import picture

    # made; 19.9: too early; 20: drawn until 23, which pauses for 60; 82.9: too early; 90: the end draws anyway
    clock = iter([0.0, 19.9, 20.0, 20.0, 23.0, 82.9, 90.0, 91.0, 92.0])
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    drawn: list[int] = []
    monkeypatch.setattr(picture, "draw", lambda run: drawn.append(now) or draw_accuracy(run, "class"))
    run, report = make_run(3, directory=tmp_path), PictureReport()
    for now in range(4):
        report.row(run, now)
    now = 4
    report.finish(run)
    assert drawn == [1, 4] and next(clock, None) is None
    with Image.open(tmp_path / "transfer.png") as image:
        image.verify()
    assert [p.name for p in tmp_path.iterdir()] == ["transfer.png"]


# --------------------------------------------------------------------------- progress


class Loss:
    """A loss on a device: reading it is what costs."""

    reads = 0

    def __float__(self) -> float:
        self.reads += 1
        return 0.25


def train(bar: ProgressBar, module: SimpleNamespace, clock: list[float], steps: int, seconds: float) -> None:
    module.step = 0
    bar.on_train_start(None, module)  # type: ignore[arg-type]
    for _ in range(steps):
        module.step += 1
        clock[0] += seconds / steps
        bar.on_train_batch_end(None, module, None, None, 0)  # type: ignore[arg-type]
    bar.on_train_end(None, module)  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def learner(loss: object) -> SimpleNamespace:
    return SimpleNamespace(task_index=0, num_tasks=2, num_steps=1000, step=0, last_loss=loss)


def test_without_a_terminal_a_task_is_one_line(clock: list[float]) -> None:
    console, text = plain(width=20)
    loss = Loss()
    bar, module = ProgressBar(console), learner(loss)
    for module.task_index in range(2):
        train(bar, module, clock, steps=1000, seconds=2.5)
    expected = [f"task {k}/2: 1000 steps in 2.5 s, loss 0.2500" for k in (1, 2)]
    assert text.getvalue().splitlines() == expected
    assert loss.reads == 2


def test_the_loss_is_read_ten_times_a_second_at_most(clock: list[float]) -> None:
    console, text = coloured()
    loss = Loss()
    bar, module = ProgressBar(console), learner(loss)
    train(bar, module, clock, steps=1000, seconds=2.0)
    assert 15 <= loss.reads <= 21
    assert "task 1/2" in text.getvalue() and "loss 0.2500" in text.getvalue()
    assert module.step == 1000


def test_the_same_bars_serve_every_task_and_are_gone_in_between(clock: list[float]) -> None:
    console, text = coloured()
    bar, module = ProgressBar(console), learner(None)
    train(bar, module, clock, steps=3, seconds=1.0)
    bars = bar._bars
    begun = bars.tasks[1].start_time if bars is not None else None
    assert bars is not None and bars.tasks[1].completed == 3 and bars.tasks[0].completed == pytest.approx(0.003)
    assert not bars.live.is_started
    assert text.getvalue().endswith("\x1b[2K")  # the lines of the bars are erased
    console.print("a report")
    module.task_index = 1
    bar.on_train_start(None, module)  # type: ignore[arg-type]
    assert bar._bars is bars and bars.live.is_started
    assert begun is not None and (bars.tasks[1].start_time or 0) > begun  # its time is the task's, not the run's
    module.step = 0
    bar._draw(module)
    assert bars.tasks[1].completed == 0 and bars.tasks[0].completed == 1.0
    bar.on_exception(None, module, KeyboardInterrupt())  # type: ignore[arg-type]
    assert not bars.live.is_started


# --------------------------------------------------------------------------- Weights & Biases


def records(directory: Path) -> list[Any]:
    """Read the records of a finished offline run; W&B's own process may still be writing the last ones."""
    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(600):
        found = list(parse(path.read_bytes()))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def learn(run: Run, report: WandbReport, full: dict[str, torch.Tensor], rows: range) -> None:
    for i in rows:
        if i:
            for step in (10, 20):
                point = {"train/loss": i + step / 100, "train/task": i, "epoch": 0}
                report.logger.log_metrics(point, step=20 * (i - 1) + step)
            report.logger.log_metrics({"val/loss": 0.1 * i}, step=1)
        for mask, R in full.items():
            run.matrices[mask].record(i, R[i])
        report.row(run, i)


def test_every_number_is_in_the_offline_run(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = {mask: matrix.R.clone() for mask, matrix in make_run(3).matrices.items()}
    run = make_run(3, rows=0, directory=offline)
    run.config = {
        "seed": 7,
        "strategy": {"er": {"_target_": "cl.strategies.er.ER", "memory_size": 200}, "gpm": {}},
        "stream": {"_target_": "cl.streams.split.split"},
        "dataset": {"_target_": "cl.streams.data.mnist"},
        "tags": ["mine"],
        "group": None,
    }
    report = WandbReport(tags=["paper"])
    assert report.logger.version == ""
    report.start(run, -1)
    assert report.logger.version and report.logger.save_dir == str(offline)
    learn(run, report, full, range(4))
    report.finish(run)

    found: dict[str, list[Any]] = {}
    for record in records(offline):
        found.setdefault(record.WhichOneof("record_type"), []).append(record)
    begun = found["run"][0].run
    assert (begun.project, begun.run_group, begun.display_name) == (
        "clsim",
        "split mnist class 3 tasks",
        "er+gpm seed 7",
    )
    assert set(begun.tags) == {"paper", "mine", "er", "gpm", "class"}
    config = {entry.key: json.loads(entry.value_json) for entry in begun.config.update}
    assert {key: config[key] for key in run.config} == run.config

    axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in found["metric"]}
    for prefix in ("transfer", "class", "task"):
        assert axes[f"{prefix}/*"] == "tasks_learned"
    assert axes["train/*"] == axes["val/*"] == "train/step"

    history = [items(record.history.item) for record in found["history"]]
    curve = [(point["train/step"], point["train/loss"]) for point in history if "train/loss" in point]
    assert curve == [(20 * (i - 1) + s, i + s / 100) for i in (1, 2, 3) for s in (10, 20)]
    validation = [(point["train/step"], point["val/loss"]) for point in history if "val/loss" in point]
    assert validation == [(20 * i, 0.1 * i) for i in (1, 2, 3)]
    assert not any("epoch" in point for point in history)

    rows = [point for point in history if "tasks_learned" in point]
    assert [point["tasks_learned"] for point in rows] == [0, 1, 2, 3]
    (folder,) = offline.glob("wandb/offline-run-*/files")
    for i, point in enumerate(rows):
        for mask, R in full.items():
            table = json.loads((folder / point[f"{mask}/R/path"]).read_text(), parse_constant=refuse)
            assert table["columns"] == ["tasks learned", "1 part-0", "2 part-1", "3 part-2"]
            assert [row[0] for row in table["data"]] == [0, 1, 2, 3]
            back = [[math.nan if value is None else value for value in row[1:]] for row in table["data"]]
            seen = torch.where((torch.arange(4) <= i)[:, None], R, torch.tensor(math.nan))
            torch.testing.assert_close(torch.tensor(back), seen, rtol=0, atol=0, equal_nan=True)
            assert (folder / point[f"{mask}/R_heat_map/path"]).stat().st_size > 1000
            scalars = run.matrices[mask].scalars(i) if i else dict.fromkeys(SCALARS, math.nan)
            for prefix in {mask, "transfer"} if mask == "class" else {mask}:
                named = {k: v for k, v in point.items() if k.startswith(f"{prefix}/") and k.split("/")[1] in SCALARS}
                assert named == {f"{prefix}/{k}": v for k, v in scalars.items() if not math.isnan(v)}

    summary: dict[str, Any] = {}
    for record in found["summary"]:
        summary.update(items(record.summary.update))
    final = {f"task/{k}": v for k, v in run.matrices["task"].scalars().items()}
    final |= {f"{p}/{k}": v for p in ("class", "transfer") for k, v in run.matrices["class"].scalars().items()}
    assert final.items() <= summary.items()
    assert "wandb sync" in capsys.readouterr().out
    assert "WANDB_DATA_DIR" not in os.environ


def test_an_offline_run_of_the_command_line_says_what_transfer_json_says(offline: Path) -> None:
    asked = ["references=[experts]", "probes=[ridge]", "report.points=3", "epochs=1", "stream.num_tasks=2"]
    offline.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "cl", "logger=wandb", "hydra.run.dir=out", *asked]
    result = subprocess.run(command, cwd=offline, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    summary: dict[str, Any] = {}
    curve: dict[str, list[float]] = {}
    for record in records(offline / "out"):
        if record.WhichOneof("record_type") == "summary":
            summary.update(items(record.summary.update))
        if record.WhichOneof("record_type") == "history":
            for key, value in items(record.history.item).items():
                if key.startswith("curve/"):
                    curve.setdefault(key, []).append(value)
    written = json.loads((offline / "out" / "transfer.json").read_text())
    expected = {f"measure/{name}": entry["value"] for name, entry in written["measures"].items()}
    for mask, entries in written["masks"].items():
        expected |= {f"{mask}/{name}": entry["value"] for name, entry in entries["scalars"].items()}
    expected = {name: value for name, value in expected.items() if value is not None}
    assert {"measure/fwt_expert", "ridge/bwt_gem", "measure/worst_case_accuracy"} <= expected.keys()
    assert expected.items() <= summary.items()
    with (offline / "out" / "learning_curves.csv").open() as file:
        table: dict[str, list[float]] = {}
        for row in csv.DictReader(file):
            table.setdefault(f"curve/{row['mask']}/task {row['tested']}", []).append(float(row["value"]))
    assert curve.keys() == table.keys()
    for key, values in curve.items():
        assert values == pytest.approx(table[key], abs=1e-6), key


def test_a_run_that_was_complete_still_gets_its_summary(offline: Path) -> None:
    report, run = WandbReport(), make_run(2, directory=offline)
    report.start(run, 2)
    report.finish(run)
    summary: dict[str, Any] = {}
    for record in records(offline):
        if record.WhichOneof("record_type") == "summary":
            summary.update(items(record.summary.update))
    assert {f"task/{k}": v for k, v in run.matrices["task"].scalars().items()}.items() <= summary.items()


def test_a_continued_run_keeps_its_id_and_a_fresh_one_does_not(offline: Path) -> None:
    run = make_run(2, rows=1, directory=offline)
    identities = []
    for after_task in (-1, 0, -1):
        report = WandbReport(project="p")
        report.start(run, after_task)
        identities.append(report.logger.version)
        report.logger.log_metrics({"train/loss": 1.0}, step=1)
        report.finish(run)
    first, second, third = identities
    assert first == second != third


def test_without_a_login_it_is_offline_and_nobody_is_asked(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "login", lambda **options: asked.append(options))
    monkeypatch.delenv("WANDB_MODE")
    assert WandbReport(mode="online")._mode() == "offline"
    assert asked == [{"prompt": False, "verify": False}]
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    assert WandbReport(mode="online")._mode() == "online"
    assert WandbReport(mode="disabled")._mode() == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert WandbReport()._mode() == "offline"


def test_a_w_and_b_that_fails_online_goes_offline(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    tried: list[str] = []

    def init(mode: str, **_: object) -> str:
        tried.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no network")
        return "the run"

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    report = WandbReport(mode="online", dir=offline)
    assert report._begin(make_run(2), known=None) == "the run"
    assert tried == ["online", "offline"]


def test_a_w_and_b_that_cannot_start_costs_one_sentence(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def init(**_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(wandb, "init", init)
    report, run = WandbReport(), make_run(2, directory=offline)
    with pytest.warns(UserWarning, match="cannot start .RuntimeError: disk full.") as caught:
        report.start(run, -1)
    assert len(caught) == 1
    report.row(run, 1)
    report.logger.log_metrics({"train/loss": 1.0}, 1)
    report.finish(run)


def test_a_w_and_b_that_dies_on_the_way_costs_one_sentence(offline: Path) -> None:
    class Dying:
        def log(self, values: object, step: int) -> None:
            raise BrokenPipeError("gone")

    report, run = WandbReport(dir=offline), make_run(2, directory=offline)
    report.start(run, -1)
    report.run.finish()
    report.run = Dying()
    with pytest.warns(UserWarning, match="BrokenPipeError: gone") as caught:
        report.logger.log_metrics({"train/loss": 1.0}, 1)
        report.row(run, 1)
        report.finish(run)
    assert len(caught) == 1


def test_the_group_of_the_configuration_and_of_the_call_come_first() -> None:
    run = make_run(2)
    run.config = {"group": "table 1", "strategy": None}
    assert WandbReport()._labels(run)["group"] == "table 1"
    assert WandbReport(group="mine")._labels(run)["group"] == "mine"
    assert WandbReport()._labels(run)["tags"] == ["fine-tuning", "class"]
    assert WandbReport(tags=["x" * 99])._labels(run)["tags"][0] == "x" * 64


# --------------------------------------------------------------------------- together


def test_all_reports_follow_a_real_run(offline: Path) -> None:
    from functools import partial

    import pytorch_lightning as pl

    from cl.engine.experiment import Experiment
    from cl.testing import toy_learner

    console, text = plain()
    toy, stream = toy_learner(num_tasks=2)
    wandb_report = WandbReport()
    reports: list[Report] = [FileReport(), PictureReport(), wandb_report, TerminalReport(console)]
    trainer = partial(pl.Trainer, accelerator="cpu")
    run = Experiment(
        toy,
        stream,
        trainer,
        directory=offline,
        reports=reports,
        logger=[wandb_report.logger],
        callbacks=[ProgressBar(console)],
    ).run()
    assert {"transfer.csv", "transfer.json", "transfer.png", "manifest.json", "wandb"} <= {
        p.name for p in offline.iterdir()
    }
    lines = text.getvalue().splitlines()
    assert sum(line.startswith("task ") and " steps in " in line for line in lines) == 2
    assert headline(run, run.primary.mask) in lines
    history = [items(r.history.item) for r in records(offline) if r.WhichOneof("record_type") == "history"]
    assert any("train/loss" in point for point in history)
    assert wandb_report.run is None


@pytest.mark.parametrize("torn", [b"\xff\xfe", b"", b"../other", b"a" * 200])
def test_a_torn_identity_begins_another_run_and_says_so(tmp_path: Path, torn: bytes) -> None:
    from cl.report.wandb import _known

    path = tmp_path / "run_id.txt"
    assert _known(path) is None
    path.write_text("a1b2-c3\n")
    assert _known(path) == "a1b2-c3"
    path.write_bytes(torn)
    with pytest.warns(UserWarning, match=r"run_id\.txt is torn or changed"):
        assert _known(path) is None
