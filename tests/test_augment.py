from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl.augment import Normalize, RandomCropFlip
from cl.errors import InputError


def slow(x: Tensor, draws: np.ndarray, padding: int, flip: bool) -> Tensor:
    """Pad, slice and flip, one image after the other."""
    rows = []
    for image, (u, v, w) in zip(x, draws.T, strict=True):
        channels, height, width = image.shape
        padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
        padded[:, padding : padding + height, padding : padding + width] = image
        top, left = int(u * (2 * padding + 1)), int(v * (2 * padding + 1))
        crop = padded[:, top : top + height, left : left + width]
        rows.append(crop.flip(-1) if flip and w >= 0.5 else crop)
    return torch.stack(rows)


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    padding=st.integers(0, 9),
    flip=st.booleans(),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_equals_the_slow_reference(
    shape: tuple[int, ...], padding: int, flip: bool, dtype: torch.dtype, seed: int
) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape)).to(dtype)
    before = x.clone()
    out = RandomCropFlip(padding, flip)(x, np.random.default_rng(seed))
    draws = np.random.default_rng(seed).random((3, shape[0]))
    assert torch.equal(out, slow(x, draws, padding, flip))
    assert (out.dtype, out.shape, out.device) == (x.dtype, x.shape, x.device)
    assert torch.equal(x, before)


def test_offsets_are_uniform_and_flips_fair() -> None:
    """Each pixel value names its place, so the output tells what was drawn."""
    padding, size, batch = 2, 8, 20_000
    place = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, size, size).expand(batch, 1, size, size)
    out = RandomCropFlip(padding, flip=True)(place, np.random.default_rng(0))
    middle = out[:, 0, 4, 3:5].long() - 1
    flipped = middle[:, 0] > middle[:, 1]
    dy = middle[:, 0] // size - 4
    dx = torch.where(flipped, middle[:, 1], middle[:, 0]) % size - 3
    cells = ((dy + padding) * 5 + dx + padding) * 2 + flipped
    counts = torch.bincount(cells, minlength=50).double()
    expected = batch / 50
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == 50
    assert chi_square < 94.98  # the 0.9999 quantile at 49 degrees of freedom: fails once in 10,000 seeds


def test_rows_are_drawn_apart() -> None:
    x = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6).expand(64, 1, 6, 6)
    out = RandomCropFlip(3)(x, np.random.default_rng(0))
    assert len({tuple(row.flatten().tolist()) for row in out}) > 30


@pytest.mark.parametrize("module", [RandomCropFlip(4, True), RandomCropFlip(0, True), RandomCropFlip(1, False)])
def test_every_setting_draws_the_same_number(module: RandomCropFlip) -> None:
    used, reference = np.random.default_rng(5), np.random.default_rng(5)
    module(torch.zeros(7, 1, 4, 4), used)
    reference.random(21)
    assert used.bit_generator.state == reference.bit_generator.state


def test_refusals() -> None:
    with pytest.raises(InputError, match="padding=-1"):
        RandomCropFlip(-1)
    with pytest.raises(InputError, match="set augment=null"):
        RandomCropFlip()(torch.zeros(2, 5), np.random.default_rng(0))
    with pytest.raises(InputError, match="give one positive std for each mean"):
        Normalize([0.1, 0.2], [1.0, 1.0, 1.0])
    with pytest.raises(InputError, match="give one positive std for each mean"):
        Normalize([0.1], [0.0])


def test_normalize_uint8_is_torchvisions() -> None:
    from torchvision.transforms.functional import normalize

    mean, std = [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]
    x = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = Normalize(mean, std)(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, normalize(x / 255, mean, std), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6)])
def test_normalize_floats_per_channel(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    mean, std = [1.0, -2.0, 0.5], [0.5, 2.0, 1.0]
    column = (1, 3, *[1] * (len(shape) - 2))
    torch.testing.assert_close(
        Normalize(mean, std)(x), (x - torch.tensor(mean).view(column)) / torch.tensor(std).view(column)
    )
    torch.testing.assert_close(Normalize([2.0], [4.0])(x), (x - 2) / 4)
    out = Normalize()(x)
    assert torch.equal(out, x) and torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr()  # a network may write into what it receives


def test_modules_add_nothing_to_a_checkpoint() -> None:
    assert not Normalize([0.1], [0.2]).state_dict() and not RandomCropFlip().state_dict()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_on_the_gpu() -> None:
    x = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    for module in (RandomCropFlip(), RandomCropFlip(0)):
        host = module(x, np.random.default_rng(0))
        device = module(x.cuda(), np.random.default_rng(0))
        assert device.is_cuda and torch.equal(device.cpu(), host)
    normalize = Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    torch.testing.assert_close(normalize.cuda()(x.cuda()).cpu(), normalize.cpu()(x))
