"""Pairs of replayed examples to mix, some of them of classes that are near each other."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cl.engine.batch import Batch
from cl.toolkit.memory import Memory

LARGEST, ALPHA = 0.6, 0.4  # shares of the second example: uniform up to the first; of near classes, beta distributed


def pair_probabilities(means: Tensor) -> Tensor:
    """Return how often each pair of K classes is mixed, (K (K - 1) / 2,), in the order of `itertools.combinations`.

    Example:
        >>> pair_probabilities(torch.tensor([[0.0], [1.0], [3.0]]))
        tensor([0.4717, 0.2422, 0.2861])
    """
    return (1 / F.pdist(means).clamp_min(1e-6)).softmax(0)


def pairs_to_mix(
    drawn: Batch, means: Tensor, memory: Memory, base: float, mix: float, rng: np.random.Generator
) -> tuple[Batch, Batch, Tensor]:
    """Return B pairs of examples, and the share of the second in the mixture of each, float (B,).

    A part of the pairs are drawn examples and partners among them, with shares uniform on [0, 0.6). For the others,
    pairs of classes are drawn by `pair_probabilities`, and an example of each from the whole memory; their shares have
    the distribution Beta(0.4, 0.4). With fewer than two classes there are none of these.

    Args:
        drawn: B examples from the memory.
        means: The mean vector of each class, (C, d); zeros for a class that is not to be paired.
        memory: The memory, which holds each of the other classes.
        base: The part of the pairs that are drawn examples, from 0 to 1.
        mix: Probability that a pair is mixed; otherwise its second is its first, and the share 0.
        rng: The generator of the draws.
    """
    classes = means.any(1).nonzero().flatten().tolist()
    order = rng.permutation(len(drawn))
    chosen = order[: int(base * len(drawn))] if len(classes) > 1 else order
    one, two = (drawn.take(torch.from_numpy(rows)) for rows in (chosen, rng.permutation(chosen)))
    part, rest = rng.uniform(0, LARGEST, len(chosen)), len(drawn) - len(chosen)
    if rest:
        held, pairs = memory.rows(), list(combinations(classes, 2))
        y, p = held.y.cpu().numpy(), pair_probabilities(means[classes].double()).cpu().numpy()
        near = [pairs[i] for i in rng.choice(len(pairs), rest, p=p)]
        left, right = torch.tensor([[int(rng.choice(np.flatnonzero(y == c))) for c in pair] for pair in near]).T
        one, two = one.append(held.take(left)), two.append(held.take(right))
        part = np.concatenate([part, rng.beta(ALPHA, ALPHA, rest)])
    mixed = rng.random(len(part)) < mix
    two = one.append(two).take(torch.from_numpy(np.arange(len(part)) + len(part) * mixed))
    return one, two, torch.from_numpy(part * mixed).to(means)


def mixture(one: Batch, two: Batch, part: Tensor) -> Batch:
    """Return the mixtures of two batches, with the labels of the larger parts; bytes are rounded down to bytes.

    Args:
        one: B examples.
        two: B examples.
        part: The share of the second in each mixture, (B,).

    Example:
        >>> one, two = (Batch(torch.full((1, 1), x), torch.tensor([x]), torch.tensor([0])) for x in (4, 8))
        >>> mixed = mixture(one, two, torch.tensor([0.75]))
        >>> mixed.x.tolist(), mixed.y.tolist()
        ([[7]], [8])
    """
    weight = part.view(-1, *[1] * (one.x.ndim - 1))
    x = ((1 - weight) * one.x + weight * two.x).to(one.x.dtype)
    y, task = (torch.where(part > 0.5, b, a) for a, b in ((one.y, two.y), (one.task, two.task)))
    return Batch(x, y, task)
