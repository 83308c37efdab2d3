"""What a method that cannot work here says, with the reason and the paper; and what others do not say."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cl.engine.experiment import Experiment
from cl.engine.learner import Learner
from cl.engine.strategy import Strategy
from cl.report.terminal import TerminalReport
from cl.strategies.agem import AGEM
from cl.strategies.cumulative import Cumulative
from cl.strategies.er import ER
from cl.strategies.ewc import EWC
from cl.strategies.finetune import Finetune
from cl.strategies.gem import GEM
from cl.strategies.lwf import LwF
from cl.strategies.mas import MAS
from cl.strategies.online_ewc import OnlineEWC
from cl.strategies.si import SI
from cl.strategies.tag import TAG
from cl.testing import ToyBackbone, toy_learner, toy_stream
from toys import trainer

NEED_EXEMPLARS = {"EWC": EWC, "Online EWC": OnlineEWC, "SI": SI, "MAS": MAS, "LwF": LwF}


def notes(strategies: dict[str, Strategy], **options) -> list[str]:
    learner, stream = toy_learner(strategies, **options)
    return Experiment(learner, stream, trainer, notes=["First."]).run_view.notes


@pytest.mark.parametrize("name", NEED_EXEMPLARS)
def test_a_method_that_cannot_work_says_so_with_the_reason_and_the_paper(name):
    make = NEED_EXEMPLARS[name]
    first, remark = notes({"it": make()})
    assert first == "First." and remark.startswith(f"{name} keeps no exemplars: ")
    assert "van de Ven and Tolias 2019" in remark and "never sees the classes of different tasks together" in remark
    for scenario in ("task", "domain"):
        assert notes({"it": make()}, scenario=scenario) == ["First."]
    assert notes({"er": ER(20), "it": make()}) == ["First."], "with exemplars"
    assert notes({"it": make(), "all": Cumulative()}) == ["First."], "classes are seen together"
    assert notes({"it": make()}, num_tasks=1) == ["First."]


def test_methods_that_need_none_say_nothing_and_two_alike_say_it_once():
    assert notes({"it": Finetune()}) == ["First."] == notes({})
    assert len(notes({"one": EWC(), "two": EWC(weight=3.0)})) == 2
    assert len(notes({"one": EWC(), "two": SI()})) == 3


def test_the_terminal_shows_a_remark_once(capsys):
    learner, stream = toy_learner({"si": SI()}, num_tasks=2)
    Experiment(learner, stream, trainer, reports=[TerminalReport()]).run()
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("SI keeps no exemplars: it never sees the classes of different tasks together") == 1


@pytest.mark.parametrize(("name", "make"), [("GEM", GEM), ("A-GEM", AGEM)])
def test_where_steps_do_not_follow_the_projected_gradient_a_remark_says_so(name, make):
    def remark(optimizer, **others):
        strategies = {"method": make(30), **others}
        learner = Learner(toy_stream(), ToyBackbone(), strategies, partial(optimizer, lr=0.1), batch_size=4)
        return strategies["method"].remark(learner)

    start = f"{name} projects gradients, which {{}} then rescales: a step may still increase the loss"
    assert remark(torch.optim.SGD) is None
    for optimizer in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        assert remark(optimizer).startswith(start.format(optimizer.__name__))
    assert remark(torch.optim.SGD, tag=TAG()).startswith(start.format("another strategy"))
