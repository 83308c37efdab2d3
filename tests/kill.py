"""Kills runs at random instants, goes on with each until it finishes, and compares it with the run never stopped.

    python tests/kill.py --kills 300                 all strategies, all kinds of kills, some minutes
    python tests/kill.py --kills 40 --only er,gpm    some
    python tests/kill.py --kills 10 --cold           every attempt is a `cl-run` of its own, not a fork of a warm parent

A run goes on by the same command or by `resume=DIR`. Kinds of kills: SIGKILL, SIGTERM, SIGUSR1, SIGINT at a random
instant; `write`: SIGKILL before, within or after a random one of all writes, syncs, renames and removals; `full disk`:
no file can grow beyond a random size. At the end every checkpoint (weights, method state, R, generators) and every
table must be, byte for byte, those of the run that was never stopped, and no file more may be there.
"""

from __future__ import annotations

import argparse
import builtins
import csv
import fcntl
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_COMMON = [
    *("dataset=synthetic", "dataset.num_classes=6", "dataset.num_train=96", "dataset.num_test=48"),
    *("stream.num_tasks=3", "epochs=2", "batch_size=8", "log_every=3", "reference_dir=references"),
    *("trainer.accelerator=cpu", "report=quiet", "~report.picture", "~report.curves", "hydra.run.dir=out"),
]
_STEPS = ["checkpoint.every=2", "chunk_size=1"]
_CROP = "dataset.augment={_target_:cl.augment.RandomCropFlip,padding:2}"
_IMAGES = ["dataset.image=true", "dataset.input_shape=[3,8,8]", _CROP]
_MLP = ["backbone.hidden=[16]"]
_VIT = ["backbone=vit", "backbone.dim=16", "backbone.depth=1", "backbone.heads=2"]
_WATCHED = ["report.points=3", "report.subset=20", "report.flops=true", "probes=[ridge,knn,cka]"]

CASES: dict[str, list[str]] = {
    "finetune": ["strategy=finetune", "optimizer.momentum=0.9", "scheduler=cosine", *_STEPS],
    "er": ["strategy=er", "strategy.er.memory_size=20", "+trainer.accumulate_grad_batches=3", *_STEPS],
    "er on disk": ["strategy=er", "strategy.er.storage=disk", "strategy.er.policy=class_balanced", "optimizer=adam"],
    "er watched": [
        "strategy=er",
        *_WATCHED,
        "estimators=[log_me,covariance]",
        "checkpoint.every=3",
        "checkpoint.keep=1",
    ],
    "derpp": ["strategy=derpp", "optimizer=adam", *_IMAGES, *_STEPS],
    "ewc": ["strategy=ewc", "optimizer.momentum=0.9", "gradient_clip=1", "references=[experts,joint]", *_STEPS],
    "lwf": ["strategy=lwf", "scheduler=plateau", "scheduler.patience=0", "stream.val_fraction=0.2", *_STEPS],
    "agem": ["strategy=agem", "strategy.agem.memory_size=24", "optimizer.momentum=0.9", "checkpoint.every=0.01s"],
    "gpm": ["strategy=gpm", "checkpoint.keep=2", "report.points=2", *_STEPS],
    "l2p": ["strategy=l2p", *_IMAGES, *_VIT, "strategy.l2p.length=2", *_STEPS],
    "dropout": ["strategy=er", *_IMAGES, *_VIT, "backbone.dropout=0.2", "optimizer=adam", "scheduler=cosine", *_STEPS],
    "ncm": ["strategy=ncm", "probes=[cka]", "checkpoint.every=1", "strategy.ncm.freeze=false"],
    "joint": ["strategy=joint", "optimizer=adam", *_STEPS],
    "cumulative": ["strategy=cumulative", "scenario=task", "optimizer=adam", *_STEPS],
    "er and gpm": ["strategy=[er,gpm]", "report.points=2", *_STEPS],
    "ewc, lwf and derpp": ["strategy=[ewc,lwf,derpp]", "optimizer.momentum=0.5", *_STEPS],
    "drawn": ["strategy=finetune", "report=quiet", "checkpoint.every=null"],
}
_SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1, "SIGINT": signal.SIGINT}
_KINDS = ("SIGKILL", "SIGKILL", "write", "write", "write", "SIGTERM", "SIGUSR1", "SIGINT", "full disk")


# ---- inside a run ---------------------------------------------------------------------------------------------------


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


def _warm() -> None:
    """Import what a run needs, so that a fork has it at once."""
    import hydra  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch

    import cl.augment
    import cl.branch
    import cl.build
    import cl.checkpoint
    import cl.experiment
    import cl.instruments.curves
    import cl.instruments.estimates
    import cl.instruments.probes
    import cl.measures
    import cl.protocol
    import cl.references
    import cl.report.files
    import cl.report.picture
    import cl.report.progress
    import cl.report.terminal
    import cl.report.training
    import cl.sources
    import cl.statistics
    import cl.streams.split
    import cl.transferability
    import cl.vit

    for file in (Path(cl.build.__file__).parents[1] / "strategies").glob("[a-z]*.py"):
        if file.stem != "avalanche":
            __import__(f"cl.strategies.{file.stem}")
    torch.set_num_threads(1)


def run(arguments: list[str], limit: int | None = None, fuse: Fuse | None = None) -> int:
    """Run `cl-run` in this process; return its exit status."""
    import resource as system

    from cl.cli import main

    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        system.setrlimit(system.RLIMIT_FSIZE, (limit, system.RLIM_INFINITY))
    if fuse is not None:
        fuse.lay()
    sys.argv = ["cl-run", *arguments]
    try:
        main()
        return 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


# ---- around runs ----------------------------------------------------------------------------------------------------


class Attempt:
    """One process of a run.

    Args:
        place: Its working directory.
        arguments: Of `cl-run`.
        at: The instant at which a fuse kills it; None lays no fuse.
        limit: Bytes of a file at most.
        cold: Whether to start an interpreter.
    """

    def __init__(
        self,
        place: Path,
        arguments: list[str],
        at: int | str | None = None,
        limit: int | None = None,
        cold: bool = False,
    ) -> None:
        self.log, self.note = place / "log.txt", place / "note.txt"
        self.note.unlink(missing_ok=True)
        self.log.write_text("")
        self.began, self._said = time.monotonic(), None
        if cold:
            with self.log.open("w") as log:
                command = [sys.executable, "-m", "cl", *arguments]
                self.process = subprocess.Popen(command, cwd=place, stdout=log, stderr=log)
            self.pid = self.process.pid
            return
        reader, log = os.pipe()  # which no limit of files cuts
        fcntl.fcntl(log, fcntl.F_SETPIPE_SZ, 2**20)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS.values())  # a child that is not in its place yet
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS.values())
                os.chdir(place)
                os.dup2(log, 1), os.dup2(log, 2)
                fuse = None if at is None else Fuse(at, self.note)
                status = run(arguments, limit, fuse)
                if fuse is not None:
                    self.note.write_text(str(fuse.count))
                sys.stdout.flush(), sys.stderr.flush()
            finally:
                os._exit(status)
        os.close(log)
        self._said = reader
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS.values())

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


class Case:
    """A run that is killed, beside the one that is not."""

    def __init__(self, name: str, folder: Path, draw: random.Random, cold: bool = False) -> None:
        self.name, self.draw, self.cold = name, draw, cold
        self.arguments = [*_COMMON, *([] if "backbone=vit" in CASES[name] else _MLP), *CASES[name]]
        self.folder = folder / name.replace(" ", "_").replace(",", "")
        self.whole = self.folder / "whole"
        self.whole.mkdir(parents=True)
        attempt = Attempt(self.whole, self.arguments, at=None if cold else 0, cold=cold)
        status = attempt.wait()
        if status != 0:
            raise SystemExit(f"{name}: the run that nobody stops ends with {status}:\n{attempt.log.read_text()}")
        self.seconds = time.monotonic() - attempt.began
        self.instants = 0 if cold else int(attempt.note.read_text())
        sizes = [file.stat().st_size for file in (self.whole / "out").rglob("*") if file.is_file()]
        self.largest = max(sizes)

    def play(self, kills: int) -> tuple[Counter[str], list[str]]:
        """Kill a fresh run up to so many times; return the kills by kind, and what went wrong."""
        place = self.folder / "killed"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        found: Counter[str] = Counter()
        kind = ""
        while found.total() < kills:
            kind = self.draw.choice(_KINDS if not self.cold else _KINDS[:1] + _KINDS[5:8])
            done, wrong = self._once(place, kind, found)
            if wrong:
                return found, [f"{self.name}, {kind}: {wrong}"]
            if done:
                break
        else:
            attempt = Attempt(place, self._command(place), cold=self.cold)
            if attempt.wait() != 0:
                return found, [f"{self.name}: did not go on after {dict(found)}:\n{attempt.log.read_text()}"]
        wrong = [f"{self.name}, after {dict(found)}: {text}" for text in differences(self.whole, place)]
        return found, wrong + [f"its last attempt ({kind}) said:\n{(place / 'log.txt').read_text()}"] * bool(wrong)

    def _command(self, place: Path) -> list[str]:
        begun = (place / "out" / "config.yaml").exists()
        return ["resume=out"] if begun and self.draw.random() < 0.5 else self.arguments

    def _once(self, place: Path, kind: str, found: Counter[str]) -> tuple[bool, str]:
        """Attempt once; return whether the run has finished, and what went wrong."""
        at = self.draw.randrange(1, self.instants + 1) if kind == "write" else None
        limit = int(self.largest * self.draw.random()) if kind == "full disk" else None
        random.seed(self.draw.random())
        attempt = Attempt(place, self._command(place), at, limit, self.cold)
        if kind in _SIGNALS:
            status = attempt.wait(self.draw.random() * self.seconds)
            if status is None:
                os.kill(attempt.pid, _SIGNALS[kind])
                status = attempt.wait()
        else:
            status = attempt.wait()
        text = attempt.log.read_text()
        number = int(_SIGNALS.get(kind, 9))
        expected = {0, -number, 128 + number} | ({1} if kind in ("SIGINT", "full disk") else set())
        if status not in expected or "Traceback" in text:
            return False, f"ended with {status}:\n{text}"
        if status == 0:
            return True, ""
        found[f"write: {attempt.note.read_text()}" if kind == "write" else kind] += 1
        return False, ""


# ---- comparing ------------------------------------------------------------------------------------------------------

_TABLES = ("transfer.csv", "training.csv", "learning_curves.csv", "estimates.csv", "resources.csv")
_CLOCKS = ("seconds", "measuring_seconds", "peak_memory_bytes", "model_size_efficiency")


def differences(whole: Path, killed: Path) -> list[str]:
    """Return in what two finished runs differ, times left out."""
    names = [{str(f.relative_to(place)) for f in place.rglob("*") if f.is_file()} for place in (whole, killed)]
    strange = {name for name in names[0] ^ names[1] if name != "note.txt"}
    found = [f"files of one alone: {sorted(strange)}"] if strange else []
    for name in sorted(names[0] & names[1]):
        one, two = whole / name, killed / name
        if name.endswith(".ckpt"):
            found += [f"{name}: {key}" for key in _unequal(_checkpoint(one), _checkpoint(two))]
        elif one.name in _TABLES:
            found += [f"{name} differs"] * (_table(one) != _table(two))
        elif one.name in ("transfer.json", "references.json", "result.json"):
            found += [f"{name} differs"] * (_json(one) != _json(two))
        elif name in ("out/config.yaml", "out/command.json"):
            found += [f"{name} differs"] * (one.read_bytes() != two.read_bytes())
    return found


def _checkpoint(path: Path) -> Any:
    import torch

    from cl.checkpoint import is_whole

    if not is_whole(path):
        return {"whole": False}
    content = torch.load(path, weights_only=True)
    resources = content["instruments"].pop("resources._extra_state")
    return {**content, "resources": [record[2:8] + record[10:] for record in resources["records"]]}


def _unequal(a: Any, b: Any, where: str = "") -> list[str]:
    """Return the places where nested containers differ, in a bit of a tensor or otherwise."""
    import torch

    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and _raw(a) == _raw(b)
        return [] if same else [where]
    if type(a) is not type(b):
        return [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where} keys"]
        return [text for key in a for text in _unequal(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where} length"]
        return [text for i, pair in enumerate(zip(a, b, strict=True)) for text in _unequal(*pair, f"{where}[{i}]")]
    return [] if a == b or (a != a and b != b) else [where]


def _raw(x: Any) -> bytes:
    return bytes(x.detach().numpy().tobytes())


def _table(path: Path) -> list[list[str]]:
    rows = list(csv.reader(path.read_text(errors="replace").splitlines()))
    kept = [i for i, name in enumerate(rows[0] if rows else ()) if name not in _CLOCKS]
    return [[row[i] if i < len(row) else "" for i in kept] for row in rows]


def _json(path: Path) -> Any:
    try:
        return _timeless(json.loads(path.read_text()))
    except ValueError:
        return path.read_bytes()


def _timeless(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _timeless(value) for key, value in tree.items() if key not in ("seconds", "sha256")}
    return [_timeless(item) for item in tree] if isinstance(tree, list) else tree


# ---- all of it ------------------------------------------------------------------------------------------------------


def play(
    kills: int, names: list[str], seed: int, cold: bool = False, at_once: int = 6
) -> tuple[Counter[str], list[str]]:
    """Kill runs of every case until there are so many kills; return them by kind, and what went wrong."""
    draw = random.Random(seed)
    found: Counter[str] = Counter()
    wrong: list[str] = []
    runs = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        cases = [Case(name, Path(folder), draw, cold) for name in names]
        while found.total() < kills and not (wrong and len(wrong) > 20):
            for case in cases:
                these, mismatches = case.play(draw.randrange(1, at_once + 1))
                found, wrong, runs = found + these, wrong + mismatches, runs + 1
                for text in mismatches:
                    print(text, flush=True)
                print(f"{runs} runs, {found.total()} kills", file=sys.stderr, flush=True)
                if found.total() >= kills:
                    break
    print(f"{runs} runs of {len(names)} configurations, {found.total()} kills, {len(wrong)} mismatches")
    for kind, number in sorted(found.items()):
        print(f"  {number:4d} {kind}")
    return found, wrong


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", default=",".join(CASES).replace("ewc, lwf", "ewc lwf"), help="names of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    known = {name.replace(",", ""): name for name in CASES}
    if not options.cold:
        _warm()
    _, wrong = play(options.kills, [known[name] for name in options.only.split(",")], options.seed, options.cold)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    assert resource  # of Unix alone
    main()
