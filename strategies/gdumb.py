r"""GDumb, greedy sampler and dumb learner (Prabhu, Torr and Dokania 2020, section 3, algorithm 1).

The stream is used only to fill a memory whose classes are kept in balance: while there is room, every example is
stored; after that, an example of a class that has fewer exemplars than the largest class replaces a random exemplar of
a largest class. Whenever predictions are needed (here after every task), the network is trained on the memory alone,
from its initial weights. So nothing is transferred from task to task, and R shows how good a memory of this size can
be.

Optionally, pairs of images of a batch are mixed by CutMix (Yun et al. 2019, equation 1): a box in the image is filled
with the partner's pixels, and the share of the box in the area, 1 - s, is the weight of the partner's label:

.. math:: L = s \, \mathrm{CE}(f(\tilde x), y) + (1 - s) \, \mathrm{CE}(f(\tilde x), y'), \quad
          s \sim \mathrm{Beta}(\alpha, \alpha)

`epochs` counts passes over the memory. It is set by the run, as are optimizer, schedule (`scheduler=warm_restarts`) and
gradient clipping; `strategy=gdumb` sets them as the reference code does.

Defaults: 500 exemplars as in one of the paper's MNIST experiments; no CutMix, as there (0.5 on its other data).
Differences from the paper: a mixed batch has a second forward pass, whose loss replaces that of the plain batch.
Differences from the reference code: the code does not fill its memory greedily but stores the first examples of every
class of the stream; its schedule begins with an epoch at a tenth of the learning rate; and it reports the best epoch by
test accuracy, where here the last epoch counts. Mammoth mixes every batch and trains after the last task alone.

State: the memory, M examples, and the initial weights, as many as the network has. The examples of a task are read
once, 4096 at a time, and the memory is copied once per task to be trained on. Scenarios: all; in the domain-incremental
one, where tasks share classes, the balance is between the classes of each task. Refused: targets other than single
labels, and inputs that are not images together with CutMix.
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
    """Fill a box in each image with the pixels of another image of the batch; all images have the same box.

    Args:
        view: Images, (B, C, H, W).
        alpha: Parameter of the beta distribution of s.
        rng: Generator for the box and the partners.

    Returns:
        The mixed images (B, C, H, W), the indices of the partners (B,), and the share s of pixels that are left.

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
    """Fills a memory with balanced classes, and trains from the initial weights on the memory alone.

    Args:
        memory_size: Total number of exemplars, M.
        cutmix: Probability that CutMix is applied to a batch.
        alpha: Parameter of the beta distribution of the share s.
        storage: Where the exemplars are stored: on the "device", on the "host" or on "disk".

    Raises:
        InputError: If CutMix is used and the inputs are not images.

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

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]
        """Whether CutMix mixes them."""
        return self.cutmix > 0

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the memory, and copy the initial weights."""
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
        """Offer the task's examples to the memory in random order, and return all that it then stores."""
        order = from_first(lambda: self.memory.random.generator.permutation(len(task.train)))
        for some in torch.from_numpy(order)[own(len(order))].split(4096):  # in parts: a task may be memory-mapped
            x, y, label = (column.to(learner.device) for column in task.train.take(some).tensors())
            self.memory.insert(Batch(x, y, label))
        held = self.memory.rows()
        x, y, label = gathered([held.x, held.y, held.task])
        return TaskData(x, y, label)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the loss of the batch or, with probability `cutmix`, the loss of the mixed batch instead."""
        if not self.cutmix or self.random.generator.random() >= self.cutmix:
            return learner.criterion(logits, batch)
        assert batch.view is not None
        mixed, partner, share = mix(batch.view, self.alpha, self.random.generator)
        logits = learner(mixed, batch.task)
        return share * learner.criterion(logits, batch) + (1 - share) * learner.criterion(logits, batch.take(partner))
