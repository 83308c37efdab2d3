"""A head whose classes are fixed vectors, such as text features of their names: only angles to them are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.data.class_vectors import class_vectors
from cl.errors import InputError

if TYPE_CHECKING:
    from cl.data.task import Stream
    from cl.engine.strategy import LearnerLike, Strategy

Vectors = str | Mapping[str, Sequence[float]]
ORTHOGONAL = "orthogonal"
TEXT = "text"
SYNONYMS = 0.95  # the cosine from which on two classes can hardly be told apart


class LanguageHead(nn.Module):
    r"""Scaled cosines of features and a fixed unit vector for each class, (B, D) -> (B, C).

    .. math:: o_c(x) = \eta \, \cos(W_p f(x), e_c)

    The logit of a class depends on no other class. The vectors are a buffer, so that no optimizer moves them.

    Args:
        num_features: D.
        vectors: The vectors of the classes, (C, E), of any length but 0.
        eta: The scale at the start.
        learns: Whether eta is learned.
        projects: Whether W_p is there although E equals D.

    Attributes:
        projection: W_p, a linear layer without a bias; nothing if E equals D.
        rows: e, the vectors scaled to length 1, (C, E).

    Example:
        >>> head = LanguageHead(2, torch.tensor([[0.0, 2.0], [1.0, 0.0]]), eta=10.0)
        >>> [round(value, 4) for value in head(torch.tensor([[3.0, 4.0]]))[0].tolist()]
        [8.0, 6.0]
    """

    rows: Tensor

    def __init__(
        self, num_features: int, vectors: Tensor, eta: float = 1.0, learns: bool = True, projects: bool = False
    ) -> None:
        super().__init__()
        width = vectors.shape[1]
        projects = projects or width != num_features
        self.projection = nn.Linear(num_features, width, bias=False) if projects else nn.Identity()
        self.register_buffer("rows", F.normalize(vectors, dim=1))
        self.eta = nn.Parameter(torch.tensor(eta), requires_grad=learns)

    def embed(self, features: Tensor) -> Tensor:
        """Return the projected features, scaled to length 1, (B, E)."""
        return F.normalize(self.projection(features), dim=1, eps=1e-6)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (B, C) of features (B, D)."""
        logits: Tensor = self.eta * F.linear(self.embed(features), self.rows)
        return logits


def orthogonal(num_classes: int, width: int) -> Tensor:
    """Return random orthogonal unit vectors, (C, E) with E the larger of C and the width: they tell nothing of names.

    Example:
        >>> rows = orthogonal(3, 5)
        >>> rows.shape, bool(torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-5))
        (torch.Size([3, 5]), True)
    """
    columns: Tensor = torch.linalg.qr(torch.randn(max(num_classes, width), num_classes)).Q
    return columns.T.contiguous()


def use_language_head(
    learner: LearnerLike, stream: Stream, method: Strategy, vectors: Vectors, eta: float | None, learns: bool
) -> LanguageHead:
    """Put a `LanguageHead` in the place of the learner's head, and return it; for `setup`.

    On a frozen backbone it has a W_p in any case, since nothing else could point at the vectors. It starts as the
    identity if they are those of the backbone's own text tower, so that the first predictions are zero-shot ones.

    Args:
        learner: The learner.
        stream: Gives the names of the classes.
        method: The strategy that asks for it.
        vectors: A file or a mapping of names, see `cl.data.class_vectors.class_vectors`; "orthogonal"; or "text", which
            asks the backbone, a CLIP, for text features of the names.
        eta: The scale at the start; None means that of the backbone, a CLIP.
        learns: Whether it is learned.

    Raises:
        InputError: If vectors are missing or 0, the backbone has no text tower to ask, the head is already one, or
            another strategy that was set up before has state for the weights of the former head.

    Example:
        >>> from cl.engine.strategy import Strategy
        >>> from cl.testing import toy_learner
        >>> learner, stream = toy_learner()
        >>> _ = use_language_head(learner, stream, Strategy(), "orthogonal", 1.0, True)
        >>> type(learner.head).__name__, learner.head.rows.shape
        ('LanguageHead', torch.Size([6, 16]))
    """
    name = type(method).__name__
    if isinstance(learner.head, LanguageHead):
        raise InputError(f"{name} puts class vectors in the place of the head, as another strategy does: drop one.")
    _check_order(learner, method)
    width = int(learner.backbone.num_features)  # type: ignore[arg-type]
    if vectors == ORTHOGONAL:
        found = orthogonal(stream.num_classes, width)
    elif vectors == TEXT:
        found = _of_backbone(learner, "class_vectors", "vectors=text")(_names(stream))
    else:
        found = class_vectors(vectors, _names(stream))
    zero = (found.norm(dim=1) == 0).nonzero().flatten().tolist()
    if zero:
        raise InputError(f"{name}: the vector of {stream.class_names[zero[0]]!r} is 0, which has no direction.")
    frozen = not any(p.requires_grad for p in learner.backbone.parameters())
    scale = _of_backbone(learner, "eta", "eta=null") if eta is None else eta
    head = LanguageHead(width, found, scale, learns, projects=frozen)
    if vectors == TEXT and frozen:
        nn.init.eye_(head.projection.weight)  # type: ignore[arg-type]
    learner.replace_head(head)
    return head


def _of_backbone(learner: LearnerLike, name: str, setting: str) -> Any:
    found = getattr(learner.backbone, name, None)
    if found is None:
        kind = type(learner.backbone).__name__
        raise InputError(f"{setting} asks the backbone's text tower, but {kind} has none: use backbone=open_clip.")
    return found


def _names(stream: Stream) -> Sequence[str]:
    if not stream.class_names:
        raise InputError(
            f"The classes of {stream.name!r} have no names to look vectors up by: use a data set whose classes have "
            "names, or vectors=orthogonal."
        )
    return stream.class_names


def _check_order(learner: LearnerLike, method: Strategy) -> None:
    """Refuse a strategy before this one that keeps something for each weight of the head, or a copy of it."""
    head, total = list(learner.head.parameters()), sum(p.numel() for p in learner.trunk().parameters())
    shapes = {(total,), *(weight.shape for weight in head if weight.ndim > 1)}
    for name, other in learner.strategies.items():
        if other is method:
            return
        if any(isinstance(value, Tensor) and value.shape in shapes for value in other.state_dict().values()):
            raise InputError(
                f"{type(method).__name__} replaces the head, and {name} before it has state for the old one: name "
                f"{type(method).__name__.lower()} first."
            )


def nearest_pair(rows: Tensor, names: Sequence[str]) -> str:
    """Return a sentence on the two classes whose unit vectors (C, E) are nearest, and on those that are near synonyms.

    Example:
        >>> nearest_pair(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]), ["cat", "dog", "van"])
        "Of the class vectors those of 'cat' and 'dog' are nearest: cosine 0.60, distance 0.89."
    """
    if len(rows) < 2:
        return "There is one class, and no other vector to compare its own with."
    cosines = (rows @ rows.T).fill_diagonal_(-2)
    a, b = divmod(int(cosines.argmax()), len(rows))
    text = (
        f"Of the class vectors those of {names[a]!r} and {names[b]!r} are nearest: cosine {float(cosines[a, b]):.2f}, "
        f"distance {float((rows[a] - rows[b]).norm()):.2f}."
    )
    close = int((cosines > SYNONYMS).sum()) // 2
    return f"{text} Pairs above {SYNONYMS}, which can hardly be told apart: {close}." if close else text
