"""clsim: continual learning on streams of tasks, measured by transfer matrices.

From Python, a whole run is::

    import cl
    from cl.data.sources import digits

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
    from cl.app.api import load as load
    from cl.app.api import run as run
    from cl.compare.comparison import compare as compare
    from cl.data.dataset import Dataset as Dataset
    from cl.data.stream_checks import check_stream as check_stream
    from cl.data.task import Stream as Stream
    from cl.data.task import Task as Task
    from cl.data.task import TaskData as TaskData
    from cl.engine.batch import Batch as Batch
    from cl.engine.experiment import Experiment as Experiment
    from cl.engine.instrument import Instrument as Instrument
    from cl.engine.learner import Learner as Learner
    from cl.engine.strategy import LearnerLike as LearnerLike
    from cl.engine.strategy import Strategy as Strategy
    from cl.errors import InputError as InputError
    from cl.metrics.scalar import scalar as scalar
    from cl.metrics.transfer import TransferMatrix as TransferMatrix
    from cl.report.contract import Report as Report
    from cl.report.evidence import Evidence as Evidence
    from cl.report.run import Run as Run
    from cl.testing import check_instrument as check_instrument
    from cl.testing import check_scalar as check_scalar
    from cl.testing import check_strategy as check_strategy
    from cl.toolkit.memory import Memory as Memory

_PLACES = {
    **{"run": "cl.app.api:run", "load": "cl.app.api:load", "compare": "cl.compare", "Run": "cl.report.run:Run"},
    **{name: f"cl.data.task:{name}" for name in ("Stream", "Task", "TaskData")},
    **{
        "Dataset": "cl.data.dataset:Dataset",
        "Batch": "cl.engine.batch:Batch",
        "Strategy": "cl.engine.strategy:Strategy",
        "LearnerLike": "cl.engine.strategy:LearnerLike",
    },
    **{
        "Learner": "cl.engine.learner:Learner",
        "Experiment": "cl.engine.experiment:Experiment",
        "Memory": "cl.toolkit.memory:Memory",
    },
    **{"TransferMatrix": "cl.metrics.transfer:TransferMatrix", "Report": "cl.report.contract:Report"},
    **{"Instrument": "cl.engine.instrument:Instrument", "InputError": "cl.errors:InputError"},
    **{"scalar": "cl.metrics.scalar:scalar", "Evidence": "cl.report.evidence:Evidence"},
    **{f"check_{kind}": f"cl.testing:check_{kind}" for kind in ("strategy", "instrument", "scalar")},
    **{"check_stream": "cl.data.stream_checks:check_stream"},
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
