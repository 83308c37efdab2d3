"""The frozen first blocks of a backbone as a function that is computed once for each input of a stream."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from cl.backbones.blocks import blocks, depends_on_batch, freeze
from cl.data.augment import to_floats
from cl.data.feature_rows import rewriter
from cl.data.task import Stream
from cl.errors import InputError

_BATCH = 128  # inputs that the frozen blocks map at a time


def is_fixed(block: nn.Module) -> bool:
    """Return whether a block is frozen, in evaluation mode, without hooks, and maps each example by itself.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> is_fixed(layer), is_fixed(layer.requires_grad_(False).eval())
        (False, True)
    """
    modules = list(block.modules())
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    changing = any(module.training for module in modules) or any(p.requires_grad for p in block.parameters())
    return not (hooks or changing or depends_on_batch(block))


def past_blocks(stream: Stream, backbone: nn.Module, depth: int, folder: Path | None) -> Stream:
    """Return a stream with the outputs of a backbone's first blocks in place of inputs, and let it continue from them.

    The backbone still maps raw inputs, too: it tells the two apart by their shape.

    Args:
        stream: The stream of raw inputs.
        backbone: The backbone of its learner, which is changed: these blocks are frozen.
        depth: How many blocks.
        folder: The directory of the outputs, see `FeatureRows`.

    Raises:
        InputError: If outputs have the shape of inputs, so that the two cannot be told apart.
    """
    normalize = None if getattr(backbone, "normalizes", False) else stream.normalize
    first = FrozenBlocks(backbone, depth, normalize, stream.input_shape)
    if first.shape == stream.input_shape:
        raise InputError(f"The frozen blocks return inputs' own shape, {first.shape}: set feature_dir=null.")
    shape = first.shape

    def forward(self: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if tuple(x.shape[1:]) != shape:
            return type(self).forward(self, x, *arguments, **options)  # type: ignore[no-any-return]
        if torch.is_grad_enabled():
            first.trained = True
        for block in blocks(self)[depth:]:
            x = block(x)
        return x

    backbone.forward = MethodType(forward, backbone)
    rewrite = rewriter(first, folder)
    return stream.derive(
        lambda position: stream[position].each(rewrite), normalize=NormalizeInputs(normalize, shape), order=None
    )


class NormalizeInputs(nn.Module):
    """Normalise raw inputs, and pass on the outputs of frozen blocks, which have another shape."""

    def __init__(self, normalize: nn.Module | None, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.normalize, self.shape = normalize or to_floats, shape

    def forward(self, x: Tensor) -> Tensor:
        """Return floats of the same shape."""
        return x if tuple(x.shape[1:]) == self.shape else self.normalize(x)


class FrozenBlocks:
    """The first blocks of a backbone, for `FeatureRows`: raw inputs to their outputs.

    Args:
        backbone: The backbone.
        depth: How many of its blocks; they are frozen and set to evaluation mode.
        normalize: What prepares raw inputs for them; None only scales bytes.
        input_shape: Shape of a raw input.
    """

    def __init__(
        self, backbone: nn.Module, depth: int, normalize: nn.Module | None, input_shape: tuple[int, ...]
    ) -> None:
        self._blocks = blocks(freeze(backbone, depth))[:depth]
        self._normalize = normalize or to_floats
        self._convolves = sum(isinstance(m, nn.Conv2d) for block in self._blocks for m in block.modules()) > 1
        self.trained = False  # whether rows have been trained on
        self._version, self._digest = -1, ""
        self.shape = tuple(self(torch.zeros(1, *input_shape)).shape[1:])

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Map raw inputs (n, *input) to float32 (n, *shape) on the CPU, in batches on the device of the weights."""
        return torch.cat([self._run(part).cpu() for part in x.split(_BATCH)])

    def _run(self, x: Tensor) -> Tensor:
        weights = next(weight for block in self._blocks for weight in block.parameters())
        with torch.autocast(weights.device.type, enabled=False):
            x = x.to(weights.device)
            if self._convolves and x.ndim == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            x = self._normalize(x).to(weights.dtype)
            for block in self._blocks:
                x = block(x)
        return x.float().contiguous()

    def digest(self) -> str:
        """Return a digest of the blocks' modules and weights, and of how inputs are prepared, as they are now.

        Raises:
            InputError: If a block is not frozen any more, or its weights changed after rows have been trained on.
        """
        if not all(is_fixed(block) for block in self._blocks):
            raise InputError("A frozen block of the backbone was unfrozen during the run: set feature_dir=null.")
        state = [(n, t) for block in self._blocks for n, t in (*block.named_parameters(), *block.named_buffers())]
        version = sum(tensor._version for _, tensor in state)
        if version != self._version:
            found = hashlib.sha256(f"{self._blocks} {torch.__version__}".encode())
            if isinstance(self._normalize, nn.Module):
                found.update(repr(self._normalize).encode())
                state += list(self._normalize.named_buffers())
            for name, tensor in state:
                found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if self.trained and found.hexdigest() != self._digest:
                raise InputError("The weights of a frozen block changed during the run: set feature_dir=null.")
            self._version, self._digest = version, found.hexdigest()
        return self._digest
