"""The pages of docs/: the site builds, and the code of the tutorials is sound."""

from __future__ import annotations

import ast
import doctest
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from checkout import ROOT
from cl.app.listing import options

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_compiles_and_imports_what_exists(path: Path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for node in ast.walk(ast.parse(code)):
        for alias in node.names if isinstance(node, ast.Import) else ():
            import_module(alias.name)
        if isinstance(node, ast.ImportFrom):
            module = import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
    import cl

    used = {n.attr for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "cl"}
    assert used <= set(cl.__all__)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_committed_without_outputs(path: Path):
    """They are made when the site is built, so that they are those of this version."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_reads_without_a_network(tmp_path: Path):
    """Every tutorial is executed on the way."""
    pytest.importorskip("material", reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests run beside it
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    fetched = re.compile(
        r"<(?:script|img|iframe|source)[^>]* src=\"?https?://|<link[^>]* href=\"?https?://|@import|url\(http"
    )
    for page in [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]:
        assert fetched.search(page.read_text(encoding="utf-8")) is None, page
    card = (tmp_path / "reference" / "strategies" / "ewc.html").read_text(encoding="utf-8")
    assert "<math" in card and "cl.strategies.ewc.EWC" in card and ":math:" not in card
    first = (tmp_path / "tutorials" / "1_first_run.html").read_text(encoding="utf-8")
    assert "after 8+9" in first and "1_first_run_" in first, "its table and its picture"


def test_formulas_of_docstrings_become_formulas_of_pages(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("latex2mathml", reason="pip install -e '.[docs]'")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))
    formulas = import_module("formulas")
    assert doctest.testmod(formulas).attempted > 0 == doctest.testmod(formulas).failed
    page = formulas.on_page_content(
        r'<div class="arithmatex">\[\arg\min_i x_i \tag{2}\]</div><p>:math:<code>a_b</code></p>'
    )
    assert page.count("<math") == 2 and "(2)" in page and "\\" not in page
    for path in sorted([*ROOT.glob("strategies/*.py"), *ROOT.glob("streams/*.py")]):
        text = formulas.markdown(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
        assert "math:" not in text and text.count("$") % 2 == 0, path.name


@pytest.mark.slow
def test_the_command_of_every_card_composes(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))
    reference = import_module("reference")
    for group, page in (("strategy", reference.strategy), ("stream", reference.stream)):
        for name in [name for name in options(group) if name != "custom"]:
            command = re.search(r"^cl-run (.*)$", page(name), flags=re.MULTILINE)
            assert command is not None
            with initialize_config_module("cl.conf", version_base="1.3"):
                compose("config", overrides=shlex.split(command[1]))
