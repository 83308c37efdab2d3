"""Put paths on the command line into the quotes that Hydra's grammar requires around some characters."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cl.files import expand_path


def at_home(arguments: Sequence[str]) -> list[str]:
    """Replace a `~/` at the beginning of a value by the home directory; a shell does so only in whole words.

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
    """Quote the values that Hydra cannot parse and that are paths or contain letters beyond ASCII.

    Hydra takes `~`, `=`, `(`, `[` and `#` in a value for parts of its grammar, which has no letters beyond ASCII. A
    value that it can parse is not changed.

    Args:
        arguments: The arguments of the command line.

    Example:
        >>> quote_paths(["dataset.root=~/data", "stream.path=/a/ü (1).csv", "seed=1", "stream.folders=[a,ü]", "-m"])
        ['dataset.root="~/data"', 'stream.path="/a/ü (1).csv"', 'seed=1', 'stream.folders=[a,"ü"]', '-m']
    """
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    return [_quoted(argument, sweep) for argument in arguments]


def _quoted(argument: str, sweep: bool) -> str:
    key, given, value = argument.partition("=")
    if argument.startswith("-") or not given or not value or _is_parsed(argument):
        return argument
    inner = value[1:-1]
    if value[0] == "[" and value[-1] == "]" and not set(inner) & set("[]{}\"'"):
        better = f"{key}=[{','.join(map(_piece, inner.split(',')))}]"
    elif value[0] in "[{\"'":
        return argument
    else:
        better = f"{key}={','.join(map(_piece, value.split(',') if sweep else [value]))}"
    return better if _is_parsed(better) else argument


def _piece(value: str) -> str:
    path = "/" in value or value.startswith("~") or os.path.lexists(value)
    if _is_parsed(f"x={value}") or not (path or not value.isascii()):
        return value
    escaped = value.replace('"', '\\"')
    return f'"{escaped}"'


def _is_parsed(argument: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True
