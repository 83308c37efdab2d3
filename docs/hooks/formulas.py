"""Formulas become MathML while the site is built, which browsers draw without a script, a font or a network."""

from __future__ import annotations

import logging
import re
from html import escape, unescape
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>|:math:<code>(.*?)</code>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_LOG = logging.getLogger("mkdocs.hooks.formulas")
_TAG = re.compile(r"\\tag\{(.*?)\}")


def markdown(docstring: str) -> str:
    r"""Return the Markdown of a docstring, whose formulas are written as for Sphinx.

    Example:
        >>> markdown("The loss :math:`L`:\n\n.. math:: L = a_1\n    + a_2\n\nwhere ``x`` < 3.")
        'The loss $L$:\n\n$$\nL = a_1 + a_2\n$$\n\nwhere `x` &lt; 3.'
    """
    parts = re.split(r"^\.\. math::(.*(?:\n[ \t]+\S.*)*)", docstring, flags=re.MULTILINE)
    formulas = [f"\n$$\n{' '.join(part.split())}\n$$\n" for part in parts[1::2]]
    text = "".join(a + b for a, b in zip(map(prose, parts[::2]), [*formulas, ""], strict=True))
    text = re.sub(r"(?<=\.)\n(?=[A-Z][a-z]+(?: [a-z]+){0,4}: )", "\n\n", text)  # "Scenarios: ..." is a paragraph
    return re.sub(r"\n{3,}", "\n\n", text)


def prose(text: str) -> str:
    """Return the Markdown of sentences: formulas and code as they are, and no other sign with a meaning."""
    text = re.sub(r":math:`([^`]+)`", lambda m: f"${' '.join(m[1].split())}$", text).replace("``", "`")
    spans = re.split(r"(`[^`]*`|\$[^$]*\$)", text)
    spans[::2] = [re.sub(r"([*_|])", r"\\\1", escape(span, quote=False)) for span in spans[::2]]
    return "".join(spans)


def on_page_content(content: str, **_: Any) -> str:
    """Draw the formulas of a page."""
    content = _DISPLAY.sub(lambda m: f'<div class="formula">{_mathml(m[1], "block")}</div>', content)
    content = content.replace("::</p>", ":</p>")  # what stands before a block of code
    content = content.replace(" ± ", "&nbsp;±&nbsp;")
    return _INLINE.sub(lambda m: _mathml(m[1] or m[2], "inline"), content)


def _mathml(latex: str, display: str) -> str:
    latex = unescape(latex).strip()
    number = _TAG.search(latex)
    drawn = convert(re.sub(r"\\arg\b", r"\\operatorname{arg}", _TAG.sub("", latex)), display=display)
    if "\\" in drawn:
        _LOG.warning("A command of this formula has no MathML: %s", latex)
    return drawn + (f'<span class="number">({number[1]})</span>' if number else "")
