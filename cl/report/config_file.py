"""The configuration file of a run directory: writing, reading, and comparing with that of a run that resumes there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl import rundir
from cl.errors import InputError
from cl.files import relative, write_text
from cl.settings import changes, flatten


def write_config(config: dict[str, Any], directory: Path) -> None:
    """Write a configuration unless the file holds it already; the directory, which may be moved, is written as "."."""
    path, text = directory / rundir.CONFIG, _text(config, directory)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def read_config(path: Path, remedy: str = "name the directory of another run") -> dict[str, Any]:
    """Return the configuration of a run from its `config.yaml`.

    Args:
        path: The file.
        remedy: The end of the message for a file that cannot be read.

    Raises:
        InputError: If it cannot be read.
    """
    from omegaconf import OmegaConf

    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # of the file system, of YAML, of OmegaConf
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())}): {remedy}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} cannot be read (it holds no configuration): {remedy}.")
    return {str(key): value for key, value in found.items()}


def as_stored(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return a configuration flat, with the values that `read_config` would read if it were that of a directory."""
    from omegaconf import OmegaConf

    return flatten(OmegaConf.to_container(OmegaConf.create(_text(config, directory))))


def refuse_other(config: dict[str, Any], directory: Path) -> None:
    """Refuse a configuration that differs from that of the run that was started in a directory.

    Raises:
        InputError: If they differ, with the differences; or if a later version of clsim has written the run.
    """
    path = directory / rundir.CONFIG
    rundir.refuse_later(directory)
    if not (rundir.is_begun(directory) and path.exists()):
        return
    there = read_config(path, "remove it, and the run is continued as it is configured now")
    changed = changes(flatten(there), as_stored(config, directory))
    if changed:
        raise InputError(
            f"{directory} holds a run of another configuration ({changed}; see {rundir.CONFIG}): choose another "
            "directory (hydra.run.dir), or repeat that configuration to continue it."
        )


def _text(config: dict[str, Any], directory: Path) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(relative(config, directory)))
