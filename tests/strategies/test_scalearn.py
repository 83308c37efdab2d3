"""ScaLearn: scaled sums by hand, what each phase trains, and what old tasks keep."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies.scalearn import ScaLearn, Sources, scaled
from cl.testing import toy_learner
from cl.toolkit.inject import added
from draws import quick, seeds
from toys import learn, toy, weights

told = partial(toy, scenario="task")


def test_worked_sums():
    """Outputs (1, 2) and (3, -1): by vectors (0.5, 1) and (2, 0.25), then by the numbers 0.5 and 2."""
    outputs = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]])
    assert scaled(outputs, torch.tensor([[0.5, 1.0], [2.0, 0.25]])).tolist() == [[6.5, 1.75]]
    assert scaled(outputs, torch.tensor([[0.5], [2.0]])).tolist() == [[6.5, -1.0]]


@quick
@given(seeds, st.integers(1, 4), st.sampled_from([(5, 3), (5, 7, 3), (5, 3, 2, 2)]), st.booleans())
def test_scaled_sums_are_those_written_out(seed, num_sources, shape, uniform):
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.randn(num_sources, *shape, generator=draw)
    w = torch.randn(num_sources, 1 if uniform else 3, generator=draw)
    by_channel = (1, 3, 1, 1) if len(shape) == 4 else (3,)
    expected = sum(o * row.expand(3).reshape(by_channel) for o, row in zip(outputs, w, strict=True))
    torch.testing.assert_close(scaled(outputs, w), expected)


def filled(**options):
    """A learner of four tasks whose adapters and scales are drawn, and some inputs."""
    learner, stream = toy_learner({"method": ScaLearn(width=3, **options)}, 4, scenario="task", backbone="vit")
    draw = torch.Generator().manual_seed(1)
    for parts in added(learner.backbone):
        for parameter in parts.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw)
    return learner.eval(), learner.prepare(stream[0].test.tensors()[0])


@pytest.mark.parametrize("options", [{}, {"uniform": True}, {"shared": True}, {"uniform": True, "shared": True}])
def test_the_scales_of_one_source_reproduce_its_adapter_to_the_bit(options):
    learner, view = filled(**options)
    method, last = learner.strategies["method"], torch.full((len(view),), 3)
    for source in range(4):
        alone = learner(view, torch.full((len(view),), source))
        for parts in added(learner.backbone):
            parts[0].w[3].data = torch.eye(4)[source][:, None].expand_as(parts[0].w[3]).clone()
        method.scales[3] = True
        assert torch.equal(learner(view, last), alone)
        method.scales[3] = False
        assert source == 3 or not torch.allclose(learner(view, last), alone, atol=1e-3)


@pytest.mark.parametrize("uniform", [False, True])
def test_examples_of_several_tasks_each_get_their_own_sum(uniform):
    learner, view = filled(uniform=uniform)
    method = learner.strategies["method"]
    method.scales[:3] = True
    labels = torch.arange(len(view)) % 4
    body, found = learner.backbone, learner(view, labels)
    for row, task in enumerate(labels.tolist()):
        tokens = body.embed(view[row][None])
        block = body.model.blocks[0]
        tokens = tokens + block.attn(block.norm1(tokens))
        h = block.mlp.layer(block.norm2(tokens))
        part: Sources = block.mlp.parts[0]
        outputs = [adapter(h) for adapter in part.adapters]
        change = sum(part.w[task][s] * outputs[s] for s in range(task + 1)) if task < 3 else outputs[3]
        logits = learner.head(body.model.norm(tokens + h + change)[:, 0])
        torch.testing.assert_close(found[row], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tasks", [1, 4, 8])
def test_scales_start_at_two_over_the_number_of_sources_but_at_most_at_one(num_tasks):
    """With 8 sources at .25."""
    learner, _ = toy_learner({"method": ScaLearn(width=2)}, num_tasks, scenario="task")
    for parts in added(learner.backbone):
        gaps = parts[0].w[num_tasks - 1].detach() - min(1.0, 2 / num_tasks)
        assert 0 < float(gaps.abs().max()) < 0.006
        assert len(parts[0].w[num_tasks - 1]) == num_tasks


class Watch(Strategy):
    """Notes what each epoch changes."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: list[set[str]] = []

    def before_task(self, learner, task):
        self.last = weights(learner.trunk())

    def after_epoch(self, learner, task, epoch):
        now = weights(learner.trunk())
        self.changed.append({name for name in now if not torch.equal(now[name], self.last[name])})
        self.last = now


@pytest.mark.parametrize("scale_epochs", [None, 1])
def test_the_first_phase_trains_the_tasks_adapters_and_the_second_its_scales(scale_epochs):
    watch = Watch()  # called first, so that it sees the scales that the phase draws in the next epoch
    method = ScaLearn(width=3, scale_epochs=scale_epochs)
    told({"watch": watch, "method": method}, range(3), epochs=2, backbone="normed")
    each = 2 + (scale_epochs or 2)
    assert len(watch.changed) == 3 * each
    for n, names in enumerate(watch.changed):
        t, epoch = divmod(n, each)
        own = {name for name in names if not name.startswith("head")}
        part = f".adapters.{t}." if epoch < 2 else f".w.{t}"
        assert own and all(part in name for name in own), (t, epoch, own)
        assert any(name.startswith("head") for name in names)


def test_shared_scales_are_the_same_tensor_and_learn():
    learner, _ = told(ScaLearn(width=3, shared=True, layers=("1", "3"), dropout=0.0), range(2), epochs=8)
    first, second = (parts[0].w for parts in added(learner.backbone))
    assert first[1] is second[1]
    assert float((first[1].detach() - 1).abs().max()) > 0.01, "they were drawn with a deviation of .001"
    apart, _ = told(ScaLearn(width=3, layers=("1", "3")), range(2), epochs=2)
    first, second = (parts[0].w for parts in added(apart.backbone))
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("uniform", [False, True])
def test_modules_of_different_width_share_numbers_but_no_vectors(uniform):
    method = ScaLearn(uniform=uniform, shared=True, width=2, layers=("qkv", "mlp"))
    learner, _ = told(method, range(1), epochs=2, backbone="vit")
    first, second = (parts[0].w[0] for parts in added(learner.backbone))
    assert (first is second) == uniform
    assert len(first[0]) == (1 if uniform else 48)


@pytest.mark.parametrize("backbone", ["mlp", "vit", "restless"])
def test_old_tasks_keep_their_logits_to_the_bit(backbone):
    learner, stream = told(ScaLearn(width=3), range(2), epochs=2, backbone=backbone)
    view = learner.prepare(stream[0].test.tensors()[0])

    def logits(task):
        learner.eval()
        with torch.no_grad():
            return learner(view, torch.full((len(view),), task))[:, 2 * task : 2 * task + 2]

    before = [logits(0), logits(1)]
    learn(learner, stream, [2], epochs=2)
    assert torch.equal(logits(0), before[0]) and torch.equal(logits(1), before[1])
    assert not torch.equal(logits(2), before[1])


def test_dropout_of_scales_is_for_training_alone():
    learner, view = filled(dropout=0.9)
    learner.strategies["method"].scales[3] = True
    labels = torch.full((len(view),), 3)
    assert torch.equal(learner(view, labels), learner(view, labels))
    for parts in added(learner.backbone):
        parts.train()
    assert not torch.equal(learner(view, labels), learner(view, labels))


def test_what_is_refused():
    with pytest.raises(InputError, match="ScaLearn finds no modules"):
        told(ScaLearn(layers=("conv",)))
