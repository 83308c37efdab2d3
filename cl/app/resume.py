"""A run directory taken up again: `resume=DIR` goes on with it, `verify=DIR` repeats it and compares every bit."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from cl import rundir
from cl.errors import InputError
from cl.files import read_sealed, remove_leftovers, write_sealed, write_text

_OVERRIDES = Path(rundir.HYDRA) / "overrides.yaml"


def expand(arguments: list[str]) -> tuple[list[str], tuple[Path, Path] | None]:
    """Return the arguments for Hydra; to verify a run, its directory and the one of its repetition, too.

    Args:
        arguments: Of the command line. `resume=DIR` stands for what the run of DIR was begun with, in the same
            directory; `verify=DIR` for the same in a new one. Both are run from where the command was given, so that
            relative paths are found. What stands beside them is added. The value of `from=DIR:task=3` is put in quotes,
            which Hydra wants.

    Raises:
        InputError: If DIR holds no command, or what is to be verified is not finished.

    Example:
        >>> expand(["from=runs/a:task=3", "seed=1"])
        (["from='runs/a:task=3'", 'seed=1'], None)
    """
    given = dict(argument.split("=", 1) for argument in arguments if argument.startswith(("resume=", "verify=")))
    rest = [_quoted(argument) for argument in arguments if not argument.startswith(("resume=", "verify="))]
    if not given:
        return rest, None
    if len(given) > 1:
        raise InputError("resume and verify exclude each other: give one of them.")
    from cl.report.result import read_result

    what, text = next(iter(given.items()))
    directory = Path(text).resolve()
    rundir.refuse_later(directory)
    command = overrides(directory)
    _go_back(directory)
    if what == "resume":
        return [*command, f"hydra.run.dir={_quote(str(directory))}", *rest], None
    if read_result(directory) is None:
        raise InputError(f"verify={directory}: the run is not finished; go on with it by resume={directory}.")
    differences(directory, directory)  # what cannot be read is told before anything is repeated
    place = tempfile.mkdtemp(prefix="clsim-verify-")
    return [*command, f"hydra.run.dir={_quote(place)}", "logger=none", *rest], (directory, Path(place))


def _go_back(directory: Path) -> None:
    """Change to the folder where the command of a run was given, as seen from its directory: both may have moved."""
    place = directory / str((read_sealed(directory / rundir.COMMAND) or {}).get("given_in", ""))
    if place != directory and place.is_dir():
        os.chdir(place)


def overrides(directory: Path) -> list[str]:
    """Return the overrides that the run of a directory was begun with.

    Raises:
        InputError: If they cannot be read.
    """
    from omegaconf import OmegaConf

    kept = read_sealed(directory / rundir.COMMAND)
    if kept is not None:
        return list(kept["overrides"])
    path = directory / _OVERRIDES
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # of the file system, of YAML, of OmegaConf
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read ({reason}): name the directory of a run of cl-run, or repeat its command with "
            "its hydra.run.dir."
        ) from error
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise InputError(f"{path} holds no list of overrides: repeat the command of the run with its hydra.run.dir.")
    return [str(item) for item in found]


def keep_command(directory: Path) -> None:
    """Write the overrides that the present job of Hydra was begun with to its directory, and what Hydra keeps itself.

    Hydra would write its files before the command was looked at, over those of the run that is there.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if not HydraConfig.initialized():
        return
    job: Any = HydraConfig.instance().cfg
    command: dict[str, Any] = {"overrides": list(job.hydra.overrides.task)}
    with suppress(ValueError):  # on another drive
        command["given_in"] = os.path.relpath(job.hydra.runtime.cwd, directory)
    remove_leftovers(directory / rundir.HYDRA)
    if read_sealed(directory / rundir.COMMAND) != command:
        write_text(directory / rundir.HYDRA / "hydra.yaml", OmegaConf.to_yaml(OmegaConf.masked_copy(job, "hydra")))
        write_text(directory / _OVERRIDES, OmegaConf.to_yaml(job.hydra.overrides.task))
        write_sealed(directory / rundir.COMMAND, command)  # last: until it is there, all are written anew


def _quoted(argument: str) -> str:
    key, _, value = argument.partition("=")
    return f"from={_quote(value)}" if key == "from" and value[:1] not in ("'", '"') and value != "null" else argument


def _quote(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def verify(there: Path, here: Path) -> str:
    """Return that a repetition came out the same, and remove it.

    Raises:
        InputError: If it did not; it says in what, and keeps the repetition.
    """
    found = differences(there, here)
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise InputError(
            f"{there} differs from its repetition in {here}: {'; '.join(found[:5])}{more}. Compare versions and "
            f"hardware in the {rundir.MANIFEST} of both."
        )
    shutil.rmtree(here)
    return f"Verified: R, weights and all state of {there} came out the same, bit for bit."


def differences(there: Path, here: Path) -> list[str]:
    """Return in what two finished runs differ, a sentence each; nothing where every bit of both is the same.

    The last checkpoints are compared, which hold R, weights, memories and generators.
    """
    import torch

    from cl.data.stream_checks import same
    from cl.engine import checkpoint

    states: list[dict[str, Any]] = []
    for place in (there, here):
        file = checkpoint.latest(place / rundir.CHECKPOINTS)
        if file is None:
            raise InputError(f"{place / rundir.CHECKPOINTS} holds no whole checkpoint: there is nothing to compare.")
        states.append(checkpoint.read(file)["state_dict"])
    found = []
    for name in sorted(states[0].keys() | states[1].keys()):
        a, b = (state.get(name) for state in states)
        if not same(a, b):
            tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape
            gap = (a.double() - b.double()).abs().nan_to_num(0).max() if tensors else None  # type: ignore[union-attr]
            found.append(name if gap is None else f"{name} by up to {float(gap):.3g}")
    return found
