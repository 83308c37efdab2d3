"""The table of settings: who asks it, what a run may change when it goes on, and that nobody keeps a list beside it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from checkout import ROOT
from cl.engine import checkpoint
from cl.settings import SETTINGS, changes, is_path, results, setting


def test_every_key_of_the_configuration_has_a_row_and_every_row_a_key():
    text = files("cl.conf").joinpath("config.yaml").read_text(encoding="utf-8")
    keys = set(yaml.safe_load(text)) - {"defaults", "hydra"}
    groups = {"dataset", "backbone", "head", "optimizer", "scheduler", "trainer", "logger", "callbacks", "report"}
    groups |= {"instrument", "scalar"}
    assert {key.partition(".")[0] for key in SETTINGS} == keys | groups | {"stream", "strategy"}


def test_the_comments_of_the_configuration_are_the_lines_of_help():
    for name, group in {"config": "", "report/default": "report."}.items():
        text = files("cl.conf").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        parent = group
        for line in text.partition("\nhydra:")[0].splitlines():
            found = re.match(r"( *)(\w+):(?: [^#]*?)?(?: # (.*))?$", line)
            if found is None or found.group(1) not in ("", "  "):
                continue
            parent = f"{found.group(2)}." if not found.group(1) and not line.rstrip().endswith("null") else parent
            key = f"{group}{found.group(2)}" if not found.group(1) else f"{parent}{found.group(2)}"
            if key in SETTINGS and found.group(3):
                assert found.group(3) == SETTINGS[key].help, key


def test_nobody_keeps_a_list_of_settings_beside_the_table():
    """A tuple, list, set or dict of four keys that a run's settings have is knowledge that belongs to the table."""
    for path in (ROOT / "cl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name != "settings.py" else ():
            values = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
            said = {part.value for part in values if isinstance(part, ast.Constant)} & SETTINGS.keys()
            own = {key for key in said if SETTINGS[key].type is not None}
            assert len(own) < 4, f"{path}:{node.lineno} lists {sorted(own)}"


flat = st.dictionaries(
    st.sampled_from([*SETTINGS, "optimizer.lr", "stream.dataset.root", "logger.csv.x"]), st.integers()
)


@given(flat, flat)
def test_a_run_goes_on_exactly_where_nothing_differs_that_decides_results_or_is_measured(there, here):
    differs = {key for key in there.keys() | here.keys() if there.get(key) != here.get(key)}
    assert bool(changes(there, here)) == any(setting(key).kind in ("result", "measured") for key in differs)
    rounding = changes(there, here, ["rounding"])
    assert bool(rounding) == any(setting(key).kind == "rounding" for key in differs)


@given(flat, flat)
def test_a_reference_is_the_same_exactly_where_its_results_are(there, here):
    same = results(there, ["method", "start"]) == results(here, ["method", "start"])
    own = [{k: v for k, v in c.items() if setting(k).kind == "result"} for c in (there, here)]
    own = [{k: v for k, v in c.items() if setting(k).part not in ("method", "start")} for c in own]
    assert same == (own[0] == own[1])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("stream.train_x", "a/x.npy", True),
        ("stream.dataset.path", "C:\\data", True),
        ("stream.tasks", ["a/1", "a/2"], True),
        ("stream.tasks", [["a/1"], ["a/2"]], True),
        ("stream.class_order", [1, 2], False),
        ("stream.name", "digits", False),
        ("weights", "a.ckpt", True),
        ("weights", None, False),
        ("backbone.name", "hf_hub:timm/vit", False),
    ],
)
def test_a_path_is_told_from_a_value(key, value, expected):
    assert is_path(key, value) == expected


# ---- a run that goes on ---------------------------------------------------------------------------------------------

STOP = """
import os, signal
from pathlib import Path
from cl.engine.strategy import Strategy

class Stop(Strategy):
    def after_step(self, learner, incoming, stale):
        if learner.task.index == 1 and learner.step == 5 and Path("stop").exists():
            os.kill(os.getpid(), signal.SIGKILL)
"""
RUN = [
    *("stream=from_arrays", "stream.train_x=data/x.npy", "stream.train_y=data/y.npy", "stream.test_x=data/x.npy"),
    *("stream.test_y=data/y.npy", "stream.num_tasks=2", "backbone.hidden=[8]", "epochs=2", "batch_size=5"),
    *("strategy=er", "strategy.er.memory_size=10", "+strategy.stop._target_=stopping.Stop", "checkpoint.every=2"),
    *("chunk_size=1", "references=[experts]", "hydra.run.dir=out", "trainer.accelerator=cpu", "report=quiet"),
]


def last_state(place: Path) -> dict[str, Any]:
    found = checkpoint.latest(place / "checkpoints")
    assert found is not None
    return dict(checkpoint.read(found)["state_dict"])


def the_same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two) or bool((one.nan_to_num(-9.0) == two.nan_to_num(-9.0)).all())
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(the_same(one[key], two[key]) for key in one)
    return bool(one == two)


@pytest.fixture(scope="module")
def killed(cl_run, tmp_path_factory):
    """A folder with a run that was killed inside its second task, `out`, and one that was not, `whole`."""
    place = tmp_path_factory.mktemp("killed")
    (place / "data").mkdir()
    labels = np.repeat(np.arange(4), 12)
    x = np.random.default_rng(0).normal(size=(48, 6)) + 2 * np.eye(4, 6)[labels]
    np.save(place / "data/x.npy", x.astype("float32"))
    np.save(place / "data/y.npy", labels)
    (place / "stopping.py").write_text(STOP)
    done = cl_run(*RUN, cwd=place)
    assert done.returncode == 0, done.stderr
    (place / "out").rename(place / "whole")
    (place / "stop").touch()
    assert cl_run(*RUN, cwd=place).returncode == -signal.SIGKILL
    (place / "stop").unlink()
    assert len(list((place / "out/checkpoints").glob("in_task_002*"))) > 0
    return place


@pytest.fixture
def begun(killed, tmp_path, monkeypatch):
    """A copy of it, to work in."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return last_state(Path("whole"))


def test_a_run_goes_on_to_the_same_bits_when_what_changes_no_result_is_changed(begun, cl_run, tmp_path):
    os.rename("data", "moved")
    moved = [option.replace("=data/", "=moved/") for option in RUN]
    other = [
        *("group=a", "tags=[b]", "log_every=3", "logger=none", "report=default", "eval_batch_size=7"),
        *("chunk_size=3", "checkpoint.keep=1", "reference_dir=elsewhere"),
    ]
    os.rename("runs/references", "elsewhere")
    kept = {path: path.stat().st_mtime_ns for path in Path("elsewhere").glob("*.json")}
    assert len(kept) == 2
    done = cl_run(*moved, *other, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    there = last_state(Path("out"))
    moved_by_rounding = "calibration.class.R"  # sums over evaluation batches
    torch.testing.assert_close(begun[moved_by_rounding], there[moved_by_rounding], equal_nan=True)
    assert [key for key in begun if not the_same(begun[key], there[key])] in ([], [moved_by_rounding])
    assert {path: path.stat().st_mtime_ns for path in Path("elsewhere").glob("*.json")} == kept  # found again
    assert "eval_batch_size: None there, 7 here" in Path("out/transfer.json").read_text()


@pytest.mark.parametrize("option", ["optimizer.lr=0.5", "report.points=2", "seed=1", "callbacks=model_summary"])
def test_a_run_does_not_go_on_when_what_changes_results_is_changed(begun, cl_run, tmp_path, option):
    before = {path: path.read_bytes() for path in Path("out").rglob("*.ckpt")}
    refused = cl_run(*RUN, option, cwd=tmp_path)
    assert (
        refused.returncode == 1 and "another configuration" in refused.stderr and option.split("=")[0] in refused.stderr
    )
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*.ckpt")}


def test_data_that_moved_and_changed_are_refused(begun, cl_run, tmp_path):
    os.rename("data", "moved")
    x = np.load("moved/x.npy")
    x[0, 0] += 1
    np.save("moved/x.npy", x)
    refused = cl_run(*[option.replace("=data/", "=moved/") for option in RUN], cwd=tmp_path)
    assert refused.returncode == 1 and "other data" in refused.stderr


@pytest.mark.slow
def test_weights_that_moved_are_the_same_and_others_are_refused(begun, cl_run, tmp_path):
    weights = sorted(Path("whole/checkpoints").glob("after_task_*.ckpt"))
    Path("one.ckpt").write_bytes(weights[0].read_bytes())
    Path("stop").touch()
    run = [*RUN, "hydra.run.dir=second"]
    assert cl_run(*run, "weights=one.ckpt", cwd=tmp_path).returncode == -signal.SIGKILL
    Path("stop").unlink()
    Path("one.ckpt").rename("two.ckpt")
    Path("one.ckpt").write_bytes(weights[-1].read_bytes())
    refused = cl_run(*run, "weights=one.ckpt", cwd=tmp_path)
    assert refused.returncode == 1 and "content of weights" in refused.stderr
    done = cl_run(*run, "weights=two.ckpt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
