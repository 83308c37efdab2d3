"""What Hydra could not compose, in a sentence for the user instead of a traceback."""

from __future__ import annotations

import re
import sys
from typing import Any

from cl.errors import unknown
from cl.settings import flatten, nearest

# Options of Hydra plugins, by group and name: what needs the plugin, and the extra of clsim that installs it.
_EXTRAS = {
    "hydra/sweeper/optuna": ("hydra/sweeper=tune searches with Optuna", "tune"),
    "hydra/launcher/joblib": ("launcher=joblib starts processes with joblib", "joblib"),
    "hydra/launcher/submitit_slurm": ("launcher=submitit_slurm queues jobs with submitit", "slurm"),
    "hydra/launcher/submitit_local": ("launcher=submitit_local starts processes with submitit", "slurm"),
    "hydra/launcher/ray": ("launcher=ray runs jobs on Ray", "ray"),
}


def missing(error: Any) -> str:
    """Return the message for an option that a group of the configuration does not have, with similar options.

    Args:
        error: Hydra's error.
    """
    from importlib.resources import files

    found = re.search(r"Could not (?:find|load) '([^']+)'", str(error))
    group, _, name = (found.group(1) if found else str(error.missing_cfg_file or "")).rpartition("/")
    if f"{group}/{name}" in _EXTRAS:
        what, extra = _EXTRAS[f"{group}/{name}"]
        return f"{what}, which is not installed: pip install 'clsim[{extra}]'."
    if ".." in group.split("/"):
        return f"There is no {group}/{name}: groups and options are names, as cl-run --help lists them."
    folder = files("cl.conf").joinpath(group)
    own = [entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml")] if folder.is_dir() else []
    options = {*own, *(error.options or ())}
    return str(unknown(group, name, options - {"config"} or options)) if group and options else _one_line(str(error))


def before_run(error: BaseException) -> str | None:
    """Return a message if Hydra failed to compose the configuration or to write before the run; None for others."""
    import hydra.core.utils as jobs
    from hydra._internal import config_loader_impl as loader

    frames, frame = set(), error.__traceback__
    while frame is not None:
        frames.add((frame.tb_frame.f_globals.get("__name__"), frame.tb_frame.f_code.co_name))
        frame = frame.tb_next
    modules = {module for module, _ in frames}
    if loader.__name__ in modules:
        hint = "a group takes names, as strategy=one or strategy=[one,other], and ~group leaves it out"
        return _one_line(f"The configuration cannot be composed ({error}): {hint}")
    if isinstance(error, OSError) and jobs.__name__ in modules and ("cl.app.cli", "run") not in frames:
        reason = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        return _one_line(f"The run has nowhere to write ({reason}): choose another hydra.run.dir")
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".") + "."


def readable(error: Exception) -> str:
    """Return the message for an override of a key that does not exist, with similar keys.

    Args:
        error: Hydra's error.
    """
    from importlib.resources import files

    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    text = str(error)
    merged = re.match(r"Error merging override (.+?)=(.*)", text, re.DOTALL)
    if merged is not None:
        key, value = merged.groups()
        return _one_line(f"{key}={value} cannot be written over what is there: {key} has keys of its own to write")
    match = re.search(r"Could not (?:override|append to config) '?([\w.@]+)'?|override '([\w.@/]+)'", text)
    if match is None:
        return _one_line(text)
    key = match.group(1) or match.group(2)
    GlobalHydra.instance().clear()
    with initialize_config_module("cl.conf", version_base="1.3"):
        groups = [a.split("=")[0] + "=" + a.split("=")[1] for a in sys.argv[1:] if a.count("=") == 1 and "." not in a]
        try:
            known = list(_flatten_keys(compose("config", overrides=[g for g in groups if not g.startswith(key)])))
        except Exception:
            known = list(_flatten_keys(compose("config")))
    own = files("cl.conf").joinpath(key)
    if "." not in key and own.is_dir():
        options = sorted(entry.name[:-5] for entry in own.iterdir() if entry.name.endswith(".yaml"))
        return f"{key} takes the name of an option, in a list where it takes several: {', '.join(options)}."
    near = nearest(key, [*known, *groups_there()])
    if key in known:  # in a sweep, the key exists for the choices of another job
        return f"There is no key {key!r} with this choice of groups, as there is with others: leave it out here."
    hint = f"did you mean {' or '.join(near)}?" if near else "see cl-run --help for the keys."
    group, _, rest = key.partition(".")
    option = rest.partition(".")[0]
    there = files("cl.conf").joinpath(group).joinpath(f"{option}.yaml").is_file()
    if there and not any(name.startswith(f"{group}.{option}.") for name in known):
        return f"There is no key {key!r} in the configuration, as {option} is not chosen: add {group}={option}."
    new = f" (To hand a new one on, write +{key}=...)" if group in ("trainer", "stream", "strategy", "dataset") else ""
    return f"There is no key {key!r} in the configuration: {hint}{new}"


def groups_there() -> list[str]:
    """Return the names of the groups of the configuration."""
    from importlib.resources import files

    return sorted(entry.name for entry in files("cl.conf").iterdir() if entry.is_dir() and entry.name[0].isalpha())


def _flatten_keys(cfg: Any) -> list[str]:
    from omegaconf import OmegaConf

    return list(flatten(OmegaConf.to_container(cfg, resolve=False)))
