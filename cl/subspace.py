"""What methods share that keep updates out of the space of old inputs: its layers, its directions, what leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD

from cl.errors import InputError
from cl.random import Random
from cl.representation import Layer, layer_inputs, trainable_layers

if TYPE_CHECKING:
    from cl.learner import Learner
    from cl.task import Task


def protected(learner: Learner) -> nn.Module:
    """Return what old tasks rest on: the backbone; the head too, unless task labels give each task outputs of its own.

    Example:
        >>> from cl.testing import toy_learner
        >>> learner, _ = toy_learner(scenario="task")
        >>> protected(learner) is learner.backbone
        True
    """
    return learner.backbone if learner.scenario == "task" else learner.trunk()


def protected_layers(learner: Learner) -> list[Layer]:
    """Return the trained layers among what is protected, which a projector each belongs to.

    Example:
        >>> from cl.testing import toy_learner
        >>> len(protected_layers(toy_learner()[0]))
        3
    """
    return trainable_layers(protected(learner))


def silence_others(learner: Learner, layers: Sequence[Layer]) -> None:
    """Take the gradient off everything protected but the weights of layers: biases, norms, embeddings."""
    weights = {layer.weight for layer in layers}
    for parameter in protected(learner).parameters():
        if parameter not in weights:
            parameter.grad = None


def sampled_inputs(learner: Learner, task: Task, num_samples: int, random: Random) -> list[Tensor]:
    """Return the representation (d, n) of each protected layer on a draw of a task's training examples.

    They are measured in evaluation mode; see `cl.representation.layer_inputs`.
    """
    rows = random.generator.choice(len(task.train), min(num_samples, len(task.train)), replace=False)
    x = task.train.take(torch.from_numpy(rows)).tensors()[0].to(learner.device)
    with learner.evaluating():
        return layer_inputs(protected_layers(learner), lambda: learner(learner.prepare(x)))


def new_directions(R: Tensor, projector: Tensor, threshold: float, fewer: int = 0) -> Tensor:
    r"""Return the fewest orthonormal directions (d, r) with which a basis M holds a share of the energy of inputs.

    From the representation R and its residual :math:`\hat R = R - M M^\top R` (Saha, Garg and Roy 2021, equation 9):

    .. math:: \lVert M M^\top R \rVert_F^2 + \sum_{i \le r} \hat\sigma_i^2 \ge \epsilon \lVert R \rVert_F^2

    Singular values come from the eigenvalues of :math:`\hat R \hat R^\top`, in double precision.

    Args:
        R: Representation (d, n).
        projector: M M^T so far, (d, d).
        threshold: epsilon, in [0, 1].
        fewer: Vectors taken off the count, for a released code's rule.

    Example:
        >>> R = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> M = torch.diag(torch.tensor([1.0, 0.0, 0.0]))
        >>> new_directions(R, M, 0.6).shape[1], new_directions(R, M, 0.7).shape[1]  # 4/6 is covered already
        (0, 1)
    """
    R, P = R.double(), projector.double()
    rest = R - P @ R
    squares, vectors = torch.linalg.eigh(rest @ rest.T)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    total = R.square().sum()
    covered = total - rest.square().sum() + torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    enough = covered >= threshold * total - 1e-9 * total
    rank = int(enough.float().argmax()) if bool(enough.any()) else len(squares)
    chosen: Tensor = vectors[:, : max(rank - fewer, 0)]
    return chosen


def one_each(key: str, value: float | Sequence[float], count: int) -> list[float]:
    """Return a setting of each layer, from one for all or one a layer.

    Raises:
        InputError: If there are too many or too few.

    Example:
        >>> one_each("gpm.threshold", 0.9, 3)
        [0.9, 0.9, 0.9]
    """
    if isinstance(value, float | int):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{key} has {len(value)} values for {count} layers: give one each.")
    return list(value)


def check_plain_sgd(learner: Learner, name: str) -> None:
    """Refuse an optimizer whose steps are not its gradients times a number.

    Weight decay and Adam leave the space that gradients were projected on, as does a momentum from before.

    Raises:
        InputError: Naming method and optimizer.
    """
    optimizer = learner.new_optimizer([nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    if type(optimizer) is not SGD or group["momentum"] or group["weight_decay"]:
        raise InputError(
            f"{name} needs plain SGD, whose steps stay where gradients are, but the optimizer is "
            f"{type(optimizer).__name__} with momentum={group.get('momentum', 0)}, weight_decay="
            f"{group.get('weight_decay', 0)}: use optimizer=sgd optimizer.momentum=0 optimizer.weight_decay=0."
        )


def check_statistics(learner: Learner, name: str) -> None:
    """Refuse batch norm that keeps running statistics, which drift whatever the gradients are.

    Raises:
        InputError: Naming method and module.
    """
    for path, module in learner.backbone.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise InputError(
                f"{name} cannot protect the running statistics of backbone.{path}: set backbone.norm=batch_no_stats."
            )
