"""One learner in several processes: how examples are divided and results combined. In one process nothing happens.

Every process builds the same stream and learner. Of a minibatch of B examples, process r of W trains on the examples
r, r + W, ... Gradients are averaged over all B examples before they are projected or clipped, so that the weights stay
equal in all processes. A memory holds its process's share of the exemplars. Between tasks every process computes on the
same examples, and then takes the result of process 0. Test examples are divided too, and their counts are summed.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from cl.errors import InputError

Value = TypeVar("Value")
Indices = np.ndarray[Any, np.dtype[np.int64]]


def world_size() -> int:
    """Return the number of processes, W.

    Example:
        >>> world_size(), rank()
        (1, 0)
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 to W - 1; process 0 writes the files."""
    return dist.get_rank() if world_size() > 1 else 0


def rank_position() -> tuple[int, ...]:
    """Return a position for `cl.random.derive` that differs by process: the rank, or () if there is one process."""
    return (rank(),) if world_size() > 1 else ()


# ---- dividing examples ----------------------------------------------------------------------------------------------


def share(name: str, number: int) -> int:
    """Return this process's share of a number of examples; the shares of all processes add up to it.

    Args:
        name: The setting that gives the number.
        number: The number of examples for all processes together.

    Raises:
        InputError: If a process would get no example; the message names the setting.

    Example:
        >>> share("memory_size", 200)
        200
    """
    if number < world_size():
        raise InputError(
            f"{name}={number} leaves some of the {world_size()} processes without a row: set {name} to {world_size()} "
            "or more, or use fewer devices."
        )
    return len(range(rank(), number, world_size()))


def own(rows: int) -> Tensor:
    """Return the positions of this process's examples, int64 in order; all if there are fewer than processes.

    Args:
        rows: The number of examples.

    Example:
        >>> own(3)
        tensor([0, 1, 2])
    """
    return torch.arange(rows) if rows < world_size() else torch.arange(rank(), rows, world_size())


def deal(rows: Indices, batch_size: int) -> tuple[Indices, int, bool]:
    """Return this process's share of consecutive minibatches.

    Args:
        rows: The positions of all examples, minibatch by minibatch.
        batch_size: Examples of a minibatch; the last one may be smaller.

    Returns:
        The positions of this process's examples; how many of them each minibatch but the last has; and whether the last
        minibatch has none for this process. In that case the process receives an example of another one, so that it
        takes the same number of steps; the example has no weight (`Batch.idle`).

    Example:
        >>> deal(np.arange(5), 2)
        (array([0, 1, 2, 3, 4]), 2, False)
    """
    if world_size() == 1:
        return rows, batch_size, False
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    mine = [part[rank() :: world_size()] for part in parts]
    idle = len(mine[-1]) == 0
    if idle:
        mine[-1] = parts[-1][:1]
    return np.concatenate(mine), share("batch_size", batch_size), idle


# ---- combining results ----------------------------------------------------------------------------------------------


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def total(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, equal to the bit in each.

    Example:
        >>> total(torch.ones(2))
        tensor([1., 1.])
    """
    if world_size() == 1:
        return values
    summed = values.detach().to(_device(), copy=True).contiguous()
    dist.all_reduce(summed)
    return summed.to(values.device)


def mean(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes."""
    return values if world_size() == 1 else total(values) / world_size()


def anywhere(flag: bool) -> bool:
    """Say whether a flag is true in any process.

    Example:
        >>> anywhere(True), everywhere(False)
        (True, False)
    """
    return flag if world_size() == 1 else int(total(torch.tensor(float(flag)))) > 0


def everywhere(flag: bool) -> bool:
    """Say whether a flag is true in all processes."""
    return not anywhere(not flag)


def gathered(columns: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with the rows of all processes, in order of rank.

    Args:
        columns: Tensors of this process; all processes have as many, of the same shapes but for the first dimension.
    """
    if world_size() == 1:
        return list(columns)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, [column.cpu() for column in columns])
    return [torch.cat(column).to(own.device) for own, column in zip(columns, zip(*parts, strict=True), strict=True)]


def from_first(function: Callable[[], Value]) -> Value:
    """Call a function in process 0 alone, and return its result in every process.

    Example:
        >>> from_first(lambda: 3)
        3
    """
    if world_size() == 1:
        return function()
    result = [function() if rank() == 0 else None]
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


def mean_gradients(gradients: Sequence[Tensor], rows: int) -> Sequence[Tensor]:
    """Return the gradients of a mean over the examples of all processes, for a strategy that computes its own gradient.

    Args:
        gradients: The gradients of the mean over this process's examples, in the same order in each process.
        rows: The number of these examples.
    """
    if world_size() == 1:
        return gradients
    weighted = [gradient * rows for gradient in gradients]
    _weighted_mean(weighted, torch.full((), float(rows), device=gradients[0].device))
    return weighted


@torch.no_grad()
def reduce_gradients(module: nn.Module, weight: float | Tensor) -> None:
    """Replace gradients, and the running statistics of batch norm, by their weighted mean over all processes, in place.

    Args:
        module: A module whose `.grad` is the gradient of this process's mean loss times `weight`.
        weight: Proportional to the number of this process's examples.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    statistics = [b for m in module.modules() if isinstance(m, _NormBase) for b in (m.running_mean, m.running_var)]
    running = [buffer for buffer in statistics if buffer is not None]
    for buffer in running:
        buffer.mul_(weight)
    mine = torch.as_tensor(weight, dtype=torch.float32)
    _weighted_mean([*gradients, *running], mine.to(gradients[0].device) if gradients else mine)


@torch.no_grad()
def _weighted_mean(tensors: list[Tensor], weight: Tensor) -> None:
    """Replace weighted tensors by their sum over all processes divided by the sum of the weights, in place."""
    _sum_in_place([*tensors, weight])
    for tensor in tensors:
        tensor.div_(weight)


def _sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Sum tensors over all processes in place, with one call for each dtype."""
    for dtype in {tensor.dtype: None for tensor in tensors}:
        some = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in some])
        dist.all_reduce(flat)
        for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
            tensor.copy_(part.view(tensor.shape))


# ---- state that is equal in all processes, and state that differs ---------------------------------------------------


@torch.no_grad()
def align(module: nn.Module) -> None:
    """Copy all parameters and buffers from process 0, except the buffers of modules with a true attribute `by_rank`."""
    if world_size() == 1:
        return
    apart = {id(t) for m in module.modules() if getattr(m, "by_rank", False) for t in m.buffers()}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in apart and tensor.numel():
            sent = tensor.detach().to(_device()).contiguous()
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)


def pack(content: dict[str, Any]) -> dict[str, Any]:
    """Return the state of all processes as one dict, to be saved by process 0.

    It is the state of process 0, with the entries in which processes differ, for each of them, under "ranks".
    """
    if world_size() == 1:
        return content
    leaves = _leaves(content)
    digests: list[Any] = [None] * world_size()
    dist.all_gather_object(digests, {path: _digest(value) for path, value in leaves.items()})
    differ = [path for path in leaves if any(other.get(path) != digests[0].get(path) for other in digests)]
    ranks: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object([[list(path), _on_cpu(leaves[path])] for path in differ], ranks, dst=0)
    return {**content, "ranks": ranks}


def unpack(content: dict[str, Any]) -> dict[str, Any]:
    """Return this process's state from the result of `pack`.

    Raises:
        InputError: If it was saved by another number of processes.

    Example:
        >>> unpack({"state_dict": {"a": 1}})
        {'state_dict': {'a': 1}}
    """
    ranks = content.get("ranks") or [[]]
    if len(ranks) != world_size():
        raise InputError(
            f"The checkpoint holds the memories of {len(ranks)} processes, and this run has {world_size()}: continue "
            f"it with trainer.devices={len(ranks)}."
        )
    for path, value in ranks[rank()]:
        node = content
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
    content.pop("ranks", None)
    return content


def _leaves(tree: dict[Any, Any], path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    found: dict[tuple[Any, ...], Any] = {}
    for key, value in tree.items():
        found.update(_leaves(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value})
    return found


def _digest(value: Any) -> bytes:
    if isinstance(value, Tensor):
        raw: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if value.numel() else b""
    else:
        raw = pickle.dumps(value)
    return hashlib.blake2b(raw, digest_size=16).digest()


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
