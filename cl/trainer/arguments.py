"""Check the arguments of Lightning's Trainer: which a user may set, and what to use instead of the others.

A run builds one Trainer to fit a task and one to measure a row of R. An argument that would reduce the examples on
which R is measured, or that the run sets itself, is refused before anything is written.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException

from cl.errors import InputError

TrainerFactory = Callable[..., pl.Trainer]

# Warnings of Lightning that do not apply: data are on the device already, and one Trainer learns one task.
_NOISE = (
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",
    ".*number of training batches.*logging interval.*",
    ".*`training_step` returned `None`.*",
    ".*GPU available but not used.*",
    ".*`srun` command is available.*",
    ".*Starting from v1.9.0, `tensorboardX`.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*total length of `?DataLoader.* is zero.*",
    ".*grad attribute of a Tensor that is not a leaf.*",  # torch.compile, of features that enter the head
    ".*isinstance.treespec, LeafSpec.*",
    ".*torch.jit.script. is deprecated.*",  # torch, of its own forward derivatives
)

# Passed on to Lightning: they set devices, precision and profiling, or limit training.
PASSED_ON = frozenset(
    {"accelerator", "strategy", "devices", "num_nodes", "precision", "deterministic", "benchmark", "profiler"}
    | {"detect_anomaly", "plugins", "sync_batchnorm", "min_epochs", "check_val_every_n_epoch"}
    | {"limit_train_batches", "accumulate_grad_batches"}
)
# Without effect here, whatever their value, since the run has its own loader and loggers.
HARMLESS = frozenset(
    {"inference_mode", "use_distributed_sampler", "reload_dataloaders_every_n_epochs", "default_root_dir"}
    | {"enable_autolog_hparams", "limit_predict_batches"}
)
_WHOLE = (
    "R must be measured on the whole test and validation set of every task: make the sets smaller in the stream "
    "(stream.val_fraction, dataset.test_fraction), or use a subset inside tasks (report.points, report.subset)"
)
# Refused, with what to use instead.
INSTEAD: Mapping[str, str] = {
    "limit_val_batches": _WHOLE,
    "limit_test_batches": _WHOLE,
    "fast_dev_run": "it would cut test sets to one batch: use debug=default, or epochs=1 trainer.limit_train_batches=5",
    "overfit_batches": "it would cut test sets, too: use debug=default, or trainer.limit_train_batches",
    "max_epochs": "use epochs",
    "max_steps": "use epochs, or trainer.limit_train_batches (of an epoch)",
    "min_steps": "use trainer.min_epochs",
    "max_time": "a task would end at a step that depends on the machine: use epochs, or trainer.limit_train_batches",
    "callbacks": "use the group callbacks (callbacks=early_stopping, or +callbacks.mine._target_=...)",
    "logger": "use the group logger",
    "model_registry": "use the group logger",
    "val_check_interval": "use report.every, which evaluates inside an epoch",
    "log_every_n_steps": "use log_every",
    "num_sanity_val_steps": "row 0 of R, of the untrained learner, is measured anyway: drop it",
    "enable_checkpointing": "use checkpoint.keep and checkpoint.every",
    "enable_progress_bar": "use the group report",
    "enable_model_summary": "use callbacks=model_summary",
    "gradient_clip_val": "use gradient_clip, which clips after the strategies have projected",
    "gradient_clip_algorithm": "use gradient_clip, which clips the norm after the strategies have projected",
    "barebones": "reports would be missing: use report=quiet logger=none checkpoint.every=null",
}
# Values that are in effect anyway, and so allowed; compared with their type, since 1 means one batch and 1.0 all.
_IN_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "limit_val_batches": (1.0,),
    "limit_test_batches": (1.0,),
    "fast_dev_run": (False, 0),
    "overfit_batches": (0, 0.0),
    "max_steps": (-1,),
    "callbacks": ([],),
    "logger": (False,),
    "val_check_interval": (1.0,),
    "num_sanity_val_steps": (0,),
    "enable_checkpointing": (False,),
    "enable_progress_bar": (False,),
    "enable_model_summary": (False,),
    "gradient_clip_val": (0, 0.0),
    "barebones": (False,),
}
_VARIABLE = "PL_TRAINER_"  # Lightning takes any argument from the environment, too


def check_arguments(factory: TrainerFactory) -> None:
    """Refuse arguments of a Trainer that a run cannot use, also those in Lightning's environment variables.

    Args:
        factory: A partial of `pl.Trainer`; of any other callable, one Trainer is built and checked.

    Raises:
        InputError: If there is such an argument; names it, its value and what to use.

    Example:
        >>> check_arguments(functools.partial(pl.Trainer, limit_test_batches=7))
        Traceback (most recent call last):
        cl.errors.InputError: trainer.limit_test_batches=7: R must be measured on the whole test and validation set of \
every task: make the sets smaller in the stream (stream.val_fraction, dataset.test_fraction), or use a subset inside \
tasks (report.points, report.subset).
    """
    for name, value in _from_environment().items():
        _check(name, value, f"The environment variable {_VARIABLE}{name.upper()}")
    given = getattr(factory, "keywords", {})
    for name, value in given.items():
        _check(name, value, f"trainer.{name}")
    if not (isinstance(factory, functools.partial) and factory.func is pl.Trainer):
        check_trainer(quiet_trainer(factory))


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse a Trainer that would limit the examples on which R is measured, or that cannot train.

    Raises:
        InputError: If it would; names the argument, its value and what to use.
    """
    limits = "fast_dev_run", "overfit_batches", "limit_val_batches", "limit_test_batches", "limit_train_batches"
    for name in (*limits, "accumulate_grad_batches", "gradient_clip_val"):
        _check(name, getattr(trainer, name), f"trainer.{name}")


def _check(name: str, value: Any, where: str) -> None:
    known = _IN_EFFECT.get(name, ())
    in_effect = value is None or any(value == other and type(value) is type(other) for other in known)
    if name in INSTEAD and not in_effect:
        raise InputError(f"{where}={value}: {INSTEAD[name]}.")
    if name == "limit_train_batches" and value is not None and not _is_positive(value):
        raise InputError(
            f"{where}={value} would train on nothing: give a number of minibatches of an epoch (1 or more), or a "
            "fraction of it above 0."
        )
    if name == "accumulate_grad_batches" and not (isinstance(value, int) and value >= 1):
        raise InputError(f"{where}={value} makes no step of the optimizer: give 1 or more minibatches.")
    if name == "check_val_every_n_epoch" and isinstance(value, int) and value < 1:
        raise InputError(f"{where}={value} must be 1 or more epochs.")
    if name == "num_nodes" and value != 1 and not _is_started_by_a_cluster():
        raise InputError(
            f"{where}={value}: no processes have been started on other machines, and the run would wait for them for "
            "ever: start it by torchrun or Slurm on each, or leave num_nodes at 1."
        )


def _is_positive(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value >= 1 if whole else isinstance(value, float) and 0 < value <= 1


def _is_started_by_a_cluster() -> bool:
    from lightning_fabric.plugins.environments import lsf, mpi, slurm, torchelastic

    if {"MASTER_ADDR", "NODE_RANK", "LOCAL_RANK"} & set(os.environ):  # started by hand, for Lightning's own environment
        return True
    clusters = (
        *(torchelastic.TorchElasticEnvironment, slurm.SLURMEnvironment),
        *(lsf.LSFEnvironment, mpi.MPIEnvironment),
    )
    return any(cluster.detect() for cluster in clusters)


def _from_environment() -> dict[str, Any]:
    names = (name for name in inspect.signature(pl.Trainer.__init__).parameters if name != "self")
    found = {name: os.environ.get(f"{_VARIABLE}{name.upper()}") for name in names}
    return {name: _parsed(text) for name, text in found.items() if text is not None}


def _parsed(text: str) -> Any:
    from ast import literal_eval

    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def quiet_trainer(factory: TrainerFactory) -> pl.Trainer:
    """Return a Trainer from a factory, one that writes and shows nothing.

    Raises:
        InputError: If Lightning refuses its arguments.
    """
    nothing = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        return factory(**nothing, enable_model_summary=False)
    except MisconfigurationException as error:
        raise InputError(f"The Trainer cannot be built: {' '.join(str(error).split())}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the messages that Lightning prints for every Trainer, since there are two Trainers for each task."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C, or a notebook's stop button, raise KeyboardInterrupt in a run from Python, and restore the handler.

    Lightning would exit the interpreter, and ignore the signal from then on.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
