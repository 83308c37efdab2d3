"""Text that fits into a picture, by its width in matplotlib's font."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import RendererAgg


DPI = 110  # resolution of the pictures; widths depend on it, as letters start at whole dots


def width(text: str, size: float) -> float:
    """Return the width of a text in inches, in matplotlib's default font of a size in points."""
    from matplotlib.font_manager import FontProperties

    dots: float = _renderer().get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0]
    return dots / DPI


@cache
def _renderer() -> RendererAgg:
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(1, 1, DPI)


def cut(text: str, inches: float, size: float) -> str:
    """Return a text no wider than so many inches, cut with an ellipsis if it is too wide.

    Example:
        >>> cut("iiiiii", 0.5, 10), cut("WWWWWW", 0.5, 10)
        ('iiiiii', 'WW…')
    """
    kept = text[: int(200 * inches / size) + 1] if len(text) > 200 * inches / size else text
    whole = kept == text
    while kept and width(kept if whole else f"{kept}…", size) > inches:
        kept, whole = kept[:-1].rstrip(), False
    return kept if whole else f"{kept}…"


def lines(parts: Iterable[str], inches: float, size: float, between: str = " ") -> list[str]:
    """Join parts of a text to lines no wider than so many inches; a single part that is too wide is cut.

    Example:
        >>> lines(["one", "two", "three"], 0.8, 10, between=" · ")
        ['one · two', 'three']
    """
    found: list[str] = []
    for part in parts:
        longer = f"{found[-1]}{between}{part}" if found else part
        if found and width(longer, size) <= inches:
            found[-1] = longer
        else:
            found.append(cut(part, inches, size))
    return found
