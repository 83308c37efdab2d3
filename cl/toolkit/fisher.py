r"""Estimators of the diagonal of a classifier's Fisher information.

.. math:: F_i = \mathbb{E}_x \, \mathbb{E}_{y} (\partial \log p_\theta(y|x) / \partial \theta_i)^2

The expectation over y is, for "true", a sum over the model's own p(y|x); for "sampled", one draw from it; for
"empirical", the label in the data, which does not give Fisher information if the model does not fit the labels
(Kunstner, Balles and Hennig 2019). The squared mean gradient of b examples, instead of the mean of squared gradients of
single examples, is about b times smaller. Van de Ven (2025, "On the Computation of the Fisher Information in Continual
Learning") compares these as EXACT, SAMPLE, EMPIRICAL and BATCHED.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl.backbones.blocks import depends_on_batch
from cl.errors import InputError, unknown
from cl.random import Random
from cl.toolkit.weights import flat

if TYPE_CHECKING:
    from cl.data.task import Stream, Task
    from cl.engine.strategy import LearnerLike

FISHERS = ("true", "sampled", "empirical")
_HELD_AT_ONCE = 2**24  # most numbers in the gradients of single examples that are stored at a time
_ROWS_AT_ONCE = 256  # examples in a pass for linear layers, whose gradients are not stored


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
        module: Maps inputs (B, ...) to outputs. Gradients are with respect to its trainable parameters.
        of: Maps the outputs (b, ...) and one row of each of the `columns` to the scalar.
        shape: The elementwise function h, the square or the absolute value, for which h(a b) = h(a) h(b).
        x: Inputs (n, ...).
        rows: The b inputs that each of the m gradients is of, int64 (m, b); b is 1 for single examples.
        weights: The weights w, (m,).
        columns: Further arguments of `of`, (m, ...) each.

    Example:
        >>> w, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, -2.0], [-3.0, 4.0]])
        >>> gradient_sum(w, torch.sum, torch.abs, x, torch.tensor([[1], [0]]), torch.tensor([1.0, 10.0]))
        tensor([13., 24.])
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = _of_linear_layers(module, of, shape, x[rows[:, 0]], weights, columns) if rows.shape[1] == 1 else {}
    theta = {name: p.detach() for name, p in trained.items() if name not in found}
    if theta:
        found |= _one_by_one(module, theta, of, shape, x, rows, weights, columns)
    return flat([found[name] for name in trained])


def _one_by_one(
    module: nn.Module,
    theta: dict[str, Tensor],
    of: Callable[..., Tensor],
    shape: Callable[[Tensor], Tensor],
    x: Tensor,
    rows: Tensor,
    weights: Tensor,
    columns: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Return the sums by the names of parameters, computed from the gradients of single examples."""
    others = {name: p.detach() for name, p in module.named_parameters() if name not in theta}

    def scalar(theta: dict[str, Tensor], some: Tensor, *column: Tensor) -> Tensor:
        return of(functional_call(module, {**others, **theta}, (some,)), *column)

    totals = {name: torch.zeros(p.numel(), device=x.device) for name, p in theta.items()}
    chunk = max(1, _HELD_AT_ONCE // sum(p.numel() for p in theta.values()))
    for some, w, *parts in zip(*(column.split(chunk) for column in (rows, weights, *columns)), strict=True):
        with sdpa_kernel(SDPBackend.MATH):  # the only attention that vmap can batch
            gradients = vmap(grad(scalar), in_dims=(None, 0, *(0 for _ in parts)))(theta, x[some], *parts)
        for name, g in gradients.items():
            totals[name] += w @ shape(g.reshape(len(w), -1).float())
    return totals


def _of_linear_layers(
    module: nn.Module,
    of: Callable[..., Tensor],
    shape: Callable[[Tensor], Tensor],
    x: Tensor,
    weights: Tensor,
    columns: Sequence[Tensor],
) -> dict[str, Tensor]:
    r"""Return the sums for linear layers in closed form, by the names of their parameters.

    The gradient of a layer's weight at one example is :math:`\delta a^\top`, where a is the layer's input and
    :math:`\delta` the gradient with respect to its output. As :math:`h(\delta_i a_j) = h(\delta_i) h(a_j)` for squares
    and absolute values, the sum is one matrix product, :math:`\sum_k w_k \, h(\delta_k) h(a_k)^\top`, and no gradient
    of a single example is stored.
    """
    seen: list[tuple[str, Tensor, Tensor]] = []

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append((name, shape(inputs[0].detach().float()), output))
        return output.clone()  # the next layer may change it in place

    layers = {name: m for name, m in module.named_modules() if type(m).forward is nn.Linear.forward}
    totals: dict[str, Tensor] = {}
    for some, w, *parts in zip(*(column.split(_ROWS_AT_ONCE) for column in (x, weights, *columns)), strict=True):
        seen.clear()
        with ExitStack() as hooks, torch.enable_grad():
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_hook(partial(watch, name)).remove)
            value = vmap(of)(module(some)[:, None], *parts).sum()
        names = [name for name, _, _ in seen]
        once = [one for one in seen if names.count(one[0]) == 1 and one[1].ndim == 2 and len(one[1]) == len(some)]
        once = [one for one in once if one[2].requires_grad]
        if not once:
            return {}
        deltas = torch.autograd.grad(
            value, [output for _, _, output in once], allow_unused=True, materialize_grads=True
        )
        for (name, a, _), delta in zip(once, deltas, strict=True):
            d = w[:, None] * shape(delta.float())
            layer, prefix = layers[name], f"{name}." if name else ""
            for key, value in (("weight", (d.T @ a).flatten()), ("bias", d.sum(0))):
                own = getattr(layer, key)
                if own is not None and own.requires_grad:
                    totals[prefix + key] = totals.get(prefix + key, 0) + value
    return totals


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
        module: Maps inputs (B, ...) to logits (B, C); theta are its trainable parameters.
        x: Inputs (n, ...).
        classes: The classes that compete, (K,); or the classes that compete for each example, bool (n, C), and then
            K = C below.
        weights: w(y|x), (n, K); None means the model's own p(y|x), which gives the true Fisher.
        batch_size: Number b of examples whose mean gradient is squared; the expectation is then over n // b batches,
            and each example needs one label. 1 squares the gradients of single examples.
        target: "label"; "multilabel", independent Bernoulli outputs; or "regression", Gaussian outputs of variance 1.
            The Fisher of the last two is :math:`\mathbb{E}_x \sum_c v_c (\partial z_c / \partial \theta_i)^2` with
            :math:`v_c = \sigma(z_c)(1 - \sigma(z_c))` for "multilabel" and 1 for "regression".

    Example:
        >>> w = nn.Linear(1, 2, bias=False)
        >>> _ = w.weight.data.copy_(torch.tensor([[0.0], [3.0]]).log().div(2).nan_to_num(neginf=0.0))
        >>> F = diagonal_fisher(w, torch.tensor([[2.0]]), torch.tensor([0, 1]))
        >>> [round(float(f), 4) for f in F]  # p = .75, so .75 * .25 * x^2
        [0.75, 0.75]
    """

    def log_p(outputs: Tensor, y: Tensor, *among: Tensor) -> Tensor:
        z = _competing(outputs, classes, *among)
        mean: Tensor = (z.log_softmax(1) if target == "label" else z).gather(1, y[:, None]).mean()
        return mean

    if weights is None:
        with torch.no_grad():
            weights = _own_weights(_competing(_logits(module, x), classes, classes), target)
    batch_size = min(batch_size, len(x))
    whole = len(x) // batch_size * batch_size
    rows, y = (column.view(-1, batch_size) for column in weights[:whole].nonzero(as_tuple=True))
    among = (classes[rows],) if classes.dtype == torch.bool else ()
    total = gradient_sum(module, log_p, torch.square, x, rows, weights[rows, y].mean(1), y, *among)
    return total / (whole // batch_size)


def _competing(logits: Tensor, classes: Tensor, among: Tensor | None = None) -> Tensor:
    """Return the logits of competing classes: the columns of `classes`, or all with the others at minus infinity."""
    if classes.dtype != torch.bool:
        return logits[:, classes].float()
    assert among is not None
    return torch.where(among, logits.float(), -torch.inf)


def _logits(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([module(part) for part in x.split(256)])


def _own_weights(z: Tensor, target: str) -> Tensor:
    """Return the weight of each output's squared gradient in the true Fisher, (n, K)."""
    if target == "label":
        return z.softmax(1)
    return z.sigmoid() * (-z).sigmoid() if target == "multilabel" else (z > -torch.inf).float()


def label_weights(kind: str, module: nn.Module, x: Tensor, y: Tensor, classes: Tensor, random: Random) -> Tensor | None:
    """Return the weights w(y|x) of an estimator for `diagonal_fisher`, (n, K); None for the true Fisher.

    Args:
        kind: "true", "sampled" or "empirical".
        module: Maps inputs to logits (B, C).
        x: Inputs (n, ...).
        y: Labels in the data, (n,).
        classes: The classes that compete, (K,), or those that compete for each example, bool (n, C).
        random: The generator that draws the labels of "sampled".

    Example:
        >>> y, classes = torch.tensor([3, 2]), torch.tensor([2, 3])
        >>> label_weights("empirical", nn.Identity(), torch.zeros(2, 4), y, classes, Random())
        tensor([[0., 1.],
                [1., 0.]])
    """
    if kind == "true":
        return None
    own = classes.dtype == torch.bool
    if kind == "sampled":
        with torch.no_grad():
            p = _competing(_logits(module, x), classes, classes).softmax(1)
        draw = torch.from_numpy(random.generator.random((len(x), 1))).to(p)
        position = (p.cumsum(1) <= draw).sum(1)
        last = (p > 0).long().mul_(torch.arange(p.shape[1], device=p.device)).amax(1)  # if rounding leads past the end
        y = torch.minimum(position, last) if own else classes[torch.minimum(position, last)]
    return (y[:, None] == (torch.arange(classes.shape[1], device=y.device) if own else classes)).float()


def sampled_inputs(
    learner: LearnerLike, task: Task, num_samples: int | None, random: Random
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a random sample of a task's training examples, normalised but not augmented.

    Returns:
        Inputs (n, ...), labels (n,), and the classes that compete for each example in training, bool (n, C), which
        differ if the examples of a task come from several tasks.
    """
    data = task.train
    if num_samples is not None and num_samples < len(data):
        rows = random.generator.choice(len(data), num_samples, replace=False)
        data = data.take(torch.from_numpy(rows))
    x, y, labels = (column.to(learner.device) for column in data.tensors())
    return learner.prepare(x), y, learner.competing(labels)


def task_fisher(
    learner: LearnerLike, task: Task, kind: str, num_samples: int | None, batch_size: int, random: Random
) -> Tensor:
    """Return the diagonal Fisher of backbone and head on a sample of a task's training examples, as one vector.

    The classes of each example are those that compete in training; the network is in evaluation mode. See
    `diagonal_fisher`.

    Args:
        learner: The learner.
        task: The task.
        kind: "true", "sampled" or "empirical".
        num_samples: Number of examples; None takes all.
        batch_size: See `diagonal_fisher`.
        random: The generator that draws examples, and the labels of "sampled".
    """
    module = nn.Sequential(learner.backbone, learner.head)
    view, y, classes = sampled_inputs(learner, task, num_samples, random)
    with learner.evaluating():
        weights = label_weights(kind, module, view, y, classes, random)
        return diagonal_fisher(module, view, classes, weights, batch_size, learner.target.name)


def check_single(name: str, learner: LearnerLike, remedy: str) -> None:
    """Refuse a backbone whose outputs depend on the rest of the batch, for gradients of single examples.

    Raises:
        InputError: If the backbone has batch norm without running statistics, which fails on, or changes with, single
            examples.
    """
    if depends_on_batch(learner.backbone):
        raise InputError(
            f"{name} needs gradients of single examples, but {type(learner.backbone).__name__} normalises each by the "
            f"rest of its batch: {remedy}."
        )


def check_fisher(kind: str, batch_size: int) -> None:
    """Refuse an unknown estimator, or a batch size that it does not allow.

    Raises:
        InputError: If the kind is unknown, or `batch_size` is above 1 for the true Fisher, which sums over many labels.
    """
    if kind not in FISHERS:
        raise unknown("kind of Fisher", kind, FISHERS)
    if batch_size < 1:
        raise InputError(f"The Fisher's batch_size={batch_size} must be 1 or more.")
    if kind == "true" and batch_size > 1:
        raise InputError(
            f"The Fisher's batch_size={batch_size} needs one label for each example: use empirical or sampled."
        )


def check_labels(owner: str, kind: str, stream: Stream) -> None:
    """Refuse an estimator that needs single labels on a stream with other targets.

    Raises:
        InputError: If they do not fit; names both.
    """
    if stream.target.name != "label" and kind != "true":
        raise InputError(f"{owner}.fisher={kind} needs labels, but {stream.name!r} has other targets: use fisher=true.")
