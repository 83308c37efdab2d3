"""The transfer matrix as files: `transfer.csv` for every cell, `transfer.json` for every scalar and its definition."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from cl import rundir
from cl.files import append_text, write_text
from cl.metrics.scalar import AnyScalar
from cl.report.contract import Pace, Report
from cl.report.run import Run
from cl.rundir import csv_text


def strict_json(value: Any) -> str:
    """Return JSON that every parser reads: NaN and infinities become null.

    Example:
        >>> print(strict_json({"bwt": float("nan")}))
        {
          "bwt": null
        }
    """
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def transfer_csv(run: Run, rows: Iterable[int]) -> str:
    """Return rows of every R and calibration matrix as CSV, a line for each measured cell, exact to the last bit.

    Args:
        run: The run.
        rows: The numbers of the rows.
    """
    return csv_text(
        rundir.Cell(after_task, task, matrix.mask, matrix.metric, value)
        for after_task in rows
        for matrix in (*run.matrices.values(), *run.calibration.values())
        for task, value in enumerate(matrix.R[after_task].cpu().numpy(), start=1)
        if not math.isnan(value)
    )


def table_csv(columns: Sequence[str], records: Iterable[Sequence[Any]]) -> str:
    r"""Return records as CSV.

    If the last column is called "value", records in which it is NaN (unmeasured) are left out; any other NaN is an
    empty cell.

    Example:
        >>> table_csv(("task", "value"), [(1, 0.5), (2, math.nan)])
        '1,0.5\n'
    """
    long = columns[-1] == "value"
    return csv_text(record for record in records if not (long and math.isnan(record[-1])))


def transfer_json(run: Run) -> str:
    """Return the content of `transfer.json`: every scalar over the tasks learned so far, with definition and source."""
    from cl.metrics.transfer import SCALARS
    from cl.report.scalars import forecasts, known, measure

    masks = {
        mask: {
            "metric": matrix.metric,
            "scalars": {n: _entry(SCALARS[n], n, value, mask) for n, value in run.scalars(mask).items()},
        }
        for mask, matrix in run.matrices.items()
    }
    read_under = {True: run.zero_shot.mask, False: run.primary.mask}
    values, absent = measure(run)
    defined = known(run)
    return strict_json(
        {
            "stream": run.stream,
            "scenario": run.scenario,
            "device": run.device,
            "bound": run.bound,
            "num_tasks": len(run.task_names),
            "tasks_learned": run.tasks_learned,
            "task_names": run.task_names,
            "test_rows": list(run.test_rows),
            "order": list(run.order),
            "rows": run.rows,
            "notes": run.notes,
            "tuning": run.tuning,
            "masks": masks,
            "measures": {
                n: _entry(defined[n], n, v, read_under[defined[n].fair])
                | ({"defined_in": defined[n].__module__} if n in run.own_scalars else {})
                for n, v in values.items()
            },
            "absent": absent,
            "forecasts": forecasts(run),
        }
    )


def _entry(scalar: AnyScalar, name: str, value: float, mask: str) -> dict[str, Any]:
    from cl.metrics.transfer import READS_UNSEEN, caveat

    return {
        "value": value,
        "definition": scalar.formula,
        "source": scalar.source,
        "scale": scalar.scale,
        "divisor": scalar.divisor,
        "weighting": scalar.weighting,
        "higher_is_better": scalar.higher_is_better,
        "mask": mask,
        "caveat": caveat(name, mask) if name in READS_UNSEEN else None,
    }


class FileReport(Report):
    """Updates `transfer.csv`, `transfer.json` and the instruments' tables after every row.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from cl.metrics.transfer import TransferMatrix, worked_example
        >>> run = Run(Path(tempfile.mkdtemp()), {}, ["a", "b", "c"], "task", {"task": TransferMatrix(3, "task")})
        >>> report = FileReport()
        >>> report.start(run, after_task=-1)
        >>> for i, row in enumerate(worked_example()):
        ...     run.primary.record(i, row)
        ...     report.row(run, after_task=i)
        >>> (run.directory / "transfer.csv").read_text().splitlines()[-1]
        '3,3,task,accuracy,0.8'
    """

    def __init__(self) -> None:
        self._pace = Pace()
        self._written: dict[str, int] = {}  # number of records written to each table

    def start(self, run: Run, after_task: int) -> None:
        """Write the rows that are measured already."""
        known = transfer_csv(run, range(after_task + 1))
        write_text(run.directory / rundir.TRANSFER.name, rundir.TRANSFER.header + known)
        self._written = {}
        for instrument in run.instruments.values():
            if instrument.file:
                write_text(run.directory / f"{instrument.file}.csv", csv_text([instrument.columns]))
                self._append(run, instrument)

    def row(self, run: Run, after_task: int) -> None:
        """Append to the tables; write `transfer.json`, unless that would take more than a twentieth of the time."""
        append_text(run.directory / rundir.TRANSFER.name, transfer_csv(run, [after_task]))
        for instrument in run.instruments.values():
            self._append(run, instrument)
        if self._pace.ready():
            self.finish(run)

    def _append(self, run: Run, instrument: Any) -> None:
        begun, self._written[instrument.file] = self._written.get(instrument.file, 0), len(instrument)
        if instrument.file and len(instrument) > begun:
            append_text(
                run.directory / f"{instrument.file}.csv", table_csv(instrument.columns, instrument.records(begun))
            )

    def finish(self, run: Run) -> None:
        """Write `transfer.json`, and `references.json` if there are references."""
        if run.references:
            write_text(run.directory / rundir.REFERENCES, strict_json(run.references))
        with self._pace:
            write_text(run.directory / rundir.SUMMARY, transfer_json(run))
