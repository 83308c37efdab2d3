"""Pages of the site whose text stands elsewhere in the repository, so that it is written once."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
PAGES = {  # on the site: in the repository
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that hold in the repository into links that hold on the site."""
    uri = page.file.src_uri
    here = PAGES.get(uri, f"docs/{uri}")

    def on_site(match: re.Match[str]) -> str:
        target = normpath(join(dirname(here), match[1]))
        name = next((name for name, source in PAGES.items() if source == target), target.removeprefix("docs/"))
        name = name.replace(".ipynb", ".md")
        return f"]({relpath(name, dirname(uri) or '.')}{match[2]})"

    return re.sub(r"\]\(([\w./-]+\.(?:md|ipynb|svg|png))(#[\w-]+|)\)", on_site, markdown)
