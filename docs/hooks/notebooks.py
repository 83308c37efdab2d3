"""The tutorials: each notebook is executed while the site is built, and becomes a page with its outputs."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter


def on_files(files: Files, config: Any) -> Files:
    """Put a page of Markdown, with its pictures, in the place of each notebook."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        folder, _, _ = file.src_uri.rpartition("/")
        text, pictures = page(Path(str(file.abs_src_path)), config.extra["execute_tutorials"])
        files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=text))
        for picture, content in pictures.items():
            files.append(File.generated(config, f"{folder}/{picture}", content=content))
    return files


def page(path: Path, execute: bool = True) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by name; what it writes is thrown away."""
    notebook = nbformat.read(path, as_version=4)
    if execute:
        with TemporaryDirectory() as place:
            NotebookClient(notebook, timeout=300, resources={"metadata": {"path": place}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # on stderr Lightning describes the machine, which is not what is taught
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, resources={"unique_key": path.stem, "output_files_dir": "pictures"}
    )
    return text, resources["outputs"]
