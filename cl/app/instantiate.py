"""Build the object that a configuration with a `_target_` describes; wrong arguments are reported in one sentence."""

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
# The constructors of these libraries refuse arguments by errors of many types. Constructors of this package raise
# `InputError`; an error of another type there, or in a user's code, is a bug, and keeps its traceback.
_LIBRARIES = ("torch", "torchvision", "pytorch_lightning", "timm", "avalanche", "wandb")


def instantiate(node: Any, *arguments: Any, **options: Any) -> Any:
    """Return the object that a configuration with a `_target_` describes.

    Lists and dicts of the configuration are passed on as plain lists and dicts.

    Args:
        node: The part of the configuration that holds the `_target_`.
        arguments: Positional arguments for the target.
        options: Keyword arguments for the target; they replace those of the configuration.

    Raises:
        InputError: If there is no `_target_`, it does not take the arguments, or a library refuses their values.

    Example:
        >>> from omegaconf import OmegaConf
        >>> cfg = OmegaConf.create({"head": {"_target_": "cl.engine.head.Head", "_partial_": True, "bias": 1}})
        >>> instantiate(cfg.head)
        Traceback (most recent call last):
        cl.errors.InputError: head.bias=1 must be true or false.
    """
    import hydra.utils
    from hydra.errors import InstantiationException
    from omegaconf import DictConfig, OmegaConf

    if isinstance(node, DictConfig) and OmegaConf.is_missing(node, "_target_"):
        raise InputError(f"{node._get_full_key('_target_')} has no default: write it on the command line.")
    if not isinstance(node, DictConfig) or "_target_" not in node:
        shown = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        name = node._get_full_key(None) if OmegaConf.is_config(node) else "It"
        raise InputError(f"{name or 'The configuration'}={shown} has no _target_: name a class or function.")
    _check(node)
    key, target = str(node._get_full_key(None)), str(node._target_)
    try:
        built = hydra.utils.instantiate(node, *arguments, _convert_="all", **options)
    except InstantiationException as error:
        inner = error.__cause__ or error.__context__
        if isinstance(inner, Exception) and not isinstance(inner, InputError):
            where = str(error).partition("full_key: ")[2].strip() or key
            _refuse(where, str(OmegaConf.select(node._get_root(), f"{where}._target_", default=target)), inner)
        raise
    if not node.get("_partial_"):
        return built
    guarded = _Guarded(built.func, *built.args, **built.keywords)
    guarded.where = key, target
    return guarded


def instantiate_as(node: Any, kind: type[T], *arguments: Any, **options: Any) -> T:
    """Return the object that `instantiate` builds, which must be an instance of a class.

    Args:
        node: See `instantiate`.
        kind: The class.
        arguments: See `instantiate`.
        options: See `instantiate`.

    Raises:
        InputError: If it is an instance of another class; or from `instantiate`.
    """
    found = instantiate(node, *arguments, **options)
    if not isinstance(found, kind):
        raise InputError(
            f"{node._get_full_key(None)}._target_={node._target_} gives {type(found).__name__}, which is no "
            f"{kind.__name__}: name another _target_."
        )
    return found


def takes(node: Any, name: str, by_name: bool = False) -> bool:
    """Return whether the `_target_` of a configuration takes an argument of a name; True if it cannot be inspected.

    Args:
        node: The part of the configuration that holds the `_target_`.
        name: Name of the argument.
        by_name: Whether the target must name the argument; else one that takes any keyword argument counts, too.
    """
    from hydra.utils import get_object

    try:
        parameters = inspect.signature(get_object(node._target_)).parameters
    except Exception:  # `instantiate` reports what is wrong
        return True
    return name in parameters or (not by_name and any(p.kind is p.VAR_KEYWORD for p in parameters.values()))


class _Guarded(functools.partial[Any]):
    """The object of a `_partial_`, whose arguments are checked by the library only when it is called."""

    where: tuple[str, str]  # the key and its target

    def __call__(self, /, *arguments: Any, **options: Any) -> Any:
        try:
            return super().__call__(*arguments, **options)
        except Exception as error:
            _refuse(*self.where, error)
            raise


def _refuse(key: str, target: str, error: Exception) -> None:
    """Raise an `InputError` in place of the error by which a library refuses its arguments."""
    ours = isinstance(error, InputError | DivergenceError | MemoryError)
    if not ours and target.partition(".")[0] in _LIBRARIES:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{key} cannot be built ({reason[:300]}): correct its arguments.") from error


def _check(node: Any) -> None:
    """Check the arguments of each `_target_` in a part of a configuration."""
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
    except Exception:  # Hydra reports what is missing
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
            f"{error} Begin from {prefix}=custom, which has no arguments, or leave an argument out: ~{prefix}.NAME."
        ) from error


def _plain(value: Any) -> Any:
    """Return a value as lists and dicts, with a placeholder for each object that a `_target_` builds."""
    from omegaconf import OmegaConf

    if OmegaConf.is_list(value):
        return [_plain(item) for item in value]
    if OmegaConf.is_dict(value):
        return object() if "_target_" in value else {key: _plain(item) for key, item in value.items()}
    return value
