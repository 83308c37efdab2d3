"""The run in the log format of l2metrics, which the tools of l2metrics read: `l2log/`."""

from __future__ import annotations

from cl import rundir
from cl.errors import InputError
from cl.report.contract import Report
from cl.report.run import Curves, Run


class L2Log(Report):
    """Writes R and the learning curves as evaluation and learning blocks, and one log for each expert.

    On the command line: `report.points=10 +report.l2._target_=cl.report.l2.L2Log`.

    Example:
        >>> from pathlib import Path
        >>> L2Log().start(Run(Path("."), {}, ["a"], "class", {}), after_task=-1)
        Traceback (most recent call last):
        cl.errors.InputError: l2metrics reads learning curves: set report.points=10 (or report.every=N).
    """

    def start(self, run: Run, after_task: int) -> None:
        """Refuse a run without learning curves, before it trains.

        Raises:
            InputError: If nothing is evaluated inside tasks.
        """
        if "curves" not in run.instruments:
            raise InputError("l2metrics reads learning curves: set report.points=10 (or report.every=N).")

    def finish(self, run: Run) -> None:
        """Write the logs."""
        from cl.metrics.lifelong import write_l2_expert_log, write_l2_log

        curves: Curves = run.instruments["curves"]
        folder = run.directory / rundir.L2_LOG
        write_l2_log(folder / "lifelong", run.primary.R.cpu(), curves.own(), run.task_names)
        for t, expert in enumerate(run.references.get("experts", ())):
            points = [value for _, value in expert["curve"]]
            if points:  # an expert that diverged has no curve
                write_l2_expert_log(folder / f"expert_{t + 1:03d}", points, run.task_names[t], t + 1)
