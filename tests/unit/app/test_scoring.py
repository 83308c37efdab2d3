"""A saved learner is scored again: its own row of R to the bit, on other test sets, with other options at test."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from annotated_types import Ge
from hydra import compose, initialize_config_module
from torch import Tensor

import cl
from cl import rundir
from cl.app import scoring
from cl.app.build import build
from cl.app.resume import expand
from cl.app.scoring import find_checkpoint
from cl.data.sources import digits
from cl.data.stream_checks import same
from cl.errors import InputError
from cl.files import digest_of, write_sealed
from cl.rundir import SCORED, TRANSFER
from cl.testing import toy_stream
from cl.testing.toys import toy_run

FEW = ["stream.num_tasks=2", "stream.classes=[0,1,2,3]", "epochs=1", "trainer.accelerator=cpu", "logger=none"]
FEW += ["report=quiet", "~report.picture", "~report.curves"]
SMALL_VIT = ["backbone.dim=16", "backbone.depth=1", "backbone.heads=2"]
CPU = {"accelerator": "cpu"}
quick = partial(cl.run, progress=False, trainer=CPU, epochs=1)


def composed(*overrides: str) -> Any:
    with initialize_config_module("cl.conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))


def digests(directory: Path) -> dict[str, str]:
    return {str(path): digest_of(path) for path in sorted(directory.rglob("*"))}


class Rolled(cl.Strategy):
    """Predicts the class `shift` places further on."""

    test_options = ("shift",)

    def __init__(self, shift: Annotated[int, Ge(0)] = 0) -> None:
        super().__init__()
        self.shift = shift

    def predict(self, learner: cl.LearnerLike, view: Tensor) -> Tensor:
        return learner(view).roll(self.shift, 1)


# ------------------------------------------------------------------ its own rows


FAMILIES = {
    "er": [],
    "icarl": [],
    "ewc": ["strategy.ewc.num_samples=50"],
    "gpm": ["strategy.gpm.num_samples=50"],
    "l2p": SMALL_VIT,
    "packnet": ["scenario=task"],
    "supsup": ["scenario=task"],
    "ncm": [],
}


@pytest.mark.parametrize(
    "name", [name if name in ("er", "icarl") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_row_of_R_is_found_again_to_the_bit(name: str, tmp_path: Path) -> None:
    done = build(composed(f"strategy={name}", *FAMILIES[name], *FEW), tmp_path / "run").run()
    before = digests(tmp_path / "run")
    loaded = cl.load(tmp_path / "run")
    for task in (None, 0, 1):
        score = loaded.score(task=task)
        row = 2 if task is None else task
        assert score.after_task == row and list(score.rows) == list(done.matrices)
        for mask, matrix in done.matrices.items():
            assert torch.equal(score[mask], matrix.R[row])
            assert torch.equal(score.calibration[mask], done.calibration[mask].R[row])
    assert digests(tmp_path / "run") == before, "nothing is written where it was trained"


@pytest.mark.slow
def test_initial_weights_and_a_protocol_are_those_of_the_run(tmp_path: Path) -> None:
    """The file of the initial weights may be gone; the tasks are those that the protocol left."""
    build(composed(*FEW), tmp_path / "first").run()
    weights = shutil.copy(tmp_path / "first" / "checkpoints" / "after_task_002.ckpt", tmp_path / "weights.ckpt")
    more = [
        *FEW,
        "stream.num_tasks=4",
        "protocol=score_rest",
        "protocol.num_tasks=1",
        "protocol.tuned=null",
        f"weights={weights}",
    ]
    done = build(composed(*more), tmp_path / "run").run()
    Path(weights).unlink()
    score = cl.load(tmp_path / "run").score()
    assert score["class"].shape == (3,) and torch.equal(score["class"], done.primary.R[3])


@pytest.mark.slow
def test_relative_paths_of_the_run_are_found_from_elsewhere(cl_run: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    draw = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 20)):
        np.save(tmp_path / "data" / f"{name}_x.npy", draw.normal(size=(count, 4)).astype(np.float32))
        np.save(tmp_path / "data" / f"{name}_y.npy", np.arange(count) % 4)
    arrays = [f"stream.{name}=data/{name}.npy" for name in ("train_x", "train_y", "test_x", "test_y")]
    command = ["stream=from_arrays", *arrays, "stream.num_tasks=2", "epochs=1", "trainer.accelerator=cpu"]
    done = cl_run(*command, "report=quiet", "~report.picture", "~report.curves", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "elsewhere").mkdir()
    done = cl_run("score=../run", "hydra.run.dir=score", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    cells = list(SCORED.read(tmp_path / "elsewhere" / "score" / SCORED.name))
    assert cells == [cell for cell in TRANSFER.read(tmp_path / "run" / TRANSFER.name) if cell.after_task == 2]
    here = Path.cwd()
    assert torch.equal(cl.load(tmp_path / "run").score()["class"], torch.tensor([c.value for c in cells[:2]]))
    assert Path.cwd() == here


@pytest.fixture(scope="module")
def trained(cl_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    done = cl_run(*FEW, "strategy.er.memory_size=50", "hydra.run.dir=run", cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "run"


def test_the_command_prints_and_writes_the_row(cl_run: Any, trained: Path, tmp_path: Path) -> None:
    """From another folder than the one in which the run was started."""
    before = digests(trained)
    done = cl_run(f"score={trained}:task=1", "hydra.run.dir=score", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert digests(trained) == before
    found = list(SCORED.read(tmp_path / "score" / SCORED.name))
    measured = [cell for cell in TRANSFER.read(trained / TRANSFER.name) if cell.after_task == 1]
    assert found == measured != []
    text = (tmp_path / "score" / SCORED.name).read_text()
    assert set(text.splitlines()) <= set((trained / TRANSFER.name).read_text().splitlines()), "to the last digit"
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "er · split digits, class-incremental, 2 tasks · MLP · 1 epoch · seed 0",
        "scored on split digits: 1: 0+1, 2: 2+3",
    ]
    assert lines[2].startswith("after 1 (class):  ") and lines[-1] == f"files: {tmp_path / 'score'}"
    said = json.loads((tmp_path / "score" / rundir.SCORE).read_text())
    checkpoint = trained / "checkpoints" / "after_task_001.ckpt"
    assert said["run"] == str(trained) and said["checkpoint"] == checkpoint.name and said["own_test_sets"]
    assert said["checkpoint_sha256"] == digest_of(checkpoint)
    stored = json.loads((trained / rundir.PROVENANCE).read_text())["content"]["data"]
    assert said["data"] == {name: value for name, value in stored.items() if name.endswith("test")}
    assert f"score='{trained}:task=1'" in said["command"] and "strategy.er.memory_size=50" in said["command"]
    assert not rundir.is_run(tmp_path / "score"), "it is no run that cl-compare would find"


# ------------------------------------------------------------------ other test sets


@pytest.mark.slow
def test_a_sweep_over_test_sets_makes_a_score_each(cl_run: Any, trained: Path, tmp_path: Path) -> None:
    sets = ["stream.classes=[0,1,2,3],[0,1]", "stream.num_tasks=1"]
    done = cl_run("-m", f"score={trained}", *sets, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = sorted(tmp_path.glob(f"sweep/*/{SCORED.name}"))
    assert len(found) == 2 and all(len(list(SCORED.read(path))) == 4 for path in found)


@pytest.mark.slow
def test_fifteen_corruptions_are_scored_by_one_command(cl_run: Any, tmp_path: Path) -> None:
    quiet = ["trainer.accelerator=cpu", "report=quiet", "~report.picture", "~report.curves", "epochs=1"]
    assert cl_run(*quiet, "hydra.run.dir=run", cwd=tmp_path).returncode == 0
    done = cl_run("score=run", "stream=corrupted", "hydra.run.dir=score", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [cell for cell in SCORED.read(tmp_path / "score" / SCORED.name) if cell.metric == "accuracy"]
    rows = {mask: [cell.value for cell in found if cell.mask == mask] for mask in ("class", "task")}
    assert len(rows["class"]) == 16 and rows["class"] == rows["task"], "each test set has all classes"
    said = json.loads((tmp_path / "score" / rundir.SCORE).read_text())
    assert said["task_names"][:2] == ["clean", "gaussian_noise"] and not said["own_test_sets"]
    assert said["stream_settings"]["stream._target_"] == "cl.streams.corrupted.corrupted"
    own = json.loads((tmp_path / "run" / rundir.SUMMARY).read_text())
    last = [c for c in TRANSFER.read(tmp_path / "run" / TRANSFER.name) if c[0] == 5 and c[2:4] == ("class", "accuracy")]
    weights = torch.tensor(own["test_rows"], dtype=torch.float64)
    pooled = float((torch.tensor([cell.value for cell in last]) * weights).sum() / weights.sum())
    assert rows["class"][0] == pytest.approx(pooled, abs=1e-6), "clean images are those of all its tasks"
    assert max(rows["class"][1:]) < 1 and min(rows["class"]) < rows["class"][0]


def test_another_stream_has_a_column_for_each_of_its_test_sets() -> None:
    """A class-incremental learner on clean and blurred images of all of its classes."""
    data = digits()
    run = quick(cl.streams.split(data, num_tasks=5), [])
    score = run.score(cl.streams.corrupted(data, ["clean", "defocus_blur"]))
    assert score.task_names == ["clean", "defocus_blur"] and score["class"].shape == (2,)
    x, y, _ = cl.streams.corrupted(data, ["clean"])[0].test.tensors()
    learner = run.learner.eval()
    with torch.no_grad():
        right = (learner(learner.prepare(x)).argmax(1) == y).float().mean()
    assert float(score["class"][0]) == pytest.approx(float(right), abs=1e-6)


def test_a_task_incremental_learner_is_told_tasks_by_position(tmp_path: Path) -> None:
    run = quick(toy_stream(3, "task"), cl.strategies.ER(memory_size=8), directory=tmp_path / "run")
    first = toy_stream(2, "task")
    score = run.score(first)
    assert all(torch.equal(score[mask], run.matrices[mask].R[3, :2]) for mask in ("task", "class"))
    swapped = cl.Stream([task for task in first], scenario="task", num_classes=4, order=[1, 0])
    for stream, words in {
        swapped: r"task 1 of the stream has the classes \[2, 3\], where the learner has \[0, 1\] there",
        toy_stream(4, "task"): "it has 8 classes, the learner 6",
        toy_stream(3, "domain"): r"task 2 of the stream has the classes \[0, 1\], where the learner has \[2, 3\] there",
    }.items():
        with pytest.raises(InputError, match=words):
            run.score(stream)


# ------------------------------------------------------------------ options at test


def test_a_test_option_changes_predictions_and_nothing_else() -> None:
    run = quick(toy_stream(2), {"rolled": Rolled()})
    learner = run.learner
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in learner.state_dict().items()}
    task, trainer = learner.task, learner.trainer
    score = run.score(options={"rolled.shift": 1})
    x, y, _ = toy_stream(2)[1].test.tensors()
    with torch.no_grad():
        by_hand = (learner.eval()(learner.prepare(x)).roll(1, 1).argmax(1) == y).float().mean()
    assert score["class"][1] == by_hand and score.options == {"rolled.shift": 1}
    assert not torch.equal(score["class"], run.primary.R[2]), "another prediction"
    assert torch.equal(run.score()["class"], run.primary.R[2]), "the option is as it was"
    assert all(same(before[key], value) for key, value in learner.state_dict().items())
    assert learner.task is task and learner.trainer is trainer


def test_other_settings_than_test_options_are_refused_on_the_command_line(tmp_path: Path) -> None:
    mine = ["strategy=[]", "+strategy.rolled._target_=cl.strategies.finetune.Finetune"]
    run = ["strategy=[er]", *FEW]
    build(composed(*run), tmp_path / "run").run()
    path = find_checkpoint(tmp_path / "run", None)
    for more, sentence in {
        ("strategy.er.memory_size=3",): "strategy.er.memory_size=3 differs from the run: .* of which there are none",
        ("epochs=2",): "epochs=2 differs from the run: a saved learner keeps the settings of its run",
        ("probes=[knn]",): r"probes=\['knn'\] differs from the run",
        tuple(mine): "differs from the run",
    }.items():
        with pytest.raises(InputError, match=sentence):
            scoring._job(composed(*run, *more, f"score={tmp_path}/run"), tmp_path / "score", path)
    assert not (tmp_path / "score").exists()


def test_predictions_by_angles_are_those_of_a_run_that_was_trained_to_predict_so(tmp_path: Path) -> None:
    """`predict_with` of UER acts at test alone: from Python and on the command line, R of the other run."""
    run, angles = ["strategy=uer", *FEW], "strategy.uer.predict_with=cos"
    for name, more in {"products": [], "angles": [angles]}.items():
        build(composed(*run, *more), tmp_path / name).run()
    expected = cl.load(tmp_path / "angles").matrices["class"].R[2]
    loaded = cl.load(tmp_path / "products")
    score = loaded.score(options={"uer.predict_with": "cos"})
    assert torch.equal(score["class"], expected) and not torch.equal(loaded.score()["class"], expected)
    path, asked = find_checkpoint(tmp_path / "products", None), f"score={tmp_path}/products"
    scoring._job(composed(*run, angles, asked), tmp_path / "score", path)
    cells = [c for c in SCORED.read(tmp_path / "score" / SCORED.name) if c[2:4] == ("class", "accuracy")]
    assert torch.equal(torch.tensor([cell.value for cell in cells]), expected)
    assert json.loads((tmp_path / "score" / rundir.SCORE).read_text())["options"] == {"uer.predict_with": "cos"}
    with pytest.raises(InputError, match=r"epochs=2 differs .* those are uer\.predict_with"):
        scoring._job(composed(*run, "epochs=2", asked), tmp_path / "other", path)
    with pytest.raises(InputError, match="kind of logits called 'angle'"):
        loaded.score(options={"uer.predict_with": "angle"})


def test_an_option_that_is_none_is_refused_with_those_there_are() -> None:
    run = quick(toy_stream(2), {"rolled": Rolled()}, epochs=0)
    for options, sentence in {
        ("rolled.speed", 1): "rolled.speed=1 is no test option: .* those are rolled.shift",
        ("shift", 1): "shift=1 is no test option",
        ("rolled.shift", -1): "rolled.shift=-1 must be 0 or more",
        ("rolled.shift", "far"): "rolled.shift='far' must be a whole number",
    }.items():
        with pytest.raises(InputError, match=sentence):
            run.score(options=dict([options]))


# ------------------------------------------------------------------ learners in memory, and runs made from Python


def test_an_earlier_row_of_a_learner_in_memory_leaves_it_as_it_is(tmp_path: Path) -> None:
    run = quick(toy_stream(3), cl.strategies.ER(memory_size=8), directory=tmp_path / "run")
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in run.learner.state_dict().items()}
    for task in range(4):
        assert torch.equal(run.score(task=task)["class"], run.primary.R[task])
    assert all(same(before[key], value) for key, value in run.learner.state_dict().items())
    assert run.learner.tasks_learned == 3


def test_a_run_made_from_python_is_scored_by_a_learner_built_the_same_way(tmp_path: Path) -> None:
    made = quick(toy_stream(2), cl.strategies.ER(memory_size=8), directory=tmp_path / "run")
    before = digests(tmp_path / "run")
    loaded = cl.load(tmp_path / "run")
    with pytest.raises(InputError, match=r"learned from Python objects.*learner=cl.Learner"):
        loaded.score()
    again = quick(toy_stream(2), cl.strategies.ER(memory_size=8), epochs=0).learner
    blank = {key: value.clone() for key, value in again.state_dict().items() if isinstance(value, Tensor)}
    for task in (1, None):
        score = loaded.score(toy_stream(2), task, learner=again)
        assert torch.equal(score["class"], made.primary.R[2 if task is None else task])
    assert all(same(blank[key], again.state_dict()[key]) for key in blank)
    assert digests(tmp_path / "run") == before
    with pytest.raises(InputError, match="give their stream as well"):
        loaded.score(learner=again)
    other = quick(toy_stream(2), cl.strategies.ER(memory_size=9), epochs=0).learner
    with pytest.raises(InputError, match="does not fit this configuration"):
        loaded.score(toy_stream(2), learner=other)


def test_a_run_of_another_origin_is_scored_from_its_directory() -> None:
    with pytest.raises(InputError, match=r"read it from its directory, by cl\.load"):
        toy_run().score()


def test_a_score_is_written_where_it_is_asked_for_and_prints_as_one_line(tmp_path: Path) -> None:
    run = quick(toy_stream(2), [])
    score = run.score(directory=tmp_path / "score")
    cells = [cell for cell in SCORED.read(tmp_path / "score" / SCORED.name) if cell[2:4] == ("class", "accuracy")]
    assert [cell.value for cell in cells] == pytest.approx(run.primary.R[2].tolist(), abs=0)
    assert repr(score).startswith("Score(after task 2, on 2 test sets of stream; class: average accuracy ")
    assert "\n" not in repr(score)
    with pytest.raises(InputError, match="holds a run or a score already"):
        run.score(directory=tmp_path / "score")


# ------------------------------------------------------------------ what cannot be scored


def test_what_cannot_be_scored_is_said_in_one_sentence(trained: Path, tmp_path: Path) -> None:
    unfinished, damaged, bare = (tmp_path / name for name in ("unfinished", "damaged", "bare"))
    for place in (unfinished, damaged, bare):
        shutil.copytree(trained, place)
    (unfinished / rundir.RESULT).unlink()
    with (damaged / "checkpoints" / "after_task_002.ckpt").open("ab") as file:
        file.write(b"x")
    shutil.rmtree(bare / "checkpoints")
    for call, sentence in [
        (
            lambda: find_checkpoint(trained, 7),
            r"after_task_007.ckpt is missing .*\(those after tasks 0, 1, 2 are there",
        ),
        (lambda: find_checkpoint(unfinished, None), r"the run is not finished: name a checkpoint, score=.*:task=2"),
        (lambda: find_checkpoint(damaged, None), r"after_task_002.ckpt is missing or damaged"),
        (lambda: find_checkpoint(bare, None), r"\(there is none\)"),
        (lambda: expand(["score=nowhere"]), "score=.*nowhere is no run directory"),
        (lambda: expand([f"score={trained}", "resume=a"]), "resume, verify and score exclude each other"),
        (lambda: expand([f"score={trained}", f"hydra.run.dir={unfinished}"]), "holds a run or a score already"),
        (lambda: expand([f"score={trained}", f"hydra.run.dir={trained}/x"]), "lies in the directory of the run"),
        (lambda: cl.load(trained).score(directory=trained / "x"), "lies in the directory of the run"),
        (lambda: cl.load(trained).score([1]), "is not a stream"),
        (lambda: cl.load(trained).score(learner="er"), "'er' is not a learner"),
        (lambda: cl.load(trained).score(toy_stream(2)), r"uint8 inputs of shape \(1, 4, 4\), the learner"),
        (lambda: quick(toy_stream(2), []).score(task=1), "task=1: this run has no directory"),
    ]:
        with pytest.raises(InputError, match=sentence) as error:
            call()
        assert "\n" not in str(error.value)
    assert find_checkpoint(unfinished, 1).name == "after_task_001.ckpt", "a task that is named can be scored"


def test_the_command_refuses_in_one_sentence_and_leaves_the_run_alone(
    cl_run: Any, trained: Path, tmp_path: Path
) -> None:
    before = digests(trained)
    for arguments, sentence in {
        (f"score={trained}:task=7", "hydra.run.dir=s"): "those after tasks 0, 1, 2 are there",
        (f"score={trained}:task=x", "hydra.run.dir=s"): "names no learner: write score=DIR:task=3",
        (f"score={trained}", "hydra.run.dir=s", "stream=corrupted"): "it has 10 classes, the learner 4",
        (f"score={trained}", f"hydra.run.dir={trained}/s"): "lies in the directory of the run",
    }.items():
        done = cl_run(*arguments, cwd=tmp_path)
        assert done.returncode == 1 and sentence in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert digests(trained) == before and not (tmp_path / "s" / SCORED.name).exists()


def test_the_configuration_is_that_of_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    """That of an earlier version may lack settings; one that was changed by hand is refused."""
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / rundir.CONFIG
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith(("score:", "compile:", "init:"))))
    last = cl.load(trained).matrices["class"].R[2]
    assert torch.equal(cl.load(tmp_path / "run").score()["class"], last)
    file.write_text("".join(lines).replace("batch_size: 10\n", "batch_size: 5\n"))
    with pytest.raises(InputError, match="was written by another configuration"):
        cl.load(tmp_path / "run").score()


def test_data_that_changed_are_refused_unless_allowed(tmp_path: Path) -> None:
    run = quick(toy_stream(2), cl.strategies.ER(memory_size=8), directory=tmp_path / "run")
    stored = json.loads((tmp_path / "run" / rundir.PROVENANCE).read_text())["content"]
    stored["data"]["task 2 test"][2] = "another"
    write_sealed(tmp_path / "run" / rundir.PROVENANCE, stored)
    with pytest.raises(InputError, match=r"trained with other data or code: inputs of task 2 test\. Restore"):
        run.score()
    score = run.score(allow_changed=True)
    assert score.about["notes"] == ["Changed since the run: inputs of task 2 test."]
    assert run.score(toy_stream(2, seed=1)).about["notes"] == [], "its own test sets are not what is scored"
