"""EASE: synthesis and scores by hand, and what each task trains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies.ease import EASE, synthesised
from cl.testing import toy_learner
from cl.toolkit.inject import added, use
from draws import quick, seeds
from prompted import all_rows
from toys import learn, toy, weights


def test_worked_synthesis():
    """Cosines 1 and 0 have the softmax (.731059, .268941)."""
    old, new = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    found = synthesised(old, new, torch.tensor([[10.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[7.310586, 0.268941]]))


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_a_synthesised_prototype_is_a_mean_of_the_new_ones(seed, num_old, num_new):
    draw = torch.Generator().manual_seed(seed)
    old, new, here = (torch.randn(n, 3, generator=draw) for n in (num_old, num_new, num_new))
    found = synthesised(old, new, here)
    assert (found >= here.amin(0) - 1e-5).all() and (found <= here.amax(0) + 1e-5).all()
    torch.testing.assert_close(synthesised(3 * old, 5 * new, here), found)


@pytest.mark.parametrize("backbone", ["mlp", "vit", "restless"])
@pytest.mark.parametrize(("alpha", "released"), [(0.1, False), (0.7, False), (0.7, True)])
def test_predictions_are_the_sums_of_cosines_written_by_hand(backbone, alpha, released):
    method = EASE(width=3, scale=1.0, alpha=alpha, released_rule=released)
    learner, stream = toy(method, range(3), epochs=2, backbone=backbone)
    learner.eval()

    def phi(x, task):
        use(learner.backbone, task)
        return learner.backbone(learner.prepare(x)).detach()

    p = torch.zeros(3, 6, 16)  # by space and class
    for t, task in enumerate(stream):
        x, y, _ = task.train.tensors()
        for space in range(t + 1):
            for c in (2 * t, 2 * t + 1):
                p[space, c] = phi(x[y == c], space).mean(0)
        for space in range(t + 1) if released else [t]:
            new = range(2 * space, 2 * t + 2)
            for c in range(2 * space):
                similar = torch.stack([F.cosine_similarity(p[c // 2, c], p[c // 2, j], dim=0) for j in new]).softmax(0)
                p[space, c] = sum(s * p[space, j] for s, j in zip(similar, new, strict=True))
    x_test = torch.cat([task.test.tensors()[0] for task in stream])
    features = [phi(x_test, space) for space in range(3)]
    assert not torch.allclose(features[0], features[2], atol=1e-3), "the spaces differ"
    expected = torch.zeros(len(x_test), 6)
    for c in range(6):
        for space in range(3):
            cosine = F.cosine_similarity(features[space], p[space, c][None], dim=1)
            expected[:, c] += cosine if space == c // 2 else alpha / 2 * cosine
    torch.testing.assert_close(method.prototypes, p, rtol=1e-4, atol=1e-4)
    found = method.predict(learner, learner.prepare(x_test))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_task_trains_its_own_adapters_and_rows_of_the_head():
    learner, stream = toy_learner({"method": EASE(width=3)}, backbone="normed")
    for t in range(3):
        before = weights(learner.trunk())
        learn(learner, stream, [t], epochs=2)
        after = weights(learner.trunk())
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert all(f".parts.{t}." in name or name.startswith("head") for name in changed) and len(changed) > 2
        others = [c for c in range(6) if c // 2 != t]
        assert torch.equal(before["head.weight"][others], after["head.weight"][others])


def test_features_of_old_spaces_stay_the_same():
    learner, stream = toy(EASE(width=3, scale=1.0), range(2), epochs=2, backbone="vit")
    method, view = learner.strategies["method"], all_rows(learner, stream)
    learner.eval()
    before = method.spaces(learner, view, 2).detach()
    learn(learner, stream, [2], epochs=2)
    learner.eval()
    assert torch.equal(method.spaces(learner, view, 2), before)
    assert [module.active for module in learner.backbone.modules() if hasattr(module, "active")] == [2]
    assert len(added(learner.backbone)[0]) == 3


def test_before_any_task_all_classes_score_the_same():
    learner, stream = toy_learner({"method": EASE(width=3)})
    assert (learner.strategies["method"].predict(learner, all_rows(learner, stream)) == -2).all()


class Encoder(Strategy):
    def encode(self, learner, view):
        return 2 * learner.backbone(view)


def test_what_is_refused():
    with pytest.raises(InputError, match="another strategy owns encode"):
        toy({"a": Encoder(), "b": EASE()})
