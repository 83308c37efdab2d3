r"""S-Prompts, by images alone: S-iPrompts (Wang, Huang and Hong 2022, section 3).

Each domain t has prompts :math:`P_t` and a head of its own, trained with nothing but its examples:

.. math:: \min_{P_t, h_t} \; \mathrm{CE}(h_t(f(x; P_t)), y)

where the prompts stand among a frozen transformer's tokens and f is its class token. K centres :math:`c_{tk}` tell the
domains apart, by k-means on the unit-length features of a domain's examples without prompts. At test

.. math:: t(x) = \arg\min_t \min_k \; \lVert f(x) / \lVert f(x) \rVert - c_{tk} \rVert, \qquad \hat y = \arg\max_c
          h_{t(x)}(f(x; P_{t(x)}))_c

over the classes of that domain; the others stand below the least of them.

Differences from the paper: S-liPrompts, which prompt CLIP's text encoder in place of a head, are not here. The centres
are found before a domain is trained, not after: features without prompts do not change. All heads begin with the same
weights. Replayed rows teach nothing, for domains are learned independently.
Differences from the reference code: it clusters augmented examples, here they are plain. Its distance is the sum of
absolute differences, as here by default; the Euclidean one that the paper suggests (`norm: 2`) can tell another domain.

State: T prompts (l, D), T heads, and centres (T, K, D). Made for the domain-incremental scenario; in the others a task
counts as a domain, which the task-incremental one tells. It refuses a backbone that is no transformer.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from cl.backbones.vit import freeze_transformer
from cl.engine.batch import Batch
from cl.engine.loader import EvalLoader
from cl.engine.strategy import LearnerLike, Strategy
from cl.random import Random
from cl.toolkit.by_task import check_apart

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def distances(features: Tensor, centres: Tensor, norm: float) -> Tensor:
    """Return how far features (B, D) are from the nearest of each domain's centres (T, K, D), (B, T).

    Example:
        >>> f, centres = torch.tensor([[1.2, -0.1]]), torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]])
        >>> for norm in (1, 2):
        ...     print([round(float(d), 5) for d in distances(f, centres, norm)[0]])
        [1.3, 1.3]
        [1.20416, 1.11803]
    """
    exact = "donot_use_mm_for_euclid_dist"  # of a batch's size, too
    pairs = torch.cdist(features.float(), centres.flatten(0, 1).float(), p=norm, compute_mode=exact)
    nearest: Tensor = pairs.unflatten(1, centres.shape[:2]).amin(2)
    return nearest


class SPrompts(Strategy):
    """Learns prompts and a head for each domain of a frozen transformer, and which domain an example is of.

    Args:
        length: Tokens of a prompt, l.
        num_centres: Centres of a domain, K.
        norm: Of the distance to them: 1 sums absolute differences, 2 is Euclidean.

    Raises:
        InputError: If the backbone has no `embed` and `encode`.

    Example:
        >>> SPrompts(length=5)
        SPrompts(length=5)
    """

    needs = ("boundaries", "transformer")
    uses_task = True
    centres: Tensor
    known: Tensor

    def __init__(
        self,
        length: Annotated[int, Ge(1)] = 10,
        num_centres: Annotated[int, Ge(1)] = 5,
        norm: Annotated[float, Ge(1)] = 1.0,
    ) -> None:
        super().__init__()
        self.length, self.num_centres, self.norm = length, num_centres, norm

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate prompts, heads and centres; freeze the transformer."""
        check_apart("S-Prompts", learner, stream)
        freeze_transformer("s_prompts", learner.backbone)
        T, D = len(stream), int(learner.backbone.num_features)  # type: ignore[arg-type]
        self.prompts = nn.ParameterList(torch.empty(self.length, D).uniform_(-(D**-0.5), D**-0.5) for _ in stream)
        self.heads = nn.ModuleList(deepcopy(learner.head) for _ in stream)
        learner.head.requires_grad_(False)  # which is not used
        self.register_buffer("centres", torch.zeros(T, self.num_centres, D))
        self.register_buffer("known", torch.zeros(T, dtype=torch.bool))
        self.random = Random()

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Find the domain's centres; train its prompts and head alone."""
        with torch.no_grad(), learner.evaluating():
            loader = EvalLoader([task.train], learner.device, learner.eval_batch_size)
            features = torch.cat([self._query(learner, learner.prepare(batch.x)) for batch in loader])
        self.centres[task.index] = self._cluster(features)
        self.known[task.index] = True
        for t, (prompt, head) in enumerate(zip(self.prompts, self.heads, strict=True)):
            prompt.requires_grad_(t == task.index)
            head.requires_grad_(t == task.index)

    def _cluster(self, features: Tensor) -> Tensor:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        found = min(self.num_centres, len(features))
        seed = int(self.random.generator.integers(2**31))
        with threadpool_limits(1):  # sums of several threads differ in their last bits
            centres = KMeans(found, n_init=10, random_state=seed).fit(features.float().cpu().numpy()).cluster_centers_
        return torch.from_numpy(centres).to(self.centres)[torch.arange(self.num_centres) % found]

    def _query(self, learner: LearnerLike, view: Tensor) -> Tensor:
        return F.normalize(learner.backbone(view), dim=1)

    def _nearest(self, learner: LearnerLike, view: Tensor) -> Tensor:
        with torch.no_grad():
            far = distances(self._query(learner, view).to(self.centres.dtype), self.centres, self.norm)
        return far.masked_fill(~self.known, torch.inf).argmin(1)

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the class token under the prompts of each row's domain, (B, D)."""
        transformer: Any = learner.backbone.eval()
        told = learner.task_labels
        self._domains = self._nearest(learner, view) if told is None else told
        tokens = transformer.embed(view)
        prompts = torch.stack(tuple(self.prompts))[self._domains].to(tokens.dtype)
        output: Tensor = transformer.encode(torch.cat([tokens, prompts], dim=1))
        return output[:, 0]

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Return the logits of each row's domain, (B, C)."""
        rows = torch.arange(len(features), device=features.device)
        logits = torch.stack([head(features) for head in self.heads], dim=1)[rows, self._domains]
        own = learner.membership[self._domains]
        return torch.where(own, logits, logits.masked_fill(~own, torch.inf).amin(1, keepdim=True) - 1)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the cross-entropy of the incoming rows over the classes of their domain."""
        n = batch.num_incoming
        return F.cross_entropy(learner.mask(logits, batch.task, "task")[:n], batch.y[:n])
