"""Calibration: whether predictions with a confidence of 0.8 are right in 8 of 10 cases."""

from __future__ import annotations

import torch
from torch import Tensor

from cl.errors import InputError
from cl.metrics.checks import Values, to_float64, vector


def expected_calibration_error(confidence: Values, correct: Values, bins: int = 15) -> Tensor:
    """Expected calibration error: the mean distance between confidence and accuracy over bins of equal width.

    ECE = sum_m |B_m| / N |acc(B_m) - conf(B_m)|, where bin m of M holds the confidences in ((m-1)/M, m/M]; in [0, 1],
    lower is better. It is biased upwards if bins hold few examples.
    Source: Guo et al. 2017 (arXiv 1706.04599), section 2, eq. 3.

    Args:
        confidence: (N,) the probability of each prediction, in [0, 1].
        correct: (N,) 1 where the prediction was right, else 0.
        bins: M.

    Raises:
        InputError: if the lengths differ, an entry is out of range, or bins is below 1.

    Example:
        >>> f"{expected_calibration_error([0.9, 0.9, 0.6, 0.6], [1, 1, 1, 0]):.6f}"
        '0.100000'
    """
    sure = vector("confidence", confidence, low=0)
    right = vector("correct", correct, len(sure), low=0)
    for name, values in (("confidence", sure), ("correct", right)):
        if (values > 1).any():
            raise InputError(f"{name} must not hold an entry above 1, got {values[values > 1].max().item():g}.")
    return ece_from_bins(*calibration_bins(sure, right, bins))


def calibration_bins(confidence: Tensor, correct: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums per bin that `ece_from_bins` takes; those of several batches can be added up.

    The inputs are not checked and nothing leaves the device. A NaN confidence is counted in the first bin and makes its
    sum NaN.

    Args:
        confidence: (N,) in [0, 1].
        correct: (N,) bool, or 0 and 1.
        bins: The number of bins, of equal width.

    Returns:
        Count, sum of confidence and sum of correct of each bin, (bins,) each, in the dtype of `confidence`.

    Raises:
        InputError: if bins is below 1.

    Example:
        >>> [v.tolist() for v in calibration_bins(torch.tensor([0.5, 0.75, 1.0]), torch.tensor([1, 0, 1]), bins=2)]
        [[1.0, 2.0], [0.5, 1.75], [1.0, 1.0]]
    """
    if bins < 1:
        raise InputError(f"Calibration needs at least one bin, got bins={bins}.")
    index = (confidence.nan_to_num(0.0) * bins).ceil().long().sub(1).clamp(0, bins - 1)
    sums = torch.zeros(3, bins, dtype=confidence.dtype, device=confidence.device)
    rows = torch.stack([torch.ones_like(confidence), confidence, correct.to(confidence.dtype)])
    sums.index_add_(1, index, rows)
    return sums[0], sums[1], sums[2]


def ece_from_bins(count: Tensor, confidence: Tensor, correct: Tensor) -> Tensor:
    """Expected calibration error from the sums of each bin, over the last axis.

    ECE = 1/N sum_m |correct[m] - confidence[m]| with N = sum_m count[m], in [0, 1], lower is better, NaN for N = 0.
    The sums of parts of the data add up. Source: Guo et al. 2017 (arXiv 1706.04599), eq. 3.

    Args:
        count: (..., bins) number of examples.
        confidence: (..., bins) sum of their confidences.
        correct: (..., bins) number of right predictions.

    Returns:
        (...), such as one value per task for sums of shape (T, bins).

    Raises:
        InputError: if the shapes differ or there is no axis of bins.

    Example:
        >>> ece_from_bins(torch.tensor([[2, 2]]), torch.tensor([[0.5, 1.5]]), torch.tensor([[0, 2]]))
        tensor([0.2500], dtype=torch.float64)
    """
    parts = [to_float64(n, v) for n, v in (("count", count), ("confidence", confidence), ("correct", correct))]
    shapes = [tuple(part.shape) for part in parts]
    if shapes[0] == () or 0 in shapes[0] or len(set(shapes)) > 1:
        raise InputError(f"count, confidence and correct must have one shape (..., bins), got {shapes}.")
    number, sure, right = parts
    return (right - sure).abs().sum(-1) / number.sum(-1)
