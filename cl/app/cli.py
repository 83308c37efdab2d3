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
from cl.app import resume as again
from cl.app.pipes import outlive_readers
from cl.errors import Preempted

_GO_ON = "All checkpoints are kept: run again with the same hydra.run.dir, or resume=DIR, to go on."


def main() -> None:
    """Run `cl-run`; errors of the user's are one sentence, without a traceback."""
    outlive_readers()
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

    from cl import explain
    from cl.app import plugins, sweep
    from cl.app.quote import at_home, quote_paths

    plugins.register()
    jobs = sweep.watch()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand errors over as they are; they are made readable below
    application = hydra.main(version_base="1.3", config_path="pkg://cl.conf", config_name="config")(run)
    try:
        sys.argv[1:], repeated = again.expand(at_home(sys.argv[1:]))
        sys.path.append(os.getcwd())  # for a stream or strategy of one's own that is not installed
        sys.argv[1:] = quote_paths(sys.argv[1:])
        application()
        sweep.compare(jobs)
        verdict = sweep.verdict(jobs)
        if repeated is not None and not verdict:
            print(again.verify(*repeated))
    except MissingConfigException as error:
        sys.exit(explain.missing(error))
    except ConfigCompositionException as error:
        sys.exit(explain.readable(error))
    except Exception as error:  # of a launcher, or of a search that found nothing
        said = explain.before_run(error) or explain.cause(error)
        verdict = " ".join(str(part) for part in (said, sweep.verdict(jobs)) if part)
        if not verdict:
            raise
    if verdict:
        sys.exit(verdict)


def run(cfg: Any) -> float | str:
    """Build the experiment that a composed configuration describes, and run it; what the user can mend ends it here.

    Returns:
        The final average, which a sweeper may maximise; of a job of a sweep that failed, the sentence that says why.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from cl import explain
    from cl.app import sweep
    from cl.app.instantiate import make
    from cl.app.validate import keep, settle
    from cl.report.result import changed_since, read_result
    from cl.report.wording import percent
    from cl.trainer.processes import run as run_in_processes

    directory = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().job.chdir:  # paths of data are meant from where the command was given
        os.chdir(HydraConfig.get().runtime.cwd)
    try:
        config = settle(cfg, directory)
        finished = read_result(directory)
        if finished is not None:
            refuse_changed(cfg, config, directory)
            keep(config, directory)  # mends what was damaged
            for name in changed_since(directory):
                print(
                    f"{directory / name} has changed since the run finished: remove {rundir.RESULT} there, and running "
                    "again writes it anew from the last checkpoint.",
                    file=sys.stderr,
                )
            print(f"Finished before, average {percent(finished)}: {directory}. Another hydra.run.dir runs it anew.")
            return finished
        return float(run_in_processes(make(cfg.trainer), learn, cfg, directory))
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return sweep.failed(error, directory)
        cause = explain.cause(error)
        if cause is None:
            raise
        sys.exit(str(cause))  # Hydra would put a line and a traceback around the sentence


def refuse_changed(cfg: Any, config: dict[str, Any], directory: Path) -> None:
    """Refuse to call a run finished whose data or code are not what they were; tell where nobody can say."""
    from cl.app.build import changed_since
    from cl.data.provenance import listed
    from cl.errors import InputError

    try:
        changed = changed_since(cfg, config, directory)
    except InputError as error:
        print(f"Whether the data have changed since then cannot be said: {error}", file=sys.stderr)
        return
    if changed and not cfg.allow_changed:
        raise InputError(
            f"{directory} finished with other data or code: {listed(changed)}. Another hydra.run.dir runs what there "
            "is now; allow_changed=true takes the result as it is."
        )


def learn(cfg: Any, directory: Path) -> float:
    """Build and run the experiment of a composed configuration, in one of its processes; return the final average."""
    from cl.app.build import build
    from cl.distributed import from_first, rank
    from cl.files import alone

    directory = from_first(lambda: directory)
    with alone(directory) if rank() == 0 else nullcontext():
        done = build(cfg, directory).run()
    return float(done.scalars(done.primary.mask)["average_accuracy"])
