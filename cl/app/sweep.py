"""The jobs of a sweep, under any launcher: a failed job is reported and counted, and the other jobs go on.

A failed job returns the reason in a sentence instead of a number. So no exception reaches the launcher, which would end
the other jobs, and a search counts the trial as failed.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cl.errors import InputError
from cl.settings import setting
from cl.trainer.failures import cause

_LISTED = 5
_FOLDERS = re.compile(r"[^,\[\]{}:]*/(?=[^/])")  # all of a path but its last part
_ODD = re.compile(r"[^\w.,=+@-]+")


def failed(error: Exception, directory: Path) -> str:
    """Print and return the reason why a job failed, in a sentence; if it is a bug, print the traceback, too."""
    reason = cause(error)
    if reason is None:
        traceback.print_exception(error)
    sentence = " ".join(str(reason or f"{type(error).__name__}: {error}").split())
    print(f"{_short(directory)}: {sentence}", file=sys.stderr, flush=True)
    return sentence


def running() -> bool:
    """Return whether the present job is one of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def compare(jobs: Sequence[Any]) -> None:
    """Compare the finished jobs of a sweep: print the table, and write the page to the sweep's directory."""
    from cl.compare.command import parser
    from cl.compare.command import run as compare_runs
    from cl.report.result import read_result

    directories = [Path(job.hydra_cfg.hydra.runtime.output_dir) for job in jobs if not _has_failed(job)]
    finished = [directory for directory in directories if read_result(directory) is not None]
    if len(finished) < 2:
        return
    try:
        compare_runs(parser().parse_args([*map(str, finished), "--out", jobs[0].hydra_cfg.hydra.sweep.dir]))
    except InputError as error:
        print(f"The jobs are not compared: {error}", file=sys.stderr)


def watch() -> list[Any]:
    """Return a list to which every launcher appends the results of its jobs (Hydra's `JobReturn`)."""
    from hydra.core.plugins import Plugins
    from hydra.plugins.launcher import Launcher

    jobs: list[Any] = []
    for launcher in Plugins.instance().discover(Launcher):
        if "launch" in vars(launcher):
            setattr(launcher, "launch", _watched(inspect.unwrap(vars(launcher)["launch"]), jobs))  # noqa: B010
    return jobs


def _watched(launch: Callable[..., Sequence[Any]], jobs: list[Any]) -> Callable[..., Sequence[Any]]:
    from hydra.errors import HydraException

    @functools.wraps(launch)
    def watched(self: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        _share_cores(self, len(job_overrides))
        # hide the launcher's line on each job, since a job prints its own
        logging.getLogger(type(self).__module__).addFilter(lambda record: not str(record.msg).startswith("\t#"))
        try:
            returned = launch(self, _named(self, job_overrides, initial_job_idx), initial_job_idx)
        except HydraException:
            raise
        except Exception as error:  # from the launcher itself, since jobs return their errors
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(
                f"{type(self).__name__} failed ({reason}): mend that, and run again with the same "
                "hydra.sweep.dir; every run continues from its checkpoints."
            ) from error
        jobs.extend(returned)
        return returned

    return watched


def _named(launcher: Any, job_overrides: Sequence[Sequence[str]], first: int) -> list[list[str]]:
    """Return each job's overrides, with a name for its directory added: its number and the values that vary."""
    task = [str(override) for override in launcher.config.hydra.overrides.task]
    given = {override.partition("=")[0] for override in launcher.config.hydra.overrides.hydra}
    if "hydra.sweep.subdir" in given:  # the user has named the directories
        return [list(overrides) for overrides in job_overrides]
    varied = {key(override) for override in task if _is_sweep(override)}
    varied |= {str(name) for name in (launcher.config.hydra.sweeper.get("params") or {})}
    # keys that the sweeper itself adds vary, too
    varied |= {key(override) for overrides in job_overrides for override in overrides} - {key(o) for o in task}
    named = []
    for number, overrides in enumerate(job_overrides, start=first):
        own = [override for override in overrides if key(override) in varied and not _is_path(key(override))]
        named.append([*overrides, f"hydra.sweep.subdir='{job_name(number, own)}'"])
    return named


def key(override: str) -> str:
    """Return the key of a command-line override.

    Example:
        >>> key("+stream@stream.source=split")
        'stream@stream.source'
    """
    return override.lstrip("+~").partition("=")[0]


def _is_path(name: str) -> bool:
    """Return whether a setting is a path, which is left out of the names of jobs."""
    return setting(name).kind == "place" or setting(name).is_path


def _is_sweep(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return bool(OverridesParser.create().parse_override(override).is_sweep_override())


def job_name(number: int, overrides: Sequence[str], longest: int = 100) -> str:
    """Return the name of a job's directory: without slashes or special characters; a long one ends with a digest.

    Args:
        number: Number of the job.
        overrides: The overrides that vary in the sweep.
        longest: Largest number of characters.

    Example:
        >>> job_name(3, ["strategy=[er,gpm]", "seed=1", "stream.train_x=a/b/x.npy"])
        '3_seed=1,strategy=er,gpm,stream.train_x=x.npy'
        >>> len(job_name(0, [f"stream.class_order={list(range(100))}"]))
        100
    """
    varied = ",".join(sorted(f"{key(o)}={_FOLDERS.sub('', o.partition('=')[2])}" for o in overrides))
    plain = _ODD.sub("_", varied.translate({ord(c): None for c in "[]{}'\" "}))
    name = f"{number}_{plain}" if plain else str(number)
    if len(name) <= longest:
        return name
    return f"{name[: longest - 10]}..{hashlib.sha256(varied.encode()).hexdigest()[:8]}"


def _share_cores(launcher: Any, num_jobs: int) -> None:
    """Let joblib start no more processes than there are jobs, so that each of a few jobs gets more threads."""
    if hasattr(launcher, "joblib"):
        from joblib import effective_n_jobs

        launcher.joblib["n_jobs"] = min(effective_n_jobs(launcher.joblib["n_jobs"]), num_jobs)


def verdict(jobs: Sequence[Any]) -> str | None:
    """Return a sentence on the failed jobs of a sweep, or None if none failed."""
    lost = [(Path(job.hydra_cfg.hydra.runtime.output_dir), job._return_value) for job in jobs if _has_failed(job)]
    if not lost:
        return None
    listed = "; ".join(f"{_short(directory)} ({str(why).rstrip('.')})" for directory, why in lost[:_LISTED])
    more = f"; and {len(lost) - _LISTED} more" if len(lost) > _LISTED else ""
    return f"{len(lost)} of {len(jobs)} jobs failed: {listed}{more}."


def _has_failed(job: Any) -> bool:
    from hydra.core.utils import JobStatus

    return job.status is JobStatus.FAILED or isinstance(job._return_value, str)


def _short(directory: Path) -> Path:
    return directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory


def enter() -> None:
    """Change to the folder in which the command was given; a Ray worker does so, so that relative paths are found."""
    os.chdir(os.environ["CLSIM_CWD"])
