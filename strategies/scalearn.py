r"""ScaLearn, transfer by learning to scale (Frohmann et al. 2024, Findings of ACL, section 3).

The backbone is frozen. A task t is learned in two phases. The first trains an adapter :math:`O_t` (Houlsby et al. 2019)
behind each of some modules. The second freezes it, too, and learns how much each task's adapters contribute:

.. math:: h \leftarrow h + \sum_{s \le t} w_{ts} \odot O_s(h)

with vectors w over the channels (ScaLearn) or, with `uniform`, single numbers (ScaLearnUniform), in each module by
itself or, with `shared`, the same in all of them (ScaLearn++, ScaLearnUniform++). They are not normalised: the paper
finds a softmax worse. So a task reuses what others have learned, and changes nothing of theirs.

Defaults: a bottleneck of 64; w starts at N(2/n, 0.001) for n sources and has dropout of 0.3, as in the released code.
Differences from the paper: there all tasks are sources of each other, in a stream those before, so n = t; and the start
is at most 1, since 2/n would double the single source of the first task. The head is trained in both phases, with the
same optimizer's settings; the paper trains w with 6e-3 until a validation set says stop, and starts a new head.
Differences from the released code: adapters have ReLU and no layer norm; in a transformer they are behind the MLPs, in
other networks behind blocks.

State: T adapters for each module in the backbone, and w (T, T, d) or (T, T, 1). Scenarios: task-incremental, since the
paper's targets are told apart. Refused: several tasks' examples together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from cl.engine.strategy import LearnerLike, Strategy
from cl.random import Random
from cl.toolkit.by_task import check_apart, rows_by_task
from cl.toolkit.inject import ADAPTED, Adapter, add, added, awaken, channelwise, freeze, places

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def scaled(outputs: Tensor, w: Tensor) -> Tensor:
    """Return the sum of sources' outputs (S, ...), their channels multiplied by w, (S, d) or (S, 1).

    Example:
        >>> O = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]])  # two sources of one example
        >>> scaled(O, torch.tensor([[0.5, 1.0], [2.0, 0.25]])), scaled(O, torch.tensor([[0.5], [2.0]]))
        (tensor([[6.5000, 1.7500]]), tensor([[ 6.5000, -1.0000]]))
    """
    dim = channelwise(outputs[0])
    products = [(output.movedim(dim, -1) * row).movedim(-1, dim) for output, row in zip(outputs, w, strict=True)]
    return torch.stack(products).sum(0)


class Sources(nn.Module):
    """The adapters of all tasks behind one module, and their scales.

    Args:
        channels: Number of channels.
        width: Width of an adapter's bottleneck.
        w: Scales of each task's sources, (t, channels) or (t, 1) for task t.

    Attributes:
        task: The task whose function it is.
        kept: What multiplies the scales in the sum, 0 where they are dropped; None uses the task's own adapter alone.
            Neither is state: `encode` sets both.
    """

    def __init__(self, channels: int, width: int, w: nn.ParameterList) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(Adapter(channels, width) for _ in w)
        self.w = w
        self.task = 0
        self.kept: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        """Map outputs of the module to their change."""
        if self.kept is None:
            change: Tensor = self.adapters[self.task](h)
            return change
        outputs = torch.stack([adapter(h) for adapter in self.adapters[: self.task + 1]])
        return scaled(outputs, self.w[self.task] * self.kept)


class ScaLearn(Strategy):
    """Trains an adapter for each task, then how much the adapters of all tasks so far contribute.

    Args:
        uniform: Whether a scale is one number (ScaLearnUniform); else it is a vector over the channels.
        shared: Whether all modules share the scales (ScaLearn++); vectors are shared by modules of the same width.
        width: Width of an adapter's bottleneck.
        dropout: Probability of dropout of the scales.
        scale_epochs: Epochs of the second phase, which are added to those of a task; None means as many as these.
        layers: Kinds of modules: "linear", "conv", "norm", "block", or ends of names, such as "mlp" in a transformer;
            None means "mlp" if the backbone has such modules, else "block", else "linear".
        blocks: Blocks of the backbone whose modules are adapted, from 0; None means all.

    Raises:
        InputError: If the backbone has no such modules.

    Example:
        >>> ScaLearn(uniform=True, shared=True)
        ScaLearn(uniform=True, shared=True)
    """

    scenarios = ("task",)
    targets = ("label", "multilabel")
    needs = ("boundaries",)
    uses_task = True
    needs_inputs = True
    scales: Tensor

    def __init__(
        self,
        uniform: bool = False,
        shared: bool = False,
        width: Annotated[int, Ge(1)] = 64,
        dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.3,
        scale_epochs: Annotated[int, Ge(1)] | None = None,
        layers: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.uniform, self.shared, self.width, self.dropout = uniform, shared, width, dropout
        self.scale_epochs, self.layers, self.blocks = scale_epochs, layers and tuple(layers), blocks and tuple(blocks)

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Freeze the backbone, and add the adapters and scales of all tasks."""
        check_apart("ScaLearn", learner, stream)
        freeze(learner.backbone)
        names = places("ScaLearn", learner.backbone, ADAPTED, self.layers, self.blocks)
        example = learner.prepare(torch.zeros(1, *stream.input_shape, dtype=stream.input_dtype))
        shared: dict[int, nn.ParameterList] = {}

        def make(channels: int) -> Sources:
            d = 1 if self.uniform else channels
            start = nn.ParameterList(
                torch.empty(n, d).normal_(min(1.0, 2 / n), 0.001) for n in range(1, len(stream) + 1)
            )
            return Sources(channels, self.width, shared.setdefault(d, start) if self.shared else start)

        add(learner.backbone, names, [make], example)
        self.register_buffer("scales", torch.zeros(len(stream), dtype=torch.bool))
        self.random = Random()

    def more_epochs(self, epochs: int) -> int:
        """Return the epochs of the second phase."""
        self._added = self.scale_epochs or epochs
        return self._added

    def before_task(self, learner: LearnerLike, task: Task) -> None:
        """Train the task's adapters and the head."""
        awaken(learner.backbone)
        for sources in _sources(learner.backbone):
            sources.requires_grad_(False)
            sources.adapters[task.index].requires_grad_()

    def after_epoch(self, learner: LearnerLike, task: Task, epoch: int) -> None:
        """Begin the second phase: freeze the adapters, and train the task's scales and the head."""
        if epoch + 1 == learner.epochs - self._added:
            for sources in _sources(learner.backbone):
                sources.adapters.requires_grad_(False)
                sources.w[task.index].requires_grad_()
            self.scales[task.index] = True

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the features of each example under the adapters, or the scaled sum, of its task, (B, D)."""

        def run(rows: Tensor, task: int) -> Tensor:
            for sources in _sources(learner.backbone):
                sources.task, sources.kept = task, self._kept(sources, task) if self.scales[task] else None
            return learner.backbone(rows)  # type: ignore[no-any-return]

        return rows_by_task(learner, view, run)

    def _kept(self, sources: Sources, task: int) -> Tensor:
        kept = torch.ones_like(sources.w[task])
        if sources.training and self.dropout:
            drawn = torch.from_numpy(self.random.generator.random(tuple(kept.shape)))
            kept = (drawn >= self.dropout).to(kept) / (1 - self.dropout)
        return kept


def _sources(backbone: nn.Module) -> list[Sources]:
    return [part for parts in added(backbone) for part in parts if isinstance(part, Sources)]
