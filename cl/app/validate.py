"""The configuration of a run: checked, resolved, compared with that of the run that its directory holds, and kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cl.app.annotations import check_call, check_value
from cl.app.resume import keep_command
from cl.errors import InputError
from cl.report.config_file import refuse_other, write_config
from cl.settings import SETTINGS, Options, flatten, nearest

_NEEDED = ("stream", "backbone", "head", "optimizer", "trainer")
_ROOT = {key.partition(".")[0] for key in SETTINGS}
_HOLDING = [key for key, row in SETTINGS.items() if row.type in (Options, dict[str, Any]) and key != "strategy"]
_WHOLE = ("protocol", "checkpoint")  # the other groups hold parts by name, each with a _target_
_INTERPOLATED = re.compile(r"\$\{(\w+)")


def settle(cfg: Any, directory: Path) -> dict[str, Any]:
    """Return the resolved configuration, checked, and compared with that of a run begun in the directory.

    Args:
        cfg: What Hydra composed from `cl.conf`; what a search has found is put into it.
        directory: The run's directory.

    Raises:
        InputError: If a group is not there, a value is of another type, or the run there is of another configuration.
    """
    from omegaconf import OmegaConf

    _check(cfg)
    for key, value in (protocol_of(cfg).found() if cfg.get("protocol") else {}).items():
        if OmegaConf.is_config(OmegaConf.select(cfg, key)):
            raise InputError(
                f"protocol.tuned gives {key}={value}, which is a group here: write it on the command line."
            )
        OmegaConf.update(cfg, key, value)
    for key in sorted(OmegaConf.missing_keys(cfg)):  # what makes optimizers and trainers would pass over it
        raise InputError(f"{key} has no default: write {key}=... on the command line.")
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    refuse_other(config, directory)
    return config


def protocol_of(cfg: Any) -> Any:
    """Return the protocol of tuning that a configuration names."""
    from cl.app.protocol import Protocol

    check_call("protocol", Protocol, dict(cfg.protocol))
    return Protocol(**cfg.protocol)


def keep(config: dict[str, Any], directory: Path) -> None:
    """Write `config.yaml` and the command, where they are not the same already; `settle` has compared the values."""
    keep_command(directory)  # first: where config.yaml is, resume= can go on
    write_config(config, directory)


def _check(cfg: Any) -> None:
    """Refuse keys that nothing reads, groups that are not there, and values of the wrong type."""
    from omegaconf import OmegaConf

    strangers = _unread(cfg)
    for key in strangers:
        known = flatten(OmegaConf.to_container(cfg, resolve=False))
        near = nearest(key, [k for k in known if not any(f"{k}.".startswith(f"{s}.") for s in strangers)])
        hint = f"did you mean {' or '.join(near)}?" if near else "cl-run --help lists the keys."
        raise InputError(f"Nothing reads the key {key!r}: {hint}")
    for group in _NEEDED:
        if cfg.get(group) is None:
            raise InputError(f"There is no {group}: choose one, as cl-run --help lists them.")
    for group in ("head", "optimizer", "scheduler", "trainer"):
        if OmegaConf.is_dict(cfg.get(group)) and cfg[group].get("_partial_") in (None, False):
            raise InputError(f"{group}._partial_ must be true, since a run makes it when it knows the rest: leave it.")
    for key, annotation in ((key, row.type) for key, row in SETTINGS.items() if row.type is not None):
        parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
        if OmegaConf.is_dict(parent) and key.rpartition(".")[2] in parent:
            value = parent[key.rpartition(".")[2]]
            check_value(key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, annotation)


def _unread(cfg: Any) -> list[str]:
    """Return the keys that nothing reads: neither a part of ours, nor a `_target_`, nor another value by `${key}`."""
    from hydra.conf import HydraConf
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    raw: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
    read = {key for value in flatten(raw).values() for key in _INTERPOLATED.findall(str(value))}
    found = [key for key in raw if key not in _ROOT | read]
    given = HydraConfig.get().overrides.hydra if HydraConfig.initialized() else ()  # of which it reads what it knows
    names = [override.lstrip("+").partition("=")[0] for override in given]
    known = {"env", *HydraConf.__dataclass_fields__}
    found += [name for name in names if name.startswith("hydra.") and name.split(".")[1] not in known]
    for group in _HOLDING:
        parts = raw.get(group)
        for name, value in parts.items() if isinstance(parts, dict) else ():  # else its type is told
            part = group not in _WHOLE and (value is None or isinstance(value, dict))  # made by its _target_
            if not part and f"{group}.{name}" not in SETTINGS:
                found.append(f"{group}.{name}")
    return found
