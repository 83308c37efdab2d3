"""Random numbers that a run can resume: seeds derived from a position in the run, and generators with saved state."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn

from cl import distributed
from cl.errors import InputError


def derive(seed: int, *position: int | str) -> int:
    """Return a seed in [0, 2^63) that depends on `seed` and a position alone, never on what ran before.

    Args:
        seed: 0 or more.
        position: Names and numbers that say where in the run the draws are made.

    Raises:
        InputError: If the seed is negative.

    Example:
        >>> derive(0, "order", 3, 1) == derive(0, "order", 3, 1) != derive(0, "order", 3, 2)
        True
    """
    if seed < 0:
        raise InputError(f"seed={seed} must be 0 or more.")
    key = [zlib.crc32(p.encode()) if isinstance(p, str) else p for p in position]
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0]) >> 1


class Random(nn.Module):
    """A numpy generator as a module, so that its state is part of the checkpoint.

    The draws are the same for every device, and a draw on the host needs no synchronisation with the device.

    Args:
        by_rank: Whether each of several processes has its own draws, because it draws for its own examples.

    Example:
        >>> a, b = Random(), Random()
        >>> a.seed(3)
        >>> _ = a.generator.random(5)
        >>> _ = b.load_state_dict(a.state_dict())
        >>> bool(a.generator.random() == b.generator.random())
        True
    """

    def __init__(self, by_rank: bool = False) -> None:
        super().__init__()
        self.by_rank = by_rank
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Restart the generator from a seed."""
        if self.by_rank and distributed.world_size() > 1:
            seed = derive(seed, "rank", *distributed.rank_position())
        self.generator = np.random.Generator(np.random.PCG64(seed))

    def get_extra_state(self) -> Tensor:
        """Return the generator's state as a uint8 tensor (40,)."""
        state = self.generator.bit_generator.state
        words = [int(state["state"]["state"]), int(state["state"]["inc"])]
        raw = b"".join(word.to_bytes(16, "little") for word in words)
        raw += int(state["has_uint32"]).to_bytes(4, "little") + int(state["uinteger"]).to_bytes(4, "little")
        return torch.tensor(list(raw), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        raw = bytes(state.tolist())
        number = [int.from_bytes(raw[a:b], "little") for a, b in ((0, 16), (16, 32), (32, 36), (36, 40))]
        self.generator.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {"state": number[0], "inc": number[1]},
            "has_uint32": number[2],
            "uinteger": number[3],
        }
