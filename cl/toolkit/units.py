"""The hidden units of a network: how active they are, what weighs on them, and how to start them anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cl.errors import InputError
from cl.random import Random
from cl.toolkit.layers import Layer, trainable_layers

if TYPE_CHECKING:
    from cl.engine.strategy import LearnerLike


def units_of(layer: Layer) -> int:
    """Return the number of units of a linear layer, or of channels of a convolution."""
    return len(layer.weight)


@torch.no_grad()
def activities(layers: Sequence[Layer], forward: Callable[[], object]) -> list[Tensor]:
    """Return the mean absolute activation of each unit of all layers but the last, (units,) each, in a forward pass.

    The activations of a layer are the inputs of the next one; those of a channel are averaged over positions, too.

    Args:
        layers: Layers of which each feeds the next, see `check_chain`.
        forward: Runs a forward pass.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> activities([net[0], net[2]], lambda: net(torch.tensor([[1.0], [3.0]])))
        [tensor([2., 0.])]
    """
    seen: list[Tensor] = []

    def note(units: int, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float().abs()
        seen.append(x.reshape(len(x), units, -1).mean((0, 2)))

    hooks = [b.register_forward_pre_hook(partial(note, units_of(a))) for a, b in pairwise(layers)]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def outgoing(layer: Layer, units: int) -> Tensor:
    """Return the sum of the absolute weights with which a layer takes up each unit of the one before, (units,).

    Example:
        >>> outgoing(nn.Conv2d(2, 3, 2, bias=False), 2).shape, outgoing(nn.Linear(8, 3), 2).shape
        (torch.Size([2]), torch.Size([2]))
    """
    return layer.weight.detach().float().abs().reshape(units_of(layer), units, -1).sum((0, 2))


@torch.no_grad()
def start_anew(layer: Layer, following: Layer, units: Tensor, random: Random) -> None:
    """Draw the incoming weights of some units again, and set their biases and outgoing weights to 0, in place.

    Incoming weights are uniform with the bound of He et al. 2015 for ReLU, sqrt(6 / fan-in).

    Args:
        layer: The layer of the units.
        following: The layer that takes them up.
        units: The positions of the units, int64 (k,).
        random: The generator of the draws.
    """
    shape = (len(units), *layer.weight.shape[1:])
    draw = torch.from_numpy(random.generator.uniform(-1, 1, shape)).to(layer.weight)
    layer.weight[units] = draw * math.sqrt(6 / layer.weight[0].numel())
    if layer.bias is not None:
        layer.bias[units] = 0
    kept = torch.ones(units_of(layer), device=units.device).index_fill_(0, units, 0)
    each = following.weight[0].numel() // len(kept)
    following.weight.mul_(kept.repeat_interleave(each).view(following.weight.shape[1:]).to(following.weight))


@torch.no_grad()
def check_chain(name: str, learner: LearnerLike, x: Tensor) -> list[Layer]:
    """Return the trainable layers of backbone and head, of which each must feed the next one and nothing else.

    Args:
        name: The name of the method in messages.
        learner: With backbone and head.
        x: Some prepared inputs, on which it is tried.

    Raises:
        InputError: If there is no hidden layer, or a layer acts on the output in another way, such as by a shortcut.

    Example:
        >>> from cl.testing import toy_learner
        >>> learner, stream = toy_learner()
        >>> len(check_chain("CBP", learner, learner.prepare(stream[0].train.x[:2])))
        3
    """
    layers = trainable_layers(learner.trunk())
    if len(layers) < 2:
        raise InputError(f"{name} starts hidden units anew, and there is no trainable hidden layer: add one.")
    with learner.evaluating():
        for layer, following in pairwise(layers):
            own, next_one = layer.weight.clone(), following.weight.clone()
            following.weight.zero_()
            before = learner.head(learner.backbone(x))
            layer.weight.neg_().add_(1)
            after = learner.head(learner.backbone(x))
            layer.weight.copy_(own)
            following.weight.copy_(next_one)
            if not torch.equal(before, after) or next_one[0].numel() % units_of(layer):
                raise InputError(
                    f"{name} needs layers that feed the next one alone, and {type(learner.backbone).__name__} has "
                    f"others, such as a shortcut around {following}: use another backbone, such as backbone=mlp."
                )
    return layers
