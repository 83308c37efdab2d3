"""The configuration of a run directory: written, read, and compared with that of a run that goes on there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl import rundir
from cl.errors import InputError
from cl.files import relative, write_text
from cl.settings import changes, flatten


def write_config(config: dict[str, Any], directory: Path) -> None:
    """Write a configuration, unless the same stands there; the directory itself is ".", so that a run may be moved."""
    path, text = directory / rundir.CONFIG, _text(config, directory)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def read_config(path: Path, remedy: str = "name the directory of another run") -> dict[str, Any]:
    """Return the configuration of a run from its `config.yaml`.

    Args:
        path: Of the file.
        remedy: What a reader may do where it cannot be read.

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


def refuse_other(config: dict[str, Any], directory: Path) -> None:
    """Refuse another configuration than that of the run begun in a directory.

    Raises:
        InputError: If there is one, with what they differ in; or if a later version of clsim has written there.
    """
    from omegaconf import OmegaConf

    path = directory / rundir.CONFIG
    rundir.refuse_later(directory)
    if not (rundir.is_begun(directory) and path.exists()):
        return
    there = read_config(path, "remove it, and the run is continued as it is configured now")
    here = OmegaConf.to_container(OmegaConf.create(_text(config, directory)))
    changed = changes(flatten(there), flatten(here))
    if changed:
        raise InputError(
            f"{directory} holds a run of another configuration ({changed}; see {rundir.CONFIG}): choose another "
            "directory (hydra.run.dir), or repeat that configuration to continue it."
        )


def _text(config: dict[str, Any], directory: Path) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(relative(config, directory)))
