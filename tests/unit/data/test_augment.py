from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from cl.data.augment import ContrastiveView, Normalize, RandomCropFlip, _luma, _turn_hue
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


def crops(scale: float, flip: bool, number: int = 3000) -> np.ndarray:
    """Left, right, top and bottom ends of crops in parts of the image, read off images of their own coordinates."""
    at = (torch.arange(64.0) + 0.5) / 64
    x = torch.stack([at.expand(64, 64), at[:, None].expand(64, 64)]).expand(number, 2, 64, 64)
    out = ContrastiveView(scale, flip, 0.0)(x, np.random.default_rng(0))
    across, down = out[:, 0, 32], out[:, 1, :, 32]
    ends = []
    for line in (across, down):
        slope = (line[:, 40] - line[:, 23]) / 17  # of the middle, which the border does not hold up
        middle = (line[:, 40] + line[:, 23]) / 2
        ends += [middle - 32 * slope, middle + 32 * slope]
    return torch.stack(ends).double().numpy()


def test_crops_have_a_uniform_area_an_aspect_near_one_and_any_place() -> None:
    left, right, top, bottom = crops(0.2, flip=False)
    width, height = right - left, bottom - top
    assert min(left.min(), top.min()) > -1e-3 and max(right.max(), bottom.max()) < 1 + 1e-3
    whole = (width < 0.999) & (height < 0.999)  # not cut at the image's sides
    ratio = (width / height)[whole]
    assert 0.749 < ratio.min() < 0.76 and 1.31 < ratio.max() < 1.335
    area = (width * height)[whole & (width * height < 0.75)]  # below 3/4 no aspect is ever cut
    assert stats.kstest((area - 0.2) / 0.55, "uniform").pvalue > 1e-4
    free = width < 0.9
    place = left[free] / (1 - width[free])
    assert stats.kstest(place, "uniform").pvalue > 1e-4


def test_half_of_the_views_are_mirrored_if_asked() -> None:
    for flip, low, high in ((True, 1380, 1620), (False, 0, 0)):
        left, right, top, bottom = crops(0.5, flip)
        assert low <= (right < left).sum() <= high and (bottom > top).all()


def test_colours_change_as_torchvision_says() -> None:
    from torchvision.transforms import functional as reference

    x = 0.3 + 0.3 * torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    draw = torch.rand(6, 6, generator=torch.Generator().manual_seed(1))
    draw[3], draw[4], draw[5] = 0.5, 0.0, 1.0  # no turn of the hue; jittered; not grey
    out = ContrastiveView(jitter=0.4)._colours(x, draw)
    for i in range(6):
        brightness, contrast, saturation = (0.6 + 0.8 * draw[:3, i]).tolist()
        image = reference.adjust_brightness(x[i], brightness)
        image = reference.adjust_saturation(reference.adjust_contrast(image, contrast), saturation)
        torch.testing.assert_close(out[i].clamp(0, 1), image, atol=2e-3, rtol=0)


def test_a_hue_turned_keeps_its_brightness_and_comes_round() -> None:
    x = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_turn_hue(x, torch.ones(4)), x, atol=1e-5, rtol=0)
    third = torch.full((4,), 1 / 3)
    turned = _turn_hue(x, third)
    torch.testing.assert_close(_luma(turned), _luma(x), atol=1e-3, rtol=0)
    torch.testing.assert_close(_turn_hue(_turn_hue(turned, third), third), x, atol=1e-5, rtol=0)
    grey = x[:, :1].expand_as(x)
    torch.testing.assert_close(_turn_hue(grey, third), grey, atol=1e-3, rtol=0)


def test_four_views_in_five_are_jittered_and_one_in_five_is_grey() -> None:
    x = torch.tensor([0.2, 0.5, 0.7]).view(3, 1, 1).expand(4000, 3, 2, 2)
    out = ContrastiveView(1.0, False, 0.4)(x, np.random.default_rng(0))
    plain = (out - x).abs().amax((1, 2, 3)) < 1e-6
    grey = (out - out[:, :1]).abs().amax((1, 2, 3)) < 1e-6
    assert stats.binomtest(int(plain.sum()), 4000, 0.2 * 0.8).pvalue > 1e-4
    assert stats.binomtest(int(grey.sum()), 4000, 0.2).pvalue > 1e-4


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_views_of_bytes_are_floats_of_their_shape_and_the_draws_alone_decide(channels: int) -> None:
    x = torch.randint(0, 256, (5, channels, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = ContrastiveView()
    one, other = (view(x, np.random.default_rng(3)) for _ in range(2))
    assert one.shape == x.shape and one.dtype == torch.float32 and torch.equal(one, other)
    assert float(one.min()) >= 0 and float(one.max()) <= 1 and not view.state_dict()
    alone = view(x[:1], np.random.default_rng(3))
    assert alone.shape == (1, channels, 8, 6)
    with pytest.raises(InputError, match=r"ContrastiveView\.scale=0 must be above 0"):
        ContrastiveView(scale=0)


def test_modules_add_nothing_to_a_checkpoint() -> None:
    assert not Normalize([0.1], [0.2]).state_dict() and not RandomCropFlip().state_dict()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_on_the_gpu() -> None:
    x = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    for module in (RandomCropFlip(), RandomCropFlip(0)):
        host = module(x, np.random.default_rng(0))
        device = module(x.cuda(), np.random.default_rng(0))
        assert device.is_cuda and torch.equal(device.cpu(), host)
    normalize = Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    torch.testing.assert_close(normalize.cuda()(x.cuda()).cpu(), normalize.cpu()(x))
