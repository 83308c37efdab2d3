"""Pieces of HTML that all parts of the page use."""

from __future__ import annotations

import html
import math


def text(value: object) -> str:
    """Return a value as text, escaped for HTML.

    Example:
        >>> text("<script>")
        '&lt;script&gt;'
    """
    return html.escape(str(value))


def datum(value: float, shown: str) -> str:
    """Return a number as HTML that shows a text and holds the exact value; "–" for NaN.

    Example:
        >>> datum(0.5, "50.0")
        '<data value="0.5">50.0</data>'
    """
    return "–" if math.isnan(value) else f'<data value="{float(value)!r}">{text(shown)}</data>'


def term(name: str, shown: str) -> str:
    """Return a link to a definition, which the page's script shows on hover and on focus."""
    return f'<a class="term" href="#def-{text(name)}">{text(shown)}</a>'


def table(caption: str, head: str, rows: str) -> str:
    """Return a table with a caption, a head row and further rows, which scrolls inside its box."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}"><table>'
        f"<caption><span>{text(caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
