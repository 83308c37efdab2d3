"""`learner.closure`: the total loss of the step once more, equal to the bit, and without a trace."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import cl
from cl.engine.experiment import Experiment
from cl.engine.strategy import Strategy
from cl.errors import InputError
from cl.strategies.derpp import DERpp
from cl.strategies.er import ER
from cl.strategies.ewc import EWC
from cl.strategies.sam import SAM
from cl.testing import toy_learner, toy_stream
from cl.testing.toys import trainer


class Looks(Strategy):
    """Calls the closure in every step, `times` times, and compares it with the loss of the step."""

    uses_closure = True

    def __init__(self, times: int = 2) -> None:
        super().__init__()
        self.times, self.steps = times, 0

    def project_gradients(self, learner):
        for _ in range(self.times):
            again = learner.closure()
            assert again.detach().equal(learner._curves.waiting[-1]["loss"]), "the same draws, the same loss"
            params = [p for p in learner.parameters() if p.grad is not None]
            found = torch.autograd.grad(again, params, allow_unused=True)
            for p, g in zip(params, found, strict=True):
                torch.testing.assert_close(p.grad, torch.zeros_like(p) if g is None else g, rtol=1e-5, atol=1e-7)
            self.steps += 1


def state(**strategies: Strategy) -> dict[str, object]:
    """Return the state after a run with batch norm, dropout, and strategies that draw for their losses."""
    learner, stream = toy_learner(strategies, num_tasks=2, backbone="restless")
    Experiment(learner, stream, trainer, epochs=2).run()
    if "looks" in strategies:
        assert strategies["looks"].steps == 2 * 12 * strategies["looks"].times
    return {name: value for name, value in learner.state_dict().items() if "looks" not in name}


def test_it_is_the_loss_of_the_step_and_leaves_no_trace():
    from cl.data.stream_checks import same

    def others():
        return {"derpp": DERpp(memory_size=20), "ewc": EWC(num_samples=10)}

    expected, found = state(**others()), state(**others(), looks=Looks())
    different = [name for name in expected if not name.startswith("_extra") and not same(expected[name], found[name])]
    assert different == []
    assert not all(torch.equal(found[n], v) for n, v in state(**others(), sam=SAM()).items() if n.startswith("head"))


def test_a_part_of_the_batch_weighs_to_the_whole():
    """Without batch norm the loss of the batch is the mean of those of its parts, weighted by their examples."""
    seen: list[int] = []

    class Parts(Strategy):
        uses_closure = True

        def loss(self, learner, batch, logits):
            self.batch = batch
            return None

        def project_gradients(self, learner):
            batch = self.batch
            tasks = batch.task.unique()
            parts = [batch.part(batch.task == t) for t in tasks]
            assert sum(part.num_incoming for part in parts) == batch.num_incoming == 8
            whole = sum(len(part) / len(batch) * learner.closure(part) for part in parts)
            torch.testing.assert_close(whole, learner.closure(), rtol=1e-5, atol=1e-6)
            seen.append(len(tasks))

    learner, stream = toy_learner({"er": ER(20), "ewc": EWC(num_samples=10), "parts": Parts()}, num_tasks=2)
    Experiment(learner, stream, trainer, epochs=1).run()
    assert max(seen) == 2


def test_it_is_refused_where_it_cannot_be_right():
    class Undeclared(Strategy):
        def project_gradients(self, learner):
            learner.closure()

    class Early(Strategy):
        uses_closure = True

        def before_task(self, learner, task):
            learner.closure()

    run = partial(cl.run, toy_stream(2), epochs=1, progress=False)
    for strategy in (Undeclared(), Early()):
        with pytest.raises(InputError, match="uses_closure = True"):
            run(strategy)

    class Writes(Strategy):
        def setup(self, learner, stream):
            self.register_buffer("count", torch.zeros(()))

        def loss(self, learner, batch, logits):
            self.count += 1
            return None

    with pytest.raises(InputError, match=r"writes\.count is written while the loss is computed"):
        run({"writes": Writes(), "sam": SAM()})
    with pytest.raises(InputError, match=r"set trainer\.accumulate_grad_batches=4 to 1"):
        run(SAM(), trainer={"accelerator": "cpu", "accumulate_grad_batches": 4})


def test_nothing_is_kept_in_a_run_that_does_not_ask_for_it():
    class Sees(Strategy):
        def project_gradients(self, learner):
            assert learner.present is None

    learner, stream = toy_learner({"sees": Sees()}, num_tasks=2)
    Experiment(learner, stream, trainer, epochs=1).run()


def test_statistics_of_batch_norm_see_one_pass_a_step():
    learner, stream = toy_learner({"sam": SAM()}, num_tasks=2, backbone="restless")
    Experiment(learner, stream, trainer, epochs=2).run()
    norm = next(module for module in learner.modules() if isinstance(module, nn.BatchNorm1d))
    assert int(norm.num_batches_tracked) == 24
