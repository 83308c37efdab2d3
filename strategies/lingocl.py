r"""LingoCL (Ni et al. 2024, "Enhancing visual continual learning with language-guided supervision").

The head is not learned. Each class is a fixed vector :math:`e_c`, the text features of its name, in the place of a row
of random weights, and the backbone learns to point at it:

.. math:: o_c(x) = \eta \, \cos(W_p f(x), e_c)

with the cross-entropy, and whatever a base method adds. :math:`W_p` is learned; it is there if the features f(x) and
the vectors differ in length, or the backbone is frozen. Rows of old classes cannot drift, and new classes come at a
known angle to old ones. All rows are there from the beginning, and the logits of old classes do not depend on them.

The head is put in the place of the configured one, so that methods that hold weights (EWC) or distil outputs (LwF) work
on :math:`W_p` and on these logits: `strategy=[lingocl,lwf]`, with lingocl first.

`vectors` is a file of names and vectors (`cl.data.class_vectors.class_vectors`), a mapping such as that of
`cl.data.class_vectors.hierarchy`; "text", from the text tower of `backbone=open_clip`; or "orthogonal": random
directions, the control that has the fixed head without the language, to be run beside every result. A remark names the
two classes whose vectors are nearest.

Defaults: eta is learned in the first task from 1/0.07, the usual scale of CLIP, and fixed after it. With eta = 1 the
cross-entropy of an example that points at its orthogonal class is still 3.62 with 100 classes, and 1.46 with 10.
Published, from the abstract (arXiv 2403.16124): 3.2 to 6.1 points more accuracy on ImageNet-100, class-incremental, on
top of base methods.
Differences from the paper, of which the abstract was read: the scale is not stated there.
Differences from reference code: none of the authors' was found. A re-implementation by others learns eta from 1 through
all tasks (`eta=1 learn_eta=always`), and does not scale the features to length 1.

State: the vectors, C x E, eta, and W_p, E x D. Scenarios: all. Refused: classes without a name or a vector; methods
that compare features with the weights of a linear head, such as lucir and pcr.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import unknown
from cl.toolkit.language_head import ORTHOGONAL, Vectors, nearest_pair, use_language_head

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

LEARN_ETA = ("first", "always", "never")


class LingoCL(Strategy):
    """Learns features that point at fixed vectors of the classes, such as text features of their names.

    Args:
        vectors: A file or a mapping with a vector for each class by its name; "text", which asks the backbone, a CLIP;
            or "orthogonal", the control.
        eta: The scale of the cosines at the start; None means that of the backbone, a CLIP.
        learn_eta: Whether it is learned in the "first" task, "always" or "never".

    Raises:
        InputError: If vectors are missing, `learn_eta` is unknown, or a strategy before this one has state for the head
            that it replaces.

    Example:
        >>> LingoCL("glove.txt", eta=10.0)
        LingoCL(vectors='glove.txt', eta=10.0)
    """

    needs = ("boundaries",)

    def __init__(
        self, vectors: Vectors = ORTHOGONAL, eta: Annotated[float, Gt(0)] | None = 1 / 0.07, learn_eta: str = "first"
    ) -> None:
        super().__init__()
        if learn_eta not in LEARN_ETA:
            raise unknown("time to learn eta", learn_eta, LEARN_ETA)
        self.vectors, self.eta, self.learn_eta = vectors, eta, learn_eta

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Put the fixed vectors in the place of the head."""
        use_language_head(learner, stream, self, self.vectors, self.eta, self.learn_eta != "never")
        self._names = stream.class_names

    def remark(self, learner: LearnerLike) -> str | None:
        """Say which vectors are nearest, or that they are the control."""
        if self.vectors == ORTHOGONAL:
            return "LingoCL's class vectors are random and orthogonal, the control: set lingocl.vectors to a file."
        return nearest_pair(learner.head.rows, self._names)  # type: ignore[arg-type]

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Say whether eta is still learned."""
        self._fixed = self.learn_eta == "never" or (self.learn_eta == "first" and learner.tasks_learned > 0)

    def project_gradients(self, learner: LearnerLike) -> None:
        """Remove the gradient of eta once it is fixed, so that no optimizer moves it."""
        if self._fixed:
            learner.head.eta.grad = None

    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Record eta."""
        learner.record("lingocl/eta", learner.head.eta)  # type: ignore[arg-type]
