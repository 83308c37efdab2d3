"""The wheel holds exactly the files of the checkout, and runs in an empty place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from checkout import ROOT

pytestmark = pytest.mark.xdist_group(__name__)  # one worker makes what all of these look at


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        [
            "git",
            "ls-files",
            "-co",
            "--exclude-standard",
            "cl",
            "strategies",
            "streams",
            "conf",
            "pyproject.toml",
            "*.md",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in tracked:  # a copy, so that building leaves nothing in the checkout
        target = place / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(place), str(place / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(place.glob("*.whl"))


def test_the_wheel_holds_exactly_the_files_of_the_checkout(wheel: Path):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, package in (
        ("cl", "cl"),
        ("strategies", "cl/strategies"),
        ("streams", "cl/streams"),
        ("conf", "cl/conf"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".typed", ".css", ".js", ".LICENSE") and "__pycache__" not in path.parts:
                expected.add(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    assert held == expected


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_place_beside_a_conf_of_the_users(wheel: Path, tmp_path: Path):
    site, place = tmp_path / "site", tmp_path / "place"
    zipfile.ZipFile(wheel).extractall(site)
    for name in ("conf", "strategies", "streams"):  # what a user's own project may be called
        (place / name).mkdir(parents=True)
        (place / name / "__init__.py").write_text("raise ImportError('the wrong package')")
    (place / "conf" / "config.yaml").write_text("wrong: true")
    environment = {**os.environ, "PYTHONPATH": str(site), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "cl", "epochs=1", "stream.num_tasks=2", "hydra.run.dir=out"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    left = {p.relative_to(place / "out").as_posix() for p in (place / "out").rglob("*") if p.is_file()}
    assert {"transfer.csv", "transfer.json", "transfer.png", "config.yaml", "checkpoints/after_task_002.ckpt"} <= left


def test_an_uninstalled_checkout_says_what_to_do(tmp_path: Path):
    shutil.copytree(ROOT / "cl", tmp_path / "cl", ignore=shutil.ignore_patterns("__pycache__"))
    # -S leaves out site-packages, where an editable install of this checkout would be found.
    done = subprocess.run([sys.executable, "-S", "-m", "cl"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "pip install -e ." in done.stderr
    assert "Traceback" not in done.stderr
