"""A run directory: what is written in a table is read from it, one module names the files, and formats are told."""

from __future__ import annotations

import ast
import json
import math
import re
import typing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from checkout import ROOT
from cl import rundir
from cl.app.resume import expand
from cl.app.scoring import find_checkpoint
from cl.compare.align import align
from cl.compare.read import find_runs, read_run
from cl.engine.branch import Branch
from cl.engine.experiment import Experiment
from cl.errors import InputError
from cl.measure.learning_curves import LearningCurves
from cl.measure.resources import Resources
from cl.report.config_file import refuse_other
from cl.report.tables import FileReport, table_csv
from cl.report.training import TrainingReport
from cl.rundir import ESTIMATES, LEARNING_CURVES, RESOURCES, SCORED, TRAINING, TRANSFER, Table, csv_text
from cl.testing import toy_learner

CL = ROOT / "cl"
TABLES = (TRANSFER, TRAINING, LEARNING_CURVES, ESTIMATES, RESOURCES, SCORED)

CELLS = {int: st.integers(0, 10**6), float: st.floats(), str: st.text("aZ0 ,;'\"é语\t", max_size=6)}


def rows_of(table: Table) -> st.SearchStrategy:
    row = st.tuples(*(CELLS[kind] for kind in table.kinds.values()))
    return st.lists(row.map(lambda cells: table.row(*cells)), max_size=4)


def same(a, b) -> bool:
    return len(a) == len(b) and all(x == y or (x != x and y != y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
@settings(deadline=None)
@given(data=st.data())
def test_what_is_written_in_a_table_is_read_from_it(table, data, tmp_path_factory):
    rows = data.draw(rows_of(table))
    path = tmp_path_factory.mktemp("run") / table.name
    path.write_text(table.header + csv_text(rows), encoding="utf-8", newline="")
    found = list(table.read(path))
    assert len(found) == len(rows) and all(map(same, found, rows))
    assert all(same(table.parse(csv_text([row]).removesuffix("\n")), row) for row in rows)


@given(st.floats(width=32))
def test_a_float32_is_written_to_its_last_bit(value):
    row = rundir.Cell(1, 1, "class", "accuracy", np.float32(value))
    assert same(TRANSFER.parse(csv_text([row]).strip()), row)


def finished(place: Path, reports=(), **options) -> Path:
    learner, stream = toy_learner(num_tasks=2)
    curves = {"resources": Resources(), "curves": LearningCurves(stream, points=2)}
    trainer = partial(pl.Trainer, accelerator="cpu")
    Experiment(learner, stream, trainer, directory=place, reports=reports, instruments=curves, **options).run()
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("runs") / "a", [FileReport(), TrainingReport()])


def test_the_files_of_a_run_are_read_back_as_they_were_measured(place):
    learner, stream = toy_learner(num_tasks=2)
    resources = Resources()
    cpu = partial(pl.Trainer, accelerator="cpu")
    experiment = Experiment(learner, stream, cpu, instruments={"resources": resources})
    run = experiment.run()
    found = read_run(place)
    for mask, matrix in run.matrices.items():
        np.testing.assert_array_equal(found.matrices[mask, "accuracy"].astype(np.float32), matrix.R.numpy())
        values = {name: entry.value for name, entry in found.scalars[mask].items()}
        np.testing.assert_equal(values, run.scalars(mask))
    assert (found.scenario, found.task_names, found.num_tasks) == ("class", tuple(stream.task_names), 2)
    assert found.resources["steps"] == sum(resources.column("steps"))
    assert found.resources["parameters"] == resources.column("parameters")[-1]
    assert math.isfinite(found.resources["seconds"]) and "flops" not in found.resources, "not counted is absent"
    assert found.starts == (0, learner.total_steps // 2)
    assert set(found.curves) == {(m, "accuracy", t) for m in run.matrices for t in (1, 2)}


def test_what_a_table_lacks_is_unmeasured(tmp_path):
    path = tmp_path / RESOURCES.name
    path.write_text("steps,task\n5,1\n,2\n7,3")
    first, second = RESOURCES.read(path)
    assert (first.task, first.steps) == (1, 5.0) and math.isnan(first.flops) and math.isnan(second.steps)
    assert table_csv(("task", "value"), [(1, math.nan), (2, 0.5)]) == "2,0.5\n"


# ---- formats --------------------------------------------------------------------------------------------------------


def written_by(place: Path, version: int | None) -> Path:
    content = json.loads((place / rundir.MANIFEST).read_text())
    content.pop("format", None)
    (place / rundir.MANIFEST).write_text(json.dumps(content | ({} if version is None else {"format": version})))
    return place


def test_every_run_says_its_format_from_the_start(tmp_path):
    class Stop(FileReport):
        def start(self, run, after_task):
            assert json.loads((run.directory / rundir.MANIFEST).read_text())["format"] == rundir.FORMAT
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finished(tmp_path / "a", [Stop()])
    assert rundir.format_of(finished(tmp_path / "b")) == rundir.FORMAT, "no report is needed for it"


LATER = r"was written by a later version of clsim \(format 3 .*up to 2\): upgrade clsim"


def test_a_run_of_a_later_version_is_refused_and_not_touched(tmp_path):
    place = written_by(finished(tmp_path / "a"), rundir.FORMAT + 1)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for attempt in (
        lambda: finished(place),
        lambda: refuse_other({}, place),
        lambda: expand([f"resume={place}"]),
        lambda: expand([f"verify={place}"]),
        lambda: expand([f"score={place}:task=1"]),
        lambda: find_checkpoint(place, 1),
        lambda: finished(tmp_path / "b", branch=Branch(place, 1)),
        lambda: read_run(place),
    ):
        with pytest.raises(InputError, match=LATER) as error:
            attempt()
        assert str(place) in str(error.value) and "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert not (tmp_path / "b").exists()


def test_a_run_of_an_earlier_version_is_told_and_goes_on(tmp_path):
    place = written_by(finished(tmp_path / "a", [FileReport()]), None)
    assert rundir.format_of(place) == 1
    comparison = align([read_run(path) for path in find_runs([place])])
    assert f"{place} was written by an earlier version of clsim: numbers that the files lack are not shown." in (
        comparison.notes
    )
    version = f"an earlier version of clsim (format 1 of a run's files, now {rundir.FORMAT})"
    branched = finished(tmp_path / "b", [FileReport()], branch=Branch(place, 1))
    assert f"The run there was begun by {version}." in read_run(branched).notes
    finished(place, [FileReport()])
    assert rundir.format_of(place) == rundir.FORMAT
    finished(place, [FileReport()])  # a later sitting still tells it, once
    assert read_run(place).notes.count(f"Begun by {version}.") == 1


def test_a_damaged_manifest_stops_no_run(tmp_path):
    place = finished(tmp_path / "a", [FileReport()])
    (place / rundir.MANIFEST).write_text("{")
    finished(place, [FileReport()])
    assert rundir.format_of(place) == rundir.FORMAT and not rundir.earlier_version(place)


# ---- one owner ------------------------------------------------------------------------------------------------------

FILES = {value for name, value in vars(rundir).items() if name.isupper() and isinstance(value, str)}
FILES |= {table.name for table in TABLES} | {table.stem for table in TABLES if "_" in table.stem}
FILES -= {rundir.WANDB, rundir.LOCK}  # the name of a package, and an ending of many files


def literals(path: Path) -> typing.Iterator[tuple[int, str]]:
    """Return the strings of a module but for its docstrings."""
    module = ast.parse(path.read_text())
    said = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.lineno, node.value


def test_no_other_module_names_a_file_of_a_run_or_lists_the_columns_of_a_table():
    dotted = re.compile("|".join(rf"(?<![\w.]){re.escape(name)}(?!\w)" for name in FILES if "." in name))
    found = []
    for path in sorted(CL.rglob("*.py")):
        if path in (CL / "rundir.py", CL / "data" / "cache.py"):  # a dataset in the cache has a manifest of its own
            continue
        names = {value for _, value in literals(path)}
        found += [
            f"{path.name}:{line} {text!r}" for line, text in literals(path) if text in FILES or dotted.search(text)
        ]
        found += [
            f"{path.name} lists {table.name}"
            for table in TABLES
            if len(table.columns) > 3 and names >= set(table.columns)
        ]
    assert not found
