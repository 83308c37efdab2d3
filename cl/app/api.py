"""`cl.run` and `cl.load`: one whole run from Python, and a run directory read back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from annotated_types import Ge, Gt
from pytorch_lightning.loggers import Logger
from torch import nn

from cl import rundir
from cl.app.annotations import check_call
from cl.backbones.networks import MLP
from cl.data.task import Scenario, Stream
from cl.engine.described import describe, described_by_name
from cl.engine.experiment import Experiment
from cl.engine.head import Head
from cl.engine.instrument import Instrument
from cl.engine.learner import Learner
from cl.engine.network import BackboneFactory, HeadFactory
from cl.engine.preflight import check_optimizer
from cl.engine.schedules import SchedulerFactory
from cl.engine.strategy import OptimizerFactory, Strategy
from cl.errors import InputError
from cl.files import alone, expand_path
from cl.measure.choose import chosen
from cl.measure.references import Reference, References, reference_experiment
from cl.metrics.scalar import AnyScalar
from cl.metrics.transfer import TransferMatrix
from cl.ranges import checked, option_name
from cl.report.config_file import read_config, refuse_other, write_config
from cl.report.contract import Report
from cl.report.run import Run
from cl.report.scalars import recall
from cl.trainer.arguments import check_arguments, interruptible, quiet_trainer

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.0, weight_decay=0.0)
_TRAINER = {"accelerator": "auto", "devices": 1, "precision": "32-true", "deterministic": False}

Strategies = Strategy | Sequence[Strategy] | Mapping[str, Strategy]


@checked
def run(
    stream: Stream,
    strategies: Strategies,
    backbone: nn.Module | BackboneFactory | None = None,
    *,
    epochs: Annotated[int, Ge(0)] = 5,
    batch_size: Annotated[int, Ge(1)] = 10,
    optimizer: OptimizerFactory = SGD,
    scheduler: SchedulerFactory | None = None,
    head: nn.Module | HeadFactory | None = None,
    seed: Annotated[int, Ge(0)] = 0,
    directory: str | Path | None = None,
    gradient_clip: Annotated[float, Gt(0)] | None = None,
    train_mask: Scenario | None = None,
    optimizer_state: Literal["reset", "keep"] = "reset",
    scheduler_interval: Literal["epoch", "step"] = "epoch",
    eval_batch_size: Annotated[int, Ge(1)] | None = None,
    chunk_size: Annotated[int, Ge(1)] | None = None,
    log_every: Annotated[int, Ge(1)] = 50,
    compile: str | None = None,
    trainer: Mapping[str, Any] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    reports: Sequence[Report] = (),
    progress: bool = True,
    columns: str | int = "all",
    probes: Sequence[str] = (),
    estimators: Sequence[str] = (),
    references: Sequence[str] = (),
    reference_dir: str | Path = "runs/references",
    every: Annotated[int, Ge(1)] | None = None,
    points: Annotated[int, Ge(1)] | None = None,
    subset: Annotated[int, Ge(1)] = 1000,
    flops: bool = False,
    instruments: Mapping[str, Instrument] | None = None,
    scalars: Sequence[AnyScalar] = (),
    checkpoint_keep: int | Literal["auto"] | None = "auto",
    checkpoint_every: int | str | None = "10min",
    allow_changed: bool = False,
) -> Run:
    """Learn a stream under some strategies, measure the transfer matrix R, and return the run.

    The defaults are those of `cl-run`, and the same settings give the same bits of R and of the weights. What is passed
    is copied where it would be changed, so that the same objects can be passed to the next run.

    Args:
        stream: What is learned, such as `cl.streams.split(digits())`; its own draws depend on its own seed.
        strategies: One strategy; several in a list, under the names of their files or else of their classes; or several
            by name. An empty list is fine-tuning.
        backbone: What maps inputs (B, *input) to features (B, num_features): a function of the shape of an input that
            makes it, such as `cl.backbones.ResNet18` or `partial(MLP, hidden=[50])`, whose weights the seed then
            draws; or a module, which keeps its weights. None is an MLP with two hidden layers of 100.
        epochs: Passes over the training data of each task.
        batch_size: Rows of the stream in a step.
        optimizer: Parameters to optimizer, called anew for each task, such as `partial(torch.optim.Adam, lr=1e-3)`; the
            configuration tells the arguments of a `partial`, and of another function its name alone.
        scheduler: Optimizer to learning-rate schedule; None keeps the rate.
        head: What maps features to logits (B, C), or what makes it from the numbers of features and of classes; None
            is one linear layer.
        seed: Of the initial weights and of every draw in training.
        directory: Where checkpoints and all files of a run go. A run begun there with the same settings goes on; None
            writes nothing.
        gradient_clip: Largest norm of the gradient.
        train_mask: Classes that compete in the loss: "class" (all seen), "task" (those of the task), "domain" (all);
            None means as at test.
        optimizer_state: At a boundary between tasks an optimizer begins anew ("reset") or goes on ("keep").
        scheduler_interval: Whether the schedule moves after each "epoch" or each optimizer "step".
        eval_batch_size: Rows of an evaluation batch; None is 256 on a CPU and 1024 elsewhere.
        chunk_size: Steps that Lightning sees as one; results do not depend on it.
        log_every: Steps between two points of the training curves.
        compile: Mode of torch.compile for backbone and head: "default", "reduce-overhead" or "max-autotune".
        trainer: Options of Lightning's Trainer, such as `{"accelerator": "gpu", "precision": "bf16-mixed"}`.
        callbacks: Lightning callbacks.
        reports: Told of every row of R, beside those that write the files of a directory.
        progress: Whether bars, or a line for each task where there is no terminal, say how far the run is.
        columns: The tasks that a row of R is measured on: "all", "seen" (and the next one), or how many of the newest.
        probes: Fitted anew on the frozen features after each task: "ridge", "knn", "cka".
        estimators: Forecasts of transfer before each task: "tmi", "log_me", "ped", "vci", "knn", "covariance".
        references: What the run is compared with: "experts" (a learner of each task alone) and "joint" (one of tasks 1
            to k, for each k), without a strategy.
        reference_dir: Where references are stored and found again by all runs, also when `directory` is None.
        every: Steps between two evaluations inside a task; or
        points: how many evaluations a task has.
        subset: Rows of each task that those, the probes and the estimators look at.
        flops: Whether operations are counted.
        instruments: Of your own, by name, to measure more beside R.
        scalars: Of your own, functions under `cl.scalar`; `.measured()` of the run has their numbers.
        checkpoint_keep: How many of the newest checkpoints at the ends of tasks stay; None keeps all; "auto" does, too,
            up to ten gibibytes.
        checkpoint_every: Between two checkpoints inside a task: steps (500), a time ("30s", "10min", "2h") or None.
        allow_changed: Whether a run goes on although its data or the user's code have changed.

    Returns:
        The run: `.R` by mask, `.scalars()`, `.plot()`, `.to_frame()`, `.save(directory)`, and `.learner`.

    Raises:
        InputError: If something cannot work, before anything is written; the sentence says what to change.
        DivergenceError: If a loss is NaN or infinite.

    Example:
        >>> import cl
        >>> from cl.testing import toy_stream
        >>> cpu = {"accelerator": "cpu"}
        >>> result = cl.run(toy_stream(2), cl.strategies.ER(memory_size=20), progress=False, trainer=cpu)
        >>> result.R["class"].shape, sorted(result.scalars())[:2]
        ((3, 2), ['accuracy_diaz', 'average_accuracy'])
    """
    make_trainer = _trainer(stream, {**_TRAINER, **(trainer or {})}, optimizer, scheduler)
    options: dict[str, Any] = {
        **{"backbone": backbone, "head": head, "optimizer": optimizer, "scheduler": scheduler, "mode": compile},
        **{"batch_size": batch_size, "eval_batch_size": eval_batch_size, "chunk_size": chunk_size},
        **{"gradient_clip": gradient_clip, "train_mask": train_mask, "log_every": log_every},
        **{"optimizer_state": optimizer_state, "scheduler_interval": scheduler_interval, "seed": seed},
    }
    own, extra = copy.deepcopy((named(strategies), dict(instruments or {})))
    learner = _learner(options, stream, own)
    spans: dict[str, Any] = {"every": every, "points": points, "subset": subset}
    measured: dict[str, Any] = {"probes": list(probes), "estimators": list(estimators)}
    kept: dict[str, Any] = {"keep": checkpoint_keep, "every": checkpoint_every, "allow_changed": allow_changed}
    config = {
        **describe(learner, stream, epochs, backbone, head),
        **{"optimizer_state": optimizer_state, "compile": compile, "trainer": make_trainer.keywords},
        **{**measured, "report": {"columns": columns, **spans, "flops": flops}, "instrument": described_by_name(extra)},
        **{"references": list(references)},
    }
    told = [*(_files() if directory is not None else ()), *reports]
    train = functools.partial(_reference, options, trainer=make_trainer, epochs=epochs, **spans)
    experiment = Experiment(
        learner,
        stream,
        make_trainer,
        epochs=epochs,
        directory=None if directory is None else expand_path(directory).resolve(),
        reports=told,
        logger=[report.logger for report in told if isinstance(getattr(report, "logger", None), Logger)],
        callbacks=[*callbacks, *_bars(progress)],
        config=config,
        columns=columns,
        instruments=chosen(stream, own=extra, flops=flops, **measured, **spans),
        scalars=scalars,
        references=_references(references, reference_dir, config, told, train),
        **kept,
    )
    return _run(experiment)


def _trainer(
    stream: Any, trainer: dict[str, Any], optimizer: OptimizerFactory, scheduler: SchedulerFactory | None
) -> functools.partial[pl.Trainer]:
    """Return what makes Trainers; refuse what would fail only when the run has begun."""
    if not isinstance(stream, Stream):
        raise InputError(f"{stream!r} is no stream: make one by a function of cl.streams.")
    check_call("trainer", pl.Trainer, trainer)
    factory = functools.partial(pl.Trainer, **trainer)
    try:
        check_arguments(factory)
        quiet_trainer(factory)
    except InputError:
        raise
    except Exception as error:  # Lightning has many kinds
        raise InputError(f"trainer={trainer} cannot be made ({' '.join(str(error).split())}): correct it.") from error
    check_optimizer(optimizer, scheduler, stream, trainer)
    return factory


def _learner(options: dict[str, Any], stream: Stream, strategies: dict[str, Strategy]) -> Learner:
    """Return a learner, with copies of the modules among the options; `mode` is that of torch.compile."""
    backbone, head, mode = (options[key] for key in ("backbone", "head", "mode"))
    others = {key: value for key, value in options.items() if key not in ("backbone", "head", "mode")}
    learner = Learner(stream, _own(backbone, MLP), strategies, head=_own(head, Head), **others)
    if mode is not None:
        learner.compile(mode)
    return learner


def _reference(options: dict[str, Any], stream: Stream, strategies: dict[str, Strategy], **training: Any) -> Experiment:
    return reference_experiment(_learner(options, stream, strategies), stream, **training)


def _references(
    kinds: Sequence[str],
    folder: str | Path,
    config: dict[str, Any],
    reports: Sequence[Report],
    train: Callable[[Stream, dict[str, Strategy]], Experiment],
) -> Callable[[Stream], dict[str, list[Reference]]] | None:
    """Return what trains or finds the references, or None where none are wanted."""

    def say(text: str) -> None:
        for report in reports:
            report.say(text)

    return References(kinds, train, expand_path(folder), config, say).measure if kinds else None


def _own(part: Any, default: Any) -> Any:
    """Return a copy of a module, the factory that was given, or the default one."""
    return copy.deepcopy(part) if isinstance(part, nn.Module) else part or default


def named(strategies: Strategies) -> dict[str, Strategy]:
    """Return strategies by name: that of their file, where it is called like the class, or that of the class.

    Names matter: they stand in checkpoints and curves, and generators are seeded by them.

    Raises:
        InputError: If something is no strategy, or two of a list have one name.

    Example:
        >>> import cl
        >>> class Mine(Strategy):
        ...     pass
        >>> list(named([cl.strategies.OnlineEWC(), Mine()]))
        ['online_ewc', 'mine']
    """
    found: list[tuple[str, Any]]  # whatever was passed
    if isinstance(strategies, Mapping):
        found = list(strategies.items())
    else:
        several = strategies if isinstance(strategies, list | tuple) else [strategies]
        kinds = [type(strategy) for strategy in several]
        names = [option_name(kind.__module__, kind.__name__).lower() for kind in kinds]
        found = list(zip(names, several, strict=True))
    for name, strategy in found:
        if not isinstance(strategy, Strategy):
            remedy = f"write {strategy.__name__}()" if isinstance(strategy, type) else "make one, such as ER()"
            raise InputError(f"{strategy!r} is no strategy: {remedy}.")
        if [other for other, _ in found].count(name) > 1:
            raise InputError(f"Two strategies are called {name!r}: give a mapping with a name for each.")
    return dict(found)


def _files() -> list[Report]:
    """Return the reports that write the files of a run's directory."""
    from cl.report.curves_picture import CurvesPicture
    from cl.report.picture import PictureReport
    from cl.report.tables import FileReport
    from cl.report.training import TrainingReport

    return [FileReport(), PictureReport(), CurvesPicture(), TrainingReport()]


def _bars(progress: bool) -> list[pl.Callback]:
    from cl.report.progress import ProgressBar

    return [ProgressBar()] if progress else []


@interruptible()
def _run(experiment: Experiment) -> Run:
    """Run, alone in a directory where there is one; before it is written to, refuse one that holds anything else."""
    directory = experiment.checkpoints.parent if experiment.checkpoints is not None else None
    if directory is None:
        return experiment.run()
    config = experiment.run_view.config
    strange = directory.is_dir() and any(path.name != rundir.LOCK for path in directory.iterdir())
    if directory.is_file() or (strange and not (directory / rundir.CONFIG).is_file()):
        raise InputError(f"{directory} is there already and holds no run: name a new directory, or that of a run.")
    refuse_other(config, directory)
    directory.mkdir(parents=True, exist_ok=True)
    with alone(directory):
        write_config(config, directory)
        return experiment.run()


def load(directory: str | Path) -> Run:
    """Read a run directory, of `cl.run` or of `cl-run`, finished or not.

    Args:
        directory: Where `config.yaml` and `transfer.csv` are.

    Returns:
        The run with its configuration, R, scalars and notes; `learner` is None, since weights stay in the checkpoints.

    Raises:
        InputError: If there is no run, it has no row of R yet, or a file cannot be read.

    Example:
        >>> load("no such place")
        Traceback (most recent call last):
        cl.errors.InputError: There is no directory no such place: name that of a run.
    """
    from cl.compare.read import read_run

    where = expand_path(directory)
    if not where.is_dir():
        raise InputError(f"There is no directory {where}: name that of a run.")
    if not (where / rundir.CONFIG).is_file():
        raise InputError(f"{where} is no run directory, as it has no {rundir.CONFIG}: name one that a run has written.")
    files = read_run(where)
    if not files.matrices:
        raise InputError(
            f"{where} has no row of R yet, as its {rundir.TRANSFER.name} is missing or empty: wait for the first."
        )
    matrices: dict[str, TransferMatrix] = {}
    calibration: dict[str, TransferMatrix] = {}
    for (mask, metric), values in files.matrices.items():
        kept = calibration if metric == "ece" else matrices
        kept[f"{mask}_{metric}" if mask in kept else mask] = _matrix(mask, metric, values)
    names = list(files.task_names) or [f"task {t + 1}" for t in range(files.num_tasks)]
    run = Run(
        where.resolve(),
        read_config(where / rundir.CONFIG),
        names,
        files.scenario or next(iter(matrices)),
        matrices,
        notes=list(files.notes),
        order=files.order,
        calibration=calibration,
        tuning=files.tuning,
        stream=files.stream,
        device=files.device,
        bound=files.bound,
    )
    summary, references = (_read_if_there(where / name) for name in (rundir.SUMMARY, rundir.REFERENCES))
    run.references, run.test_rows = references, tuple(summary.get("test_rows", ()))
    recall(run, summary)
    run.boundaries = summary.get("rows", run.rows) == run.rows
    return run


def _read_if_there(path: Path) -> dict[str, Any]:
    return rundir.read_json(path) if path.exists() else {}


def _matrix(mask: str, metric: str, values: Any) -> TransferMatrix:
    matrix = TransferMatrix(values.shape[1], mask, metric)
    for after_task, row in enumerate(torch.from_numpy(values)):
        if not bool(row.isnan().all()):
            matrix.record(after_task, row.float())
    return matrix
