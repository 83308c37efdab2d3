r"""GDumb, greedy sampler and dumb learner (Prabhu, Torr and Dokania 2020, section 3, algorithm 1).

The stream only fills a memory, in which classes are kept in balance: while there is room, everything is stored; then an
example of a class with fewer exemplars than the largest evicts a random one of a largest class. The network is trained
from its initial weights on the memory alone, whenever its predictions are wanted: here after every task. So nothing
is transferred from task to task, and R says how good a memory of that size can be.

Optionally pairs of a batch are mixed by CutMix (Yun et al. 2019, equation 1): a box of the partner's pixels stands in
the image, and of its area the share 1 - s in the loss,

.. math:: L = s \, \mathrm{CE}(f(\tilde x), y) + (1 - s) \, \mathrm{CE}(f(\tilde x), y'), \quad
          s \sim \mathrm{Beta}(\alpha, \alpha)

`epochs` are passes over the memory, whose length the configuration of the run gives, as it does optimizer, schedule
(`scheduler=warm_restarts`) and clipping; `strategy=gdumb` sets them as the reference code does.

Differences from the paper: a mixed batch has a forward pass of its own beside the plain one, whose loss it replaces.
Differences from the reference code: its memory is not filled greedily but holds the first examples of every class of
the stream; its schedule begins with an epoch at a tenth of the learning rate; and it reports the best epoch by test
accuracy, where here the last one counts. Mammoth mixes every batch and trains after the last task alone.

State: the memory, M rows; the initial weights, once the network's size. A task's rows are read once, 4096 at a time,
and the memory is copied once a task to be trained on. Scenarios: all; where tasks share classes (domain-incremental)
it is the classes of each task that are in balance. Refuses targets other than labels; CutMix refuses inputs that are
no images.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from cl.data.task import TaskData
from cl.distributed import from_first, gathered, own
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.random import Random
from cl.toolkit.memory import Memory

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def mix(view: Tensor, alpha: float, rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
    """Put a box of another image of the batch into each, the same box in all.

    Returns:
        The mixed images (B, C, H, W), the partners' places (B,), and each image's own share of its pixels.

    Example:
        >>> view = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 4, 4)
        >>> mixed, partner, share = mix(view, 1.0, np.random.default_rng(3))
        >>> partner.tolist(), share, float((mixed == view).float().mean())
        ([1, 0], 0.875, 0.875)
    """
    height, width = view.shape[-2:]
    cut = np.sqrt(1 - rng.beta(alpha, alpha)) / 2
    centre = rng.integers([height, width])
    half = (np.array([height, width]) * cut).astype(int)
    (top, left), (bottom, right) = np.maximum(centre - half, 0), np.minimum(centre + half, [height, width])
    partner = torch.from_numpy(rng.permutation(len(view))).to(view.device, non_blocking=True)
    mixed = view.clone()
    mixed[..., top:bottom, left:right] = view[partner][..., top:bottom, left:right]
    return mixed, partner, 1 - float((bottom - top) * (right - left)) / (height * width)


class GDumb(Strategy):
    """Fills a balanced memory, and trains anew on it alone.

    Args:
        memory_size: Exemplars in all.
        cutmix: Probability that a batch is mixed.
        alpha: Of the beta distribution of a mixture's shares.
        storage: Where the exemplars lie: on the "device", on the "host", or on "disk".

    Raises:
        InputError: If inputs that are no images are to be mixed.

    Example:
        >>> GDumb(memory_size=20)
        GDumb(memory_size=20)
    """

    needs = ("memory", "boundaries")

    def __init__(
        self,
        memory_size: Annotated[int, Ge(1)] = 500,
        cutmix: Annotated[float, Interval(ge=0, le=1)] = 0.0,
        alpha: Annotated[float, Gt(0)] = 1.0,
        storage: str = "device",
    ) -> None:
        super().__init__()
        self.memory_size, self.cutmix, self.alpha, self.storage = memory_size, cutmix, alpha, storage

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory; keep the initial weights."""
        if self.cutmix and len(stream.input_shape) != 3:
            raise InputError(f"gdumb.cutmix={self.cutmix} mixes images, but inputs are {stream.input_shape}: set it 0.")
        self.memory = Memory(self.memory_size, stream, policy="class_balanced", storage=self.storage)
        self.initial = deepcopy(learner.trunk()).requires_grad_(False)
        self.random = Random(by_rank=True)

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Return to the initial weights."""
        learner.trunk().load_state_dict(self.initial.state_dict())
        learner.forget_optimizer()

    def training_data(self, learner: LearnerLike, task: Task) -> TaskData:
        """Offer the task's rows to the memory, in random order, and return what it holds then."""
        order = from_first(lambda: self.memory.random.generator.permutation(len(task.train)))
        for some in torch.from_numpy(order)[own(len(order))].split(4096):  # a task may stay in its file
            x, y, label = (column.to(learner.device) for column in task.train.take(some).tensors())
            self.memory.insert(Batch(x, y, label))
        held = self.memory.rows()
        x, y, label = gathered([held.x, held.y, held.task])
        return TaskData(x, y, label)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the loss of the batch, or in its place that of its mixture."""
        if not self.cutmix or self.random.generator.random() >= self.cutmix:
            return learner.criterion(logits, batch)
        assert batch.view is not None
        mixed, partner, share = mix(batch.view, self.alpha, self.random.generator)
        logits = learner(mixed, batch.task)
        return share * learner.criterion(logits, batch) + (1 - share) * learner.criterion(logits, batch.take(partner))
