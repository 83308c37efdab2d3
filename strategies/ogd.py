r"""Orthogonal Gradient Descent (Farajtabar et al. 2020, algorithm 1).

The output of the network on an old example moves, to first order, by the product of the step with the gradient of that
output. So, when a task ends, the gradients :math:`\nabla_\theta f_c(x)` of logits on some of its examples join an
orthonormal set S (1), and later steps are kept orthogonal to it (2):

.. math:: v \leftarrow \nabla_\theta f_c(x) - \sum_{u \in S} \langle \nabla_\theta f_c(x), u \rangle u, \quad
          S \leftarrow S \cup \{v / \lVert v \rVert\}

.. math:: \tilde g = g - \sum_{v \in S} \langle g, v \rangle v

Which logit: that of the true class ("truth", the paper's OGD-GTL), the mean of those that compete ("mean", OGD-AVE), or
each of them ("all", OGD-ALL, as many times as large).

Differences from the paper: S is found all at once, from the eigenvectors of the gradients' products in double
precision, which span what Gram and Schmidt's procedure spans; directions below 1e-5 of the largest are dropped. The
head is left out where task labels give each task outputs of its own. Authors' code: none public; in those of others
(OGD+, SketchOGD) heads are left out, too, and S is found by a QR decomposition.
State: S, (T - 1) n |theta| numbers, C times as many for "all": 0.6 GB for ten tasks of Permuted-MNIST.
Scenarios: all. Refused: optimizers but plain SGD, running statistics of batch norm, another owner of `encode`.
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
    """Return orthonormal rows (r, P), orthogonal to a basis (k, P), that span with it what it and vectors (n, P) do.

    Example:
        >>> S = orthonormal(torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        >>> S.abs().tolist()
        [[0.0, 1.0, 0.0]]
    """
    rest = vectors
    for _ in range(2):  # once more for what rounding left
        rest = rest - (rest @ basis.T) @ basis
    rest = rest.double()
    squares, mixtures = torch.linalg.eigh(rest @ rest.T)
    kept = squares > 1e-10 * vectors.square().sum(1).max()
    directions: Tensor = mixtures[:, kept].T @ rest / squares[kept].sqrt()[:, None]
    return directions.to(vectors.dtype)


def project(g: Tensor, basis: Tensor) -> Tensor:
    """Return the part of a vector (P,) that is orthogonal to orthonormal rows (k, P); zero rows count for nothing.

    Example:
        >>> project(torch.tensor([3.0, 4.0, 5.0]), torch.eye(3)[:2]).tolist()
        [0.0, 0.0, 5.0]
    """
    return g - (basis @ g) @ basis


class OGD(Strategy):
    """Keeps steps orthogonal to the gradients of old outputs.

    Args:
        num_samples: Training examples of each task whose logits' gradients are kept, n.
        logits: Of which logits: "truth", "mean" or "all".

    Raises:
        InputError: If the optimizer is not plain SGD, nothing is trainable, there is batch norm, whose statistics drift
            or which single examples cannot pass, or another strategy owns `encode`, whose outputs the gradients would
            not be of.

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
        """Allocate S, as many rows a task as it can have; refuse what leaves the protected space."""
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
        """Project the whole gradient, as one vector."""
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
        """Add the gradients of this task's logits to S, unless nobody comes after it."""
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
        """Return the gradients of sums of logits with weights (n, C), in rows (n, P)."""
        module = nn.Sequential(learner.backbone, learner.head)
        theta = {name: p.detach() for name, p in self._theta(learner).items()}

        def output(theta: dict[str, Tensor], x: Tensor, w: Tensor) -> Tensor:
            total: Tensor = (functional_call(module, theta, (x[None],))[0] * w).sum()
            return total

        with sdpa_kernel(SDPBackend.MATH):  # the attention that vmap can batch
            gradients = vmap(grad(output), in_dims=(None, 0, 0))(theta, view, weights)
        return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
