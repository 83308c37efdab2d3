"""The protocol: evaluate row 0; then for each task fit, consolidate, evaluate a row, report, checkpoint."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger

from cl import checkpoint, distributed
from cl.errors import InputError
from cl.instruments import Instrument, Instruments
from cl.instruments.probes import Probes
from cl.instruments.resources import Resources
from cl.learner import Learner
from cl.loader import EvalLoader
from cl.processes import replicated
from cl.report import Report, Run
from cl.task import Stream, Task

TrainerFactory = Callable[..., pl.Trainer]

# Advice that does not apply: data are on the device already, and one Trainer learns one task.
_NOISE = (
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",
    ".*number of training batches.*logging interval.*",
    ".*`training_step` returned `None`.*",
    ".*GPU available but not used.*",
    ".*Starting from v1.9.0, `tensorboardX`.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*total length of `?DataLoader.* is zero.*",
    ".*grad attribute of a Tensor that is not a leaf.*",  # torch.compile, of features that enter the head
    ".*isinstance.treespec, LeafSpec.*",
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says of every Trainer, of which there are two a task."""
    talker = logging.getLogger("pytorch_lightning")
    level = talker.level
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message)
        talker.setLevel(logging.WARNING)
        try:
            yield
        finally:
            talker.setLevel(level)


class Experiment:
    """One learner on one stream, from the untrained row of R to the last.

    Args:
        learner: What learns.
        stream: What is learned; the learner checked it.
        trainer: Builds a Lightning Trainer, called anew for every stage of every task.
        epochs: Passes over a task's training data.
        directory: Where checkpoints go; None keeps nothing.
        reports: Told of every row of R.
        logger: Lightning loggers for the training curves.
        callbacks: Lightning callbacks, the same objects in every task.
        config: Resolved configuration, for reports.
        notes: Sentences that belong beside the numbers.
        columns: The tasks that a row of R is measured on: "all"; "seen", those learned and the next one; or a number k,
            the k newest of these. The first and the last row are measured on all.
        keep: The newest checkpoints that stay; None keeps all.
        instruments: What is measured beside R, by name; what a task costs is measured anyway.
        references: Makes what the run is compared with, after the last row of R; see `cl.references`.
        tuning: How hyper-parameters were chosen, for reports.

    Raises:
        InputError: If columns or keep make no sense.

    Example:
        >>> from functools import partial
        >>> from cl.testing import toy_learner
        >>> learner, stream = toy_learner(num_tasks=2)
        >>> run = Experiment(learner, stream, partial(pl.Trainer, accelerator="cpu"), epochs=1).run()
        >>> run.matrices["class"].R.shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        learner: Learner,
        stream: Stream,
        trainer: TrainerFactory,
        *,
        epochs: int = 1,
        directory: Path | None = None,
        reports: Sequence[Report] = (),
        logger: Sequence[Logger] = (),
        callbacks: Sequence[pl.Callback] = (),
        config: dict[str, Any] | None = None,
        notes: Sequence[str] = (),
        columns: str | int = "all",
        keep: int | None = None,
        instruments: Mapping[str, Instrument] | None = None,
        references: Callable[[Stream], dict[str, list[dict[str, Any]]]] | None = None,
        tuning: Mapping[str, Any] | None = None,
    ) -> None:
        if columns not in ("all", "seen") and not (isinstance(columns, int) and columns > 0):
            raise InputError(f"columns={columns!r} of R are unknown: use all, seen, or the number of newest tasks.")
        if keep is not None and keep < 1:
            raise InputError(f"checkpoint.keep={keep} would leave nothing to go on from: give 1 or more, or null.")
        self.learner, self.stream, self.epochs = learner, stream, epochs
        self._trainer, self._logger, self._callbacks = replicated(trainer), list(logger), list(callbacks)
        self.checkpoints = directory / "checkpoints" if directory is not None else None
        self.reports = list(reports) if distributed.rank() == 0 else []
        self.instruments = Instruments({"resources": Resources(), **(instruments or {})})
        self.resources: Resources = self.instruments["resources"]  # type: ignore[assignment]
        self.resources.watch(self.instruments)
        self.references = references
        probes = [m.matrices for m in self.instruments.values() if isinstance(m, Probes)]
        self.run_view = Run(
            directory=directory or Path(),
            config=config or {},
            task_names=stream.task_names,
            scenario=stream.scenario,
            matrices={k: m for kept in (learner.matrices, *probes) for k, m in kept.items()},  # type: ignore[misc]
            calibration=dict(learner.calibration.items()),  # type: ignore[arg-type]
            instruments=dict(self.instruments.items()),
            tuning=dict(tuning or {}),
            notes=list(notes),
            order=stream.order,
            boundaries=stream.boundaries,
        )
        self.columns, self.keep = columns, keep
        self._all: EvalLoader | None = None

    def run(self) -> Run:
        """Learn the stream, or the rest of it where the directory holds checkpoints.

        Raises:
            InputError: If the stream, or a checkpoint found, does not fit.
            DivergenceError: If a loss is NaN or infinite.
        """
        with _quiet():
            self._start()
            for task in self.stream[self.learner.tasks_learned :]:
                self._fit(task)
                self.evaluate()
                self._save()
            if self.references is not None:
                self.run_view.references = self.references(self.stream)
            for report in self.reports:
                report.finish(self.run_view)
        return self.run_view

    def learn(self, task: Task) -> None:
        """Fit one task and consolidate, with no row measured."""
        with _quiet():
            self._fit(task)

    def _start(self) -> None:
        distributed.align(self.learner)
        folder = self.checkpoints
        found = distributed.from_first(lambda: checkpoint.latest(folder)) if folder is not None else None
        if found is not None:
            checkpoint.load(self.learner, found, self.instruments)
        for report in self.reports:
            report.start(self.run_view, self.learner.tasks_learned if found is not None else -1)
        if found is None:
            self.evaluate()
            self._save()

    def _make_trainer(self, **options: Any) -> pl.Trainer:
        trainer = self._trainer(
            logger=self._logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )
        if trainer.world_size != distributed.world_size():
            raise InputError(
                f"trainer.devices={trainer.num_devices}: the run has {distributed.world_size()} processes, of one "
                "device each; start it by cl-run or cl.processes.run, or set it to 1."
            )
        return trainer

    def _fit(self, task: Task) -> None:
        without = {} if task.val else {"limit_val_batches": 0}
        trainer = self._make_trainer(max_epochs=self.epochs, callbacks=self._callbacks, **without)
        self._take_over(trainer)
        self.learner.trainer = trainer  # tells the epochs, even where Lightning has nothing to fit
        # Lightning hands the module back on the CPU after each stage; hooks run where training does.
        self.learner.to(trainer.strategy.root_device)
        self.resources.begin(self.learner)
        self.learner.before_task(task)
        self.instruments.call("before_task", self.learner, task)
        if self.learner.has_training:
            self.instruments.schedule(self.learner)
            trainer.fit(self.learner)
            if trainer.interrupted:
                raise KeyboardInterrupt
            self.learner.to(trainer.strategy.root_device)
            self.learner.look()
            self.learner.looks = {}
        self.learner.after_task(task)
        distributed.align(self.learner)
        self.instruments.call("after_task", self.learner, task)

    def _take_over(self, trainer: pl.Trainer) -> None:
        """Give the learner what Lightning would count in chunks; refuse what would come before the projections."""
        if trainer.gradient_clip_val is not None:
            raise InputError(
                f"trainer.gradient_clip_val={trainer.gradient_clip_val}: write gradient_clip="
                f"{trainer.gradient_clip_val}, which clips after the strategies have projected."
            )
        self.learner.accumulate, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, 1
        self.learner.limit, trainer.limit_train_batches = trainer.limit_train_batches, 1.0

    def evaluate(self) -> None:
        """Measure the row of R after the tasks learned so far, on every task at once, and report it."""
        with _quiet():
            self._evaluate()
        for report in self.reports:
            report.row(self.run_view, self.learner.tasks_learned)

    def _evaluate(self) -> None:
        trainer = self._make_trainer()
        device = trainer.strategy.root_device
        trainer.test(self.learner, self._tests(device), verbose=False)
        self.learner.to(device)
        self.instruments.call("row", self.learner, self.learner.tasks_learned)

    def _tests(self, device: torch.device) -> EvalLoader:
        """Return the test sets of the columns that the present row is measured on."""
        learned, size = self.learner.tasks_learned, self.learner.eval_batch_size
        if self.columns != "all" and 0 < learned < len(self.stream):
            first = 0 if self.columns == "seen" else max(0, learned + 1 - int(self.columns))
            return EvalLoader([distributed.shard(t.test) for t in self.stream[first : learned + 1]], device, size)
        if self._all is None:
            self._all = EvalLoader([distributed.shard(task.test) for task in self.stream], device, size)
        return self._all

    def _save(self) -> None:
        if self.checkpoints is not None:
            checkpoint.save(self.learner, self.checkpoints, self.keep, self.instruments)
