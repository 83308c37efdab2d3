"""Where the files of the checkout lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
HELPERS = ROOT / "tests" / "helpers"
HARNESS = ROOT / "tests" / "harness"
