"""What several methods have in common: equal to fine-tuning on one task, what they protect, what they refuse."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cl.data.task import SCENARIOS
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies.adam_nscl import AdamNSCL
from cl.strategies.agem import AGEM
from cl.strategies.cuber import CUBER
from cl.strategies.cumulative import Cumulative
from cl.strategies.der import DER
from cl.strategies.er_ace import ERACE
from cl.strategies.ewc import EWC
from cl.strategies.gdumb import GDumb
from cl.strategies.gpm import GPM
from cl.strategies.gss import GSS
from cl.strategies.joint import Joint
from cl.strategies.l2p import L2P
from cl.strategies.lwf import LwF
from cl.strategies.mas import MAS
from cl.strategies.mir import MIR
from cl.strategies.ncm import NCM
from cl.strategies.ogd import OGD
from cl.strategies.online_ewc import OnlineEWC
from cl.strategies.sgp import SGP
from cl.strategies.si import SI
from cl.strategies.trgp import TRGP
from cl.testing import ToyBackbone, toy_learner, toy_stream
from subspaces import ConvNet, WideNet, build, leak, random_stream
from toys import learn, same, toy, trunk, vector


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(
    "make",
    [Joint, Cumulative, partial(Cumulative, restart=True), AGEM, EWC, LwF, GPM, partial(NCM, freeze=False)],
    ids=["joint", "cumulative", "restart", "agem", "ewc", "lwf", "gpm", "ncm"],
)
def test_on_one_task_methods_are_finetuning_to_the_bit(make, scenario):
    options = {"num_tasks": 1, "scenario": scenario, "epochs": 2}
    assert same(trunk(toy(make(), [0], **options)[0]), trunk(toy(None, [0], **options)[0]))


@pytest.mark.parametrize(("key", "method"), [("si", SI), ("mas", MAS), ("online_ewc", OnlineEWC), ("ewc", EWC)])
def test_what_cannot_be_held_is_refused(key, method):
    name = method.__name__
    with pytest.raises(InputError, match=f"{name} holds the weights .* another strategy owns encode: drop one"):
        toy_learner({"l2p": L2P(), "other": method()}, backbone="vit")
    learner, stream = toy_learner({"method": method(), "ncm": NCM()})
    with pytest.raises(InputError, match=f"{name} holds trainable weights, and all are frozen"):
        learn(learner, stream, [0])
    with pytest.raises(InputError, match=rf"{key}\.weight=-1 must be 0 or more"):
        method(weight=-1)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("make", [SI, MAS, OnlineEWC])
def test_on_one_task_penalties_are_finetuning_to_the_bit(make, scenario):
    options = {"num_tasks": 1, "scenario": scenario, "epochs": 2}
    assert torch.equal(vector(toy(make(), [0], **options)[0]), vector(toy(None, [0], **options)[0]))


PROTECTORS = {
    "sgp": (lambda: SGP(threshold=1.0, scale=1e9), SCENARIOS),
    "adam_nscl": (AdamNSCL, SCENARIOS),
    "trgp": (lambda: TRGP(threshold=1.0, trust=0.01), ("task",)),
    "cuber": (lambda: CUBER(threshold=1.0, sufficient=0.01, positive=2.0), ("task",)),  # no cosine is 2
}


@pytest.mark.parametrize("net", [WideNet, ConvNet])
@pytest.mark.parametrize(("method", "scenario"), [(m, s) for m, (_, some) in PROTECTORS.items() for s in some])
def test_the_span_of_old_inputs_is_left_alone(method, scenario, net):
    torch.manual_seed(0)
    stream = random_stream((30,) if net is WideNet else (16, 5, 5), scenario=scenario)
    learner = build(stream, net(), PROTECTORS[method][0]())
    leaked, change, drift = leak(learner, stream)
    assert change > 1e-3, "the second task must have moved every layer"
    assert leaked < 1e-5
    assert drift < 1e-4, "so the network answers the first task as before"


@pytest.mark.parametrize("strategy", [TRGP, CUBER, OGD])
def test_nothing_to_protect_is_one_sentence(strategy: type[Strategy]) -> None:
    backbone = ToyBackbone().requires_grad_(False)
    with pytest.raises(InputError, match="protects trainable weights of the backbone, which has none"):
        build(toy_stream(3, "task"), backbone, strategy())


class Watches(Strategy):
    """Owns `encode`, and notes of which tasks the rows are said to be."""

    def encode(self, learner, view):
        if learner.backbone.training:
            assert learner.task_labels is not None and len(learner.task_labels) == len(view)
            self.tasks = {*getattr(self, "tasks", set()), *learner.task_labels.tolist()}
        return learner.backbone(view)


@pytest.mark.parametrize("make", [DER, MIR, GSS, partial(GDumb, cutmix=1.0), ERACE])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_replayed_rows_are_encoded_under_their_own_task(make, scenario):
    watch, method = Watches(), make(memory_size=20)
    learner, stream = toy({"watch": watch, "method": method}, [0, 1], scenario=scenario)
    held, watch.tasks = set(method.memory.rows().task.tolist()), set()
    learn(learner, stream, [2])
    assert watch.tasks == held | {2} and held - {2}
