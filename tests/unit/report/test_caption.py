"""What ran: every picture, table, page and first line says it in the same words, and however long a name is."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_module
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cl.app.build import build
from cl.compare.command import main
from cl.compare.read import read_run
from cl.engine.experiment import Experiment
from cl.measure.learning_curves import LearningCurves
from cl.metrics.transfer import TransferMatrix
from cl.report import curves_picture as curves
from cl.report.caption import LONGEST, caption, shorten
from cl.report.fit import cut, lines, width
from cl.report.picture import draw, draw_accuracy
from cl.report.run import Run
from cl.report.tables import FileReport
from cl.report.terminal import TerminalReport
from cl.strategies.er import ER
from cl.testing import toy_learner, toy_stream


def run_of(place: Path, *overrides: str) -> Run:
    """Learn what `cl-run` would be told to learn."""
    with initialize_config_module("cl.conf", version_base="1.3"):
        cfg = compose(
            "config",
            ["epochs=1", "stream.num_tasks=2", "trainer.accelerator=cpu", "report.points=2", *overrides],
        )
    return build(cfg, place).run()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def er(place):
    return run_of(place / "er", "seed=7")


@pytest.fixture(scope="module")
def both(place):
    return run_of(place / "er_gpm", "strategy=[er,gpm]", "epochs=2", "backbone=simple_cnn", "scenario=task")


@pytest.fixture(scope="module")
def python(place):
    learner, stream = toy_learner({"replay": ER()}, num_tasks=2)
    instruments = {"curves": LearningCurves(stream, points=2)}
    options = {"directory": place / "python", "reports": [FileReport()], "instruments": instruments, "epochs": 3}
    return Experiment(learner, stream, partial(pl.Trainer, accelerator="cpu"), **options).run()


SAID = {
    "er": "er · split digits, class-incremental, 2 tasks · MLP · 1 epoch · seed 7 · cpu",
    "both": "er+gpm · split digits, task-incremental, 2 tasks · SimpleCNN · 2 epochs · seed 0 · cpu",
    "python": "replay · stream, class-incremental, 2 tasks · ToyBackbone · 3 epochs · seed 0 · cpu",
}


@pytest.fixture(params=SAID)
def run(request):
    return request.getfixturevalue(request.param), SAID[request.param]


def heading(figure) -> str:
    return figure.texts[0].get_text().replace("\n", " · ")


def test_pictures_terminal_and_files_say_what_ran_in_the_same_words(run):
    run, said = run
    assert caption(run) == said
    assert [heading(figure) for figure in (draw(run), draw_accuracy(run, "class"), curves.draw(run))] == [said] * 3
    out = io.StringIO()
    report = TerminalReport(Console(file=out, width=40))
    report.start(run, -1)
    assert out.getvalue().splitlines()[0] == said
    report.finish(run)
    assert out.getvalue().splitlines().count(said) == 2, "it stands above the final numbers, too"
    assert caption(read_run(run.directory)) == said


def test_a_comparison_says_what_ran_in_its_table_and_on_its_page(er, both, tmp_path, capsys):
    main([str(er.directory), "--out", str(tmp_path)])
    assert SAID["er"] in capsys.readouterr().out
    page = (tmp_path / "comparison.html").read_text()
    assert f'<p class="caption">{SAID["er"]}</p>' in page, "over the figures"
    assert f'"caption": "{SAID["er"]}"' in page, "and on those that are saved from it"


def test_several_runs_are_said_by_what_they_share(er):
    runs = [replace(er, config=er.config | {"seed": seed, "epochs": 1 + seed % 2}) for seed in (0, 1, 2)]
    assert caption(*runs) == "er · split digits, class-incremental, 2 tasks · MLP · 1, 2 epochs · seeds 0, 1, 2 · cpu"


def test_two_pictures_of_one_caption_are_told_apart_by_their_directories(er):
    other = replace(er, directory=er.directory.parent / "er_again")
    for made in (draw, curves.draw, partial(draw_accuracy, mask="class")):
        one, two = ([text.get_text() for text in made(run).figure.texts] for run in (er, other))
        assert one[0] == two[0] and one[1].endswith("/er") and two[1].endswith("/er_again")


def long_run(letter: str, num_tasks: int = 3) -> Run:
    """Return a run all of whose names have 300 characters."""
    name = f"{letter * 9} " * 30
    matrices = {mask: TransferMatrix(num_tasks, mask) for mask in ("class", "task")}
    for matrix in matrices.values():
        for i in range(num_tasks + 1):
            matrix.record(i, torch.full((num_tasks,), 0.5))
    config = {
        "strategy": {letter * 300: {"_target_": "a.B"}},
        "backbone": {"_target_": f"a.{letter * 300}"},
        "epochs": 10**9,
        "seed": 10**19,
    }
    place = Path("runs") / (letter * 250) / (letter * 250)
    run = Run(place, config, [name] * num_tasks, "class", matrices, stream=name, device="cuda × 1024")
    run.instruments = {"curves": LearningCurves(toy_stream(num_tasks), points=2)}
    return run


@pytest.mark.parametrize("letter", ["W", "i", "$_", "_^{"])
@pytest.mark.parametrize("make", [draw, partial(draw_accuracy, mask="class"), curves.draw], ids=["all", "R", "curves"])
def test_in_a_picture_no_name_is_cut_by_its_edge_or_lies_over_another_text(letter, make):
    figure = make(long_run(letter))
    figure.draw_without_rendering()
    inner = [text for axes in figure.axes for text in (*axes.texts, axes.title, axes.yaxis.label, axes.xaxis.label)]
    boxes = [text.get_window_extent() for text in (*figure.texts, *inner) if text.get_text().strip()]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    heads, others = boxes[:2], boxes[2:]
    assert not [1 for box in (*others, *(axes.bbox for axes in figure.axes)) for head in heads if head.overlaps(box)]
    assert "…" in heading(figure) and "1000000000 epochs" in heading(figure) and "cuda × 1024" in heading(figure)


def test_in_the_terminal_a_long_name_is_shortened():
    out = io.StringIO()
    TerminalReport(Console(file=out, width=80)).start(long_run("W"), -1)
    first, second = out.getvalue().splitlines()
    assert len(first) < 6 * LONGEST and first.count("…") == 3 and len(second) < 4 * LONGEST


def test_a_log_in_another_encoding_ends_no_run(er):
    raw = io.BytesIO()
    log = io.TextIOWrapper(raw, encoding="ascii")
    TerminalReport(Console(file=log, width=80)).start(er, -1)
    log.flush()
    assert raw.getvalue().startswith(b"er ? split digits, class-incremental, 2 tasks ? MLP")


@given(st.text("Wi x", max_size=30), st.floats(0.3, 4), st.sampled_from([8, 11]))
def test_text_that_is_cut_fits_and_keeps_what_fits(text, inches, size):
    kept = cut(text, inches, size)
    assert width(kept, size) <= inches
    assert kept == text or (kept.endswith("…") and text.startswith(kept[:-1]) and width(text, size) > inches)


@given(st.lists(st.text("Wi", min_size=1, max_size=6), max_size=12), st.floats(1, 4))
def test_lines_hold_every_part_in_order_and_none_is_too_wide(parts, inches):
    found = lines(parts, inches, 10, between=" · ")
    assert " · ".join(found) == " · ".join(parts)
    assert all(width(line, 10) <= inches for line in found)


@given(st.text(max_size=60), st.integers(1, 50))
def test_a_shortened_name_is_one_line_no_longer_than_asked(text, longest):
    assert len(shorten(text, longest)) <= longest and "\n" not in shorten(text, longest)
