"""A step that is not taken: where plain SGD would lead, and what the network would say there.

For methods that replay the examples which a step on the incoming ones would harm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl.distributed import mean_gradients
from cl.errors import InputError

if TYPE_CHECKING:
    from cl.engine.batch import Batch
    from cl.engine.strategy import LearnerLike


def check_candidates(name: str, learner: LearnerLike, num_candidates: int, batch_size: int | None) -> None:
    """Refuse fewer candidates than examples to replay, of which nothing could be chosen.

    Args:
        name: The name of the method in the configuration.
        learner: With the number of incoming examples.
        num_candidates: Examples drawn in a step.
        batch_size: How many of them are replayed; None means as many as are incoming.

    Raises:
        InputError: Naming the setting.
    """
    size = batch_size or learner.batch_size
    if num_candidates < size:
        raise InputError(
            f"{name}.num_candidates={num_candidates} is less than the {size} examples to replay: raise it."
        )


def after_a_step(learner: LearnerLike, loss: Tensor, rows: int) -> dict[str, Tensor]:
    """Return the parameters, by name, after a step of plain SGD on the mean loss of some examples; keep its graph.

    Each parameter has its own present learning rate. Momentum and weight decay have no part in the step.

    Args:
        learner: With an optimizer.
        loss: The mean loss, a scalar.
        rows: Of how many examples of this process it is the mean.
    """
    rates = learner.learning_rates()
    named = [(name, p) for name, p in learner.named_parameters() if p in rates]
    own = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True, materialize_grads=True)
    steps = zip(named, mean_gradients(own, rows), strict=True)
    return {name: p.detach() - rates[p] * gradient for (name, p), gradient in steps}


@torch.no_grad()
def logits_at(learner: LearnerLike, batch: Batch, parameters: dict[str, Tensor]) -> Tensor:
    """Return the logits (B, C) of a batch under some parameters, given by name; the learner's buffers do not change.

    Classes that do not compete in training have minus infinity. The images are not augmented.
    """
    apart = {name: buffer.clone() for name, buffer in learner.trunk().named_buffers()}
    with torch.compiler.set_stance("force_eager"):
        logits = learner.with_weights({**apart, **parameters}, learner.prepare(batch.x), batch.task)
    return learner.mask(logits, batch.task, learner.train_mask)
