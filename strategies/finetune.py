"""Fine-tuning: each task is learned with nothing done against forgetting; the lower bound of every table.

The loss is the cross-entropy over the classes that compete in the scenario: all classes seen so far
(class-incremental), those of the task (task-incremental), or all classes (domain-incremental).
"""

from __future__ import annotations

from cl.engine.strategy import Strategy


class Finetune(Strategy):
    """Trains on each task in turn; overrides no hook.

    Example:
        >>> Finetune()
        Finetune()
    """

    targets = ("label", "multilabel", "regression")
    bound = "lower"
