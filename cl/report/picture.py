"""The transfer matrices as one picture, `transfer.png`: R, backward transfer, forward transfer and step effect."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cl import rundir
from cl.files import replace_file
from cl.report.caption import caption_parts, short_path, shorten
from cl.report.contract import Pace, Report
from cl.report.fit import DPI, cut, lines
from cl.report.run import Run
from cl.report.wording import headline, percent, remarks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from torch import Tensor

    from cl.metrics.transfer import TransferMatrix

MAX_NUMBERS = 20  # with more tasks, cells have no numbers
_UNMEASURED = "#cfcfcf"

# in inches: margins of a heat map, height of a line of text, and margin of the text above the heat maps
_LEFT, _RIGHT, _ABOVE, _BELOW = 0.95, 0.85, 0.85, 0.65
_LINE = 0.22
_EDGE = 0.15
_SIZE = 10  # font size of the text below the heat maps, in points


@dataclass
class Panel:
    """One heat map.

    Attributes:
        title: The quantity, its unit and the mask.
        reading: How to read a cell, in plain words.
        row: The label of the vertical axis.
        column: The label of the horizontal axis.
        values: (rows, T) fractions, NaN where there is no value.
        region: Cells in which NaN means unmeasured (grey); other cells have no meaning (blank). Bool (rows, T).
        stairs: The line between old and new tasks crosses column j at row j + stairs; None for no line.
        signed: Whether the values are differences rather than levels.
        limit: The value at which the colours end.
    """

    title: str
    reading: str
    row: str
    column: str
    values: Tensor
    region: Tensor
    stairs: float | None = None
    signed: bool = True
    limit: float = 1.0


def _limit(values: Tensor) -> float:
    """Return the end of a diverging scale: the largest entry, but at least 5 points, so that noise stays pale."""
    return max(float(values.nan_to_num().abs().max()), 0.05)


def _accuracy_panel(matrix: TransferMatrix, run: Run) -> Panel:
    R = matrix.R.cpu()
    metric = matrix.metric.capitalize() if matrix.metric.islower() else matrix.metric
    title = f"{metric}, in %  [{matrix.mask} mask]"
    reading = "How well each task is done, before training and after each task"
    if not run.boundaries:
        reading = "How well each task is done, before training and at each evaluation point"
    # colours end at 100 %; a metric below 0, such as R2 may be, has the colour of 0
    return Panel(title, reading, run.rows, "task tested", R, R.isnan(), 0.5, signed=False)


def _backward_panel(matrix: TransferMatrix, run: Run) -> Panel:
    from cl.metrics.transfer import backward_transfer

    values = backward_transfer(matrix.R)
    title = f"Backward transfer, in points  [{matrix.mask} mask]"
    reading = "Change of an earlier task since it was just learned"
    region = values.isnan().tril(-1)
    return Panel(title, reading, run.rows, "earlier task", values, region, 0.5, limit=_limit(values))


def _forward_panel(matrix: TransferMatrix, run: Run) -> Panel:
    from cl.metrics.transfer import forward_transfer

    values = forward_transfer(matrix.R)
    title = f"Forward transfer, in points  [{matrix.mask} mask]"
    reading = "A task still to come, against the untrained learner"
    if matrix is not run.primary:
        reading += f"\n({matrix.mask} mask: classes of other tasks do not compete)"
    region = values.isnan().triu(1)
    return Panel(title, reading, run.rows, "task still to come", values, region, -0.5, limit=_limit(values))


def _step_panel(matrix: TransferMatrix) -> Panel:
    from cl.metrics.transfer import step_effect

    values = step_effect(matrix.R)
    off_diagonal = values.clone().fill_diagonal_(0.0)
    title = f"Step effect, in points  [{matrix.mask} mask]"
    reading = "How far learning one task moved every task\n(diagonal: that task itself; colours fit the other cells)"
    limit = _limit(off_diagonal)
    return Panel(title, reading, "task learned in this step", "task moved", values, values.isnan(), limit=limit)


def panels(run: Run) -> list[Panel]:
    """Return R, backward transfer, forward transfer and step effect, the third under the mask that can measure it."""
    return [
        _accuracy_panel(run.primary, run),
        _backward_panel(run.primary, run),
        _forward_panel(run.zero_shot, run),
        _step_panel(run.primary),
    ]


class Head:
    """The caption and the directory of a run, at the top of a picture.

    Args:
        run: The run that is drawn.
        width: The width of the picture, in inches.

    Attributes:
        lines: The lines of the caption.
        path: The end of the directory's path.
        height: The height that both take, in inches.

    Example:
        >>> from pathlib import Path
        >>> Head(Run(Path("."), {"seed": 1}, ["a"], "task", {}, stream="mine"), width=9).lines
        ['mine, task-incremental, 1 task · seed 1']
    """

    def __init__(self, run: Run, width: float) -> None:
        self.lines = lines(caption_parts(run), width - 2 * _EDGE, 11, between=" · ")
        self.path = cut(short_path(run.directory), width - 2 * _EDGE, 9.5)
        self.height = _EDGE + _LINE * (len(self.lines) + bool(self.path))

    def write(self, figure: Figure) -> None:
        """Write both into the upper left corner of a figure."""
        width, height = figure.get_size_inches()
        x, y = _EDGE / width, 1 - _EDGE / height
        figure.text(x, y, "\n".join(self.lines), fontsize=11, va="top", linespacing=1.3, parse_math=False)
        y -= _LINE * len(self.lines) / height
        figure.text(x, y, self.path, fontsize=9.5, va="top", color="#404040", parse_math=False)


def png(figure: Figure) -> bytes:
    """Return a picture as the content of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def draw(run: Run) -> Figure:
    """Return a figure of the four panels, with the caption above, and the scalars and remarks below.

    Blue is a gain and red a loss (ColorBrewer's RdBu, safe for the colour-blind), and white is no change. Grey cells
    are not measured; cells without a meaning are blank. With up to 20 tasks, each cell shows its number.

    Example:
        >>> from pathlib import Path
        >>> from cl.metrics.transfer import TransferMatrix, worked_example
        >>> run = Run(Path("."), {}, ["a", "b", "c"], "task", {"task": TransferMatrix(3, "task")})
        >>> for i, row in enumerate(worked_example()):
        ...     run.primary.record(i, row)
        >>> [text.get_text() for text in draw(run).axes[2].texts[:3]]
        ['+4.0', '-6.0', '+3.0']
    """
    from matplotlib.figure import Figure

    side = _side(run)
    column, row = _LEFT + side + _RIGHT, _ABOVE + side + _BELOW
    text_below = _foot(run, 2 * column - 2 * _EDGE)
    foot = _LINE * (len(text_below) + 1.5)
    head = Head(run, 2 * column)
    figure = Figure(figsize=(2 * column, head.height + 2 * row + foot), dpi=DPI)
    head.write(figure)
    for k, panel in enumerate(panels(run)):
        corner = (k % 2 * column + _LEFT, foot + (1 - k // 2) * row + _BELOW)
        _draw_panel(figure, corner, side, panel)
    bottom = (foot - _LINE / 2) / figure.get_figheight()
    text = figure.text(0.5, bottom, "\n".join(text_below), ha="center", va="top", fontsize=_SIZE, linespacing=1.45)
    text.set_parse_math(False)
    return figure


def draw_accuracy(run: Run, mask: str) -> Figure:
    """Return a figure of R under one mask, with the caption above."""
    from matplotlib.figure import Figure

    side = _side(run)
    head = Head(run, _LEFT + side + _RIGHT)
    figure = Figure(figsize=(_LEFT + side + _RIGHT, head.height + _ABOVE + side + _BELOW), dpi=DPI)
    head.write(figure)
    _draw_panel(figure, (_LEFT, _BELOW), side, _accuracy_panel(run.matrices[mask], run))
    return figure


def _side(run: Run) -> float:
    """Return the side of a heat map in inches."""
    return min(6.8, max(4.0, 0.5 * run.primary.num_tasks))


def _foot(run: Run, inches: float) -> list[str]:
    learned = f"after {max(0, run.tasks_learned)} of {len(run.task_names)} tasks, in %"
    paragraphs = remarks(run)
    if len(run.task_names) <= MAX_NUMBERS:
        paragraphs = [
            "Tasks: " + ", ".join(f"{j}: {shorten(name)}" for j, name in enumerate(run.task_names, 1)),
            *paragraphs,
        ]
    paragraphs = [*(f"{headline(run, mask)} \u00a0 ({learned})" for mask in run.matrices), *paragraphs]
    return [line for paragraph in paragraphs for line in lines(paragraph.split(" "), inches, _SIZE)]


def _draw_panel(figure: Figure, corner: tuple[float, float], side: float, panel: Panel) -> None:
    import numpy as np
    from matplotlib.colors import ListedColormap, Normalize

    width, height = figure.get_size_inches()
    box = (corner[0] / width, corner[1] / height, side / width, side / height)
    axes = figure.add_axes(box)
    values, limit = panel.values.numpy(), panel.limit
    grey = np.where(panel.region.numpy(), 0.0, np.nan)
    axes.imshow(grey, cmap=ListedColormap([_UNMEASURED]), aspect="auto", interpolation="nearest")
    norm = Normalize(-limit if panel.signed else 0.0, limit)
    colours = "RdBu" if panel.signed else "cividis"
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    if np.isfinite(values).any():
        beside = figure.add_axes((box[0] + box[2] + 0.1 / width, box[1], 0.14 / width, box[3]))
        bar = figure.colorbar(image, cax=beside, format=lambda x, _: percent(x, panel.signed, 0))
        bar.outline.set_visible(False)
        beside.tick_params(length=2, labelsize=8.5)
    else:
        empty = "nothing measured yet" if panel.region.any() else "needs two tasks"
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", va="center", fontsize=10, color="#555555")
    if values.shape[1] <= MAX_NUMBERS:
        _write_numbers(axes, image, panel)
    if panel.stairs is not None:
        edges = np.arange(values.shape[1] + 1) - 0.5
        axes.step(edges, edges + 0.5 + panel.stairs, where="post", color="#9a9a9a", linewidth=0.8)
    _label(axes, panel)


def _write_numbers(axes: Axes, image: AxesImage, panel: Panel) -> None:
    few = panel.values.shape[1] <= 10
    for i, row in enumerate(panel.values.tolist()):
        for j, value in enumerate(row):
            if math.isnan(value):
                continue
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            text = percent(value, panel.signed, digits=1 if few else 0)
            axes.text(j, i, text, ha="center", va="center", fontsize=9 if few else 8, color=ink)


def _label(axes: Axes, panel: Panel) -> None:
    num_rows, num_tasks = panel.values.shape
    # 5, 10, 15, ... once there are too many to name each
    every = 1 if num_tasks <= MAX_NUMBERS else 5 * math.ceil(num_tasks / (5 * MAX_NUMBERS))
    numbers = [j for j in range(1, num_tasks + 1) if j % every == 0 or j == 1]
    untrained = ["untrained"] if num_rows > num_tasks else []
    down = numbers[1:] if untrained and every > 1 else numbers  # "1" would touch "untrained"
    rows = [0] * len(untrained) + [j - 1 + len(untrained) for j in down]
    axes.set_xticks([j - 1 for j in numbers], [str(j) for j in numbers])
    axes.set_yticks(rows, untrained + [str(j) for j in down])
    axes.tick_params(length=0, labelsize=9)
    axes.set_xlim(-0.5, num_tasks - 0.5)
    axes.set_ylim(num_rows - 0.5, -0.5)
    for spine in axes.spines.values():
        spine.set_color("#e0e0e0")
    axes.set_xlabel(panel.column, fontsize=9.5)
    axes.set_ylabel(panel.row, fontsize=9.5)
    axes.annotate(panel.title, (0, 1), (0, 34), "axes fraction", "offset points", fontsize=12, fontweight="bold")
    axes.annotate(
        panel.reading, (0, 1), (0, 30), "axes fraction", "offset points", fontsize=9.5, va="top", color="#404040"
    )


class PictureReport(Report):
    """Updates `transfer.png`, with at most a twentieth of the run's time; the file is always a whole picture.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from cl.metrics.transfer import TransferMatrix
        >>> run = Run(Path(tempfile.mkdtemp()), {}, ["a"], "domain", {"domain": TransferMatrix(1, "domain")})
        >>> PictureReport().finish(run)
        >>> (run.directory / "transfer.png").exists()
        True
    """

    def __init__(self) -> None:
        self._pace = Pace(20.0)  # matplotlib takes a second to load

    def row(self, run: Run, after_task: int) -> None:
        """Draw the picture, unless that is too early after the last one, or the end of the run will draw it anyway."""
        if self._pace.ready() and after_task < len(run.task_names):
            self.finish(run)

    def finish(self, run: Run) -> None:
        """Draw the picture."""
        with self._pace:
            figure = draw(run)
            replace_file(run.directory / rundir.PICTURE, lambda temporary: figure.savefig(temporary, format="png"))
