"""Checks for authors of strategies, streams, instruments and scalars, and small streams and runs to try things on."""

from cl.data.stream_checks import check_stream
from cl.testing.instrument_checks import check_instrument, check_scalar
from cl.testing.strategy_checks import check_strategy
from cl.testing.toys import ToyBackbone, toy_learner, toy_run, toy_stream

__all__ = [
    "ToyBackbone",
    "check_instrument",
    "check_scalar",
    "check_strategy",
    "check_stream",
    "toy_learner",
    "toy_run",
    "toy_stream",
]
