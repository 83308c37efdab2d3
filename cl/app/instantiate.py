"""What a configuration with a `_target_` describes, made by Hydra; wrong arguments are one sentence."""

from __future__ import annotations

import functools
import inspect
import re
from importlib.resources import files
from typing import Any, TypeVar

from cl.app.annotations import check_call, check_value
from cl.errors import DivergenceError, InputError

T = TypeVar("T")
_ALIAS = re.compile(r"\$\{([\w.]+)\}")
_OWN_WORDS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
# Whose constructors check their arguments themselves, by errors of many kinds; ours raise `InputError`, and an error of
# another kind there, or in a user's code, is a bug that keeps its traceback.
_LIBRARIES = ("torch", "torchvision", "pytorch_lightning", "timm", "avalanche", "wandb")


def make(node: Any, *arguments: Any, **options: Any) -> Any:
    """Return what a configuration with a `_target_` describes; lists and dicts reach it as such.

    Args:
        node: The part of a configuration.
        arguments: Passed on, before what the configuration says.
        options: Likewise.

    Raises:
        InputError: If there is no `_target_`, it takes no such arguments, or a library refuses their values.

    Example:
        >>> from omegaconf import OmegaConf
        >>> cfg = OmegaConf.create({"head": {"_target_": "cl.engine.head.Head", "_partial_": True, "bias": 1}})
        >>> make(cfg.head)
        Traceback (most recent call last):
        cl.errors.InputError: head.bias=1 must be true or false.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import DictConfig, OmegaConf

    if isinstance(node, DictConfig) and OmegaConf.is_missing(node, "_target_"):
        raise InputError(f"{node._get_full_key('_target_')} has no default: write it on the command line.")
    if not isinstance(node, DictConfig) or "_target_" not in node:
        shown = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        name = node._get_full_key(None) if OmegaConf.is_config(node) else "It"
        raise InputError(f"{name or 'The configuration'}={shown} has no _target_: name what makes it.")
    _check(node)
    key, target = str(node._get_full_key(None)), str(node._target_)
    try:
        made = instantiate(node, *arguments, _convert_="all", **options)
    except InstantiationException as error:
        inner = error.__cause__ or error.__context__
        if isinstance(inner, Exception) and not isinstance(inner, InputError):
            where = str(error).partition("full_key: ")[2].strip() or key
            _refuse(where, str(OmegaConf.select(node._get_root(), f"{where}._target_", default=target)), inner)
        raise
    if not node.get("_partial_"):
        return made
    guarded = _Guarded(made.func, *made.args, **made.keywords)
    guarded.where = key, target
    return guarded


def made(node: Any, kind: type[T], *arguments: Any, **options: Any) -> T:
    """Return what `make` does, which must be of a kind.

    Raises:
        InputError: If it is of another.
    """
    found = make(node, *arguments, **options)
    if not isinstance(found, kind):
        raise InputError(
            f"{node._get_full_key(None)}._target_={node._target_} makes a {type(found).__name__}, where a "
            f"{kind.__name__} is needed: name one that does."
        )
    return found


def takes(node: Any, name: str, by_name: bool = False) -> bool:
    """Say whether what a configuration's `_target_` names takes an argument of that name; True where nobody knows.

    Args:
        node: The part of a configuration.
        name: Of the argument.
        by_name: Whether one that takes any argument does not count.
    """
    from hydra.utils import get_object

    try:
        parameters = inspect.signature(get_object(node._target_)).parameters
    except Exception:  # `make` says what is wrong
        return True
    return name in parameters or (not by_name and any(p.kind is p.VAR_KEYWORD for p in parameters.values()))


class _Guarded(functools.partial[Any]):
    """What `_partial_` makes, whose arguments are seen only when it is called."""

    where: tuple[str, str]  # the key and its target

    def __call__(self, /, *arguments: Any, **options: Any) -> Any:
        try:
            return super().__call__(*arguments, **options)
        except Exception as error:
            _refuse(*self.where, error)
            raise


def _refuse(key: str, target: str, error: Exception) -> None:
    """Raise a sentence for what a library says of its arguments."""
    ours = isinstance(error, InputError | DivergenceError | MemoryError)
    if not ours and target.partition(".")[0] in _LIBRARIES:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{key} cannot be made ({reason[:300]}): correct its arguments.") from error


def _check(node: Any) -> None:
    """Check what each `_target_` in a part of a configuration is called with."""
    from hydra.utils import get_object
    from omegaconf import OmegaConf

    for name in node:
        if not OmegaConf.is_missing(node, name) and OmegaConf.is_dict(node[name]):
            _check(node[name])
    for name, annotation in {"_target_": str, "_partial_": bool, "_recursive_": bool, "_convert_": str}.items():
        if name in node and not OmegaConf.is_missing(node, name):
            check_value(f"{node._get_full_key(None)}.{name}", _plain(node[name]), annotation)
    if OmegaConf.is_missing(node, "_target_") or "_target_" not in node or "_args_" in node:
        return
    try:
        target = get_object(node._target_)
    except Exception:  # Hydra says what is not there
        return
    names = [str(n) for n in node if n not in _OWN_WORDS and not OmegaConf.is_missing(node, n)]
    raw = {name: _ALIAS.fullmatch(str(node._get_node(name)._value())) for name in names}
    prefix = str(node._get_full_key(None))
    keys = {name: alias.group(1) if alias else f"{prefix}.{name}" for name, alias in raw.items()}
    try:
        check_call(prefix, target, {name: _plain(node[name]) for name in names}, keys)
    except InputError as error:
        custom = files("cl.conf").joinpath(prefix).joinpath("custom.yaml").is_file()
        if "no argument of" not in str(error) or not custom or target.__module__.partition(".")[0] == "cl":
            raise
        raise InputError(
            f"{error} Begin from {prefix}=custom, which has no arguments of another, or leave one out: ~{prefix}.NAME."
        ) from error


def _plain(value: Any) -> Any:
    """Return a value as lists and dicts, with a placeholder for what a `_target_` makes."""
    from omegaconf import OmegaConf

    if OmegaConf.is_list(value):
        return [_plain(item) for item in value]
    if OmegaConf.is_dict(value):
        return object() if "_target_" in value else {key: _plain(item) for key, item in value.items()}
    return value
