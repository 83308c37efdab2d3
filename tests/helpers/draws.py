"""What tests draw: by hypothesis, and from torch's generators."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

ALPHA = 1e-4  # error of a statistical test; seeds are fixed
quick = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> Tensor:
    """Return standard normal draws, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(seed: int, size: int) -> Tensor:
    """Return a random orthogonal matrix, float64 (size, size)."""
    turn: Tensor = torch.linalg.qr(normal(seed, size, size)).Q
    return turn
