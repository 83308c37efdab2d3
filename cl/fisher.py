r"""The diagonal of the Fisher information of a classifier, by its estimators.

.. math:: F_i = \mathbb{E}_x \, \mathbb{E}_{y} (\partial \log p_\theta(y|x) / \partial \theta_i)^2

"true": y over the model's own p(y|x), summed; "sampled": one y drawn from it; "empirical": the labels of the data,
which gives no Fisher information where the model does not fit them (Kunstner, Balles and Hennig 2019). The square of
the mean gradient of b examples, in place of single gradients, is about b times smaller. Van de Ven (2025, "On the
Computation of the Fisher Information in Continual Learning") compares them as EXACT, SAMPLE, EMPIRICAL and BATCHED.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl.errors import InputError, unknown
from cl.random import Random

FISHERS = ("true", "sampled", "empirical")
_HELD_AT_ONCE = 2**24  # numbers of gradients of single examples


def flat(tensors: list[Tensor]) -> Tensor:
    """Return tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


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
    theta = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def log_p(theta: dict[str, Tensor], some: Tensor, y: Tensor) -> Tensor:
        z = functional_call(module, theta, (some,))[:, classes].float()
        mean: Tensor = (z.log_softmax(1) if target == "label" else z).gather(1, y[:, None]).mean()
        return mean

    if weights is None:
        with torch.no_grad():
            weights = _own_weights(module(x)[:, classes].float(), target)
    batch_size = min(batch_size, len(x))
    whole = len(x) // batch_size * batch_size
    pairs = [column.view(-1, batch_size) for column in weights[:whole].nonzero(as_tuple=True)]
    size = sum(p.numel() for p in theta.values())
    total = torch.zeros(size, device=x.device)
    chunk = max(1, _HELD_AT_ONCE // size)
    for e, y in zip(*(column.split(chunk) for column in pairs), strict=True):
        with sdpa_kernel(SDPBackend.MATH):  # the attention that vmap can batch
            gradients = vmap(grad(log_p), in_dims=(None, 0, 0))(theta, x[e], y)
        share = weights[e, y].mean(1)
        total += flat([share @ g.reshape(len(e), -1).float().square() for g in gradients.values()])
    return total / (whole // batch_size)


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
            p = module(x)[:, classes].softmax(1).cumsum(1)
        draw = torch.from_numpy(random.generator.random((len(x), 1))).to(p)
        y = classes[(p < draw).sum(1).clamp_max(len(classes) - 1)]
    return (y[:, None] == classes).float()


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
