"""Kills runs at random instants, goes on with each until it finishes, and compares it with the run never stopped.

    python tests/harness/kill.py --kills 300                 all strategies, all kinds of kills, some minutes
    python tests/harness/kill.py --kills 40 --only er,gpm    some
    python tests/harness/kill.py --kills 10 --cold           every attempt is a new interpreter, not a fork

A run goes on by the same command or by `resume=DIR`. Kinds of kills: SIGKILL, SIGTERM, SIGUSR1, SIGINT at a random
instant; `write`: SIGKILL before, within or after a random one of all writes, syncs, renames and removals; `full disk`:
no file can grow beyond a random size. At the end every checkpoint (weights, method state, R, generators) and every
table must be, byte for byte, those of the run that was never stopped, and no file more may be there.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from alike import differences
from attempt import SIGNALS, Attempt, warm

COMMON = [
    *("dataset=synthetic", "dataset.num_classes=6", "dataset.num_train=96", "dataset.num_test=48"),
    *("stream.num_tasks=3", "epochs=2", "batch_size=8", "log_every=3", "reference_dir=references"),
    *("trainer.accelerator=cpu", "report=quiet", "~report.picture", "~report.curves", "hydra.run.dir=out"),
]
_STEPS = ["checkpoint.every=2", "chunk_size=1"]
_CROP = "dataset.augment={_target_:cl.augment.RandomCropFlip,padding:2}"
_IMAGES = ["dataset.image=true", "dataset.input_shape=[3,8,8]", _CROP]
MLP = ["backbone.hidden=[16]"]
_VIT = ["backbone=vit", "backbone.dim=16", "backbone.depth=1", "backbone.heads=2"]
_DUAL = ["strategy.dualprompt.general_blocks=[0]", "strategy.dualprompt.expert_blocks=[0]"]
_CODA = "strategy.coda_prompt.blocks=[0]"
_WATCHED = ["report.points=3", "report.subset=20", "report.flops=true", "probes=[ridge,knn,cka]"]

CASES: dict[str, list[str]] = {
    "finetune": ["strategy=finetune", "optimizer.momentum=0.9", "scheduler=cosine", *_STEPS],
    "er": ["strategy=er", "strategy.er.memory_size=20", "+trainer.accumulate_grad_batches=3", *_STEPS],
    "kept": [
        "strategy=er",
        "optimizer=adam",
        "optimizer_state=keep",
        "scheduler=cosine",
        "scheduler_interval=step",
        *_STEPS,
    ],
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
    "lwf": [
        "strategy=lwf",
        "scheduler=plateau",
        "scheduler.patience=0",
        "stream.val_fraction=0.2",
        "epochs=3",
        *_STEPS,
    ],
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
    "er_ace": ["strategy=er_ace", "strategy.er_ace.memory_size=20", *_STEPS],
    "der": ["strategy=der", "optimizer=adam", *_IMAGES, *_STEPS],
    "mir": ["strategy=mir", "strategy.mir.memory_size=20", "optimizer.momentum=0.9", *_STEPS],
    "gdumb": ["strategy=gdumb", "strategy.gdumb.cutmix=0.5", *_IMAGES, *_STEPS],
    "icarl": ["strategy=icarl", "strategy.icarl.memory_size=20", *_STEPS],
    "scr": ["strategy=scr", "strategy.scr.batch_size=10", *_IMAGES, *_STEPS],
    "gem": ["strategy=gem", "strategy.gem.memory_size=30", *_STEPS],
    "ogd": ["strategy=ogd", "strategy.ogd.num_samples=10", *_STEPS],
    "sgp": ["strategy=sgp", *_STEPS],
    "trgp": ["strategy=trgp", "strategy.trgp.trust=0.1", "scenario=task", *_STEPS],
    "cuber": ["strategy=cuber", "strategy.cuber.sufficient=0.1", "scenario=task", *_STEPS],
    "adam_nscl": ["strategy=adam_nscl", *_STEPS],
    "tag": ["strategy=tag", *_STEPS],
    "online_ewc": ["strategy=online_ewc", "strategy.online_ewc.fisher=sampled", *_STEPS],
    "si": ["strategy=si", "optimizer.momentum=0.9", *_STEPS],
    "mas": ["strategy=mas", "optimizer=adam", *_STEPS],
    "packnet": ["strategy=packnet", "scenario=task", "optimizer.momentum=0.9", *_STEPS],
    "hat": ["strategy=hat", "scenario=task", *_STEPS],
    "supsup": ["strategy=supsup", "strategy.supsup.density=0.3", *_STEPS],
    "dualprompt": ["strategy=dualprompt", *_IMAGES, *_VIT, *_DUAL, *_STEPS],
    "coda_prompt": ["strategy=coda_prompt", "strategy.coda_prompt.num_components=6", _CODA, *_IMAGES, *_VIT, *_STEPS],
    "s_prompts": ["strategy=s_prompts", "scenario=domain", *_IMAGES, *_VIT, *_STEPS],
    "ranpac": ["strategy=ranpac", "strategy.ranpac.num_projections=20", "strategy.ranpac.adapt=true", *_STEPS],
}
_KINDS = ("SIGKILL", "SIGKILL", "write", "write", "write", "SIGTERM", "SIGUSR1", "SIGINT", "full disk")


class Case:
    """A run that is killed, beside the one that is not."""

    def __init__(self, name: str, folder: Path, draw: random.Random, cold: bool = False) -> None:
        self.name, self.draw, self.cold = name, draw, cold
        self.arguments = [*COMMON, *([] if "backbone=vit" in CASES[name] else MLP), *CASES[name]]
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
        if kind in SIGNALS:
            status = attempt.wait(self.draw.random() * self.seconds)
            if status is None:
                os.kill(attempt.pid, SIGNALS[kind])
                status = attempt.wait()
        else:
            status = attempt.wait()
        text = attempt.log.read_text()
        number = int(SIGNALS.get(kind, 9))
        expected = {0, -number, 128 + number} | ({1} if kind in ("SIGINT", "full disk") else set())
        if status not in expected or "Traceback" in text:
            return False, f"ended with {status}:\n{text}"
        if status == 0:
            return True, ""
        found[f"write: {attempt.note.read_text()}" if kind == "write" else kind] += 1
        return False, ""


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
        warm()
    _, wrong = play(options.kills, [known[name] for name in options.only.split(",")], options.seed, options.cold)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
