"""Checks that an instrument or a scalar keeps its contract."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl.data.stream_checks import same
from cl.engine.experiment import Experiment
from cl.engine.instrument import HOOKS, Instrument, overrides
from cl.engine.learner import Learner
from cl.engine.strategy import misspelt
from cl.errors import InputError
from cl.metrics.scalar import AnyScalar
from cl.report.evidence import Evidence
from cl.report.run import Run
from cl.report.scalars import checked_scalars, value_of
from cl.testing.toys import Halt, Halted, Replay, reaches, toy_learner, trainer


def check_instrument(make: Callable[..., Instrument], *, ignore: Sequence[str] = (), **options: Any) -> None:
    """Check that an instrument keeps the contract; raise an AssertionError that says where it does not.

    The check runs a small stream with batch norm, dropout and a replay. No hook may change a weight, a gradient, a
    batch-norm statistic, a mode, or the state of a random generator, and R must equal, to the bit, that of a run
    without the instrument. The instrument must hold no reference to the learner, have no method with nearly the name of
    a hook, and add records that fit its columns. After a kill inside a task and a resume, it must have the records and
    matrices of a run that was not stopped.

    Args:
        make: Builds the instrument: a class or a function.
        ignore: Columns that differ between any two runs, such as seconds.
        options: Passed to `make`.

    Raises:
        AssertionError: With one sentence on what is wrong.

    Example:
        >>> check_instrument(Instrument)
    """
    name = type(make(**options)).__name__
    said = misspelt(type(make(**options)), Instrument, HOOKS)
    assert said is None, said
    plain, _ = _measure({})
    whole, learner = _measure({"checked": _guarded(make(**options))})
    instrument = whole.instruments["checked"]
    assert not reaches(instrument, learner) and learner not in list(instrument.modules()), (
        f"{name} keeps a reference to the learner: pass it, never store it."
    )
    for mask, matrix in plain.matrices.items():
        assert same(matrix.R, whole.matrices[mask].R), f"{name} changes R under the mask {mask!r}: it may only look."
    _check_records(name, instrument)
    with TemporaryDirectory() as folder:
        try:
            with suppress(Halted):
                _measure({"checked": make(**options)}, Path(folder), every=1, callbacks=[Halt()])
            resumed, _ = _measure({"checked": make(**options)}, Path(folder))
        except InputError as error:
            raise AssertionError(f"{name}: {error}") from error
    one, two = (_records(run.instruments["checked"], ignore) for run in (whole, resumed))
    assert one == two, (
        f"{name} has other records after a kill inside a task: put its state into buffers, or into get_extra_state "
        "and set_extra_state."
    )
    for mask, matrix in whole.matrices.items():
        assert same(matrix.R, resumed.matrices[mask].R), f"{name}: the matrix {mask!r} differs after a kill in a task."


def _measure(
    instruments: Mapping[str, Instrument], directory: Path | None = None, **options: Any
) -> tuple[Run, Learner]:
    learner, stream = toy_learner({"replay": Replay()}, num_tasks=2, backbone="restless", chunk_size=1)
    options = {"epochs": 2, "directory": directory, "instruments": instruments, **options}
    return Experiment(learner, stream, trainer, **options).run(), learner


def _guarded(instrument: Instrument) -> Instrument:
    """Return the instrument with hooks that check that the learner and all generators are unchanged after each call."""
    kind = type(instrument)

    def guard(hook: str) -> Callable[..., Any]:
        def guarded(self: Any, learner: Learner, *arguments: Any) -> Any:
            before = _traces(learner)
            found = getattr(kind, hook)(self, learner, *arguments)
            for (what, one), two in zip(before.items(), _traces(learner).values(), strict=True):
                assert same(one, two), f"{kind.__name__}.{hook} changes {what}: {_CAREFUL}"
            return found

        return guarded

    guards = {hook: guard(hook) for hook in HOOKS if overrides(kind, hook)}
    instrument.__class__ = type(kind.__name__, (kind,), guards)
    return instrument


_CAREFUL = "an instrument may only look, inside `cl.engine.instrument.watching(learner)` where it evaluates."


def _traces(learner: Learner) -> dict[str, Any]:
    """Return a copy of everything that an instrument must not change."""
    state = {f"the state {name}": value.clone() for name, value in learner.state_dict().items() if _is_tensor(value)}
    gradients = [p.grad.clone() for p in learner.parameters() if p.grad is not None]
    return {
        "the modes (train, eval) of modules": torch.tensor([module.training for module in learner.modules()]),
        "torch's global generator": torch.get_rng_state(),
        "Python's global generator": str(random.getstate()),
        "numpy's global generator": str(np.random.get_state()),
        "the gradients": torch.cat([g.flatten() for g in gradients]) if gradients else torch.zeros(0),
        **state,
    }


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _check_records(name: str, instrument: Any) -> None:
    records = list(instrument.records())
    assert instrument.file or not records, f"{name} has records and no `file` to write them to: name one."
    for record in records:
        fits = len(record) == len(instrument.columns) and all(isinstance(value, Real | str) for value in record)
        assert fits, f"{name} has the record {record!r}: give a number or text for each of {instrument.columns}."


def _records(instrument: Any, ignore: Sequence[str]) -> str:
    """Return the records without the ignored columns, as text, in which NaN equals NaN."""
    positions = [i for i, column in enumerate(instrument.columns) if column not in ignore]
    return str([[record[i] for i in positions] for record in instrument.records()])


def check_scalar(scalar: AnyScalar, *, instruments: Mapping[str, Instrument] | None = None) -> None:
    """Check that a scalar keeps the contract; raise an AssertionError that says where it does not.

    On a small run the scalar must be a number inside its range, be the same when computed again, and not change the
    measurements. If R is unmeasured, it must be NaN, unless it does not read R.

    Args:
        scalar: A function decorated by `cl.scalar`.
        instruments: The instruments that it needs, by name.

    Raises:
        AssertionError: With one sentence on what is wrong.

    Example:
        >>> from cl.metrics.scalar import scalar
        >>> @scalar(formula="max_j R[T,j]", source="clsim")
        ... def best(evidence):
        ...     return evidence.R[-1].max()
        >>> check_scalar(best)
    """
    try:
        checked_scalars([scalar])
        evidence = Evidence(_measure(instruments or {})[0])
        value = value_of(scalar, evidence)
    except InputError as error:
        raise AssertionError(f"{getattr(scalar, 'name', scalar)}: {error}") from error
    again = Evidence(evidence.run)
    assert same(evidence.R, again.R) and same(evidence.fair_R, again.fair_R), f"{scalar.name} changes R: copy it first."
    assert value_of(scalar, again) == value, f"{scalar.name} gives another number for the same run: draw nothing."
    for R in (again.R, again.fair_R):
        R.fill_(float("nan"))
    blank = float(scalar(again))
    assert blank != blank or blank == value, (
        f"{scalar.name} is {blank:g} where R is unmeasured: it must be NaN there, and never a number."
    )
