"""Score a saved learner again, on its own test sets or on others: `cl-run score=DIR:task=3` and `run.score(...)`.

The learner is built from the configuration of its run and loaded from a checkpoint. Nothing is trained, and nothing is
written to the run's directory.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl

from cl import rundir
from cl.app.annotations import check_value
from cl.app.build import build_learner, build_stream
from cl.app.instantiate import instantiate
from cl.app.resume import folder_of
from cl.app.validate import validate
from cl.data import provenance
from cl.data.task import Stream
from cl.distributed import rank
from cl.engine import checkpoint
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.files import digest_of
from cl.measure.score_row import check_fit, score_row, unchanged
from cl.ranges import annotation_of
from cl.report.caption import caption
from cl.report.config_file import as_stored, read_config
from cl.report.manifest import hardware, versions
from cl.report.result import read_result
from cl.report.run import Run
from cl.report.scored import Score, directory_for
from cl.settings import SETTINGS, differing, flatten, setting
from cl.trainer.arguments import TrainerFactory, interruptible
from cl.trainer.processes import run as run_in_processes

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Saved:
    """A learner of a run, and what it is scored with.

    Attributes:
        learner: The learner.
        stream: The stream of its run; None if it is unknown.
        trainer: Builds a Lightning Trainer.
        config: The configuration of its run.
        directory: The directory of its run; None for a run in memory.
        path: The checkpoint to load; None scores the learner as it is.
        allow_changed: Whether changed data or code are noted instead of refused.
    """

    learner: Learner
    stream: Stream | None
    trainer: TrainerFactory
    config: dict[str, Any]
    directory: Path | None = None
    path: Path | None = None
    allow_changed: bool = False

    def score(self, stream: Stream | None, options: Options, about: Mapping[str, Any]) -> Score:
        """Return the row of R on a stream's test sets; None means those of the run."""
        learner, tested = self.learner, stream or self.stream
        if tested is None:
            raise InputError("The test sets are unknown, since a learner was given: give their stream as well.")
        if self.path is not None:
            text = checkpoint.config_text(self.config, self.directory or Path())
            checkpoint.load(learner, self.path, config=text)
        check_fit(learner, tested, self.stream.class_names if self.stream is not None else ())
        rows, errors = score_row(learner, tested, self.trainer)
        own = stream is None or stream is self.stream
        described = SimpleNamespace(config=self.config, stream="", scenario="", num_tasks=0, device="")
        if self.stream is not None:
            vars(described).update(stream=self.stream.name, scenario=self.stream.scenario, num_tasks=len(self.stream))
        return Score(
            rows,
            errors,
            {key: (matrix.mask, matrix.metric) for key, matrix in learner.matrices.items()},  # type: ignore[misc]
            tested.task_names,
            learner.tasks_learned,
            caption(described),
            tested.name,
            options,
            {**self._about(tested, own), **about},
        )

    def _about(self, tested: Stream, own: bool) -> dict[str, Any]:
        """Return what `score.json` says of the learner's origin and of the data; refuse what has changed since then."""
        learner = self.learner
        objects = [*learner.strategies.values(), learner.backbone, learner.head]
        found = provenance.provenance(tested, self.config, objects, sets=["test"])
        notes = self._check_changed(found, own) if self.directory is not None else []
        path = self.path
        return {
            "run": None if self.directory is None else str(self.directory),
            "checkpoint": None if path is None else path.name,
            "checkpoint_sha256": None if path is None else digest_of(path),
            "scenario": learner.scenario,
            "own_test_sets": own,
            "test_rows": [len(task.test) for task in tested],
            "data": found["data"],
            "code": found["code"],
            "notes": notes,
            "versions": versions(),
            "hardware": hardware(),
        }

    def _check_changed(self, found: dict[str, Any], own: bool) -> list[str]:
        assert self.directory is not None
        before = provenance.stored(self.directory)
        if before is None:
            return ["The run stored no digests, so that data and code may have changed since."]
        tests = {name: value for name, value in before["data"].items() if name.endswith(" test")}
        here = {**found, "code": {**before["code"], **found["code"]}}
        changed = provenance.changes({**before, "data": tests if own else found["data"]}, here)
        if changed and not self.allow_changed:
            raise InputError(
                f"{self.directory} was trained with other data or code: {provenance.listed(changed)}. Restore what was "
                "there, or set allow_changed=true, which adds a note to the score."
            )
        return [f"Changed since the run: {provenance.listed(changed)}."] * bool(changed)


def find_checkpoint(directory: Path, task: int | None) -> Path:
    """Return the checkpoint of a run after a task.

    Args:
        directory: The run's directory.
        task: The number of tasks learned; None means all of them.

    Raises:
        InputError: If there is no intact one, or the run is not finished and no task is named.

    Example:
        >>> find_checkpoint(Path("no such place"), 1)
        Traceback (most recent call last):
        cl.errors.InputError: score=no such place is no run directory: name the directory of a run.
    """
    rundir.refuse_later(directory)
    if not rundir.is_run(directory):
        raise InputError(f"score={directory} is no run directory: name the directory of a run.")
    folder = directory / rundir.CHECKPOINTS
    numbers = (rundir.numbers_in(path.name) for path in folder.glob("*"))
    held = sorted(found[0] for found in numbers if len(found) == 1)
    some = f"those after tasks {', '.join(map(str, held))} are there" if held else "there is none"
    if task is None and read_result(directory) is None:
        raise InputError(
            f"score={directory}: the run is not finished: name a checkpoint, score={directory}:task="
            f"{held[-1] if held else 'k'} ({some}), or continue the run by resume={directory}."
        )
    path = folder / rundir.checkpoint_after(max(held, default=0) if task is None else task)
    if not checkpoint.is_whole(path):
        raise InputError(f"score={directory}: {path} is missing or damaged: name another task ({some}).")
    return path


def check_options(strategies: Mapping[str, Any], options: Options) -> None:
    """Refuse options that are not test options of the strategies, or whose values do not fit.

    Args:
        strategies: The strategies of the saved learner, by name.
        options: Values by "NAME.option".

    Raises:
        InputError: Naming the test options that there are.

    Example:
        >>> from cl.engine.strategy import Strategy
        >>> check_options({"mine": Strategy()}, {"mine.speed": 3})
        Traceback (most recent call last):
        cl.errors.InputError: mine.speed=3 is no test option: a saved learner keeps the settings of its run, except \
for its stream and the test options of its strategies, of which there are none.
    """
    known = {f"{name}.{option}": strategy for name, strategy in strategies.items() for option in strategy.test_options}
    for name, value in options.items():
        if name not in known:
            raise _kept(f"{name}={value} is no test option", known)
        kind, option = type(known[name]), name.rpartition(".")[2]
        check_value(name, value, annotation_of(kind, option))
        held = {key: vars(known[name])[key] for key in inspect.signature(kind).parameters if key in vars(known[name])}
        with suppress(TypeError):  # other arguments, which cannot be read back from its attributes, are missing
            kind(**{**held, option: value})  # refuses what its constructor refuses


def _kept(what: str, known: Mapping[str, Any]) -> InputError:
    listed = f"those are {', '.join(known)}" if known else "of which there are none"
    return InputError(
        f"{what}: a saved learner keeps the settings of its run, except for its stream and the test options of its "
        f"strategies, {listed}."
    )


# ---- from the command line ------------------------------------------------------------------------------------------


def command(cfg: Any, directory: Path) -> float:
    """Run `cl-run score=DIR:task=3`: score the learner, print its row, and write it to a directory.

    Args:
        cfg: The configuration that Hydra composed from the run's command and the overrides.
        directory: The directory of the score.

    Returns:
        The average under the mask of the scenario.

    Raises:
        InputError: If the learner cannot be scored so; nothing is written then.
    """
    run, colon, task = str(cfg.score).rpartition(":task=")
    if colon and not task.isdecimal():
        raise InputError(f"score={cfg.score} names no learner: write score=DIR:task=3, or score=DIR.")
    where = Path(run if colon else cfg.score)
    path = find_checkpoint(where, int(task) if colon else None)
    return float(run_in_processes(instantiate(cfg.trainer), _job, cfg, directory_for(directory, where), path))


def _job(cfg: Any, directory: Path, path: Path) -> float:
    """Score in one of the processes, which may be several; process 0 prints and writes."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    run = path.parent.parent
    config, stored = validate(cfg, directory), read_config(run / rundir.CONFIG)
    here = as_stored(config, run)
    changed = {key: here.get(key) for key in differing(flatten(stored), here, ["result", "measured"])}
    tests = {key: value for key, value in changed.items() if setting(key).part == "stream"}
    options = _options(cfg, {key: value for key, value in changed.items() if key not in tests})
    kept = [key for key, row in SETTINGS.items() if row.part == "stream" and tests]
    own = {**config, **{key: stored.get(key) for key in kept}, "weights": None}  # which the checkpoint holds
    learner, stream = build_learner(OmegaConf.create(own))
    saved = Saved(learner, stream, instantiate(cfg.trainer), stored, run, path, cfg.allow_changed)
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    about = {"stream_settings": tests, "command": overrides}
    score = replace(saved.score(build_stream(cfg) if tests else None, options, about), directory=directory)
    if rank() == 0:
        score.write()
        score.show()
    return next(iter(score.averages.values()))


def _options(cfg: Any, changed: Options) -> dict[str, Any]:
    """Return the test options among changed settings, by "NAME.option"; refuse other changes."""
    from hydra.utils import get_object

    kinds = {str(name): get_object(node._target_) for name, node in (cfg.get("strategy") or {}).items()}
    known = {f"{name}.{option}": kind for name, kind in kinds.items() for option in getattr(kind, "test_options", ())}
    found = {}
    for key, value in changed.items():
        name = ".".join(key.split(".")[1:3])
        if not key.startswith("strategy.") or name not in known:
            raise _kept(f"{key}={value} differs from the run", known)
        found[name] = value
    return found


# ---- from Python ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """Scores the learner of a run: what `run.score` calls.

    Attributes:
        learner: The learner of a run of this process; None for a run that was read from its directory.
        stream: Its stream.
        trainer: Its factory of Trainers.
    """

    learner: Learner | None = None
    stream: Stream | None = None
    trainer: TrainerFactory | None = None

    @interruptible()
    def __call__(
        self,
        run: Run,
        stream: Stream | None,
        task: int | None,
        options: Options,
        directory: str | Path | None,
        learner: Learner | None,
        allow_changed: bool,
    ) -> Score:
        """Score the learner; the arguments are those of `Run.score`."""
        if stream is not None and not isinstance(stream, Stream):
            raise InputError(f"{stream!r} is not a stream: build one by a function of cl.streams.")
        if learner is not None and not isinstance(learner, Learner):
            raise InputError(f"{learner!r} is not a learner: give a cl.Learner that is built as that of the run was.")
        where = run.directory.resolve() if run.stored else None
        target = None if directory is None else directory_for(directory, where)
        with ExitStack() as stack:
            stack.enter_context(_in_folder(None if where is None else folder_of(where)))
            saved = replace(self._saved(run, where, task, learner), allow_changed=allow_changed)
            check_options(saved.learner.strategies, options)  # type: ignore[arg-type]
            stack.enter_context(_with_options(saved.learner, options))
            if saved.path is not None:
                stack.enter_context(unchanged(saved.learner))
            score = replace(saved.score(stream, options, {}), directory=target)
        if target is not None:
            score.write()
        return score

    def _saved(self, run: Run, where: Path | None, task: int | None, learner: Learner | None) -> Saved:
        held = learner or self.learner
        if held is None:
            assert where is not None
            return _rebuilt(where, task)
        trainer = self.trainer or partial(pl.Trainer, **_trainer_options(run.config))
        saved = Saved(held, self.stream if learner is None else None, trainer, run.config, where)
        if learner is None and task in (None, held.tasks_learned):
            return saved
        if where is None:
            raise InputError(
                f"task={task}: this run has no directory, and so the learner after task {held.tasks_learned} alone: "
                "leave task out, or give cl.run a directory."
            )
        return replace(saved, path=find_checkpoint(where, task))


def _trainer_options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (config.get("trainer") or {}).items() if not key.startswith("_")}


def _rebuilt(directory: Path, task: int | None) -> Saved:
    """Return a learner that is built from the configuration in a run's directory, and the checkpoint to load."""
    from omegaconf import OmegaConf

    path, stored = find_checkpoint(directory, task), read_config(directory / rundir.CONFIG)
    if "_target_" not in (stored.get("stream") or {}):
        raise InputError(
            f"{directory} was learned from Python objects, which its {rundir.CONFIG} cannot build again: give a stream "
            "and a learner that is built the same way, score(stream, learner=cl.Learner(...))."
        )
    absent = {key: None for key in SETTINGS if "." not in key}  # in a run of an earlier version
    cfg = OmegaConf.create({**absent, **stored, "weights": None})
    learner, stream = build_learner(cfg)
    return Saved(learner, stream, instantiate(cfg.trainer), stored, directory, path)


@contextmanager
def _in_folder(folder: Path | None) -> Iterator[None]:
    """Be in a folder in this context, so that the relative paths of a run's command are found."""
    before = Path.cwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _with_options(learner: Learner, options: Options) -> Iterator[None]:
    """Give strategies other options in this context."""
    places = [(learner.strategies[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in options]
    before = [getattr(strategy, option) for strategy, option in places]
    for (strategy, option), value in zip(places, options.values(), strict=True):
        setattr(strategy, option, value)
    try:
        yield
    finally:
        for (strategy, option), value in zip(places, before, strict=True):
            setattr(strategy, option, value)
