"""The protocol: evaluate row 0; then for each task fit, consolidate, evaluate a row, report, checkpoint."""

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
from cl.report.scalars import checked
from cl.trainer.arguments import TrainerFactory, check_arguments, quiet
from cl.trainer.processes import replicated

_AMPLE, _FEW = 10 * 2**30, 3  # bytes of all checkpoints up to which all are kept; how many are beyond


def _check_counts(columns: str | int, keep: int | str | None) -> None:
    if columns not in ("all", "seen") and not (isinstance(columns, int) and columns > 0):
        raise InputError(f"columns={columns!r} of R are unknown: use all, seen, or the number of newest tasks.")
    if not (keep in (None, "auto") or (isinstance(keep, int) and keep >= 1)):
        raise InputError(f"checkpoint.keep={keep} would leave nothing to go on from: give 1 or more, null or auto.")


def _what_is_learned(stream: Stream) -> dict[str, Any]:
    """Return what reports are told of a stream."""
    return {
        "stream": stream.name,
        "task_names": stream.task_names,
        "scenario": stream.scenario,
        "order": stream.order,
        "boundaries": stream.boundaries,
        "test_rows": tuple(len(task.test) for task in stream),
    }


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
        callbacks: Lightning callbacks, the same objects in every task; but EarlyStopping begins each one anew.
        config: Resolved configuration, for reports; None reads one off the objects, see `cl.engine.described`, and
            keeps it in the directory.
        notes: Sentences that belong beside the numbers; those of the strategies come behind them.
        columns: The tasks that a row of R is measured on: "all"; "seen", those learned and the next one; or a number k,
            the k newest of these. The first and the last row are measured on all.
        keep: The newest checkpoints of ends of tasks that stay; None keeps all; "auto" does, too, but where all would
            take more than ten gibibytes the three newest.
        every: Between two checkpoints inside a task: steps, a time such as "10min", or None, see
            `cl.engine.preemption`.
        instruments: What is measured beside R, by name; see `cl.measure.choose`.
        scalars: Of the user's own, under `cl.scalar`, that reports have beside the built-in ones.
        references: Makes what the run is compared with, after the last row of R; see `cl.measure.references`.
        tuning: How hyper-parameters were chosen, for reports.
        branch: Where the run begins, if not with an untrained learner.
        allow_changed: Whether a run goes on although its data or the user's code have changed, see
            `cl.data.provenance`.

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
        self.learner, self.stream, self.epochs = learner, stream, epochs
        self._described = config is None and directory is not None
        if config is None:
            config = describe(learner, stream, epochs)
        told = preflight(learner, stream, epochs, getattr(trainer, "keywords", {}))
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
            own_scalars=checked(scalars),
            tuning=dict(tuning or {}),
            notes=[*notes, *told, *learner.strategies.remarks(learner)],
            bound=learner.strategies.bound,
            learner=learner,
            **_what_is_learned(stream),
        )
        self.columns, self.allow_changed = columns, allow_changed
        self._wanted, self.keep = keep, None if keep == "auto" else keep
        self._config = checkpoint.config_text(config, directory or Path())
        self._all: EvalLoader | None = None
        self._begun = False  # whether the directory has a checkpoint of this sitting
        self._inside: Path | None = None  # the checkpoint inside the task that comes next

    def run(self) -> Run:
        """Learn the stream, or the rest of it where the directory holds checkpoints.

        Raises:
            InputError: If the stream, or a checkpoint found, does not fit.
            DivergenceError: If a loss is NaN or infinite.
            Preempted: If a signal stops the run; a task in training is saved before.
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
        """Fit one task and consolidate, with no row measured."""
        with quiet():
            self._fit(task)

    def _start(self) -> None:
        """Take up the run of the directory, or a branch of another, or measure the untrained learner."""
        distributed.align(self.learner)
        found = distributed.from_first(self._find)
        if self.checkpoints is not None:
            self.run_view.notes += distributed.from_first(lambda: self._check_provenance(found))
        if found is not None:
            self._foresee(found)
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
        """Refuse other data or code than those of before; return sentences on what has changed otherwise."""
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
                f"from={self.branch.directory} learned other data ({provenance.listed(changed)}): bring back what was "  # type: ignore[union-attr]
                "there, or say allow_changed=true, which is told beside the numbers."
            )
        told = [f"Data changed since the run it begins from: {provenance.listed(changed)}."] * bool(changed)
        told += checkpoint.rounding(found, self._config) if found is not None else []
        if version := rundir.earlier_version(directory):
            told.append(f"Begun by {version}.")
        history = provenance.check_and_store(directory, made_from, self.allow_changed, begun, told)
        if self._described:
            write_config(self.run_view.config, directory)
        for place in (directory, self.checkpoints):  # only now: a run that is refused stays as it is
            remove_leftovers(place)
        return history

    def _find(self) -> Path | None:
        """Return the newest whole checkpoint of the end of a task, if the directory holds one."""
        if self.checkpoints is None:
            return None
        return checkpoint.latest(self.checkpoints)

    def _find_inside(self, found: Path) -> Path | None:
        inside = checkpoint.inside(found.parent, self.learner.tasks_learned)
        checkpoint.tidy(found.parent, self.learner.tasks_learned, self.keep, inside)
        return inside

    def _make_trainer(self, **options: Any) -> pl.Trainer:
        trainer = self._trainer(
            logger=self._logger,
            enable_checkpointing="callbacks" in options,  # ours alone
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
        """Return what is trained on, with the number of processes where they are several."""
        processes = distributed.world_size()
        return self._make_trainer().strategy.root_device.type + (f" × {processes}" if processes > 1 else "")

    def _fit(self, task: Task) -> None:
        without = {} if task.val else {"limit_val_batches": 0}
        # what one task has had no gain from says nothing of the next
        callbacks = [deepcopy(part) if isinstance(part, EarlyStopping) else part for part in self._callbacks]
        trainer = self._make_trainer(max_epochs=self.epochs, callbacks=[*callbacks, self.task_checkpoints], **without)
        self._take_over(trainer)
        self.learner.trainer = trainer  # tells the epochs, even where Lightning has nothing to fit
        # Lightning hands the module back on the CPU after each stage; hooks run where training does.
        self.learner.to(trainer.strategy.root_device)
        self.instruments.call("begin", self.learner)
        self.learner.before_task(task)
        self.instruments.call("before_task", self.learner, task)
        inside = self._load_inside()
        if self.learner.has_training:
            self.instruments.schedule(self.learner)
            self.task_checkpoints.begin(trainer, self.learner, inside)
            if self.learner.step < self.learner.num_steps and not inside.get("stopped"):
                with self.instruments.after_steps(self.learner):
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
        """Give the learner what Lightning would count in chunks."""
        self.learner.accumulate, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, 1
        self.learner.limit, trainer.limit_train_batches = trainer.limit_train_batches, 1.0

    def evaluate(self) -> None:
        """Measure the row of R after the tasks learned so far, on every task at once, and report it."""
        with quiet():
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
            self._check_place(self.checkpoints.parent)
            path = checkpoint.save(self.learner, self.checkpoints, self.keep, self.instruments, self._beside())
            if self.learner.tasks_learned == 0:
                self._tell_size(self._foresee(path))

    def _foresee(self, path: Path) -> int:
        """Return the bytes of all checkpoints, from the size of one; from now on few are kept where that is much."""
        total: int = distributed.from_first(lambda: path.stat().st_size) * (len(self.stream) + 1)
        if self._wanted == "auto" and total > _AMPLE:
            self.keep = _FEW
        return total

    def _tell_size(self, total: int) -> None:
        if total <= _AMPLE:
            return
        some = "all are kept" if self.keep is None else f"the {self.keep} newest are kept"
        for report in self.reports:
            report.say(
                f"A checkpoint takes {total / (len(self.stream) + 1) / 1e6:.0f} MB, and one after each of "
                f"{len(self.stream)} tasks {total / 1e9:.0f} GB: {some}. checkpoint.keep says how many; null keeps "
                "all, for from=DIR:task=k."
            )

    def _check_place(self, directory: Path) -> None:
        """Refuse to begin another directory where that of the run was renamed."""
        if self._begun and distributed.rank() == 0 and not directory.is_dir():
            raise gone(directory)
        self._begun = True

    def _save_inside(self, state: dict[str, Any]) -> None:
        if self.checkpoints is not None:
            self._check_place(self.checkpoints.parent)
            checkpoint.save_inside(self.learner, self.checkpoints, state, self.instruments, self._beside())

    def _beside(self) -> dict[str, Any]:
        """See to it that what a checkpoint rests on is on the disk before it; return what tells that later."""
        reports = {name: how for report in self.reports for name, how in (report.flush() or {}).items()}
        return {"config": self._config, "reports": reports}

    def _load_inside(self) -> dict[str, Any]:
        """Go on inside the task that has just begun, if the directory says so; return what its training needs."""
        found, self._inside = self._inside, None
        if found is None:
            return {}
        state = checkpoint.load(self.learner, found, self.instruments, self._config)
        self.learner.step = state["step"]
        return state
