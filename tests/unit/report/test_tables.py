"""The files of a run: R to the last bit, strict JSON, and whole files after a crash."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cl.files import replace_file, write_text
from cl.metrics.transfer import (
    SCALARS,
    caveat,
)
from cl.report.tables import FileReport, strict_json, transfer_json
from example_runs import make_run, refuse


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
