"""Compare runs: align them, rank them in a leaderboard, and write `comparison.csv` and `comparison.html`.

The package itself can be called: `cl.compare(...)` is `cl.compare.comparison.compare`.
"""

import sys

from cl.lazy import make_callable

make_callable(sys.modules[__name__], "cl.compare.comparison:compare")
