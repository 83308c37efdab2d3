"""A score in the terminal and as a table; where its files may be written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cl import rundir
from cl.errors import InputError
from cl.report.scored import Score, directory_for
from cl.rundir import SCORED, Cell
from example_runs import coloured, plain


def example(values: list[float], **options) -> Score:
    names = [f"set {t}" for t in range(len(values))]
    rows = {"class": torch.tensor(values), "task": torch.tensor(values) / 2}
    masks = {"class": ("class", "accuracy"), "task": ("task", "accuracy")}
    return Score(rows, {}, masks, names, 2, "er · two tasks", "others", **options)


def test_plain_output_has_every_number_and_what_was_changed() -> None:
    console, text = plain()
    score = example([0.5, 0.875], options={"mine.shift": 1}, about={"notes": ["Something changed."]})
    score.show(console)
    assert text.getvalue().splitlines() == [
        "er · two tasks",
        "scored on others: 1: set 0, 2: set 1",
        "with mine.shift=1",
        "after 2 (class):   50.0   87.5",
        "after 2 (task):   25.0   43.8",
        "class: average accuracy 68.8",
        "task: average accuracy 34.4",
        "Something changed.",
    ]
    assert repr(score) == (
        "Score(after task 2, mine.shift=1, on 2 test sets of others; class: average accuracy 68.8; "
        "task: average accuracy 34.4)"
    )


def test_many_test_sets_are_summarised_and_a_terminal_shows_a_coloured_row() -> None:
    console, text = plain()
    example([0.5] * 21 + [0.25]).show(console)
    assert "after 2 (class): lowest 25.0 on test set 22" in text.getvalue() and "and 2 more" in text.getvalue()
    console, text = coloured()
    example([0.5, 0.875]).show(console)
    assert "\x1b[" in text.getvalue() and "87.5" in text.getvalue() and "column: test set, task mask" in text.getvalue()


def test_the_files_hold_the_cells_and_leave_out_what_is_unmeasured(tmp_path: Path) -> None:
    score = example([0.5, float("nan")], directory=tmp_path / "score", about={"run": "there"})
    score.write()
    assert list(SCORED.read(tmp_path / "score" / SCORED.name)) == [
        Cell(2, 1, "class", "accuracy", 0.5),
        Cell(2, 1, "task", "accuracy", 0.25),
    ]
    said = rundir.read_json(tmp_path / "score" / rundir.SCORE)
    assert (said["run"], said["task_names"], said["after_task"]) == ("there", ["set 0", "set 1"], 2)


@pytest.mark.parametrize("name", [rundir.CONFIG, rundir.RESULT, rundir.CHECKPOINTS, rundir.SCORE, SCORED.name])
def test_a_directory_that_is_taken_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cli.log").touch()
    assert directory_for(tmp_path / "out", tmp_path / "run") == tmp_path / "out", "Hydra's log is no run"
    (tmp_path / "out" / name).touch()
    with pytest.raises(InputError, match="holds a run or a score already: name another"):
        directory_for(tmp_path / "out", tmp_path / "run")


def test_the_directory_of_the_run_is_never_written_to(tmp_path: Path) -> None:
    for inside in (tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(InputError, match="lies in the directory of the run"):
            directory_for(inside, tmp_path)
    assert directory_for(tmp_path / "a", None) == tmp_path / "a"
