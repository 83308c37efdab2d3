"""The protocol of a run: measure row 0 of R; then for each task train, consolidate, measure a row, report, checkpoint.

To consolidate is to call `after_task` of the strategies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import Logger

from cl import distributed, rundir
from cl.data import provenance
from cl.data.task import Stream, Task, shard
from cl.engine import checkpoint
from cl.engine.branch import Branch
from cl.engine.described import describe
from cl.engine.finite import check_finite
from cl.engine.instrument import Instrument, Instruments
from cl.engine.learner import Learner
from cl.engine.loader import EvalLoader, evaluation
from cl.engine.preemption import TaskCheckpoints
from cl.engine.preflight import check_watched, preflight
from cl.errors import InputError
from cl.files import gone, remove_leftovers
from cl.metrics.scalar import AnyScalar
from cl.report.config_file import refuse_other, write_config
from cl.report.contract import Report
from cl.report.manifest import write_manifest
from cl.report.result import write_result
from cl.report.run import Run
from cl.report.scalars import checked_scalars
from cl.trainer.arguments import TrainerFactory, check_arguments, quiet
from cl.trainer.processes import replicated

_AMPLE, _FEW = 10 * 2**30, 3  # keep="auto" retains all checkpoints up to so many bytes in all, else only so many


def _check_counts(columns: str | int, keep: int | str | None) -> None:
    if columns not in ("all", "seen") and not (isinstance(columns, int) and columns > 0):
        raise InputError(f"columns={columns!r} of R are unknown: use all, seen, or the number of newest tasks.")
    if not (keep in (None, "auto") or (isinstance(keep, int) and keep >= 1)):
        raise InputError(f"checkpoint.keep={keep} leaves no checkpoint to resume from: give 1 or more, null or auto.")


def _about_stream(stream: Stream) -> dict[str, Any]:
    """Return the fields of a `Run` that describe its stream."""
    return {
        "stream": stream.name,
        "task_names": stream.task_names,
        "scenario": stream.scenario,
        "order": stream.order,
        "boundaries": stream.boundaries,
        "test_rows": tuple(len(task.test) for task in stream),
    }


class Experiment:
    """A run of one learner on one stream, which measures every row of R.

    Args:
        learner: The learner to train.
        stream: The stream that the learner was built for.
        trainer: Builds a Lightning Trainer; called once for each training and each evaluation.
        epochs: Passes over a task's training data.
        directory: The run directory, whose `checkpoints` folder holds the checkpoints; None writes nothing.
        reports: Called after every row of R and at the end.
        logger: Lightning loggers for the training curves.
        callbacks: Lightning callbacks, the same objects in every task; only EarlyStopping starts afresh in each task.
        config: The resolved configuration, for reports. None derives one from the objects, see `cl.engine.described`,
            and writes it to the directory.
        notes: Sentences that reports show beside the numbers; those of the strategies follow them.
        columns: The tasks that a row of R is measured on: "all"; "seen", the learned ones and the next one; or a number
            k, the newest k of these. The first and the last row are measured on all tasks.
        keep: How many checkpoints of ends of tasks to retain, the newest ones. None retains all; "auto" retains all if
            together they take at most ten gibibytes, else the newest three.
        every: Interval between two checkpoints inside a task: steps, a time such as "10min", or None for none; see
            `cl.engine.preemption`.
        instruments: The measurements beside R, by name; see `cl.measure.choose`.
        scalars: The user's own scalars, made by `cl.scalar`, which reports show beside the built-in ones.
        references: Trains or loads the references of the run, after the last row of R; see `cl.measure.references`.
        tuning: How hyper-parameters were chosen, for reports.
        branch: The checkpoint of another run to start from; None starts from the untrained learner.
        allow_changed: Whether to resume although the data or the user's code have changed; see `cl.data.provenance`.

    Raises:
        InputError: If an argument is out of range, the schedule or a batch size cannot work, a callback watches what is
            not measured, or the branch is of another stream or network.

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
        keep: int | Literal["auto"] | None = "auto",
        every: int | str | None = None,
        instruments: Mapping[str, Instrument] | None = None,
        scalars: Sequence[AnyScalar] = (),
        references: Callable[[Stream], dict[str, list[dict[str, Any]]]] | None = None,
        tuning: Mapping[str, Any] | None = None,
        branch: Branch | None = None,
        allow_changed: bool = False,
    ) -> None:
        check_arguments(trainer)
        _check_counts(columns, keep)
        self.learner, self.stream = learner, stream
        self._described = config is None and directory is not None
        if config is None:
            config = describe(learner, stream, epochs)
        learner.more_epochs = learner.strategies.more_epochs(epochs) if epochs else 0
        self.epochs = epochs + learner.more_epochs
        remarks = preflight(learner, stream, epochs, getattr(trainer, "keywords", {}))
        check_watched(callbacks, stream)
        self._trainer, self._logger, self._callbacks = replicated(trainer), list(logger), list(callbacks)
        self.checkpoints = directory / rundir.CHECKPOINTS if directory is not None else None
        self.task_checkpoints = TaskCheckpoints(every, self._save_inside)
        self.reports = list(reports) if distributed.rank() == 0 else []
        self.instruments = Instruments(instruments or {})
        self.references, self.branch = references, branch
        if branch is not None and (self.checkpoints is None or checkpoint.latest(self.checkpoints) is None):
            branch.check(config, len(stream))
        self.run_view = Run(
            directory=directory or Path(),
            config=config,
            matrices=self.instruments.setup(learner, stream),
            calibration=dict(learner.calibration.items()),  # type: ignore[arg-type]
            instruments=dict(self.instruments.items()),
            own_scalars=checked_scalars(scalars),
            tuning=dict(tuning or {}),
            notes=[*notes, *remarks, *learner.strategies.remarks(learner)],
            bound=learner.strategies.bound,
            learner=learner,
            **_about_stream(stream),
        )
        self.columns, self.allow_changed = columns, allow_changed
        self._wanted, self.keep = keep, None if keep == "auto" else keep
        self._config = checkpoint.config_text(config, directory or Path())
        self._all: EvalLoader | None = None
        self._begun = False  # whether this session has written a checkpoint
        self._inside: Path | None = None  # the checkpoint inside the next task to resume from

    def run(self) -> Run:
        """Learn the stream; if the directory holds checkpoints, resume from the newest intact one.

        Returns:
            What the run has measured.

        Raises:
            InputError: If the checkpoint, data or code in the directory do not fit this run.
            DivergenceError: If a loss or a weight becomes NaN or infinite.
            Preempted: If a signal stops the run. A task in training is saved before.
        """
        with quiet(), self.task_checkpoints.signals() if self.checkpoints is not None else nullcontext():
            self._start()
            for task in self.stream[self.learner.tasks_learned :]:
                self._fit(task)
                self.evaluate()
                self._save()
            if self.references is not None:
                self.run_view.references = self.references(self.stream)
            for report in self.reports:
                report.finish(self.run_view)
            if self.checkpoints is not None and distributed.rank() == 0:
                write_result(self.run_view)
        return self.run_view

    def learn(self, task: Task) -> None:
        """Train one task and consolidate it, without measuring a row of R."""
        with quiet():
            self._fit(task)

    def _start(self) -> None:
        """Resume the run of the directory, or start from the branch, or measure the untrained learner."""
        distributed.align(self.learner)
        found = distributed.from_first(self._find)
        if self.checkpoints is not None:
            self.run_view.notes += distributed.from_first(lambda: self._check_provenance(found))
        if found is not None:
            self._estimate_size(found)
            checkpoint.load(self.learner, found, self.instruments, self._config)
            self._inside = distributed.from_first(lambda: self._find_inside(found))
            self.run_view.flushed = checkpoint.report_positions(self._inside or found)
        if self.branch is not None:
            self.run_view.notes += self.branch.notes(self.learner)
            if found is None:
                self.branch.load(self.learner, self.instruments)
        begun = found is not None or self.branch is not None
        after_task = self.learner.tasks_learned if begun else -1
        self.run_view.device = self._device()
        self.run_view.total_steps = self.learner.total_steps + checkpoint.steps(self._inside)
        if self.checkpoints is not None and distributed.rank() == 0:
            write_manifest(self.run_view, after_task)
        for report in self.reports:
            report.start(self.run_view, after_task)
        if not begun:
            self.evaluate()
        if found is None:
            self._save()

    def _check_provenance(self, found: Path | None) -> list[str]:
        """Refuse data or code that differ from those of the run so far; return notes on allowed changes."""
        assert self.checkpoints is not None
        begun = found is not None
        directory = self.checkpoints.parent
        if self._described:
            refuse_other(self.run_view.config, directory)
        provenance.stored(directory)
        before = provenance.stored(self.branch.directory) if self.branch is not None and not begun else None
        objects = [
            *self.learner.strategies.values(),
            self.learner.backbone,
            self.learner.head,
            *self.instruments.values(),
        ]
        starts = {"from": self.branch.checkpoint} if self.branch is not None else {}
        made_from = provenance.provenance(self.stream, self.run_view.config, objects, starts)
        changed = provenance.changes(before, made_from, code=False) if before is not None else []
        if changed and not self.allow_changed:
            raise InputError(
                f"from={self.branch.directory} learned other data ({provenance.listed(changed)}): restore the data, "  # type: ignore[union-attr]
                "or set allow_changed=true, which adds a note to the results."
            )
        notes = [f"Data changed since the run it begins from: {provenance.listed(changed)}."] * bool(changed)
        notes += checkpoint.rounding(found, self._config) if found is not None else []
        if version := rundir.earlier_version(directory):
            notes.append(f"Begun by {version}.")
        history = provenance.check_and_store(directory, made_from, self.allow_changed, begun, notes)
        if self._described:
            write_config(self.run_view.config, directory)
        for folder in (directory, self.checkpoints):  # only now: a run that is refused stays as it is
            remove_leftovers(folder)
        return history

    def _find(self) -> Path | None:
        """Return the newest intact checkpoint of the end of a task, if the directory holds one."""
        if self.checkpoints is None:
            return None
        return checkpoint.latest(self.checkpoints)

    def _find_inside(self, found: Path) -> Path | None:
        inside = checkpoint.inside(found.parent, self.learner.tasks_learned)
        checkpoint.tidy(found.parent, self.learner.tasks_learned, self.keep, inside)
        return inside

    def _build_trainer(self, **options: Any) -> pl.Trainer:
        trainer = self._trainer(
            logger=self._logger,
            enable_checkpointing="callbacks" in options,  # for TaskCheckpoints; Lightning adds no callback of its own
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )
        if trainer.world_size != distributed.world_size():
            raise InputError(
                f"trainer.devices={trainer.num_devices}: the run has {distributed.world_size()} processes, of one "
                "device each; start it by cl-run or cl.trainer.processes.run, or set it to 1."
            )
        return trainer

    def _device(self) -> str:
        """Return the type of the training device, with the number of processes if there are several: "cuda × 4"."""
        processes = distributed.world_size()
        return self._build_trainer().strategy.root_device.type + (f" × {processes}" if processes > 1 else "")

    def _fit(self, task: Task) -> None:
        without = {} if task.val else {"limit_val_batches": 0}
        # a copy for each task: the patience that one task has used up must not stop the next one
        callbacks = [deepcopy(part) if isinstance(part, EarlyStopping) else part for part in self._callbacks]
        trainer = self._build_trainer(max_epochs=self.epochs, callbacks=[*callbacks, self.task_checkpoints], **without)
        self._take_over(trainer)
        self.learner.trainer = trainer  # the learner reads the number of epochs from it, also if nothing is trained
        # Lightning moves the module to the CPU after each stage; hooks run on the training device.
        self.learner.to(trainer.strategy.root_device)
        self.instruments.call("begin", self.learner)
        self.learner.before_task(task)
        self.instruments.call("before_task", self.learner, task)
        inside = self._load_inside()
        if self.learner.has_training:
            self.instruments.schedule(self.learner)
            self.task_checkpoints.begin(trainer, self.learner, inside)
            if self.learner.step < self.learner.num_steps and not inside.get("stopped"):
                with self.instruments.around_steps(self.learner):
                    trainer.fit(self.learner)
            if trainer.interrupted:
                raise KeyboardInterrupt
            self.learner.to(trainer.strategy.root_device)
            check_finite(self.learner)
            self.task_checkpoints.trained(trainer, self.learner)
            self.learner.look()
            self.learner.looks = {}
        self.learner.after_task(task)
        distributed.align(self.learner)
        self.instruments.call("after_task", self.learner, task)

    def _take_over(self, trainer: pl.Trainer) -> None:
        """Move to the learner the options that Lightning would apply to chunks instead of minibatches."""
        self.learner.accumulate, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, 1
        self.learner.limit, trainer.limit_train_batches = trainer.limit_train_batches, 1.0

    def evaluate(self) -> None:
        """Measure the row of R after the tasks learned so far, and call the reports."""
        with quiet():
            self._evaluate()
        for report in self.reports:
            report.row(self.run_view, self.learner.tasks_learned)

    def _evaluate(self) -> None:
        trainer = self._build_trainer()
        device = trainer.strategy.root_device
        trainer.test(self.learner, self._tests(device), verbose=False)
        self.learner.to(device)
        self.instruments.call("row", self.learner, self.learner.tasks_learned)

    def _tests(self, device: torch.device) -> EvalLoader:
        """Return the test sets of the tasks that the present row is measured on."""
        learned = self.learner.tasks_learned
        if self.columns != "all" and 0 < learned < len(self.stream):
            first = 0 if self.columns == "seen" else max(0, learned + 1 - int(self.columns))
            some = self.stream[first : learned + 1]
            return evaluation(self.learner, [shard(task.test) for task in some], device)
        if self._all is None:
            self._all = evaluation(self.learner, [shard(task.test) for task in self.stream], device)
        return self._all

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.checkpoints is not None:
            self._check_directory(self.checkpoints.parent)
            path = checkpoint.save(self.learner, self.checkpoints, self.keep, self.instruments, self._beside())
            if self.learner.tasks_learned == 0:
                self._report_size(self._estimate_size(path))

    def _estimate_size(self, path: Path) -> int:
        """Return the bytes of the checkpoints of all tasks, from the size of one; choose `keep` if it is "auto"."""
        total: int = distributed.from_first(lambda: path.stat().st_size) * (len(self.stream) + 1)
        if self._wanted == "auto" and total > _AMPLE:
            self.keep = _FEW
        return total

    def _report_size(self, total: int) -> None:
        if total <= _AMPLE:
            return
        some = "all are kept" if self.keep is None else f"the {self.keep} newest are kept"
        for report in self.reports:
            report.say(
                f"A checkpoint takes {total / (len(self.stream) + 1) / 1e6:.0f} MB, and one after each of "
                f"{len(self.stream)} tasks {total / 1e9:.0f} GB: {some}. checkpoint.keep says how many; null keeps "
                "all, for from=DIR:task=k."
            )

    def _check_directory(self, directory: Path) -> None:
        """Refuse to create the directory again if it was renamed or removed during the run."""
        if self._begun and distributed.rank() == 0 and not directory.is_dir():
            raise gone(directory)
        self._begun = True

    def _save_inside(self, state: dict[str, Any]) -> None:
        if self.checkpoints is not None:
            self._check_directory(self.checkpoints.parent)
            checkpoint.save_inside(self.learner, self.checkpoints, state, self.instruments, self._beside())

    def _beside(self) -> dict[str, Any]:
        """Flush the reports' files to the disk, and return the entries that a checkpoint holds beside the state."""
        reports = {name: how for report in self.reports for name, how in (report.flush() or {}).items()}
        return {"config": self._config, "reports": reports}

    def _load_inside(self) -> dict[str, Any]:
        """Load the checkpoint inside the task that has just begun, if there is one, and return its training state."""
        found, self._inside = self._inside, None
        if found is None:
            return {}
        state = checkpoint.load(self.learner, found, self.instruments, self._config)
        self.learner.step = state["step"]
        return state
