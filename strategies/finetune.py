"""Fine-tuning: each task is learned with nothing done against forgetting; the lower bound of every table.

The loss is the cross-entropy over the classes that compete in the scenario (class-incremental: all seen so far).
"""

from __future__ import annotations

from cl.engine.strategy import Strategy


class Finetune(Strategy):
    """Plain training: overrides no hook.

    Example:
        >>> Finetune()
        Finetune()
    """

    targets = ("label", "multilabel", "regression")
    bound = "lower"
