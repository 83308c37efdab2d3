"""Paths on the command line are taken as they are called, and nothing that Hydra can read is changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from cl.app.quote import at_home, quote_paths

NAMES = ["ü", "a=b", "(x)", "[x]", "{x}", "x#1", "a b", "it's", 'a"b', "a@b%c&d!e;f", "Zürich (2) = [é]"]


def value(argument: str) -> object:
    found = OverridesParser.create().parse_override(argument)
    assert not found.is_sweep_override()
    return found.value()


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_what_was_written(name):
    text = f"/data/{name}/x.npy"
    (argument,) = quote_paths([f"+stream.path={text}"])
    read = value(argument)
    assert getattr(read, "text", read) == text


@given(st.text("abüñ=()[]{}#'\"@%&!;:. ~", min_size=1, max_size=12))
def test_whatever_a_folder_is_called(name):
    text = f"/d/{name}/x".replace("//", "/")
    (argument,) = quote_paths([f"stream.path={text}"])
    read = value(argument)
    assert str(getattr(read, "text", read)).strip() == text.strip()


READ = ["seed=1,2", "strategy=[er,gpm]", "~strategy", "~trainer.x=1", "lr=interval(0,1)", "x={a: 1}", "x='a b'", "-m"]
READ += ["+a@b=c", "stream=split", "x=null", 'x="ü"', "x=[[1,2],[3]]", "x=${seed}", "x=a/b/c.npy", "strategy=[er"]


@pytest.mark.parametrize("argument", READ)
def test_what_hydra_reads_or_cannot_read_for_other_reasons_stays(argument):
    assert quote_paths([argument]) == [argument]


def test_lists_and_sweeps_are_quoted_piece_by_piece():
    assert quote_paths(["-m", "stream.root=/ü,/b"])[1] == 'stream.root="/ü",/b'
    assert value(quote_paths(["stream.folders=[ü,b]"])[0])[1] == "b"


def test_a_value_may_begin_at_home():
    assert at_home(["a=~/x", "b=~y", "~c", "--config-dir=~/d"]) == [
        f"a={Path.home() / 'x'}",
        "b=~y",
        "~c",
        f"--config-dir={Path.home() / 'd'}",
    ]


def test_a_run_reads_and_writes_such_places(cl_run, tmp_path):
    folder = tmp_path / "ü a=(1) [x]"
    folder.mkdir()
    rows = np.arange(40)
    for part in ("train", "test"):
        np.save(folder / f"{part}_x.npy", np.random.default_rng(0).normal(size=(40, 3)))
        np.save(folder / f"{part}_y.npy", rows % 4)
    files = [f"stream.{name}={folder}/{name}.npy" for name in ("train_x", "train_y", "test_x", "test_y")]
    small = ["stream.num_tasks=2", "epochs=1", "report=quiet", "logger=none", "trainer.accelerator=cpu"]
    done = cl_run("stream=from_arrays", *files, *small, f"hydra.run.dir={folder}/out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "out" / "transfer.csv").is_file()
    again = cl_run(f"resume={folder}/out", cwd=tmp_path)
    assert again.returncode == 0 and "Finished before" in again.stdout, again.stdout + again.stderr
