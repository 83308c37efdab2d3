"""Protocols of tuning: on the validation sets of the first tasks, or, marked as optimistic, on the whole stream.

A learning rate that was chosen on the whole stream was chosen with data of the future. Chaudhry et al. 2019 (A-GEM,
section 2) therefore tune on the first k tasks, whose scores do not count, and learn and score the other tasks with the
values that were found. Here the two parts are two streams: `first` and `rest`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cl.data.task import Stream, Task
from cl.errors import InputError, unknown
from cl.rundir import RESOURCES
from cl.settings import SETTINGS

PROTOCOLS = ("tune_first", "score_rest", "tune_everything")
_REMARKS = {
    "tune_first": "R is on the validation sets of the first {k} tasks, for tuning: not a result.",
    "score_rest": "The first {k} tasks of the stream were for tuning and are neither learned nor scored.",
    "tune_everything": "Part of a search over the test sets of all tasks: the best of it is optimistic.",
}


def first(stream: Stream, num_tasks: int) -> Stream:
    """Return the first tasks of a stream, with their validation sets in place of their test sets.

    Args:
        stream: The stream.
        num_tasks: Number of tasks, k, in 1..T-1.

    Raises:
        InputError: If the number is out of range, or a task has no validation set.

    Example:
        >>> from dataclasses import replace
        >>> from cl.testing import toy_stream
        >>> tasks = [replace(task, val=task.test) for task in toy_stream(3)]
        >>> len(first(toy_stream(3).derive(tasks.__getitem__), 2))
        2
    """
    _check(stream, num_tasks)

    def build(t: int) -> Task:
        task = stream[t]
        if task.val is None:
            raise InputError(
                f"protocol=tune_first scores validation sets, and task {t + 1} of {stream.name!r} has none: "
                "set stream.val_fraction=0.1."
            )
        train = task.train.of_tasks(range(num_tasks))  # blended tasks hold examples of later ones
        return replace(task, train=train, test=task.val, val=None)

    return stream.derive(build, num_tasks=num_tasks)


def rest(stream: Stream, num_tasks: int) -> Stream:
    """Return a stream without its first tasks.

    Args:
        stream: The stream.
        num_tasks: Number of tasks to leave out, k, in 1..T-1.

    Raises:
        InputError: If the number is out of range.

    Example:
        >>> from cl.testing import toy_stream
        >>> rest(toy_stream(3), 1)[0].classes
        (2, 3)
    """
    _check(stream, num_tasks)

    def build(t: int) -> Task:
        own = stream[t + num_tasks].each(lambda part: part.of_tasks(range(num_tasks, len(stream))))
        return own.each(lambda part: part.renumbered(t, torch.arange(len(stream)) - num_tasks), index=t)

    return stream.derive(build, num_tasks=len(stream) - num_tasks)


def _check(stream: Stream, num_tasks: int) -> None:
    if not 1 <= num_tasks < len(stream):
        raise InputError(
            f"protocol.num_tasks={num_tasks} of the {len(stream)} tasks of {stream.name!r}: "
            f"use 1 to {len(stream) - 1} for tuning."
        )


class Protocol:
    """The protocol of tuning that a configuration's `protocol` names.

    Args:
        name: One of `PROTOCOLS`.
        num_tasks: Number of tasks for tuning, k; None for "tune_everything".
        tuned: The directory of the sweep that tuned on them, whose best values are used; or None.

    Raises:
        InputError: If there is no such protocol, or `num_tasks` is missing or superfluous.

    Example:
        >>> Protocol("tune_first", 2).remark
        'R is on the validation sets of the first 2 tasks, for tuning: not a result.'
    """

    def __init__(self, name: str, num_tasks: int | None = None, tuned: str | Path | None = None) -> None:
        if name not in PROTOCOLS:
            raise unknown("protocol", name, PROTOCOLS)
        if (num_tasks is None) != (name == "tune_everything"):
            wanted = "takes none: drop it" if num_tasks is not None else "needs the number of tasks for tuning"
            raise InputError(f"protocol.num_tasks={num_tasks}: {name} {wanted}.")
        self.name, self.num_tasks = name, num_tasks
        self.remark = _REMARKS[name].format(k=num_tasks)
        self._tuned = None if tuned is None else Path(tuned)

    def apply(self, stream: Stream) -> Stream:
        """Return the part of a stream that this run learns and scores."""
        if self.num_tasks is None:
            return stream
        return {"tune_first": first, "score_rest": rest}[self.name](stream, self.num_tasks)

    def found(self) -> dict[str, Any]:
        """Return the best values of the search, by key of the configuration; empty without a search.

        Raises:
            InputError: If the directory holds no result of a search, or the result holds other than hyper-parameters.
        """
        if self._tuned is None:
            return {}
        from omegaconf import OmegaConf

        file = self._tuned / "optimization_results.yaml"
        if not file.is_file():
            raise InputError(
                f"protocol.tuned={self._tuned} holds no {file.name}: name the directory (hydra.sweep.dir) of a "
                "finished `cl-run -m hydra/sweeper=tune protocol=tune_first ...`."
            )
        try:
            content = OmegaConf.to_container(OmegaConf.load(file))
        except Exception as error:  # from the file system, YAML or OmegaConf
            raise self._unreadable(file, " ".join(str(error).split())) from error
        values = content.get("best_params") if isinstance(content, dict) else None
        if not isinstance(values, dict):
            raise self._unreadable(file, "it holds no best_params")
        for key, value in values.items():
            if not is_hyperparameter(key) or not isinstance(value, str | int | float | bool | None):
                raise self._unreadable(
                    file,
                    f"best_params.{key}={value!r} is not the number, word, true or false of a hyper-parameter "
                    f"({', '.join(_SEARCHED)})",
                )
        return dict(values)

    def _unreadable(self, file: Path, reason: str) -> InputError:
        return InputError(
            f"protocol.tuned={self._tuned}: {file.name} cannot be used ({reason}): name the directory "
            "(hydra.sweep.dir) of a finished search, or write the values on the command line."
        )

    def budget(self) -> dict[str, float]:
        """Return the cost of the search: its trials, and their total seconds, steps and FLOPs (NaN if not counted)."""
        if self._tuned is None:
            return {}
        tables = [list(RESOURCES.read(path)) for path in sorted(self._tuned.rglob(RESOURCES.name))]
        total = {name: sum(getattr(row, name) for table in tables for row in table) for name in _COSTS}
        return {"trials": len(tables), **total}


def is_hyperparameter(key: Any) -> bool:
    """Return whether a dotted key is of a hyper-parameter, which a search may choose: no path, and no name of code.

    Example:
        >>> [is_hyperparameter(key) for key in ("optimizer.lr", "epochs", "optimizer._target_", "weights")]
        [True, True, False, False]
    """
    parts = str(key).split(".")
    return parts[0] in _SEARCHED and not any(part.startswith("_") or not part for part in parts)


# Other keys could name a file to load or code to run, so a result file that comes from elsewhere may not set them.
_SEARCHED = tuple(key for key, row in SETTINGS.items() if row.is_tuned)
_COSTS = ("seconds", "steps", "flops")
