"""Lightning as its tutorials have it: automatic optimisation, a DataLoader, a logged loss, the bar and the CSV file."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from benchmarks.workloads import MEAN, STD, Arrays, Workload, quietly


class Module(pl.LightningModule):
    """The workload's network, and a reservoir where the workload replays."""

    def __init__(self, workload: Workload, shape: torch.Size) -> None:
        super().__init__()
        self.workload, self.model = workload, workload.model()
        self.normalize = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN[workload.dataset], STD[workload.dataset])]
        )
        self.memory_x = torch.zeros(workload.memory, *shape, dtype=torch.uint8)
        self.memory_y = torch.zeros(workload.memory, dtype=torch.int64)
        self.seen = self.steps = 0
        self.right: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Replay, augment, and return the loss."""
        x, y = batch
        new_x, new_y = x, y
        if self.workload.replay and self.seen:
            drawn = torch.randperm(min(self.seen, self.workload.memory))[: self.workload.replay]
            x, y = torch.cat([x, self.memory_x[drawn]]), torch.cat([y, self.memory_y[drawn]])
        if self.workload.augment:
            x = torch.stack([self.augment(image) for image in x])
        loss = F.cross_entropy(self.model(self.normalize(x)), y)
        self.log("loss", loss)
        self.steps += 1
        if self.workload.replay:
            for image, label in zip(new_x, new_y, strict=True):
                slot = self.seen if self.seen < self.workload.memory else int(torch.randint(self.seen + 1, (1,)))
                if slot < self.workload.memory:
                    self.memory_x[slot], self.memory_y[slot] = image, label
                self.seen += 1
        return loss

    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

    def test_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count what is right."""
        self.log("right", (self.model(self.normalize(batch[0])).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        """Return plain SGD."""
        return torch.optim.SGD(self.model.parameters(), lr=self.workload.lr)


@quietly
def run(workload: Workload, tasks: list[Arrays]) -> tuple[list[float], int]:
    """Learn every task; return the last row of accuracies and the number of steps."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    module = Module(workload, tasks[0][0].shape[1:])
    tests = [DataLoader(TensorDataset(x, y), batch_size=1000) for _, _, x, y in tasks]
    with tempfile.TemporaryDirectory() as folder:

        def trainer() -> pl.Trainer:
            return pl.Trainer(accelerator="cpu", max_epochs=1, logger=CSVLogger(folder), default_root_dir=folder)

        def evaluate() -> list[float]:
            found = trainer().test(module, tests, verbose=False)
            return [next(iter(row.values())) for row in found]

        row = evaluate()
        if workload.name == "evaluate":
            for _ in range(4):
                row = evaluate()
            return row, 0
        for x, y, _, _ in tasks:
            trainer().fit(module, DataLoader(TensorDataset(x, y), batch_size=workload.batch_size, shuffle=True))
            row = evaluate()
    return row, module.steps
