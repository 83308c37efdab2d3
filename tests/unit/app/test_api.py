"""`import cl`: light, complete, and the same numbers from Python as from `cl-run`."""

from __future__ import annotations

import inspect
import math
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import nn

import cl
from checkout import HARNESS, ROOT
from cl.app.resume import differences
from cl.compare.read import read_run
from cl.data.sources import digits
from cl.testing import toy_stream

pytestmark = pytest.mark.xdist_group(__name__)
CPU = {"accelerator": "cpu"}
quick = partial(cl.run, progress=False, trainer=CPU, epochs=1)


def ran(code: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


# ------------------------------------------------------------------ import


def test_importing_it_imports_nothing_heavy():
    heavy = "torch", "numpy", "hydra", "omegaconf", "pytorch_lightning", "pandas", "matplotlib", "rich"
    done = ran(f"import sys, cl; dir(cl); cl.__all__; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr
    assert ran("import sys, cl; dir(cl.strategies); cl.InputError; print('torch' in sys.modules)").stdout == "False\n"


def test_every_name_is_there_and_no_other():
    for name in cl.__all__:
        assert getattr(cl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        cl.rum  # noqa: B018
    assert {"run", "load", "compare", "strategies", "Stream"} <= set(dir(cl))


def test_packages_offer_what_their_files_hold():
    root = ROOT
    assert len(cl.strategies.__all__) == len([*root.glob("strategies/[!_]*.py")])
    for name in cl.strategies.__all__:
        assert issubclass(getattr(cl.strategies, name), cl.Strategy)
    for name in cl.streams.__all__:
        assert callable(getattr(getattr(cl.streams, name), name)), "by its file"
    assert issubclass(cl.backbones.MLP, nn.Module)
    with pytest.raises(AttributeError, match="did you mean 'EWC'"):
        cl.strategies.EWX  # noqa: B018
    with pytest.raises(AttributeError, match="did you mean 'split'"):
        cl.streams.splitt  # noqa: B018


@pytest.mark.slow
def test_a_stream_is_called_by_its_name_whoever_imported_it_first():
    code = "{}; import cl; from cl.data.sources import digits; print(cl.streams.split(digits(), num_tasks=2))"
    for first in ("pass", "from cl.streams.split import split"):
        assert ran(code.format(first)).stdout.startswith("Stream('split digits': 2 tasks")


# ------------------------------------------------------------------ the same bits as cl-run


METHODS = {
    "er": lambda: cl.strategies.ER(memory_size=50),
    "ewc": lambda: cl.strategies.EWC(num_samples=50),
    "gpm": lambda: cl.strategies.GPM(num_samples=50),
}
OVERRIDES = {
    "er": ["strategy.er.memory_size=50"],
    "ewc": ["strategy.ewc.num_samples=50"],
    "gpm": ["strategy.gpm.num_samples=50", "seed=3"],
}


@pytest.mark.parametrize(
    "name", ["er", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "er")]
)
def test_python_and_the_command_give_the_same_bits(name, cl_run, tmp_path: Path):
    few = ["stream.num_tasks=2", "stream.classes=[0,1,2,3]", "epochs=2", "report=quiet", "trainer.accelerator=cpu"]
    done = cl_run(f"strategy={name}", *OVERRIDES[name], *few, f"hydra.run.dir={tmp_path}/command", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seed = 3 if name == "gpm" else 0
    found: list[cl.Run] = []

    def learn() -> None:
        stream = cl.streams.split(digits(), num_tasks=2, classes=[0, 1, 2, 3], seed=seed)
        found.append(quick(stream, METHODS[name](), epochs=2, seed=seed, directory=tmp_path / "python"))

    thread = threading.Thread(target=learn)  # where no signal can be handled, as in many a server of notebooks
    thread.start()
    thread.join()
    assert differences(tmp_path / "command", tmp_path / "python") == []
    assert (tmp_path / "command" / "transfer.csv").read_text() == (tmp_path / "python" / "transfer.csv").read_text()
    assert found[0].tasks_learned == 2


@pytest.mark.slow
def test_a_notebook_gives_the_same_bits(tmp_path: Path):
    """Three methods, one after another in one kernel, beside the same calls in this interpreter."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cell = """
import torch
import cl
from cl.data.sources import digits

torch.set_num_threads(1)  # as the tests do: sums in another order end in another last bit
stream = cl.streams.split(digits(), num_tasks=2, classes=[0, 1, 2, 3], seed=3)
methods = cl.strategies.ER(memory_size=50), cl.strategies.EWC(num_samples=50), cl.strategies.GPM(num_samples=50)
for name, method in zip(("er", "ewc", "gpm"), methods, strict=True):
    run = cl.run(stream, method, epochs=2, seed=3, trainer={"accelerator": "cpu"}, directory=f"notebook/{name}")
run
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "<table" in notebook.cells[0].outputs[-1]["data"]["text/html"]
    stream = cl.streams.split(digits(), num_tasks=2, classes=[0, 1, 2, 3], seed=3)
    for name, method in METHODS.items():
        here, there = tmp_path / "python" / name, tmp_path / "notebook" / name
        quick(stream, method(), epochs=2, seed=3, directory=here)
        assert differences(here, there) == []
        assert (here / "transfer.csv").read_text() == (there / "transfer.csv").read_text()


@pytest.mark.slow
def test_references_of_python_are_those_of_the_command(cl_run, tmp_path: Path):
    few = ["stream.num_tasks=2", "stream.classes=[0,1,2,3]", "epochs=1", "report=quiet", "trainer.accelerator=cpu"]
    command = [
        "strategy=er",
        "references=[experts,joint]",
        f"reference_dir={tmp_path}/c",
        f"hydra.run.dir={tmp_path}/r",
    ]
    assert cl_run(*command, *few, cwd=tmp_path).returncode == 0
    stream = cl.streams.split(digits(), num_tasks=2, classes=[0, 1, 2, 3])
    options = {"references": ["experts", "joint"], "reference_dir": tmp_path / "p", "epochs": 1}
    run, again = (quick(stream, cl.strategies.ER(), **options) for _ in range(2))
    theirs = cl.load(tmp_path / "r").references
    for kind in ("experts", "joint"):
        for ours, other, kept in zip(run.references[kind], theirs[kind], again.references[kind], strict=True):
            assert ours["row"] == other["row"] and ours["value"] == other["value"] and kept == ours
    assert len(list((tmp_path / "p").glob("*.json"))) == 4
    with pytest.raises(cl.InputError, match="no reference called 'expert': did you mean 'experts'"):
        quick(stream, [], references=["expert"])


def test_the_defaults_are_those_of_the_command():
    with initialize_config_module("cl.conf", version_base="1.3"):
        cfg = compose("config", overrides=["strategy=er"])
    defaults = {name: p.default for name, p in inspect.signature(cl.run).parameters.items()}
    alone = ("epochs", "batch_size", "eval_batch_size", "chunk_size", "gradient_clip", "train_mask", "optimizer_state")
    for name in (*alone, "scheduler_interval", "compile", "allow_changed", "log_every", "updates_per_batch", "seed"):
        assert defaults[name] == cfg[name], name
    for name in ("every", "points", "subset", "flops", "columns"):
        assert defaults[name] == cfg.report[name], name
    assert (defaults["checkpoint_keep"], defaults["checkpoint_every"]) == (cfg.checkpoint.keep, cfg.checkpoint.every)
    assert [list(defaults["probes"]), list(defaults["estimators"])] == [cfg.probes, cfg.estimators]
    config = cl.run(toy_stream(2), [], epochs=0, progress=False).config
    for group in ("optimizer", "trainer"):
        composed = OmegaConf.to_container(cfg[group], resolve=True)
        written = {key: value for key, value in composed.items() if key not in ("_target_", "_partial_")}
        assert {k: v for k, v in config[group].items() if k != "_target_"} == written
    assert cfg.optimizer._target_ == "torch.optim.SGD" and cfg.scheduler.factor == 1.0, "a constant rate"
    assert config["backbone"]["_target_"] == cfg.backbone._target_ and config["head"]["_target_"] == cfg.head._target_
    hidden = inspect.signature(cl.backbones.MLP).parameters["hidden"].default
    assert list(hidden) == cfg.backbone.hidden


def test_a_seed_draws_the_initial_weights_and_what_is_passed_stays_as_it_was():
    stream, er, net = toy_stream(2), cl.strategies.ER(memory_size=10), cl.backbones.MLP((1, 4, 4), hidden=[8])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    one, two = (quick(stream, er, net, seed=1) for _ in range(2))
    assert torch.equal(one.R["task"].values, two.R["task"].values)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(True for _ in er.buffers()), "no memory was made in it"
    learners = [cl.Learner(stream, cl.backbones.MLP, {}, partial(torch.optim.SGD, lr=0.1), seed=s) for s in (4, 4, 5)]
    first, again, other = (learner.backbone[1].weight for learner in learners)
    assert torch.equal(first, again) and not torch.equal(first, other)


# ------------------------------------------------------------------ runs that go on


SCRIPT = """
import os, signal, sys
import cl, torch
from cl.testing import toy_stream
import pytorch_lightning as pl

class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, module, *rest):
        if module.task_index == 1 and module.step >= 4 and sys.argv[2] != "none":
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))

torch.set_num_threads(1)
options = dict(progress=False, trainer={"accelerator": "cpu"}, epochs=2, chunk_size=1, checkpoint_every=2)
cl.run(toy_stream(3), cl.strategies.ER(memory_size=10), directory=sys.argv[1], callbacks=[Stop()], **options)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole") / "run"
    assert ran(SCRIPT, place, "none").returncode == 0
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(name, whole: Path, tmp_path: Path):
    stopped = ran(SCRIPT, tmp_path / "stopped", name)
    assert stopped.returncode in (-9, 143), stopped.stderr
    assert not (tmp_path / "stopped" / "result.json").exists()
    assert cl.load(tmp_path / "stopped").tasks_learned == 1
    again = ran(SCRIPT, tmp_path / "stopped", "none")
    assert again.returncode == 0, again.stderr
    assert differences(whole, tmp_path / "stopped") == []


class Interrupt(pl.Callback):
    def on_train_batch_end(self, trainer, module, *rest):
        if module.task_index == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("kept", [True, False])
def test_the_stop_button_of_a_notebook_leaves_the_interpreter_as_it_was(kept, tmp_path: Path):
    handler = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quick(toy_stream(3), [], callbacks=[Interrupt()], directory=tmp_path / "run" if kept else None)
        assert signal.getsignal(signal.SIGINT) is handler


def test_a_finished_run_is_read_again_and_another_one_is_refused(tmp_path: Path):
    first = quick(toy_stream(2), [], directory=tmp_path / "a")
    files = {path: path.read_bytes() for path in (tmp_path / "a").glob("checkpoints/*")}
    again = quick(toy_stream(2), [], directory=tmp_path / "a")
    assert torch.equal(first.R["class"].values, again.R["class"].values)
    with pytest.raises(cl.InputError, match=r"another configuration.*batch_size"):
        quick(toy_stream(2), [], directory=tmp_path / "a", batch_size=5)
    with pytest.raises(cl.InputError, match=r"another configuration.*hidden"):
        quick(toy_stream(2), [], partial(cl.backbones.MLP, hidden=[9]), directory=tmp_path / "a")
    assert files == {path: path.read_bytes() for path in (tmp_path / "a").glob("checkpoints/*")}


# ------------------------------------------------------------------ a run, saved and loaded


@pytest.mark.parametrize("stored", [True, False])
def test_save_and_load_keep_every_bit(stored, tmp_path: Path):
    there = tmp_path / "run" if stored else None
    run = quick(toy_stream(3), cl.strategies.ER(memory_size=10), directory=there, probes=["knn"], points=2)
    back = cl.load(run.save(tmp_path / "copy"))
    assert list(back.R) == list(run.R) == ["class", "task", "knn"]
    for mask, table in run.R.items():
        assert table.values.dtype == torch.float32
        np.testing.assert_array_equal(np.asarray(back.R[mask]), np.asarray(table))
        assert back.R[mask].rows == table.rows and back.R[mask].columns == table.columns
        assert str(back.scalars(mask)) == str(run.scalars(mask))
    for mask, matrix in run.calibration.items():
        np.testing.assert_array_equal(back.calibration[mask].R, matrix.R)
    for name in ("config", "notes", "order", "test_rows", "boundaries", "stream", "device", "scenario"):
        assert getattr(back, name) == getattr(run, name), name
    assert read_run(tmp_path / "copy").finished
    assert (tmp_path / "copy" / "learning_curves.csv").exists() and (tmp_path / "copy" / "transfer.png").exists()
    with pytest.raises(cl.InputError, match="there already and not empty"):
        run.save(tmp_path / "copy")
    assert torch.equal(cl.load(back.save(tmp_path / "third")).R["class"].values, run.R["class"].values)


def test_a_stream_without_boundaries_is_read_as_one(tmp_path: Path):
    blended = cl.streams.boundary_free(toy_stream(3))
    assert not cl.load(quick(blended, []).save(tmp_path / "a")).boundaries


def test_what_was_not_measured_stays_unmeasured(tmp_path: Path):
    run = quick(toy_stream(3), [], columns="seen")
    assert math.isnan(run.R["class"][1, 2])
    back = cl.load(run.save(tmp_path / "a"))
    np.testing.assert_array_equal(np.asarray(back.R["class"]), np.asarray(run.R["class"]))
    frame = run.to_frame()
    assert len(frame[(frame["mask"] == "class") & (frame["metric"] == "accuracy")]) == 11, "of twelve"
    assert "-" in repr(run.R["class"]).splitlines()[2]


def test_a_frame_holds_what_transfer_csv_holds(tmp_path: Path):
    import pandas

    run = quick(toy_stream(2), [], directory=tmp_path / "a")
    written = pandas.read_csv(tmp_path / "a" / "transfer.csv")
    keys = ["after_task", "task", "mask", "metric"]
    one, two = (table.sort_values(keys)["value"].to_numpy(np.float32) for table in (written, run.to_frame()))
    np.testing.assert_array_equal(one, two)
    assert list(run.to_frame()["name"].unique()) == run.task_names


def test_other_targets_than_labels_come_back_under_their_names(tmp_path: Path):
    stream = cl.streams.mosaic(digits(), num_tasks=2)
    run = quick(stream, [])
    assert len(run.R) > 1
    assert list(cl.load(run.save(tmp_path / "a")).R) == list(run.R)


def test_no_name_of_a_task_is_taken_for_html():
    named = [cl.Task(t.index, t.train, t.test, name=f"<b>{t.index}") for t in toy_stream(2)]
    run = quick(cl.Stream(named, num_classes=4), [])
    run.notes.append("<script>")
    html = run._repr_html_()
    assert "<b>" not in html and "<script>" not in html and "&lt;b&gt;1" in html
    assert "&lt;b&gt;" in run.R["class"]._repr_html_() and "<b>" not in run.R["class"]._repr_html_()


def test_a_notebook_without_widgets_gets_a_line_a_task(monkeypatch: pytest.MonkeyPatch):
    from io import StringIO

    from rich.console import Console

    from cl.report import progress

    said = StringIO()
    console = Console(file=said, force_jupyter=True, force_terminal=True)
    monkeypatch.setattr(console, "print", lambda text, **_: said.write(f"{text}\n"))
    monkeypatch.setattr(progress, "find_spec", lambda name: object())
    assert progress._can_draw(console), "bars, where there are widgets"
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    quick(toy_stream(2), [], callbacks=[progress.ProgressBar(console)])
    assert [line[:9] for line in said.getvalue().splitlines()] == ["task 1/2:", "task 2/2:"]


def test_a_picture_is_drawn():
    run = quick(toy_stream(2), [])
    picture: Any = run.plot()
    assert len(picture.axes) >= 4
    assert picture._repr_png_().startswith(b"\x89PNG"), "what a notebook shows"


# ------------------------------------------------------------------ comparison


def test_runs_are_compared_wherever_they_are(tmp_path: Path):
    runs: list[cl.Run | Path] = []
    for seed in (0, 1):
        quick(toy_stream(2), cl.strategies.ER(memory_size=10), seed=seed, directory=tmp_path / f"er{seed}")
        runs += [tmp_path / f"er{seed}", quick(toy_stream(2), cl.strategies.Finetune(), seed=seed)]
    found = cl.compare(*runs)
    assert {row.group: row.num for row in found.boards[0].rows} == {"er": 2, "finetune": 2}
    mean = np.mean([run.scalars()["average_accuracy"] for run in runs if isinstance(run, cl.Run)])
    own = next(row for row in found.boards[0].rows if row.group == "finetune")
    assert own.cells[0] is not None and own.cells[0].mean == pytest.approx(mean, abs=1e-12)
    assert "finetune" in repr(found) and "<table>" in found._repr_html_()
    assert "href" not in found._repr_html_() and "higher is better" not in found._repr_html_(), "made for the page"
    page = found.save(tmp_path / "page")
    assert page.read_text().startswith("<!doctype html>") and page.with_suffix(".csv").exists()


# ------------------------------------------------------------------ how things print, and what is refused


def test_everything_prints_as_one_short_line():
    stream = cl.streams.split(digits(), num_tasks=2, classes=[0, 1, 2, 3], val_fraction=0.1)
    run = quick(stream, cl.strategies.ER(memory_size=10))
    memory = run.learner.strategies["er"].memory
    things = {
        "Stream('split digits': 2 tasks": stream,
        "Task(0, '0+1'": stream[0],
        "TaskData(": stream[0].train,
        "Dataset('digits': 1438 train": digits(),
        "Learner(MLP + Head + er: 2 of 2 tasks": run.learner,
        "Memory(10 of 10": memory,
        "TransferMatrix(": run.matrices["class"],
        "Batch(4 rows of uint8 (1, 8, 8)": memory.sample(4),
        "Run(er · split digits, class-incremental, 2 tasks · MLP · ": run,
    }
    for begin, thing in things.items():
        assert repr(thing).startswith(begin) and len(repr(thing)) < 220 and "\n" not in repr(thing)


class Bare(nn.Module):
    """A backbone that does not say how wide its features are."""


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: cl.run(toy_stream(), cl.strategies.ER), r"is not a strategy: write ER\(\)"),
        (lambda: cl.run(toy_stream(), "er"), r"'er' is not a strategy: give one, such as ER\(\)"),
        (lambda: cl.run(toy_stream(), [cl.strategies.ER()] * 2), "Two strategies are called 'er': give a mapping"),
        (lambda: cl.run(toy_stream(), [], Bare()), "Bare has no num_features"),
        (lambda: cl.run(toy_stream(), [], seed=-1), "seed=-1 must be 0 or more"),
        (lambda: cl.run(toy_stream(), [], batch_size=0), "batch_size=0 must be 1 or more"),
        (lambda: cl.run(toy_stream(), [], trainer={"max_steps": 3}), "trainer.max_steps=3"),
        (lambda: cl.run(toy_stream(), [], epochs=-1), "epochs=-1 must be 0 or more"),
        (lambda: cl.run(digits(), []), r"is not a stream: build one by a function of cl.streams"),
        (lambda: cl.run(toy_stream(), [], "mlp"), "backbone='mlp' is no network"),
        (lambda: cl.run(toy_stream(), [], trainer={"acelerator": "cpu"}), "did you mean 'accelerator'"),
        (lambda: cl.run(toy_stream(), [], trainer={"accelerator": "cpuu"}), "cannot be built"),
        (lambda: cl.run(toy_stream(), [], trainer={"precision": "3-true"}), "trainer.precision='3-true' must be"),
        (
            lambda: cl.run(toy_stream(), [], optimizer=0.1),
            "optimizer=float makes no optimizer: give a function that does",
        ),
        (lambda: cl.run(toy_stream(), [], optimizer=lambda parameters: None), "makes a NoneType, not an optimizer"),
        (lambda: cl.run(toy_stream(), [], probes=["rigde"]), "did you mean 'ridge'"),
        (lambda: cl.run(toy_stream(), [], directory=Path(__file__)), "holds no run"),
        (lambda: cl.run(toy_stream(), [], directory=Path(__file__).parent), "holds no run"),
        (lambda: cl.load("nowhere"), "There is no directory nowhere"),
        (lambda: cl.load(Path(__file__).parent), "is not the directory of a run"),
        (lambda: cl.compare(), "nothing to compare"),
        (lambda: cl.compare(HARNESS), "No run was found"),
        (lambda: quick(toy_stream(2), []).scalars("clas"), "did you mean 'class'"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(call, sentence):
    with pytest.raises(cl.InputError, match=sentence):
        call()


def test_a_refused_run_leaves_nothing(tmp_path: Path):
    with pytest.raises(cl.InputError):
        quick(toy_stream(2), [], directory=tmp_path / "a", trainer={"accelerator": "cpu", "limit_test_batches": 2})
    assert not (tmp_path / "a").exists()


def test_a_seed_that_does_not_reach_the_stream_is_told(tmp_path: Path):
    from cl.app.build import _ignored

    def told(*overrides: str) -> list[str]:
        with initialize_config_module("cl.conf", version_base="1.3"):
            return _ignored(compose("config", overrides=["stream=custom", *overrides]))

    custom = "stream._target_=cl.testing.toy_stream"
    assert "seed=1 does not reach the stream" in told(custom, "seed=1")[0]
    assert told(custom) == told(custom, "seed=1", "+stream.seed=${seed}") == []
    assert told("stream._target_=cl.testing.ToyBackbone", "seed=1") == [], "takes none"
