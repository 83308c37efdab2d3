"""The evaluations inside tasks as a picture, `learning_curves.png`: the curve of each task over the whole run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl import rundir
from cl.files import replace_file
from cl.report.contract import Report
from cl.report.fit import DPI, cut
from cl.report.picture import Head
from cl.report.run import Curves, Run
from cl.report.wording import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS = 12  # the most tasks that are drawn; of longer streams, the first eleven and the last


def shown(num_tasks: int) -> list[int]:
    """Return the tasks that are drawn, from 0.

    Example:
        >>> shown(3), len(shown(100)), shown(100)[-1]
        ([0, 1, 2], 12, 99)
    """
    return list(range(num_tasks)) if num_tasks <= MAX_ROWS else [*range(MAX_ROWS - 1), num_tasks - 1]


def draw(run: Run) -> Figure:
    """Return a figure with one strip per task: its accuracy over the steps of the run; vertical lines start the tasks.

    A dot marks the point at which the task has been learned, and a dashed line its accuracy there. A later fall below
    the line is the stability gap, and a value below it at the right edge is forgetting. The curve of an expert is grey.

    Example:
        >>> from pathlib import Path
        >>> from cl.measure.learning_curves import LearningCurves
        >>> from cl.testing import toy_learner, toy_stream
        >>> from cl.metrics.transfer import TransferMatrix
        >>> run = Run(Path("."), {}, ["a", "b"], "task", {"task": TransferMatrix(2, "task")})
        >>> run.instruments = {"curves": LearningCurves(toy_stream(2), points=2)}
        >>> len(draw(run).axes)
        2
    """
    from matplotlib.figure import Figure

    curves: Curves = run.instruments["curves"]
    tasks = shown(len(run.task_names))
    head = Head(run, 9.5)
    figure = Figure(figsize=(9.5, head.height + 1.0 * len(tasks) + 1.1), dpi=DPI)
    head.write(figure)
    strips = figure.subplots(len(tasks), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    starts = [total for task, step, total in curves.at if step == 0]
    for axes, task in zip(strips, tasks, strict=True):
        _strip(axes, run, curves, task, starts)
    strips[-1].set_xlabel("step of the run", fontsize=9.5)
    metric = run.primary.metric
    title = f"{metric[0].upper()}{metric[1:]} inside tasks, in %  [{run.primary.mask} mask]"
    inch = 1 / figure.get_figheight()
    figure.text(0.016, 1 - (head.height + 0.1) * inch, title, va="top", fontsize=12, fontweight="bold")
    about = "One strip a task; dot and dashed line: where it was learned, and how well; right: at the end"
    about += "; grey: an expert on it alone" * bool(run.references.get("experts"))
    figure.text(0.016, 1 - (head.height + 0.34) * inch, about, va="top", fontsize=9.5, color="#404040")
    figure.subplots_adjust(left=0.17, right=0.93, top=1 - (head.height + 0.65) * inch, bottom=0.5 * inch, hspace=0.25)
    return figure


def _strip(axes: Axes, run: Run, curves: Curves, task: int, starts: list[int]) -> None:
    values = curves.values()[:, task].tolist()
    points = [(total, value) for (_, _, total), value in zip(curves.at, values, strict=True) if value == value]
    for start in starts:
        axes.axvline(start, color="#dddddd", linewidth=0.8, zorder=0)
    if points:
        steps, heights = zip(*points, strict=True)
        for expert in run.references.get("experts", ())[task : task + 1]:
            x, y = zip(*[(steps[0] + step, value) for step, value in expert["curve"]] or [((), ())], strict=True)
            axes.plot(x, y, color="#9a9a9a", linewidth=1.2)
        axes.plot(steps, heights, color="#00224e", linewidth=1.4, marker=".", markersize=3)
        end = [n for n, at in enumerate(curves.at) if at[0] == task + 1]
        if end:
            at, level = curves.at[end[-1]][2], values[end[-1]]
            axes.plot(at, level, "o", color="#b35806", markersize=5)
            axes.plot([at, steps[-1]], [level, level], color="#b35806", linewidth=0.8, linestyle="--")
        axes.text(1.01, 0.5, percent(heights[-1]), transform=axes.transAxes, fontsize=9, va="center")
    name = f"{task + 1}: {run.task_names[task]}"
    axes.set_ylabel(cut(name, 1.15, 9), parse_math=False, fontsize=9, rotation=0, ha="right", va="center")
    axes.set_yticks([0, 0.5, 1], ["0", "50", "100"])
    axes.set_ylim(-0.04, 1.04)
    axes.tick_params(length=2, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


class CurvesPicture(Report):
    """Draws `learning_curves.png` at the end of a run that evaluates inside tasks.

    Example:
        >>> from pathlib import Path
        >>> CurvesPicture().finish(Run(Path("."), {}, ["a"], "domain", {}))  # nothing to draw
    """

    def finish(self, run: Run) -> None:
        """Draw the picture."""
        if run.instruments.get("curves"):
            figure = draw(run)
            path = run.directory / rundir.CURVES_PICTURE
            replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))
