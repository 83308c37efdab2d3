"""Prompt gradient projection: energy by hand, and gradients orthogonal to what is stored."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cl.errors import InputError
from cl.strategies.l2p import L2P
from cl.strategies.pgp import PGP
from cl.strategies.s_prompts import SPrompts
from prompted import one_batch, prompted
from toys import learn, same, weights

SGD = partial(torch.optim.SGD, lr=0.05)


def team(**options) -> dict:
    return {"method": L2P(6, 2, 3), "pgp": PGP(**options)}


def test_worked_energy():
    """Squared singular values 9, 4, 1 of 14: 9/14 = 0.643 is enough for 0.6, 13/14 = 0.929 for 0.9."""
    rows = torch.diag(torch.tensor([1.0, 3.0, 2.0]))[None]  # one image of three tokens
    for threshold, kept in ((0.0, []), (0.6, [1]), (0.65, [1, 2]), (0.9, [1, 2]), (0.95, [0, 1, 2])):
        projector = torch.zeros(3, 3)
        PGP()._extend(projector, rows, threshold)
        expected = torch.zeros(3)
        expected[kept] = 1
        torch.testing.assert_close(projector, torch.diag(expected))
    PGP()._extend(projector := torch.diag(torch.tensor([0.0, 1.0, 0.0])), rows, 0.6)
    assert torch.equal(projector, torch.diag(torch.tensor([0.0, 1.0, 0.0]))), "9/14 is covered already"


def by_hand(X: torch.Tensor, M: torch.Tensor, threshold: float) -> torch.Tensor:
    """The basis (r, D), with the fewest leading singular vectors of the rows' rest that reach the energy."""
    X = X.detach().double()
    rest = X - X @ M.T @ M
    V, s = torch.linalg.svd(rest)[2], torch.linalg.svdvals(rest).square()
    covered, r = (X @ M.T).square().sum(), 0
    while covered < threshold * X.square().sum() - 1e-9:
        covered, r = covered + s[r], r + 1
    return torch.cat([M, V[:r]])


def test_bases_are_those_of_tokens_prompts_and_queries_by_hand():
    learner, stream = prompted(team(threshold=0.7, key_threshold=0.99995, num_samples=1000), optimizer=SGD)
    M = K = torch.zeros(0, 16, dtype=torch.float64)
    for task in stream[:2]:
        learn(learner, stream, [task.index])
        backbone = learner.backbone.eval()
        tokens = backbone.embed(learner.prepare(task.train.tensors()[0]))
        M = by_hand(tokens.flatten(0, 1), M, 0.7)
        M = by_hand(learner.strategies["method"].prompts.flatten(0, 1), M, 0.7)
        K = by_hand(backbone.encode(tokens)[:, 0], K, 0.99995)  # queries differ little
        method = learner.strategies["pgp"]
        assert 0 < len(M) < 16 and 1 < len(K) < 16
        torch.testing.assert_close(method.directions, (M.T @ M).float(), atol=1e-4, rtol=0)
        torch.testing.assert_close(method.key_directions, (K.T @ K).float(), atol=1e-4, rtol=0)


def test_gradients_are_orthogonal_to_what_is_stored_and_only_shortened():
    learner, stream = prompted(team(threshold=0.6, key_threshold=0.6), optimizer=SGD)
    learn(learner, stream, [0])
    learner.before_task(stream[1])
    l2p, pgp = learner.strategies["method"], learner.strategies["pgp"]
    _, _, loss = one_batch(learner, stream[1])
    loss.backward()
    raw = [part.grad.clone() for part in (l2p.prompts, l2p.keys)]
    pgp.project_gradients(learner)
    for part, g, P in zip((l2p.prompts, l2p.keys), raw, (pgp.directions, pgp.key_directions), strict=True):
        assert (g @ P).abs().max() > 1e-4 * g.abs().max(), "there was something to remove"
        assert (part.grad @ P).abs().max() < 1e-5 * g.abs().max()
        torch.testing.assert_close(part.grad + g @ P, g)
        assert part.grad.norm() > 0


def test_steps_of_sgd_stay_orthogonal_and_the_first_task_is_that_of_l2p():
    learner, stream = prompted(team(threshold=0.6), optimizer=SGD)
    plain, _ = prompted(L2P(6, 2, 3), optimizer=SGD)
    learn(learner, stream, [0])
    learn(plain, stream, [0])
    l2p, P = learner.strategies["method"], learner.strategies["pgp"].directions.clone()
    assert same(weights(l2p), weights(plain.strategies["method"]))
    old = l2p.prompts.detach().clone()
    learn(learner, stream, [1])
    step = l2p.prompts.detach() - old
    assert step.norm() > 1e-3 and (step @ P).norm() < 1e-4 * step.norm()
    learn(plain, stream, [1])
    assert not torch.equal(plain.strategies["method"].prompts, l2p.prompts)


@pytest.mark.parametrize(
    "strategies", [{"pgp": PGP()}, {"pgp": PGP(), "l2p": L2P(6, 2, 3)}, {"s": SPrompts(2), "pgp": PGP()}]
)
def test_it_needs_prompts_before_it(strategies):
    with pytest.raises(InputError, match=r"no strategy before it has any: use 'strategy=\[l2p,pgp\]'"):
        prompted(strategies)


def test_adam_is_remarked_on():
    assert any("PGP projects gradients, which Adam then rescales" in r for r in remarks(torch.optim.Adam))
    assert not any("PGP" in r for r in remarks(torch.optim.SGD))


def remarks(optimizer) -> list[str]:
    learner, _ = prompted(team(), optimizer=partial(optimizer, lr=0.05))
    return learner.strategies.remarks(learner)
