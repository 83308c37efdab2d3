"""Progress while a task trains: one bar over the tasks, one over the steps of the present task."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_REFRESH_S = 0.1


class ProgressBar(pl.Callback):
    """Bars on a terminal, else one plain line per task; one object serves every task of a run.

    The bars share rich's console with the terminal report, and are removed between tasks, so that other output is not
    disturbed. The loss is read from the device only when the bars are redrawn, at most ten times a second. The
    Lightning module must have `task_index`, `num_tasks`, `num_steps` and `step` (of the present task), and `last_loss`.

    Example:
        >>> import pytorch_lightning as pl
        >>> isinstance(ProgressBar(), pl.Callback)
        True
    """

    brief = False  # whether to print nothing per task, as the run is one of many

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        import rich

        self._console = console or rich.get_console()
        self._bars: Progress | None = None
        self._drawn = self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bars, and reset the second one for the task."""
        self._started = time.monotonic()
        if self.brief or not _can_draw(self._console):
            return
        if self._bars is None:
            self._bars = _make_bars(self._console)
        self._bars.reset(self._bars.task_ids[1], start=True)
        self._draw(pl_module)
        self._bars.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Redraw the bars, at most ten times a second."""
        if self._bars is not None and time.monotonic() - self._drawn >= _REFRESH_S:
            self._draw(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the bars, or print the task's line."""
        if self._bars is not None:
            self._bars.stop()
            return
        if self.brief:
            return
        seconds = time.monotonic() - self._started
        line = f"{_title(pl_module)}: {pl_module.step} steps in {seconds:.1f} s, loss {_loss(pl_module)}"
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the bars before the message of the error is printed."""
        if self._bars is not None:
            self._bars.stop()

    def _draw(self, module: Any) -> None:
        assert self._bars is not None
        tasks, steps = self._bars.task_ids
        share = module.step / max(1, module.num_steps)
        # the share of the present task counts, so that the first bar moves even in a stream of one task
        self._bars.update(tasks, total=module.num_tasks, completed=module.task_index + share, note="")
        self._bars.update(
            steps,
            description=_title(module),
            total=module.num_steps,
            completed=module.step,
            note=f"{module.step}/{module.num_steps}  loss {_loss(module)}",
        )
        self._bars.refresh()
        self._drawn = time.monotonic()


def _can_draw(console: Console) -> bool:
    """Say whether bars can be redrawn in place: on a terminal, and in a notebook with widgets."""
    return console.is_interactive and (not console.is_jupyter or find_spec("ipywidgets") is not None)


def _make_bars(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bars = Progress(*columns, console=console, auto_refresh=False, transient=True)
    bars.add_task("all tasks", note="")
    bars.add_task("", note="")
    return bars


def _title(module: Any) -> str:
    return f"task {module.task_index + 1}/{module.num_tasks}"


def _loss(module: Any) -> str:
    return "-" if module.last_loss is None else f"{float(module.last_loss):.4f}"
