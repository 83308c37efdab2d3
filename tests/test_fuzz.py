"""Whatever configuration is written, `cl-run` finishes a run or says one sentence: drawn groups, drawn values.

A case is a list of overrides, and runs as on the command line, in this process. More of them by hand:
`CL_FUZZ=2000 CL_FUZZ_SEED=1 pytest tests/test_fuzz.py -k drawn`; CL_FUZZ_LOG=FILE goes on after failures and keeps every outcome.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from cl.cli import main

BY_HAND, LOG = int(os.environ.get("CL_FUZZ", "0")), os.environ.get("CL_FUZZ_LOG")
if BY_HAND:  # which composes everything once more
    Hydra.get_mode = lambda *_, **__: RunMode.RUN

CONF = Path(__file__).parent.parent / "conf"
PATIENCE = 30  # seconds of a case; the longest that are meant to finish take three

# What makes a case small, by group and option.
TINY = {
    "epochs": "1",
    "batch_size": "16",
    "trainer.accelerator": "cpu",
    "log_every": "3",
    "reference_dir": "references",
}
SMALL = {
    "dataset=digits": {"dataset.test_fraction": "0.8", "batch_size": "64"},
    "dataset=synthetic": {"dataset.num_train": "60", "dataset.num_test": "30", "dataset.num_classes": "4"},
    "dataset=synthetic_images": {"dataset.num_train": "60", "dataset.num_test": "30", "dataset.num_classes": "4"},
    "stream=split": {"stream.num_tasks": "2"},
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
    **{f"stream={s}": {"stream.source.num_tasks": "2"} for s in ("long_tailed", "boundary_free", "label_noise")},
    **{f"stream={s}": {"stream.source.num_tasks": "2"} for s in ("label_scarcity", "revisited", "online")},
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
    "strategy=agem": {"strategy.agem.memory_size": "20", "strategy.agem.batch_size": "8"},
    "strategy=ewc": {"strategy.ewc.num_samples": "10"},
    "strategy=gpm": {"strategy.gpm.num_samples": "20"},
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
    "strategy": ("er", "finetune", "agem", "cumulative", "derpp", "ewc", "gpm", "joint", "l2p", "lwf", "ncm", "avalanche"),
}  # fmt: skip
LISTS = {"probes": ("ridge", "knn", "cka"), "references": ("experts", "joint"), "estimators": ("tmi", "log_me", "ped")}
KNOWN = {"scenario": None, "protocol": None}  # groups that are none where nothing is drawn

VALUES = (
    *("-1", "0", "1", "2", "3", "7", "1000000000000", "99999999999999999999999", "0.5", "1.5", "-0.5", "2.0", "1e-12"),
    *("1e30", "nan", "inf", "-inf", "abc", "''", "null", "true", "false", "[]", "[1]", "[0,1]", "[1,-1]", "[0.5,a]"),
    *("[[1]]", "{}", "{a:1}", "../up", "a/b", "'1'", "shuffled", "auto", "'${seed}'", "'${nowhere}'", "???"),
)
ENDLESS = {("epochs", "1000000000000"), ("strategy.avalanche.epochs", "1000000000000")}  # would take what was asked for


def leaves(group: str, option: str) -> list[str]:
    """Return the keys that an option of a group writes."""
    text = (CONF / group / f"{option}.yaml").read_text()
    prefix = "" if "@package _global_" in text else group

    def walk(tree: object, path: str) -> Iterator[str]:
        if isinstance(tree, dict) and tree:
            for key, branch in tree.items():
                if key != "defaults":
                    yield from walk(branch, f"{path}.{key}".strip("."))
        elif path:
            yield path

    return list(walk(OmegaConf.to_container(OmegaConf.create(text)), prefix))


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
]


@st.composite
def cases(draw: st.DrawFn) -> list[str]:
    """Draw overrides: a few groups, made small, and none to three wild values."""
    chosen = {"dataset": "synthetic", "stream": "split", "backbone": "mlp", "strategy": "er", "report": "quiet"}
    for group in draw(st.lists(st.sampled_from(sorted(GROUPS)), max_size=4, unique=True)):
        chosen[group] = draw(st.sampled_from(GROUPS[group]))
    strategies = [chosen["strategy"]]
    if draw(st.integers(0, 3)) == 0:
        strategies += draw(st.lists(st.sampled_from(GROUPS["strategy"]), max_size=2))
    written = {group: option for group, option in chosen.items() if group != "strategy"}
    written["strategy"] = strategies[0] if len(strategies) == 1 else f"[{','.join(strategies)}]"
    written |= TINY
    keys = [*ROOT_KEYS, *leaves("trainer", "default"), *leaves("head", "linear")]
    options = [(g, o) for g, o in chosen.items() if g != "strategy"] + [("strategy", s) for s in strategies]
    for group, option in options:
        keys += leaves(group, option)
        if not (group == "dataset" and chosen["stream"] in ("linear_teachers", "domains", "chronological")):
            written |= SMALL.get(f"{group}={option}", {})
    for name, known in LISTS.items():
        if draw(st.integers(0, 7)) == 0:
            written[name] = f"[{','.join(draw(st.lists(st.sampled_from(known), max_size=2)))}]"
    for _ in range(draw(st.integers(0, 3))):
        key, value = draw(st.sampled_from(sorted(set(keys)))), draw(st.sampled_from(VALUES))
        if (key, value) not in ENDLESS:
            written[key] = value
    pictures = chosen["report"] != "null" and draw(st.integers(0, 7)) > 0  # which take half of the time
    without = ["~report.picture", "~report.curves"] if pictures and written.get("report") != "null" else []
    return [*(f"{key}={value}" for key, value in written.items()), *without]


SEEN: set[tuple[str, ...]] = set()


class Hang(Exception):
    """A case took too long."""


def outcome(overrides: list[str], folder: Path) -> str:
    """Run `cl-run` with overrides: "" where it finished, else its sentence.

    Raises:
        Exception: Whatever else came out, which is a failure.
    """

    def late(*_: object) -> None:
        raise Hang(f"longer than {PATIENCE} s")

    handlers, argv, here = logging.root.handlers[:], sys.argv, Path.cwd()
    sys.argv = ["cl-run", "hydra.run.dir=out", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled", *overrides]
    os.chdir(folder)
    before = signal.signal(signal.SIGALRM, late)
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
        sys.argv = argv
        os.chdir(here)
        logging.root.handlers[:] = handlers
        GlobalHydra.instance().clear()


def check_sentence(said: str) -> None:
    """A sentence is one line that a person can read."""
    assert "\n" not in said and "Traceback" not in said and " object at 0x" not in said, said
    assert len(said) < 1000, said
    assert said.rstrip()[-1:] in ".)?", said


def examine(overrides: list[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        said = outcome(overrides, folder)
        if said:
            check_sentence(said)
        strangers = {path.name for path in folder.iterdir()} - {"out", "references"}
        assert not strangers, f"files outside of the run directory: {strangers}"
    finally:
        shutil.rmtree(folder)


def logged(overrides: list[str]) -> None:
    """Keep the outcome of a case that was not drawn before, and go on."""
    if tuple(overrides) in SEEN:
        return
    SEEN.add(tuple(overrides))
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    record: dict[str, object] = {"case": overrides}
    try:
        said = outcome(overrides, folder)
        record["said"] = said
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


@seed(int(os.environ.get("CL_FUZZ_SEED", "0")))
@settings(
    max_examples=BY_HAND or 60,
    derandomize=not BY_HAND,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(cases())
def test_a_drawn_configuration_is_a_run_or_a_sentence(overrides: list[str]) -> None:
    (logged if LOG else examine)(overrides)
