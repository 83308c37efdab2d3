r"""LST, ladder side tuning (Sung, Cho and Bansal 2022).

Beside a frozen backbone, a small side network is trained. It climbs along the backbone's blocks: its step i reads the
output :math:`z_i` of block i and its own last state, in proportions that it learns, and the gradient stops at
:math:`z_i`. So no gradient passes through the backbone, whose activations need not be stored:

.. math:: h_i = g_i\bigl(\mu_i \, D_i z_i + (1 - \mu_i) \, h_{i-1}\bigr), \qquad \mu_i = \sigma(a_i / \tau), \qquad
          \phi'(x) = \phi(x) + U h_L

where :math:`D_i` reduces the block's channels to a few, and U, which starts at 0, leads back to the features
:math:`\phi`. The abstract reports 69 % less memory for training than full fine-tuning, against 26 % for other methods.

One side network is trained through all tasks, as fine-tuning trains all weights: it protects nothing by itself.

Defaults: width 64, where the released code divides the backbone's by 8; tau = 0.1 and a = 0 at the start as there.
Differences from the paper, of which the abstract was read: those from its released code. There the steps are small
transformer layers, initialised by pruning the backbone, on all tokens; here each is a residual layer with layer norm on
the mean over tokens or places of a map, which fits any backbone. There :math:`h_0` is the embedding, reduced, here 0;
and :math:`U h_L` takes the place of the features, here it is added to them, and starts without effect. There some steps
can be left out.

State: the side network. Scenarios: all. Refused: another strategy that implements `encode`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from cl.backbones.blocks import blocks
from cl.engine.strategy import LearnerLike, Strategy
from cl.toolkit.inject import channelwise, freeze

if TYPE_CHECKING:
    from cl.data.task import Stream


def pooled(z: Tensor) -> Tensor:
    """Return the mean over places of maps (B, C, H, W) or tokens (B, L, C), (B, C).

    Example:
        >>> pooled(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([[2., 3.]])
    """
    return z.movedim(channelwise(z), -1).flatten(1, -2).mean(1) if z.ndim > 2 else z


class Step(nn.Module):
    """A step of the ladder, from a block's output and the last state to the next state.

    Args:
        channels: Channels of the block's output.
        width: Width of the state.
        tau: Temperature of the gate.

    Example:
        >>> Step(3, 4, 0.1)(torch.zeros(2, 3), torch.zeros(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, channels: int, width: int, tau: float) -> None:
        super().__init__()
        self.tau, self.gate = tau, nn.Parameter(torch.zeros(()))
        self.down = nn.Linear(channels, width)
        self.body = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, z: Tensor, h: Tensor) -> Tensor:
        """Map pooled outputs (B, channels) and states (B, width) to states (B, width)."""
        share = torch.sigmoid(self.gate / self.tau)
        mixed: Tensor = share * self.down(z) + (1 - share) * h
        return mixed + self.body(mixed)  # type: ignore[no-any-return]


class LST(Strategy):
    """Trains a small network beside a frozen backbone, which reads the outputs of its blocks.

    Args:
        width: Width of the side network.
        tau: Temperature of the gates.

    Example:
        >>> LST(width=32)
        LST(width=32)
    """

    targets = ("label", "multilabel", "regression")
    needs_inputs = True

    def __init__(self, width: Annotated[int, Ge(1)] = 64, tau: Annotated[float, Gt(0)] = 0.1) -> None:
        super().__init__()
        self.width, self.tau = width, tau

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Freeze the backbone, and build the side network."""
        freeze(learner.backbone)
        example = learner.prepare(torch.zeros(1, *stream.input_shape, dtype=stream.input_dtype))
        outputs = self.outputs(learner, example)
        self.steps = nn.ModuleList(Step(z.shape[1], self.width, self.tau) for z in outputs).to(example)
        self.up = nn.Linear(self.width, outputs[-1].shape[1]).to(example)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @torch.no_grad()
    def outputs(self, learner: LearnerLike, view: Tensor) -> list[Tensor]:
        """Return the pooled outputs (B, channels) of the backbone's blocks with weights; the last are the features."""
        learner.backbone.eval()
        found = []
        for block in blocks(learner.backbone):
            view = block(view)
            if any(True for _ in block.parameters()):
                found.append(pooled(view))
        return [*found[:-1], view]

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return the features of the backbone plus those of the side network, (B, D)."""
        outputs = self.outputs(learner, view)
        h = outputs[0].new_zeros(len(view), self.width)
        for step, z in zip(self.steps, outputs, strict=True):
            h = step(z, h)
        features: Tensor = outputs[-1] + self.up(h)
        return features
