"""What two processes do for test_distributed.py: in a module that a new process can import."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from cl import distributed
from cl.backbones.networks import MLP
from cl.backbones.vit import ViT
from cl.data.task import Stream, Task, TaskData
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.errors import DivergenceError, InputError
from cl.measure.learning_curves import LearningCurves
from cl.measure.probes import Probes
from cl.strategies.acil import ACIL
from cl.strategies.adam_nscl import AdamNSCL
from cl.strategies.agem import AGEM
from cl.strategies.aper import APER
from cl.strategies.aser import ASER
from cl.strategies.avalanche import Avalanche
from cl.strategies.bic import BiC
from cl.strategies.coda_prompt import CODAPrompt
from cl.strategies.cuber import CUBER
from cl.strategies.cumulative import Cumulative
from cl.strategies.der import DER
from cl.strategies.derpp import DERpp
from cl.strategies.dualprompt import DualPrompt
from cl.strategies.ease import EASE
from cl.strategies.er import ER
from cl.strategies.er_ace import ERACE
from cl.strategies.er_las import ERLAS
from cl.strategies.ewc import EWC
from cl.strategies.feature_distillation import FeatureDistillation
from cl.strategies.fecam import FeCAM
from cl.strategies.finetune import Finetune
from cl.strategies.gdumb import GDumb
from cl.strategies.gpm import GPM
from cl.strategies.gss import GSS
from cl.strategies.hat import HAT
from cl.strategies.icarl import ICaRL
from cl.strategies.inflora import InfLoRA
from cl.strategies.joint import Joint
from cl.strategies.knn import KNN
from cl.strategies.l2p import L2P
from cl.strategies.lingocl import LingoCL
from cl.strategies.lora import LoRA
from cl.strategies.lst import LST
from cl.strategies.lucir import LUCIR
from cl.strategies.lwf import LwF
from cl.strategies.mas import MAS
from cl.strategies.mer import MER
from cl.strategies.mir import MIR
from cl.strategies.multilane import MultiLane
from cl.strategies.ncm import NCM
from cl.strategies.o_lora import OLoRA
from cl.strategies.ogd import OGD
from cl.strategies.online_ewc import OnlineEWC
from cl.strategies.packnet import PackNet
from cl.strategies.podnet import PODNet
from cl.strategies.ranpac import RanPAC
from cl.strategies.rwalk import RWalk
from cl.strategies.s_prompts import SPrompts
from cl.strategies.scalearn import ScaLearn
from cl.strategies.sd_lora import SDLoRA
from cl.strategies.sgp import SGP
from cl.strategies.si import SI
from cl.strategies.slca import SLCA
from cl.strategies.slda import SLDA
from cl.strategies.supsup import SupSup
from cl.strategies.tag import TAG
from cl.strategies.trgp import TRGP
from cl.strategies.uer import UER
from cl.strategies.wa import WA
from cl.strategies.zscl import ZSCL
from cl.testing import ToyBackbone
from cl.toolkit.memory import POLICIES, Memory

ONE = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)
TWO = partial(pl.Trainer, accelerator="cpu", devices=2, strategy="ddp", logger=False)
ROWS, TESTS, BATCH, CAPACITY = 41, 23, 8, 21  # none of them even; the last minibatch of an epoch has one row

EXACT: dict[str, Callable[[], Strategy]] = {  # what draws nothing of its own from rows that differ by process
    "finetune": Finetune,
    "ewc": partial(EWC, num_samples=20),
    "lwf": LwF,
    "gpm": partial(GPM, num_samples=20),
    "cumulative": Cumulative,
    "joint": Joint,
    "ncm": NCM,
    "l2p": L2P,
    "si": SI,
    "rwalk": partial(RWalk, interval=3),
    "mas": partial(MAS, num_samples=20),
    "online_ewc": partial(OnlineEWC, num_samples=20),
    "ogd": partial(OGD, num_samples=20),
    "sgp": partial(SGP, num_samples=20),
    "trgp": partial(TRGP, trust=0.1, num_samples=20),
    "cuber": partial(CUBER, sufficient=0.1, num_samples=20),
    "adam_nscl": partial(AdamNSCL, num_samples=20),
    "tag": TAG,
    "packnet": PackNet,
    "hat": HAT,
    "supsup": SupSup,
    "ranpac": partial(RanPAC, 30, ridge=1.0),
    "slda": SLDA,
    "fecam": FeCAM,
    "knn": KNN,
    "acil": partial(ACIL, 30),
    "dualprompt": partial(DualPrompt, general_blocks=(0,), expert_blocks=(0,)),
    "coda_prompt": partial(CODAPrompt, num_components=6, blocks=(0,)),
    "s_prompts": SPrompts,
    "multilane": partial(MultiLane, blocks=(0,)),
    "lora": partial(LoRA, rank=2),
    "o_lora": partial(OLoRA, rank=2),
    "inflora": partial(InfLoRA, rank=2, num_samples=20),
    "sd_lora": partial(SDLoRA, rank=2),
    "ease": partial(EASE, width=2),
    "aper": partial(APER, width=2),
    "slca": partial(SLCA, align_epochs=2, per_class=8),
    "lst": partial(LST, width=4),
    "scalearn": partial(ScaLearn, width=2),
    "lingocl": LingoCL,
    "feature_distillation": partial(FeatureDistillation, teacher=partial(MLP, hidden=[8]), folder=None),
}
PROMPTED = (L2P, DualPrompt, CODAPrompt, SPrompts, MultiLane)
TOLD = (TRGP, CUBER, PackNet, HAT, ScaLearn)  # the task, at test
REPLAYED: dict[str, Callable[[], Strategy]] = {
    **{policy: partial(ER, memory_size=CAPACITY, policy=policy) for policy in POLICIES},
    "few": partial(ER, memory_size=CAPACITY, batch_size=3),
    "derpp": partial(DERpp, memory_size=CAPACITY),
    "agem": partial(AGEM, memory_size=CAPACITY, batch_size=9),
    "er_ace": partial(ERACE, memory_size=CAPACITY),
    "uer": partial(UER, memory_size=CAPACITY),
    "der": partial(DER, memory_size=CAPACITY),
    "gss": partial(GSS, memory_size=CAPACITY, num_compared=4),
    "mer": partial(MER, memory_size=CAPACITY, beta=0.7, gamma=0.9),
    "er_las": partial(ERLAS, memory_size=CAPACITY, window=2),
    "aser": partial(ASER, memory_size=CAPACITY),
    "mir": partial(MIR, memory_size=CAPACITY),
    "gdumb": partial(GDumb, memory_size=CAPACITY),
}
AKIN: dict[str, Callable[[], Strategy]] = {  # whose losses compare the rows of one process, or which herd among them
    "zscl": partial(ZSCL, eta=5.0, every=3),
    "icarl": partial(ICaRL, memory_size=CAPACITY),
    "wa": partial(WA, memory_size=CAPACITY),
    "bic": partial(BiC, memory_size=CAPACITY),
    "lucir": partial(LUCIR, memory_size=CAPACITY),
    "podnet": partial(PODNet, memory_size=CAPACITY, num_proxies=2),
}
TARGETS = ("multilabel", "regression")
RESUMED = ("class_balanced", "few", "derpp", "agem", "er_ace", "uer", "der", "mir", "gdumb")


def stream(rows: int = ROWS, seed: int = 0, scenario: str = "class") -> Stream:
    draw = torch.Generator().manual_seed(seed)
    tasks = []
    for t in range(3):
        parts = []
        centres = torch.randint(30, 220, (2, 1, 4, 4), generator=draw)
        for n in (rows, TESTS):
            y = torch.arange(n) % 2
            noise = torch.randn(n, 1, 4, 4, generator=draw) * 40
            parts.append(TaskData((centres[y] + noise).clamp(0, 255).to(torch.uint8), y + 2 * t, t))
        tasks.append(Task(t, train=parts[0], test=parts[1], val=parts[1] if t == 0 else None))
    return Stream(tasks, scenario=scenario, num_classes=6)


def numbers(target: str) -> Stream:
    """Three tasks whose rows have several labels, or numbers."""
    draw = torch.Generator().manual_seed(1)
    tasks = []
    for t in range(3):
        parts = []
        for n in (ROWS, TESTS):
            x = torch.randn(n, 1, 4, 4, generator=draw)
            y = x.flatten(1)[:, t : t + 6] + 0.3
            parts.append(TaskData(x, (y > 0).float() if target == "multilabel" else y, t))
        tasks.append(Task(t, train=parts[0], test=parts[1]))
    return Stream(tasks, scenario="domain", num_classes=6, target=target)


class Normed(nn.Module):
    """A convolution and batch norm."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).relu()  # type: ignore[no-any-return]


def _stream(target: str, scenario: str) -> Stream:
    return stream(scenario=scenario) if target == "label" else numbers(target)


def learner(
    strategy: Strategy, body: Callable[[], nn.Module] = ToyBackbone, target: str = "label", **options: Any
) -> Learner:
    torch.manual_seed(3)
    if isinstance(strategy, PROMPTED):
        body = partial(ViT, (1, 4, 4), patch_size=2, dim=16, depth=1, heads=2)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    options = {"batch_size": BATCH, "chunk_size": 4, **options}
    scenario = "task" if isinstance(strategy, TOLD) else "class"
    return Learner(_stream(target, scenario), body(), {"it": strategy}, optimizer, **options)


class Keep(pl.Callback):
    """Keeps the weights and running statistics as a task's training leaves them, before anything is taken over."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Any]] = []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.trained.append({k: v.clone().numpy() for k, v in pl_module.trunk().state_dict().items()})  # type: ignore[operator]


def learn(made: Learner, folder: Path | None = None, trainer: Any = None, **options: Any) -> dict[str, Any]:
    """Run an experiment; return what a test compares, as numpy arrays, of every process."""
    trainer = trainer or (TWO if distributed.world_size() > 1 else ONE)
    keep = Keep()
    options = {"epochs": 2, "directory": folder, "callbacks": [keep], **options}
    experiment = Experiment(made, _stream(made.target.name, made.scenario), trainer, **options)
    experiment.run()
    memories = [m for m in made.strategies.modules() if isinstance(m, Memory)]
    mine = {
        "weights": {name: v.clone().numpy() for name, v in made.trunk().state_dict().items()},
        "trained": keep.trained,
        "R": {mask: m.R.clone().numpy() for mask, m in made.matrices.items()},
        "ece": {mask: m.R.clone().numpy() for mask, m in made.calibration.items()},
        "rows": [m.column("x")[: len(m)].clone().numpy() for m in memories],
        "draws": [float(m.random.generator.random()) for m in memories],
        "torch": float(torch.rand(())),
    }
    if distributed.world_size() == 1:
        return mine
    both: list[Any] = [None, None]
    torch.distributed.all_gather_object(both, mine)
    return {**mine, "ranks": both}


def sentence(act: Callable[[], Any]) -> str:
    try:
        act()
    except (InputError, DivergenceError) as error:
        return str(error)
    raise AssertionError("was not refused")


class Spy(Finetune):
    """Keeps the gradients of every optimizer step, as they come to be projected."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[np.ndarray] = []

    def project_gradients(self, learner: Learner) -> None:
        self.seen.append(torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None]).numpy())


def spied(**options: Any) -> list[np.ndarray]:
    trainer = {key: options.pop(key) for key in ("accumulate_grad_batches",) if key in options}
    made = learner(Spy(), **options)
    learn(made, trainer=partial(TWO if distributed.world_size() > 1 else ONE, **trainer))
    return made.strategies["it"].seen  # type: ignore[return-value]


SPIED: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 4},
    "clipped": {"gradient_clip": 0.05},
    "chunks": {"chunk_size": None},
}


def watched(made: Learner) -> dict[str, Any]:
    instruments = {"curves": LearningCurves(stream(), points=3), "probes": Probes(stream(), ["ridge", "cka"])}
    learn(made, instruments=instruments)
    curves, probes = instruments["curves"], instruments["probes"]
    return {"curves": curves.values().numpy(), **{k: m.R.numpy() for k, m in probes.matrices.items()}}


def interrupted(folder: Path, make: Callable[[], Strategy]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run to the end; take the newest checkpoint away; run again."""
    whole = learn(learner(make(), Normed), folder)
    if distributed.rank() == 0:
        (folder / "checkpoints" / "after_task_003.ckpt").unlink()
    torch.distributed.barrier()
    return whole, learn(learner(make(), Normed), folder)


def everything(folder: Path) -> dict[str, Any]:
    """All that two processes do for this file, so that they are started once."""
    found: dict[str, Any] = {name: learn(learner(make())) for name, make in {**EXACT, **REPLAYED, **AKIN}.items()}
    found |= {target: learn(learner(LwF(), target=target)) for target in TARGETS}
    found["normed"] = learn(learner(ER(CAPACITY), Normed))
    found["spied"] = {name: spied(**options) for name, options in SPIED.items()}
    found["watched"] = watched(learner(Finetune()))
    found["resumed"] = {name: interrupted(folder / name, REPLAYED[name]) for name in RESUMED}
    found["refused"] = {
        "memory": sentence(lambda: learner(ER(1))),
        "ring": sentence(lambda: learner(AGEM(memory_size=9))),
        "replay": sentence(lambda: learner(ER(20, batch_size=1))),
        "batch": sentence(lambda: learn(learner(Finetune(), batch_size=1))),
        "avalanche": sentence(lambda: learner(Avalanche())),
        "trainer": sentence(lambda: learn(learner(Finetune()), trainer=partial(TWO, devices=3))),
        "nan": sentence(lambda: fail("nan")),
        "checkpoint": sentence(lambda: learn(learner(ER(CAPACITY), Normed), folder / "one")),
    }
    return found


class Fails(Finetune):
    """Fails in one process, in the middle of a task."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def after_step(self, learner: Learner, batch: Batch, logits: Tensor) -> None:
        if learner.total_steps == 9 and distributed.rank() == 1:
            if self.how == "sentence":
                raise InputError("One process does not like this step: take another.")
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            learner.head.weight.data.fill_(torch.nan)


def fail(how: str) -> None:
    learn(learner(Fails(how)))
