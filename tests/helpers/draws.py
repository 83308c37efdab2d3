"""What hypothesis draws, and how often."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

ALPHA = 1e-4  # error of a statistical test; seeds are fixed


quick = settings(deadline=None, max_examples=50)


seeds = st.integers(0, 2**31)
