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
from cl.app.features_once import features_once
from cl.app.scoring import Scorer
from cl.backbones.frozen import past_blocks
from cl.backbones.networks import MLP
from cl.data.task import Scenario, Stream
from cl.engine.described import describe, described_by_name
from cl.engine.experiment import Experiment
from cl.engine.head import Head
from cl.engine.instrument import Instrument
from cl.engine.learner import Learner
from cl.engine.network import BackboneFactory, HeadFactory, network
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
from cl.trainer.arguments import TrainerFactory, check_arguments, interruptible, quiet_trainer

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
    updates_per_batch: Annotated[int, Ge(1)] | None = None,
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
    feature_dir: str | Path | None = "runs/features",
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
    """Learn a stream with some strategies, measure the transfer matrix R, and return the run.

    The defaults are those of `cl-run`, and the same settings give the same bits of R and of the weights. Modules,
    strategies and instruments are copied, so that the same objects can be passed to another run.

    Args:
        stream: The stream to learn, such as `cl.streams.split(digits())`; its own draws depend on its own seed.
        strategies: One strategy; a list of several, which get the names of their files, or else of their classes; or a
            mapping from names to strategies. An empty list is fine-tuning.
        backbone: Maps inputs (B, *input) to features (B, num_features). Either a factory that builds it from the shape
            of an input, such as `cl.backbones.ResNet18` or `partial(MLP, hidden=[50])`, whose weights are drawn from
            the seed; or a module, which keeps its weights. None is an MLP with two hidden layers of 100 units.
        epochs: Passes over the training data of each task.
        batch_size: Examples of the stream in a step.
        optimizer: A factory from parameters to an optimizer, called anew for each task, such as
            `partial(torch.optim.Adam, lr=1e-3)`. The stored configuration has the arguments of a `partial`; of another
            function it has the name alone.
        scheduler: A factory from an optimizer to a learning-rate schedule; None keeps the learning rate constant.
        head: A module that maps features to logits (B, C), or a factory that builds it from the numbers of features and
            of classes; None is one linear layer.
        seed: Seed of the initial weights and of every draw in training.
        directory: The directory for checkpoints and all files of the run. An unfinished run of the same settings in it
            is continued. None writes nothing.
        gradient_clip: Largest norm of the gradient; None does not clip.
        train_mask: The classes that compete in the loss: "class" (all seen), "task" (those of the task), "domain"
            (all); None means those that compete at test.
        optimizer_state: Whether an optimizer's state begins anew at each task ("reset") or is kept ("keep").
        scheduler_interval: Whether the schedule advances after each "epoch" or after each optimizer "step".
        eval_batch_size: Examples in a batch of an evaluation; None means 256 on a CPU and 1024 elsewhere.
        chunk_size: Optimizer steps in one training step of Lightning; results do not depend on it.
        updates_per_batch: Updates of the weights on each incoming batch, each with new replayed examples; None means 1.
        log_every: Steps between two points of the training curves.
        compile: Mode of torch.compile for backbone and head: "default", "reduce-overhead" or "max-autotune".
        trainer: Options of Lightning's Trainer, such as `{"accelerator": "gpu", "precision": "bf16-mixed"}`.
        callbacks: Lightning callbacks.
        reports: Reports that receive every row of R, besides those that write the files of a directory.
        progress: Whether to show progress: bars in a terminal, else a line for each task.
        columns: The tasks that a row of R is measured on: "all"; "seen", with the next one; or a number of the newest.
        probes: Classifiers and similarities that are computed on the frozen features after each task: "ridge", "knn",
            "cka".
        estimators: Forecasts of transfer before each task: "tmi", "log_me", "ped", "vci", "knn", "covariance".
        references: Learners without a strategy that the run is compared with: "experts" (one for each task alone) and
            "joint" (one for tasks 1 to k, for each k).
        reference_dir: The directory in which references are stored for all runs, also when `directory` is None.
        feature_dir: The directory of the outputs of frozen networks, which all runs share, also when `directory` is
            None; None runs a frozen backbone each time an input is used.
        every: Steps between two evaluations inside a task; not together with `points`.
        points: Number of evaluations inside a task; not together with `every`.
        subset: Examples of each task for evaluations inside tasks, probes and estimators.
        flops: Whether to count floating-point operations.
        instruments: Instruments of your own, by name, which measure more than R.
        scalars: Scalars of your own, functions decorated by `cl.scalar`; the run's `.measured()` has their values.
        checkpoint_keep: Number of the newest checkpoints at the ends of tasks to keep; None keeps all; "auto" keeps
            all, or the newest three if all would take more than 10 GiB.
        checkpoint_every: Interval of checkpoints inside a task: steps (500), a time ("30s", "10min", "2h") or None.
        allow_changed: Whether to continue a run although its data or the user's code have changed.

    Returns:
        The run, with `.R` by mask, `.scalars()`, `.plot()`, `.to_frame()`, `.save(directory)` and `.learner`.

    Raises:
        InputError: If an argument cannot work, before anything is written; the sentence says what to change.
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
        **{"backbone": backbone, "head": head, "optimizer": optimizer, "scheduler": scheduler, "seed": seed},
        **{"batch_size": batch_size, "updates_per_batch": updates_per_batch, "eval_batch_size": eval_batch_size},
        **{"gradient_clip": gradient_clip, "train_mask": train_mask, "chunk_size": chunk_size, "mode": compile},
        **{"optimizer_state": optimizer_state, "scheduler_interval": scheduler_interval, "log_every": log_every},
    }
    extra = copy.deepcopy(dict(instruments or {}))
    learner, learned = _learner(stream, named(strategies), extra, feature_dir, **options)
    spans: dict[str, Any] = {"every": every, "points": points, "subset": subset}
    measured: dict[str, Any] = {"probes": list(probes), "estimators": list(estimators)}
    kept: dict[str, Any] = {"keep": checkpoint_keep, "every": checkpoint_every, "allow_changed": allow_changed}
    config = {
        **describe(learner, stream, epochs, backbone, head),
        **{"optimizer_state": optimizer_state, "compile": compile, "trainer": make_trainer.keywords},
        **{**measured, "report": {"columns": columns, **spans, "flops": flops}, "instrument": described_by_name(extra)},
        **{"references": list(references)},
    }
    listeners = [*(_files() if directory is not None else ()), *reports]
    training = {"trainer": make_trainer, "epochs": epochs, **spans}
    experiment = Experiment(
        learner,
        learned,
        make_trainer,
        epochs=epochs,
        directory=None if directory is None else expand_path(directory).resolve(),
        reports=listeners,
        logger=[report.logger for report in listeners if isinstance(getattr(report, "logger", None), Logger)],
        callbacks=[*callbacks, *_bars(progress)],
        config=config,
        columns=columns,
        instruments=chosen(learned, own=extra, flops=flops, **measured, **spans),
        scalars=scalars,
        references=_references(stream, references, reference_dir, feature_dir, config, listeners, options, training),
        **kept,
    )
    return _run(experiment, make_trainer)


def _trainer(
    stream: Any, trainer: dict[str, Any], optimizer: OptimizerFactory, scheduler: SchedulerFactory | None
) -> functools.partial[pl.Trainer]:
    """Return a factory of Trainers; refuse arguments that would fail only after the run has begun."""
    if not isinstance(stream, Stream):
        raise InputError(f"{stream!r} is not a stream: build one by a function of cl.streams.")
    check_call("trainer", pl.Trainer, trainer)
    factory = functools.partial(pl.Trainer, **trainer)
    try:
        check_arguments(factory)
        quiet_trainer(factory)
    except InputError:
        raise
    except Exception as error:  # Lightning raises many types
        raise InputError(f"trainer={trainer} cannot be built ({' '.join(str(error).split())}): correct it.") from error
    check_optimizer(optimizer, scheduler, stream, trainer)
    return factory


def _learner(
    stream: Stream,
    strategies: Mapping[str, Strategy],
    instruments: Mapping[str, Instrument],
    feature_dir: str | Path | None,
    *,
    backbone: Any,
    head: Any,
    mode: str | None,
    **options: Any,
) -> tuple[Learner, Stream]:
    """Return a learner with copies of the modules that are given, and the stream that it learns; see `features_once`.

    Args:
        stream: The stream.
        strategies: By name.
        instruments: Those of the run, by name.
        feature_dir: The directory of the outputs of a frozen backbone, or None.
        backbone: A module or a factory.
        head: A module or a factory.
        mode: That of torch.compile.
        options: Further arguments of `Learner`.
    """

    def make(depth: int) -> tuple[Learner, Stream]:
        body, top = network(stream, _own(backbone, MLP), _own(head, Head), options["seed"])
        learned = past_blocks(stream, body, depth, expand_path(feature_dir or "")) if depth else stream
        learner = Learner(learned, body, copy.deepcopy(dict(strategies)), head=top, **options)
        if mode is not None:
            learner.compile(mode)
        return learner, learned

    return features_once(make, instruments) if feature_dir is not None else make(0)


def _references(
    stream: Stream,
    kinds: Sequence[str],
    folder: str | Path,
    feature_dir: str | Path | None,
    config: dict[str, Any],
    reports: Sequence[Report],
    options: dict[str, Any],
    training: dict[str, Any],
) -> Callable[[Stream], dict[str, list[Reference]]] | None:
    """Return the function that trains the references or reads them from their files; None without references."""

    def experiment(stream: Stream, strategies: dict[str, Strategy]) -> Experiment:
        learner, learned = _learner(stream, strategies, {}, feature_dir, **options)
        return reference_experiment(learner, learned, **training)

    measure = References(kinds, experiment, expand_path(folder), config, reports).measure
    return (lambda _: measure(stream)) if kinds else None


def _own(part: Any, default: Any) -> Any:
    """Return a copy of a module; a factory, or the default one in place of None, as it is."""
    return copy.deepcopy(part) if isinstance(part, nn.Module) else part or default


def named(strategies: Strategies) -> dict[str, Strategy]:
    """Return strategies by name.

    A strategy of a list gets the name of its file if its class has the same name, else that of its class in lower case.
    Checkpoints and curves hold these names, and random generators are seeded by them.

    Raises:
        InputError: If an entry is not a strategy, or two of a list have the same name.

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
            remedy = f"write {strategy.__name__}()" if isinstance(strategy, type) else "give one, such as ER()"
            raise InputError(f"{strategy!r} is not a strategy: {remedy}.")
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
def _run(experiment: Experiment, trainer: TrainerFactory) -> Run:
    """Run an experiment; if it has a directory, lock it, and first refuse one that holds anything but the same run."""
    experiment.run_view.scorer = Scorer(experiment.learner, experiment.stream, trainer)
    directory = experiment.checkpoints.parent if experiment.checkpoints is not None else None
    if directory is None:
        return experiment.run()
    config = experiment.run_view.config
    used = directory.is_dir() and any(path.name != rundir.LOCK for path in directory.iterdir())
    if directory.is_file() or (used and not (directory / rundir.CONFIG).is_file()):
        raise InputError(f"{directory} exists already and holds no run: name a new directory, or that of a run.")
    refuse_other(config, directory)
    directory.mkdir(parents=True, exist_ok=True)
    with alone(directory):
        write_config(config, directory)
        return experiment.run()


def load(directory: str | Path) -> Run:
    """Read the directory of a run of `cl.run` or `cl-run`, finished or not.

    Args:
        directory: The directory that holds `config.yaml` and `transfer.csv`.

    Returns:
        The run, with its configuration, R, scalars and notes. Its `learner` is None: weights stay in the checkpoints,
        from which `.score(...)` loads them.

    Raises:
        InputError: If the directory holds no run, R has no row yet, or a file cannot be read.

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
        raise InputError(f"{where} has no {rundir.CONFIG}, so it is not the directory of a run: name one that is.")
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
        scorer=Scorer(),
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
