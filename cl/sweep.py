"""The jobs of a sweep, under any launcher: one that fails is told and counted, and takes no other with it.

A job that fails returns its sentence instead of a number. So no exception crosses a launcher, where it would end the
jobs beside it, and a search counts the trial as failed.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cl import explain
from cl.errors import InputError

_LISTED = 5


def failed(error: Exception, directory: Path) -> str:
    """Tell of a job that failed, where it runs, and return the sentence; what no user can mend keeps its traceback."""
    cause = explain.cause(error)
    if cause is None:
        traceback.print_exception(error)
    sentence = " ".join(str(cause or f"{type(error).__name__}: {error}").split())
    print(f"{_short(directory)}: {sentence}", file=sys.stderr, flush=True)
    return sentence


def watch() -> list[Any]:
    """Return a list that fills with what the jobs of a sweep return (Hydra's `JobReturn`), under any launcher."""
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
        _stay_inside(self, job_overrides)
        _share_cores(self, len(job_overrides))
        try:
            returned = launch(self, job_overrides, initial_job_idx)
        except HydraException:
            raise
        except Exception as error:  # no job's: those are returned
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(
                f"{type(self).__name__} could not go on ({reason}): mend that, and run again with the same "
                "hydra.sweep.dir; every run goes on from its checkpoints."
            ) from error
        jobs.extend(returned)
        return returned

    return watched


def _stay_inside(launcher: Any, job_overrides: Sequence[Sequence[str]]) -> None:
    """Refuse values that would lead out of the sweep's directory, of which the jobs' directories bear the names."""
    free = launcher.config.hydra.job.config.override_dirname.exclude_keys
    for override in (override for job in job_overrides for override in job):
        key, _, value = override.lstrip("+~").partition("=")
        if ".." in value.strip("'\"").split("/") and key not in free and "=" not in key:
            raise InputError(
                f"{override} would be part of the name of a job's directory, and lead out of the sweep's: set "
                "hydra.sweep.subdir='${hydra:job.num}'."
            )


def _share_cores(launcher: Any, num_jobs: int) -> None:
    """Start no more processes than there are jobs, so that joblib gives each of few jobs more threads."""
    if hasattr(launcher, "joblib"):
        from joblib import effective_n_jobs

        launcher.joblib["n_jobs"] = min(effective_n_jobs(launcher.joblib["n_jobs"]), num_jobs)


def verdict(jobs: Sequence[Any]) -> str | None:
    """Return a sentence on the jobs of a sweep that failed, or None where none did."""
    lost = [(Path(job.hydra_cfg.hydra.runtime.output_dir), job._return_value) for job in jobs if _is_lost(job)]
    if not lost:
        return None
    listed = "; ".join(f"{_short(directory)} ({str(why).rstrip('.')})" for directory, why in lost[:_LISTED])
    more = f"; and {len(lost) - _LISTED} more" if len(lost) > _LISTED else ""
    return f"{len(lost)} of {len(jobs)} jobs failed: {listed}{more}."


def _is_lost(job: Any) -> bool:
    from hydra.core.utils import JobStatus

    return job.status is JobStatus.FAILED or isinstance(job._return_value, str)


def _short(directory: Path) -> Path:
    return directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory


def enter() -> None:
    """Go where the command was given: paths in a job mean the same on every machine of a Ray cluster."""
    os.chdir(os.environ["CLSIM_CWD"])
