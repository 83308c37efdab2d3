r"""Prompt gradient projection (Qiao et al. 2024, ICLR, "Prompt Gradient Projection for Continual Learning").

A partner learns prompts p that are put among the tokens x of a frozen transformer (`strategy=[l2p,pgp]`). Attention
multiplies prompts, behind linear maps, with tokens and with prompts. A step :math:`\Delta p` is orthogonal to those of
old tasks if

.. math:: x \, \Delta p^\top = 0, \qquad p \, \Delta p^\top = 0

So after each task the main directions of its tokens, then those of the prompts, are added to an orthonormal basis M, as
in GPM: the fewest with which M spans the share :math:`\epsilon` of the energy. Later gradients are kept orthogonal to
M:

.. math:: \nabla_p L \leftarrow \nabla_p L - (\nabla_p L) M M^\top

Gradients of the prompts' keys are kept orthogonal, likewise, to the main directions of the queries of old examples.

Defaults: epsilon = 0.5 for prompts and 0.97 for keys, as in the released code for L2P; 128 examples. Of the paper the
abstract was read, and the released code; the conditions above are written down from these.
Differences from the paper: it takes the directions from an element-wise sum of the two spaces, whose span need not hold
either of them; here M spans both.
Differences from the reference code: there the tables whose singular vectors are taken have a row for each of 768
sampled images, not for each of the 768 features, so that gradients are projected on directions of another space; here
they are directions of features. Energies are those of R, as in GPM, not of :math:`R R^\top`, and nothing is centred.
The code's tokens have no position embedding and no class token, its prompts are those from before the task, and at the
first task it takes one vector fewer.

State: two projectors :math:`M M^\top`, (D, D). Scenarios: those of the partner. Refused: partners other than a method,
earlier in the list, with a parameter `prompts` (..., D); its parameter `keys` (N, D) is projected if there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.random import Random
from cl.toolkit.subspace import new_directions, remark_rescaled, sampled

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


class PGP(Strategy):
    """Keeps the gradient of another method's prompts orthogonal to the main directions of old tokens and prompts.

    Args:
        threshold: epsilon of the prompts' basis, the share of energy that it covers.
        key_threshold: epsilon of the keys' basis.
        num_samples: Training examples of each task whose tokens and queries are taken.

    Raises:
        InputError: If no strategy before it in the list has prompts.

    Example:
        >>> PGP(threshold=0.9)
        PGP(threshold=0.9)
    """

    needs = ("boundaries", "transformer")
    needs_inputs = True
    directions: Tensor
    key_directions: Tensor

    def __init__(
        self,
        threshold: Annotated[float, Interval(ge=0, le=1)] = 0.5,
        key_threshold: Annotated[float, Interval(ge=0, le=1)] = 0.97,
        num_samples: Annotated[int, Ge(1)] = 128,
    ) -> None:
        super().__init__()
        self.threshold, self.key_threshold, self.num_samples = threshold, key_threshold, num_samples

    def remark(self, learner: LearnerLike) -> str | None:
        """Warn if the optimizer rescales gradients, so that steps leave the space onto which they are projected."""
        return remark_rescaled("PGP", learner)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Find the prompts, and allocate the projectors."""
        if self._partner(learner) is None:
            raise InputError(
                "PGP projects the gradient of another method's prompts, but no strategy before it has any: use "
                "'strategy=[l2p,pgp]'."
            )
        self.random = Random()
        D = int(learner.backbone.num_features)  # type: ignore[arg-type]
        self.register_buffer("directions", torch.zeros(D, D))
        self.register_buffer("key_directions", torch.zeros(D, D))

    def _partner(self, learner: LearnerLike) -> Any:
        have = (s for s in learner.strategies.values() if isinstance(getattr(s, "prompts", None), nn.Parameter))
        return next(have, None)

    def project_gradients(self, learner: LearnerLike) -> None:
        """Project the gradients of prompts and keys; before the end of the first task the basis is empty."""
        partner = self._partner(learner)
        for part, projector in (
            (partner.prompts, self.directions),
            (getattr(partner, "keys", None), self.key_directions),
        ):
            if part is not None and part.grad is not None:
                part.grad -= part.grad @ projector

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Extend the bases by the main directions of this task's tokens, of the prompts, and of its queries."""
        transformer: Any = learner.backbone
        x = sampled(learner, task, self.num_samples, self.random).x
        with learner.evaluating():
            tokens = transformer.embed(learner.prepare(x))
            queries = transformer.encode(tokens)[:, 0]
        for rows in (tokens, self._partner(learner).prompts):
            self._extend(self.directions, rows, self.threshold)
        self._extend(self.key_directions, queries, self.key_threshold)

    def _extend(self, projector: Tensor, rows: Tensor, threshold: float) -> None:
        M = new_directions(rows.flatten(0, -2).T, projector, threshold)
        projector += (M @ M.T).to(projector.dtype)
