r"""The kinds of targets of a network's outputs: one label for each example, several labels, or numbers.

=============  ========================  ==========================================  ======================
target         y                         loss, over the outputs that compete         entries of R
=============  ========================  ==========================================  ======================
"label"        int64 (N,)                cross-entropy of the softmax                accuracy
"multilabel"   float32 (N, C) of 0, 1    mean binary cross-entropy of the sigmoid    mAP, CF1, OF1
"regression"   float32 (N, K)            mean squared error                          R2
=============  ========================  ==========================================  ======================
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from cl.errors import InputError


def classes_of(y: Tensor) -> tuple[int, ...]:
    """Return the classes that occur in targets, ascending: the labels of (N,), or the columns of (N, C) that are not 0.

    Example:
        >>> classes_of(torch.tensor([3, 1, 3])), classes_of(torch.tensor([[0.0, 1.0, 1.0]]))
        ((1, 3), (1, 2))
    """
    found = torch.unique(y) if y.ndim == 1 else (y != 0).any(0).nonzero().flatten()
    return tuple(found.tolist())


class Target(ABC):
    """A kind of target: its loss, its metrics, and the values that it allows.

    Attributes:
        name: "label", "multilabel" or "regression".
        metrics: The names of its metrics; R holds the first.
    """

    name: str
    metrics: tuple[str, ...]

    def row(self, num_outputs: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and the type of one example's target."""
        return (num_outputs,), torch.float32

    @abstractmethod
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of logits (B, C), in which outputs that do not compete are minus infinity."""

    @abstractmethod
    def scores(self, logits: Tensor, y: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return each metric on the examples of one task: logits (N, C), targets y, and the task's classes (K,)."""

    @abstractmethod
    def check(self, what: str, y: Tensor, num_outputs: int) -> None:
        """Raise an InputError if targets y are not of this kind; `what` is their name in the error."""


class Label(Target):
    """One class for each example.

    Example:
        >>> Label().loss(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([1])).exp().item()
        2.0
    """

    name, metrics = "label", ("accuracy",)

    def row(self, num_outputs: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and the type of a label."""
        return (), torch.int64

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the cross-entropy over the classes that compete."""
        return F.cross_entropy(logits, y)

    def scores(self, logits: Tensor, y: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return the accuracy."""
        return {"accuracy": (logits.argmax(1) == y).double().mean()}

    def check(self, what: str, y: Tensor, num_outputs: int) -> None:
        """Raise an InputError if labels are not int64 (N,) or not in 0..`num_outputs` - 1."""
        if y.ndim != 1 or y.dtype != torch.int64:
            raise InputError(
                f"{what} has labels of {y.dtype} and shape {tuple(y.shape)}: give int64 (N,), or say "
                "target=multilabel or target=regression."
            )
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= num_outputs:
            bad = low if low < 0 else high
            raise InputError(f"{what} has label {bad}, outside 0..{num_outputs - 1}: fix it or num_classes.")


class _Vector(Target):
    """Targets with one column for each output."""

    def check(self, what: str, y: Tensor, num_outputs: int) -> None:
        if y.ndim != 2 or y.dtype != torch.float32 or y.shape[1] != num_outputs:
            raise InputError(
                f"{what} has targets of {y.dtype} and shape {tuple(y.shape)}: target={self.name} needs float32 "
                f"(N, {num_outputs})."
            )
        bad = ~self._valid(y).all(1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise InputError(f"{what} has the target {y[row].tolist()} in row {row}: {self._rule}.")

    _rule: str

    @abstractmethod
    def _valid(self, y: Tensor) -> Tensor: ...


class MultiLabel(_Vector):
    """Any number of classes for each example.

    mAP is the mean over the task's classes of the average precision, the step-wise area under the curve of precision
    over recall. CF1 and OF1 are 2PR/(P+R), where a class is predicted if sigmoid(logit) > 1/2: CF1 takes the means over
    classes of precision P and recall R, OF1 takes P and R of all decisions together (Wang et al. 2016, "CNN-RNN",
    section 4). A class without a positive test example is left out of means over classes.

    Example:
        >>> y = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> {k: v.item() for k, v in MultiLabel().scores(4 * y - 2, y, torch.tensor([0, 1])).items()}
        {'mAP': 1.0, 'CF1': 1.0, 'OF1': 1.0}
    """

    name, metrics = "multilabel", ("mAP", "CF1", "OF1")
    _rule = "give 0 or 1"

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the mean over examples and competing classes of the binary cross-entropy."""
        competes = logits != -torch.inf
        terms = F.binary_cross_entropy_with_logits(logits.where(competes, 0.0), y, reduction="none")
        return (terms * competes).sum() / competes.sum().clamp_min(1)

    def scores(self, logits: Tensor, y: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return mAP, CF1 and OF1."""
        z, truth = logits[:, classes].double(), y[:, classes] > 0
        some = truth.any(0)
        precise = torch.stack([_average_precision(*column) for column in zip(z.T, truth.T, strict=True)])
        predicted = z > 0
        hits, positives, given = ((a.double().sum(0)) for a in (predicted & truth, truth, predicted))
        per_class = _f1((hits / given.clamp_min(1))[some].mean(), (hits / positives.clamp_min(1))[some].mean())
        overall = _f1(hits.sum() / given.sum().clamp_min(1), hits.sum() / positives.sum())
        return {"mAP": precise.nanmean(), "CF1": per_class, "OF1": overall}

    def _valid(self, y: Tensor) -> Tensor:
        return (y == 0) | (y == 1)


def _average_precision(z: Tensor, truth: Tensor) -> Tensor:
    """Return the step-wise area under precision over recall, one step a distinct score; NaN without a positive."""
    rank = torch.unique(-z, return_inverse=True)[1]  # ranks of logits, since the sigmoid of large ones is equal
    hits, rows = torch.bincount(rank, truth.double()), torch.bincount(rank)
    return (hits * hits.cumsum(0) / rows.cumsum(0)).sum() / hits.sum()


def _f1(precision: Tensor, recall: Tensor) -> Tensor:
    return 2 * precision * recall / (precision + recall).clamp_min(1e-300)


class Regression(_Vector):
    """One number for each output.

    R2 = 1 - sum (y - f)^2 / sum (y - mean y)^2 for predictions f, averaged over the outputs whose test targets vary. It
    is at most 1, and 0 for a prediction that is the mean of the test targets.

    Example:
        >>> y = torch.tensor([[0.0], [2.0]])
        >>> Regression().scores(torch.tensor([[0.0], [1.0]]), y, torch.tensor([0]))["R2"].item()
        0.5
    """

    name, metrics = "regression", ("R2",)
    _rule = "give finite numbers"

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the mean squared error."""
        return F.mse_loss(logits, y)

    def scores(self, logits: Tensor, y: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return R2."""
        z, truth = logits.double(), y.double()
        wrong, spread = (truth - z).square().sum(0), (truth - truth.mean(0)).square().sum(0)
        return {"R2": torch.where(spread > 0, 1 - wrong / spread, torch.nan).nanmean()}

    def _valid(self, y: Tensor) -> Tensor:
        return y.isfinite()


TARGETS: dict[str, Target] = {target.name: target for target in (Label(), MultiLabel(), Regression())}
