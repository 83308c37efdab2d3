"""Commands on a run's directory: `resume=DIR` continues it, `verify=DIR` repeats it, `score=DIR` scores its learner."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from cl import rundir
from cl.errors import InputError
from cl.files import read_sealed, remove_leftovers, write_sealed, write_text

_OVERRIDES = Path(rundir.HYDRA) / "overrides.yaml"
_COMMANDS = ("resume=", "verify=", "score=")
_MARKS = ("'", '"')


def expand(arguments: list[str]) -> tuple[list[str], tuple[Path, Path] | None]:
    """Return the arguments for Hydra; and, to verify a run, its directory and that of its repetition.

    Args:
        arguments: The arguments of the command line. `resume=DIR` is replaced by the overrides that the run of DIR was
            begun with, and its directory; `verify=DIR` by the same overrides and a new directory; `score=DIR:task=3` by
            the same overrides and itself. All change to the folder in which the run's command was given, so that
            relative paths are found. Other arguments are appended. The values of `from` and `score` are put in quotes,
            which Hydra requires.

    Raises:
        InputError: If DIR holds no command, or the run to verify is not finished.

    Example:
        >>> expand(["from=runs/a:task=3", "seed=1"])
        (["from='runs/a:task=3'", 'seed=1'], None)
    """
    given = dict(argument.split("=", 1) for argument in arguments if argument.startswith(_COMMANDS))
    rest = [_quoted(argument) for argument in arguments if not argument.startswith(_COMMANDS)]
    if not given:
        return rest, None
    if len(given) > 1:
        raise InputError("resume, verify and score exclude each other: give one of them.")
    from cl.report.result import read_result

    what, text = next(iter(given.items()))
    if what == "score":
        return _to_score(text.strip("".join(_MARKS)), rest), None
    directory = Path(text).resolve()
    rundir.refuse_later(directory)
    command = overrides(directory)
    _change_folder(directory)
    if what == "resume":
        return [*command, f"hydra.run.dir={_quote(str(directory))}", *rest], None
    if read_result(directory) is None:
        raise InputError(f"verify={directory}: the run is not finished: continue it by resume={directory}.")
    differences(directory, directory)  # report unreadable checkpoints before the run is repeated
    repetition = tempfile.mkdtemp(prefix="clsim-verify-")
    return [*command, f"hydra.run.dir={_quote(repetition)}", "logger=none", *rest], (directory, Path(repetition))


def _to_score(text: str, rest: list[str]) -> list[str]:
    """Return the arguments that score a saved learner: a group that is chosen anew loses the run's values for it."""
    from cl.app.sweep import key
    from cl.report.scored import directory_for

    directory, colon, task = text.rpartition(":task=") if ":task=" in text else (text, "", "")
    where = Path(directory).resolve()
    rundir.refuse_later(where)
    if not rundir.is_run(where):
        raise InputError(f"score={where} is no run directory: name the directory of a run.")
    if not any((where / name).is_file() for name in (rundir.COMMAND, _OVERRIDES)):
        raise InputError(f"score={where}: no command of cl-run made this run: score it by cl.load(directory).score().")
    chosen = {key(argument) for argument in rest if "." not in key(argument)}
    command = [override for override in overrides(where) if key(override).partition(".")[0] not in chosen]
    places = {f"hydra.{kind}.dir": "runs/${now:%Y-%m-%d}/${now:%H-%M-%S}" for kind in ("run", "sweep")}
    places |= {key(argument): argument.partition("=")[2] for argument in rest if key(argument) in places}
    rest = [argument for argument in rest if key(argument) not in places]
    # refused here, because Hydra creates its directory and its log before it starts the job
    found = {
        name: directory_for(os.path.abspath(place.strip("".join(_MARKS))), where) for name, place in places.items()
    }
    named = [f"{name}={_quote(str(place))}" for name, place in found.items()]
    _change_folder(where)
    flags = list(takewhile(lambda argument: argument[:1] == "-" or "=" not in argument, rest))  # -m stays in front
    score = f"score={_quote(str(where) + colon + task)}"
    return [*flags, *command, score, *named, *rest[len(flags) :]]


def _change_folder(directory: Path) -> None:
    folder = folder_of(directory)
    if folder is not None:
        os.chdir(folder)


def folder_of(directory: Path) -> Path | None:
    """Return the folder in which a run's command was given, stored relative to its directory, as both may move.

    Example:
        >>> folder_of(Path("no such place")) is None
        True
    """
    folder = directory / str((read_sealed(directory / rundir.COMMAND) or {}).get("given_in", ""))
    return folder if folder != directory and folder.is_dir() else None


def overrides(directory: Path) -> list[str]:
    """Return the command-line overrides that the run of a directory was begun with.

    Raises:
        InputError: If the directory does not hold them, or they cannot be read.
    """
    from omegaconf import OmegaConf

    command = read_sealed(directory / rundir.COMMAND)
    if command is not None:
        return list(command["overrides"])
    path = directory / _OVERRIDES
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # from the file system, YAML or OmegaConf
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read ({reason}): name the directory of a run of cl-run, or repeat its command with "
            "its hydra.run.dir."
        ) from error
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise InputError(f"{path} holds no list of overrides: repeat the command of the run with its hydra.run.dir.")
    return [str(item) for item in found]


def store_command(directory: Path) -> None:
    """Write the overrides of the present Hydra job to its directory, and the files that Hydra itself would write.

    Hydra would write its files before the command is checked, over those of the run in the directory.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if not HydraConfig.initialized():
        return
    job: Any = HydraConfig.instance().cfg
    command: dict[str, Any] = {"overrides": list(job.hydra.overrides.task)}
    with suppress(ValueError):  # the two are on different drives
        command["given_in"] = os.path.relpath(job.hydra.runtime.cwd, directory)
    remove_leftovers(directory / rundir.HYDRA)
    if read_sealed(directory / rundir.COMMAND) != command:
        write_text(directory / rundir.HYDRA / "hydra.yaml", OmegaConf.to_yaml(OmegaConf.masked_copy(job, "hydra")))
        write_text(directory / _OVERRIDES, OmegaConf.to_yaml(job.hydra.overrides.task))
        write_sealed(directory / rundir.COMMAND, command)  # last: as long as it is missing, all are written anew


def _quoted(argument: str) -> str:
    name, _, value = argument.partition("=")
    return f"from={_quote(value)}" if name == "from" and value[:1] not in _MARKS and value != "null" else argument


def _quote(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def verify(there: Path, here: Path) -> str:
    """Compare a run with its repetition; if they are the same, remove the repetition and return a sentence on it.

    Args:
        there: The directory of the run.
        here: The directory of its repetition.

    Raises:
        InputError: If they differ; says in what, and leaves the repetition there.
    """
    found = differences(there, here)
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise InputError(
            f"{there} differs from its repetition in {here}: {'; '.join(found[:5])}{more}. Compare versions and "
            f"hardware in the {rundir.MANIFEST} of both."
        )
    shutil.rmtree(here)
    return f"Verified: R, weights and all state of {there} are the same in its repetition, bit for bit."


def differences(there: Path, here: Path) -> list[str]:
    """Return the differences between the last checkpoints of two runs, a few words each; empty if every bit is equal.

    Checkpoints hold R, the weights, memories and the states of random generators.

    Raises:
        InputError: If a run has no whole checkpoint.
    """
    import torch

    from cl.data.stream_checks import same
    from cl.engine import checkpoint

    states: list[dict[str, Any]] = []
    for directory in (there, here):
        file = checkpoint.latest(directory / rundir.CHECKPOINTS)
        if file is None:
            raise InputError(f"{directory / rundir.CHECKPOINTS} holds no whole checkpoint: nothing can be compared.")
        states.append(checkpoint.read(file)["state_dict"])
    found = []
    for name in sorted(states[0].keys() | states[1].keys()):
        a, b = (state.get(name) for state in states)
        if not same(a, b):
            tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape
            gap = (a.double() - b.double()).abs().nan_to_num(0).max() if tensors else None  # type: ignore[union-attr]
            found.append(name if gap is None else f"{name} by up to {float(gap):.3g}")
    return found
