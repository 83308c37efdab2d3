"""A run that starts from the checkpoint of another run after a task: `from=DIR:task=3`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl import rundir
from cl.distributed import unpack
from cl.engine import checkpoint
from cl.engine.instrument import Instruments
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.report.config_file import read_config
from cl.settings import changes, flatten, setting

_SHARED_PARTS = ("stream", "network")  # parts of the settings in which a branch must agree with its parent run


@dataclass(frozen=True)
class Branch:
    """The checkpoint of another run, the parent, that a run starts from.

    Attributes:
        directory: The run directory of the parent.
        task: How many tasks the parent had learned, 1 or more.
    """

    directory: Path
    task: int

    @classmethod
    def parse(cls, text: str) -> Branch:
        """Return the branch that a text such as `runs/a:task=3` names.

        Raises:
            InputError: If the text has another form.

        Example:
            >>> Branch.parse("runs/a:task=3").task
            3
        """
        directory, _, task = text.rpartition(":task=")
        if not directory or not task.isdecimal() or int(task) < 1:
            raise InputError(f"from={text} names no checkpoint: write from=DIR:task=3, with a task of 1 or more.")
        return cls(Path(directory), int(task))

    def check(self, config: dict[str, Any], num_tasks: int) -> None:
        """Refuse a run whose stream or network differs from that of the parent.

        Args:
            config: The resolved configuration of the run that is to start.
            num_tasks: How many tasks its stream has.

        Raises:
            InputError: If the two configurations differ in stream or network, the parent has no configuration, or no
                task is left to learn.
        """
        if self.task >= num_tasks:
            raise InputError(
                f"from={self.directory}:task={self.task} leaves none of {num_tasks} tasks to learn: name a task below "
                f"{num_tasks}."
            )
        rundir.refuse_later(self.directory)
        path = self.directory / rundir.CONFIG
        if not path.is_file():
            raise InputError(
                f"from={self.directory} is no run directory, as there is no {path}: name the directory of a run."
            )
        there, here = flatten(read_config(path)), flatten(config)
        one, two = ({k: v for k, v in flat.items() if setting(k).part in _SHARED_PARTS} for flat in (there, here))
        changed = changes(one, two, ["result"])
        if changed:
            raise InputError(f"from={self.directory} learned another stream or network ({changed}): make them agree.")

    def load(self, learner: Learner, instruments: Instruments) -> None:
        """Load the weights, R, the state of the instruments, and of each strategy that the parent also had.

        A strategy that the parent did not have, or whose state had other shapes, keeps its initial state.

        Raises:
            InputError: If there is no intact checkpoint after that task, or its shapes do not fit.
        """
        path = self.checkpoint
        if not checkpoint.is_whole(path):
            others = ", ".join(sorted(p.stem for p in path.parent.glob("*") if len(rundir.numbers_in(p.name)) == 1))
            raise InputError(f"{path} is missing or damaged: start from one of {others or 'another run'}.")
        content = unpack(checkpoint.read(path))
        new = tuple(f"strategies.{name}." for name in self._new_strategies(learner, content["state_dict"]))
        own = learner.state_dict()
        taken = {key: value for key, value in content["state_dict"].items() if key in own or not _of_strategies(key)}
        fresh = {key: value for key, value in own.items() if new and key.startswith(new)}
        checkpoint.fill(learner, {**taken, **fresh}, path)
        known = instruments.state_dict()
        instruments.load_state_dict({k: v for k, v in content["instruments"].items() if k in known}, strict=False)

    def notes(self, learner: Learner) -> list[str]:
        """Return the notes of the run about its start: the parent, and the strategies that the parent did not have."""
        sentences = [f"Begun from {self.directory} after task {self.task}."]
        if version := rundir.earlier_version(self.directory):
            sentences.append(f"The run there was begun by {version}.")
        if checkpoint.is_whole(self.checkpoint):
            new = self._new_strategies(learner, checkpoint.read(self.checkpoint)["state_dict"])
            sentences += [f"Strategies without a past there: {', '.join(new)}."] * bool(new)
        return sentences

    @property
    def checkpoint(self) -> Path:
        """The checkpoint file of the parent."""
        return self.directory / rundir.CHECKPOINTS / rundir.checkpoint_after(self.task)

    @staticmethod
    def _new_strategies(learner: Learner, state: dict[str, Any]) -> list[str]:
        """Return the strategies whose state the parent does not hold under the same name and with the same shapes."""
        own, new = learner.state_dict(), []
        for name in learner.strategies:
            prefix = f"strategies.{name}."
            theirs, ours = ({k: _shape(v) for k, v in s.items() if k.startswith(prefix)} for s in (state, own))
            if theirs != ours:
                new.append(str(name))
        return new


def _of_strategies(key: str) -> bool:
    return key.startswith("strategies.")


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)
