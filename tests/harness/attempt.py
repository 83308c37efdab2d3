"""A run as a process that can be killed at an instant of choice: a fork of a parent that has imported everything."""

from __future__ import annotations

import builtins
import fcntl
import io
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1, "SIGINT": signal.SIGINT}


class Fuse:
    """Counts the instants around what a run does to its files, and kills it at one of them.

    Args:
        at: Which one, from 1; 0 for none; or a word, for the one after a file with it in its path is in its place.
        note: Where the name of that instant, or their number, is written.
    """

    def __init__(self, at: int | str, note: Path) -> None:
        self.at, self.count, self.note = at, 0, note
        self._open = builtins.open

    def reached(self, name: str) -> bool:
        """Count an instant; say whether it is the one."""
        self.count += 1
        return self.count == self.at

    def instant(self, name: str) -> None:
        """Die, if this is the one."""
        if self.reached(name):
            self.die(name)

    def die(self, name: str) -> None:
        with self._open(self.note, "w") as file:
            file.write(name)
        os.kill(os.getpid(), signal.SIGKILL)

    def lay(self) -> None:
        """Put instants around all that writes."""
        for name in ("replace", "fsync", "unlink", "mkdir", "ftruncate"):
            setattr(os, name, self._around(name, getattr(os, name)))
        import torch

        save = torch.save

        def torn(content: Any, path: Any, *rest: Any, **options: Any) -> None:
            self.instant("before torch.save")
            save(content, path, *rest, **options)
            if self.reached("within torch.save"):
                os.truncate(path, random.randrange(os.path.getsize(path)))
                self.die("within torch.save")
            self.instant("after torch.save")

        torch.save = torn
        builtins.open = io.open = self._opened  # type: ignore[assignment]

    def _around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def around(*arguments: Any, **options: Any) -> Any:
            self.instant(f"before os.{name}")
            found = function(*arguments, **options)
            self.instant(f"after os.{name}")
            if name == "replace" and isinstance(self.at, str) and self.at in str(arguments[1]):
                self.die(self.at)
            return found

        return around

    def _opened(self, file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        found = self._open(file, mode, *rest, **options)
        if not {"w", "a", "+"} & set(mode) or isinstance(file, int) or str(file).startswith("/dev/"):
            return found
        kind = "append" if "a" in mode else "write"
        self.instant(f"before a {kind}")
        write = found.write

        def torn(text: Any) -> Any:
            if len(text) > 1 and self.reached(f"within a {kind}"):
                write(text[: random.randrange(1, len(text))])
                found.flush()
                self.die(f"within a {kind}")
            done = write(text)
            if self.reached(f"after a {kind}"):
                found.flush()
                self.die(f"after a {kind}")
            return done

        with suppress(AttributeError):  # of a binary file
            found.write = torn
        return found


def warm() -> None:
    """Import what a run needs, so that a fork has it at once."""
    import hydra  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch

    import cl.app.build
    import cl.app.protocol
    import cl.backbones.vit
    import cl.data.augment
    import cl.data.sources
    import cl.engine.branch
    import cl.engine.checkpoint
    import cl.engine.experiment
    import cl.measure.estimators
    import cl.measure.learning_curves
    import cl.measure.probes
    import cl.measure.references
    import cl.metrics.statistics
    import cl.metrics.transferability
    import cl.report.picture
    import cl.report.progress
    import cl.report.scalars
    import cl.report.tables
    import cl.report.terminal
    import cl.report.training
    import cl.streams.split

    for file in (Path(cl.app.build.__file__).parents[1] / "strategies").glob("[a-z]*.py"):
        if file.stem != "avalanche":
            __import__(f"cl.strategies.{file.stem}")
    torch.set_num_threads(1)


Command = list[str] | Callable[[], None]  # arguments of `cl-run`, or what runs instead


def warm_wandb() -> None:
    """Import what Weights & Biases needs, too, and have it look less at the machine."""
    import PIL.Image  # noqa: F401
    import wandb.sdk.wandb_init  # noqa: F401

    import cl.report.wandb  # noqa: F401

    os.environ |= {"WANDB_X_DISABLE_STATS": "true", "WANDB_DISABLE_GIT": "true", "WANDB_DISABLE_CODE": "true"}


def run(command: Command, limit: int | None = None, fuse: Fuse | None = None) -> int:
    """Run `cl-run`, or a function, in this process; return its exit status."""
    from cl.app.cli import main

    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if fuse is not None:
        fuse.lay()
    if not callable(command):
        sys.argv = ["cl-run", *command]
    try:
        command() if callable(command) else main()
        return 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


class Attempt:
    """One process of a run.

    Args:
        place: Its working directory.
        command: Arguments of `cl-run`, or a function.
        at: The instant at which a fuse kills it; None lays no fuse.
        limit: Bytes of a file at most.
        cold: Whether to start an interpreter.
    """

    def __init__(
        self,
        place: Path,
        command: Command,
        at: int | str | None = None,
        limit: int | None = None,
        cold: bool = False,
    ) -> None:
        self.log, self.note = place / "log.txt", place / "note.txt"
        self.note.unlink(missing_ok=True)
        self.log.write_text("")
        self.began, self._said = time.monotonic(), None
        if cold:
            assert not callable(command)
            with self.log.open("w") as log:
                asked = [sys.executable, "-m", "cl", *command]
                self.process = subprocess.Popen(asked, cwd=place, stdout=log, stderr=log)
            self.pid = self.process.pid
            return
        reader, log = os.pipe()  # which no limit of files cuts
        fcntl.fcntl(log, fcntl.F_SETPIPE_SZ, 2**20)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS.values())  # a child that is not in its place yet
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS.values())
                os.chdir(place)
                os.dup2(log, 1), os.dup2(log, 2)
                fuse = None if at is None else Fuse(at, self.note)
                sys.path.insert(0, str(place))
                status = run(command, limit, fuse)
                if fuse is not None:
                    self.note.write_text(str(fuse.count))
                sys.stdout.flush(), sys.stderr.flush()
            finally:
                os._exit(status)
        os.close(log)
        self._said = reader
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS.values())

    def wait(self, seconds: float | None = None) -> int | None:
        """Return the exit status, minus the signal's number if one ended it; None where it still runs."""
        until = None if seconds is None else self.began + seconds
        while until is None or time.monotonic() < until:
            found, status = os.waitpid(self.pid, 0 if until is None else os.WNOHANG)
            if found:
                if self._said is not None:
                    with open(self._said, encoding="utf-8", errors="replace") as said:
                        self.log.write_text(said.read())
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        return None
