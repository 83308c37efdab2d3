"""Composite scores that single papers report; curriculum effectiveness, of R alone, is in `cl.metrics.transfer`."""

from __future__ import annotations

from torch import Tensor

from cl.metrics.checks import keep, vector


def hars_kore(gain: float, change: float) -> Tensor:
    """HARS: the harmonic mean of adaptation to new knowledge and retention of the old, in percent.

    HARS = 2 f_A f_R / (f_A + f_R) with f_A = 100 gain / (gain + 100) and f_R = change + 100; `gain` is the relative
    gain on new knowledge and `change` the relative change of the retained ability, both in percent, a loss negative.
    In [0, 100] for gain >= 0 and -100 <= change <= 0, higher is better; NaN for a negative gain, for a change below
    -100, and if both f_A and f_R are 0. Source: the KORE paper.

    Raises:
        InputError: if an argument is no number.

    Example:
        >>> f"{hars_kore(gain=150, change=-5):.6f}"
        '73.548387'
    """
    gained, changed = (vector(n, [v])[0] for n, v in (("gain", gain), ("change", change)))
    adapted, retained = 100 * gained / (gained + 100), changed + 100
    defined = (gained >= 0) & (retained >= 0) & (adapted + retained > 0)
    return keep(2 * adapted * retained / (adapted + retained), defined)
