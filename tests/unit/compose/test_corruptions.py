"""Corruptions: what they are functions of, and each against closed forms or an independent implementation.

Statistical tests draw with fixed seeds; each would fail by chance, for another seed, at the rate ALPHA.
"""

from __future__ import annotations

import colorsys
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from cl.compose import corruptions
from cl.compose.corruptions import CORRUPTIONS, corrupt
from cl.errors import InputError

ALPHA = 1e-4
FIXED = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
SEVERITIES = range(1, 6)


def images(num_images, height=32, width=32, channels=3, seed=0):
    """Noise with the spectrum of photographs, roughly: amplitude falls as the frequency grows."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width) * width)
    spectrum = np.fft.fft2(draw.normal(size=(num_images, channels, height, width))) / np.maximum(frequency, 1)
    x = np.fft.ifft2(spectrum).real
    x = 128 + 50 * x / x.std((2, 3), keepdims=True)
    return torch.from_numpy(x.clip(0, 255).astype(np.uint8))


def constant(value, num_images=1, size=32, channels=3):
    """Images of one value, but for the first pixel, which tells them apart."""
    x = torch.full((num_images, channels, size, size), value, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(num_images) % 256
    x[:, 0, 0, 1] = torch.arange(num_images) // 256
    return x


X = images(40)
SMALL = images(10, 11, 13)


def by_severity(*values):
    return list(enumerate(values, 1))


def distance(y, x):
    return float((y.double() - x.double()).abs().mean())


def numpy_images(x):
    return x.permute(0, 2, 3, 1).squeeze(3).numpy()


# What the result is a function of


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 9, 21), (1, 40, 12), (3, 64, 64)])
def test_every_size_gives_new_images_of_the_same_shape_twice_the_same(kind, shape):
    x = images(2, *shape[1:], channels=shape[0])
    before, state = x.clone(), torch.get_rng_state()
    for severity in SEVERITIES:
        y = corrupt(x, kind, severity)
        assert y.dtype == torch.uint8 and y.shape == x.shape
        assert y.equal(corrupt(x, kind, severity))
    assert not y.equal(x)
    assert x.equal(before) and torch.get_rng_state().equal(state)
    assert corrupt(x[:0], kind, 1).shape == (0, *shape)


@given(
    rows=st.lists(st.integers(0, len(SMALL) - 1), min_size=1, max_size=12),
    kind=st.sampled_from(CORRUPTIONS),
    severity=st.integers(1, 5),
    seed=st.integers(0, 2**70),
)
@settings(max_examples=150, deadline=None)
def test_an_image_is_corrupted_alike_in_every_batch(rows, kind, severity, seed):
    assert corrupt(SMALL[rows], kind, severity, seed).equal(corrupt(SMALL, kind, severity, seed)[rows])


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_blocks_threads_and_memory_layout_change_nothing(kind, monkeypatch):
    x = X[:15]
    y = corrupt(x, kind, 5)
    assert corrupt(x.contiguous(memory_format=torch.channels_last), kind, 5).equal(y)
    torch.set_num_threads(2)
    try:
        assert corrupt(x, kind, 5).equal(y)
    finally:
        torch.set_num_threads(1)
    monkeypatch.setattr(corruptions, "_BLOCK", {"cpu": 7 * 3072})
    assert corrupt(x, kind, 5).equal(y)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_seed_matters_to_the_random_kinds_only(kind):
    first, other = (corrupt(X, kind, 2, seed) for seed in (0, 1))
    same = (first == other).flatten(1).all(1).double().mean()
    assert same == 1 if kind in FIXED else same < 0.3, "a streak has but a few directions on the grid"


@pytest.mark.parametrize("kind", sorted(set(CORRUPTIONS) - FIXED))
def test_images_that_differ_in_one_level_of_one_pixel_are_corrupted_apart(kind):
    x = X[:1].repeat(2, 1, 1, 1)
    x[1, 2, 31, 31] ^= 1
    y = corrupt(x, kind, 3)
    assert (y[0] != y[1]).sum() > 100
    assert corrupt(x[[0, 0]], kind, 3).unique(dim=0).shape[0] == 1, "and the same pixels alike"


def test_the_hash_is_splitmix64():
    state, mask, words = 0, 2**64 - 1, []
    for _ in range(4):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        words.append(z ^ (z >> 31))
    assert words[0] == 0xE220A8397B1DCDAF, "the published first word of seed 0"
    ours = corruptions._mix(torch.arange(1, 5) * corruptions._GOLDEN)
    assert [word % 2**64 for word in ours.tolist()] == words


def test_noise_is_uncorrelated_between_neighbours_channels_images_severities_and_seeds():
    x = constant(128, 60)
    draws = [corrupt(x, "gaussian_noise", s, seed).double() - 128 for s, seed in ((4, 0), (5, 0), (4, 1))]
    noise = [(d / d.std())[:, :, 1:] for d in draws]
    a = noise[0]
    pairs = [(a[..., 1:], a[..., :-1]), (a[..., 1:, :], a[..., :-1, :]), (a[..., 4:], a[..., :-4])]
    pairs += [(a[:, 0], a[:, 1]), (a[:, 1], a[:, 2]), (a[1:], a[:-1]), (a, noise[1]), (a, noise[2])]
    for left, right in pairs:
        z = float((left * right).mean()) * left.numel() ** 0.5
        assert stats.norm.sf(abs(z)) * 2 > ALPHA / len(pairs)


@pytest.mark.parametrize("kind", sorted(set(CORRUPTIONS) - {"elastic_transform", "frost"}))
def test_images_move_away_as_the_severity_grows(kind):
    """Not so for frost and elastic_transform, whose parameters do not grow; glass and motion blur have near ties."""
    moved = [distance(corrupt(X, kind, severity), X) for severity in SEVERITIES]
    slack = 0.9 if kind in ("glass_blur", "motion_blur") else 1
    assert all(b > slack * a for a, b in pairwise(moved)), moved
    assert moved[4] > 1.2 * moved[0] > 0


@pytest.mark.parametrize("kind", sorted(FIXED))
def test_grey_is_colour_with_equal_channels(kind):
    grey = images(5, channels=1)
    for severity in SEVERITIES:
        colour = corrupt(grey.expand(-1, 3, -1, -1), kind, severity)
        assert corrupt(grey, kind, severity).expand(-1, 3, -1, -1).equal(colour)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((X, "gausian_noise", 1), "no corruption called 'gausian_noise': did you mean 'gaussian_noise'"),
        ((X, "fog", 0), "severity=0 of fog is not in 1..5"),
        ((X, "fog", 6), "severity=6"),
        ((X, "fog", 1, -1), "seed=-1 of fog is negative"),
        ((X.float(), "fog", 1), r"torch.float32 of shape \(40, 3, 32, 32\): give uint8"),
        ((X[:, :2], "fog", 1), r"\(40, 2, 32, 32\)"),
        ((X[..., :7], "fog", 1), r"at least 8 pixels"),
        ((X[0], "fog", 1), r"\(3, 32, 32\)"),
    ],
)
def test_what_is_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        corrupt(*arguments)


# Noise


def accept(observed, probability, num_draws):
    """Chi-square test of counts against probabilities; rare cells are pooled."""
    rare = probability * num_draws < 10
    expected = np.append(probability[~rare], max(1 - probability[~rare].sum(), 1e-12)) * num_draws
    counts = np.append(observed[~rare], num_draws - observed[~rare].sum())
    keep = expected > 1
    assert counts[~keep].sum() <= 5
    chi2 = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    assert stats.chi2.sf(chi2, keep.sum() - 1) > ALPHA, chi2


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("value", [128, 20])
def test_gaussian_noise_is_a_rounded_and_clipped_normal(severity, value):
    scale = 255 * [0.04, 0.06, 0.08, 0.09, 0.10][severity - 1]
    y = corrupt(constant(value, 100), "gaussian_noise", severity)[:, 1:].numpy()
    edge = np.r_[-np.inf, np.arange(255) + 0.5, np.inf]
    accept(np.bincount(y.ravel(), minlength=256), np.diff(stats.norm.cdf(edge, value, scale)), y.size)


@pytest.mark.parametrize(("severity", "photons"), by_severity(500, 250, 100, 75, 50))
@pytest.mark.parametrize("value", [3, 100, 240])
def test_shot_noise_is_poisson(severity, photons, value):
    y = corrupt(constant(value, 100), "shot_noise", severity)[:, 1:].numpy()
    count = np.arange(2 * photons)
    level = np.rint(np.minimum(count / photons, 1) * 255).astype(int)
    probability = np.bincount(level, stats.poisson.pmf(count, value / 255 * photons), minlength=256)
    accept(np.bincount(y.ravel(), minlength=256), probability, y.size)
    if value == 100:  # so far from the ends that the moments are those of the count
        assert y.mean() == pytest.approx(value, abs=0.1)
        assert y.var() == pytest.approx(255 * value / photons, rel=0.05), "up to what rounding to levels takes"


def test_shot_noise_of_black_is_black():
    assert corrupt(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "shot_noise", 5).max() == 0


@pytest.mark.parametrize(("severity", "amount"), by_severity(0.01, 0.02, 0.03, 0.05, 0.07))
def test_impulse_noise_is_half_salt_and_half_pepper(severity, amount):
    y = corrupt(constant(128, 100), "impulse_noise", severity)[:, 1:].numpy()
    probability = np.zeros(256)
    probability[[0, 128, 255]] = amount / 2, 1 - amount, amount / 2
    accept(np.bincount(y.ravel(), minlength=256), probability, y.size)
    assert set(np.unique(y)) == {0, 128, 255}


# Blur


def near(y, exact, tolerance=0.5):
    """Whether the levels are exact values rounded, give or take a tie."""
    return np.abs(y.double().numpy() - np.clip(exact, 0, 255)).max() <= tolerance + 1e-3


@pytest.mark.parametrize(
    ("severity", "radius", "alias"), [(1, 0.3, 0.4), (2, 0.4, 0.5), (3, 0.5, 0.6), (4, 1, 0.2), (5, 1.5, 0.1)]
)
def test_defocus_blur_convolves_with_a_smoothed_disk(severity, radius, alias):
    disk = np.array([[float(i * i + j * j <= radius**2) for j in range(-3, 4)] for i in range(-3, 4)])
    kernel = ndimage.gaussian_filter(disk / disk.sum(), alias, radius=1, mode="constant")
    exact = ndimage.convolve(SMALL.double().numpy(), kernel[None, None], mode="mirror")
    assert near(corrupt(SMALL, "defocus_blur", severity), exact)


def streak(degrees, radius, sigma):
    """The one-sided Gaussian of ImageMagick's motion blur as a kernel to correlate with."""
    reach = 2 * radius
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for i in range(reach + 1):
        y, x = (int(np.ceil(i * part - 0.5)) for part in (np.sin(np.radians(degrees)), np.cos(np.radians(degrees))))
        kernel[reach + y, reach + x] += np.exp(-(i**2) / (2 * sigma**2))
    return kernel / kernel.sum()


@pytest.mark.parametrize(("severity", "radius", "sigma"), [(1, 6, 1), (3, 6, 2), (5, 9, 2.5)])
def test_motion_blur_is_a_streak_in_some_direction_within_45_degrees(severity, radius, sigma):
    x = images(3, 16, 16, channels=1)
    y = corrupt(x, "motion_blur", severity)
    for clean, blurred in zip(x[:, 0].double().numpy(), y[:, 0], strict=True):
        angles = np.arange(-70, 70, 0.5)
        exact = (ndimage.correlate(clean, streak(a, radius, sigma), mode="nearest") for a in angles)
        fits = angles[[near(blurred, e, tolerance=0.6) for e in exact]]  # 0.6: the faint end of the streak is cut off
        assert len(fits) and np.abs(fits).min() < 45
        assert np.ptp(fits) < 20, "one direction, or those that look the same on the grid"


def test_motion_blur_directions_are_uniform():
    x = torch.zeros(400, 1, 33, 33, dtype=torch.uint8)
    x[:, 0, 16, 16] = 255
    x[:, 0, 0, 0] = torch.arange(400) % 200
    x[:, 0, 32, 0] = torch.arange(400) // 200
    y = corrupt(x, "motion_blur", 5)[:, 0, 4:29, 4:29].double()
    place = torch.arange(25) - 12.0
    slope = (y * place[:, None]).sum((1, 2)) / (y * place).sum((1, 2))  # of the centre of mass, from the spot
    assert ((y * place).sum((1, 2)) < 0).all(), "a pixel takes from its right, so the spot smears to the left"
    angle = np.degrees(np.arctan(slope.numpy()))
    assert stats.kstest(angle, stats.uniform(-45, 90).cdf).statistic < 0.13  # 0.11 at ALPHA, 0.02 for whole pixels


def enlarge_middle(x, factor):
    """Cut out as much as fills the image when enlarged; scipy enlarges it; cut what is over."""
    size = x.shape[2]
    crop = int(np.ceil(size / factor))
    first = (size - crop) // 2
    large = ndimage.zoom(x[..., first : first + crop, first : first + crop], (1, 1, factor, factor), order=1)
    first = (large.shape[2] - size) // 2
    return large[..., first : first + size, first : first + size]


@pytest.mark.parametrize(("severity", "stop"), by_severity(1.06, 1.11, 1.16, 1.21, 1.26))
@pytest.mark.parametrize("size", [32, 20])
def test_zoom_blur_averages_enlargements(severity, stop, size):
    x = images(3, size, size)
    factors = np.arange(1, stop, 0.01)
    total = x.double().numpy() + sum(enlarge_middle(x.double().numpy(), factor) for factor in factors)
    assert near(corrupt(x, "zoom_blur", severity), total / (len(factors) + 1), 0.51)


@pytest.mark.parametrize("factor", [1, 1.25, 1.75, 2.25])
def test_snowflakes_are_enlarged_as_by_scipy(factor):
    x = X[:2].double()
    ours = corruptions._separable(x, *corruptions._zoom_matrices(x, factor)).numpy()
    assert np.abs(ours - enlarge_middle(x.numpy(), factor)).max() < 0.01


@pytest.mark.parametrize(("sigma", "truncate"), [(0.05, 4), (0.25, 4), (0.4, 4), (1.28, 3), (6.4, 3)])
def test_gaussian_smoothing_is_scipys(sigma, truncate):
    x = SMALL.double()
    smooth = [corruptions._gaussian_matrix(size, sigma, truncate) for size in x.shape[2:]]
    ours = corruptions._separable(x, *smooth).numpy()
    exact = ndimage.gaussian_filter(x.numpy(), sigma, axes=(2, 3), mode="reflect", truncate=truncate)
    assert np.abs(ours - exact).max() < 0.02, "entries are multiples of 2^-18"


def test_glass_blur_takes_each_pixel_from_one_of_four_as_the_scan_of_the_paper_s_script_does():
    grid = torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")).to(torch.uint8)
    x = torch.cat([grid, grid[:1]])[None].repeat(40, 1, 1, 1) * 8
    x[:, 2] = torch.arange(40, dtype=torch.uint8)[:, None, None]  # tells the copies apart
    y = corrupt(x, "glass_blur", 1)
    offset = (x.int() - y.int())[:, :2] // 8
    assert (offset[:, :, :2] == 0).all() and (offset[:, :, :, :2] == 0).all()
    inner = offset[:, :, 2:, 2:]
    assert set(inner.unique().tolist()) == {0, 1}
    counts = np.bincount((2 * inner[:, 0] + inner[:, 1]).flatten().numpy(), minlength=4)
    assert stats.chisquare(counts).pvalue > ALPHA
    scan = numpy_images(x[:1])[0].copy()
    for h in range(31, 1, -1):
        for w in range(31, 1, -1):
            dy, dx = (-int(part) for part in offset[0, :, h, w])
            scan[h, w], scan[h + dy, w + dx] = scan[h + dy, w + dx], scan[h, w]
    assert np.array_equal(scan, numpy_images(y)[0])


def test_glass_blur_of_two_passes_reaches_two_pixels_and_smooths():
    x = torch.zeros(200, 1, 16, 16, dtype=torch.uint8)
    x[:, 0, 8, 8] = 255
    x[:, 0, 0, 0] = torch.arange(200)
    far = [corrupt(x, "glass_blur", s)[:, 0, 4:].amax(0) > 128 for s in (2, 4)]
    assert far[0].nonzero().tolist() == [[4, 8], [4, 9], [5, 8], [5, 9]]
    assert far[1].nonzero().tolist() == [[i, j] for i in (4, 5, 6) for j in (8, 9, 10)]
    flat = torch.full((1, 1, 16, 16), 77, dtype=torch.uint8)
    assert corrupt(flat, "glass_blur", 5).equal(flat)


# Weather


def test_snow_adds_its_flakes_twice_the_second_time_turned_round():
    black = constant(0, 30)
    black[:, 0, 0, 1] = 0
    for severity, keep in enumerate([0.95, 0.9, 0.9, 0.85, 0.8], 1):
        y = corrupt(black, "snow", severity)
        inner = y[:, :, 2:-2, 2:-2]
        assert inner.equal(inner.flip(2, 3)) and inner[:, 0].equal(inner[:, 1])
        assert abs(int(inner.min()) - (1 - keep) * 127.5) < 0.51, "where no flake fell"
        along, across = (inner.double().diff(dim=axis).abs().mean() for axis in (2, 3))
        assert along < 0.8 * across, "it falls more or less from above"


def test_snow_falls_as_thick_as_its_normal_field_says():
    mean, std, threshold = 0.1, 0.2, 0.6
    field = stats.truncnorm((threshold - mean) / std, (1 - mean) / std, mean, std)
    thick = stats.norm.sf(threshold, mean, std) - stats.norm.sf(1, mean, std)
    expected = 2 * 255 * (thick * field.mean() + stats.norm.sf(1, mean, std))
    y = corrupt(constant(25, 1000), "snow", 1)[:, 1].double()
    each = y.mean((1, 2)) - (0.95 * 25 + 0.05 * (1.5 * 25 + 127.5))  # 32, a whole level
    error = float(each.std()) / len(each) ** 0.5
    assert abs(float(each.mean()) - expected) < stats.norm.isf(ALPHA / 2) * error + 0.15  # 0.15: levels are rounded


@pytest.mark.parametrize(("severity", "amount"), by_severity(0.2, 0.5, 0.75, 1, 1.5))
def test_fog_lies_between_none_and_all_of_it(severity, amount):
    for value in (60, 200):
        y = corrupt(torch.full((1, 3, 32, 32), value, dtype=torch.uint8), "fog", severity)
        thin = value * value / (value + 255 * amount)
        assert abs(int(y.min()) - thin) <= 0.5 and int(y.max()) == value
        assert y[:, 0].equal(y[:, 2]), "fog has no colour"
    assert corrupt(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "fog", severity).max() == 0


def diamond_square(size, decay, draw):
    """The textbook algorithm, point by point, on a torus."""
    field, step, amplitude = np.zeros((size, size)), size, 1.0

    def put(i, j, around):
        field[i % size, j % size] = np.mean([field[a % size, b % size] for a, b in around]) + draw.uniform(-1, 1) * (
            amplitude
        )

    while step > 1:
        h = step // 2
        for i in range(h, size, step):
            for j in range(h, size, step):
                put(i, j, [(i - h, j - h), (i - h, j + h), (i + h, j - h), (i + h, j + h)])
        for i in range(0, size, h):
            for j in range(h if (i // h) % 2 == 0 else 0, size, step):
                put(i, j, [(i - h, j), (i + h, j), (i, j - h), (i, j + h)])
        step, amplitude = h, amplitude / decay**2
    return (field - field.min()) / np.ptp(field)


@pytest.mark.parametrize(("severity", "amount", "decay"), [(2, 0.5, 3), (5, 1.5, 1.75)])
def test_fog_is_a_diamond_square_fractal(severity, amount, decay):
    x = torch.full((300, 3, 16, 16), 255, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(300) % 250
    x[:, 0, 0, 1] = torch.arange(300) // 250
    ours = (corrupt(x, "fog", severity)[:, 1].numpy() / 255 * (1 + amount) - 1) / amount
    draw = np.random.default_rng(0)
    theirs = np.stack([diamond_square(16, decay, draw) for _ in range(300)])
    for statistic in (
        lambda f: f.mean((1, 2)),
        lambda f: f.std((1, 2)),
        *(lambda f, k=k: np.abs(np.roll(f, k, 2) - f).mean((1, 2)) for k in (1, 2, 4, 8)),
        *(lambda f, k=k: np.abs(np.roll(f, k, 1) - f).mean((1, 2)) for k in (1, 8)),
    ):
        assert stats.ttest_ind(statistic(ours), statistic(theirs), equal_var=False).pvalue > ALPHA / 8


def test_frost_has_the_brightness_and_tint_of_the_script_s_photographs():
    x = constant(0, 1000)
    for severity, weight in ((2, 0.3), (5, 0.45)):
        y = corrupt(x, "frost", severity)[:, :, 1:].double() / weight
        assert y.mean((0, 2, 3)).tolist() == pytest.approx([144, 165, 177], rel=0.04), "measured on the photographs"
        grey = corrupt(x[:, :1], "frost", severity)[:, :, 1:].double() / weight
        assert float(grey.mean()) == pytest.approx(162, rel=0.04)
        assert float(grey.mean((1, 2, 3)).std()) == pytest.approx(38.5, rel=0.1), "from photograph to photograph"
        assert float(grey.var((2, 3)).mean() ** 0.5) == pytest.approx(23.5, rel=0.1), "within one"
        rest = grey - grey.mean((2, 3), keepdim=True)
        neighbours = float((rest[..., 1:] * rest[..., :-1]).mean() / rest.square().mean())
        assert 0.23 < neighbours < 0.53, "as the five photographs"


@pytest.mark.parametrize(("severity", "keep"), by_severity(1, 1, 0.9, 0.85, 0.75))
def test_frost_keeps_a_share_of_the_image(severity, keep):
    dark, light = (corrupt(constant(value, 1000, channels=1), "frost", severity)[:, :, 1:] for value in (0, 40))
    gain = float(light.double().mean() - dark.double().mean()) / 40
    assert gain == pytest.approx(keep, abs=0.07)


# Colour, geometry and coding


@pytest.mark.parametrize(("severity", "amount"), by_severity(0.05, 0.1, 0.15, 0.2, 0.3))
def test_brightness_adds_to_the_value_of_hsv(severity, amount):
    x = SMALL[:4].clone()
    x[0, :, 0] = 0  # black has no hue
    x[0, 0, 1], x[0, 1:, 1] = 255, 0  # pure red
    y = numpy_images(corrupt(x, "brightness", severity)).reshape(-1, 3)
    for before, after in zip(numpy_images(x).reshape(-1, 3) / 255, y, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before)
        assert np.abs(after - 255 * np.array(colorsys.hsv_to_rgb(h, s, min(v + amount, 1)))).max() < 0.501


@pytest.mark.parametrize(("severity", "factor"), by_severity(0.75, 0.5, 0.4, 0.3, 0.15))
def test_contrast_shrinks_towards_the_mean_of_each_channel(severity, factor):
    x = SMALL.double().numpy()
    mean = x.mean((2, 3), keepdims=True)
    assert near(corrupt(SMALL, "contrast", severity), mean + factor * (x - mean))


def ramps(size, num_images):
    """Red tells the row, green the column, blue the image."""
    line = torch.linspace(0, 255, size).round()
    x = torch.stack([line[:, None].expand(size, size), line.expand(size, size), torch.zeros(size, size)])
    x = x.repeat(num_images, 1, 1, 1).to(torch.uint8)
    x[:, 2] = torch.arange(num_images, dtype=torch.uint8)[:, None, None]
    return x


def affine_fit(field):
    """Least squares over the inner pixels of (N, K, 32, 32): maps of (row, column, 1), (N, 3, K), and what is left."""
    inner = slice(8, 24)
    row, column = np.mgrid[inner, inner]
    design = np.stack([row.ravel(), column.ravel(), np.ones(row.size)], 1)
    target = field[:, :, inner, inner].reshape(*field.shape[:2], -1).transpose(0, 2, 1)
    solution = np.linalg.pinv(design) @ target
    return solution, target - design @ solution


def source_places(severity):
    y = corrupt(ramps(32, 100), "elastic_transform", severity)
    return affine_fit(y[:, :2].double().numpy() * (31 / 255))


def test_the_mildest_elastic_transform_moves_three_points_uniformly():
    affine, rest = source_places(1)
    assert np.abs(rest).max() < 0.2, "levels are 0.12 pixels apart"
    points = np.array([[26, 26], [6, 26], [6, 6]])  # (row, column): the centre and a third of the side
    moved = np.linalg.solve(affine[:, :2].transpose(0, 2, 1), (points - affine[:, 2:]).transpose(0, 2, 1))
    shift = (moved.transpose(0, 2, 1) - points) / (0.08 * 32)
    assert 0.98 < np.abs(shift).max() < 1.01, "all 600 below 0.98 by chance at 0.98^600"
    for part in shift.reshape(len(shift), -1).T:
        assert stats.kstest(part, stats.uniform(-1, 2).cdf).pvalue > ALPHA / 6
    row, column = np.mgrid[:32, :32]
    beyond = np.einsum("nck,cij->nkij", affine, np.stack([row, column, np.ones((32, 32))]))
    mirrored = 31 - np.abs(31 - np.abs(beyond))
    y = corrupt(ramps(32, 100), "elastic_transform", 1)[:, :2].double().numpy() * (31 / 255)
    assert np.abs(y - mirrored).max() < 0.5 and (beyond < -2).any() and (beyond > 33).any()
    correlation = np.corrcoef(shift.reshape(len(shift), -1).T) - np.eye(6)
    assert np.abs(correlation).max() < 0.45  # 4.5 standard errors; 15 pairs


@pytest.mark.parametrize(("severity", "amplitude", "sigma"), [(3, 0.08, 0.06), (4, 0.1, 0.04), (5, 0.1, 0.03)])
def test_elastic_displacements_are_smoothed_uniform_noise(severity, amplitude, sigma):
    _, rest = source_places(severity)
    noise = np.random.default_rng(0).uniform(-1, 1, (200, 32, 32))
    field = 32 * amplitude * ndimage.gaussian_filter(noise, 32 * sigma, axes=(1, 2), truncate=3)
    level = np.rint((np.arange(32) + field) * (255 / 31))
    _, theirs = affine_fit(level[:, None] * (31 / 255))
    assert rest.std() == pytest.approx(theirs.std(), rel=0.05)
    assert abs((rest[..., 0] * rest[..., 1]).mean()) < 0.1 * rest.var(), "rows and columns move apart"
    # neighbours in a row: how smooth the field is
    step, their_step = (np.diff(r.reshape(-1, 16, 16, r.shape[2]), axis=2).std() for r in (rest, theirs))
    assert step == pytest.approx(their_step, rel=0.05)


@pytest.mark.parametrize(("severity", "scale"), by_severity(0.95, 0.9, 0.85, 0.75, 0.65))
def test_pixelate_is_pillow_s_box_filter_there_and_back(severity, scale):
    """At sizes where no pixel's centre lies on the edge of a box, which Pillow's rounding errors decide."""
    for height, width in [(32, 32), (28, 28), (8, 9), (14, 64), (40, 33), (96, 224)]:
        x = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        for clean, ours in zip(numpy_images(x), numpy_images(corrupt(x, "pixelate", severity)), strict=True):
            small = Image.fromarray(clean).resize((int(width * scale), int(height * scale)), Image.Resampling.BOX)
            assert np.array_equal(np.asarray(small.resize((width, height), Image.Resampling.BOX)), ours)


@pytest.mark.parametrize(("severity", "quality"), by_severity(80, 65, 58, 50, 40))
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32), (3, 17, 27), (1, 8, 9), (3, 224, 64)])
def test_jpeg_compression_is_pillow_s(severity, quality, shape):
    x = images(12, *shape[1:], channels=shape[0])
    theirs = []
    for image in numpy_images(x):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        theirs.append(np.asarray(Image.open(file)))
    ours = numpy_images(corrupt(x, "jpeg_compression", severity)).astype(int)
    assert np.abs(ours - np.stack(theirs)).mean() < 0.4  # libjpeg transforms in integers
    assert np.abs(ours - numpy_images(x)).mean() > 2
