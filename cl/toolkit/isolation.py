"""What methods share that give each task a subnetwork: its weights, rows and outputs, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from cl.errors import InputError
from cl.toolkit.by_task import check_apart
from cl.toolkit.subspace import check_statistics

if TYPE_CHECKING:
    from cl.data.task import Stream
    from cl.engine.strategy import LearnerLike, Strategy


def layer_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of linear layers and convolutions by their names, without biases and norms.

    Example:
        >>> list(layer_weights(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Conv2d(1, 1, 3))))
        ['0.weight', '2.weight']
    """
    layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return {f"{name}.weight".lstrip("."): m.weight for name, m in layers.items()}


def by_row(values: Tensor, like: Tensor) -> Tensor:
    """Return one value a row, so that it is broadcast over another tensor's rows.

    Example:
        >>> by_row(torch.tensor([1.0, 2.0]), torch.zeros(2, 3, 4)).shape
        torch.Size([2, 1, 1])
    """
    return values.view(-1, *(1 for _ in like.shape[1:]))


def chained_layers(backbone: nn.Module, input_shape: tuple[int, ...]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the linear layers and convolutions of a backbone by name, each of which is fed by the one before it.

    Whether they are a chain is tried out: where the weights of one are 0, features must not depend on the input.

    Raises:
        InputError: If a path leads past a layer, there are norms, whose scale would undo a gate's, or a layer does not
            take the units of the one before, or these in blocks of the same size.

    Example:
        >>> list(chained_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), (2,)))
        ['0', '2']
    """
    calls: list[str] = []
    layers = {name: m for name, m in backbone.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    hooks = [m.register_forward_hook(lambda *_, name=n: calls.append(name)) for n, m in layers.items()]
    x = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        backbone(x)
    for hook in hooks:
        hook.remove()
    norms = [name for name, m in backbone.named_modules() if isinstance(m, _NormBase | nn.GroupNorm | nn.LayerNorm)]
    sizes = [(layers[name].weight.shape[0], layers[name].weight.shape[1]) for name in calls]
    fits = all(after[1] % before[0] == 0 for before, after in pairwise(sizes))
    if norms or sorted(calls) != sorted(layers) or not fits or not all(_closes(backbone, n, x) for n in calls):
        raise InputError(
            f"{type(backbone).__name__} is no chain of layers without norms, whose units could be gated: use "
            "backbone=mlp, simple_cnn, or alexnet_gpm with backbone.norm=false."
        )
    return {name: layers[name] for name in calls}


def _closes(backbone: nn.Module, layer: str, x: Tensor) -> bool:
    closed = {f"{layer}.weight": torch.zeros_like(backbone.get_submodule(layer).weight)}  # type: ignore[arg-type]
    with torch.no_grad():
        one, other = functional_call(backbone, closed, (x,))
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-6))  # rounding depends on a row's place in its batch


def silence_others(learner: LearnerLike, owned: Iterable[Tensor]) -> None:
    """Take the gradient off the backbone's parameters that belong to no task, after the first; biases and norms.

    Args:
        learner: Of the backbone.
        owned: The other parameters.
    """
    if learner.task_index > 0:
        kept = {id(parameter) for parameter in owned}
        for parameter in learner.backbone.parameters():
            if id(parameter) not in kept:
                parameter.grad = None


def keep_outputs(learner: LearnerLike) -> None:
    """Take the gradient off the head's outputs for classes of other tasks; for `project_gradients`."""
    own = learner.membership[learner.task_index]
    for parameter in learner.head.parameters():
        if parameter.grad is not None:
            parameter.grad *= by_row(own, parameter)


def check_isolation(strategy: Strategy, learner: LearnerLike, stream: Stream) -> None:
    """Refuse what would let a later task change an earlier one's answers, whatever its own weights do.

    Raises:
        InputError: If tasks share outputs or have no boundaries, the head has weights that are no class's own, batch
            norm keeps running statistics, or the optimizer moves weights whose gradient is 0.
    """
    name = type(strategy).__name__
    if not stream.boundaries or learner.shared_outputs:
        raise InputError(
            f"{name} gives each task outputs of its own, but in {stream.name!r} tasks share classes or have no "
            "boundaries: choose another stream."
        )
    check_apart(name, learner, stream)
    if any(parameter.shape[:1] != (learner.num_classes,) for parameter in learner.head.parameters()):
        raise InputError(
            f"{name} gives each task outputs of its own, but {type(learner.head).__name__} has weights that are no "
            "class's own: use head=linear."
        )
    check_optimizer(name, learner)
    check_statistics(learner, name)


def check_optimizer(name: str, learner: LearnerLike) -> None:
    """Refuse an optimizer that moves weights whose gradient is 0, found out by letting it make steps.

    Raises:
        InputError: Naming method and optimizer.
    """
    weight = nn.Parameter(torch.ones(1))
    optimizer = learner.new_optimizer([weight])
    kind, decay = type(optimizer).__name__, optimizer.param_groups[0].get("weight_decay", 0)
    if decay:
        raise InputError(
            f"{name} keeps the weights of old tasks by gradients of 0, and weight_decay={decay} moves them all the "
            "same: use optimizer.weight_decay=0."
        )
    if _moves(optimizer, weight, [0.0]):
        raise InputError(
            f"{name} keeps the weights of old tasks by gradients of 0, and {kind} moves them all the same: use "
            "optimizer=sgd or adam."
        )
    if learner.keeps_optimizer and _moves(learner.new_optimizer([weight]), weight, [1.0, 0.0]):
        raise InputError(
            f"{name} keeps the weights of old tasks by gradients of 0, and what {kind} holds of the task before moves "
            "them all the same: use optimizer_state=reset."
        )


def _moves(optimizer: Optimizer, weight: nn.Parameter, gradients: Sequence[float]) -> bool:
    """Say whether the last of some steps, each with one gradient, moves a weight."""
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    return not torch.equal(before, weight.detach())
