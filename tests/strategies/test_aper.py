"""APER: class means of both backbones by hand, what the first task adapts, and what stays."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl.data.sources import digits
from cl.data.task import TaskData
from cl.engine.learner import Learner
from cl.errors import InputError
from cl.strategies.aper import APER
from cl.strategies.l2p import L2P
from cl.strategies.ncm import NCM
from cl.streams.split import split
from cl.testing import toy_learner
from cl.toolkit.inject import added, use
from prompted import all_rows
from toys import learn, same, toy, weights

KINDS = ("adapter", "ssf", "full")


@pytest.mark.parametrize("adapt", KINDS)
@pytest.mark.parametrize("backbone", ["mlp", "vit", "restless"])
def test_predictions_are_cosines_to_means_written_by_hand(adapt, backbone):
    learner, stream = toy(APER(adapt, width=3, scale=1.0), range(3), epochs=2, backbone=backbone)
    plain = toy_learner(backbone=backbone)[0].backbone.eval()
    learner.eval()

    def both(x):
        view = learner.prepare(x)
        return torch.cat([learner.backbone(view), plain(view)], dim=1).detach()

    x, y, _ = TaskData.concat([task.train for task in stream]).tensors()
    means = torch.stack([both(x[y == c]).mean(0) for c in range(6)])
    view = all_rows(learner, stream)
    features = torch.cat([both(task.test.tensors()[0]) for task in stream])
    x_test = torch.cat([task.test.tensors()[0] for task in stream])
    assert len(view) and not torch.allclose(features[:, :16], features[:, 16:], atol=1e-3)
    expected = F.cosine_similarity(features[:, None], means[None], dim=2)
    found = learner.strategies["method"].predict(learner, learner.prepare(x_test))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapt", KINDS)
def test_the_first_task_adapts_and_the_others_train_nothing(adapt):
    learner, stream = toy_learner({"method": APER(adapt, width=3)}, backbone="normed")
    start = weights(learner.trunk())
    learn(learner, stream, [0], epochs=2)
    first = weights(learner.trunk())
    changed = {name for name in start if not torch.equal(start[name], first[name])}
    assert {name.split(".")[0] for name in changed} == {"backbone", "head"}
    if adapt != "full":
        assert all(".parts." in name for name in changed if name.startswith("backbone"))
    learn(learner, stream, [1, 2], epochs=2)
    assert same(weights(learner.trunk()), first)


def test_without_adaptation_both_halves_are_the_same_and_it_is_ncm():
    learner, stream = toy(APER("adapter"), range(3), lr=0.0)
    plain, _ = toy(NCM(), range(3))
    view = all_rows(learner, stream)
    ours, theirs = (each.strategies["method"].predict(each, view) for each in (learner, plain))
    torch.testing.assert_close(ours, theirs)


def test_with_the_adapters_put_aside_the_backbone_is_the_pretrained_one():
    learner, stream = toy(APER("adapter", scale=1.0), range(3), epochs=2, backbone="vit")
    learner.eval()
    view, method = all_rows(learner, stream), learner.strategies["method"]
    assert len(added(learner.backbone)) == 1
    adapted = learner.backbone(view)
    use(learner.backbone, None)
    assert torch.equal(learner.backbone(view), method.pretrained(view))
    assert not torch.allclose(adapted, method.pretrained(view), atol=1e-3)


def test_adaptation_of_random_features_helps_on_digits():
    """The means of adapted features tell later digits apart better than those of the random network alone."""
    from cl.backbones.networks import MLP

    scores = {}
    for name, method in (("ncm", NCM()), ("aper", APER("full"))):
        stream = split(digits(), num_tasks=2)
        adam = partial(torch.optim.Adam, lr=3e-3)
        learner = Learner(stream, partial(MLP, hidden=[32]), {"method": method}, adam, seed=0)
        learn(learner, stream, epochs=5)
        x, y, _ = TaskData.concat([task.test for task in stream]).tensors()
        with torch.no_grad():
            scores[name] = (method.predict(learner.eval(), learner.prepare(x)).argmax(1) == y).float().mean().item()
    assert scores["aper"] > scores["ncm"] + 0.02, scores


def test_what_is_refused():
    with pytest.raises(InputError, match=r"no adaptation of APER called 'lora'.*Known: adapter, full, ssf"):
        APER("lora")
    with pytest.raises(InputError, match="another strategy owns encode"):
        toy({"a": L2P(4, 2, 2), "b": APER()}, backbone="vit")
