"""Runs beside one another: what they share, a leaderboard, `comparison.csv` and `comparison.html`.

The package can be called: `cl.compare(...)` is `cl.compare.comparison.compare`.
"""

import sys

from cl.lazy import make_callable

make_callable(sys.modules[__name__], "cl.compare.comparison:compare")
