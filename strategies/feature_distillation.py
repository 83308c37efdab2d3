r"""Feature distillation: a network learns to give the features of a larger one (Romero et al. 2015, "FitNets").

For an input x with features h(x) of the student and f(x) of the teacher, which is frozen, the loss is

.. math:: L = w \cdot \Bigl(1 - \cos\bigl(A h(x) + b,\; f(x) - \bar f\bigr)\Bigr) + L_{CE}

with a linear map A, b that is trained along and not used at test (FitNets, section 2.2, equation 3, where the "hint" is
a middle layer), and the mean :math:`\bar f` of the teacher's features over the task. It is meant for making a backbone
to start from: `weights=CHECKPOINT` of a later run takes it. With `labels=false` the cross-entropy is left out, so that
only inputs are used.

The teacher sees each input once, without augmentation, and its features are kept (`cl.data.feature_rows`), while the
student sees augmented inputs, which are to have the features of the original.

Differences from the paper: the last features in place of a middle layer's; the cosine of centred features in place of
the squared distance; one phase with both losses in place of two. The paper's second phase also distils the teacher's
outputs, which a teacher for other classes does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn

from cl.backbones.blocks import blocks
from cl.backbones.efficientnet import EfficientNetLite0
from cl.backbones.frozen import FrozenBlocks
from cl.data.feature_rows import rewriter
from cl.data.task import Stream, Task
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.files import expand_path


class FeatureDistillation(Strategy):
    """Trains the backbone to give the features of a frozen teacher.

    Args:
        teacher: Builds the teacher from the shape of an input: a backbone (B, *input) -> (B, num_features). None means
            `EfficientNetLite0` at 128 pixels.
        weight: w.
        labels: Whether the cross-entropy is added.
        folder: The directory of the teacher's features; None keeps them in memory.

    Example:
        >>> from cl.backbones import MLP
        >>> FeatureDistillation(MLP, weight=2.0)
        FeatureDistillation(weight=2.0)
    """

    needs = ("boundaries",)
    needs_inputs = True

    def __init__(
        self,
        teacher: Callable[[tuple[int, ...]], nn.Module] | None = None,
        weight: Annotated[float, Gt(0)] = 10.0,
        labels: bool = True,
        folder: str | None = "runs/features",
    ) -> None:
        super().__init__()
        self.weight, self.labels, self.folder = weight, labels, folder
        self.__dict__["_build"] = teacher or partial(EfficientNetLite0, image_size=128)
        self.needs_labels = labels

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Build the teacher and the map from the student's features to its."""
        teacher = self.__dict__["_build"](stream.input_shape)
        normalize = None if getattr(teacher, "normalizes", False) else stream.normalize
        network = FrozenBlocks(teacher, len(blocks(teacher)), normalize, stream.input_shape)
        folder: Path | None = None if self.folder is None else expand_path(self.folder)
        self.__dict__["_taught"] = rewriter(network, folder)
        self.map = nn.Linear(int(learner.backbone.num_features), network.shape[0])  # type: ignore[arg-type]

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Compute the teacher's centred features of the training inputs, in their order."""
        features = self.__dict__["_taught"](task.train).tensors()[0]
        self._targets = (features - features.mean(0)).to(learner.device)

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Return the head's logits, and keep the features for the loss."""
        self._features = features
        return learner.head(features)  # type: ignore[no-any-return]

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the distance to the teacher's features on the incoming examples, and the cross-entropy on all."""
        targets = self._targets[torch.as_tensor(batch.rows, device=self._targets.device)]
        mapped = self.map(self._features[: batch.num_incoming])
        loss = self.weight * (1 - F.cosine_similarity(mapped.float(), targets)).mean()
        return loss + learner.criterion(logits, batch) if self.labels else loss
