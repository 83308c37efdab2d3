"""ER-LAS: the adjusted loss, the window of counts, and the loop written by hand."""

from __future__ import annotations

from collections import deque

import pytest
import torch
import torch.nn.functional as F

from by_hand import by_hand, close
from cl.engine.batch import Batch
from cl.errors import InputError
from cl.strategies.er import ER
from cl.strategies.er_las import ERLAS, log_prior
from toys import toy, vector


def test_without_adjustment_it_is_replay():
    one, other = (toy(method, range(3), epochs=2)[0] for method in (ERLAS(20, tau=0.0, window=3), ER(20)))
    assert torch.equal(vector(one), vector(other))


@pytest.mark.parametrize(("tau", "window"), [(1.0, 1), (0.5, 3)])
def test_er_las_is_the_loop_written_by_hand(tau, window):
    """The window slides over the batches of all tasks; a label weighs exp of its adjusted logit."""
    seen_labels = deque(maxlen=window)

    def loss_of(net, x, y, memory, seen):
        if memory.rows:
            old = memory.some(5)
            bx, by = torch.cat([x, old[0]]), torch.cat([y, old[1]])
        else:
            bx, by = x, y
        seen_labels.append(by)
        counts = [sum(int((labels == c).sum()) for labels in seen_labels) for c in range(6)]
        z = net(bx)
        terms = []
        for logits, label in zip(z, by, strict=True):
            weighed = torch.stack([(counts[c] / sum(counts)) ** tau * logits[c].exp() for c in range(seen)])
            terms.append(-(weighed[label] / weighed.sum()).log())
        return torch.stack(terms).mean(), z[: len(x)]

    close(toy(ERLAS(12, 5, tau, window), range(3), epochs=2)[0], by_hand(loss_of))


def test_the_best_logits_are_those_without_the_prior():
    """If p(c) = pi_c q_c / Z is what the batch shows, the adjusted loss is least where softmax(f) = q."""
    q, counts = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([1.0, 2.0, 7.0])
    pi = counts / counts.sum()
    shown = pi * q / (pi * q).sum()
    f = q.log().clone().requires_grad_()
    loss = F.cross_entropy((f + log_prior(counts, 1.0))[None], shown[None])
    (gradient,) = torch.autograd.grad(loss, f)
    torch.testing.assert_close(gradient, torch.zeros(3), atol=1e-6, rtol=0)


def test_classes_that_do_not_occur_do_not_compete_and_replayed_ones_of_others_count():
    learner, stream = toy(ERLAS(20), [0])
    method = learner.strategies["method"]
    learner.before_task(stream[1])
    batch = Batch(torch.zeros(3, 1, 4, 4), torch.tensor([2, 2, 0]), torch.tensor([1, 1, 0]), num_incoming=2)
    logits = torch.tensor([[0.0, 90.0, 0.0, 90.0, 90.0, 90.0]]).expand(3, 6)
    found = float(method.criterion(learner, batch, logits))
    assert found == pytest.approx(-(2 * torch.tensor(2 / 3).log() + torch.tensor(1 / 3).log()).item() / 3)


def test_er_las_refuses_an_empty_window():
    with pytest.raises(InputError, match=r"erlas\.window=0|er_las\.window=0"):
        ERLAS(window=0)
