r"""Orthogonal Gradient Descent (Farajtabar et al. 2020, algorithm 1).

To first order, a step changes an output of the network on an old example by the product of the step with the gradient
of this output. So, when a task ends, the gradients :math:`\nabla_\theta f_c(x)` of logits on some of its examples are
added to an orthonormal set S (1), and later steps are kept orthogonal to S (2):

.. math:: v \leftarrow \nabla_\theta f_c(x) - \sum_{u \in S} \langle \nabla_\theta f_c(x), u \rangle u, \quad
          S \leftarrow S \cup \{v / \lVert v \rVert\}

.. math:: \tilde g = g - \sum_{v \in S} \langle g, v \rangle v

The logit may be that of the true class ("truth", the paper's OGD-GTL), the mean over the classes that compete ("mean",
OGD-AVE), or each of these ("all", OGD-ALL, with C times as many gradients).

Defaults: 200 examples per task and the logit of the true class, as in the paper.
Differences from the paper: all new vectors of S are computed at once, from the eigenvectors of the products of the
gradients, in double precision; they span the same space as the paper's Gram-Schmidt procedure. Directions shorter than
1e-5 of the longest gradient are dropped. The head is left out where task labels give each task outputs of its own.
Differences from the reference code: the authors released none. Other implementations (OGD+, SketchOGD) leave out heads,
too, and compute S by a QR decomposition.

State: S, (T - 1) n |theta| numbers, C times as many for "all": 0.6 GB for ten tasks of Permuted-MNIST.
Scenarios: all. Refused: optimizers other than plain SGD, batch norm, another strategy that implements `encode`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError, unknown
from cl.random import Random
from cl.toolkit.fisher import check_single
from cl.toolkit.subspace import check_plain_sgd, check_statistics, check_trained, protected, sampled
from cl.toolkit.weights import flat

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

LOGITS = ("truth", "mean", "all")


def orthonormal(vectors: Tensor, basis: Tensor) -> Tensor:
    """Return orthonormal rows (r, P) that extend an orthonormal basis (k, P) to the span of basis and vectors (n, P).

    Example:
        >>> S = orthonormal(torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        >>> S.abs().tolist()
        [[0.0, 1.0, 0.0]]
    """
    rest = vectors
    for _ in range(2):  # the second time removes what rounding has left
        rest = rest - (rest @ basis.T) @ basis
    rest = rest.double()
    squares, mixtures = torch.linalg.eigh(rest @ rest.T)
    kept = squares > 1e-10 * vectors.square().sum(1).max()
    directions: Tensor = mixtures[:, kept].T @ rest / squares[kept].sqrt()[:, None]
    return directions.to(vectors.dtype)


def project(g: Tensor, basis: Tensor) -> Tensor:
    """Return the part of a vector (P,) that is orthogonal to a basis of orthonormal rows (k, P); rows of 0 are ignored.

    Example:
        >>> project(torch.tensor([3.0, 4.0, 5.0]), torch.eye(3)[:2]).tolist()
        [0.0, 0.0, 5.0]
    """
    return g - (basis @ g) @ basis


class OGD(Strategy):
    """Keeps steps orthogonal to the gradients of logits on examples of earlier tasks.

    Args:
        num_samples: Training examples of each task whose logits' gradients are stored, n.
        logits: Which logits are differentiated: "truth", "mean" or "all".

    Raises:
        InputError: If the optimizer is not plain SGD, no weight of the backbone is trainable, there is batch norm (its
            running statistics change, and without them it cannot process single examples), or another strategy
            implements `encode`, whose outputs the gradients would ignore.

    Example:
        >>> OGD(num_samples=20)
        OGD(num_samples=20)
    """

    needs = ("boundaries", "sgd")
    basis: Tensor

    def __init__(self, num_samples: Annotated[int, Ge(1)] = 200, logits: str = "truth") -> None:
        super().__init__()
        if logits not in LOGITS:
            raise unknown("choice of logits", logits, LOGITS)
        self.num_samples, self.logits = num_samples, logits

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate S with the largest number of rows that each task can add; refuse what would break the method."""
        check_plain_sgd(learner, "OGD")
        check_statistics(learner, "OGD")
        check_single("OGD", learner, "use a backbone without batch norm")
        check_trained(learner, "OGD")
        if learner.strategies.owned("encode"):
            raise InputError(
                "OGD differentiates backbone and head, but another strategy owns encode: drop one of them."
            )
        self.random = Random()
        self.rows = self.num_samples * (stream.num_classes if self.logits == "all" else 1)
        size = sum(p.numel() for p in self._theta(learner).values())
        self.register_buffer("basis", torch.zeros((len(stream) - 1) * self.rows, size))

    def _theta(self, learner: LearnerLike) -> dict[str, nn.Parameter]:
        inside = {id(p) for p in protected(learner).parameters() if p.requires_grad}
        module = nn.Sequential(learner.backbone, learner.head)
        return {name: p for name, p in module.named_parameters() if id(p) in inside}

    def project_gradients(self, learner: LearnerLike) -> None:
        """Project the gradient of all protected parameters, taken as one vector."""
        if learner.tasks_learned == 0:
            return
        theta = list(self._theta(learner).values())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in theta]
        g = project(flat(grads), self.basis[: learner.tasks_learned * self.rows])
        for p, part in zip(theta, g.split([p.numel() for p in theta]), strict=True):
            if p.grad is not None:
                p.grad.copy_(part.view_as(p))

    @torch.no_grad()
    def after_task(self, learner: LearnerLike, task: Task) -> None:
        """Add the gradients of this task's logits to S, unless it is the last task."""
        if task.index + 1 == learner.num_tasks:
            return
        batch = sampled(learner, task, self.num_samples, self.random)
        among = learner.competing(batch.task)  # bool (n, C)
        rows, classes = torch.arange(len(batch), device=batch.y.device), batch.y
        if self.logits == "all":
            rows, classes = among.nonzero(as_tuple=True)
        weights = torch.eye(learner.num_classes, device=learner.device)[classes]
        if self.logits == "mean":
            weights = among / among.sum(1, keepdim=True)
        with learner.evaluating():
            gradients = self._gradients(learner, learner.prepare(batch.x)[rows], weights)
        start = task.index * self.rows
        new = orthonormal(gradients, self.basis[:start])
        self.basis[start : start + len(new)] = new

    def _gradients(self, learner: LearnerLike, view: Tensor, weights: Tensor) -> Tensor:
        """Return for each example the gradient of its logits' sum with weights (n, C), as rows (n, P)."""
        module = nn.Sequential(learner.backbone, learner.head)
        theta = {name: p.detach() for name, p in self._theta(learner).items()}

        def output(theta: dict[str, Tensor], x: Tensor, w: Tensor) -> Tensor:
            total: Tensor = (functional_call(module, theta, (x[None],))[0] * w).sum()
            return total

        with sdpa_kernel(SDPBackend.MATH):  # vmap supports no other kernel of attention
            gradients = vmap(grad(output), in_dims=(None, 0, 0))(theta, view, weights)
        return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
