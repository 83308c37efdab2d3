r"""The diagonal of the Fisher information of a classifier, by its estimators.

.. math:: F_i = \mathbb{E}_x \, \mathbb{E}_{y} (\partial \log p_\theta(y|x) / \partial \theta_i)^2

"true": y over the model's own p(y|x), summed; "sampled": one y drawn from it; "empirical": the labels of the data,
which gives no Fisher information where the model does not fit them (Kunstner, Balles and Hennig 2019). The square of
the mean gradient of b examples, in place of single gradients, is about b times smaller. Van de Ven (2025, "On the
Computation of the Fisher Information in Continual Learning") compares them as EXACT, SAMPLE, EMPIRICAL and BATCHED.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl.errors import InputError, unknown
from cl.loader import depends_on_batch
from cl.random import Random
from cl.weights import flat

if TYPE_CHECKING:
    from cl.learner import Learner
    from cl.task import Stream, Task

FISHERS = ("true", "sampled", "empirical")
_HELD_AT_ONCE = 2**24  # numbers of gradients of single examples


def gradient_sum(
    module: nn.Module,
    of: Callable[..., Tensor],
    shape: Callable[[Tensor], Tensor],
    x: Tensor,
    rows: Tensor,
    weights: Tensor,
    *columns: Tensor,
) -> Tensor:
    r"""Return :math:`\sum_k w_k \, h(g_k)` over the gradients of a scalar at single examples, as one vector.

    Args:
        module: Inputs (B, ...) to outputs; its trainable parameters are what is derived by.
        of: The scalar of the outputs (b, ...) and of a row of each column.
        shape: h, element by element.
        x: Inputs (n, ...).
        rows: Which b inputs each gradient is of, (m, b); b is 1 for single examples.
        weights: w, (m,).
        columns: What `of` knows beside the outputs, (m, ...) each.

    Example:
        >>> w, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, -2.0], [-3.0, 4.0]])
        >>> gradient_sum(w, torch.sum, torch.abs, x, torch.tensor([[1], [0]]), torch.tensor([1.0, 10.0]))
        tensor([13., 24.])
    """
    theta = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def scalar(theta: dict[str, Tensor], some: Tensor, *column: Tensor) -> Tensor:
        return of(functional_call(module, theta, (some,)), *column)

    size = sum(p.numel() for p in theta.values())
    total = torch.zeros(size, device=x.device)
    chunk = max(1, _HELD_AT_ONCE // size)
    for some, w, *parts in zip(*(column.split(chunk) for column in (rows, weights, *columns)), strict=True):
        with sdpa_kernel(SDPBackend.MATH):  # the attention that vmap can batch
            gradients = vmap(grad(scalar), in_dims=(None, 0, *(0 for _ in parts)))(theta, x[some], *parts)
        total += flat([w @ shape(g.reshape(len(w), -1).float()) for g in gradients.values()])
    return total


def diagonal_fisher(
    module: nn.Module,
    x: Tensor,
    classes: Tensor,
    weights: Tensor | None = None,
    batch_size: int = 1,
    target: str = "label",
) -> Tensor:
    r"""Return :math:`F_i = \mathbb{E}_x \sum_y w(y|x) (\partial \log p(y|x) / \partial \theta_i)^2` as one vector.

    Args:
        module: Inputs (B, ...) to logits (B, C); its trainable parameters are theta.
        x: Inputs (n, ...).
        classes: The classes that compete, (K,).
        weights: w(y|x), (n, K); None means the model's own p(y|x), which gives the true Fisher.
        batch_size: b > 1 squares the mean gradient of b examples instead, n // b times; each needs one label.
        target: "label"; or "multilabel" (independent Bernoulli outputs) or "regression" (Gaussian ones of variance 1),
            whose Fisher is :math:`\mathbb{E}_x \sum_c v_c (\partial z_c / \partial \theta_i)^2` with
            :math:`v_c = \sigma(z_c)(1 - \sigma(z_c))`, or 1.

    Example:
        >>> w = nn.Linear(1, 2, bias=False)
        >>> _ = w.weight.data.copy_(torch.tensor([[0.0], [3.0]]).log().div(2).nan_to_num(neginf=0.0))
        >>> F = diagonal_fisher(w, torch.tensor([[2.0]]), torch.tensor([0, 1]))
        >>> [round(float(f), 4) for f in F]  # p = .75, so .75 * .25 * x^2
        [0.75, 0.75]
    """

    def log_p(outputs: Tensor, y: Tensor) -> Tensor:
        z = outputs[:, classes].float()
        mean: Tensor = (z.log_softmax(1) if target == "label" else z).gather(1, y[:, None]).mean()
        return mean

    if weights is None:
        with torch.no_grad():
            weights = _own_weights(_logits(module, x)[:, classes].float(), target)
    batch_size = min(batch_size, len(x))
    whole = len(x) // batch_size * batch_size
    rows, y = (column.view(-1, batch_size) for column in weights[:whole].nonzero(as_tuple=True))
    total = gradient_sum(module, log_p, torch.square, x, rows, weights[rows, y].mean(1), y)
    return total / (whole // batch_size)


def _logits(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([module(part) for part in x.split(256)])


def _own_weights(z: Tensor, target: str) -> Tensor:
    """Return what each output's squared gradient counts in the true Fisher, (n, K)."""
    if target == "label":
        return z.softmax(1)
    return z.sigmoid() * (-z).sigmoid() if target == "multilabel" else torch.ones_like(z)


def label_weights(kind: str, module: nn.Module, x: Tensor, y: Tensor, classes: Tensor, random: Random) -> Tensor | None:
    """Return the weights w(y|x) of an estimator for `diagonal_fisher`, (n, K); None for the true Fisher.

    Args:
        kind: "true", "sampled" or "empirical".
        module: Inputs to logits (B, C).
        x: Inputs (n, ...).
        y: Labels in the data, (n,).
        classes: The classes that compete, (K,).
        random: Draws the labels of "sampled".

    Example:
        >>> y, classes = torch.tensor([3, 2]), torch.tensor([2, 3])
        >>> label_weights("empirical", nn.Identity(), torch.zeros(2, 4), y, classes, Random())
        tensor([[0., 1.],
                [1., 0.]])
    """
    if kind == "true":
        return None
    if kind == "sampled":
        with torch.no_grad():
            p = _logits(module, x)[:, classes].softmax(1).cumsum(1)
        draw = torch.from_numpy(random.generator.random((len(x), 1))).to(p)
        y = classes[(p < draw).sum(1).clamp_max(len(classes) - 1)]
    return (y[:, None] == classes).float()


def sampled_inputs(learner: Learner, task: Task, num_samples: int | None, random: Random) -> tuple[Tensor, Tensor]:
    """Return a draw of a task's training examples, prepared and not augmented, with their labels; None: all."""
    data = task.train
    if num_samples is not None and num_samples < len(data):
        rows = random.generator.choice(len(data), num_samples, replace=False)
        data = data.take(torch.from_numpy(rows))
    x, y, _ = (column.to(learner.device) for column in data.tensors())
    return learner.prepare(x), y


def task_fisher(
    learner: Learner, task: Task, kind: str, num_samples: int | None, batch_size: int, random: Random
) -> Tensor:
    """Return the diagonal Fisher of backbone and head on a draw of a task's training examples, as one vector.

    The classes are those that compete in training; the network is in evaluation mode. See `diagonal_fisher`.
    """
    module, classes = nn.Sequential(learner.backbone, learner.head), learner.competing(task)
    view, y = sampled_inputs(learner, task, num_samples, random)
    with learner.evaluating():
        weights = label_weights(kind, module, view, y, classes, random)
        return diagonal_fisher(module, view, classes, weights, batch_size, learner.target.name)


def check_single(name: str, learner: Learner, remedy: str) -> None:
    """Refuse gradients of single examples where each output depends on the rest of its batch.

    Raises:
        InputError: If the backbone has batch norm without running statistics, which single rows crash or change.
    """
    if depends_on_batch(learner.backbone):
        raise InputError(
            f"{name} derives outputs of single examples, and {type(learner.backbone).__name__} normalises each by the "
            f"rest of its batch: {remedy}."
        )


def check_fisher(kind: str, batch_size: int) -> None:
    """Refuse an estimator that does not exist.

    Raises:
        InputError: If the kind is unknown, or batches are asked of the true Fisher, whose examples have many labels.
    """
    if kind not in FISHERS:
        raise unknown("kind of Fisher", kind, FISHERS)
    if batch_size < 1:
        raise InputError(f"The Fisher's batch_size={batch_size} must be 1 or more.")
    if kind == "true" and batch_size > 1:
        raise InputError(f"The Fisher's batch_size={batch_size} needs one label an example: empirical or sampled.")


def check_labels(owner: str, kind: str, stream: Stream) -> None:
    """Refuse an estimator that draws labels where the stream's targets are others.

    Raises:
        InputError: Naming both.
    """
    if stream.target.name != "label" and kind != "true":
        raise InputError(f"{owner}.fisher={kind} draws one label, but {stream.name!r} has others: use fisher=true.")
