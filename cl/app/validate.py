"""Check and resolve the configuration of a run, compare it with that of the run in its directory, and store it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cl.app.annotations import check_call, check_value
from cl.app.resume import store_command
from cl.errors import InputError
from cl.report.config_file import refuse_other, write_config
from cl.settings import SETTINGS, Options, flatten, nearest

_NEEDED = ("stream", "backbone", "head", "optimizer", "trainer")
_ROOT = {key.partition(".")[0] for key in SETTINGS}
_HOLDING = [key for key, row in SETTINGS.items() if row.type in (Options, dict[str, Any]) and key != "strategy"]
_WHOLE = ("protocol", "checkpoint")  # the entries of other groups are mappings with a _target_
_INTERPOLATED = re.compile(r"\$\{(\w+)")


def validate(cfg: Any, directory: Path) -> dict[str, Any]:
    """Check a configuration, also against that of a run that was begun in the directory, and return it resolved.

    Args:
        cfg: The configuration that Hydra composed from `cl.conf`; the values that a search found are written into it.
        directory: The run's directory.

    Raises:
        InputError: If a group is missing, a value is of the wrong type, or the directory holds a run of another
            configuration.
    """
    from omegaconf import OmegaConf

    _check(cfg)
    for key, value in (protocol_of(cfg).found() if cfg.get("protocol") else {}).items():
        if OmegaConf.is_config(OmegaConf.select(cfg, key)):
            raise InputError(
                f"protocol.tuned gives {key}={value}, which is a group here: write it on the command line."
            )
        OmegaConf.update(cfg, key, value)
    for key in sorted(OmegaConf.missing_keys(cfg)):  # factories of optimizers and trainers would ignore it
        raise InputError(f"{key} has no default: write {key}=... on the command line.")
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    refuse_other(config, directory)
    return config


def protocol_of(cfg: Any) -> Any:
    """Return the protocol of tuning that a configuration names."""
    from cl.app.protocol import Protocol

    check_call("protocol", Protocol, dict(cfg.protocol))
    return Protocol(**cfg.protocol)


def store(config: dict[str, Any], directory: Path) -> None:
    """Write the command and `config.yaml` to a run's directory, unless they are there; `validate` has compared them."""
    store_command(directory)  # first, so that resume= can continue every run that has a config.yaml
    write_config(config, directory)


def _check(cfg: Any) -> None:
    """Refuse unknown keys, missing groups and values of the wrong type."""
    from omegaconf import OmegaConf

    unread = _unread(cfg)
    for key in unread:
        known = flatten(OmegaConf.to_container(cfg, resolve=False))
        near = nearest(key, [k for k in known if not any(f"{k}.".startswith(f"{u}.") for u in unread)])
        hint = f"did you mean {' or '.join(near)}?" if near else "cl-run --help lists the keys."
        raise InputError(f"Nothing reads the key {key!r}: {hint}")
    for group in _NEEDED:
        if cfg.get(group) is None:
            raise InputError(f"There is no {group}: choose one, as cl-run --help lists them.")
    for group in ("head", "optimizer", "scheduler", "trainer"):
        if OmegaConf.is_dict(cfg.get(group)) and cfg[group].get("_partial_") in (None, False):
            raise InputError(f"{group}._partial_ must be true, since a run adds more arguments: do not set it.")
    for key, annotation in ((key, row.type) for key, row in SETTINGS.items() if row.type is not None):
        parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
        if OmegaConf.is_dict(parent) and key.rpartition(".")[2] in parent:
            value = parent[key.rpartition(".")[2]]
            check_value(key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, annotation)


def _unread(cfg: Any) -> list[str]:
    """Return the keys that nothing reads: neither a run itself, nor a `_target_`, nor another value by `${key}`."""
    from hydra.conf import HydraConf
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    raw: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    read = {key for value in flatten(raw).values() for key in _INTERPOLATED.findall(str(value))}
    found = [key for key in raw if key not in _ROOT | read]
    given = HydraConfig.get().overrides.hydra if HydraConfig.initialized() else ()  # Hydra ignores unknown ones
    names = [override.lstrip("+").partition("=")[0] for override in given]
    known = {"env", *HydraConf.__dataclass_fields__}
    found += [name for name in names if name.startswith("hydra.") and name.split(".")[1] not in known]
    for group in _HOLDING:
        parts = raw.get(group)
        for name, value in parts.items() if isinstance(parts, dict) else ():  # `_check` refuses other types
            part = group not in _WHOLE and (value is None or isinstance(value, dict))  # a mapping with a _target_
            if not part and f"{group}.{name}" not in SETTINGS:
                found.append(f"{group}.{name}")
    return found
