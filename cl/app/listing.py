"""`cl-list`: lists the options of each group of the configuration, with one line on each."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Any

from cl.app.cards import Card, card, chosen, source_tree
from cl.app.plugins import GROUP
from cl.errors import InputError, unknown
from cl.settings import SETTINGS

SHOWN = ("strategy", "stream")
_SETTINGS = "settings"  # not a group, but the keys of the configuration


def groups() -> list[str]:
    """Return the names of the groups of options in `cl.conf`.

    Example:
        >>> "strategy" in groups()
        True
    """
    folders = [folder for folder in files("cl.conf").iterdir() if folder.is_dir()]
    return sorted(f.name for f in folders if any(part.name.endswith(".yaml") for part in f.iterdir()))


def options(group: str) -> dict[str, str]:
    """Return the options of a group, from `cl.conf` and from installed packages, with a line on each.

    The line on a strategy is the first paragraph of its module's docstring. The line on another option is the comment
    at the top of its YAML file or, without one, the first paragraph of the docstring of its `_target_`. No module is
    imported.

    Args:
        group: A group, such as "strategy"; or "settings", for the keys of the configuration and their meaning.

    Raises:
        InputError: If there is no such group.

    Example:
        >>> options("strategy")["gpm"]
        'Gradient Projection Memory (Saha, Garg and Roy 2021, algorithm 1).'
    """
    if group == _SETTINGS:
        return {key: row.help for key, row in SETTINGS.items()}
    if group not in groups():
        raise unknown("group", group, [*groups(), _SETTINGS])
    found = {
        path.name.removesuffix(".yaml"): line(path.read_text(encoding="utf-8"), group == "strategy")
        for path in _yamls(group)
    }
    return dict(sorted(found.items()))


def _yamls(group: str) -> Iterator[Any]:
    theirs = sorted((point.value for point in entry_points(group=GROUP)), reverse=True)
    for package in [*theirs, "cl.conf"]:  # the last wins, so no package replaces an option of `cl.conf`
        folder = files(package) / group
        if folder.is_dir():
            yield from (path for path in folder.iterdir() if path.name.endswith(".yaml"))


def line(text: str, is_method: bool = False) -> str:
    r"""Return a line on what a YAML file configures.

    Args:
        text: The text of the file.
        is_method: Whether it configures a strategy, whose module's docstring begins with its name and paper.

    Example:
        >>> line("# Wrong labels.\n_target_: cl.compose.labels.label_noise")
        'Wrong labels.'
        >>> line("# Of no interest.\ner:\n  _target_: cl.strategies.er.ER", is_method=True)[:36]
        'Experience Replay (Rolnick et al. 20'
    """
    name, _, thing = _target(text).rpartition(".")
    comment = re.match(r"((?:# .*\n)+)", re.sub(r"\A# @package.*\n", "", text))
    if name and (is_method or comment is None):
        return described(name, "" if is_method else thing)
    lines = comment.group(1).replace("# ", "").splitlines() if comment is not None else []
    whole = next((i for i, some in enumerate(lines) if some.endswith((".", ")"))), len(lines) - 1)
    return " ".join(lines[: whole + 1])


def _target(text: str) -> str:
    target = re.search(r"^\s*_target_: *([\w.]+)", text, flags=re.MULTILINE)
    return target.group(1) if target is not None else ""


def cards() -> dict[str, Card]:
    """Return the card of each strategy, see `cl.app.cards.card`, by the name of its option."""
    texts = {path.name.removesuffix(".yaml"): path.read_text(encoding="utf-8") for path in _yamls("strategy")}
    return {name: card(_target(text)) for name, text in sorted(texts.items())}


def described(module: str, thing: str = "") -> str:
    """Return the first paragraph of the docstring of a module, or of a class or function in it; "" without one."""
    node: ast.Module | ast.ClassDef | ast.FunctionDef = source_tree(module)
    if thing:
        defined = [part for part in node.body if isinstance(part, ast.ClassDef | ast.FunctionDef)]
        found = next((part for part in defined if part.name == thing), None)
        if found is None:
            return ""
        node = found
    return " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())


def _chosen(group: str, listed: dict[str, str], wanted: list[str]) -> dict[str, str]:
    if group != "strategy":
        raise InputError(f"{wanted[0]} chooses among strategies: list the group {group} without it.")
    left = chosen(cards(), wanted)
    if not left:
        raise InputError(f"No strategy meets all of {' '.join(wanted)}: leave one of them out.")
    return {name: listed[name] for name in left}


def main(arguments: list[str] | None = None) -> None:
    """Run `cl-list`.

    Args:
        arguments: Its command line; None means that of the process.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="cl-list", description="Lists what can be chosen by group=option.")
    known = ", ".join([*groups(), _SETTINGS])
    about = f"one of {known}. Conditions, such as scenario=class memory=no, choose among strategies."
    parser.add_argument("group", nargs="*", metavar="group|condition=value", help=about)
    given = parser.parse_args(arguments).group
    wanted = [word for word in given if "=" in word]
    console = Console()
    for group in [word for word in given if "=" not in word] or (("strategy",) if wanted else SHOWN):
        table = Table(box=None, pad_edge=False, show_header=False)
        try:
            listed = options(group)
            if wanted:
                listed = _chosen(group, listed, wanted)
        except InputError as error:
            parser.exit(1, f"{error}\n")
        for option, about in listed.items():
            name = option if group == _SETTINGS else f"{group}={option}"
            table.add_row(f"[bold]{name}[/]", escape(about))
        console.print(table, "")
