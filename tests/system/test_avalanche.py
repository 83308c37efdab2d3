"""Avalanche both ways: its benchmarks as our streams, ours as its benchmarks, its strategies under our protocol."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import TensorDataset

from cl.data.avalanche import preparation, quietly, to_avalanche, to_experience, to_network
from cl.data.rows import Items
from cl.data.sources import digits
from cl.data.task import Stream, Task, TaskData
from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.errors import DivergenceError, InputError
from cl.random import derive
from cl.strategies.avalanche import Avalanche
from cl.strategies.er import ER
from cl.streams.avalanche import avalanche
from cl.streams.split import split
from cl.testing import ToyBackbone, check_strategy, check_stream, toy_learner, toy_run, toy_stream

with quietly():  # a missing solver, at import
    from avalanche.benchmarks import (
        CLExperience,
        CLScenario,
        EagerCLStream,
        benchmark_from_datasets,
        benchmark_with_validation_stream,
        class_incremental_benchmark,
        data_incremental_benchmark,
        nc_benchmark,
        new_instances_benchmark,
        ni_benchmark,
        task_incremental_benchmark,
    )
    from avalanche.benchmarks.utils import TransformGroups, as_classification_dataset
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training import Naive
    from avalanche.training.plugins import EvaluationPlugin

DIGITS = digits()
TRAINER = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False)


class Net(nn.Module):
    num_features = 32

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


def learner_of(stream: Stream, strategies=None, **options) -> Learner:
    torch.manual_seed(0)
    options = {"batch_size": 16, "seed": 7, **options}
    return Learner(stream, Net(), strategies or {}, partial(torch.optim.SGD, lr=0.1), **options)


def in_scenario(stream: Stream, scenario: str, **changes) -> Stream:
    return stream.derive(stream.__getitem__, scenario=scenario, **changes)


def tensors(x: torch.Tensor, y: torch.Tensor, transform=None, eval_transform=None):
    """Rows as an Avalanche dataset, by Avalanche's own means."""
    source = TensorDataset(x, y)
    source.targets = y.tolist()
    groups = TransformGroups({"train": transform, "eval": eval_transform or transform})
    return as_classification_dataset(source, transform_groups=groups)


def digits_side(side: str, **options):
    return tensors(getattr(DIGITS, f"{side}_x"), getattr(DIGITS, f"{side}_y"), **options)


def plain(side: str) -> TensorDataset:
    source = TensorDataset(getattr(DIGITS, f"{side}_x").float() / 255, getattr(DIGITS, f"{side}_y"))
    source.targets = source.tensors[1]
    return source


# ------------------------------------------------------------------ parity


def naive_by_hand(stream: Stream, learner: Learner) -> tuple[torch.Tensor, nn.Module]:
    """Avalanche's Naive in a loop by hand, from the learner's first weights, over the rows in the learner's order."""
    prepared = [[column for column in task.test.tensors()] for task in stream]
    ordered = []
    for t, task in enumerate(stream):
        seed = derive(derive(learner.seed, "task", t), "order", 0)
        rows = torch.from_numpy(np.random.default_rng(seed).permutation(len(task.train)))
        x, y, _ = task.train.take(rows).tensors()
        ordered.append(tensors(stream.normalize(x), y))
    tests = [tensors(stream.normalize(x), y) for x, y, _ in prepared]
    network = nn.Sequential(copy.deepcopy(learner.backbone), copy.deepcopy(learner.head))
    with quietly():
        benchmark = benchmark_from_datasets(train=ordered, test=tests)
        naive = Naive(
            model=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
            train_mb_size=learner.batch_size,
            eval_mb_size=512,
            evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
        )
        rows = [naive.eval(benchmark.test_stream)]
        for experience in benchmark.train_stream:
            naive.train(experience, eval_streams=[], shuffle=False)
            rows.append(naive.eval(benchmark.test_stream))
    R = [[row[key] for key in sorted(row) if key.startswith("Top1_Acc_Exp/eval")] for row in rows]
    return torch.tensor(R, dtype=torch.float64), network


def test_naive_and_fine_tuning_are_the_same_training():
    # Naive knows one loss, over all outputs: the domain-incremental scenario, where all classes compete.
    stream = in_scenario(split(DIGITS, num_tasks=5), "domain")
    learner = learner_of(stream)
    R, network = naive_by_hand(stream, learner)
    run = Experiment(learner, stream, TRAINER, epochs=1).run()
    assert torch.allclose(run.matrices["domain"].R.double(), R, rtol=0, atol=1e-6)
    assert R.diagonal(-1).mean() > 0.9 and R[-1, 0] < 0.5, "it learns and forgets"
    for ours, theirs in zip(learner.trunk().parameters(), network.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("scenario", "train_mask"), [("class", "domain"), ("class", "task"), ("task", None), ("domain", None)]
)
def test_naive_under_our_protocol_is_fine_tuning(scenario, train_mask):
    # Without boundaries rows are trained on in their order, by us and by Avalanche.
    stream = split(DIGITS, num_tasks=5, scenario=scenario, val_fraction=0.5)
    stream = stream.derive(stream.__getitem__, boundaries=False)
    results = []
    for strategies in ({}, {"avalanche": Avalanche(epochs=2)}):
        learner = learner_of(stream, strategies, train_mask=train_mask)
        run = Experiment(learner, stream, TRAINER, epochs=2).run()
        results.append((run.matrices, learner.trunk().state_dict()))
    (ours, weights), (theirs, their_weights) = results
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].R, theirs[name].R)
    assert ours[scenario].R.diagonal(-1).mean() > 0.8
    for name, value in weights.items():
        assert torch.allclose(value, their_weights[name], rtol=0, atol=1e-5)


def test_a_shuffled_epoch_of_one_batch_is_fine_tuning():
    stream = toy_stream(3)
    results = []
    for strategies in ({}, {"avalanche": Avalanche(epochs=5)}):
        learner, _ = toy_learner(strategies, train_mask="domain")
        learner.batch_size = 48
        for strategy in strategies.values():
            strategy._inner.train_mb_size = 48
        results.append(Experiment(learner, stream, TRAINER, epochs=5).run().matrices["class"].R)
    assert torch.equal(*results)


# ------------------------------------------------------------------ benchmarks as streams


def centred(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 128 - 1


def trained(stream: Stream) -> torch.Tensor:
    run = Experiment(learner_of(stream), stream, TRAINER, epochs=1).run()
    R = run.matrices[stream.scenario].R
    assert torch.isfinite(R).all()
    return R


def by_image(stream: Stream, part: str) -> dict[bytes, set[tuple[int, int]]]:
    """Each image's (task, label) pairs."""
    found: dict[bytes, set[tuple[int, int]]] = {}
    for task in stream:
        x, y, t = getattr(task, part).tensors()
        for row, label, index in zip(x, y.tolist(), t.tolist(), strict=True):
            found.setdefault(row.numpy().tobytes(), set()).add((index, label))
    return found


def original(side: str, transform=lambda x: x) -> dict[bytes, int]:
    x, y = transform(getattr(DIGITS, f"{side}_x")), getattr(DIGITS, f"{side}_y")
    return {row.numpy().tobytes(): label for row, label in zip(x, y.tolist(), strict=True)}


def test_a_class_incremental_benchmark_keeps_order_labels_and_transforms():
    with quietly():
        benchmark = nc_benchmark(
            plain("train"),
            plain("test"),
            5,
            task_labels=False,
            seed=3,
            train_transform=lambda x: 2 * x,
            eval_transform=lambda x: 3 * x,
        )
    stream = avalanche(benchmark)
    check_stream(lambda: avalanche(benchmark))
    assert stream.scenario == "class" and stream.num_classes == 10 and not stream.repeats
    expected = [tuple(sorted(c)) for c in benchmark.original_classes_in_exp]
    assert [task.classes for task in stream] == expected != sorted(expected)
    for part, factor in (("train", 2), ("test", 3)):
        images = by_image(stream, part)
        assert {row: {label} for row, label in original(part, lambda x, f=factor: f * (x.float() / 255)).items()} == {
            row: {label for _, label in pairs} for row, pairs in images.items()
        }
        assert all(label in expected[t] for pairs in images.values() for t, label in pairs)
    assert trained(stream).diagonal(-1).mean() > 0.8


@pytest.mark.parametrize("kind", ["ni", "new instances", "data-incremental"])
def test_where_one_test_experience_stands_for_all_every_task_tests_on_it(kind):
    with quietly():
        if kind == "ni":
            benchmark = ni_benchmark(plain("train"), plain("test"), 3, seed=0, balance_experiences=True)
        elif kind == "new instances":
            sides = [digits_side(side, transform=centred) for side in ("train", "test")]
            benchmark = new_instances_benchmark(*sides, num_experiences=3, balance_experiences=True)
        else:
            whole = nc_benchmark(plain("train"), plain("test"), 1, task_labels=False)
            benchmark = data_incremental_benchmark(whole, 500, shuffle=True)
    stream = avalanche(benchmark)
    check_stream(stream)
    assert stream.scenario == "domain" and stream.num_classes == 10
    assert sum(len(task.train) for task in stream) == len(DIGITS.train_y)
    labels = original("train", centred if kind == "new instances" else lambda x: x.float() / 255)
    assert {row: {y for _, y in pairs} for row, pairs in by_image(stream, "train").items()} == {
        row: {y} for row, y in labels.items()
    }
    first = stream[0].test.tensors()
    assert len(first[1]) == len(DIGITS.test_y)
    for task in stream:
        assert torch.equal(task.test.tensors()[0], first[0]) and torch.equal(task.test.tensors()[1], first[1])
    R = trained(stream)
    assert torch.equal(R, R[:, :1].expand_as(R)) and R.max() > 0.5


def test_one_test_experience_of_a_class_incremental_benchmark_is_shared_out_by_class():
    with quietly():
        whole = class_incremental_benchmark(
            {side: digits_side(side, transform=centred) for side in ("train", "test")},
            num_experiences=5,
            class_order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
        )
        test = EagerCLStream("test", [to_experience(TaskData(DIGITS.test_x, DIGITS.test_y), 0, [range(10)])])
        test.exps_iter[0]._dataset = digits_side("test", transform=centred)
        benchmark = CLScenario([whole.streams["train"], test])
    stream, paired = avalanche(benchmark), avalanche(whole)
    check_stream(stream)
    assert [task.classes for task in stream] == [(8, 9), (6, 7), (4, 5), (2, 3), (0, 1)]
    assert by_image(stream, "test") == by_image(paired, "test")


def of_classes(side: str, *classes: int, part: slice = slice(None)):
    """The digits of some classes, or some of them."""
    x, y = getattr(DIGITS, f"{side}_x"), getattr(DIGITS, f"{side}_y")
    rows = torch.isin(y, torch.tensor(classes)).nonzero().flatten()[part]
    return tensors(x[rows], y[rows])


@pytest.mark.parametrize("shape", ["one complete", "growing", "one a task"])
def test_test_sets_with_classes_of_other_tasks_are_tested_by_ones_own(shape):
    """As in NICv2 of CORe50: the first experience has ten classes, every later one a class that may come again."""
    plan = [(0, 1, 2), (3,), (1,), (3,)] if shape == "one complete" else [(0, 1), (2,), (3,)]
    seen = [sorted({c for own in plan[: t + 1] for c in own}) for t in range(len(plan))]
    tested = {"one complete": [(0, 1, 2, 3)], "growing": seen, "one a task": [(0, 1, 2, 3)] * len(plan)}[shape]
    with quietly():
        train = [of_classes("train", *own, part=slice(t, None, len(plan))) for t, own in enumerate(plan)]
        benchmark = benchmark_from_datasets(train=train, test=[of_classes("test", *own) for own in tested])
    with pytest.raises(InputError, match=r"The test set of experience [01] has classes \[.*set stream.tests=own"):
        avalanche(benchmark)
    stream = avalanche(benchmark, tests="own")
    stream.check()
    assert stream.scenario == ("domain" if shape == "one complete" else "class")
    for task, own in zip(stream, plan, strict=True):
        assert task.classes == own and torch.equal(task.test.labels.unique(), torch.tensor(own))
        assert len(task.test) == sum(int((DIGITS.test_y == c).sum()) for c in own)
    assert trained(stream).isfinite().all()
    with pytest.raises(InputError, match="no tests called 'mine'"):
        avalanche(benchmark, tests="mine")


@pytest.mark.parametrize("how", ["class ids from zero", "task-incremental", "pairs of one head"])
def test_labels_of_tasks_of_their_own_do_not_collide(how):
    with quietly():
        sides = {side: digits_side(side, transform=centred) for side in ("train", "test")}
        if how == "class ids from zero":
            benchmark = nc_benchmark(
                *sides.values(), 5, task_labels=True, class_ids_from_zero_in_each_exp=True, shuffle=False
            )
        elif how == "task-incremental":
            benchmark = task_incremental_benchmark(
                class_incremental_benchmark(sides, num_experiences=5, class_order=list(range(10)))
            )
        else:
            labels = {side: getattr(DIGITS, f"{side}_y") for side in sides}
            parts = {
                side: [
                    to_experience(
                        TaskData(centred(getattr(DIGITS, f"{side}_x")), y % 6, y // 6).take(rows), t, [], True
                    )
                    for t, rows in enumerate((y // 2 == pair).nonzero().flatten() for pair in range(5))
                ]
                for side, y in labels.items()
            }
            benchmark = CLScenario([EagerCLStream(side, found) for side, found in parts.items()])
    stream = avalanche(benchmark)
    check_stream(stream)
    assert stream.scenario == "task" and stream.num_classes == 10
    assert [task.classes for task in stream] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    for side in ("train", "test"):
        assert by_image(stream, side) == {row: {(y // 2, y)} for row, y in original(side, centred).items()}
    assert trained(stream).diagonal(-1).mean() > 0.9


def test_experiences_of_one_task_label_share_its_labels():
    x, draw = torch.arange(40.0).view(20, 2), torch.Generator().manual_seed(0)
    data = [TaskData(torch.rand(20, 2, generator=draw), torch.arange(20) % 2, head) for head in (4, 7, 4)]
    side = [to_experience(part, t, [(0, 1)], True) for t, part in enumerate(data)]
    tests = [to_experience(replace(part, x=x + t), t, [(0, 1)], True) for t, part in enumerate(data)]
    stream = avalanche(CLScenario([EagerCLStream("train", side), EagerCLStream("test", tests)]))
    stream.check()
    assert [task.classes for task in stream] == [(0, 1), (2, 3), (0, 1)] and stream.repeats


def test_classes_that_come_again_make_a_domain_or_what_the_user_says():
    with quietly():
        parts = [tensors(torch.rand(30, 3), torch.arange(30) % 3 + t) for t in range(3)]
        tests = [tensors(torch.rand(30, 3), torch.arange(30) % 3 + t) for t in range(3)]
        benchmark = benchmark_from_datasets(train=parts, test=tests)
    assert avalanche(benchmark).scenario == "domain"
    stream = avalanche(benchmark, scenario="class", order=[2, 0, 1])
    check_stream(stream)
    assert stream.repeats and [task.classes for task in stream] == [(2, 3, 4), (0, 1, 2), (1, 2, 3)]


def test_a_validation_stream_is_kept():
    with quietly():
        whole = nc_benchmark(plain("train"), plain("test"), 5, task_labels=False, seed=0)
        benchmark = benchmark_with_validation_stream(whole, 0.25, shuffle=True, seed=0)
    stream = avalanche(benchmark)
    check_stream(stream)
    train, val = (by_image(stream, part) for part in ("train", "val"))
    assert not train.keys() & val.keys() and len(train) + len(val) == len(original("train"))
    assert len(val) == pytest.approx(0.25 * len(DIGITS.train_y), abs=5)


class Jitter:
    def __call__(self, x):
        return x + torch.rand(1) + random.random() + np.random.random()


def test_random_transforms_act_anew_where_lazy_and_are_drawn_from_the_seed_where_not():
    with quietly():
        x, y = torch.zeros(50, 4), torch.arange(50) % 2
        datasets = [tensors(x, y, Jitter(), eval_transform=lambda x: x + 9)]
        benchmark = benchmark_from_datasets(train=datasets, test=[tensors(x, y, Jitter(), lambda x: x + 9)])
    before = torch.get_rng_state(), random.getstate()
    stream, again, other, lazy = (
        avalanche(benchmark),
        avalanche(benchmark),
        avalanche(benchmark, seed=1),
        avalanche(benchmark, lazy=True),
    )
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    read = [s[0].train.tensors()[0] for s in (stream, again, other, lazy, lazy)]
    assert torch.equal(read[0], read[1]) and not torch.equal(read[0], read[2]) and not torch.equal(read[3], read[4])
    assert all(len(rows.unique()) > 40 and 0 <= rows.min() <= rows.max() <= 3 for rows in read)
    assert isinstance(lazy[0].train.x, Items) and (lazy[0].test.tensors()[0] == 9).all()
    assert torch.equal(lazy[0].train.labels, y) and torch.equal(stream[0].train.labels, y)


def test_training_reads_a_lazy_benchmark():
    with quietly():
        benchmark = nc_benchmark(plain("train"), plain("test"), 5, task_labels=False, seed=0)
    assert torch.equal(trained(avalanche(benchmark)), trained(avalanche(benchmark, lazy=True)))


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_there_and_back_is_the_same_stream(scenario, prepared):
    stream = split(DIGITS, num_tasks=5, scenario=scenario, val_fraction=0.1, class_order="shuffled")
    benchmark = to_avalanche(stream, prepared=prepared)
    back = avalanche(benchmark)
    check_stream(back)
    assert (back.scenario, back.num_classes, len(back)) == (scenario, stream.num_classes, 5)
    for old, new, experience in zip(stream, back, benchmark.train_stream, strict=True):
        for part in ("train", "val", "test"):
            x, y, t = getattr(old, part).tensors()
            expected = stream.normalize(x) if prepared else x
            for a, b in zip((expected, y, t), getattr(new, part).tensors(), strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)
        assert experience.task_labels == [old.index if scenario == "task" else 0]
        assert experience.dataset[3][2] == experience.task_label
        assert experience.current_experience == old.index
        assert tuple(experience.classes_in_this_experience) == old.classes
        past = {c for task in stream[: old.index] for c in task.classes}
        assert set(experience.previous_classes) == past
        assert set(experience.classes_seen_so_far) == past | set(old.classes)
        assert set(experience.future_classes) == set(range(stream.num_classes)) - past - set(old.classes)


def test_rows_that_are_read_one_by_one_come_over():
    stream = toy_stream(2)
    items = [(x, int(y)) for x, y in zip(*stream[0].train.tensors()[:2], strict=True)]
    read = Stream([Task(0, TaskData.from_dataset(items, lazy=True), stream[0].test)], num_classes=2)
    back = avalanche(to_avalanche(read))
    assert torch.equal(back[0].train.tensors()[0], stream[0].train.tensors()[0] / 255)
    assert torch.equal(back[0].train.labels, stream[0].train.labels)


# ------------------------------------------------------------------ strategies


def avalanche_run(path: str, scenario: str = "class", **options):
    strategy = Avalanche(f"avalanche.training.{path}", epochs=10, **options)
    return toy_run(strategy, scenario=scenario, lr=0.2)


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_replay_of_avalanche_forgets_less_than_naive(scenario):
    naive, replay = avalanche_run("Naive", scenario), avalanche_run("Replay", scenario, mem_size=60)
    for run in (naive, replay):
        assert all(torch.isfinite(matrix.R).all() for matrix in run.matrices.values())
    old = [run.matrices[scenario].R[-1, :-1].mean() for run in (naive, replay)]
    assert old[1] > old[0] + 0.1 if scenario == "class" else old[1] >= old[0]


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_a_teacher_is_copied_and_masked(scenario):
    weak, strong = (
        avalanche_run("LwF", scenario, alpha=alpha, temperature=2.0).matrices["task"].R for alpha in (0.0, 10.0)
    )
    assert torch.isfinite(strong).all() and not torch.equal(weak, strong)
    assert torch.equal(weak[1], strong[1]), "there is no teacher in the first task"


def test_a_run_is_a_function_of_its_seed_and_draws_from_no_global_generator():
    stream, weights = split(DIGITS, num_tasks=5), []
    state = random.getstate(), np.random.get_state()[1].tolist()
    for seed in (7, 7, 8):
        replay = Avalanche("avalanche.training.Replay", epochs=1, mem_size=20)
        learner = learner_of(stream, {"avalanche": replay}, seed=seed)  # from the same first weights
        Experiment(learner, stream, TRAINER).run()
        weights.append(learner.head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state


def test_augmentation_acts_in_training_and_not_at_test():
    # Inputs that are augmented to 0 give the first layer, which has no bias, no gradient.
    def black(x, generator):
        return torch.zeros_like(x)

    stream = toy_stream(2)
    for augment in (None, black):
        changed = stream.derive(stream.__getitem__, augment=augment)
        torch.manual_seed(0)
        learner = Learner(
            changed, ToyBackbone(), {"a": Avalanche(epochs=2)}, partial(torch.optim.SGD, lr=0.1), batch_size=8
        )
        first = learner.backbone.layers[1].weight
        before = first.detach().clone()
        Experiment(learner, changed, TRAINER).run()
        assert torch.equal(before, first) == (augment is black)
    x = stream[1].train.tensors()[0]
    experience = to_experience(stream[1].train, 1, [], prepare=preparation(None), augment=black)
    assert experience.current_experience == 1 and experience.origin_stream.name == "train"
    for view, expected in ((experience.dataset.train(), 0 * x), (experience.dataset.eval(), x / 255)):
        assert torch.equal(torch.stack([row[0] for row in view]), expected)


def test_a_frozen_backbone_stays_in_evaluation_mode_and_as_it_is():
    body = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16)).requires_grad_(False).eval()
    network = to_network(body, nn.Linear(16, 2))
    network.train()
    assert network.classifier.training and not body[1].training
    body.requires_grad_(True)
    network.train()
    assert body[1].training


def test_competing_classes_share_the_probability():
    head, competing = nn.Linear(3, 4), torch.tensor([[True, True, False, False], [False, False, True, True]])
    network = to_network(nn.Identity(), head, competing)
    x, labels = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    out = network(x, labels).softmax(1)
    expected = head(x).masked_fill(~competing[labels], -torch.inf).softmax(1)
    assert torch.allclose(out, expected) and (out[~competing[labels]] == 0).all()


def test_a_stopped_run_is_not_continued_in_silence(tmp_path):
    def build():
        return toy_learner({"avalanche": Avalanche(epochs=1)})

    learner, stream = build()
    whole = Experiment(learner, stream, TRAINER, directory=tmp_path).run()
    files = sorted(tmp_path.rglob("*.ckpt"))
    learner, stream = build()
    finished = Experiment(learner, stream, TRAINER, directory=tmp_path).run()
    assert torch.equal(finished.matrices["class"].R, whole.matrices["class"].R), "what is finished can be read again"
    files[-1].unlink()
    learner, stream = build()
    with pytest.raises(InputError, match="stored in the 2 tasks learned, so the run cannot"):
        Experiment(learner, stream, TRAINER, directory=tmp_path).run()


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_it_keeps_the_rest_of_the_contract(scenario):
    with pytest.raises(InputError, match="the run cannot be continued"):  # the first check that resumes
        check_strategy(Avalanche, path="avalanche.training.Replay", epochs=1, scenarios=(scenario,))


def test_a_later_task_can_be_learned_alone():
    learner, stream = toy_learner({"avalanche": Avalanche(epochs=1)})
    Experiment(learner, stream, TRAINER).learn(stream[2])
    assert learner.tasks_learned == 3


def test_the_runs_own_epochs_are_taken_where_they_are_known():
    learner, stream = toy_learner({"avalanche": Avalanche()})
    learner.trainer = TRAINER(max_epochs=3, enable_checkpointing=False)
    learner.before_task(stream[0])
    learner.after_task(stream[0])
    assert learner.strategies["avalanche"]._inner.clock.train_iterations == 3 * 6


def test_the_strategy_adds_nothing_to_the_checkpoint():
    plain, _ = toy_learner()
    learner, _ = toy_learner({"avalanche": Avalanche(epochs=1)})
    assert plain.state_dict().keys() == learner.state_dict().keys()


def test_composed_from_the_command_line(tmp_path):
    from hydra import compose, initialize_config_module

    from cl.app.build import build

    overrides = [
        "stream=avalanche",
        "stream.benchmark._target_=cl.data.avalanche.to_avalanche",
        "+stream.benchmark.stream._target_=cl.testing.toy_stream",
        "strategy=avalanche",
        "strategy.avalanche.path=avalanche.training.Replay",
        "strategy.avalanche.epochs=1",
        "+strategy.avalanche.mem_size=10",
        "logger=none",
        "report=quiet",
        "trainer.accelerator=cpu",
    ]
    with initialize_config_module("cl.conf", version_base="1.3"):
        cfg = compose("config", overrides=overrides)
    run = build(cfg, tmp_path).run()
    assert run.matrices["class"].R.shape == (4, 3) and torch.isfinite(run.matrices["class"].R).all()


# ------------------------------------------------------------------ what is refused


def bench(train, test, **streams) -> CLScenario:
    with quietly():
        return benchmark_from_datasets(train=train, test=test, **streams)


def two(num: int = 2, shape: tuple[int, ...] = (3,), label=lambda t: t) -> list:
    return [tensors(torch.rand(8, *shape), torch.full((8,), label(t))) for t in range(num)]


class Detection(CLExperience):
    def __init__(self):
        super().__init__(0, None)


def ragged():
    source = [(torch.zeros(3), 0), (torch.zeros(4), 0)]
    holder = type("Ragged", (list,), {"targets": [0, 0]})(source)
    return [as_classification_dataset(holder)]


def mixed() -> list:
    data = TaskData(torch.rand(6, 3), torch.arange(6) % 2, torch.arange(6) // 3)
    return [to_experience(data, t, [(0, 1)], True).dataset for t in range(2)]


REFUSED = {
    "no benchmark": (lambda: object(), {}, "object is not a classification benchmark of Avalanche"),
    "no test stream": (
        lambda: CLScenario([EagerCLStream("train", [to_experience(toy_stream(1)[0].train, 0, [])])]),
        {},
        "CLScenario is not a classification benchmark of Avalanche",
    ),
    "no data": (
        lambda: CLScenario([EagerCLStream(side, [Detection()]) for side in ("train", "test")]),
        {},
        "not a classification benchmark of Avalanche",
    ),
    "no experiences": (lambda: bench([], two()), {}, "The train stream of the benchmark has no experiences"),
    "no test experiences": (lambda: bench(two(), []), {}, "The test stream of the benchmark has no experiences"),
    "test experiences": (lambda: bench(two(3), two(2)), {}, "2 test experiences for 3 training experiences"),
    "validation": (lambda: bench(two(3), two(3), valid=two(2)), {}, "2 val experiences for 3 training"),
    "shapes of experiences": (
        lambda: bench([*two(1), *two(1, (4,), lambda t: 1)], two()),
        {},
        r"torch.float32 inputs of shape \(3,\) and torch.float32 of \(4,\): bring them to one shape",
    ),
    "shapes of items": (
        lambda: bench(ragged(), two(1)),
        {},
        r"The train set of experience 0: Item 1 of the dataset has shape \(4,\)",
    ),
    "float labels": (lambda: bench(two(label=float), two()), {}, "experience 0 has labels of torch.float32"),
    "vectors": (
        lambda: bench([tensors(torch.rand(8, 3), torch.rand(8, 2))], two(1)),
        {},
        "not a classification benchmark of Avalanche",
    ),
    "empty": (
        lambda: bench([*two(1), two(1)[0].subset([])], two()),
        {},
        "The train set of experience 1 is empty",
    ),
    "mixed task labels": (
        lambda: bench(mixed(), mixed()),
        {"scenario": "task"},
        r"experience 0 mixes the task labels \[0, 1\], where scenario=task needs one",
    ),
    "unknown scenario": (lambda: bench(two(), two()), {"scenario": "tasks"}, "scenario='tasks' is unknown"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_stream_is_refused_in_one_sentence(name):
    make, options, sentence = REFUSED[name]
    with pytest.raises(InputError, match=sentence) as error:
        avalanche(make(), **options)
    assert "\n" not in str(error.value)


def test_the_command_line_is_told_to_name_a_benchmark():
    from cl.streams.avalanche import unnamed

    with pytest.raises(InputError, match=r"stream\.benchmark\._target_=avalanche"):
        unnamed(n_experiences=5)


def test_other_targets_have_no_benchmark():
    x, y = torch.rand(4, 2), torch.rand(4, 1)
    stream = Stream([Task(0, TaskData(x, y), TaskData(x, y))], scenario="domain", num_classes=1, target="regression")
    with pytest.raises(InputError, match="of kind regression: an Avalanche benchmark needs labels"):
        to_avalanche(stream)
    with pytest.raises(InputError, match="Avalanche learns from targets of kind label"):
        learner_of(stream, {"avalanche": Avalanche()})


NOT_BUILT = [
    (Avalanche("avalanche.training.Nave"), "Nave cannot be built .*has no attribute 'Nave'"),
    (Avalanche("nowhere.Naive"), "nowhere.Naive cannot be built .No module named 'nowhere'"),
    (Avalanche("Naive"), "Naive cannot be built"),
    (Avalanche("avalanche.training.EWC"), "missing 1 required keyword-only argument: 'ewc_lambda'.*avalanche.NAME="),
    (Avalanche(lamda=3), "unexpected keyword argument: lamda"),
]


@pytest.mark.parametrize(("strategy", "sentence"), NOT_BUILT, ids=range(len(NOT_BUILT)))
def test_a_strategy_that_cannot_be_built_is_refused(strategy, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        toy_learner({"avalanche": strategy})
    assert "\n" not in str(error.value)


def test_it_trains_alone():
    with pytest.raises(InputError, match="drop the strategies beside strategy=avalanche"):
        toy_learner({"er": ER(10), "avalanche": Avalanche()})


@pytest.mark.parametrize(
    ("options", "trainer", "sentence"),
    [
        ({"gradient_clip": 1.0}, {}, "knows no gradient_clip"),
        ({}, {"accumulate_grad_batches": 2}, "knows no trainer.accumulate_grad_batches"),
        ({}, {"limit_train_batches": 3}, "knows no trainer.limit_train_batches"),
    ],
)
def test_what_its_loop_would_ignore_is_refused(options, trainer, sentence):
    learner, stream = toy_learner({"avalanche": Avalanche(epochs=1)}, **options)
    with pytest.raises(InputError, match=sentence):
        Experiment(learner, stream, partial(TRAINER, **trainer)).run()


def test_weights_that_diverge_end_the_run():
    with pytest.raises(DivergenceError, match="Weights are not finite after task 1"):
        toy_run(Avalanche(epochs=3), lr=1e30)


def test_preparation_leaves_the_streams_module_alone():
    stream = split(DIGITS, num_tasks=5)
    x = stream[0].train.tensors()[0][:3]
    kept = x.clone()
    prepare, expected = preparation(stream.normalize), stream.normalize(x)
    stream.normalize.to("meta")  # as the learner takes it to its device
    assert torch.equal(prepare(x), expected) and torch.equal(x, kept)


def test_a_strategy_that_goes_on_with_a_copy_of_the_network_is_measured_on_it():
    """GDumb trains a copy of the initial network from its memory after each task."""
    inner = Avalanche("avalanche.training.GDumb", epochs=20, mem_size=60)
    R = toy_run(inner, lr=0.2).matrices["class"].R
    assert R[3].min() > 0.7, "all classes are in the memory"
