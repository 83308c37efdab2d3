"""One linear head over all classes, and the mask of competing classes by which the scenarios differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.data.task import Scenario


class Head(nn.Linear):
    """A linear layer with an output for every class of the stream from the start: (B, num_features) -> (B, C).

    Example:
        >>> Head(5, 3)(torch.zeros(2, 5)).shape
        torch.Size([2, 3])
    """

    def __init__(self, num_features: int, num_classes: int, bias: bool = True) -> None:
        super().__init__(num_features, num_classes, bias=bias)


def competing(scenario: Scenario, seen: Tensor, membership: Tensor) -> Tensor:
    r"""Return which classes compete on an example of each task, bool (T, C).

    Let S be the seen classes and :math:`C_j` the classes of task j. In the task-incremental scenario :math:`C_j`
    competes on the examples of task j; in the domain-incremental one, every class; in the class-incremental one, S if
    task j has been seen, else every class of the head. For a task that has not been seen, S alone would make the
    accuracy 0 by construction, and :math:`S \cup C_j` would reveal the task. So row 0 of R and the entries before a
    task is learned use the same mask, and can be compared.

    Args:
        scenario: "class", "task" or "domain".
        seen: Classes trained so far, bool (C,).
        membership: Classes of each task, bool (T, C).

    Example:
        >>> member = torch.eye(3, dtype=torch.bool)
        >>> competing("class", torch.tensor([True, False, False]), member).int().tolist()
        [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
        >>> competing("task", torch.tensor([True, False, False]), member).equal(member)
        True
    """
    if scenario == "class":
        learned = ~(membership & ~seen).any(1, keepdim=True)
        return torch.where(learned, seen, torch.ones_like(seen))
    return membership if scenario == "task" else torch.ones_like(membership)


class Mask(nn.Module):
    """Sets the logits of classes that do not compete to minus infinity, by one addition or none.

    Args:
        num_tasks: T.
        num_classes: C.

    Example:
        >>> mask = Mask(2, 3)
        >>> mask.set(torch.tensor([[True, True, False], [True, True, False]]))
        >>> mask(torch.zeros(1, 3), torch.tensor([1])).tolist()
        [[0.0, 0.0, -inf]]
    """

    bias: Tensor

    def __init__(self, num_tasks: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(num_tasks, num_classes), persistent=False)
        self._rows = 0  # rows of the bias in use: 0, all classes compete; 1, the same for every task; T, one per task

    def set(self, competing: Tensor) -> None:
        """Set the classes that compete on the examples of each task, bool (T, C)."""
        self.bias.zero_().masked_fill_(~competing.to(self.bias.device), -torch.inf)
        same = bool((competing == competing[0]).all())
        self._rows = len(competing) if not same else 0 if bool(competing.all()) else 1

    def forward(self, logits: Tensor, task: Tensor) -> Tensor:
        """Mask logits (B, C) of examples with task labels (B,)."""
        if self._rows == 0:
            return logits
        return logits + (self.bias[0] if self._rows == 1 else self.bias[task])
