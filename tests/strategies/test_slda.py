"""SLDA: worked examples, the covariance in closed form, scikit-learn's classifier, and the paper's recursion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl.data.task import TaskData
from cl.errors import InputError
from cl.strategies.l2p import L2P
from cl.strategies.slda import SLDA, discriminant
from cl.testing import toy_learner
from draws import normal, quick, seeds
from prompted import all_rows, assert_rows_are_independent
from toys import Identity, build, float_stream, learn, same, toy, trunk


def test_a_worked_example():
    """Shrunk to diag(2, 1), whose inverse is diag(1/2, 1): weights (1/2, 0) and (0, 2), biases -1/4 and -2."""
    weight, bias = discriminant(
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.diag(torch.tensor([3.0, 1.0])), shrinkage=0.5
    )
    torch.testing.assert_close(weight, torch.tensor([[0.5, 0.0], [0.0, 2.0]]))
    torch.testing.assert_close(bias, torch.tensor([-0.25, -2.0]))


def learned(parts, strategy, num_classes, batch=None):
    stream = float_stream([x for x, _ in parts], [y for _, y in parts], "domain", num_classes)
    learner = learn(build(stream, Identity(parts[0][0].shape[1]), strategy, eval_batch_size=batch), stream)
    return learner, learner.strategies["method"]


def examples(seed, counts, D=3):
    """Features (N, D) of classes of so many examples each, in random order."""
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    means = 3 * normal(seed + 1, len(counts), D)
    return (means[y] + normal(seed, len(y), D) @ normal(seed + 2, D, D)).float(), y


@quick
@given(seeds, st.lists(st.integers(2, 12), min_size=2, max_size=4), st.integers(1, 9), st.floats(1e-4, 0.9))
def test_the_sums_are_the_pooled_covariance_and_the_scores_scikit_learns(seed, counts, batch, shrinkage):
    """Up to the factor of all weights and the logarithms of the shares that the header names."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y = examples(seed, counts)
    cut = len(y) // 2
    _, ours = learned([(x[:cut], y[:cut]), (x[cut:], y[cut:])], SLDA(shrinkage), len(counts), batch)
    z, means = x.double(), torch.stack([x[y == c].double().mean(0) for c in range(len(counts))])
    covariance = (z - means[y]).T @ (z - means[y]) / len(y)
    total = ours.total / ours.count
    torch.testing.assert_close(total, means, rtol=1e-9, atol=1e-9)
    found = (ours.gram - ours.total.T @ total) / ours.count.sum()
    torch.testing.assert_close(found, covariance, rtol=1e-8, atol=1e-8)

    s = shrinkage / (shrinkage + float(covariance.trace()) / x.shape[1] * (1 - shrinkage))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s).fit(z.numpy(), y.numpy())
    weights, shares = theirs.coef_, np.asarray(counts) / len(y)
    biases = theirs.intercept_ - np.log(shares)
    if len(counts) == 2:  # scikit-learn keeps the difference of two classes
        ours_w, ours_b = ours.weight[:, 1:] - ours.weight[:, :1], ours.bias[1:] - ours.bias[:1]
        biases = theirs.intercept_ - np.log(shares[1] / shares[0])
    else:
        ours_w, ours_b = ours.weight, ours.bias
    scale = (1 - s) / (1 - shrinkage)
    np.testing.assert_allclose(ours_w.T, weights * scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours_b, biases * scale, rtol=1e-5, atol=1e-6)


def test_neither_the_order_of_examples_nor_that_of_tasks_matters():
    x, y = examples(0, [9, 7, 5])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(3))
    _, one = learned([(x[:10], y[:10]), (x[10:], y[10:])], SLDA(), 3)
    _, other = learned([(x[order][:4], y[order][:4]), (x[order][4:], y[order][4:])], SLDA(), 3, batch=3)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(one.bias, other.bias, rtol=1e-8, atol=1e-8)


def test_the_papers_recursion_differs_by_its_weights_alone():
    """With t / (t + 1) it depends on the order; with the count of the class for t it is the exact covariance."""
    x, y = examples(1, [30, 20, 25])

    def recursion(rows, of_class):
        means, counts, sigma = torch.zeros(3, 3).double(), torch.zeros(3), torch.zeros(3, 3).double()
        for t, i in enumerate(rows):
            gap, n = x[i].double() - means[y[i]], counts[y[i]] if of_class else t
            sigma = (t * sigma + torch.outer(gap, gap) * n / (n + 1)) / (t + 1)
            means[y[i]] += gap / (counts[y[i]] + 1)
            counts[y[i]] += 1
        return sigma

    _, ours = learned([(x, y)], SLDA(), 3)
    exact = (ours.gram - ours.total.T @ (ours.total / ours.count)) / len(y)
    forth, back = range(len(y)), range(len(y) - 1, -1, -1)
    for rows in (forth, back):
        torch.testing.assert_close(recursion(rows, of_class=True), exact, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(recursion(forth, False), recursion(back, False), rtol=0.01)


def test_predictions_are_the_gaussians_likelihoods():
    learner, stream = toy(SLDA(0.1), range(3))
    x, y, _ = TaskData.concat([task.train for task in stream]).tensors()
    z = learner.backbone(learner.prepare(x)).double()
    means = torch.stack([z[y == c].mean(0) for c in range(6)])
    shrunk = 0.9 * (z - means[y]).T @ (z - means[y]) / len(y) + 0.1 * torch.eye(16)
    query = all_rows(learner, stream)
    likely = torch.stack(
        [
            torch.distributions.MultivariateNormal(mean, shrunk).log_prob(learner.backbone(query).double())
            for mean in means
        ],
        dim=1,
    )
    ours = learner.strategies["method"].predict(learner, query).double()
    torch.testing.assert_close(
        ours - ours.mean(1, keepdim=True), likely - likely.mean(1, keepdim=True), rtol=1e-3, atol=1e-3
    )
    assert same(trunk(learner), trunk(toy(None)[0])), "nothing is trained"
    assert_rows_are_independent(learner, stream)


def test_a_class_without_examples_scores_lowest_and_what_cannot_be_is_refused():
    learner, stream = toy(SLDA(), [0])
    out = learner.strategies["method"].predict(learner, all_rows(learner, stream))
    assert bool((out[:, 2:] < out[:, :2].min()).all())
    with pytest.raises(InputError, match=r"slda\.shrinkage=0\.0 must be above 0"):
        SLDA(shrinkage=0.0)
    with pytest.raises(InputError, match="SLDA reads the backbone's features, but another strategy owns encode"):
        toy_learner({"slda": SLDA(), "l2p": L2P(4, 2, 2)}, backbone="vit")
