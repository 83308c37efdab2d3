"""Helpers of methods that give each task a subnetwork: its weights and outputs, and checks of network and optimizer."""

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
    """Return values (n,) in the shape (n, 1, ...), so that they are broadcast over the rows of a tensor (n, ...).

    Example:
        >>> by_row(torch.tensor([1.0, 2.0]), torch.zeros(2, 3, 4)).shape
        torch.Size([2, 1, 1])
    """
    return values.view(-1, *(1 for _ in like.shape[1:]))


def chained_layers(backbone: nn.Module, input_shape: tuple[int, ...]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the linear layers and convolutions of a backbone that is a chain of them, by name and in order.

    To check the chain, the weights of each layer in turn are set to 0: features must then not depend on the input.

    Raises:
        InputError: If a path bypasses a layer; there are normalisation layers, which would undo the scale of a gate; or
            the inputs of a layer are neither the units of the layer before nor blocks of equal size of them.

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
            f"{type(backbone).__name__} is not a chain of layers without norms, whose units could be gated: use "
            "backbone=mlp, simple_cnn, or alexnet_gpm with backbone.norm=false."
        )
    return {name: layers[name] for name in calls}


def _closes(backbone: nn.Module, layer: str, x: Tensor) -> bool:
    closed = {f"{layer}.weight": torch.zeros_like(backbone.get_submodule(layer).weight)}  # type: ignore[arg-type]
    with torch.no_grad():
        one, other = functional_call(backbone, closed, (x,))
    # rounding depends on an example's position in its batch
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-6))


def silence_others(learner: LearnerLike, owned: Iterable[Tensor]) -> None:
    """Remove the gradients of the backbone's parameters that no task owns, such as biases and norms, after task 1.

    Args:
        learner: The learner.
        owned: The parameters of the backbone that tasks own, whose gradients stay.
    """
    if learner.task_index > 0:
        own = {id(parameter) for parameter in owned}
        for parameter in learner.backbone.parameters():
            if id(parameter) not in own:
                parameter.grad = None


def keep_outputs(learner: LearnerLike) -> None:
    """Set the gradients of the head's outputs for classes of other tasks to 0; for `project_gradients`."""
    own = learner.membership[learner.task_index]
    for parameter in learner.head.parameters():
        if parameter.grad is not None:
            parameter.grad *= by_row(own, parameter)


def check_isolation(strategy: Strategy, learner: LearnerLike, stream: Stream) -> None:
    """Refuse a stream, network or optimizer with which a later task would change the predictions of an earlier one.

    Raises:
        InputError: If tasks share outputs or have no boundaries, the head has weights that belong to no class, batch
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
            f"{name} gives each task outputs of its own, but {type(learner.head).__name__} has weights that belong to "
            "no class: use head=linear."
        )
    check_optimizer(name, learner)
    check_statistics(learner, name)


def check_optimizer(name: str, learner: LearnerLike) -> None:
    """Refuse an optimizer that moves weights whose gradient is 0, which is tried out on a single weight.

    Raises:
        InputError: If it does; names method and optimizer.
    """
    weight = nn.Parameter(torch.ones(1))
    optimizer = learner.new_optimizer([weight])
    kind, decay = type(optimizer).__name__, optimizer.param_groups[0].get("weight_decay", 0)
    if decay:
        raise InputError(
            f"{name} keeps the weights of old tasks by gradients of 0, but weight_decay={decay} moves them anyway: "
            "use optimizer.weight_decay=0."
        )
    if _moves(optimizer, weight, [0.0]):
        raise InputError(
            f"{name} keeps the weights of old tasks by gradients of 0, but {kind} moves them anyway: use "
            "optimizer=sgd or adam."
        )
    if learner.keeps_optimizer and _moves(learner.new_optimizer([weight]), weight, [1.0, 0.0]):
        raise InputError(
            f"{name} keeps the weights of old tasks by gradients of 0, but the state of {kind} from the task before "
            "moves them anyway: use optimizer_state=reset."
        )


def _moves(optimizer: Optimizer, weight: nn.Parameter, gradients: Sequence[float]) -> bool:
    """Return whether the last of several steps moves a weight; each step has one gradient."""
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    return not torch.equal(before, weight.detach())
