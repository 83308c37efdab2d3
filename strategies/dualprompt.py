r"""DualPrompt: complementary prompting (Wang et al. 2022, ECCV, section 4).

A frozen transformer is steered by prefixes: keys and values that are put in front of the attention's own in some
blocks. The general prompt g, shared by all tasks, is used in the first blocks, and the expert prompt :math:`e_t` of
task t in later ones. Each task has a key :math:`k_t`, which is pulled towards the queries q(x) of its examples, the
transformer's class tokens without prompts:

.. math:: \min_{g, e_t, k_t, \phi} \; \mathrm{CE}(f_\phi(x; g, e_t), y) \; + \; \lambda \, (1 - \cos(q(x), k_t))

The cross-entropy runs over the classes of the example's own task (the released code calls this "train_mask"). At test
an example gets the expert prompt of :math:`\arg\max_t \cos(q(x), k_t)` over the tasks begun so far; in the
task-incremental scenario, that of its own task.

Defaults: prompts of length 6 in blocks 0 and 1 and of length 20 in blocks 2 to 4, and lambda = 1, as in CODA-Prompt's
re-implementation.
Differences from the paper: a prompt of length L consists of L / 2 keys and L / 2 values, so the paper's L = 5 for g
cannot be divided. The released code has 5 keys and 5 values for both kinds, which corresponds to lengths of 10 here.
Differences from the reference code: at test the code lets a batch vote for a common expert prompt, so that a prediction
depends on the rest of the batch, and a batch of a single task reveals the task (`batch_vote=true` does so). The code
can choose the keys of tasks to come, and starts an expert prompt from that of the task before. CODA-Prompt's code has a
key for each block, and sums the loss of the keys over the batch instead of averaging it. The PyTorch port of the
released code reshapes prompts without permuting their dimensions, which mixes keys and values for half of the batch.
Replayed examples get the prompt of their own task.

State: g (G, 2, L/2, D) for G blocks; T expert prompts (E, 2, L/2, D) for E blocks, of which that of the present task is
trained; T keys (D). Scenarios: all. Refused: backbones that take no prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from cl.backbones.vit import freeze_transformer
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


class DualPrompt(Strategy):
    """Learns a prefix shared by all tasks, a prefix for each task, and a head for a frozen transformer.

    Args:
        general_length: Number of keys plus number of values of the general prompt in a block; even.
        expert_length: The same for an expert prompt; even.
        general_blocks: Blocks that get the general prompt, counted from 0.
        expert_blocks: Blocks that get the expert prompt, counted from 0.
        pull: lambda, the weight of the pull on the keys.
        batch_vote: Give all examples of a test batch the expert prompt that most of them choose.

    Raises:
        InputError: If a length is odd, the backbone takes no prefixes, or it has no block of that index.

    Example:
        >>> DualPrompt(general_blocks=(0,), expert_blocks=(0,))
        DualPrompt(general_blocks=(0,), expert_blocks=(0,))
    """

    needs = ("boundaries", "transformer")
    uses_task = True
    known: Tensor

    def __init__(
        self,
        general_length: Annotated[int, Ge(2)] = 6,
        expert_length: Annotated[int, Ge(2)] = 20,
        general_blocks: Sequence[int] = (0, 1),
        expert_blocks: Sequence[int] = (2, 3, 4),
        pull: Annotated[float, Ge(0)] = 1.0,
        batch_vote: bool = False,
    ) -> None:
        super().__init__()
        for name, length in (("general_length", general_length), ("expert_length", expert_length)):
            if length % 2:
                raise InputError(f"dualprompt.{name}={length} has no half for keys and half for values: make it even.")
        self.general_length, self.expert_length = general_length, expert_length
        self.general_blocks, self.expert_blocks = tuple(general_blocks), tuple(expert_blocks)
        self.pull, self.batch_vote = pull, batch_vote

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate prompts and keys; freeze the transformer."""
        blocks = {"general_blocks": self.general_blocks, "expert_blocks": self.expert_blocks}
        freeze_transformer("dualprompt", learner.backbone, **blocks)
        D = int(learner.backbone.num_features)  # type: ignore[arg-type]
        shape = len(self.expert_blocks), 2, self.expert_length // 2, D
        self.general = nn.Parameter(_uniform(len(self.general_blocks), 2, self.general_length // 2, D))
        self.experts = nn.ParameterList(_uniform(*shape) for _ in stream)
        self.keys = nn.ParameterList(_uniform(D) for _ in stream)
        self.register_buffer("known", torch.zeros(len(stream), dtype=torch.bool))

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Make the expert prompts and keys of the tasks in the training data trainable, and no others."""
        own = {task.index, *task.train.tasks.unique().tolist()}
        self.known[list(own)] = True
        for t, (expert, key) in enumerate(zip(self.experts, self.keys, strict=True)):
            expert.requires_grad_(t in own)
            key.requires_grad_(t in own)

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the features of each example under its prompts, (B, D)."""
        backbone = learner.backbone.eval()  # without dropout, so that an example always has the same query
        with torch.no_grad():
            query = F.normalize(backbone(view), dim=1)
        self._cosine = query @ F.normalize(torch.stack(tuple(self.keys)), dim=1).T.to(query.dtype)
        experts = torch.stack(tuple(self.experts))[self._tasks(learner, view)]  # (B, E, 2, L/2, D)
        general = self.general.expand(len(view), *self.general.shape)
        prefixes = {block: general[:, i] for i, block in enumerate(self.general_blocks)}
        for i, block in enumerate(self.expert_blocks):
            both = [prefixes[block], experts[:, i]] if block in prefixes else [experts[:, i]]
            prefixes[block] = torch.cat(both, dim=2)
        features: Tensor = backbone(view, prefixes)
        return features

    def _tasks(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the task whose expert prompt each example gets, (B,): its own if given, else by the nearest key."""
        if learner.task_labels is not None:
            return learner.task_labels
        nearest = self._cosine.masked_fill(~self.known, -2.0).argmax(1)
        return torch.bincount(nearest).argmax().expand_as(nearest) if self.batch_vote else nearest

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the cross-entropy over the classes of each example's task, plus the weighted distance of its key."""
        distance = 1 - self._cosine.gather(1, batch.task[:, None]).mean()
        return F.cross_entropy(learner.mask(logits, batch.task, "task"), batch.y) + self.pull * distance


def _uniform(*shape: int) -> Tensor:
    return torch.empty(shape).uniform_(-1, 1)
