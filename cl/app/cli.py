"""`cl-run`: the Hydra application that composes, checks and runs an experiment."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cl import rundir
from cl.app import resume
from cl.app.pipes import ignore_closed_pipes
from cl.errors import Preempted

_GO_ON = "All checkpoints are kept: to continue, run again with the same hydra.run.dir, or with resume=DIR."


def main() -> None:
    """Run `cl-run`; an error that the user can mend is printed as one sentence, without a traceback."""
    ignore_closed_pipes()
    try:
        _main()
    except Preempted as error:
        where = "; the task in training was saved" if error.saved else ""
        print(f"Stopped by {signal.Signals(error.number).name}{where}. {_GO_ON}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        sys.exit(f"Interrupted. {_GO_ON}")


def _main() -> None:
    if importlib.util.find_spec("cl.conf") is None:
        sys.exit("clsim is not installed, so its configuration cannot be found: run `pip install -e .` first.")
    import hydra
    from hydra.errors import ConfigCompositionException, MissingConfigException

    from cl.app import explain, plugins, sweep
    from cl.app.quote import at_home, quote_paths
    from cl.trainer.failures import cause

    plugins.register()
    jobs = sweep.watch()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on as they are, and they are made readable below
    application = hydra.main(version_base="1.3", config_path="pkg://cl.conf", config_name="config")(run)
    try:
        sys.argv[1:], repeated = resume.expand(at_home(sys.argv[1:]))
        sys.path.append(os.getcwd())  # so that a user's own stream or strategy need not be installed
        sys.argv[1:] = quote_paths(sys.argv[1:])
        application()
        sweep.compare(jobs)
        verdict = sweep.verdict(jobs)
        if repeated is not None and not verdict:
            print(resume.verify(*repeated))
    except MissingConfigException as error:
        sys.exit(explain.missing(error))
    except ConfigCompositionException as error:
        sys.exit(explain.readable(error))
    except Exception as error:  # from a launcher, or from a search that found nothing
        reason = explain.before_run(error) or cause(error)
        verdict = " ".join(str(part) for part in (reason, sweep.verdict(jobs)) if part)
        if not verdict:
            raise
    if verdict:
        sys.exit(verdict)


def run(cfg: Any) -> float | str:
    """Build and run the experiment of a composed configuration; an error that the user can mend ends the process.

    Returns:
        The final average accuracy, which a sweeper may maximise; for a failed job of a sweep, the reason in a sentence.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from cl.app import scoring, sweep
    from cl.app.instantiate import instantiate
    from cl.app.validate import store, validate
    from cl.report.result import changed_since, read_result
    from cl.report.wording import percent
    from cl.trainer.failures import cause
    from cl.trainer.processes import run as run_in_processes

    directory = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().job.chdir:  # relative paths of data start where the command was given
        os.chdir(HydraConfig.get().runtime.cwd)
    try:
        if cfg.score is not None:
            return scoring.command(cfg, directory)
        config = validate(cfg, directory)
        finished = read_result(directory)
        if finished is not None:
            refuse_changed(cfg, config, directory)
            store(config, directory)  # restores damaged files
            for name in changed_since(directory):
                print(
                    f"{directory / name} has changed since the run finished: to write it anew from the last "
                    f"checkpoint, remove {rundir.RESULT} there and run again.",
                    file=sys.stderr,
                )
            print(f"Finished before, average {percent(finished)}: {directory}. Another hydra.run.dir runs it again.")
            return finished
        return float(run_in_processes(instantiate(cfg.trainer), learn, cfg, directory))
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return sweep.failed(error, directory)
        reason = cause(error)
        if reason is None:
            raise
        sys.exit(str(reason))  # an exception would be printed by Hydra with a header and a traceback


def refuse_changed(cfg: Any, config: dict[str, Any], directory: Path) -> None:
    """Refuse to report a run as finished if its data or code have changed; print a line if they cannot be compared."""
    from cl.app.build import changed_since
    from cl.data.provenance import listed
    from cl.errors import InputError

    try:
        changed = changed_since(cfg, config, directory)
    except InputError as error:
        print(f"Whether the data have changed since then cannot be checked: {error}", file=sys.stderr)
        return
    if changed and not cfg.allow_changed:
        raise InputError(
            f"{directory} finished with other data or code: {listed(changed)}. To run with those of now, give another "
            "hydra.run.dir; to accept the result as it is, allow_changed=true."
        )


def learn(cfg: Any, directory: Path) -> float:
    """Build and run an experiment in one of its processes, which may be several; return the final average accuracy."""
    from cl.app.build import build
    from cl.distributed import from_first, rank
    from cl.files import alone

    directory = from_first(lambda: directory)
    with alone(directory) if rank() == 0 else nullcontext():
        done = build(cfg, directory).run()
    return float(done.scalars(done.primary.mask)["average_accuracy"])
