"""The inputs of a network's layers as columns of a matrix, for methods that protect their span."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl.errors import InputError

Layer = nn.Linear | nn.Conv2d


def trainable_layers(module: nn.Module) -> list[Layer]:
    """Return the linear and convolutional layers whose weights are trainable.

    Raises:
        InputError: If a convolution is grouped or does not pad with zeros, so that one matrix of patches does not
            describe it.

    Example:
        >>> len(trainable_layers(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))))
        2
    """
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, Layer) and m.weight.requires_grad]
    for name, layer in layers:
        if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
            raise InputError(
                f"Layer {name} has groups={layer.groups}, padding_mode={layer.padding_mode!r}: only plain "
                "convolutions can be projected, use another backbone."
            )
    return [layer for _, layer in layers]


def layer_inputs(layers: Iterable[Layer], forward: Callable[[], object]) -> list[Tensor]:
    r"""Return the representation matrix (d, n) of each layer during one forward pass.

    Its columns are the vectors that the weight, flattened to (out, d), is multiplied with: the inputs of a linear
    layer, or the patches of k * k * C values of a convolution, by its own stride, padding and dilation.

    Args:
        layers: Linear layers and convolutions.
        forward: Runs a forward pass.

    Raises:
        InputError: If a layer is not called.

    Example:
        >>> conv, x = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), torch.randn(4, 2, 5, 5)
        >>> (R,) = layer_inputs([conv], lambda: conv(x))
        >>> y = (conv.weight.flatten(1) @ R).view(3, 4, 3, 3).transpose(0, 1)
        >>> R.shape, torch.allclose(y, conv(x), atol=1e-5)
        (torch.Size([18, 36]), True)
    """
    layers = list(layers)
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [layer.register_forward_pre_hook(partial(_keep, seen)) for layer in layers]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    silent = next((layer for layer in layers if not seen[layer]), None)
    if silent is not None:
        raise InputError(f"{silent} was not called in a forward pass, so its inputs are unknown: use another backbone.")
    # A layer that is called several times receives the inputs of all its calls.
    return [torch.cat([_columns(layer, x) for x in seen[layer]], dim=1) for layer in layers]


def _keep(seen: dict[nn.Module, list[Tensor]], layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    seen[layer].append(inputs[0].detach())


def _columns(layer: Layer, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2).T
    padding = layer.padding
    if isinstance(padding, str):  # unfold takes only numbers
        total = [
            (k - 1) * d if padding == "same" else 0 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
        ]
        x = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        padding = (0, 0)
    patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return patches.transpose(0, 1).flatten(1)
