"""The references of a run: an expert on each task alone, and a joint learner of the tasks so far.

Both start from the run's initial weights, with its optimizer, schedule and epochs, and no strategy. A reference is
trained when a run first needs it, and stored in a file named by a digest of everything that determines it: the
configuration without strategy and reports, the initial weights, the data, and the versions of clsim and torch. So ten
strategies on one seed train each reference once, even if they run at the same time.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from cl.data.provenance import digest as digest_of
from cl.data.task import Stream, Task, TaskData
from cl.distributed import from_first, rank
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import DivergenceError, InputError, unknown
from cl.files import read_sealed, remove_leftovers, write_sealed
from cl.report.contract import Report
from cl.settings import flatten, results

if TYPE_CHECKING:
    from cl.engine.experiment import Experiment
    from cl.engine.learner import Learner

KINDS = ("experts", "joint")
_WITHOUT = "method", "start"  # parts of the settings left out: references have no method; weights are digested
Reference = dict[str, Any]


class Union(Strategy):
    """Joint training: trains on the examples of all tasks of a stream in its first task."""

    targets = ("label", "multilabel", "regression")

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Store views of the examples of all tasks."""
        self._parts = [task.train for task in stream]

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Return the examples of all tasks."""
        return TaskData.concat(self._parts)


class References:
    """Trains the references of a run, or reads them from their files.

    Args:
        kinds: Of `experts` and `joint`.
        make: Builds an experiment without reports from a stream and strategies.
        folder: The directory of the references, one file each, which all runs share.
        config: The resolved configuration of the run.
        reports: Told in a message before each reference is trained, and if it diverges.

    Raises:
        InputError: If a kind is unknown.

    Example:
        >>> References(["experts"], lambda stream, strategies: None, Path("references"), {}).kinds
        ('experts',)
    """

    def __init__(
        self,
        kinds: Sequence[str],
        make: Callable[[Stream, dict[str, Strategy]], Experiment],
        folder: Path,
        config: dict[str, Any],
        reports: Sequence[Report] = (),
    ) -> None:
        others = [kind for kind in kinds if kind not in KINDS]
        if others:
            raise unknown("reference", others[0], KINDS)
        self.kinds = tuple(dict.fromkeys(kinds))
        self._make, self._folder, self._reports = make, folder, reports
        flat = flatten(config)
        curves = {key: flat.get(f"report.{key}") for key in ("every", "points", "subset")}
        flat.pop("stream.order", None)  # the digest of the data covers it
        self._config = {**results(flat, _WITHOUT), **curves}

    def _say(self, text: str) -> None:
        for report in self._reports:
            report.say(text)

    def measure(self, stream: Stream) -> dict[str, list[Reference]]:
        """Return, by kind, a reference for each task: its metric on it, steps, seconds and, for experts, the curve."""
        train = {"experts": self._expert, "joint": self._joint}
        return {kind: [train[kind](stream, t) for t in range(len(stream))] for kind in self.kinds}

    def _expert(self, stream: Stream, t: int) -> Reference:
        # without blended-in examples; a reference sees the labels that a task hides from strategies
        task = stream[t].each(lambda part: replace(part.of_tasks([t]), task=0), index=0, hidden=False)
        alone = stream.derive([task].__getitem__, num_tasks=1)
        return self._find("expert", t, alone, {}, [task], len(stream))

    def _joint(self, stream: Stream, t: int) -> Reference:
        known = range(t + 1)  # if tasks blend, earlier tasks hold examples of later ones, which are left out
        tasks = [task.each(lambda part: part.of_tasks(known), hidden=False) for task in stream[: t + 1]]
        together = stream.derive(tasks.__getitem__, num_tasks=t + 1)
        return self._find("joint", t, together, {"union": Union()}, tasks, len(stream))

    def _find(
        self, kind: str, t: int, stream: Stream, strategies: dict[str, Strategy], tasks: list[Task], total: int
    ) -> Reference:
        """Return a reference from its file, or train it under a lock, so that no other process trains it too."""
        from filelock import FileLock

        experiment = self._make(stream, strategies)
        file = self._folder / f"{kind}_{self._digest(kind, experiment, tasks)}.json"
        from_first(self._make_folder)
        with FileLock(file.with_suffix(".lock")) if rank() == 0 else nullcontext():  # process 0 locks for all
            what = f"{kind} of task {t + 1}" if kind == "expert" else f"joint of tasks 1 to {t + 1}"
            found = from_first(lambda: self._read(file))
            if found is None:
                self._say(f"reference {what} of {total} ...")
                try:
                    found = _train(experiment)
                    if rank() == 0:
                        write_sealed(file, found)
                except DivergenceError as error:  # the reference is unmeasured; the run itself goes on
                    self._say(f"reference {what} diverged and is left out: {error}")
                    return {"task": t + 1, "value": math.nan, "row": [], "curve": [], "reason": str(error)}
            found = from_first(lambda: found)
        return {"task": t + 1, **(found or {})}

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"reference_dir={self._folder} cannot be made ({error.strerror}): name another."
            ) from error

    def _read(self, file: Path) -> Reference | None:
        """Return a reference from its file; None if the file is missing or damaged."""
        remove_leftovers(self._folder, file.name)
        return read_sealed(file)

    def _digest(self, kind: str, experiment: Experiment, tasks: Sequence[Task]) -> str:
        digest = hashlib.blake2b(digest_size=10)
        versions = version("clsim"), torch.__version__
        digest.update(json.dumps([kind, versions, self._config], sort_keys=True, default=str).encode())
        for name, value in experiment.learner.trunk().state_dict().items():
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        seen: dict[Any, str] = {}
        for task in tasks:
            for part in (task.train, task.val, task.test):
                digest.update("".join(digest_of(part, seen) if part is not None else ()).encode())
        return digest.hexdigest()


def reference_experiment(
    learner: Learner,
    stream: Stream,
    trainer: Callable[..., pl.Trainer],
    epochs: int,
    *,
    every: int | None = None,
    points: int | None = None,
    subset: int = 1000,
) -> Experiment:
    """Return the experiment that trains one reference, without reports; that of an expert measures a learning curve.

    Args:
        learner: A new learner for the stream.
        stream: One task (for an expert), or all tasks so far (for a joint learner).
        trainer: Builds the Trainer of each task.
        epochs: Passes over the training data.
        every: Steps between two points of the curve; give this or `points`.
        points: The number of points of the curve; ten if neither is given.
        subset: The most test examples to measure a point on.

    Example:
        >>> from cl.testing import toy_learner
        >>> learner, stream = toy_learner({}, 1)
        >>> list(reference_experiment(learner, stream, pl.Trainer, epochs=1).instruments)
        ['curves']
    """
    from cl.engine.experiment import Experiment
    from cl.measure.learning_curves import LearningCurves

    points = 10 if every is None and points is None else points
    curves = {"curves": LearningCurves(stream, every, points, subset)} if len(stream) == 1 else {}
    return Experiment(learner, stream, trainer, epochs=epochs, instruments=curves)


def _train(experiment: Experiment) -> Reference:
    """Learn the first task of an experiment's stream, evaluate all tasks before and after it, and return the reference.

    The metric of the reference is that on the last task of the stream.
    """
    from cl.measure.learning_curves import LearningCurves

    began = time.perf_counter()
    experiment.evaluate()
    experiment.learn(experiment.stream[0])
    experiment.evaluate()
    matrix = experiment.run_view.primary
    row = [value if value == value else None for value in matrix.R[1].tolist()]
    found: Reference = {"value": row[-1], "row": row, "untrained": matrix.R[0].tolist()[-1]}
    curve = next((m for m in experiment.instruments.values() if isinstance(m, LearningCurves)), None)
    if curve is not None:
        steps = [step for _, step, _ in curve.at]
        found["curve"] = [list(point) for point in zip(steps, curve.values()[:, 0].tolist(), strict=True)]
    return {**found, "steps": experiment.learner.total_steps, "seconds": time.perf_counter() - began}
