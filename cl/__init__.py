"""clsim: streams of tasks, strategies that learn them, and transfer matrices that can be trusted.

From Python, a whole run is::

    import cl
    from cl.sources import digits

    stream = cl.streams.split(digits(), num_tasks=5)
    run = cl.run(stream, cl.strategies.ER(memory_size=200), epochs=1, seed=0)
    run.R["class"], run.scalars()["bwt_gem"], run.plot()

Every name below is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cl import backbones as backbones
    from cl.api import load as load
    from cl.api import run as run
    from cl.compare.api import compare as compare
    from cl.data import Dataset as Dataset
    from cl.errors import InputError as InputError
    from cl.experiment import Experiment as Experiment
    from cl.instruments import Instrument as Instrument
    from cl.learner import Learner as Learner
    from cl.memory import Memory as Memory
    from cl.report import Report as Report
    from cl.result import Run as Run
    from cl.strategy import Batch as Batch
    from cl.strategy import Strategy as Strategy
    from cl.stream_checks import check_stream as check_stream
    from cl.task import Stream as Stream
    from cl.task import Task as Task
    from cl.task import TaskData as TaskData
    from cl.testing import check_strategy as check_strategy
    from cl.transfer import TransferMatrix as TransferMatrix

_PLACES = {
    **{"run": "cl.api:run", "load": "cl.api:load", "compare": "cl.compare", "Run": "cl.result:Run"},
    **{name: f"cl.task:{name}" for name in ("Stream", "Task", "TaskData")},
    **{"Dataset": "cl.data:Dataset", "Batch": "cl.strategy:Batch", "Strategy": "cl.strategy:Strategy"},
    **{"Learner": "cl.learner:Learner", "Experiment": "cl.experiment:Experiment", "Memory": "cl.memory:Memory"},
    **{"TransferMatrix": "cl.transfer:TransferMatrix", "Report": "cl.report:Report"},
    **{"Instrument": "cl.instruments:Instrument", "InputError": "cl.errors:InputError"},
    **{"check_strategy": "cl.testing:check_strategy", "check_stream": "cl.stream_checks:check_stream"},
    **{name: f"cl.{name}" for name in ("strategies", "streams", "backbones")},
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'cl' has no attribute {name!r}")
    from cl.lazy import imported

    return imported(_PLACES[name])


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
