"""`cl-run`: the Hydra application that composes, checks and runs an experiment."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from cl import explain


def main() -> None:
    """Run `cl-run`; errors of the user's are one sentence, without a traceback."""
    if importlib.util.find_spec("cl.conf") is None:
        sys.exit("clsim is not installed, so its configuration cannot be found: run `pip install -e .` first.")
    import hydra
    from hydra.errors import ConfigCompositionException, MissingConfigException

    from cl import plugins

    plugins.register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand errors over as they are; they are made readable below
    application = hydra.main(version_base="1.3", config_path="pkg://cl.conf", config_name="config")(run)
    try:
        application()
    except MissingConfigException as error:
        sys.exit(explain.missing(error))
    except ConfigCompositionException as error:
        sys.exit(explain.readable(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted. Checkpoints of finished tasks are kept; run again with the same hydra.run.dir to go on.")


def run(cfg: Any) -> float:
    """Build the experiment that a composed configuration describes, and run it; what the user can mend ends it here.

    Returns:
        The final average, which a sweeper may maximise.
    """
    from hydra.core.hydra_config import HydraConfig

    from cl.build import make
    from cl.processes import run as run_in_processes

    try:
        directory = Path(HydraConfig.get().runtime.output_dir)
        return float(run_in_processes(make(cfg.trainer), learn, cfg, directory))
    except Exception as error:
        cause = explain.cause(error)
        if cause is None:
            raise
        sys.exit(str(cause))  # Hydra would put a line and a traceback around the sentence


def learn(cfg: Any, directory: Path) -> float:
    """Build and run the experiment of a composed configuration, in one of its processes; return the final average."""
    from cl.build import build
    from cl.distributed import from_first

    done = build(cfg, from_first(lambda: directory)).run()
    return float(done.scalars(done.primary.mask)["average_accuracy"])
