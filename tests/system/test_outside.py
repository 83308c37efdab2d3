"""Streams and strategies from outside the repository: by `_target_`, by `--config-dir`, by an entry point."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser

from checkout import ROOT
from cl.backbones.networks import MLP
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.strategies.er import ER
from cl.testing import check_stream
from package import install, write

pytestmark = pytest.mark.xdist_group(__name__)  # one worker makes what all of these look at
PAGES = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))])
BLOCKS = re.findall(r"```python\n(.*?)```", PAGES, flags=re.DOTALL)
STREAM = next(block for block in BLOCKS if "def blobs" in block)
STRATEGY = next(block for block in BLOCKS if "class Shrink" in block)


def test_the_python_of_readme_and_guide_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    cats, dogs = ([(torch.randn(3), label)] * 4 for label in (0, 1))
    names: dict[str, Any] = {"cats": cats, "dogs": dogs, "cats_test": cats, "dogs_test": dogs}
    for block in BLOCKS:
        exec(compile(block, "README.md and docs/*.md", "exec", dont_inherit=True), names)
    assert (tmp_path / "comparison" / "comparison.html").exists() and (tmp_path / "er.png").exists()
    assert len(names["stream"]) == 3, "a visit each"
    own = names["cl"].run(names["blobs"](num_tasks=2), [ER(), names["Shrink"]()], epochs=1, progress=False)
    assert own.tasks_learned == 2 and list(own.config["strategy"]) == ["er", "shrink"]
    assert max(len(block.splitlines()) for block in BLOCKS if "cl.run(" in block) <= 10


def test_the_stream_of_the_guide_is_learned():
    """All tasks well above chance, with the settings of the command beside it."""
    found: dict[str, Any] = {}
    exec(compile(STREAM, "docs/streams.md", "exec", dont_inherit=True), found)
    check_stream(found["blobs"])
    for scenario, chance in (("class", 1 / 8), ("task", 1 / 2)):
        stream = found["blobs"](num_tasks=4, scenario=scenario)
        torch.manual_seed(0)
        sgd = partial(torch.optim.SGD, lr=0.1)
        learner = Learner(stream, MLP(stream.input_shape), {"er": ER()}, sgd, batch_size=10)
        job = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)
        run = Experiment(learner, stream, job, epochs=5).run()
        assert float(run.matrices[scenario].R[-1].min()) > chance + 0.35


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {
        "__init__.py": "",
        "stream.py": STREAM,
        "shrink.py": STRATEGY,
        "conf/stream/blobs.yaml": "_target_: blobs.stream.blobs\nnum_tasks: 3\norder: null\nseed: ${seed}\n",
        "conf/strategy/shrink.yaml": "shrink:\n  _target_: blobs.shrink.Shrink\n",
    }
    return write(tmp_path_factory.mktemp("outside"), "blobs", files)


@pytest.fixture(scope="module")
def site(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(package, tmp_path_factory.mktemp("site"))


@pytest.fixture
def short(cl_run):
    """Run `cl-run` for one epoch, quietly."""

    def call(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        return cl_run(*arguments, "trainer.accelerator=cpu", "report=quiet", "epochs=1", cwd=cwd, path=path)

    return call


def tasks_of(run: Path) -> int:
    with (run / "transfer.csv").open() as file:
        return max(int(row["task"]) for row in csv.DictReader(file))


def test_the_stream_of_the_guide_has_about_ten_lines():
    assert len(STREAM.strip().splitlines()) <= 14


def test_by_target(short, package: Path, tmp_path: Path):
    stream = ["stream=custom", "stream._target_=blobs.stream.blobs", "+stream.num_tasks=2"]
    strategy = ["strategy=[]", "+strategy.shrink._target_=blobs.shrink.Shrink"]
    done = short(*stream, *strategy, "hydra.run.dir=out", cwd=tmp_path, path=package)
    assert done.returncode == 0, done.stderr
    assert tasks_of(tmp_path / "out") == 2


@pytest.mark.slow
def test_by_target_from_where_the_command_is_given(package: Path, tmp_path: Path):
    command = [sys.executable, "-I", "-c", "from cl.app.cli import main; main()"]  # as a script: no path of its own
    stream = ["stream=custom", "stream._target_=blobs.stream.blobs", "report=quiet", "epochs=1"]
    done = subprocess.run([*command, *stream, f"hydra.run.dir={tmp_path}/out"], cwd=package, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert tasks_of(tmp_path / "out") == 3


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGES, flags=re.DOTALL)
    whole = [block.replace("\\\n", " ") for block in blocks]  # a command may go on in the next line
    lines = [line for block in whole for line in block.splitlines() if line.startswith("cl-run ")]
    own = (
        "--config-dir",
        "blobs",
        "resume=",
        "verify=",
        "score=",
        "from=",
        "launcher=",
        "hydra/sweeper=",
    )  # or an extra's
    return [line for line in lines if not any(word in line for word in own)]


@pytest.mark.parametrize("line", commands())
def test_every_command_of_readme_and_guide_composes(line: str):
    parts = [part for part in shlex.split(line, comments=True)[1:] if part != "-m"]
    parsed = OverridesParser.create().parse_overrides(parts)
    chosen = [p for p, o in zip(parts, parsed, strict=True) if not o.is_sweep_override()]
    swept = [o for o in parsed if o.is_sweep_override()]
    for value in swept:
        first = next(value.sweep_string_iterator()) if not value.is_range_sweep() else "0"
        chosen.append(f"{value.get_key_element()}={first}")
    with initialize_config_module("cl.conf", version_base="1.3"):
        assert compose("config", overrides=chosen, return_hydra_config=True)


def test_by_a_folder_of_configurations(short, package: Path, tmp_path: Path):
    folder = ["--config-dir", str(package / "blobs" / "conf")]
    done = short(*folder, "stream=blobs", "strategy=shrink", "hydra.run.dir=out", cwd=tmp_path, path=package)
    assert done.returncode == 0, done.stderr
    assert tasks_of(tmp_path / "out") == 3


def test_by_an_entry_point(short, site: Path, tmp_path: Path):
    done = short("stream=blobs", "strategy=[er,shrink]", "hydra.run.dir=out", cwd=tmp_path, path=site)
    assert done.returncode == 0, done.stderr
    assert tasks_of(tmp_path / "out") == 3
    unknown = short("stream=blob", cwd=tmp_path, path=site)
    assert "no stream called 'blob': did you mean 'blobs'" in unknown.stderr
    assert "stream=blobs" not in short("stream=blobs", cwd=tmp_path).stdout, "not installed: not known"


@pytest.mark.slow
def test_its_orders_can_be_swept(short, site: Path, tmp_path: Path):
    orders = "stream.order=[0,1,2],[2,1,0]"
    done = short("-m", "stream=blobs", orders, "strategy=finetune", "hydra.sweep.dir=out", cwd=tmp_path, path=site)
    assert done.returncode == 0, done.stderr
    import json

    stored = [json.loads(file.read_text())["order"] for file in sorted(tmp_path.glob("out/*/transfer.json"))]
    assert sorted(stored) == [[0, 1, 2], [2, 1, 0]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["stream=custom"], "stream._target_ has no default: write stream._target_=..."),
        (["stream=custom", "stream._target_=blobs.stream.blob"], "stream cannot be built"),
        (["stream._target_=blobs.stream.blobs"], "no argument of stream called 'dataset'"),
        (["stream=custom", "stream._target_=blobs.stream.blobs", "+stream.order=[0]"], r"order=[0] of 'stream'"),
    ],
    ids=["no target", "no such function", "other arguments", "wrong order"],
)
def test_what_is_wrong_comes_as_one_sentence(short, package: Path, tmp_path: Path, arguments, sentence):
    done = short(*arguments, cwd=tmp_path, path=package)
    assert done.returncode != 0 and sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_fault_inside_it_keeps_its_traceback(short, tmp_path: Path):
    (tmp_path / "faulty.py").write_text("def stream():\n    return len(3)\n")
    done = short("stream=custom", "stream._target_=faulty.stream", cwd=tmp_path, path=tmp_path)
    assert done.returncode != 0 and "return len(3)" in done.stderr
