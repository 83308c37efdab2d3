"""A folder of images larger than what is kept in memory: images a second and peak memory beside torchvision's loader.

Both go over the training images twice in batches of 64 and train the same small network (pixels averaged over 32x32
patches, one linear layer). `clsim` decodes the folder into its cache the first time; its second pass, and every later
run, reads the cache. `torchvision` is an ImageFolder behind a DataLoader with two workers, which decodes in each pass.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.process import hand_over, take_turns

SIDE, BATCH, CLASSES = 256, 64, 8
SIZES = (1.0, 4.2)  # GiB, decoded


class Patches(nn.Module):
    """Averages over patches, so that reading is what takes time."""

    num_features = 3 * (SIDE // 32) ** 2

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, 192)."""
        return nn.functional.avg_pool2d(x, 32).flatten(1)


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Make the folders, let both go over them, print the table."""
    with tempfile.TemporaryDirectory() as place:
        cases = []
        for size in SIZES:
            folder = Path(place) / f"{size:g}"
            count = make(folder, size)
            console.print(f"folder: {count} images of 3x{SIDE}x{SIDE}, {size:g} GiB decoded", style="dim")
            cases += [(name, size) for name in ("clsim, decoding", "clsim, cached", "torchvision")]

        def command(case: tuple[str, float], _: int) -> list[str]:
            return ["benchmarks.folder", case[0], str(Path(place) / f"{case[1]:g}")]

        runs = take_turns("folder", cases, command, args, console)
    table = Table(title=f"images of 3x{SIDE}x{SIDE}, batch {BATCH}, one pass")
    for column in ("", "GiB decoded", "images/s", "peak resident MB, with children"):
        table.add_column(column, justify="right" if column else "left")
    for (name, size), results in runs.items():
        speed, memory = (median(r[k] for r in results) for k in ("speed", "memory"))
        table.add_row(name, f"{size:g}", f"{speed:.0f}", f"{memory:.0f}")
    console.print(table)
    return {"workload": "folder", "runs": {f"{name} {size:g}": results for (name, size), results in runs.items()}}


def make(folder: Path, gigabytes: float) -> int:
    """Write JPEG files that take so much decoded, and a small test folder."""
    count = round(gigabytes * 2**30 / (3 * SIDE * SIDE))
    jobs = [(folder / "train", start, min(500, count - start)) for start in range(0, count, 500)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_write, [*jobs, (folder / "test", 10**6, 80)]))
    return count


def _write(job: tuple[Path, int, int]) -> None:
    import numpy as np
    from PIL import Image

    folder, start, number = job
    for i in range(start, start + number):
        draw = np.random.default_rng(i)
        coarse = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        target = folder / f"class{i % CLASSES}" / f"{i:07d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(target, quality=90)


def clsim(root: Path, cached: bool) -> float:
    """Return images a second of one pass of a whole experiment, decoding included or before."""
    import pytorch_lightning as pl

    from cl.compose import copies
    from cl.data.images import image_folder
    from cl.engine.experiment import Experiment
    from cl.engine.learner import Learner

    cache = root / ".clsim-cache"
    if not cached:
        shutil.rmtree(cache, ignore_errors=True)
    began = time.perf_counter()
    stream = copies(image_folder(root))
    learner = Learner(stream, Patches(), {}, partial(torch.optim.SGD, lr=0.1), batch_size=BATCH)
    Experiment(learner, stream, partial(pl.Trainer, accelerator="cpu", logger=False)).learn(stream[0])
    return len(stream[0].train) / (time.perf_counter() - began)


def torchvision(root: Path) -> float:
    """Return images a second of one pass by hand over ImageFolder and DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    began = time.perf_counter()
    data = ImageFolder(str(root / "train"), transform=ToTensor())
    model = nn.Sequential(Patches(), nn.Linear(Patches.num_features, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in DataLoader(data, BATCH, shuffle=True, num_workers=2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return len(data) / (time.perf_counter() - began)


def main(name: str, root: str) -> None:
    """Measure one contestant on one folder."""
    speed = torchvision(Path(root)) if name == "torchvision" else clsim(Path(root), name.endswith("cached"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    workers = 2 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of which the largest is told
    hand_over({"speed": speed, "memory": (peak + workers) / 1024})


if __name__ == "__main__":
    main(*sys.argv[1:])
