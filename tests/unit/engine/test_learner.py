"""The engine against loops written by hand: training, evaluation, resuming, and what stops a run."""

from __future__ import annotations

import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import Logger
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from cl.backbones.networks import SimpleCNN
from cl.backbones.vit import ViT
from cl.data.augment import Normalize
from cl.data.task import SCENARIOS, Stream, Task, TaskData
from cl.engine import checkpoint
from cl.engine.batch import Batch
from cl.engine.experiment import Experiment
from cl.engine.head import competing
from cl.engine.learner import Learner
from cl.engine.loader import TrainLoader
from cl.engine.strategy import Strategy
from cl.errors import DivergenceError, InputError
from cl.random import derive
from cl.strategies.derpp import DERpp
from cl.strategies.er import ER
from cl.strategies.ewc import EWC
from cl.strategies.gpm import GPM
from cl.strategies.lwf import LwF
from cl.testing import ToyBackbone, toy_learner, toy_stream

trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)


def weights(learner: Learner) -> list[torch.Tensor]:
    return [p.detach().clone() for p in learner.parameters()]


def learn(strategies=None, epochs=2, callbacks=(), **options) -> Learner:
    learner, stream = toy_learner(strategies or {}, **options)
    Experiment(learner, stream, trainer, epochs=epochs, callbacks=callbacks).run()
    return learner


def loop_by_hand(scenario: str, epochs: int, momentum: float = 0.0, accumulate: int = 1) -> list[torch.Tensor]:
    """What fine-tuning is: plain PyTorch, no engine; only the order of the examples is looked up."""
    stream = toy_stream(3, scenario)
    torch.manual_seed(0)
    net = nn.Sequential(ToyBackbone(), nn.Linear(16, stream.num_classes))
    seen: set[int] = set()
    for task in stream:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum)
        x, y, _ = task.train.tensors()
        seen |= set(task.classes)
        allowed = {"class": seen, "task": set(task.classes), "domain": set(range(stream.num_classes))}[scenario]
        closed = [c for c in range(stream.num_classes) if c not in allowed]
        for epoch in range(epochs):
            rows = np.random.default_rng(derive(derive(0, "task", task.index), "order", epoch)).permutation(len(y))
            for start in range(0, len(rows), 8):
                batch = rows[start : start + 8]
                logits = net(x[batch].float() / 255)
                logits[:, closed] = -torch.inf
                number = start // 8
                if number % accumulate == 0:
                    optimizer.zero_grad()
                together = min(accumulate, -(-len(rows) // 8) - number // accumulate * accumulate)  # of this update
                (F.cross_entropy(logits, y[batch]) / together).backward()
                if (number + 1) % accumulate == 0 or start + 8 >= len(rows):
                    optimizer.step()
    return list(net.parameters())


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_finetuning_is_the_loop_written_by_hand_to_the_bit(scenario):
    for ours, theirs in zip(weights(learn(scenario=scenario)), loop_by_hand(scenario, 2), strict=True):
        assert torch.equal(ours, theirs)


def test_the_optimizer_starts_anew_at_each_task():
    stream = toy_stream(3)
    torch.manual_seed(0)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    learner = Learner(stream, ToyBackbone(), {}, optimizer, batch_size=8)
    Experiment(learner, stream, trainer, epochs=2).run()
    for ours, theirs in zip(weights(learner), loop_by_hand("class", 2, momentum=0.9), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_results_do_not_depend_on_the_chunk(chunk_size):
    def make():
        return {"er": ER(memory_size=10), "ewc": EWC(), "lwf": LwF()}

    for a, b in zip(weights(learn(make())), weights(learn(make(), chunk_size=chunk_size)), strict=True):
        assert torch.equal(a, b)


class Listener(pl.Callback):
    """A callback that Lightning must be asked to call, which takes the learner off its short path."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append(trainer.global_step)


def test_callbacks_around_the_step_are_called_and_change_nothing():
    listener = Listener()
    heard = learn({"er": ER(memory_size=10)}, callbacks=[listener], gradient_clip=0.5)
    plain = learn({"er": ER(memory_size=10)}, gradient_clip=0.5)
    assert all(torch.equal(a, b) for a, b in zip(weights(heard), weights(plain), strict=True))
    assert listener.steps == list(range(12)) * 3  # 48 rows / 8 * 2 epochs, in each of three tasks


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("accumulate", [2, 4, 6])
def test_accumulation_is_the_loop_written_by_hand_to_the_bit(accumulate, listening, chunk_size):
    """Six minibatches an epoch: with four at a time, the last two make a step of their own."""
    learner, stream = toy_learner(chunk_size=chunk_size)
    listener = Listener()
    job = partial(trainer, accumulate_grad_batches=accumulate)
    Experiment(learner, stream, job, epochs=2, callbacks=[listener] if listening else []).run()
    for ours, theirs in zip(weights(learner), loop_by_hand("class", 2, accumulate=accumulate), strict=True):
        assert torch.equal(ours, theirs)
    assert not listening or len(listener.steps) == 3 * 2 * -(-6 // accumulate)


@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(10, 10), (7, 3), (9, 4), (48, 2), (5, 100)])
def test_minibatches_of_one_update_are_one_big_batch(batch_size, accumulate, replay, listening):
    """The mean over all their rows: short last minibatches, cut groups and rows that were replayed are in it."""

    class Double(Strategy):
        def extend_batch(self, learner: Learner, batch: Batch) -> Batch:
            odd = (batch.y % 2).nonzero().flatten()  # as many as there happen to be
            return batch.append(batch.take(odd)) if replay else batch

        def loss(self, learner: Learner, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
            return 0.1 * sum(p.square().sum() for p in learner.trunk().parameters())

    kept = []
    for size, several in ((batch_size, accumulate), (batch_size * accumulate, 1)):
        stream = toy_stream(3, "class")
        torch.manual_seed(0)
        optimizer = partial(torch.optim.SGD, lr=0.1)
        learner = Learner(stream, ToyBackbone(), {"method": Double()}, optimizer, batch_size=size).double()
        job = partial(trainer, accumulate_grad_batches=several)
        Experiment(learner, stream, job, epochs=2, callbacks=[Listener()] if listening else []).run()
        kept.append(weights(learner))
    for one, other in zip(*kept, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize(("limit", "steps"), [(4, 4), (100, 6), (0.5, 3), (0.1, 1), (1.0, 6)])
def test_lightnings_limit_counts_minibatches_whatever_the_chunk(limit, steps, chunk_size):
    learner, stream = toy_learner(chunk_size=chunk_size)
    Experiment(learner, stream, partial(trainer, limit_train_batches=limit), epochs=2).run()
    assert learner.total_steps == 3 * 2 * steps


def test_lightnings_clipping_is_refused_since_strategies_project_first():
    learner, stream = toy_learner()
    with pytest.raises(InputError, match=r"trainer\.gradient_clip_val=0\.5: use gradient_clip"):
        Experiment(learner, stream, partial(trainer, gradient_clip_val=0.5)).run()


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 64])
def test_curves_are_means_over_exactly_so_many_steps_whatever_the_chunk(chunk_size):
    class Points(Logger):
        name, version = "points", 0

        def __init__(self) -> None:
            super().__init__()
            self.points: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics, step=None):
            self.points.append((step, dict(metrics)))

        def log_hyperparams(self, params, *args, **kwargs):
            pass

    class Counts(Strategy):
        """A term of 1, 2, 3, ... that starts with the second step, so that the first point has one step fewer."""

        def loss(self, learner, batch, logits):
            return None if learner.total_steps == 0 else logits.sum() * 0 + learner.total_steps

    points = Points()
    learner, stream = toy_learner({"counts": Counts()}, num_tasks=2, chunk_size=chunk_size, log_every=4, lr=0.0)
    Experiment(learner, stream, partial(pl.Trainer, accelerator="cpu"), epochs=1, logger=[points]).run()
    ours = [(step, m["train/counts"], m["train/task"]) for step, m in points.points if "train/counts" in m]
    assert ours == [(4, 2.0, 1), (6, 4.5, 1), (10, 7.5, 2), (12, 10.5, 2)]


@pytest.mark.parametrize(("seconds", "sizes"), [(0.01, [1, 2, 4, 8, 16, 32, 64, 64]), (0.2, [1] * 8)])
def test_chunks_grow_while_they_are_brisk(seconds, sizes, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("cl.engine.loader.time.perf_counter", lambda: next(clock) * seconds)
    y = torch.arange(1000)
    loader = TrainLoader(TaskData(y, y), 2, None, 500, 0, lambda: 0, y.device)
    assert [len(chunk) for chunk in loader][:8] == sizes
    assert sorted(int(v) for chunk in loader for batch in chunk for v in batch.y) == list(range(1000))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_training_agrees_with_eager_training():
    """With teachers copied from compiled networks, layers hooked and gradients of single examples."""
    from torch._dynamo.utils import counters

    def strategies():
        return {"er": ER(20), "lwf": LwF(), "ewc": EWC(), "gpm": GPM()}

    eager = weights(learn(strategies()))
    counters.clear()
    learner, stream = toy_learner(strategies())
    learner.compile()
    Experiment(learner, stream, trainer, epochs=2).run()
    assert counters["frames"]["ok"] > 0, "nothing was compiled"
    for a, b in zip(eager, weights(learner), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"no mode of torch\.compile called 'fast'"):
        learner.compile("fast")


def test_stacks_of_convolutions_get_channels_last_images_with_the_same_answers():
    x = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    data = TaskData(x, torch.arange(5) % 2)
    stream = Stream([Task(0, data, data)], num_classes=2, normalize=Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.1]))
    for backbone, last in (
        (SimpleCNN((3, 8, 8)), True),
        (ViT((3, 8, 8), patch_size=4, dim=8, depth=1, heads=2), False),
    ):
        learner = Learner(stream, backbone, {}, partial(torch.optim.SGD, lr=0.1)).eval()
        view = learner.prepare(x)
        assert view.is_contiguous(memory_format=torch.channels_last) == last
        plain = stream.normalize(x)
        assert torch.equal(view, plain), "the same numbers in the same places"
        torch.testing.assert_close(learner(view), learner(plain), rtol=1e-4, atol=1e-5)


def test_clipping_bounds_the_step():
    norms = []

    class Measure(Strategy):
        def before_task(self, learner, task):
            norms.append(torch.cat([p.detach().flatten().clone() for p in learner.parameters()]))

        def after_step(self, learner, batch, logits):
            norms.append(torch.cat([p.detach().flatten().clone() for p in learner.parameters()]))

    learn({"measure": Measure()}, gradient_clip=0.01, num_tasks=1)
    steps = [float((b - a).norm()) for a, b in pairwise(norms)]
    assert max(steps) <= 0.1 * 0.01 * (1 + 1e-4)


def test_each_row_of_R_is_what_torchmetrics_says_under_both_masks():
    learner, stream = toy_learner(num_tasks=3, eval_batch_size=7)
    rows = []

    experiment = Experiment(learner, stream, trainer, epochs=1)
    for task in stream:
        experiment.learn(task)
        experiment.evaluate()
        row = {"class": [], "task": []}
        seen = {c for t in stream[: task.index + 1] for c in t.classes}
        for other in stream:
            x, y, _ = other.test.tensors()
            with torch.no_grad():
                logits = learner(x.float() / 255)
            for mask, allowed in (
                ("class", seen if set(other.classes) <= seen else set(range(6))),
                ("task", set(other.classes)),
            ):
                closed = [c for c in range(6) if c not in allowed]
                masked = logits.clone()
                masked[:, closed] = -torch.inf
                row[mask].append(multiclass_accuracy(masked.argmax(1), y, num_classes=6, average="micro"))
        rows.append(row)
    for mask in ("class", "task"):
        expected = torch.stack([torch.stack(row[mask]) for row in rows])
        assert torch.allclose(learner.matrices[mask].R[1:], expected, atol=1e-6)


def test_the_mask_of_unseen_classes_leaves_them_no_gradient():
    learner, stream = toy_learner(num_tasks=3)
    before = learner.head.weight.detach().clone()
    Experiment(learner, stream, trainer, epochs=1).learn(stream[0])
    assert torch.equal(before[2:], learner.head.weight[2:])
    assert not torch.equal(before[:2], learner.head.weight[:2])


def test_train_mask_is_what_competes_in_the_loss():
    whole, stream = toy_learner(num_tasks=3, train_mask="domain")
    Experiment(whole, stream, trainer, epochs=1).learn(stream[0])
    start, _ = toy_learner(num_tasks=3)
    assert not torch.equal(start.head.weight[2:], whole.head.weight[2:])
    with pytest.raises(InputError, match="train_mask='nobody'"):
        toy_learner(train_mask="nobody")


def test_competing_classes_are_those_of_the_scenario():
    member = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    seen = member[0]
    assert competing("class", seen, member).tolist() == [[True, True, False, False], [True] * 4]
    assert competing("task", seen, member).equal(member)
    assert competing("domain", seen, member).all()


def test_the_order_is_a_function_of_seed_task_and_epoch():
    y = torch.arange(20)

    def order(seed: int, epoch: int) -> list[int]:
        loader = TrainLoader(TaskData(y, y), 6, 2, 4, seed, lambda: epoch, y.device)
        return [int(v) for chunk in loader for batch in chunk for v in batch.y]

    assert sorted(order(0, 0)) == list(range(20))
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)


class Noise(nn.Module):
    """An augmentation that draws."""

    def forward(self, x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        return x.float() + torch.from_numpy(rng.normal(size=len(x))).float().view(-1, 1, 1, 1)


def noisy_stream() -> Stream:
    return Stream(list(toy_stream(3)), num_classes=6, augment=Noise())


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path):
    """With replay, augmentation and dropout, all of which draw."""

    def experiment(folder: Path) -> Experiment:
        torch.manual_seed(0)
        body = ToyBackbone()
        body.layers.append(nn.Dropout(0.3))
        strategies = {"er": ER(memory_size=10), "lwf": LwF()}
        learner = Learner(noisy_stream(), body, strategies, partial(torch.optim.SGD, lr=1e-3), batch_size=8)
        return Experiment(learner, noisy_stream(), trainer, epochs=2, directory=folder)

    whole = experiment(tmp_path / "whole")
    whole.run()
    (tmp_path / "part" / "checkpoints").mkdir(parents=True)
    name = "checkpoints/after_task_001.ckpt"
    (tmp_path / "part" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    part = experiment(tmp_path / "part")
    part.run()
    for (key, a), b in zip(whole.learner.state_dict().items(), part.learner.state_dict().values(), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), key
    assert part.learner.total_steps == whole.learner.total_steps == 36


def test_a_finished_run_is_left_as_it_is(tmp_path: Path):
    for _ in range(2):
        learner, stream = toy_learner(num_tasks=2)
        Experiment(learner, stream, trainer, epochs=1, directory=tmp_path).run()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"after_task_{k:03d}.ckpt" for k in range(3)
    ]


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path):
    learner, _ = toy_learner(num_tasks=2)
    path = checkpoint.save(learner, tmp_path)
    other, _ = toy_learner({"er": ER(memory_size=10)}, num_tasks=2)
    with pytest.raises(InputError, match="does not fit this configuration"):
        checkpoint.load(other, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="does not fit this configuration"):
        checkpoint.load(learner, path)


class Explode(Strategy):
    """Loss becomes infinite at a known step."""

    def loss(self, learner, batch, logits):
        bad = learner.tasks_learned == 1 and learner.current_epoch == 1
        return logits.sum() * (torch.inf if bad else 0.0)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path: Path):
    learner, stream = toy_learner({"explode": Explode()})
    with pytest.raises(DivergenceError, match="task 2 of 3, epoch 2, step 7 of the task"):
        Experiment(learner, stream, trainer, epochs=2, directory=tmp_path).run()
    assert checkpoint.latest(tmp_path / "checkpoints").name == "after_task_001.ckpt"


def test_two_owners_of_one_hook_are_named():
    class Other(Strategy):
        def predict(self, learner, view):
            return learner(view)

    with pytest.raises(InputError, match=r"'a' and 'b' both define predict"):
        toy_learner({"a": Other(), "b": Other()})


def test_loss_terms_add_and_batches_chain_in_order():
    sizes, terms = [], []

    class Twice(Strategy):
        def extend_batch(self, learner, batch):
            return batch.append(batch)

        def loss(self, learner, batch, logits):
            terms.append(1.0)
            return logits.sum() * 0 + 1.0

        def after_step(self, learner, batch, logits):
            sizes.append((len(batch), len(logits)))

    class Count(Strategy):
        def criterion(self, learner, batch, logits):
            assert len(batch) == 4 * batch.num_incoming
            assert batch.view is not None and len(batch.view) == len(logits) == len(batch)
            return learner.criterion(logits, batch)

    learner, stream = toy_learner({"one": Twice(), "count": Count(), "two": Twice()}, num_tasks=1)
    Experiment(learner, stream, trainer).run()
    assert sizes == [(8, 8)] * 12 and len(terms) == 12
    assert 2.0 < float(learner.last_loss) < 2.0 + 3.0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_encoder_is_told_task_labels_in_training_and_where_the_scenario_gives_them(scenario):
    class Spy(Strategy):
        told: ClassVar[list] = []

        def encode(self, learner, view):
            self.told.append(None if learner.task_labels is None else learner.task_labels.tolist())
            assert learner.task_labels is None or len(learner.task_labels) == len(view)
            return learner.backbone(view)

    learner, stream = toy_learner({"spy": Spy(), "er": ER(20), "derpp": DERpp(20)}, scenario=scenario)
    experiment = Experiment(learner, stream, trainer, epochs=1)
    for task in list(stream)[:2]:
        experiment.learn(task)
    told = learner.strategies["spy"].told
    assert told[0] == [0] * 8 and told[-3][:8] == [1] * 8 and None not in told
    assert all(set(told[i][8:]) <= {0, 1} and set(told[i]) <= {0, 1} for i in (-1, -2, -3))
    x, y, label = stream[0].test.tensors()
    batch = Batch(x, y, label)
    learner.predict(batch)
    assert told[-1] == ([0] * len(y) if scenario == "task" else None)
    learner(learner.prepare(x))
    assert told[-1] is None, "rows of the present task"
    learner.features(x, label)
    assert told[-1] == ([0] * len(y) if scenario == "task" else None)


def test_schedules_step_once_an_epoch_and_start_anew():
    rates = []

    class Watch(Strategy):
        def after_step(self, learner, batch, logits):
            rates.append(learner.optimizers().param_groups[0]["lr"])

    stream = toy_stream(2)
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    learner = Learner(
        stream, ToyBackbone(), {"watch": Watch()}, partial(torch.optim.SGD, lr=0.4), schedule, batch_size=48
    )
    Experiment(learner, stream, trainer, epochs=3).run()
    assert rates == [0.4, 0.2, 0.1] * 2


def test_a_frozen_learner_measures_and_trains_nothing():
    learner, stream = toy_learner(num_tasks=2)
    learner.requires_grad_(False)
    before = weights(learner)
    run = Experiment(learner, stream, trainer).run()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(learner), strict=True))
    assert bool(torch.isfinite(run.matrices["class"].R).all())


def test_validation_is_measured_by_rows_and_never_augmented():
    base = toy_stream(1)[0]
    rows = torch.arange(48)
    task = Task(0, base.train.take(rows[:38]), base.test, base.train.take(rows[38:]))
    stream = Stream([task], num_classes=2, augment=Noise())
    learner = Learner(stream, ToyBackbone(), {}, partial(torch.optim.SGD, lr=1e-3), batch_size=8, eval_batch_size=4)
    seen = {}

    class Keep(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.update({k: float(v) for k, v in trainer.callback_metrics.items()})

    Experiment(learner, stream, trainer, callbacks=[Keep()]).run()
    x, y, _ = task.val.tensors()
    with torch.no_grad():
        logits = learner(x.float() / 255)
    assert seen["val/loss"] == pytest.approx(float(F.cross_entropy(logits, y)), abs=1e-6)
    assert seen["val/accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()), abs=1e-6)


def test_more_than_one_device_is_refused():
    learner, stream = toy_learner()
    two = partial(pl.Trainer, accelerator="cpu", devices=2, logger=False)
    with pytest.raises(InputError, match="one device"):
        Experiment(learner, stream, two).run()


@pytest.mark.parametrize("empty", ["train", "test"])
def test_an_empty_task_is_refused_before_training(empty):
    whole = toy_stream(2)
    none = whole[1].train.take(torch.arange(0))
    parts = {"train": whole[1].train, "test": whole[1].test, empty: none}
    stream = Stream([whole[0], Task(1, **parts)], num_classes=4)
    with pytest.raises(InputError, match=f"The {empty} set of task 1 .* is empty"):
        stream.check()


def test_labels_out_of_range_and_classes_in_two_tasks_are_refused():
    stream = Stream(list(toy_stream(2)), num_classes=3)
    with pytest.raises(InputError, match=r"label 3, outside 0\.\.2"):
        stream.check()
    first = toy_stream(2)[0]
    second = Task(1, TaskData(first.train.x, first.train.y, 1), TaskData(first.test.x, first.test.y, 1))
    with pytest.raises(InputError, match="Class 0 is in tasks 0 and 1"):
        Stream([first, second], num_classes=2).check()
    Stream([first, second], num_classes=2, scenario="domain").check()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains_and_keeps_R_whole(precision):
    from cl.strategies.agem import AGEM
    from cl.strategies.derpp import DERpp
    from cl.strategies.gpm import GPM
    from cl.strategies.ncm import NCM

    for make in (lambda: DERpp(10), EWC, LwF, GPM, lambda: AGEM(40), lambda: NCM(freeze=False)):
        learner, stream = toy_learner({"method": make()}, scenario="task")
        half = partial(trainer, precision=precision)
        run = Experiment(learner, stream, half, epochs=5).run()
        assert run.matrices["class"].R.dtype == torch.float32
        assert float(run.matrices["task"].R.diagonal(-1).mean()) > 0.7, type(learner.strategies["method"]).__name__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_gpu_learns_what_the_cpu_learns(precision):
    from cl.strategies.agem import AGEM
    from cl.strategies.derpp import DERpp
    from cl.strategies.gpm import GPM
    from cl.strategies.ncm import NCM

    for make in (lambda: ER(20), lambda: DERpp(20), lambda: AGEM(40), EWC, LwF, GPM, NCM):
        rows = []
        for accelerator in ("cpu", "gpu"):
            learner, stream = toy_learner({"method": make()}, scenario="task")
            on = partial(pl.Trainer, accelerator=accelerator, devices=1, logger=False, precision=precision)
            rows.append(Experiment(learner, stream, on, epochs=5).run().matrices["task"].R.cpu())
        assert torch.allclose(rows[0].mean(), rows[1].mean(), atol=0.05), type(make()).__name__


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 64])
def test_a_hook_sees_the_step_it_is_at(chunk_size):
    steps = []

    class Watch(Strategy):
        def after_step(self, learner, batch, logits):
            steps.append(learner.step)

    learn({"watch": Watch()}, num_tasks=2, chunk_size=chunk_size)
    assert steps == list(range(1, 13)) * 2


def test_an_owner_of_classify_maps_features_to_logits_everywhere():
    class Doubled(Strategy):
        def classify(self, learner, features):
            return 2 * learner.head(features)

    learner, stream = toy_learner({"doubled": Doubled()})
    x, y, task = stream[0].test.tensors()
    expected = 2 * learner.head(learner.backbone(learner.prepare(x)))
    assert torch.equal(learner(learner.prepare(x)), expected)
    assert torch.equal(learner.predict(Batch(x, y, task)), expected)
    with pytest.raises(InputError, match="'a' and 'b' both define classify, which has one owner"):
        toy_learner({"a": Doubled(), "b": Doubled()})
