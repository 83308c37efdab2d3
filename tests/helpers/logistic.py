"""Multinomial logistic regression, whose Fisher has a closed form."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def problem(seed: int, num_rows: int, size: int, num_classes: int):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, size, generator=draw)
    y = torch.randint(num_classes, (num_rows,), generator=draw)
    y[:num_classes] = torch.arange(num_classes)
    return x, y, torch.randn(num_classes, size, generator=draw), torch.randn(num_classes, generator=draw)


def closed_form(x, y, weight, bias, kind):
    """Diagonal Fisher of multinomial logistic regression, weights then biases.

    d log p_y / d w_ci = ([y = c] - p_c) x_i, whose square has the mean p_c (1 - p_c) x_i^2 under y ~ p.
    """
    p = (x @ weight.T + bias).softmax(1)
    square = p * (1 - p) if kind == "true" else (F.one_hot(y, len(bias)) - p) ** 2
    return torch.cat([(square[:, :, None] * x[:, None] ** 2).mean(0).flatten(), square.mean(0)])
