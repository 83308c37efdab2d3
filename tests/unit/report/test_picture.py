"""The picture of a run: numbers, colours, captions, and nothing that overlaps."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cl.metrics.transfer import (
    TransferMatrix,
    backward_transfer,
    caveat,
    forward_transfer,
    step_effect,
)
from cl.report.picture import PictureReport, draw, draw_accuracy, panels
from cl.report.run import Run
from cl.report.wording import headline, percent
from example_runs import make_run


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
