r"""LoRA, adapters, and scale and shift, added to layers of a frozen backbone.

All are small functions f with few weights beside or behind a layer (He et al. 2022, "Towards a Unified View of
Parameter-Efficient Transfer Learning"):

.. math:: h \leftarrow h + s \, f(x) \;\text{(parallel)} \qquad h \leftarrow h + s \, f(h) \;\text{(sequential)}

where x is the layer's input and h its output. They start with f = 0, so that the backbone's outputs are the same bits
as before. Their weights are sub-modules of the backbone, and so part of every checkpoint. LoRA changes a layer's weight
by a parametrization of torch; the others are wrapped around a module.

The library peft of Hugging Face has these parts, too, but requires transformers and accelerate; and its wrappers expect
models of transformers, while this file works on any backbone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from cl.backbones.blocks import blocks as blocks_of
from cl.backbones.blocks import freeze as freeze
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.random import Random
from cl.toolkit.layers import Layer, layer_inputs
from cl.toolkit.subspace import sampled

if TYPE_CHECKING:
    from cl.data.task import Stream, Task

KINDS = ("linear", "conv", "norm", "block")  # besides the names that modules have in the backbone


def find(backbone: nn.Module, kinds: Sequence[str], blocks: Sequence[int] | None = None) -> list[str]:
    """Return the names of the modules of a backbone that are of some kinds, in its order.

    Args:
        backbone: The backbone.
        kinds: Each is "linear", "conv" (convolutions without groups), "norm" (batch, layer and group norm), "block"
            (blocks with weights), or what the name of a module ends with, such as "qkv" in a transformer of timm.
        blocks: Positions in `cl.backbones.blocks.blocks(backbone)`, to choose modules in these blocks alone.

    Raises:
        InputError: If there is no such block.

    Example:
        >>> from cl.backbones.networks import MLP
        >>> find(MLP((4,), hidden=[3, 3]), ["linear"]), find(MLP((4,), hidden=[3, 3]), ["linear"], [3])
        (['1', '3'], ['3'])
    """
    parts = blocks_of(backbone)
    wrong = [index for index in blocks or () if not 0 <= index < len(parts)]
    if wrong:
        raise InputError(
            f"blocks={list(blocks or ())}, but {type(backbone).__name__} has the blocks 0 to {len(parts) - 1}: choose "
            "among these."
        )
    inside = {id(m) for i, part in enumerate(parts) if blocks is None or i in blocks for m in part.modules()}
    whole = {id(part) for part in parts if any(True for _ in part.parameters())}

    def matches(name: str, module: nn.Module) -> bool:
        plain = isinstance(module, nn.Conv2d) and module.groups == 1
        fits = {
            "linear": isinstance(module, nn.Linear),
            "conv": plain,
            "norm": isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm),
            "block": id(module) in whole,
        }
        return any(fits.get(kind, f".{name}".endswith(f".{kind}")) for kind in kinds)

    return [name for name, m in backbone.named_modules() if name and id(m) in inside and matches(name, m)]


def places(
    method: str,
    backbone: nn.Module,
    usual: Sequence[Sequence[str]],
    layers: Sequence[str] | None,
    blocks: Sequence[int] | None,
) -> list[str]:
    """Return the names of the modules that a method adds to.

    Args:
        method: Its name in the configuration, for errors.
        backbone: The backbone.
        usual: Lists of kinds, of which the first that occurs in the backbone is used if `layers` is None.
        layers: The kinds that a user chose, see `find`.
        blocks: The blocks that a user chose.

    Raises:
        InputError: If there are none.
    """
    for kinds in usual if layers is None else [layers]:
        found = find(backbone, kinds, blocks)
        if found:
            return found
    known = sorted({name.rpartition(".")[2] for name, _ in backbone.named_modules()} - {""})
    names = ", ".join(name for name in known if not name.isdigit()) or "none"
    raise InputError(
        f"{method} finds no modules for layers={layers} and blocks={blocks} in {type(backbone).__name__}: choose among "
        f"{', '.join(KINDS)}, and the names of its modules: {names}."
    )


def awaken(backbone: nn.Module) -> None:
    """Set what has been added to a frozen backbone, and the backbone as a whole, to training mode.

    The layers below stay in evaluation mode. To call when training begins, since modes are no state.
    """
    backbone.eval()
    for part in (*low_ranks(backbone), *added(backbone)):
        part.train()
    backbone.training = True


# ---- LoRA -----------------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    r"""A weight plus a product of two small matrices, W + s B A (Hu et al. 2022, equation 3).

    The weight of a convolution is flattened to (out, d) with d = in * k * k: A and B are then two convolutions in turn,
    the second of which is 1x1.

    Args:
        weight: W, (out, d) or (out, in, k, k).
        rank: r; at most out and d.
        scale: s.

    Attributes:
        A: (r, d), drawn as the weight of a linear layer is.
        B: (out, r), which starts at 0.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> pair = add_low_rank(nn.Sequential(layer), ["0"], lambda weight: LowRank(weight, rank=1))[0]
        >>> pair.A.shape, pair.B.shape, [name for name, _ in layer.named_parameters()][:2]
        (torch.Size([1, 3]), torch.Size([2, 1]), ['bias', 'parametrizations.weight.original'])
    """

    def __init__(self, weight: Tensor, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        out, d = weight.flatten(1).shape
        self.scale, rank = scale, min(rank, out, d)
        self.A = nn.Parameter(weight.new_empty(rank, d).uniform_(-(d**-0.5), d**-0.5))
        self.B = nn.Parameter(weight.new_zeros(out, rank))

    @torch.no_grad()
    def renew(self, random: Random) -> None:
        """Draw A anew, and set B to 0."""
        bound = self.A.shape[1] ** -0.5
        self.A.copy_(torch.from_numpy(random.generator.uniform(-bound, bound, tuple(self.A.shape))))
        self.B.zero_()

    @property
    def product(self) -> Tensor:
        """The change of the weight, s B A, (out, d)."""
        return self.scale * (self.B @ self.A)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight, in its own shape."""
        return weight + self.product.view_as(weight)


def add_low_rank(backbone: nn.Module, names: Sequence[str], make: Callable[[Tensor], LowRank]) -> list[LowRank]:
    """Add a `LowRank` to layers of a backbone, in place, and return them.

    Args:
        backbone: The backbone.
        names: Names of linear layers or convolutions, from `places`.
        make: Builds one from a layer's weight.

    Raises:
        InputError: If a module is neither, or another strategy has added some.
    """
    if low_ranks(backbone):
        raise InputError("Two strategies add LoRA to the backbone: drop one of them.")
    for name in names:
        layer = backbone.get_submodule(name)
        if not isinstance(layer, Layer):
            raise InputError(
                f"LoRA changes the weights of linear layers and convolutions, and {name} is a {type(layer).__name__}: "
                "choose other layers."
            )
        parametrize.register_parametrization(layer, "weight", make(layer.weight.detach()))
    return low_ranks(backbone)


def low_ranks(backbone: nn.Module) -> list[LowRank]:
    """Return the `LowRank`s of a backbone."""
    return [module for module in backbone.modules() if isinstance(module, LowRank)]


def low_rank_layers(backbone: nn.Module) -> list[Layer]:
    """Return the layers that have a `LowRank`, in the order of `low_ranks`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = add_low_rank(net, ["1"], lambda weight: LowRank(weight, rank=1))
        >>> low_rank_layers(net)[0] is net[1]
        True
    """
    return [m for m in backbone.modules() if isinstance(m, Layer) and parametrize.is_parametrized(m, "weight")]


def frozen_weight(layer: nn.Module) -> nn.Parameter:
    """Return the weight of a layer below its parametrization, W."""
    weight: nn.Parameter = layer.parametrizations["weight"].original  # type: ignore[union-attr, index]
    return weight


@torch.no_grad()
def merge(layer: nn.Module, pair: LowRank) -> None:
    """Add a low-rank product to the weight below, and set B to 0, so that the layer computes the same.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> (pair,) = add_low_rank(nn.Sequential(layer), ["0"], lambda weight: LowRank(weight, rank=1))
        >>> _ = nn.init.ones_(pair.B)
        >>> before = layer.weight.clone()
        >>> merge(layer, pair)
        >>> bool((layer.weight == before).all()), bool(pair.B.any())
        (True, False)
    """
    weight = frozen_weight(layer)
    weight.add_(pair.product.view_as(weight))
    pair.B.zero_()


class LowRankTuning(Strategy):
    """Base class of methods that freeze the backbone, and train one `LowRank` in each of some layers and the head.

    Args:
        rank: r.
        scale: s.
        layers: Kinds of layers, see `find`; None means "qkv" if the backbone has such layers, else all linear layers
            and convolutions without groups.
        blocks: The blocks whose layers they are, see `find`; None means all.
    """

    targets: tuple[str, ...] = ("label", "multilabel", "regression")
    needs = ("boundaries",)
    needs_inputs = True

    def __init__(
        self, rank: int, scale: float, layers: Sequence[str] | None = None, blocks: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        self.layers = None if layers is None else tuple(layers)
        self.blocks = None if blocks is None else tuple(blocks)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Freeze the backbone, and add to its layers."""
        freeze(learner.backbone)
        usual = ["qkv"], ["linear", "conv"]
        names = places(type(self).__name__, learner.backbone, usual, self.layers, self.blocks)
        add_low_rank(learner.backbone, names, partial(self.pair, stream))

    def pair(self, stream: Stream, weight: Tensor) -> LowRank:
        """Return what is added to a layer with a weight."""
        return LowRank(weight, self.rank, self.scale)

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Set what is trained to training mode."""
        awaken(learner.backbone)


def low_rank_inputs(learner: LearnerLike, task: Task, num_samples: int, random: Random) -> list[Tensor]:
    """Return the inputs (d, n) of each layer with a `LowRank` on a sample of a task's training examples.

    Backbone and head are in evaluation mode; see `cl.toolkit.layers.layer_inputs`.
    """
    batch = sampled(learner, task, num_samples, random)
    with learner.evaluating(), torch.no_grad():
        view = learner.prepare(batch.x)
        return layer_inputs(low_rank_layers(learner.backbone), lambda: learner.backbone(view))


# ---- adapters, scale and shift --------------------------------------------------------------------------------------


def channelwise(x: Tensor) -> int:
    """Return the dimension of channels: 1 of maps (B, C, H, W), the last of tokens (B, L, C) and features (B, C)."""
    return 1 if x.ndim == 4 else -1


class Adapter(nn.Module):
    r"""A bottleneck (Houlsby et al. 2019), :math:`f(x) = s \, U \max(0, D x + b) + c`, which starts at 0.

    Args:
        channels: Number of channels of inputs and outputs.
        width: Width of the bottleneck.
        scale: s.

    Example:
        >>> Adapter(4, width=2)(torch.ones(1, 4, 3, 3)).abs().sum().item()
        0.0
    """

    def __init__(self, channels: int, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs to outputs of the same shape, each place of a map and each token by itself."""
        dim = channelwise(x)
        out: Tensor = self.scale * self.up(F.relu(self.down(x.movedim(dim, -1))))
        return out.movedim(-1, dim)


class ScaleShift(nn.Module):
    r"""Scale and shift of channels (Lian et al. 2022), as the change :math:`f(h) = g \odot h + b`, which starts at 0.

    Args:
        channels: Number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, h: Tensor) -> Tensor:
        """Map outputs of a layer to their change."""
        dim = channelwise(h)
        return (h.movedim(dim, -1) * self.g + self.b).movedim(-1, dim)


ADAPTED = ["mlp"], ["block"], ["linear"]  # the usual places of adapters, see `places`


class Added(nn.Module):
    """A module with functions beside or behind it, of which one at a time is added to its output.

    Args:
        layer: The module.
        parts: The functions.
        parallel: Whether they map the module's inputs; else its outputs.

    Attributes:
        active: The position of the function in use; None uses none. It is no state: who changes it sets it back.
    """

    def __init__(self, layer: nn.Module, parts: Sequence[nn.Module], parallel: bool) -> None:
        super().__init__()
        self.layer, self.parts, self.parallel = layer, nn.ModuleList(parts), parallel
        self.active: int | None = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the module plus that of the function in use."""
        h: Tensor = self.layer(x)
        return h if self.active is None else h + self.parts[self.active](x if self.parallel else h)


def added(backbone: nn.Module) -> list[nn.ModuleList]:
    """Return the functions that were added to modules of a backbone, a list for each of these modules."""
    return [module.parts for module in backbone.modules() if isinstance(module, Added)]


def use(backbone: nn.Module, position: int | None) -> None:
    """Let a backbone use one of the functions that were added to each module; with None, it is as it was before.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> add(net, ["0"], [lambda channels: ScaleShift(channels)] * 2, torch.zeros(1, 2))
        >>> _ = nn.init.ones_(net[0].parts[1].b)
        >>> outputs = [(use(net, i), net(torch.zeros(1, 2)))[1] for i in (None, 0, 1)]
        >>> bool((outputs[0] == outputs[1]).all()), bool((outputs[2] == outputs[0] + 1).all())
        (True, True)
    """
    for module in backbone.modules():
        if isinstance(module, Added):
            module.active = position


def add(
    backbone: nn.Module,
    names: Sequence[str],
    makers: Sequence[Callable[[int], nn.Module]],
    example: Tensor,
    parallel: bool = False,
) -> None:
    """Add functions to modules of a backbone, in place.

    Args:
        backbone: The backbone.
        names: Names of the modules, from `places`.
        makers: Each builds a function from a number of channels.
        example: Prepared inputs (B, *input), by which the shapes are found.
        parallel: Whether the functions map a module's inputs, where these have the shape of its outputs; elsewhere, and
            without `parallel`, they map its outputs.
    """
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes[name] = inputs[0].shape, output.shape

    hooks = [backbone.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    with torch.no_grad():
        backbone(example)
    for hook in hooks:
        hook.remove()
    for name in names:
        (before, after), layer = shapes[name], backbone.get_submodule(name)
        channels = after[1 if len(after) == 4 else -1]
        parts = [make(channels).to(example) for make in makers]
        parent, _, last = name.rpartition(".")
        setattr(backbone.get_submodule(parent), last, Added(layer, parts, parallel and before == after))
