"""The training curves as one file, `training.csv`, with one row per point; a resumed run has no gaps or duplicates."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from cl.files import append_text, sync, write_text
from cl.report.contract import Report
from cl.report.run import Run
from cl.rundir import TRAINING, TrainingPoint, csv_text


class TrainingReport(Report):
    """Writes `training.csv`: steps over the stream, number of the task, name of the curve, value.

    A run that resumes cuts the file at the step of its checkpoint, because later steps are repeated.

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
        """Start a new file, or cut that of a run that resumes."""
        path = run.directory / TRAINING.name
        raw = path.read_bytes() if after_task >= 0 and path.exists() else b""
        known = run.flushed.get(TRAINING.name)
        if known is not None and _mark(raw[: known["bytes"]]) == known:
            text = raw[: known["bytes"]].decode()
        else:
            if known is not None:
                warnings.warn(f"{path} is torn or changed: what can be read of it is kept.", stacklevel=2)
            text = TRAINING.header + csv_text(_until(raw, run.total_steps))
        write_text(path, text)
        self.logger.begin(path, text)
        self.logger.step, self.logger.task = run.total_steps, after_task + 1

    def flush(self) -> Mapping[str, Any] | None:
        """Sync the file to the disk, and return its length and digest."""
        if self.logger.path is None:
            return None
        sync(self.logger.path)
        return {TRAINING.name: self.logger.mark()}


def _mark(raw: bytes) -> dict[str, Any]:
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def _until(raw: bytes, last: int) -> list[TrainingPoint]:
    """Return the points of a file up to a step, or up to the first line that cannot be read."""
    points: list[TrainingPoint] = []
    for line in raw.decode("utf-8", "replace").splitlines()[1:]:
        try:
            point = TRAINING.parse(line)
        except ValueError:
            break
        if point.step > last:
            break
        points.append(point)
    return points


class TrainingLogger(Logger):
    """The Lightning logger of a `TrainingReport`.

    A point without `train/task`, such as that of a validation, gets the step of the last point with one.

    Example:
        >>> TrainingLogger().log_metrics({"val/loss": 0.5})  # dropped, as no file has been started
    """

    def __init__(self) -> None:
        super().__init__()
        self.path: Path | None = None
        self.step = self.task = self._bytes = 0
        self._digest = hashlib.sha256()

    def begin(self, path: Path, text: str) -> None:
        """Append from now on to a file that holds a text already."""
        self.path, self._bytes, self._digest = path, len(text.encode()), hashlib.sha256(text.encode())

    def mark(self) -> dict[str, Any]:
        """Return the length of the file, and its SHA-256."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    @property
    def name(self) -> str:
        """The name that Lightning asks for."""
        return "training"

    @property
    def version(self) -> str:
        """The version that Lightning asks for: empty."""
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
        text = csv_text(TrainingPoint(self.step, self.task, name, float(value)) for name, value in own.items())
        append_text(self.path, text)
        self._bytes += len(text.encode())
        self._digest.update(text.encode())
