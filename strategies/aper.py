r"""APER, adapt and merge (Zhou et al. 2024, "Revisiting Class-Incremental Learning with Pre-Trained Models").

The first task adapts the pre-trained backbone :math:`\phi` to the stream's kind of inputs: by adapters, by scale and
shift (SSF), or by training all of its weights. Then the adapted backbone :math:`\phi^*` is frozen. The features of both
are concatenated, and an example is assigned to the class whose mean has the largest cosine:

.. math:: \hat y = \arg\max_c \cos\bigl([\phi^*(x), \phi(x)], \mu_c\bigr), \qquad
          \mu_c = \frac{1}{n_c} \sum_{y_i = c} [\phi^*(x_i), \phi(x_i)]

So the features keep what pre-training knows of all classes, and gain what the first task teaches of this domain. The
method was called ADAM before.

Defaults: `adapt=adapter`, beside the MLP of each block of a transformer, with bottleneck 64 and factor 0.1 as in the
released code, which takes them from AdaptFormer (Chen et al. 2022). Other networks get one behind each block, and scale
and shift behind each linear layer, convolution and norm.
Differences from the paper, of which the abstract was read: without a first task of its own, as in `scenario=domain`,
the adaptation sees the first domain.
Differences from the released code: visual prompts, and the statistics of batch norm alone, are not among the kinds of
adaptation. There the first task is learned by a classifier of cosines, here by the head of the run. The adapters have
dropout 0.1 there, and read what the norm before an MLP reads; here they read what the MLP reads. Scale and shift start
with noise of deviation 0.02 there, and here without effect. In the code the mean of a class that comes again replaces
the old one; here the mean is over all its examples.

State: the pre-trained backbone, and the sum of features and number of examples of each class, (C, 2D) and (C, 1).
Scenarios: all.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from cl.engine.loader import EvalLoader
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import unknown
from cl.toolkit.frozen_features import add_to_sums, cosine_to_means, feature_width
from cl.toolkit.inject import ADAPTED, Adapter, ScaleShift, add, awaken, freeze, places

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

USUAL = {"adapter": ADAPTED, "ssf": (["linear", "conv", "norm"],)}


class APER(Strategy):
    """Adapts the backbone in the first task, and classifies by class means of adapted and pre-trained features.

    Args:
        adapt: What the first task trains: an "adapter" at some modules, scale and shift ("ssf") of their outputs, or
            the "full" backbone.
        width: Width of an adapter's bottleneck.
        scale: Factor of an adapter's output.
        layers: Kinds of modules: "linear", "conv", "norm", "block", or ends of names, such as "mlp" in a transformer;
            None means the defaults above.
        blocks: Blocks of the backbone whose modules are adapted, from 0; None means all.

    Raises:
        InputError: If `adapt` is unknown, the backbone has no such modules, or another strategy implements `encode`,
            whose features the means would ignore.

    Example:
        >>> APER(adapt="ssf")
        APER(adapt='ssf')
    """

    needs = ("boundaries",)
    needs_inputs = True
    total: Tensor
    count: Tensor

    def __init__(
        self,
        adapt: str = "adapter",
        width: Annotated[int, Ge(1)] = 64,
        scale: float = 0.1,
        layers: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if adapt not in (*USUAL, "full"):
            raise unknown("adaptation of APER", adapt, [*USUAL, "full"])
        self.adapt, self.width, self.scale = adapt, width, scale
        self.layers = None if layers is None else tuple(layers)
        self.blocks = None if blocks is None else tuple(blocks)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Copy the backbone, add what adapts it, and allocate the sums of features."""
        D = feature_width(learner, self)
        body = learner.backbone
        self.pretrained = deepcopy(body)
        freeze(self.pretrained)
        if self.adapt != "full":
            freeze(body)
            names = places("APER", body, USUAL[self.adapt], self.layers, self.blocks)
            example = learner.prepare(torch.zeros(1, *stream.input_shape, dtype=stream.input_dtype))
            make = ScaleShift if self.adapt == "ssf" else self._adapter
            add(body, names, [make], example, parallel=self.adapt == "adapter")
        self.register_buffer("total", torch.zeros(stream.num_classes, 2 * D))
        self.register_buffer("count", torch.zeros(stream.num_classes, 1))

    def _adapter(self, channels: int) -> Adapter:
        return Adapter(channels, self.width, self.scale)

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Freeze backbone and head from the second task on."""
        if task.index > 0:
            freeze(learner.trunk())
        elif self.adapt != "full":
            awaken(learner.backbone)

    def both(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the adapted and the pre-trained features of prepared inputs, (B, 2D)."""
        self.pretrained.eval()
        return torch.cat([learner.backbone(view), self.pretrained(view)], dim=1)

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add the features of the task's training examples to their classes' sums."""
        with learner.evaluating():
            for batch in EvalLoader([task.train], learner.device, learner.eval_batch_size):
                add_to_sums(self.total, self.count, self.both(learner, learner.prepare(batch.x)), batch.y)

    def predict(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the cosine to every class mean, (B, C); that to a class without a mean is -1."""
        return cosine_to_means(self.both(learner, view), self.total, self.count)
