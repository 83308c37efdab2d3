"""Whatever configuration is written, `cl-run` finishes a run or says one sentence: drawn groups, drawn values.

A case is a list of overrides, and runs as on the command line, in this process. Some overrides mean nothing whatever
else is chosen (`meaningless` says which): a run that finishes with one of them has passed over it in silence, and
fails. More cases by hand, a line of the log for each, failures and all, each with at least one wild override:
`CL_FUZZ=600 CL_FUZZ_SEED=1 CL_FUZZ_LOG=FILE pytest -m slow tests/system/test_fuzz.py -k drawn`; then
`python tests/system/test_fuzz.py FILE` counts what is in such a log.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import pytorch_lightning as pl
import yaml
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from cl.app.cli import main
from cl.trainer.arguments import _IN_EFFECT, INSTEAD

CONF = Path(str(files("cl.conf")))
BY_HAND, LOG = int(os.environ.get("CL_FUZZ", "0")), os.environ.get("CL_FUZZ_LOG")
PATIENCE = 30  # seconds of a case; the longest that are meant to finish take three

# What makes a case small, by group and option.
TINY = {
    "epochs": "1",
    "batch_size": "16",
    "trainer.accelerator": "cpu",
    "log_every": "3",
    "reference_dir": "references",
    "feature_dir": "features",
}
SMALL = {
    "dataset=digits": {"dataset.test_fraction": "0.8", "batch_size": "64"},
    "dataset=synthetic": {"dataset.num_train": "60", "dataset.num_test": "30", "dataset.num_classes": "4"},
    "dataset=synthetic_images": {"dataset.num_train": "60", "dataset.num_test": "30", "dataset.num_classes": "4"},
    "stream=split": {"stream.num_tasks": "2"},
    "stream=overlapping": {"stream.classes": "[[0,1],[1,2]]"},
    "stream=permuted": {"stream.num_tasks": "2"},
    "stream=rotated": {"stream.num_tasks": "2"},
    "stream=corrupted": {"stream.kinds": "[clean,contrast]"},
    "stream=data_incremental": {"stream.num_tasks": "2"},
    "stream=i_blurry": {"stream.num_tasks": "2"},
    "stream=repetition": {"stream.num_tasks": "3", "stream.rows_per_task": "12"},
    "stream=mosaic": {"stream.num_tasks": "2", "stream.num_images": "20", "stream.num_test": "10"},
    "stream=linear_teachers": {
        "stream.num_tasks": "2",
        "stream.rank": "2",
        "stream.dimension": "8",
        "stream.num_rows": "8",
    },
    "stream=transfer_by_design": {"stream.target_rows": "10"},
    "stream=large_first_task": {"stream.first_task": "2"},
    "stream=b0_inc10": {"stream.classes_per_task": "5"},
    "stream=b50_inc10": {"stream.first_task": "4", "stream.classes_per_task": "3"},
    **{f"stream={s}": {"stream.source.num_tasks": "2"} for s in ("long_tailed", "boundary_free", "label_noise")},
    **{
        f"stream={s}": {"stream.source.num_tasks": "2"}
        for s in ("label_scarcity", "revisited", "online", "hidden_labels")
    },
    "stream=domains": {"stream.datasets.first.test_fraction": "0.8", "stream.datasets.second.num_train": "40"},
    "stream=chronological": {
        "stream.datasets.first.test_fraction": "0.8",
        "stream.datasets.third.test_fraction": "0.8",
    },
    "backbone=mlp": {"backbone.hidden": "[8]"},
    "backbone=identity": {},
    "backbone=simple_cnn": {"backbone.channels": "[4]", "backbone.hidden": "8"},
    "backbone=resnet18": {"backbone.width": "4"},
    "backbone=vit": {"backbone.dim": "12", "backbone.depth": "1"},
    "backbone=alexnet_gpm": {"backbone.channels": "[4,4,4]", "backbone.hidden": "8"},
    "strategy=er": {"strategy.er.memory_size": "20"},
    "strategy=derpp": {"strategy.derpp.memory_size": "20"},
    "strategy=er_ace": {"strategy.er_ace.memory_size": "20"},
    "strategy=uer": {"strategy.uer.memory_size": "20"},
    "strategy=der": {"strategy.der.memory_size": "20"},
    "strategy=gdumb": {"strategy.gdumb.memory_size": "20"},
    "strategy=gss": {"strategy.gss.memory_size": "20"},
    "strategy=xder": {"strategy.xder.memory_size": "20", "strategy.xder.num_contrasted": "8"},
    "strategy=mer": {"strategy.mer.memory_size": "20"},
    "strategy=generative_replay": {
        "strategy.generative_replay.iterations": "10",
        "strategy.generative_replay.hidden": "8",
    },
    "strategy=er_las": {"strategy.er_las.memory_size": "20"},
    "strategy=aser": {"strategy.aser.memory_size": "20"},
    "strategy=mir": {"strategy.mir.memory_size": "20", "strategy.mir.num_candidates": "20"},
    "strategy=icarl": {"strategy.icarl.memory_size": "20"},
    "strategy=wa": {"strategy.wa.memory_size": "20"},
    "strategy=bic": {"strategy.bic.memory_size": "20"},
    "strategy=lucir": {"strategy.lucir.memory_size": "20"},
    "strategy=podnet": {"strategy.podnet.memory_size": "20", "strategy.podnet.num_proxies": "2"},
    "strategy=scr": {"strategy.scr.memory_size": "20"},
    "strategy=pcr": {"strategy.pcr.memory_size": "20"},
    "strategy=hpcr": {"strategy.hpcr.memory_size": "20"},
    "strategy=ocm": {"strategy.ocm.memory_size": "20", "strategy.ocm.batch_size": "8"},
    "strategy=onpro": {"strategy.onpro.memory_size": "20", "strategy.onpro.batch_size": "8"},
    "strategy=dvc": {"strategy.dvc.memory_size": "20", "strategy.dvc.num_candidates": "20"},
    "strategy=agem": {"strategy.agem.memory_size": "20", "strategy.agem.batch_size": "8"},
    "strategy=ewc": {"strategy.ewc.num_samples": "10"},
    "strategy=gpm": {"strategy.gpm.num_samples": "20"},
    "strategy=ranpac": {"strategy.ranpac.num_projections": "20"},
    "strategy=lora": {"strategy.lora.rank": "2"},
    "strategy=o_lora": {"strategy.o_lora.rank": "2"},
    "strategy=inflora": {"strategy.inflora.rank": "2"},
    "strategy=sd_lora": {"strategy.sd_lora.rank": "2"},
    "strategy=ease": {"strategy.ease.width": "2"},
    "strategy=scalearn": {"strategy.scalearn.width": "2"},
    "strategy=lst": {"strategy.lst.width": "4"},
    "strategy=aper": {"strategy.aper.width": "2"},
    "strategy=slca": {"strategy.slca.per_class": "8"},
    "strategy=zscl": {"strategy.zscl.eta": "5", "strategy.zscl.every": "3"},
    "strategy=acil": {"strategy.acil.num_expanded": "20"},
    "strategy=pgp": {"strategy.pgp.num_samples": "20"},
    "strategy=l2p": {"strategy.l2p.pool_size": "5"},
}
GROUPS = {
    "dataset": ("synthetic", "synthetic_images", "digits"),
    "stream": tuple(key.partition("=")[2] for key in SMALL if key.startswith("stream=")),
    "scenario": ("class", "task", "domain"),
    "backbone": ("mlp", "identity", "simple_cnn", "resnet18", "vit", "alexnet_gpm"),
    "optimizer": ("sgd", "adam", "adamw"),
    "scheduler": ("constant", "cosine", "multistep", "plateau"),
    "logger": ("csv", "none"),
    "report": ("quiet", "default"),
    "protocol": ("tune_first", "score_rest", "tune_everything"),
    "callbacks": ("model_summary", "early_stopping", "[early_stopping,model_summary]"),
    "debug": ("default", "profiler"),
    "strategy": tuple(sorted(path.stem for path in (CONF / "strategy").glob("*.yaml"))),
}
LISTS = {"probes": ("ridge", "knn", "cka"), "references": ("experts", "joint"), "estimators": ("tmi", "log_me", "ped")}
VALUES = (
    *("-1", "0", "1", "2", "3", "7", "1000000000000", "99999999999999999999999", "0.5", "1.5", "-0.5", "2.0", "1e-12"),
    *("1e30", "nan", "inf", "-inf", "abc", "''", "null", "true", "false", "[]", "[1]", "[0,1]", "[1,-1]", "[0.5,a]"),
    *(
        "[0]",
        "[-1,2]",
        "[1000000000000]",
        "[[1]]",
        "{}",
        "{a:1}",
        "../up",
        "a/b",
        "'1'",
        "shuffled",
        "auto",
        "'${seed}'",
        "'${nowhere}'",
        "???",
    ),
)
NUMBERS = VALUES[:17]
ENDLESS = {("epochs", "1000000000000"), ("strategy.avalanche.epochs", "1000000000000")}  # would take what was asked for
ENDLESS |= {(f"{sign}trainer.devices", number) for sign in ("", "++") for number in ("3", "7")}  # processes that start


def leaves(group: str, option: str) -> dict[str, object]:
    """Return the keys that an option of a group writes, with their values."""
    text = (CONF / group / f"{option}.yaml").read_text()
    prefix = "" if "@package _global_" in text else group

    def walk(tree: object, path: str) -> Iterator[tuple[str, object]]:
        if isinstance(tree, dict) and tree:
            for key, branch in tree.items():
                if key != "defaults":
                    yield from walk(branch, f"{path}.{key}".strip("."))
        elif path:
            yield path, tree

    return dict(walk(OmegaConf.to_container(OmegaConf.create(text)), prefix))


ROOT_KEYS = [
    *(
        "seed",
        "epochs",
        "batch_size",
        "eval_batch_size",
        "chunk_size",
        "gradient_clip",
        "train_mask",
        "checkpoint.keep",
    ),
    *("log_every", "init", "probes", "estimators", "references", "weights", "freeze", "group", "tags", "scenario"),
    *(
        "reference_dir",
        "feature_dir",
        "checkpoint",
        "strategy",
        "dataset",
        "stream",
        "optimizer",
        "trainer",
        "report",
        "head",
        "model",
    ),
    *("optimizer_state", "scheduler_interval", "allow_changed", "deterministic", "callbacks", "debug"),
]
TRAINER = [name for name in inspect.signature(pl.Trainer.__init__).parameters if name != "self"]
UNKNOWN = ("nonsense", "learning_rte", "epoch_s", "n_tasks", "acumulate", "_hidden", "model2")
PLACES = (*("", "", "optimizer", "trainer", "head", "backbone", "stream", "dataset", "strategy.er", "report"),)
PLACES += ("checkpoint", "logger", "callbacks", "protocol", "scheduler", "debug", "hydra", "launcher", "strategy")
MISSPELT = (
    "stratgy",
    "datset",
    "optimiser",
    "streem",
    "backbon",
    "sheduler",
    "experment",
    "callback",
    "debugg",
    "sceanrio",
)
NO_OPTIONS = ("nonsense", "erc", "early_stoping", "defalt")
CHOICES = {
    "optimizer_state": ("reset", "keep"),
    "scheduler_interval": ("epoch", "step"),
    "allow_changed": ("true", "false"),
    "deterministic": ("true", "false"),
}


def strange(draw: random.Random) -> tuple[str, str]:
    """Draw an argument of Trainer, a key that nothing reads, a misspelt group or option, or a choice, and a value."""
    kind = draw.choice(["trainer", "trainer", "unknown", "misspelt", "option", "choice"])
    value = draw.choice(VALUES)
    if kind == "trainer":
        return f"++trainer.{draw.choice(TRAINER)}", value
    if kind == "unknown":
        place, sign = draw.choice(PLACES), draw.choice(["+", "+", "++", ""])
        return sign + f"{place}.{draw.choice(UNKNOWN)}".lstrip("."), value
    if kind == "misspelt":
        return draw.choice(["", "+"]) + draw.choice(MISSPELT), draw.choice(["er", "sgd", "1"])
    if kind == "option":
        return draw.choice(sorted(GROUPS)), draw.choice(NO_OPTIONS)
    return draw.choice(sorted(CHOICES)), draw.choice([value, "reset", "keep", "step", "epoch", "1"])


def meaningless(overrides: list[str]) -> list[str]:
    """Return the overrides that mean nothing, so that a run must not finish without a word about them.

    These are values that are none (`???`), keys that nothing reads, groups and options that are not there, values
    beside the few that a key has, and arguments of Trainer that a run refuses (`cl.trainer.arguments.INSTEAD`) with
    another value than the one that holds anyway. What the same command leaves out (`~report.picture`) does not count.
    """
    removed = tuple(f"{override[1:].partition('=')[0]}." for override in overrides if override.startswith("~"))
    given = dict(override.partition("=")[::2] for override in overrides if "=" in override)
    found = []
    for key, value in given.items():
        name = key.lstrip("+")
        if f"{name}.".startswith(removed):
            continue
        place, _, last = name.rpartition(".")
        parsed = yaml.safe_load(value.replace("'${seed}'", "0")) if value != "???" else value
        holds = any(parsed == one and type(parsed) is type(one) for one in (*_IN_EFFECT.get(last, ()), None))
        if (
            value == "???"
            or (last in UNKNOWN and name not in CHOICES)
            or name in MISSPELT
            or (name in GROUPS and value in NO_OPTIONS)
            or (name in CHOICES and value.strip("'") not in CHOICES[name])
            or (place == "trainer" and last in INSTEAD and not holds)
        ):
            found.append(f"{key}={value}")
    return found


def drawn(draw: random.Random) -> list[str]:
    """Draw overrides: a few groups, made small, and none to three wild values."""
    chosen = {"dataset": "synthetic", "stream": "split", "backbone": "mlp", "strategy": "er", "report": "quiet"}
    for group in draw.sample(sorted(GROUPS), draw.randint(0, 3)):
        chosen[group] = draw.choice(GROUPS[group])
    strategies = [chosen["strategy"]]
    if draw.randint(0, 3) == 0:
        strategies += draw.choices(GROUPS["strategy"], k=draw.randint(0, 2))
    written = {group: option for group, option in chosen.items() if group != "strategy"}
    written["strategy"] = strategies[0] if len(strategies) == 1 else f"[{','.join(strategies)}]"
    written |= TINY
    keys = {**dict.fromkeys(ROOT_KEYS), **leaves("trainer", "default"), **leaves("head", "linear")}
    options = [(g, o) for g, o in chosen.items() if g != "strategy"] + [("strategy", s) for s in strategies]
    for group, option in options:
        for one in option.strip("[]").split(","):
            keys |= leaves(group, one)
        if not (group == "dataset" and chosen["stream"] in ("linear_teachers", "domains", "chronological")):
            written |= SMALL.get(f"{group}={option}", {})
    for name, known in LISTS.items():
        if draw.randint(0, 7) == 0:
            written[name] = f"[{','.join(draw.choices(known, k=draw.randint(0, 2)))}]"
    for _ in range(draw.choice([1, 1, 2, 3] if BY_HAND else [0, 0, 1, 1, 2, 3])):
        if draw.randint(0, 1):
            key, value = strange(draw)
            written |= {key: value} if (key, value) not in ENDLESS else {}
            continue
        key = draw.choice(sorted(keys))
        alike = NUMBERS if isinstance(keys[key], int | float | None) else VALUES
        value = draw.choice(draw.choice([alike, alike, VALUES]))
        if (key, value) not in ENDLESS:
            written[key] = value
    pictures = chosen["report"] != "null" and draw.randint(0, 7) > 0  # which take half of the time
    without = ["~report.picture", "~report.curves"] if pictures and written.get("report") != "null" else []
    return [*(f"{key}={value}" for key, value in written.items()), *without]


class Hang(Exception):
    """A case took too long."""


def outcome(overrides: list[str], folder: Path) -> str:
    """Run `cl-run` with overrides: "" where it finished, else its sentence.

    Raises:
        Exception: Whatever else came out, which is a failure.
    """

    def late(*_: object) -> None:
        raise Hang(f"longer than {PATIENCE} s")

    handlers, level, argv, here = logging.root.handlers[:], logging.root.level, sys.argv, Path.cwd()
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    enabled = [one for one in loggers if not one.disabled]
    sys.argv = ["cl-run", "hydra.run.dir=out", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled", *overrides]
    os.chdir(folder)
    before, mode = signal.signal(signal.SIGALRM, late), Hydra.get_mode
    Hydra.get_mode = lambda *_, **__: RunMode.RUN  # which composes everything once more to find that
    signal.alarm(PATIENCE)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            main()
        return ""
    except SystemExit as stop:
        assert isinstance(stop.code, str), f"exit code {stop.code}"
        return stop.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.argv, Hydra.get_mode = argv, mode
        os.chdir(here)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        for one in enabled:  # Hydra's configuration of logging disables those that are there already
            one.disabled = False
        GlobalHydra.instance().clear()


def check_sentence(said: str) -> None:
    """A sentence is one line that a person can read."""
    assert "\n" not in said and "Traceback" not in said and " object at 0x" not in said, said
    assert len(said) < 1000, said
    assert said.rstrip()[-1:] in ".)?", said


def examine(overrides: list[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        try:
            said = outcome(overrides, folder)
        except Exception as error:
            raise AssertionError(f"{overrides} ended with {error!r}") from error
        if said:
            check_sentence(said)
        assert said or not meaningless(overrides), f"passed over in silence: {meaningless(overrides)}"
        strangers = {path.name for path in folder.iterdir()} - {"out", "references"}
        assert not strangers, f"files outside of the run directory: {strangers}"
    finally:
        shutil.rmtree(folder)


def logged(overrides: list[str]) -> None:
    """Keep the outcome of a case, and go on."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    record: dict[str, object] = {"case": overrides}
    try:
        said = outcome(overrides, folder)
        record["said"] = said
        record["strangers"] = sorted({path.name for path in folder.iterdir()} - {"out", "references"})
        if said:
            check_sentence(said)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}:{f.name}" for f in reversed(frames))
        record |= {"error": f"{type(error).__name__}: {str(error)[:300]}", "where": where}
    finally:
        shutil.rmtree(folder)
    with Path(str(LOG)).open("a") as file:
        file.write(json.dumps(record) + "\n")


@pytest.mark.slow
def test_drawn_configurations_are_runs_or_sentences() -> None:
    draw = random.Random(int(os.environ.get("CL_FUZZ_SEED", "0")))
    for _ in range(BY_HAND or 30):
        (logged if LOG else examine)(drawn(draw))


# ------------------------------------------------------------------ each cause that was found, and what is asked for

FAST = (
    *("dataset=synthetic", "report=quiet", "epochs=1", "batch_size=16", "trainer.accelerator=cpu", "log_every=3"),
    *("dataset.num_train=60", "dataset.num_test=30", "dataset.num_classes=4", "stream.num_tasks=2"),
    *("backbone.hidden=[8]", "~report.picture", "~report.curves"),
)
HUGE = "1000000000000"


def example(overrides: str, tmp_path: Path) -> str:
    """Return the sentence on a few overrides of a small run."""
    given = overrides.split()
    keys = {override.partition("=")[0] for override in given}
    return outcome([*(o for o in FAST if o.partition("=")[0] not in keys), *given], tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        "epochs=0",
        "batch_size=1000000000",
        f"eval_batch_size={HUGE} chunk_size={HUGE} log_every={HUGE}",
        "report.points=1000000000",
        "strategy=[er,er]",
        "~scheduler ~logger",
        "optimizer.lr=0",
        "strategy.er.batch_size=1000000000",
    ],
)
def test_what_makes_sense_runs(overrides: str, tmp_path: Path) -> None:
    assert example(overrides, tmp_path) == ""


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("epochs=abc", "epochs='abc' must be a whole number."),
        ("epochs=-1", "epochs=-1 must be 0 or more."),
        ("epochs=true", "epochs=true must be a whole number."),
        ("seed=-1", "seed=-1 must be 0 or more."),
        ("seed=1.5", "seed=1.5 must be a whole number."),
        ("seed=99999999999999999999999", "must be a whole number"),
        ("dataset.seed=-1", "seed=-1 must be 0 or more."),
        ("batch_size=2.5", "batch_size=2.5 must be a whole number."),
        ("batch_size=null", "batch_size=null must be a whole number."),
        ("log_every=0", "log_every=0 must be 1 or more."),
        ("gradient_clip=0", "gradient_clip=0 must be above 0."),
        ("optimizer.lr=-1", "optimizer cannot be built (Invalid learning rate: -1)"),
        ("optimizer.lr=nan", "optimizer.lr=nan must be a number."),
        ("optimizer=adam optimizer.betas=[0.9]", "optimizer.betas=[0.9] must be a list of 2 numbers."),
        ("optimizer._partial_=false", "optimizer._partial_ must be true"),
        ("~trainer._partial_", "trainer._partial_ must be true"),
        ("~head._partial_", "head._partial_ must be true"),
        ("protocol=tune_everything +protocol.foo=1", "Nothing reads the key 'protocol.foo'"),
        ("optimizer._partial_=2", "optimizer._partial_=2 must be true or false."),
        ("optimizer._target_=torch.nn.ReLU", "no argument of optimizer called 'lr'"),
        ("stream.num_tasks=0", "num_tasks=0 must be 1 or more."),
        ("stream.num_tasks=1000", "more than the 4 classes"),
        (f"stream=permuted stream.num_tasks={HUGE}", "must be between 1 and 10000"),
        (f"stream=repetition stream.num_tasks={HUGE}", "must be between 1 and 10000"),
        ("dataset=null", "cannot be composed"),
        ("strategy=null", "~group leaves it out"),
        ("strategy=1", "a group takes names"),
        ("~head", "There is no head"),
        ("strategy.er=5", "strategy.er=5 must be a mapping"),
        ("trainer.devices=0", "trainer cannot be built"),
        ("trainer.precision=foo", "trainer.precision='foo' must be 64"),
        ("trainer.accelerator=warp", "trainer cannot be built (You selected an invalid accelerator name"),
        ("epocs=3", "did you mean epochs"),
        ("+strategy.er.memroy=3", "no argument of strategy.er called 'memroy': did you mean 'memory_size'?"),
        ("+strategy.mine._target_=no.such.Thing", "strategy.mine cannot be built"),
        ("+strategy.mine._target_=torch.nn.ReLU", "gives ReLU, which is no Strategy"),
        ("strategy.er._target_=abc", "strategy.er cannot be built"),
        ("strategy.er._target_=5", "strategy.er._target_=5 must be text"),
        ("+strategy.keys._target_=cl.strategies.finetune.Finetune", "A strategy cannot be called 'keys'"),
        (f"strategy.er.memory_size={HUGE}", "takes 8e+04 GB"),
        (f"backbone.hidden=[{HUGE}]", "backbone takes more memory than there is"),
        (f"dataset.num_train={HUGE}", "stream.dataset takes more memory than there is"),
        ("dataset.input_shape=[-1]", "dataset.input_shape=[-1] must be 1 or more."),
        ("+dataset.name=3", "no argument of dataset called 'name'"),
        ("tags='${nowhere}'", "tags: Interpolation key 'nowhere' not found"),
        ("report.columns=0", "columns=0 of R are unknown"),
        ("report.every=0", "report.every=0 must be 1 or more"),
        ("checkpoint.keep=0", "checkpoint.keep=0"),
        ("checkpoint.keep=x", "checkpoint.keep='x' must be a whole number or auto or null."),
        ("scheduler=plateau", "set stream.val_fraction"),
        ("scheduler=cosine scheduler.T_max=0", "Optimizer and scheduler cannot step"),
        ("strategy=[ncm,ewc]", "all are frozen"),
        ("strategy=[ewc,lora]", "put EWC last"),
        ("strategy=ewc strategy.ewc.weight=-1", "ewc.weight=-1 must be 0 or more."),
        ("reference_dir=/dev/null/x references=[experts]", "reference_dir=/dev/null/x cannot be made"),
        ("callbacks=early_stopping", "EarlyStopping watches val/loss, but a task has no validation set"),
        (
            "callbacks=early_stopping callbacks.early_stopping.monitor=foo stream.val_fraction=0.2",
            "EarlyStopping watches foo, which nothing measures",
        ),
        ("checkpoint=7", "checkpoint=7 must be a mapping"),
        ("checkpoint=[1]", "checkpoint=[1] cannot be written over what is there: checkpoint has keys of its own"),
        ("optimizer.lr=???", "optimizer.lr has no default: write optimizer.lr=... on the command line."),
        ("group=???", "group has no default"),
        ("probes=[ridge] report.subset=-1", "report.subset=-1 must be 1 or more."),
        ("report.subset=0", "report.subset=0 must be 1 or more."),
        ("+hydra.nonsense=1", "Nothing reads the key 'hydra.nonsense'"),
        ("+trainer.check_val_every_n_epoch=???", "trainer.check_val_every_n_epoch has no default"),
        ("probes=ridge", "probes='ridge' must be a list of texts."),
    ],
)
def test_a_cause_that_was_found_is_a_sentence(overrides: str, sentence: str, tmp_path: Path) -> None:
    said = example(overrides, tmp_path)
    assert sentence in said
    check_sentence(said)


def count(log: Path) -> None:
    """Print how many cases of a log ran, were told a sentence, failed, or passed over what means nothing."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    failed = [record for record in records if "error" in record]
    passed = [record for record in records if record.get("said") == "" and meaningless(record["case"])]
    silent = passed + [record for record in records if record.get("strangers")]
    ran = sum(record.get("said") == "" for record in records)
    bad = sum(bool(meaningless(record["case"])) for record in records)
    print(
        f"{len(records)} inputs ({bad} with what means nothing): {ran} runs, {len(records) - ran - len(failed)}", end=""
    )
    print(f" sentences, {len(failed)} failures, {len(silent)} silent")
    for record in failed + silent:
        print(json.dumps(record))


@pytest.mark.slow
def test_this_file_as_a_script_counts_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    records = [{"case": [], "said": ""}, {"case": [], "said": "A sentence."}, {"case": [], "error": "A traceback."}]
    log.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    done = subprocess.run([sys.executable, __file__, str(log)], capture_output=True, text=True)
    assert done.stdout.startswith("3 inputs (0 with what means nothing): 1 runs, 1 sentences, 1 failures, 0 silent\n")


if __name__ == "__main__":
    count(Path(sys.argv[1]))
