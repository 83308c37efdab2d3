"""The configuration of a run that was built from Python objects, derived from them so that reports can compare runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from cl.data.task import Stream
from cl.engine.learner import Learner
from cl.settings import SETTINGS


def describe(learner: Learner, stream: Stream, epochs: int, backbone: Any = None, head: Any = None) -> dict[str, Any]:
    """Return a configuration of learner and stream, under the same keys as that of `cl-run`.

    An argument of a constructor is included if the object has an attribute of the same name with a plain value.

    Args:
        learner: Gives the settings of training, the strategies, network, optimizer and schedule.
        stream: Gives its name, length and order.
        epochs: Passes over a task's training data.
        backbone: The factory that built the backbone; the arguments of a `partial` are included.
        head: The factory that built the head, likewise.

    Example:
        >>> from cl.testing import toy_learner
        >>> config = describe(*toy_learner(num_tasks=2), epochs=3)
        >>> config["epochs"], config["stream"]["num_tasks"], config["optimizer"]["_target_"]
        (3, 2, 'torch.optim.sgd.SGD')
    """
    known = {"scenario", *inspect.signature(Learner).parameters}
    plain = [key for key, row in SETTINGS.items() if row.kind == "result" and row.type is not None and key in known]
    return {
        **{key: getattr(learner, key) for key in plain if hasattr(learner, key)},
        "epochs": epochs,
        "stream": {"name": stream.name, "num_tasks": len(stream), "order": list(stream.order)},
        "backbone": {**_object(learner.backbone), **_arguments(backbone)},
        "head": {**_object(learner.head), **_arguments(head)},
        "optimizer": _factory(learner._optimizer),
        "scheduler": _factory(learner._scheduler),
        "strategy": described_by_name(learner.strategies),
    }


def described_by_name(things: Mapping[str, Any] | nn.ModuleDict) -> dict[str, Any]:
    """Return the class and the plain arguments of each strategy or instrument, by name.

    Example:
        >>> from cl.engine.instrument import Instrument
        >>> described_by_name({"nothing": Instrument()})
        {'nothing': {'_target_': 'cl.engine.instrument.Instrument'}}
    """
    return {str(name): _object(thing) for name, thing in things.items()}


def _object(thing: Any) -> dict[str, Any]:
    names = [name for name in inspect.signature(type(thing)).parameters if name not in ("args", "kwargs", "self")]
    kept = {name: vars(thing)[name] for name in names if name in vars(thing)}
    return {"_target_": _name(type(thing)), **{name: value for name, value in kept.items() if _is_plain(value)}}


def _factory(thing: Any) -> dict[str, Any] | None:
    if thing is None:
        return None
    return {"_target_": _name(getattr(thing, "func", thing)), **_arguments(thing)}


def _arguments(factory: Any) -> dict[str, Any]:
    return {name: value for name, value in getattr(factory, "keywords", {}).items() if _is_plain(value)}


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, str | int | float | bool | None)
