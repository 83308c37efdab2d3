"""Two processes learn what one does: the same gradients, the union of their memories, one R; all really started."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import two_processes
from checkout import HELPERS
from cl.engine import checkpoint
from cl.errors import InputError
from cl.strategies.er import ER
from cl.strategies.finetune import Finetune
from cl.strategies.lwf import LwF
from cl.testing import ToyBackbone
from cl.trainer import processes
from two_processes import (
    AKIN,
    BATCH,
    CAPACITY,
    EXACT,
    ONE,
    REPLAYED,
    RESUMED,
    ROWS,
    SPIED,
    TARGETS,
    TESTS,
    TWO,
    Normed,
    learn,
    learner,
    stream,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group(__name__)]  # one worker makes what all of these look at


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    learn(learner(ER(CAPACITY), Normed), folder / "one")
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    return processes.run(TWO, two_processes.everything, folder)  # type: ignore[no-any-return]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(*pair) for pair in zip(a, b, strict=True))
    return bool(np.array_equal(a, b, equal_nan=isinstance(a, np.ndarray) and a.dtype.kind == "f"))


@pytest.mark.parametrize("name", EXACT)
def test_a_run_of_two_agrees_with_that_of_one(two: dict[str, Any], name: str) -> None:
    one = learn(learner(EXACT[name]()))
    for key, value in one["weights"].items():
        np.testing.assert_allclose(two[name]["weights"][key], value, rtol=1e-3, atol=1e-4, err_msg=key)
    for mask, R in one["R"].items():
        assert np.abs(two[name]["R"][mask] - R).max() <= 1.001 / TESTS  # a row on the edge may fall to the other side
        np.testing.assert_allclose(two[name]["ece"][mask], one["ece"][mask], atol=2 / TESTS)


@pytest.mark.parametrize("target", TARGETS)
def test_metrics_that_are_no_means_over_rows_are_of_all_predictions(two: dict[str, Any], target: str) -> None:
    one = learn(learner(LwF(), target=target))
    assert one["R"].keys() == two[target]["R"].keys()
    for key, R in one["R"].items():
        tolerance = 1e-3 if target == "regression" else 2 / TESTS
        np.testing.assert_allclose(two[target]["R"][key], R, atol=tolerance, err_msg=key)
        assert same(*(rank["R"][key] for rank in two[target]["ranks"]))


@pytest.mark.parametrize("name", SPIED)
def test_gradients_are_those_of_the_whole_minibatch(two: dict[str, Any], name: str) -> None:
    """Also of a last minibatch of one row, of which one process has none, and of several minibatches a step."""
    one = two_processes.spied(**SPIED[name])
    assert len(one) == len(two["spied"][name]) == 3 * 2 * (2 if name == "accumulated" else -(-ROWS // BATCH))
    for mine, whole in zip(two["spied"][name], one, strict=True):
        np.testing.assert_allclose(mine, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [*EXACT, *REPLAYED, *AKIN, "normed"])
def test_weights_and_R_are_the_same_bits_in_both(two: dict[str, Any], name: str) -> None:
    first, second = two[name]["ranks"]
    tasks = {"ncm": 0, "ranpac": 0, "slda": 0, "fecam": 0, "knn": 0, "acil": 0, "joint": 1, "aper": 1}
    assert len(first["trained"]) == tasks.get(name, 3)
    for key in ("trained", "weights", "R", "ece"):
        assert same(first[key], second[key]), key


@pytest.mark.parametrize("name", ["finetune", *REPLAYED, "normed"])
def test_R_is_a_count_over_the_whole_test_sets(two: dict[str, Any], name: str) -> None:
    """One process counts again with the last weights: TESTS is odd, so padding or dropping rows would show."""
    made = learner(Finetune(), Normed if name == "normed" else ToyBackbone)
    made.trunk().load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in two[name]["weights"].items()})
    made.eval()
    for t, task in enumerate(stream()):
        x, y, _ = task.test.tensors()
        with torch.no_grad():
            right = int((made(made.prepare(x)).argmax(1) == y).sum())
        assert round(float(two[name]["R"]["class"][-1, t]) * TESTS, 4) == right


@pytest.mark.parametrize("name", REPLAYED)
def test_the_union_of_the_memories_has_the_capacity_and_no_row_twice(two: dict[str, Any], name: str) -> None:
    shares = [rank["rows"][0] for rank in two[name]["ranks"]]
    assert [len(share) for share in shares] == [11, 10] and sum(map(len, shares)) == CAPACITY
    rows = [row.tobytes() for share in shares for row in share]
    trained = [row.tobytes() for task in stream() for row in task.train.tensors()[0].numpy()]
    assert len(set(rows)) == CAPACITY and set(rows) <= set(trained)
    assert len(set(trained)) == len(trained)  # else rows of one content would count as twice


def test_what_each_draws_is_its_own(two: dict[str, Any]) -> None:
    for name in REPLAYED:
        first, second = two[name]["ranks"]
        assert first["draws"] != second["draws"] and first["torch"] != second["torch"]


def test_instruments_measure_all_rows(two: dict[str, Any]) -> None:
    one = two_processes.watched(learner(Finetune()))
    for key, values in one.items():
        tolerance = 1e-3 if key == "cka" else 1.001 / TESTS
        np.testing.assert_allclose(two["watched"][key], values, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits_in_both(two: dict[str, Any], name: str) -> None:
    whole, resumed = two["resumed"][name]
    for first, second in zip(whole["ranks"], resumed["ranks"], strict=True):
        assert len(second["trained"]) == 1
        assert same({**first, "trained": first["trained"][-1:]}, second)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("memory", "memory_size=1 leaves some of the 2 processes without a row"),
        ("ring", "memory_size=9 .* one of each in each of 2 processes: set memory_size to 12"),
        ("replay", "er.batch_size=1 leaves some of the 2 processes"),
        ("batch", "batch_size=1 leaves some of the 2 processes"),
        ("avalanche", "Avalanche cannot learn in 2 processes: use trainer=default"),
        ("trainer", "trainer.devices=3: the run has 2 processes"),
        ("nan", "The loss is nan in task 1 of 3, epoch 2, step 10"),
        ("checkpoint", "the memories of 1 processes, and this run has 2: continue it with trainer.devices=1"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(two: dict[str, Any], what: str, words: str) -> None:
    assert re.search(words, two["refused"][what]), two["refused"][what]


def test_one_process_refuses_a_checkpoint_of_two(two: dict[str, Any], folder: Path) -> None:
    path = checkpoint.latest(folder / "few" / "checkpoints")
    assert path is not None
    made = learner(ER(11, batch_size=3), Normed)  # a share, so that its shapes fit
    with pytest.raises(InputError, match=r"memories of 2 processes, and this run has 1: .*trainer.devices=2"):
        checkpoint.load(made, path)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "model_parallel", "xla"])
def test_what_divides_the_weights_is_refused(strategy: str) -> None:
    with pytest.raises(InputError, match=f"trainer.strategy={strategy} divides or wraps .* use trainer=ddp"):
        processes.run(partial(pl.Trainer, accelerator="cpu", devices=2, strategy=strategy), print)


def test_a_trainer_of_two_without_processes_is_refused() -> None:
    with pytest.raises(InputError, match=r"trainer.devices=2: the run has 1 processes"):
        learn(learner(Finetune()), trainer=partial(ONE, devices=2))


# ---- what ends -------------------------------------------------------------------------------------------------------


def test_a_process_that_is_killed_ends_all() -> None:
    with pytest.raises(InputError, match="Process 1 of 2 ended with exit code -9, and the run with it"):
        processes.run(TWO, two_processes.fail, "killed")


# ---- the command -----------------------------------------------------------------------------------------------------


def start(*arguments: str, by: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    options = ["trainer=ddp", "trainer.accelerator=cpu", "epochs=1", "report=quiet", "stream.num_tasks=2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HELPERS)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *by, "-m", "cl", *options], env=environment, **pipes)  # type: ignore[call-overload, no-any-return]


def test_the_command_starts_them_and_one_writes(tmp_path: Path) -> None:
    """By itself, by torchrun, and where one process fails; the first two share their references."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    shared = "strategy=finetune", "references=[experts]", f"reference_dir={tmp_path / 'references'}"
    fails = "strategy=[]", "+strategy.it._target_=two_processes.Fails", "+strategy.it.how=sentence"
    own = start(f"hydra.run.dir={tmp_path / 'own'}", *shared)
    other = start(f"hydra.run.dir={tmp_path / 'torchrun'}", *shared, by=torchrun)
    failing = start(f"hydra.run.dir={tmp_path / 'failing'}", *fails)
    said = [process.communicate(timeout=400)[1] for process in (own, other, failing)]
    assert (own.returncode, other.returncode, failing.returncode) == (0, 0, 1), said
    assert said[2].strip() == "One process does not like this step: take another."
    first, second = ((tmp_path / name / "transfer.csv").read_text() for name in ("own", "torchrun"))
    assert first == second and first.count("\n") == 1 + 3 * 2 * 4
    curves = [(tmp_path / name / "training.csv").read_text() for name in ("own", "torchrun")]
    assert curves[0] == curves[1] and len(set(curves[0].splitlines())) == curves[0].count("\n")
    assert len(list((tmp_path / "references").glob("*.json"))) == 2
