"""The network: a backbone and a head that fit a stream, with initial weights drawn from the run's seed; its modes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import nn

from cl.data.task import Stream
from cl.engine.head import Head
from cl.errors import InputError, unknown
from cl.random import derive

BackboneFactory = Callable[[tuple[int, ...]], nn.Module]
HeadFactory = Callable[[int, int], nn.Module]
COMPILERS = ("default", "reduce-overhead", "max-autotune")


def network(
    stream: Stream,
    backbone: nn.Module | BackboneFactory,
    head: nn.Module | HeadFactory | None = None,
    seed: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Return the backbone and the head for a stream, each as given or built by its factory.

    If a factory builds one of them, torch's generator is seeded first, so that one seed gives the same initial weights
    under all strategies. A module that is given keeps its weights.

    Args:
        stream: Gives the shape of an input and the number of classes.
        backbone: A module with the attribute `num_features`, or a factory that builds one from the shape of an input.
        head: A module, or a factory that builds one from the numbers of features and of classes; None means `Head`.
        seed: The seed of the run.

    Raises:
        InputError: If the backbone is neither a module nor a factory, or has no `num_features`.

    Example:
        >>> from cl.backbones.networks import MLP
        >>> from cl.testing import toy_stream
        >>> one, two = (network(toy_stream(), MLP, seed=3)[0] for _ in range(2))
        >>> bool((one[1].weight == two[1].weight).all())
        True
    """
    if not isinstance(backbone, nn.Module) or not isinstance(head, nn.Module | None):
        torch.manual_seed(derive(seed, "initial weights"))
    if not callable(backbone):
        raise InputError(f"backbone={backbone!r} is no network: give a module, or a function from a shape to a module.")
    body = backbone if isinstance(backbone, nn.Module) else backbone(stream.input_shape)
    width = getattr(body, "num_features", None)
    if not isinstance(width, Integral):
        raise InputError(
            f"The backbone {type(body).__name__} has no num_features: set self.num_features to the width of the output "
            "of its forward, (B, num_features)."
        )
    top = head if isinstance(head, nn.Module) else (head or Head)(int(width), stream.num_classes)
    return body, top


def compile_by(mode: str, modules: Iterable[nn.Module]) -> None:
    """Compile modules by torch.compile.

    Raises:
        InputError: If there is no such mode.
    """
    if mode not in COMPILERS:
        raise unknown("mode of torch.compile", mode, COMPILERS)
    for module in modules:
        module.compile(mode=mode)


@contextmanager
def evaluating(trunk: nn.Module) -> Iterator[None]:
    """In this context, all modules are in evaluation mode and not compiled; then their modes are restored."""
    modes = [(module, module.training) for module in trunk.modules()]
    trunk.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code would skip hooks on layers, and vmap
            yield
    finally:
        for module, mode in modes:
            module.training = mode
