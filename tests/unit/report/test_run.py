"""What every report sees of a run."""

from __future__ import annotations

import math

import pytest

from cl.metrics.transfer import (
    caveat,
)
from cl.report.wording import headline, percent, remarks
from example_runs import example_run, make_run


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
