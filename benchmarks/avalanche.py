"""Avalanche 0.6 with its standard strategy and replay plugin, its loggers off, data in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from benchmarks.workloads import MEAN, STD, Arrays, Workload, quietly


@quietly
def run(workload: Workload, tasks: list[Arrays]) -> tuple[list[float], int]:
    """Learn every task; return the last row of accuracies and the number of steps."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.benchmarks.utils.transform_groups import TransformGroups
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
    from avalanche.training.storage_policy import ReservoirSamplingBuffer
    from avalanche.training.supervised import Naive

    mean, std = (torch.tensor(v[workload.dataset]).view(-1, 1, 1) * 255 for v in (MEAN, STD))
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

    def plain(x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.float32) - mean) / std

    def dataset(x: torch.Tensor, y: torch.Tensor) -> Any:
        if workload.augment:  # uint8 in memory, augmented and normalised an image at a time, as its examples do
            data = TensorDataset(x, y)
            groups = TransformGroups({"train": (lambda image: plain(augment(image)), None), "eval": (plain, None)})
        else:
            data, groups = TensorDataset(plain(x), y), None
        data.targets = y  # type: ignore[attr-defined]
        return as_classification_dataset(data, transform_groups=groups)

    scenario = benchmark_from_datasets(
        train=[dataset(x, y) for x, y, _, _ in tasks], test=[dataset(x, y) for _, _, x, y in tasks]
    )
    model = workload.model()
    plugins = []
    if workload.replay:
        memory = ReservoirSamplingBuffer(max_size=workload.memory)
        plugins.append(ReplayPlugin(workload.memory, batch_size_mem=workload.replay, storage_policy=memory))
    metrics = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.lr)
    learner = Naive(
        model=model,
        optimizer=optimizer,
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=workload.batch_size,
        train_epochs=1,
        eval_mb_size=1024,
        plugins=plugins,
        evaluator=metrics,
    )
    row = learner.eval(scenario.test_stream)
    if workload.name == "evaluate":
        for _ in range(4):
            row = learner.eval(scenario.test_stream)
    else:
        for experience in scenario.train_stream:
            learner.train(experience)
            row = learner.eval(scenario.test_stream)
    return [
        float(value) for name, value in row.items() if name.startswith("Top1_Acc_Exp")
    ], learner.clock.train_iterations
