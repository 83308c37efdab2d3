"""The names that Avalanche, from PyPI, gives to forgetting and transfer, run on the same matrices as ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl.metrics import transfer

pytest.importorskip("avalanche")

quick = settings(deadline=None, max_examples=25)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    T = draw(st.integers(2, 6))
    values = draw(st.lists(st.floats(0, 1), min_size=(T + 1) * T, max_size=(T + 1) * T))
    return torch.tensor(values, dtype=torch.float64).view(T + 1, T)


def fed(metric: object, R: Tensor) -> object:
    """A metric of Avalanche that has seen each task when it was learned, and every old one after every later task."""
    for i in range(1, len(R)):
        for j in range(1, i + 1):
            metric.update(j, float(R[i, j - 1]), initial=i == j)  # type: ignore[attr-defined]
    return metric


@quick
@given(matrices())
def test_forgetting_and_backward_transfer(R: Tensor) -> None:
    from avalanche.evaluation.metrics.forgetting_bwt import BWT, Forgetting

    T = R.shape[1]
    forgetting, backward = fed(Forgetting(), R).result(), fed(BWT(), R).result()  # type: ignore[attr-defined]
    assert forgetting.keys() == backward.keys() == set(range(1, T))  # the last task has one number only
    B = transfer.backward_transfer(R)
    for j in range(1, T):
        assert abs(forgetting[j] + B[-1, j - 1].item()) < 1e-12 and abs(backward[j] - B[-1, j - 1].item()) < 1e-12
    mean = sum(forgetting.values()) / len(forgetting)
    assert abs(transfer.forgetting_avalanche(R).item() - mean) < 1e-12
    assert abs(transfer.bwt_gem(R).item() - sum(backward.values()) / len(backward)) < 1e-12
    assert abs(transfer.forgetting_continual_world(R).item() - sum(forgetting.values()) / T) < 1e-12


@quick
@given(matrices())
def test_forward_transfer(R: Tensor) -> None:
    from avalanche.evaluation.metrics.forward_transfer import ForwardTransfer

    T, metric = R.shape[1], ForwardTransfer()
    for j in range(1, T + 1):
        metric.update(j, float(R[0, j - 1]), initial=True)
    for j in range(2, T + 1):
        metric.update(j, float(R[j - 1, j - 1]))
    found = metric.result()
    F = transfer.forward_transfer(R)
    assert all(abs(found[j] - F[j - 2, j - 1].item()) < 1e-12 for j in range(2, T + 1))
    assert abs(transfer.fwt_gem(R).item() - sum(found.values()) / len(found)) < 1e-12


@quick
@given(matrices())
def test_their_stream_metrics(R: Tensor) -> None:
    """The plugins that a run of Avalanche prints, driven as its loops drive them, with R in the place of a network."""
    from avalanche.evaluation.metrics.forgetting_bwt import StreamBWT, StreamForgetting
    from avalanche.evaluation.metrics.forward_transfer import StreamForwardTransfer

    plugins = {"forgetting_avalanche": StreamForgetting(), "bwt_gem": StreamBWT(), "fwt_gem": StreamForwardTransfer()}
    seen: dict[str, list[float]] = {name: [] for name in plugins}
    for name, plugin in plugins.items():
        for i in range(len(R)):
            if i:
                plugin.before_training_exp(SimpleNamespace(experience=SimpleNamespace(current_experience=i - 1)))
            elif name != "fwt_gem":
                continue  # it alone is evaluated before any training
            plugin.before_eval(None)
            for j, value in enumerate(R[i].tolist()):
                plugin.eval_exp_id, plugin.metric_result = j, lambda strategy, value=value: value
                plugin.after_eval_exp(None)
            plugin.at_init = False  # as after the first evaluation
            seen[name].append(plugin.result())
    ours = transfer.SCALARS | transfer.LIBRARY_VARIANTS
    for name, values in seen.items():
        assert abs(ours[name].function(R).item() - values[-1]) < 1e-12
