"""Paths on the command line as people write them, put in the quotes that Hydra's grammar wants around them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cl.files import expand_path


def at_home(arguments: Sequence[str]) -> list[str]:
    """Put the user's own folder in place of a ~ with which a value begins, as a shell does only with whole words.

    Example:
        >>> at_home(["~trainer.logger", "seed=1", "a=~"])
        ['~trainer.logger', 'seed=1', 'a=~']
        >>> at_home(["dataset.root=~/data"]) == [f"dataset.root={expand_path('~/data')}"]
        True
    """
    parts = [argument.partition("=") for argument in arguments]
    return [
        f"{key}={expand_path(value)}" if value.startswith("~/") else key + sign + value for key, sign, value in parts
    ]


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """Quote values that Hydra cannot read as they stand and that are paths, or hold letters that it does not know.

    Hydra takes `~`, `=`, `(`, `[`, `#` and letters beyond ASCII within a value for a part of its grammar. What it can
    read is left as it is.

    Args:
        arguments: Of the command line.

    Example:
        >>> quote_paths(["dataset.root=~/data", "stream.path=/a/ü (1).csv", "seed=1", "stream.folders=[a,ü]", "-m"])
        ['dataset.root="~/data"', 'stream.path="/a/ü (1).csv"', 'seed=1', 'stream.folders=[a,"ü"]', '-m']
    """
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    return [_quoted(argument, sweep) for argument in arguments]


def _quoted(argument: str, sweep: bool) -> str:
    key, given, value = argument.partition("=")
    if argument.startswith("-") or not given or not value or _is_read(argument):
        return argument
    inner = value[1:-1]
    if value[0] == "[" and value[-1] == "]" and not set(inner) & set("[]{}\"'"):
        better = f"{key}=[{','.join(map(_piece, inner.split(',')))}]"
    elif value[0] in "[{\"'":
        return argument
    else:
        better = f"{key}={','.join(map(_piece, value.split(',') if sweep else [value]))}"
    return better if _is_read(better) else argument


def _piece(value: str) -> str:
    path = "/" in value or value.startswith("~") or os.path.lexists(value)
    if _is_read(f"x={value}") or not (path or not value.isascii()):
        return value
    escaped = value.replace('"', '\\"')
    return f'"{escaped}"'


def _is_read(argument: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True
