"""The contestants of the benchmarks do the same job; how fast is not tested here."""

from __future__ import annotations

import copy
import functools
import importlib
import json
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import clsim
from benchmarks.__main__ import ratio
from benchmarks.bare import _crop_and_flip
from benchmarks.contestant import CONTESTANTS
from benchmarks.process import measure
from benchmarks.strategies import NAMES, job, whole
from benchmarks.workloads import WORKLOADS, Arrays, _made, _tasks
from cl.engine.experiment import Experiment
from cl.strategies.ewc import EWC

pytestmark = pytest.mark.slow


@functools.cache
def small(name: str, train: int = 600, test: int = 200) -> list[Arrays]:
    x, y, test_x, test_y = _made(WORKLOADS[name])
    return _tasks(WORKLOADS[name], (x[:train], y[:train], test_x[:test], test_y[:test]))


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("name", ["online_mlp", "epoch_mlp"])
def test_every_contestant_takes_the_same_steps_and_learns(name, contestant):
    tasks = small(name)
    workload = replace(WORKLOADS[name], batch_size=10, lr=0.02)
    module, function = CONTESTANTS[contestant]
    torch.manual_seed(0)
    row, steps = getattr(importlib.import_module(module), function)(workload, tasks)
    assert steps == sum(-(-len(y) // 10) for _, y, _, _ in tasks)
    assert len(row) == len(tasks)
    assert row[-1] > 0.5, "the last task was learned: chance is 0.1"


def test_evaluations_of_the_same_weights_agree():
    tasks = small("evaluate")
    rows = []
    for contestant in ("bare", "clsim"):
        module, function = CONTESTANTS[contestant]
        row, steps = getattr(importlib.import_module(module), function)(WORKLOADS["evaluate"], tasks)
        assert steps == 0, "nothing is trained"
        rows.append(row)
    assert rows[0] == pytest.approx(rows[1], abs=0.006), "at most one answer in 200 that rounding decides"


def test_the_bare_loop_crops_and_flips_as_it_says():
    x = torch.arange(1, 2 * 64 + 1, dtype=torch.float32).view(1, 2, 8, 8).repeat(300, 1, 1, 1)
    padded = torch.nn.functional.pad(x[:1], (4, 4, 4, 4))
    crops = [padded[0, :, i : i + 8, j : j + 8] for i in range(9) for j in range(9)]
    known = {tuple(c.flatten().tolist()) for crop in crops for c in (crop, crop.flip(2))}
    torch.manual_seed(0)
    seen = [tuple(one.flatten().tolist()) for one in _crop_and_flip(x)]
    assert set(seen) <= known and len(set(seen)) > 80


def test_a_ratio_is_the_median_over_turns_of_the_ratio_within_a_turn():
    fast, slow = [{"wall": 1.0}, {"wall": 4.0}, {"wall": 2.0}], [{"wall": 2.0}, {"wall": 4.0}, {"wall": 6.0}]
    assert ratio(slow, fast, "wall") == 2.0


def test_a_contestant_that_fails_says_so(capfd):
    with pytest.raises(SystemExit, match=r"(?s)benchmarks.contestant nobody epoch_mlp.*KeyError: 'nobody'"):
        measure(["benchmarks.contestant", "nobody", "epoch_mlp", "", "0"], threads=1)


def test_what_is_measured_comes_back():
    found = measure(["benchmarks.memory", "reservoir", "1000"], threads=1)
    assert json.dumps(found) and found["us"] > 0


@pytest.mark.parametrize("strategies", [{}, {"ewc": EWC(num_samples=20)}])
def test_operations_grow_in_a_straight_line(strategies):
    workload, tasks, counts = WORKLOADS["online_mlp"], small("online_mlp", 2000), []
    for rows in (30, 60, 200):
        stream = clsim.stream(workload, [(x[:rows], y[:rows], v[:50], w[:50]) for x, y, v, w in tasks[:2]])
        learner = clsim.learner(workload, stream, copy.deepcopy(strategies))
        with FlopCounterMode(display=False) as counter:
            Experiment(learner, stream, functools.partial(pl.Trainer, accelerator="cpu"), epochs=1).run()
        counts.append({"operations": counter.get_total_flops(), "rows": 200})
    assert whole(*counts[:2], rows=(30, 60)) == counts[2]["operations"]


@pytest.mark.parametrize("name", NAMES)
def test_no_strategy_refuses_the_stream_that_all_are_timed_on(name):
    learner, stream = job(name, small("online_mlp", 200, 20))
    assert len(stream) == 5 and learner.scenario == stream.scenario
