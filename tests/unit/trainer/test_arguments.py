"""Arguments of Lightning's Trainer: each one is passed on, without effect, or refused with what to use."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl

from cl.app.cli import main
from cl.engine.experiment import Experiment
from cl.errors import InputError
from cl.testing import toy_learner
from cl.trainer.arguments import HARMLESS, INSTEAD, PASSED_ON, check_arguments
from cl.trainer.processes import run

cpu = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)

# What cuts or replaces something, with a part of the sentence.
REFUSED = [
    ("limit_test_batches", 1, "limit_test_batches=1: R must be measured"),
    ("limit_test_batches", 7, "limit_test_batches=7: R must be measured"),
    ("limit_test_batches", 0, "limit_test_batches=0: R must be measured"),
    ("limit_test_batches", 0.5, "limit_test_batches=0.5: R must be measured"),
    ("limit_val_batches", 0.5, "limit_val_batches=0.5: R must be measured"),
    ("limit_val_batches", 1, "limit_val_batches=1: R must be measured"),
    ("fast_dev_run", True, "debug=default"),
    ("fast_dev_run", 3, "debug=default"),
    ("overfit_batches", 1, "debug=default"),
    ("overfit_batches", 0.1, "debug=default"),
    ("limit_train_batches", 0, "would train on nothing"),
    ("limit_train_batches", 0.0, "would train on nothing"),
    ("limit_train_batches", -1, "would train on nothing"),
    ("limit_train_batches", 1.5, "would train on nothing"),
    ("accumulate_grad_batches", 0, "makes no step"),
    ("accumulate_grad_batches", -3, "makes no step"),
    ("num_nodes", 2, "torchrun or Slurm"),
    ("max_epochs", 3, "use epochs"),
    ("max_steps", 3, "use epochs"),
    ("max_time", "00:00:01:00", "use epochs"),
    ("min_steps", 3, "trainer.min_epochs"),
    ("gradient_clip_val", 1.0, "use gradient_clip"),
    ("gradient_clip_algorithm", "value", "use gradient_clip"),
    ("val_check_interval", 0.5, "report.every"),
    ("log_every_n_steps", 5, "log_every"),
    ("enable_checkpointing", True, "checkpoint.keep"),
    ("enable_progress_bar", True, "report"),
    ("enable_model_summary", True, "callbacks=model_summary"),
    ("num_sanity_val_steps", 2, "row 0"),
    ("barebones", True, "report=quiet"),
    ("logger", True, "group logger"),
    ("check_val_every_n_epoch", 0, "must be 1 or more epochs"),
]


def test_every_argument_of_the_installed_trainer_has_one_place():
    names = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    places = [PASSED_ON, HARMLESS, frozenset(INSTEAD)]
    assert names <= frozenset().union(*places), f"say what becomes of {names - frozenset().union(*places)}"
    assert sum(map(len, places)) == len(frozenset().union(*places))


@pytest.mark.parametrize(("name", "value", "words"), REFUSED)
def test_what_would_cut_or_replace_is_refused_before_anything_is_written(name, value, words, tmp_path):
    learner, stream = toy_learner(num_tasks=2)
    with pytest.raises(InputError) as told:
        Experiment(learner, stream, partial(cpu, **{name: value}), directory=tmp_path)
    assert f"{name}={value}" in str(told.value) and words in str(told.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("limit_test_batches", 1.0), ("limit_val_batches", 1.0), ("overfit_batches", 0), ("fast_dev_run", False)),
        *(("limit_train_batches", 1), ("accumulate_grad_batches", 1), ("max_steps", -1), ("gradient_clip_val", None)),
        *(("num_nodes", 1), ("enable_progress_bar", False), ("min_epochs", 1)),
    ],
)
def test_what_holds_anyway_may_be_said(name, value):
    check_arguments(partial(pl.Trainer, **{name: value}))


def test_a_factory_that_hides_its_arguments_is_looked_into():
    with pytest.raises(InputError, match="limit_test_batches=7"):
        check_arguments(lambda **options: cpu(limit_test_batches=7, **options))


@pytest.mark.parametrize(("name", "text"), [("LIMIT_TEST_BATCHES", "7"), ("FAST_DEV_RUN", "True"), ("MAX_STEPS", "5")])
def test_lightnings_environment_variables_count_as_arguments(name, text, monkeypatch):
    monkeypatch.setenv(f"PL_TRAINER_{name}", text)
    with pytest.raises(InputError, match=f"environment variable PL_TRAINER_{name}={text}"):
        check_arguments(cpu)


def test_the_start_of_processes_refuses_first():
    with pytest.raises(InputError, match="num_nodes=2"):
        run(partial(cpu, num_nodes=2), print)


def test_a_refused_command_leaves_its_directory_to_the_corrected_one(tmp_path, monkeypatch):
    small = ["dataset=synthetic", "dataset.num_train=40", "dataset.num_test=20", "stream.num_tasks=2", "epochs=1"]
    common = [
        "cl-run",
        f"hydra.run.dir={tmp_path}/out",
        "report=quiet",
        "logger=none",
        "trainer.accelerator=cpu",
        *small,
    ]
    monkeypatch.setattr(sys, "argv", [*common, "+trainer.gradient_clip_val=1"])
    with pytest.raises(SystemExit, match="gradient_clip"):
        main()
    assert not Path(tmp_path, "out", "config.yaml").exists()
    monkeypatch.setattr(sys, "argv", [*common, "gradient_clip=1"])
    main()
    assert Path(tmp_path, "out", "result.json").exists()
