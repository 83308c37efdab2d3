"""Read the class attributes of strategies (scenarios, targets, needs, bound) from their source, without importing them.

Importing a strategy imports torch, which takes seconds.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from cl.errors import InputError, unknown

_CONTRACT = "cl.engine.strategy"
Card = dict[str, Any]


@cache
def source_tree(module: str) -> ast.Module:
    """Return the syntax tree of a module without importing it; an empty one if its source cannot be read."""
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return ast.Module([], [])
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def card(target: str) -> Card:
    """Return the class attributes of a strategy whose values are literals, inherited ones included.

    Args:
        target: The full name of its class.

    Example:
        >>> found = card("cl.strategies.icarl.ICaRL")
        >>> found["scenarios"], found["needs"], found["bound"]
        (('class', 'task'), ('memory', 'boundaries'), '')
    """
    module, _, name = target.rpartition(".")
    tree = source_tree(module)
    imported = _imported(tree)
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        return card(imported[name]) if name in imported else {}
    inherited: Card = {}
    for base in map(ast.unparse, reversed(found.bases if module != _CONTRACT else [])):
        first, dot, rest = base.partition(".")
        inherited |= card(imported.get(first, f"{module}.{first}") + dot + rest)
    return inherited | _literals(found.body)


def chosen(cards: Mapping[str, Card], wanted: Iterable[str]) -> list[str]:
    """Return the names of the strategies that meet all conditions.

    Args:
        cards: The card of each strategy, by name.
        wanted: Conditions, such as "scenario=class", "target=multilabel", "bound=upper" or "memory=no".

    Raises:
        InputError: If there is no such condition, or no strategy has such a value.

    Example:
        >>> cards = {name: card(f"cl.strategies.{name.lower()}.{name}") for name in ("ER", "EWC", "HAT", "Joint")}
        >>> chosen(cards, ["scenario=class", "memory=no"]), chosen(cards, ["bound=upper"])
        (['EWC', 'Joint'], ['Joint'])
    """
    values = {name: _values(card) for name, card in cards.items()}
    left = list(cards)
    for condition in wanted:
        key, _, value = condition.partition("=")
        known = {k: sorted({v for one in values.values() for v in one[k]} | _always(k)) for k in _values({})}
        if key not in known:
            raise unknown("condition on strategies", key, known)
        if value not in known[key]:
            raise InputError(f"{condition} chooses nothing: {key} is one of {', '.join(known[key])}.")
        left = [name for name in left if value in values[name][key]]
    return left


def _always(key: str) -> set[str]:
    return {"yes", "no"} if key in _needs() else set()


def _values(card: Card) -> dict[str, set[str]]:
    """Return, for each condition, the values of it that a strategy meets."""
    needs = {need: {"yes" if need in card.get("needs", ()) else "no"} for need in _needs()}
    return {
        "scenario": set(card.get("scenarios", ())),
        "target": set(card.get("targets", ())),
        "bound": {card.get("bound") or "no"},
        **needs,
    }


def _needs() -> dict[str, str]:
    needs: dict[str, str] = _literals(source_tree(_CONTRACT).body)["NEEDS"]
    return needs


def _imported(tree: ast.Module) -> dict[str, str]:
    """Return the full name of everything that a module imports, by the name that it has in the module."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def _literals(body: Iterable[ast.stmt]) -> dict[str, Any]:
    """Return the values of the names that a body assigns literals to."""
    found: dict[str, Any] = {}
    for node in body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        with suppress(ValueError):  # the value is not a literal
            value = ast.literal_eval(node.value)
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id: value for name in targets if isinstance(name, ast.Name)}
    return found
