r"""ZSCL (Zheng et al. 2023): fine-tuning of vision-language models that keeps their zero-shot predictions.

A network of two towers classifies by the cosines of images and class names, also for classes that it has not been
trained on (zero-shot), which fine-tuning destroys. Let S be the scaled cosines of reference images and texts,
:math:`S_0` those of the initial network, both (B, C), and T a temperature. A task is learned with

.. math:: L = \mathrm{CE}(o(x), y) + \alpha \, D(S_0, S) + \beta \, D(S_0^\top, S^\top)
          + \lambda \lVert \theta - \theta_{t-1} \rVert^2, \qquad
          D(A, B) = - \frac{T^2}{n} \sum_{i=1}^{n} \sum_j \mathrm{softmax}(A_i / T)_j \log \mathrm{softmax}(B_i / T)_j

in which n counts the rows: with :math:`\alpha` the texts that fit an image, with :math:`\beta` the images of the batch
that fit a text. :math:`\theta_{t-1}` are the weights at the start of the task. After the first step, and every N steps
from there, the weights are averaged, and a task ends with the average, in which its start counts once:

.. math:: \bar\theta \leftarrow \frac{k \bar\theta + \theta}{k + 1}, \qquad k \leftarrow k + 1, \qquad k_0 = 1

The image tower is the backbone, with a projection if the widths differ. The text tower is fixed, and stands in
`vectors`, as in `lingocl`: a vector for each class by its name, from a file or a mapping; "text", from the text tower
of `backbone=open_clip`; or "orthogonal", a control. The start is a trained network, such as that backbone, or from
`weights=FILE`; that gives the backbone alone, so its features should have the length of the vectors, since a projection
would start at random. Reference images are the inputs of `reference`, a data set; else a task's unlabelled examples;
else the incoming inputs.

Defaults: those of the released code for tasks of different data sets (multi-domain): alpha = beta = lambda = 1, T = 2,
N = 100, labels smoothed by 0.2, and CLIP's scale eta = 100, which is not learned. Its code for class-incremental
learning has alpha = beta = 5 and N = 10.
Differences from the paper, as far as the released code shows it: the text tower is not trained, and its vectors of all
classes of the stream are the reference texts, in place of captions. Reference images are drawn with replacement.
Statistics of batch norm are not averaged: the method is for networks without it. In several processes the
distributions over reference images are over those of one process.

State: copies of the network as it was at the very start and at the start of the task, and the average, each as large as
the network. The reference data are extra data, which a comparison should mention. Scenarios: all. Refused: another
strategy that implements `encode` or `criterion`, and a reference of another shape or type than the inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from cl.data.dataset import Dataset
from cl.data.task import TaskData
from cl.distributed import share
from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.random import Random
from cl.toolkit.language_head import ORTHOGONAL, Vectors, use_language_head
from cl.toolkit.teacher import Teacher
from cl.toolkit.weights import flat, write

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def softened(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return D, T^2 times the cross-entropy of softened rows of the teacher and the student, a scalar.

    Example:
        >>> round(float(softened(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), 2.0)), 6)
        2.772589
    """
    return temperature**2 * F.cross_entropy(student / temperature, (teacher / temperature).softmax(1))


def smoothed(logits: Tensor, y: Tensor, share: float) -> Tensor:
    """Return the cross-entropy with a share of each label spread over the classes whose logit is above minus infinity.

    Example:
        >>> round(float(smoothed(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([0]), 0.5)), 4)
        0.6931
    """
    log_p, among = logits.log_softmax(1), logits > -torch.inf
    spread = log_p.masked_fill(~among, 0.0).sum(1) / among.sum(1)
    return -((1 - share) * log_p.gather(1, y[:, None])[:, 0] + share * spread).mean()


class ZSCL(Strategy):
    """Fine-tunes a network of images and class names, and keeps its zero-shot predictions on reference data.

    Args:
        vectors: The text tower: a file or mapping with a vector for each class by its name; "text", that of the
            backbone, a CLIP; or "orthogonal", a control.
        eta: The scale of the cosines; None means that of the backbone, a CLIP.
        image: alpha, the weight of the distillation over the texts of an image.
        text: beta, the weight of the distillation over the images of a text.
        temperature: T.
        weight: lambda, of the squared distance from the weights at the start of the task.
        every: N, steps between two weights that are averaged.
        smoothing: The share of a label that is spread over the competing classes.
        reference: A data set whose training inputs are the reference images.
        batch_size: Reference images in a step; None means as many as incoming examples.

    Raises:
        InputError: If vectors are missing, or the reference does not fit the inputs.

    Example:
        >>> ZSCL("clip.npz", image=5.0, text=5.0, every=10)
        ZSCL(vectors='clip.npz', image=5.0, text=5.0, every=10)
    """

    needs = ("boundaries",)
    needs_inputs = True
    anchor: Tensor
    average: Tensor
    count: Tensor

    def __init__(
        self,
        vectors: Vectors = ORTHOGONAL,
        eta: Annotated[float, Gt(0)] | None = 100.0,
        image: Annotated[float, Ge(0)] = 1.0,
        text: Annotated[float, Ge(0)] = 1.0,
        temperature: Annotated[float, Gt(0)] = 2.0,
        weight: Annotated[float, Ge(0)] = 1.0,
        every: Annotated[int, Ge(1)] = 100,
        smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.2,
        reference: Dataset | None = None,
        batch_size: Annotated[int, Ge(1)] | None = None,
    ) -> None:
        super().__init__()
        self.vectors, self.eta, self.image, self.text, self.temperature = vectors, eta, image, text, temperature
        self.weight, self.every, self.smoothing = weight, every, smoothing
        self.reference, self.batch_size = reference, batch_size

    def remark(self, learner: LearnerLike) -> str | None:
        """Say where reference data are missing."""
        if self.reference is not None:
            return f"ZSCL learns from {len(self.reference.train_x)} reference inputs besides those of the stream."
        return "ZSCL has no zscl.reference: it distils on the unlabelled inputs of a task, else on the incoming ones."

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Put the text tower in the place of the head, and allocate the copies."""
        x = None if self.reference is None else self.reference.train_x
        if x is not None and (tuple(x.shape[1:]) != stream.input_shape or x.dtype != stream.input_dtype):
            raise InputError(
                f"zscl.reference has inputs {tuple(x.shape[1:])} of {x.dtype}, but those of {stream.name!r} are "
                f"{stream.input_shape} of {stream.input_dtype}: choose another data set, or change its images."
            )
        use_language_head(learner, stream, self, self.vectors, self.eta, learns=False)
        self.teacher, self.random = Teacher(learner, "ZSCL"), Random(by_rank=True)
        theta = flat(list(learner.trunk().parameters())).detach()
        self.register_buffer("anchor", theta.clone())
        self.register_buffer("average", theta.clone())
        self.register_buffer("count", torch.ones((), dtype=torch.int64))

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Copy the initial network once, and the weights at the start of each task; choose the reference data."""
        if learner.tasks_learned == 0:
            self.teacher.copy_from(learner)
        for copy in (self.anchor, self.average):
            copy.copy_(flat(list(learner.trunk().parameters())).detach())
        self.count.fill_(1)
        data = task.unlabelled
        if self.reference is not None:
            data = TaskData(self.reference.train_x, self.reference.train_y)
        self._data = None if data is None else data.on(learner.device)

    def criterion(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor:
        """Return the cross-entropy with smoothed labels, a scalar."""
        return smoothed(learner.mask(logits, batch.task, learner.train_mask), batch.y, self.smoothing)

    def loss(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> Tensor | None:
        """Return both distillations and the distance from the start of the task, a scalar."""
        view = self._view(learner, batch)
        taught, found = self.teacher(view), learner.head(learner.backbone(view))
        far = (flat(list(learner.trunk().parameters())) - self.anchor).square().sum()
        image, text = (softened(*pair, self.temperature) for pair in ((found, taught), (found.T, taught.T)))
        return self.image * image + self.text * text + self.weight * far

    def _view(self, learner: LearnerLike, batch: Batch) -> Tensor:
        """Return the reference inputs of a step, prepared."""
        if self._data is None:
            assert batch.view is not None
            return batch.view[: batch.num_incoming]
        size = batch.num_incoming if self.batch_size is None else share("zscl.batch_size", self.batch_size)
        rows = torch.from_numpy(self.random.generator.integers(len(self._data), size=size))
        x = self._data.take(rows.to(self._data.y.device)).tensors()[0]
        return learner.prepare(x.to(learner.device))

    @torch.no_grad()
    def after_step(self, learner: LearnerLike, batch: Batch, logits: Tensor) -> None:
        """Average the weights of the first step and of every N-th from there."""
        if (learner.step - 1) % self.every == 0:
            theta = flat(list(learner.trunk().parameters()))
            self.average.add_((theta - self.average) / (self.count + 1))
            self.count.add_(1)

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """End the task with the average."""
        write(learner.trunk().parameters(), self.average)
