"""Dormant units: hidden units that hardly react to any input."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from cl.data.task import Stream, Task
from cl.engine.instrument import Instrument, own_examples, subset, watching
from cl.engine.learner import Learner
from cl.engine.loader import EvalLoader
from cl.ranges import checked


@checked
class Dormant(Instrument):
    r"""Records, after each task, the share of hidden units that are dormant on the task's examples.

    Unit i of a layer is dormant (Sokar et al. 2023, "The Dormant Neuron Phenomenon", definition 1) if its mean
    activation is at most a small part of that of its layer:

    .. math:: s_i = \frac{\mathbb{E}_x |h_i(x)|}{\frac1H \sum_k \mathbb{E}_x |h_k(x)|} \le \tau

    The activations of a layer are the inputs of the linear layer or convolution that takes them up, in evaluation mode;
    those of a channel are averaged over positions. The inputs of the network are not counted. In `dormant.csv` there is
    a record for each layer, by the number of the layer that takes the units up, and one for all (layer 0); the latter
    is drawn as the curve `dormant`. A share of 1 is that of a layer that does not react at all.

    Args:
        threshold: tau; 0 counts units that never react.
        rows: Examples of a task on which it is measured, at most.

    Example:
        >>> import cl
        >>> from cl.testing import toy_stream
        >>> run = cl.run(toy_stream(2), [], epochs=1, instruments={"dormant": Dormant()}, progress=False)
        >>> [record[:3] for record in run.instruments["dormant"].records()][:2]
        [(1, 0, 200), (1, 1, 100)]
    """

    file = "dormant"
    needs_inputs = True
    columns = ("task", "layer", "units", "dormant")

    def __init__(self, threshold: Annotated[float, Ge(0)] = 0.025, rows: Annotated[int, Ge(1)] = 1000) -> None:
        super().__init__()
        self.threshold, self.rows = threshold, rows

    def setup(self, learner: Learner, stream: Stream) -> None:
        """Note which layers there are, before a strategy freezes some."""
        self._layers = [name for name, module in learner.trunk().named_modules() if isinstance(module, _KINDS)][1:]

    def after_task(self, learner: Learner, task: Task) -> None:
        """Measure on examples of the task, and add a record for all units and for each layer."""
        sums: dict[str, Tensor] = {}
        hooks = [
            learner.trunk().get_submodule(name).register_forward_pre_hook(partial(_add, sums, name))
            for name in self._layers
        ]
        try:
            with watching(learner):
                for batch in EvalLoader([subset(own_examples(task), self.rows)], learner.device, None):
                    learner(learner.prepare(batch.x), batch.task)
        finally:
            for hook in hooks:
                hook.remove()
        dormant = [(number, (s <= self.threshold * s.mean()).float()) for number, s in enumerate(sums.values(), 1)]
        if not dormant:
            return
        every = torch.cat([found for _, found in dormant])
        for number, found in [(0, every), *dormant]:
            self.add((task.index + 1, number, len(found), float(found.mean())))
        learner.record("dormant", float(every.mean()))


_KINDS = (nn.Linear, nn.Conv2d)


def _add(sums: dict[str, Tensor], name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Add the absolute activations of the units that a layer takes up, summed over all but the units."""
    h = inputs[0].float().abs()
    total = h.sum((0, 2, 3)) if isinstance(layer, nn.Conv2d) else h.flatten(0, -2).sum(0)
    sums[name] = sums.get(name, 0) + total
