r"""S-Prompts, the variant for images alone: S-iPrompts (Wang, Huang and Hong 2022, section 3).

Each domain t has prompts :math:`P_t` and a head :math:`h_t` of its own, which are trained on its examples only:

.. math:: \min_{P_t, h_t} \; \mathrm{CE}(h_t(f(x; P_t)), y)

The prompts are put among the tokens of a frozen transformer, and f is its class token. To tell domains apart, K centres
:math:`c_{tk}` of each are found by k-means on the features of its examples without prompts, scaled to length 1. At test
an example is assigned to the domain with the nearest centre:

.. math:: t(x) = \arg\min_t \min_k \; \lVert f(x) / \lVert f(x) \rVert - c_{tk} \rVert, \qquad \hat y = \arg\max_c
          h_{t(x)}(f(x; P_{t(x)}))_c

The prediction is among the classes of that domain; all other classes get logits below the smallest of them.

A domain's prompts start at random, or from trained ones, as in prompt transfer (Shen et al. 2022, "Multitask
Vision-Language Prompt Tuning"): those of the domain before (`init=previous`) or of the nearest (`init=nearest`). Prompt
transfer compares trained prompts, also for the target; here the source is known before training, as the domain s whose
centres are nearest to those of the new one:

.. math:: s = \arg\min_{s < t} \frac1K \sum_k \min_j \; \lVert c_{tk} - c_{sj} \rVert

Defaults: 10 tokens per prompt and K = 5, as in the released code, and its distance, the sum of absolute differences.
Differences from the paper: the paper's other variant, S-liPrompts, which has prompts for CLIP's text encoder in place
of a head, is not implemented. The centres are computed before a domain is trained instead of afterwards, which makes no
difference, since features without prompts do not change. All heads start from the same weights. Replayed examples do
not enter the loss, because domains are learned independently.
Differences from the reference code: the code clusters augmented examples; here they are not augmented. The Euclidean
distance, which the paper suggests (`norm: 2`), can assign an example to another domain than the default does.

State: T prompts (l, D), T heads, and centres (T, K, D). Scenarios: made for the domain-incremental one. In the others
each task counts as a domain; in the task-incremental one the domain is given. Refused: backbones that are not
transformers with `embed` and `encode`.
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
from cl.errors import unknown
from cl.random import Random
from cl.toolkit.by_task import check_apart
from cl.toolkit.clustering import centres

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


INIT = "random", "previous", "nearest"


def distances(features: Tensor, centres: Tensor, norm: float) -> Tensor:
    """Return the distance (B, T) of features (B, D) to the nearest of each domain's centres (T, K, D).

    Example:
        >>> f, centres = torch.tensor([[1.2, -0.1]]), torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]])
        >>> for norm in (1, 2):
        ...     print([round(float(d), 5) for d in distances(f, centres, norm)[0]])
        [1.3, 1.3]
        [1.20416, 1.11803]
    """
    exact = "donot_use_mm_for_euclid_dist"  # the faster mode rounds differently in batches of different size
    pairs = torch.cdist(features.float(), centres.flatten(0, 1).float(), p=norm, compute_mode=exact)
    nearest: Tensor = pairs.unflatten(1, centres.shape[:2]).amin(2)
    return nearest


class SPrompts(Strategy):
    """Learns prompts and a head for each domain on a frozen transformer, and infers the domain at test.

    Args:
        length: Tokens per prompt, l.
        num_centres: Centres per domain, K.
        norm: Order of the norm that measures distances: 1 for the sum of absolute differences, 2 for Euclidean.
        init: What a domain's prompts start from: "random", "previous" or "nearest".

    Raises:
        InputError: If `init` is unknown, or the backbone has no `embed` and `encode`.

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
        init: str = "random",
    ) -> None:
        super().__init__()
        if init not in INIT:
            raise unknown("init of prompts", init, INIT)
        self.length, self.num_centres, self.norm, self.init = length, num_centres, norm, init

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate prompts, heads and centres; freeze the transformer."""
        check_apart("S-Prompts", learner, stream)
        freeze_transformer("s_prompts", learner.backbone)
        T, D = len(stream), int(learner.backbone.num_features)  # type: ignore[arg-type]
        self.prompts = nn.ParameterList(torch.empty(self.length, D).uniform_(-(D**-0.5), D**-0.5) for _ in stream)
        self.heads = nn.ModuleList(deepcopy(learner.head) for _ in stream)
        learner.head.requires_grad_(False)  # the shared head is not used
        self.register_buffer("centres", torch.zeros(T, self.num_centres, D))
        self.register_buffer("known", torch.zeros(T, dtype=torch.bool))
        self.random = Random()

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Compute the domain's centres; make only its prompts, from where they start, and its head trainable."""
        with torch.no_grad(), learner.evaluating():
            loader = EvalLoader([task.train], learner.device, learner.eval_batch_size)
            features = torch.cat([self._query(learner, learner.prepare(batch.x)) for batch in loader])
        self.centres[task.index] = self._cluster(features)
        self.known[task.index] = True
        if self.init != "random" and task.index > 0:
            self.prompts[task.index].data.copy_(self.prompts[self._source(task.index)])
        for t, (prompt, head) in enumerate(zip(self.prompts, self.heads, strict=True)):
            prompt.requires_grad_(t == task.index)
            head.requires_grad_(t == task.index)

    def _source(self, task: int) -> int:
        if self.init == "previous":
            return task - 1
        return int(distances(self.centres[task], self.centres[:task], self.norm).mean(0).argmin())

    def _cluster(self, features: Tensor) -> Tensor:
        seed = int(self.random.generator.integers(2**31))
        return centres(features, self.num_centres, seed).to(self.centres)

    def _query(self, learner: LearnerLike, view: Tensor) -> Tensor:
        return F.normalize(learner.backbone(view), dim=1)

    def _nearest(self, learner: LearnerLike, view: Tensor) -> Tensor:
        with torch.no_grad():
            far = distances(self._query(learner, view).to(self.centres.dtype), self.centres, self.norm)
        return far.masked_fill(~self.known, torch.inf).argmin(1)

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the class token of each example under the prompts of its domain, (B, D)."""
        transformer: Any = learner.backbone.eval()
        given = learner.task_labels
        self._domains = self._nearest(learner, view) if given is None else given
        tokens = transformer.embed(view)
        prompts = torch.stack(tuple(self.prompts))[self._domains].to(tokens.dtype)
        output: Tensor = transformer.encode(torch.cat([tokens, prompts], dim=1))
        return output[:, 0]

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Return the logits of each example by the head of its domain, (B, C)."""
        rows = torch.arange(len(features), device=features.device)
        logits = torch.stack([head(features) for head in self.heads], dim=1)[rows, self._domains]
        own = learner.membership[self._domains]
        return torch.where(own, logits, logits.masked_fill(~own, torch.inf).amin(1, keepdim=True) - 1)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the cross-entropy of the incoming examples over the classes of their domain, a scalar."""
        n = batch.num_incoming
        return F.cross_entropy(learner.mask(logits, batch.task, "task")[:n], batch.y[:n])
