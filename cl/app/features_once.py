"""Run the frozen part of a backbone once for each input, instead of once for each time the input is used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from cl.backbones.blocks import blocks
from cl.backbones.frozen import is_fixed
from cl.data.rows import Items
from cl.data.task import Stream
from cl.engine.instrument import Instrument
from cl.engine.learner import Learner
from cl.errors import InputError

_log = logging.getLogger(__name__)

Make = Callable[[int], tuple[Learner, Stream]]


def features_once(make: Make, instruments: Mapping[str, Instrument] | None = None) -> tuple[Learner, Stream]:
    """Return a learner and its stream, which holds the outputs of the frozen blocks in place of inputs if it can.

    It can if the first blocks of the backbone are frozen and in evaluation mode, nothing augments inputs, and no
    strategy or instrument uses inputs or those blocks by itself. Results are the same up to rounding.

    Args:
        make: Builds a new learner and the stream that it learns, of which the outputs of so many blocks take the place
            of the inputs; for 0, of none.
        instruments: The instruments of the run.
    """
    learner, stream = make(0)
    depth = frozen_depth(learner, stream, instruments)
    if depth == 0:
        return learner, stream
    try:
        short, rows = make(depth)
    except InputError:  # a strategy that needs inputs, or blocks, of another kind than features
        return learner, stream
    if frozen_depth(short, rows, instruments) < depth:
        return learner, stream
    number = len(blocks(short.backbone))
    part = "" if depth == number else f" up to block {depth} of {number},"
    _log.info("%s is frozen%s and run once for each input.", type(short.backbone).__name__, part)
    return short, rows


def frozen_depth(learner: Learner, stream: Stream, instruments: Mapping[str, Instrument] | None = None) -> int:
    """Return how many of the first blocks of a learner's backbone are a fixed function of each input; see above."""
    users = [*learner.strategies.values(), *(instruments or {}).values()]
    if learner.strategies.owned("encode") or any(user.needs_inputs for user in users):
        return 0
    depth = weights = 0
    for block in blocks(learner.backbone):
        if not is_fixed(block):
            break
        depth, weights = depth + 1, weights + sum(1 for _ in block.parameters())
    if not weights:
        return 0
    sets = [part for task in stream for part in (task.train, task.val, task.test, task.unlabelled) if part is not None]
    if any(isinstance(part.x, Items) for part in sets):  # drawn anew at each reading
        return 0
    if learner.augment is not None and any(p.requires_grad for p in learner.parameters()):
        _log.info(
            "The frozen backbone runs on each augmented input anew; dataset.augment=null lets it run once for each."
        )
        return 0
    return depth
