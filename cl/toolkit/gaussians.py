"""A Gaussian for the features of each class, from which features of classes without stored examples are drawn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.errors import unknown
from cl.random import Random

COVARIANCES = ("full", "diagonal")
_LEAST = 1e-4  # added to all variances, so that a class with few examples has a covariance of full rank


class ClassGaussians(nn.Module):
    """Mean and covariance of the features of each class.

    Args:
        num_classes: C.
        num_features: D.
        covariance: "full", which takes 4 C D^2 bytes, or "diagonal".

    Attributes:
        mean: (C, D).
        factor: Lower triangular L with covariance L L^T, (C, D, D); of diagonal ones the standard deviations, (C, D).

    Raises:
        InputError: If `covariance` is unknown.

    Example:
        >>> gaussians = ClassGaussians(2, 3, "diagonal")
        >>> gaussians.describe(1, torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 0.0]]))
        >>> gaussians.mean[1], gaussians.factor[1]
        (tensor([2., 0., 0.]), tensor([1.4142, 0.0100, 0.0100]))
        >>> gaussians.draw(torch.tensor([1]), 5, Random()).shape
        torch.Size([1, 5, 3])
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, num_classes: int, num_features: int, covariance: str = "full") -> None:
        super().__init__()
        if covariance not in COVARIANCES:
            raise unknown("covariance", covariance, COVARIANCES)
        self.full = covariance == "full"
        self.register_buffer("mean", torch.zeros(num_classes, num_features))
        self.register_buffer("factor", torch.zeros(num_classes, *((num_features,) * (1 + self.full))))

    def describe(self, c: int, features: Tensor) -> None:
        """Set mean and covariance of class c to those of its features (n, D); 1e-4 is added to the variances."""
        x = features.double()
        self.mean[c] = x.mean(0)
        x = (x - x.mean(0)) / max(len(x) - 1, 1) ** 0.5
        if self.full:
            self.factor[c] = torch.linalg.cholesky(x.T @ x + _LEAST * torch.eye(len(self.mean[c])).to(x))
        else:
            self.factor[c] = (x.square().sum(0) + _LEAST).sqrt()

    def draw(self, classes: Tensor, number: int, random: Random) -> Tensor:
        """Return `number` differences from the mean for each of K classes, (K, number, D)."""
        shape = len(classes), number, self.mean.shape[1]
        z = torch.from_numpy(random.generator.standard_normal(shape, dtype="float32")).to(self.mean)
        factor = self.factor[classes]
        return z @ factor.mT if self.full else z * factor[:, None]
