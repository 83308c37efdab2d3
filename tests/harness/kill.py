"""Kills runs at random instants, goes on with each until it finishes, and compares it with the run never stopped.

    python tests/harness/kill.py --kills 300                 all strategies, all kinds of kills, some minutes
    python tests/harness/kill.py --kills 40 --only er,gpm    some
    python tests/harness/kill.py --kills 10 --cold           every attempt is a new interpreter, not a fork
    python tests/harness/kill.py --kills 200 --wandb         each with Weights & Biases, offline, a point a step

A run goes on by the same command or by `resume=DIR`. Kinds of kills: SIGKILL, SIGTERM, SIGUSR1, SIGINT at a random
instant; `write`: SIGKILL before, within or after a random one of all writes, syncs, renames and removals; `full disk`:
no file can grow beyond a random size. At the end every checkpoint (weights, method state, R, generators) and every
table must be, byte for byte, those of the run that was never stopped, and no file more may be there; the history that
the files of Weights & Biases hold must have every point once.

`python` is a run of a script, without `cl-run`. In `own` the data and a strategy are the user's, and after every second
kill one of them is changed: the run must then be refused in one sentence and leave its directory as it is, go on once
what was there is back, and, asked with `allow_changed=true`, end with the change told beside its numbers.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from alike import differences
from attempt import SIGNALS, Attempt, Command, warm, warm_wandb
from others import CHANGES, OWN, from_python, write_own

COMMON = [
    *("dataset=synthetic", "dataset.num_classes=6", "dataset.num_train=96", "dataset.num_test=48"),
    *("stream.num_tasks=3", "epochs=2", "batch_size=8", "log_every=3", "reference_dir=references"),
    *("trainer.accelerator=cpu", "report=quiet", "~report.picture", "~report.curves", "hydra.run.dir=out"),
]
_STEPS = ["checkpoint.every=2", "chunk_size=1"]
_CROP = "dataset.augment={_target_:cl.data.augment.RandomCropFlip,padding:2}"
_IMAGES = ["dataset.image=true", "dataset.input_shape=[3,8,8]", _CROP]
MLP = ["backbone.hidden=[16]"]
_VIT = ["backbone=vit", "backbone.dim=16", "backbone.depth=1", "backbone.heads=2"]
_DUAL = ["strategy.dualprompt.general_blocks=[0]", "strategy.dualprompt.expert_blocks=[0]"]
_CODA = "strategy.coda_prompt.blocks=[0]"
_GENERATOR = [f"strategy.generative_replay.{key}" for key in ("hidden=8", "code=3", "iterations=20")]
_HIDDEN = ["stream=hidden_labels", "stream.source.num_tasks=3", "scenario=domain", "gradient_clip=0.1"]
_PREQUENTIAL = ["instrument=prequential", "instrument.prequential.every=3"]
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
    "feature_distillation": [
        "strategy=feature_distillation",
        "+strategy.feature_distillation.teacher._target_=cl.backbones.networks.MLP",
        "+strategy.feature_distillation.teacher._partial_=true",
        *_STEPS,
    ],
    "frozen": ["strategy=er", "backbone=mlp", "backbone.hidden=[16,8]", "freeze=3", "dataset.augment=null", *_STEPS],
    "tent": ["strategy=tent", *_HIDDEN, "backbone=mlp", "backbone.hidden=[16]", "backbone.norm=true", *_STEPS],
    "er_ace": ["strategy=er_ace", "strategy.er_ace.memory_size=20", *_STEPS],
    "uer": ["strategy=uer", "strategy.uer.memory_size=20", *_STEPS],
    "der": ["strategy=der", "optimizer=adam", *_IMAGES, *_STEPS],
    "gss": ["strategy=gss", "strategy.gss.memory_size=20", *_STEPS],
    "xder": ["strategy=xder", "strategy.xder.memory_size=20", "strategy.xder.num_views=2", *_IMAGES, *_STEPS],
    "mer": ["strategy=mer", "strategy.mer.memory_size=20", "updates_per_batch=2", *_STEPS],
    "generative_replay": ["strategy=generative_replay", *_GENERATOR, "optimizer=adam", *_STEPS],
    "er_las": ["strategy=er_las", "strategy.er_las.memory_size=20", "strategy.er_las.window=3", *_STEPS],
    "aser": ["strategy=aser", "strategy.aser.memory_size=20", *_STEPS],
    "mir": ["strategy=mir", "strategy.mir.memory_size=20", "optimizer.momentum=0.9", *_STEPS],
    "gdumb": ["strategy=gdumb", "strategy.gdumb.cutmix=0.5", *_IMAGES, *_STEPS],
    "icarl": ["strategy=icarl", "strategy.icarl.memory_size=20", *_STEPS],
    "wa": ["strategy=wa", "strategy.wa.memory_size=20", "optimizer.momentum=0.9", *_STEPS],
    "bic": ["strategy=bic", "strategy.bic.memory_size=20", "optimizer=adam", *_STEPS],
    "lucir": ["strategy=lucir", "strategy.lucir.memory_size=20", "optimizer.momentum=0.9", *_STEPS],
    "podnet": ["strategy=podnet", "strategy.podnet.num_proxies=2", *_IMAGES, *_STEPS],
    "scr": ["strategy=scr", "strategy.scr.batch_size=10", *_IMAGES, *_STEPS],
    "pcr": ["strategy=pcr", *_IMAGES, *_STEPS],
    "hpcr": ["strategy=hpcr", "strategy.hpcr.memory_size=20", *_IMAGES, *_STEPS],
    "ocm": ["strategy=ocm", "strategy.ocm.batch_size=8", "optimizer=adam", *_IMAGES, *_STEPS],
    "onpro": ["strategy=onpro", "strategy.onpro.batch_size=8", *_IMAGES, *_STEPS],
    "dvc": ["strategy=dvc", "strategy.dvc.num_candidates=20", "optimizer.momentum=0.9", *_IMAGES, *_STEPS],
    "gem": ["strategy=gem", "strategy.gem.memory_size=30", *_STEPS],
    "ogd": ["strategy=ogd", "strategy.ogd.num_samples=10", *_STEPS],
    "sgp": ["strategy=sgp", *_STEPS],
    "trgp": ["strategy=trgp", "strategy.trgp.trust=0.1", "scenario=task", *_STEPS],
    "cuber": ["strategy=cuber", "strategy.cuber.sufficient=0.1", "scenario=task", *_STEPS],
    "adam_nscl": ["strategy=adam_nscl", *_STEPS],
    "tag": ["strategy=tag", *_STEPS],
    "online_ewc": ["strategy=online_ewc", "strategy.online_ewc.fisher=sampled", *_STEPS],
    "sam": ["strategy=[er,sam]", "updates_per_batch=2", *_PREQUENTIAL, *_STEPS],
    "pcgrad": ["strategy=[er,pcgrad]", "strategy.pcgrad.rule=gradvac", *_PREQUENTIAL, *_STEPS],
    "cbp": ["strategy=[er,cbp]", "strategy.cbp.rate=0.1", "strategy.cbp.maturity=3", "instrument=dormant", *_STEPS],
    "si": ["strategy=si", "optimizer.momentum=0.9", *_STEPS],
    "rwalk": ["strategy=rwalk", "strategy.rwalk.interval=5", "optimizer.momentum=0.9", *_STEPS],
    "mas": ["strategy=mas", "optimizer=adam", *_STEPS],
    "packnet": ["strategy=packnet", "scenario=task", "optimizer.momentum=0.9", *_STEPS],
    "hat": ["strategy=hat", "scenario=task", *_STEPS],
    "supsup": ["strategy=supsup", "strategy.supsup.density=0.3", *_STEPS],
    "dualprompt": ["strategy=dualprompt", *_IMAGES, *_VIT, *_DUAL, *_STEPS],
    "coda_prompt": ["strategy=coda_prompt", "strategy.coda_prompt.num_components=6", _CODA, *_IMAGES, *_VIT, *_STEPS],
    "s_prompts": ["strategy=s_prompts", "scenario=domain", *_IMAGES, *_VIT, *_STEPS],
    "pgp": ["strategy=[l2p,pgp]", *_IMAGES, *_VIT, "strategy.l2p.length=2", *_STEPS],
    "multilane": ["strategy=multilane", "strategy.multilane.blocks=[0]", *_IMAGES, *_VIT, *_STEPS],
    "lora": ["strategy=lora", "strategy.lora.rank=2", "strategy.lora.init=null_space", *_STEPS],
    "o_lora": ["strategy=o_lora", "strategy.o_lora.rank=2", "optimizer.momentum=0.9", *_STEPS],
    "inflora": ["strategy=inflora", "strategy.inflora.rank=2", *_STEPS],
    "sd_lora": ["strategy=sd_lora", "strategy.sd_lora.rank=2", "optimizer=adam", *_STEPS],
    "ease": ["strategy=ease", "strategy.ease.width=2", *_IMAGES, *_VIT, *_STEPS],
    "scalearn": ["strategy=scalearn", "strategy.scalearn.width=2", "scenario=task", "optimizer=adam", *_STEPS],
    "lst": ["strategy=lst", "strategy.lst.width=4", *_IMAGES, *_VIT, *_STEPS],
    "aper": ["strategy=aper", "strategy.aper.width=2", "optimizer.momentum=0.9", *_STEPS],
    "slca": ["strategy=slca", "strategy.slca.per_class=8", "optimizer=adam", *_STEPS],
    "lingocl": ["strategy=[lingocl,er]", "strategy.er.memory_size=20", "optimizer.momentum=0.9", *_STEPS],
    "zscl": ["strategy=zscl", "strategy.zscl.eta=5", "strategy.zscl.every=3", "optimizer.momentum=0.9", *_STEPS],
    "ranpac": ["strategy=ranpac", "strategy.ranpac.num_projections=20", "strategy.ranpac.adapt=true", *_STEPS],
    "slda": ["strategy=slda", *_STEPS],
    "fecam": ["strategy=fecam", *_STEPS],
    "knn": ["strategy=knn", "strategy.knn.float16=true", *_STEPS],
    "acil": ["strategy=acil", "strategy.acil.num_expanded=20", *_STEPS],
}
_OTHERS = ("python", "own")
_WANDB = ["logger=[csv,wandb]", "+logger.wandb.mode=offline", "log_every=1"]
_KINDS = ("SIGKILL", "SIGKILL", "write", "write", "write", "SIGTERM", "SIGUSR1", "SIGINT", "full disk")


class Case:
    """A run that is killed, beside the one that is not."""

    kinds: tuple[str, ...] = _KINDS

    def __init__(self, name: str, folder: Path, draw: random.Random, cold: bool = False, wandb: bool = False) -> None:
        self.name, self.draw, self.cold = name, draw, cold
        self.kinds = self.kinds[:1] + _KINDS[5:8] if cold else self.kinds
        self.command = self.make_command([*COMMON, *(_WANDB if wandb else [])])
        self.folder = folder / name.replace(" ", "_").replace(",", "")
        self.whole = self.make_place("whole")
        attempt = Attempt(self.whole, self.command, at=None if cold else 0, cold=cold)
        status = attempt.wait()
        if status != 0:
            raise SystemExit(f"{name}: the run that nobody stops ends with {status}:\n{attempt.log.read_text()}")
        self.seconds = time.monotonic() - attempt.began
        self.instants = 0 if cold else int(attempt.note.read_text())
        sizes = [file.stat().st_size for file in (self.whole / "out").rglob("*") if file.is_file()]
        self.largest = max(sizes)

    def make_command(self, common: list[str]) -> Command:
        """Return what is run."""
        case = CASES[self.name]
        chosen = {part.partition("=")[0] for part in case}  # groups with other options than the common ones
        return [part for part in [*common, *MLP] if part.partition(".")[0] not in chosen] + case

    def make_place(self, name: str) -> Path:
        """Return a new folder that the run begins in."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def play(self, kills: int) -> tuple[Counter[str], list[str]]:
        """Kill a fresh run up to so many times; return the kills by kind, and what went wrong."""
        place = self.make_place("killed")
        found: Counter[str] = Counter()
        kind = ""
        while found.total() < kills:
            kind = self.draw.choice(self.kinds)
            done, wrong = self._once(place, kind, found)
            if wrong:
                return found, [f"{self.name}, {kind}: {wrong}"]
            if done:
                break
        else:
            attempt = Attempt(place, self.next_command(place), cold=self.cold)
            if attempt.wait() != 0:
                return found, [f"{self.name}: did not go on after {dict(found)}:\n{attempt.log.read_text()}"]
        wrong = [f"{self.name}, after {dict(found)}: {text}" for text in differences(self.whole, place)]
        return found, wrong + [f"its last attempt ({kind}) said:\n{(place / 'log.txt').read_text()}"] * bool(wrong)

    def next_command(self, place: Path) -> Command:
        """Return how the run goes on."""
        begun = (place / "out" / "config.yaml").exists()
        return ["resume=out"] if begun and self.draw.random() < 0.5 else self.command

    def _once(self, place: Path, kind: str, found: Counter[str]) -> tuple[bool, str]:
        """Attempt once; return whether the run has finished, and what went wrong."""
        at = self.draw.randrange(1, self.instants + 1) if kind == "write" else None
        limit = int(self.largest * self.draw.random()) if kind == "full disk" else None
        random.seed(self.draw.random())
        attempt = Attempt(place, self.next_command(place), at, limit, self.cold)
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
        dropped = "Exception ignored in" in text  # by Python, in a finalizer: the run stops a little later
        if status not in expected or ("Traceback" in text and not dropped):
            return False, f"ended with {status}:\n{text}"
        if status == 0 and "keeps every point. To log" in text:  # no room for W&B; what to do is told
            (place / "out" / "result.json").unlink()
            found[f"{kind}: W&B's file"] += 1
            return False, ""
        if status == 0:
            return True, ""
        found[f"write: {attempt.note.read_text()}" if kind == "write" else kind] += 1
        return False, ""


class FromPython(Case):
    """A script, which says what comes from the file system or the keyboard as Python does."""

    kinds = ("SIGKILL", "SIGKILL", "write", "write", "SIGTERM", "SIGUSR1")

    def make_command(self, common: list[str]) -> Command:
        """Return the function that a script would call."""
        return from_python

    def next_command(self, place: Path) -> Command:
        """Return the same: a script has no other way to go on."""
        return self.command


class Own(Case):
    """Data and code of the user's, which change between two sessions."""

    def make_command(self, common: list[str]) -> Command:
        """Return a command without the data set of the others."""
        shared = [part for part in common if not part.startswith("dataset")]
        return [*shared, *MLP, *OWN, *_STEPS]

    def make_place(self, name: str) -> Path:
        """Return a folder with the data and the code."""
        place = super().make_place(name)
        write_own(place)
        return place

    def play(self, kills: int) -> tuple[Counter[str], list[str]]:
        """Kill as ever, and end one of the runs with what was changed."""
        found, wrong = super().play(kills)
        return found, wrong or self._allow()

    def next_command(self, place: Path) -> Command:
        """Change something half of the time, and see that it is refused."""
        if any((place / "out" / "checkpoints").glob("*.ckpt")) and self.draw.random() < 0.5:
            name = self.draw.choice(list(CHANGES))
            before = _content(place / "out")
            CHANGES[name](place)
            said = self._said(place, self.command, 1)
            if "with other data or code" not in said or "Traceback" in said or said.count("\n") > 1:
                raise SystemExit(f"own: other {name} ends with:\n{said}")
            after = _content(place / "out")
            changed = [file for file in before.keys() | after.keys() if before.get(file) != after.get(file)]
            if changed:
                raise SystemExit(f"own: other {name} is refused, and of the run have changed: {sorted(changed)}")
            write_own(place)
        return super().next_command(place)

    def _allow(self) -> list[str]:
        place, name = self.make_place("allowed"), self.draw.choice(list(CHANGES))
        attempt = Attempt(place, self.command, at="after_task_001")
        if attempt.wait() != -signal.SIGKILL:
            return [f"own: not killed:\n{attempt.log.read_text()}"]
        CHANGES[name](place)
        self._said(place, [*self.command, "allow_changed=true"], 0)
        told = "Changed between two sessions" in (place / "out" / "transfer.json").read_text()
        return [] if told else [f"own: other {name} is allowed, and not told beside the numbers"]

    def _said(self, place: Path, command: Command, status: int) -> str:
        attempt = Attempt(place, command)
        found = attempt.wait()
        text = attempt.log.read_text()
        if found != status:
            raise SystemExit(f"own: ended with {found} instead of {status}:\n{text}")
        return text


def _content(folder: Path) -> dict[str, bytes]:
    """Return what files hold, but for the logs of W&B's own process, which outlives ours for a moment."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.parent.name != "logs")
    return {str(file): file.read_bytes() for file in files}


# ---- all of it ------------------------------------------------------------------------------------------------------


def play(
    kills: int, names: list[str], seed: int, cold: bool = False, wandb: bool = False, at_once: int = 6
) -> tuple[Counter[str], list[str]]:
    """Kill runs of every case until there are so many kills; return them by kind, and what went wrong."""
    draw = random.Random(seed)
    found: Counter[str] = Counter()
    wrong: list[str] = []
    runs = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = folder  # where W&B leaves what a killed process began
        own: dict[str, type[Case]] = {"python": FromPython, "own": Own}
        cases = [own.get(name, Case)(name, Path(folder), draw, cold, wandb) for name in names]
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
    every = ",".join([*CASES, *_OTHERS]).replace("ewc, lwf", "ewc lwf")
    parser.add_argument("--only", default=every, help="names of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--wandb", action="store_true")
    options = parser.parse_args()
    names = options.only.replace(",python", "").replace(",own", "") if options.cold else options.only
    known = {name.replace(",", ""): name for name in [*CASES, *_OTHERS]}
    if not options.cold:
        warm()
    if options.wandb:
        warm_wandb()
    chosen = [known[name] for name in names.split(",")]
    _, wrong = play(options.kills, chosen, options.seed, options.cold, options.wandb)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
