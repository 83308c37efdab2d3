"""A run that begins where another one stood after a task: `from=DIR:task=3`."""

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

_ALIKE = ("stream", "network")  # parts of the settings that a branch shares with the run it begins from


@dataclass(frozen=True)
class Branch:
    """Where a run begins.

    Attributes:
        directory: Of the other run.
        task: Tasks it has learned there, from 1.
    """

    directory: Path
    task: int

    @classmethod
    def parse(cls, text: str) -> Branch:
        """Return the branch that a text such as `runs/a:task=3` names.

        Raises:
            InputError: If it names none.

        Example:
            >>> Branch.parse("runs/a:task=3").task
            3
        """
        place, _, task = text.rpartition(":task=")
        if not place or not task.isdecimal() or int(task) < 1:
            raise InputError(f"from={text} names no place to begin: write from=DIR:task=3, with a task of 1 or more.")
        return cls(Path(place), int(task))

    def check(self, config: dict[str, Any], num_tasks: int) -> None:
        """Refuse a run on another stream, or with another network.

        Raises:
            InputError: If the configurations do not agree, or all tasks are learned there.
        """
        if self.task >= num_tasks:
            raise InputError(f"from={self.directory}:task={self.task} leaves none of {num_tasks} tasks to learn.")
        rundir.refuse_later(self.directory)
        path = self.directory / rundir.CONFIG
        if not path.is_file():
            raise InputError(
                f"from={self.directory}: there is no {path}, so nothing to begin from; name a run's place."
            )
        there, here = flatten(read_config(path)), flatten(config)
        one, two = ({k: v for k, v in flat.items() if setting(k).part in _ALIKE} for flat in (there, here))
        changed = changes(one, two, ["result"])
        if changed:
            raise InputError(f"from={self.directory} learned another stream or network ({changed}): make them agree.")

    def load(self, learner: Learner, instruments: Instruments) -> None:
        """Take over weights, R and what was measured; of the strategies, those that have a past there.

        Raises:
            InputError: If there is no whole checkpoint after that task, or it is of another shape.
        """
        path = self.checkpoint
        if not checkpoint.is_whole(path):
            others = ", ".join(sorted(p.stem for p in path.parent.glob("*") if len(rundir.numbers_in(p.name)) == 1))
            raise InputError(f"{path} is not there or not whole: begin from one of {others or 'another run'}.")
        content = unpack(checkpoint.read(path))
        new = tuple(f"strategies.{name}." for name in self._without_a_past(learner, content["state_dict"]))
        own = learner.state_dict()
        taken = {key: value for key, value in content["state_dict"].items() if key in own or not _of_strategies(key)}
        fresh = {key: value for key, value in own.items() if new and key.startswith(new)}
        checkpoint.fill(learner, {**taken, **fresh}, path)
        known = instruments.state_dict()
        instruments.load_state_dict({k: v for k, v in content["instruments"].items() if k in known}, strict=False)

    def notes(self, learner: Learner) -> list[str]:
        """Return sentences on where the run comes from."""
        sentences = [f"Begun from {self.directory} after task {self.task}."]
        if version := rundir.earlier_version(self.directory):
            sentences.append(f"The run there was begun by {version}.")
        if checkpoint.is_whole(self.checkpoint):
            new = self._without_a_past(learner, checkpoint.read(self.checkpoint)["state_dict"])
            sentences += [f"Strategies without a past there: {', '.join(new)}."] * bool(new)
        return sentences

    @property
    def checkpoint(self) -> Path:
        """The file that it begins from."""
        return self.directory / rundir.CHECKPOINTS / rundir.checkpoint_after(self.task)

    @staticmethod
    def _without_a_past(learner: Learner, state: dict[str, Any]) -> list[str]:
        """Return the strategies whose state is not there under the same name and of the same shapes."""
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
