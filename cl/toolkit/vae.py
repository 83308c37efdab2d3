"""A variational autoencoder of flattened inputs, trained on its own between tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from cl.random import Random


class VAE(nn.Module):
    r"""Two layers to a Gaussian code, and two back to the mean of a Gaussian of variance 1 (Kingma and Welling 2014).

    For an input x of d numbers and a code z of k, with the encoder's mean m and variance v (elementwise):

    .. math:: L(x) = \tfrac12 \lVert x - \hat x(z) \rVert^2 - \tfrac12 \sum_j (1 + \log v_j - m_j^2 - v_j), \qquad
              z = m + \sqrt{v} \, \epsilon, \quad \epsilon \sim N(0, I)

    which is, up to a constant, an upper bound of :math:`-\log p(x)`.

    Args:
        shape: Shape of one input.
        hidden: Units of each hidden layer.
        code: Size of the code, k.

    Example:
        >>> vae = VAE((1, 4, 4), hidden=8, code=2)
        >>> vae.decode(torch.zeros(3, 2)).shape
        torch.Size([3, 1, 4, 4])
    """

    def __init__(self, shape: Sequence[int], hidden: int = 400, code: int = 100) -> None:
        super().__init__()
        self.shape, self.code, size = tuple(shape), code, math.prod(shape)
        self.encoder = nn.Sequential(_layers(size, hidden), nn.Linear(hidden, 2 * code))
        self.decoder = nn.Sequential(_layers(code, hidden), nn.Linear(hidden, size))

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean of the inputs with codes (n, k), (n, *shape)."""
        x: Tensor = self.decoder(z)
        return x.view(-1, *self.shape)

    def loss(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each input (n, *shape), with the noise of its code (n, k), (n,).

        Example:
            >>> vae = VAE((2,), hidden=3, code=1)
            >>> _ = [p.data.zero_() for p in vae.parameters()]
            >>> vae.loss(torch.tensor([[3.0, 4.0]]), torch.ones(1, 1)).item()
            12.5
        """
        mean, log_v = self.encoder(x.flatten(1)).chunk(2, dim=1)
        again = self.decoder(mean + (log_v / 2).exp() * noise)
        divergence = (mean.square() + log_v.exp() - 1 - log_v).sum(1) / 2
        found: Tensor = (x.flatten(1) - again).square().sum(1) / 2 + divergence
        return found

    def sample(self, n: int, random: Random) -> Tensor:
        """Draw inputs from the prior of codes, (n, *shape)."""
        return self.decode(self.noise(n, random))

    def noise(self, n: int, random: Random) -> Tensor:
        """Draw standard normal numbers for n codes, (n, k)."""
        weight = self.decoder[-1].weight
        assert isinstance(weight, Tensor)
        return torch.from_numpy(random.generator.standard_normal((n, self.code))).to(weight)

    def fit(self, batches: Iterator[tuple[Tensor, Tensor]], lr: float, random: Random) -> None:
        """Train by Adam on the weighted sum of losses of minibatches: inputs (n, *shape) and their weights (n,)."""
        self.requires_grad_(True)
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        with torch.enable_grad():
            for x, weight in batches:
                optimizer.zero_grad()
                (weight * self.loss(x, self.noise(len(x), random))).sum().backward()
                optimizer.step()
        optimizer.zero_grad()
        self.requires_grad_(False)


def _layers(inside: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
