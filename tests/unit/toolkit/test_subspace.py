"""The inputs of layers, of which subspaces are made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cl.errors import InputError
from cl.toolkit.layers import layer_inputs


def test_a_layer_called_twice_is_protected_for_both_inputs_and_a_silent_one_is_refused():
    layer, a, b = nn.Linear(3, 2, bias=False), torch.randn(4, 3), torch.randn(5, 3)
    (R,) = layer_inputs([layer], lambda: (layer(a), layer(b)))
    torch.testing.assert_close(R, torch.cat([a, b]).T)
    with pytest.raises(InputError, match="was not called in a forward pass"):
        layer_inputs([layer, nn.Linear(2, 2)], lambda: layer(a))
