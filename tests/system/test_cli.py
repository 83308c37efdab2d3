"""The command line: what a run leaves, resuming in its directory, and bad input in one sentence."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from cl.app import explain
from cl.app.cli import main
from cl.files import alone
from cl.trainer.failures import cause

pytestmark = pytest.mark.xdist_group(__name__)  # one worker makes what all of these look at
SMALL = ["epochs=1", "stream.num_tasks=2", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def done(cl_run, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    place = tmp_path_factory.mktemp("run")
    result = cl_run("hydra.run.dir=out", "strategy=[er,gpm,lwf]", *SMALL, cwd=place)
    assert result.returncode == 0, result.stdout + result.stderr
    return result, place / "out"


def test_what_a_run_leaves(done):
    result, out = done
    left = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    expected = {"config.yaml", "transfer.csv", "transfer.json", "transfer.png", "manifest.json"}
    assert expected | {f"checkpoints/after_task_{k:03d}.ckpt" for k in range(3)} <= left
    assert str(Path("out") / "transfer.png") in result.stdout.replace("\n", "") or "transfer.png" in result.stdout
    assert not [name for name in left if name.endswith(".tmp")]


def test_files_and_checkpoint_agree(done):
    _, out = done
    state = torch.load(out / "checkpoints" / "after_task_002.ckpt", weights_only=True)["state_dict"]
    with (out / "transfer.csv").open() as file:
        for row in csv.DictReader(file):
            task = int(row["task"]) - 1
            kept = "calibration" if row["metric"] == "ece" else "matrices"
            value = float(state[f"{kept}.{row['mask']}.R"][int(row["after_task"]), task])
            assert float(row["value"]) == pytest.approx(value, abs=1e-6)
    scalars = json.loads((out / "transfer.json").read_text())
    R = state["matrices.class.R"]
    assert json.dumps(scalars).count("average_accuracy") >= 2
    assert float(R[2].mean()) == pytest.approx(_find(scalars, "class", "average_accuracy"), abs=1e-6)


def _find(tree, mask: str, name: str) -> float:
    node = tree.get("masks", tree)[mask]
    node = node.get("scalars", node)
    return node[name]["value"]


@pytest.mark.parametrize("place", ["out", "moved"])
def test_the_same_configuration_continues_and_another_is_refused(cl_run, done, place):
    _, out = done
    if place == "moved":
        shutil.copytree(out, out.parent / "moved")
    last = out.parent / place / "checkpoints" / "after_task_002.ckpt"
    old = torch.load(last, weights_only=True)
    last.unlink()
    (last.parents[1] / "result.json").unlink()
    same = cl_run(f"hydra.run.dir={place}", "strategy=[er,gpm,lwf]", *SMALL, cwd=out.parent)
    assert same.returncode == 0, same.stderr
    new = torch.load(last, weights_only=True)
    for key, value in old["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, new["state_dict"][key]), key
    other = cl_run(f"hydra.run.dir={place}", "strategy=[er,gpm,lwf]", *SMALL, "seed=3", cwd=out.parent)
    assert other.returncode != 0
    assert "another configuration" in other.stderr and "seed: 0 there, 3 here" in other.stderr


def test_a_finished_run_keeps_its_configuration_without_its_checkpoints(cl_run, done):
    _, out = done
    bare = out.parent / "bare"
    shutil.copytree(out, bare, ignore=shutil.ignore_patterns("checkpoints"))
    before = {p.name: p.read_bytes() for p in bare.iterdir() if p.is_file()}
    other = cl_run("hydra.run.dir=bare", "strategy=[er,gpm,lwf]", *SMALL, "seed=3", cwd=out.parent)
    assert other.returncode != 0 and "seed: 0 there, 3 here" in other.stderr
    assert {p.name: p.read_bytes() for p in bare.iterdir() if p.is_file()} == before


def test_two_processes_do_not_run_in_one_directory(cl_run, tmp_path):
    (tmp_path / "out").mkdir()
    with alone(tmp_path / "out"):
        second = cl_run("hydra.run.dir=out", *SMALL, cwd=tmp_path)
    assert second.returncode != 0 and "Another process runs in" in second.stderr
    assert "Traceback" not in second.stderr and not (tmp_path / "out" / "config.yaml").exists()
    third = cl_run("hydra.run.dir=out", *SMALL, cwd=tmp_path)
    assert third.returncode == 0, third.stderr


def test_a_single_row_for_batch_norm_is_one_sentence():
    with pytest.raises(ValueError, match="more than 1 value") as raised:
        torch.nn.BatchNorm1d(2)(torch.zeros(1, 2))
    assert "choose another batch_size" in str(cause(raised.value))
    assert cause(ValueError("another")) is None


@pytest.mark.parametrize("key", ["trainer.check_val_every_n_epoch=2"])
def test_a_schedule_of_validation_losses_needs_them_every_epoch(cl_run, tmp_path, key):
    watched = ["scheduler=plateau", "stream.val_fraction=0.1", f"+{key}"]
    result = cl_run(*watched, *SMALL, "hydra.run.dir=out", cwd=tmp_path)
    assert result.returncode != 0 and f"drop {key}" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["strategy=dep"], "no strategy called 'dep': did you mean"),
        (["strategy=[er,gpmm]"], "no strategy called 'gpmm': did you mean 'gpm'"),
        (["stream=splitt"], "no stream called 'splitt': did you mean 'split'"),
        (["epocs=3"], "no key 'epocs' in the configuration: did you mean epochs"),
        (["strategy.er.memory_sise=3"], "did you mean strategy.er.memory_size"),
        (["strategy.ewc.weight=50"], "as ewc is not chosen: add strategy=ewc."),
        (["stream=linear_teachers", "scenario=class"], "is domain-incremental: drop it"),
        (["stream.num_tasks=11"], "num_tasks=11 is more than the 10 classes"),
        (["stream.num_tasks=3"], "do not split evenly"),
        (["strategy=gpm", "optimizer=adam"], "GPM needs plain SGD"),
        (["strategy=gpm", "optimizer.momentum=0.9"], "GPM needs plain SGD"),
        (["strategy=gpm", "optimizer.weight_decay=0.1"], "GPM needs plain SGD"),
        (["strategy=agem", "strategy.agem.memory_size=9"], "memory_size=9 is smaller than the 10 groups"),
        (["strategy=l2p", "backbone=mlp"], "MLP has no embed and encode"),
        (["strategy=[ncm,l2p]", "+strategy.two._target_=cl.strategies.ncm.NCM"], "both define predict"),
        (["backbone=alexnet_gpm"], "8"),
        (["dataset=mnist", "dataset.root=nowhere", "dataset.download=false"], "nowhere"),
        (["optimizer.lr=1e20", "epochs=5"], "task 1 of 5"),
        (["weights=missing.ckpt"], "missing.ckpt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_stops_before_training_with_one_sentence(arguments, sentence, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cl-run", "hydra.run.dir=out", "trainer.accelerator=cpu", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    GlobalHydra.instance().clear()
    message = str(stop.value.code)
    assert sentence in message
    assert "\n" not in message
    assert "Traceback" not in capfd.readouterr().err
    assert not list(tmp_path.glob("out/checkpoints/after_task_001.ckpt"))


@pytest.mark.slow
def test_the_sentence_is_all_that_a_shell_shows(cl_run, tmp_path):
    result = cl_run("hydra.run.dir=out", "strategy=gpm", "optimizer=adam", cwd=tmp_path, cold=True)
    assert result.returncode == 1
    assert result.stderr.startswith("GPM needs plain SGD") and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_one_file_can_be_made_of_several_runs(cl_run, tmp_path):
    result = cl_run("-m", "strategy=finetune,er", "hydra.sweep.dir=sweep", *SMALL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "sweep").glob("*/transfer.csv"))) == 2


# ------------------------------------------------------------------ references, probes, curves, tuning


@pytest.fixture(scope="module")
def sweep(cl_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sweep")
    asked = ["references=[experts,joint]", "probes=[ridge]", "report.points=3", "strategy=finetune,er", "seed=0,1"]
    result = cl_run("-m", *asked, "hydra.sweep.dir=out", *SMALL, cwd=place)
    assert result.returncode == 0, result.stdout + result.stderr
    return place


@pytest.mark.slow
def test_references_are_trained_once_a_seed(sweep: Path):
    files = sorted((sweep / "runs" / "references").glob("*.json"))
    assert len(files) == 8, "two experts and two joint learners for each of two seeds, whatever the strategies"
    by_seed: dict[int, set[str]] = {}
    for path in (sweep / "out").glob("*/references.json"):
        seed = int("seed=1" in path.parent.name)
        by_seed.setdefault(seed, set()).add(path.read_text())
    assert {seed: len(texts) for seed, texts in by_seed.items()} == {0: 1, 1: 1}
    assert by_seed[0] != by_seed[1]


@pytest.mark.slow
def test_a_sweep_leaves_every_table(sweep: Path):
    for folder in (sweep / "out").glob("*/"):
        tables = {p.name for p in folder.glob("*.csv")}
        assert tables == {"transfer.csv", "learning_curves.csv", "resources.csv", "training.csv"}
        measures = json.loads((folder / "transfer.json").read_text())["measures"]
        assert {"fwt_expert", "intransigence_chaudhry", "rep_bwt", "worst_case_accuracy", "seconds"} <= set(measures)


@pytest.mark.slow
def test_tuning_on_the_first_tasks_then_learning_the_rest(cl_run, tmp_path: Path):
    search = ["hydra/sweeper=tune", "hydra.sweeper.n_trials=2", "protocol=tune_first", "protocol.num_tasks=1"]
    data = ["stream.num_tasks=5", "epochs=1", "report=quiet", "strategy=finetune"]
    tuned = ["optimizer.lr=choice(0.1,1e-9)", "stream.val_fraction=0.2", "hydra.sweep.dir=found"]
    result = cl_run("-m", *search, *tuned, *data, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    result = cl_run(
        "protocol=score_rest", "protocol.num_tasks=1", "protocol.tuned=found", "hydra.run.dir=out", *data, cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert written["num_tasks"] == 4 and written["tuning"]["trials"] == 2
    lr = OmegaConf.load(tmp_path / "found" / "optimization_results.yaml")["best_params"]["optimizer.lr"]
    assert OmegaConf.load(tmp_path / "out" / "config.yaml").optimizer.lr == lr == written["tuning"]["optimizer.lr"]
    assert any("tuning" in note for note in written["notes"])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("probes=[rigde]", "ridge"),
        ("references=[expert]", "experts"),
        ("estimators=[vcy]", "vci"),
        ("report.points=0", "report.points=0"),
        ("protocol=tune_first", "val_fraction"),
    ],
)
def test_a_wrong_instrument_is_one_sentence(cl_run, tmp_path: Path, override: str, named: str):
    result = cl_run(override, "epochs=1", "hydra.run.dir=out", cwd=tmp_path)
    assert result.returncode != 0 and "Traceback" not in result.stderr + result.stdout
    assert named in result.stderr


def test_a_key_of_another_job_of_a_sweep_is_told_as_such(cl_run, tmp_path: Path):
    result = cl_run("-m", "strategy=ewc,er", "strategy.er.memory_size=5", "epochs=1", cwd=tmp_path)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "with this choice of groups" in result.stderr


def test_a_search_without_its_extra_names_the_extra():
    error = MissingConfigException("In 'hydra/sweeper/tune': Could not load 'hydra/sweeper/optuna'", None)
    assert "clsim[tune]" in explain.missing(error)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("+epoch=1", "epochs"),
        ("+lr=0.1", "optimizer.lr"),
        ("+probe=[ridge]", "probes"),
        ("+reference=[experts]", "references"),
        ("+memory_size=10", "strategy.er.memory_size"),
        ("+report.point=10", "report.points"),
        ("+checkpoint.evry=5", "checkpoint.every"),
        ("+logger.csw=3", "logger.csv"),
        ("+callbacks.x=3", ""),
        ("+ckpt_path=x", ""),
        ("+seeed=1", "seed"),
        ("stratgy=gpm", "strategy"),
        ("datset=mnist", "dataset"),
        ("backbon=mlp", "backbone"),
    ],
)
def test_a_key_that_nothing_reads_is_refused_with_the_nearest_before_anything_is_written(
    key, near, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["cl-run", "hydra.run.dir=out", "trainer.accelerator=cpu", key])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = str(stopped.value)
    assert key.lstrip("+").partition("=")[0] in said and (f"did you mean {near}" in said if near else "--help" in said)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".log"]


def test_a_key_that_another_one_reads_is_no_stranger(tmp_path, monkeypatch):
    arguments = ["+width=7", "backbone.hidden=['${width}']", "report=quiet", "logger=none", "stream.num_tasks=2"]
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["cl-run", f"hydra.run.dir={tmp_path}", "epochs=1", *arguments])
    main()
    assert (tmp_path / "result.json").exists()


NET = """
import torch
from torch import nn
from pytorch_lightning import Callback

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layer, self.num_features = nn.Linear(64, width), width
    def forward(self, x):
        return torch.relu(self.layer(x.flatten(1)))

class Bare(nn.Linear):
    def __init__(self):
        super().__init__(64, 8)

class Count(Callback):
    def on_train_start(self, trainer, module):
        with open("counted", "a") as file:
            file.write("x")
"""


def test_a_backbone_and_a_callback_of_ones_own_take_a_line(cl_run, tmp_path):
    (tmp_path / "mine.py").write_text(NET)
    own = ["backbone=custom", "backbone._target_=mine.Net", "+backbone.width=24", "+callbacks.c._target_=mine.Count"]
    result = cl_run(*own, *SMALL, "hydra.run.dir=out", "report=quiet", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "counted").read_text() == "xx"  # a task each
    for arguments, words in {
        ("backbone=custom", "backbone._target_=mine.Bare"): "has no num_features: set self.num_features",
        ("backbone._target_=mine.Net", "+backbone.width=24"): "Begin from backbone=custom",
    }.items():
        result = cl_run(*arguments, *SMALL, "hydra.run.dir=other", cwd=tmp_path)
        assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr


def test_debug_trains_five_minibatches_a_task(cl_run, tmp_path):
    result = cl_run("debug=default", "stream.num_tasks=2", "report=quiet", "hydra.run.dir=out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "out" / "resources.csv").read_text().splitlines()))
    assert [int(row["steps"]) for row in rows] == [5, 5]


QUICK = ["dataset=synthetic", "dataset.num_train=40", "dataset.num_test=20", "dataset.num_classes=4", *SMALL]
QUIET = ["report=quiet", "logger=none"]


def test_a_refused_command_leaves_every_file_of_the_run_as_it_was(cl_run, tmp_path):
    assert cl_run(*QUICK, *QUIET, "hydra.run.dir=out", cwd=tmp_path).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.suffix not in ("", ".log")}
    assert any(path.parent.name == ".hydra" for path in before)
    refused = cl_run(*QUICK, *QUIET, "hydra.run.dir=out", "seed=1", cwd=tmp_path)
    assert refused.returncode == 1 and "another configuration" in refused.stderr
    assert before == {path: path.read_bytes() for path in before}


def test_paths_that_begin_like_the_directory_are_kept_whole(cl_run, tmp_path):
    out = tmp_path / "exp"
    places = [f"hydra.run.dir={out}", f"reference_dir={out}_refs", f"tags=[{out}/inside]"]
    assert cl_run(*QUICK, *QUIET, *places, cwd=tmp_path).returncode == 0
    kept = OmegaConf.load(out / "config.yaml")
    assert kept.reference_dir == f"{out}_refs" and list(kept.tags) == ["./inside"]


@pytest.fixture(scope="module")
def from_files(cl_run, tmp_path_factory):
    """A run on arrays that it was given by relative paths, stopped after its first task."""
    place = tmp_path_factory.mktemp("relative")
    draw = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 20)):
        np.save(place / f"{name}_x.npy", draw.normal(size=(count, 4)).astype(np.float32))
        np.save(place / f"{name}_y.npy", np.arange(count) % 4)
    arrays = [f"stream.{name}={name}.npy" for name in ("train_x", "train_y", "test_x", "test_y")]
    command = ["stream=from_arrays", *arrays, "stream.num_tasks=2", "epochs=1", "trainer.accelerator=cpu", *QUIET]
    done = cl_run(*command, "hydra.run.dir=out", "hydra.job.chdir=true", cwd=place)
    assert done.returncode == 0, done.stderr
    for name in ("result.json", "checkpoints/after_task_002.ckpt"):
        (place / "out" / name).unlink()
    return place, command


def test_relative_paths_are_found_from_elsewhere(cl_run, from_files, tmp_path):
    place, _ = from_files
    done = cl_run(f"resume={place / 'out'}", cwd=tmp_path)
    assert done.returncode == 0 and (place / "out" / "result.json").exists(), done.stderr


@pytest.mark.slow
def test_a_branch_that_has_its_own_checkpoints_needs_its_parent_no_more(cl_run, tmp_path):
    command = [*QUICK, *QUIET, "hydra.run.dir=branch", "from=parent:task=1"]
    assert cl_run(*QUICK, *QUIET, "hydra.run.dir=parent", cwd=tmp_path).returncode == 0
    assert cl_run(*command, cwd=tmp_path).returncode == 0
    (tmp_path / "branch" / "result.json").unlink()
    (tmp_path / "branch" / "checkpoints" / "after_task_002.ckpt").unlink()
    (tmp_path / "parent").rename(tmp_path / "p2")
    done = cl_run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    refused = cl_run(*[*command[:-2], "hydra.run.dir=new", "from=parent:task=1"], cwd=tmp_path)
    assert refused.returncode == 1 and "is no run directory" in refused.stderr
    (tmp_path / "p2" / "config.yaml").write_text("a: [1")
    torn = cl_run(*[*command[:-2], "hydra.run.dir=new", "from=p2:task=1"], cwd=tmp_path)
    assert torn.returncode == 1 and "config.yaml cannot be read" in torn.stderr and "Traceback" not in torn.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "it holds no best_params"),
        ("[]", "it holds no best_params"),
        ("word", "it holds no best_params"),
        ("best_params: 3", "it holds no best_params"),
        ("best_params: {optimizer.lr", "cannot be used"),
        ("best_params: {optimizer.lr: {_target_: torch.load, f: x.pt}}", "best_params.optimizer.lr="),
        ("best_params: {optimizer._target_: found.evil.SGD}", "best_params.optimizer._target_="),
        ("best_params: {weights: x.ckpt}", "best_params.weights="),
        ("best_params: {strategy.er.memory_size: [1]}", "best_params.strategy.er.memory_size="),
        ("best_params: {hydra.run.dir: /tmp}", "best_params.hydra.run.dir="),
        ("best_params: {optimizer: 3}", "optimizer=3, which is a group"),
    ],
)
def test_what_a_search_found_is_values_for_hyperparameters_and_nothing_else(text, words, tmp_path, monkeypatch):
    (tmp_path / "optimization_results.yaml").write_text(text)
    protocol = ["protocol=score_rest", f"protocol.tuned={tmp_path}", "protocol.num_tasks=1", "hydra.run.dir=out"]
    monkeypatch.chdir(tmp_path)
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["cl-run", *QUICK, *protocol])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert words in str(stopped.value)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs a shell with pipes")
def test_a_reader_that_leaves_takes_no_run_with_it(tmp_path):
    command = f"{sys.executable} -u -m cl {' '.join(QUICK)} hydra.run.dir=out"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "result.json").exists() and "The reader of the output has closed it" in done.stderr


MOVING = """
from pathlib import Path
from cl.engine.strategy import Strategy

class Moving(Strategy):
    def after_task(self, learner, task):
        if task.index == 0:
            Path("out").rename("elsewhere")
"""


@pytest.mark.slow
def test_a_directory_that_is_renamed_meanwhile_is_one_sentence_and_goes_on_there(cl_run, tmp_path):
    (tmp_path / "moving.py").write_text(MOVING)
    command = [*QUICK, "strategy=[]", "+strategy.m._target_=moving.Moving"]
    for more in ([], QUIET):
        done = cl_run(*command, *more, "hydra.run.dir=out", cwd=tmp_path)
        assert done.returncode == 1 and "renamed or removed while the run went on" in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
        (tmp_path / "moving.py").write_text(MOVING.replace('rename("elsewhere")', "exists()"))
        gone_on = cl_run(*command, *more, "hydra.run.dir=elsewhere", "allow_changed=true", cwd=tmp_path)
        assert gone_on.returncode == 0, gone_on.stderr
        (tmp_path / "moving.py").write_text(MOVING)
        shutil.rmtree(tmp_path / "elsewhere")
