"""The training curves as one file, `training.csv`: a row a point, without a gap or a double row over interruptions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from cl.files import sync, write_text
from cl.report import Report, Run

_HEADER = "step,task,name,value"


class TrainingReport(Report):
    """Keeps `training.csv`: steps over the stream, number of the task, name of the curve, value.

    A run that is continued cuts the file where its checkpoint stands, since the steps behind it come again.

    Example:
        >>> import tempfile
        >>> run = Run(Path(tempfile.mkdtemp()), {}, [], "class", {})
        >>> report = TrainingReport()
        >>> report.start(run, after_task=-1)
        >>> report.logger.log_metrics({"train/loss": 0.5, "train/task": 1}, step=50)
        >>> print((run.directory / "training.csv").read_text(), end="")
        step,task,name,value
        50,1,train/loss,0.5
    """

    def __init__(self) -> None:
        self.logger = TrainingLogger()

    def start(self, run: Run, after_task: int) -> None:
        """Begin the file, or cut it."""
        path = run.directory / "training.csv"
        kept = _until(path, run.total_steps) if after_task >= 0 and path.exists() else []
        write_text(path, "\n".join([_HEADER, *kept]) + "\n")
        self.logger.path, self.logger.step, self.logger.task = path, run.total_steps, after_task + 1

    def settle(self, after_task: int, total_steps: int) -> None:
        """Wait for the disk."""
        if self.logger.path is not None:
            sync(self.logger.path)


def _until(path: Path, last: int) -> list[str]:
    """Return the rows up to a step; those behind one that is torn or changed are left out, and that is said."""
    rows = path.read_bytes().decode("utf-8", "replace").splitlines()[1:]
    kept: list[str] = []
    for row in rows:
        try:
            step, task, _, value = row.split(",")
            point = int(step), int(task), float(value)
        except ValueError:
            warnings.warn(
                f"{path} is torn or changed from line {len(kept) + 2} on: the rest is left out.", stacklevel=3
            )
            break
        if point[0] > last:
            break
        kept.append(row)
    return kept


class TrainingLogger(Logger):
    """The Lightning logger of a `TrainingReport`.

    Points that come without `train/task`, such as a validation, stand at the last step that came with one.

    Example:
        >>> TrainingLogger().log_metrics({"val/loss": 0.5})  # of a run that keeps no files: dropped
    """

    def __init__(self) -> None:
        super().__init__()
        self.path: Path | None = None
        self.step = self.task = 0

    @property
    def name(self) -> str:
        """Of Lightning's."""
        return "training"

    @property
    def version(self) -> str:
        """None that anybody needs."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `config.yaml` has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one point of every curve."""
        if self.path is None:
            return
        if step is not None and "train/task" in metrics:
            self.step, self.task = step, int(metrics["train/task"])
        own = {name: value for name, value in metrics.items() if name not in ("epoch", "train/task")}
        rows = [f"{self.step},{self.task},{name},{float(value)!r}\n" for name, value in own.items()]
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write("".join(rows))
