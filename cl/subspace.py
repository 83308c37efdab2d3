"""What methods share that keep updates out of the space of old inputs: its layers, its directions, what leaves it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD

from cl.by_task import run_by_task
from cl.errors import InputError
from cl.random import Random
from cl.representation import Layer, layer_inputs, trainable_layers
from cl.strategy import Batch

if TYPE_CHECKING:
    from cl.learner import Learner
    from cl.task import Task


def protected(learner: Learner) -> nn.Module:
    """Return what old tasks rest on: the backbone; the head too, unless task labels give each task outputs of its own.

    Example:
        >>> from cl.testing import toy_learner
        >>> learner, _ = toy_learner(scenario="task")
        >>> protected(learner) is learner.backbone
        True
    """
    return learner.backbone if learner.scenario == "task" else learner.trunk()


def protected_layers(learner: Learner) -> list[Layer]:
    """Return the trained layers among what is protected, which a projector each belongs to.

    Example:
        >>> from cl.testing import toy_learner
        >>> len(protected_layers(toy_learner()[0]))
        3
    """
    return trainable_layers(protected(learner))


def silence_others(learner: Learner, layers: Sequence[Layer]) -> None:
    """Take the gradient off everything protected but the weights of layers: biases, norms, embeddings."""
    weights = {layer.weight for layer in layers}
    for parameter in protected(learner).parameters():
        if parameter not in weights:
            parameter.grad = None


def sampled_inputs(learner: Learner, task: Task, num_samples: int, random: Random) -> list[Tensor]:
    """Return the representation (d, n) of each protected layer on a draw of a task's training examples.

    They are measured in evaluation mode; see `cl.representation.layer_inputs`.
    """
    batch = sampled(learner, task, num_samples, random)
    with learner.evaluating():
        return layer_inputs(protected_layers(learner), lambda: learner(learner.prepare(batch.x)))


def sampled_gradients(learner: Learner, task: Task, num_samples: int, random: Random) -> Sequence[Tensor]:
    """Return the gradient (out, d) of each protected layer's weight on a draw of a task's training examples.

    They are measured in evaluation mode, of the loss that the scenario has.
    """
    batch = sampled(learner, task, num_samples, random)
    weights = [layer.weight for layer in protected_layers(learner)]
    with learner.evaluating():
        loss = learner.criterion(learner(learner.prepare(batch.x)), batch)
    return [g.flatten(1) for g in torch.autograd.grad(loss, weights)]


def sampled(learner: Learner, task: Task, num_samples: int, random: Random) -> Batch:
    """Return a draw of a task's training examples as stored, on the learner's device; all where there are no more."""
    rows = random.generator.choice(len(task.train), min(num_samples, len(task.train)), replace=False)
    x, y, label = (column.to(learner.device) for column in task.train.take(torch.from_numpy(rows)).tensors())
    return Batch(x, y, label)


def new_directions(R: Tensor, projector: Tensor, threshold: float, fewer: int = 0) -> Tensor:
    r"""Return the fewest orthonormal directions (d, r) with which a basis M holds a share of the energy of inputs.

    From the representation R and its residual :math:`\hat R = R - M M^\top R` (Saha, Garg and Roy 2021, equation 9):

    .. math:: \lVert M M^\top R \rVert_F^2 + \sum_{i \le r} \hat\sigma_i^2 \ge \epsilon \lVert R \rVert_F^2

    Singular values come from the eigenvalues of :math:`\hat R \hat R^\top`, in double precision.

    Args:
        R: Representation (d, n).
        projector: M M^T so far, (d, d).
        threshold: epsilon, in [0, 1].
        fewer: Vectors taken off the count, for a released code's rule.

    Example:
        >>> R = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> M = torch.diag(torch.tensor([1.0, 0.0, 0.0]))
        >>> new_directions(R, M, 0.6).shape[1], new_directions(R, M, 0.7).shape[1]  # 4/6 is covered already
        (0, 1)
    """
    R, P = R.double(), projector.double()
    rest = R - P @ R
    squares, vectors = torch.linalg.eigh(rest @ rest.T)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    total = R.square().sum()
    covered = total - rest.square().sum() + torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    enough = covered >= threshold * total - 1e-9 * total
    rank = int(enough.float().argmax()) if bool(enough.any()) else len(squares)
    chosen: Tensor = vectors[:, : max(rank - fewer, 0)]
    return chosen


def join_basis(basis: Tensor, new: Tensor) -> None:
    """Put orthonormal directions (d, r) behind those that a basis (d, d) has; its other columns are 0.

    Example:
        >>> M = torch.zeros(2, 2)
        >>> join_basis(M, torch.tensor([[0.0], [1.0]]))
        >>> M.tolist()
        [[0.0, 0.0], [1.0, 0.0]]
    """
    rest = basis[:, int(basis.any(0).sum()) :]
    rest[:, : new.shape[1]] = new[:, : rest.shape[1]].to(basis.dtype)


def task_directions(R: Tensor, basis: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    r"""Return the fewest directions, of a basis or new, that hold a share of the energy of a task's inputs.

    Each :math:`o_i` of the basis counts :math:`\lVert o_i^\top R \rVert^2`, each singular vector of the residual
    :math:`\hat\sigma_i^2`; the largest are taken until they add up to :math:`\epsilon \lVert R \rVert_F^2`
    (Lin et al. 2022). So a task's own subspace need not hold all of the basis.

    Args:
        R: Representation (d, n).
        basis: Orthonormal columns, those behind them 0, (d, d).
        threshold: epsilon, in [0, 1].

    Returns:
        Which columns of the basis are taken, bool (d,), and new directions (d, r).

    Example:
        >>> R = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
        >>> taken, new = task_directions(R, torch.diag(torch.tensor([1.0, 1.0, 0.0])), 0.9)
        >>> taken.tolist(), new.abs().T.tolist()
        ([True, False, False], [[0.0, 0.0, 1.0]])
    """
    R, basis = R.double(), basis.double()
    rest = R - basis @ (basis.T @ R)
    squares, vectors = torch.linalg.eigh(rest @ rest.T)
    scores = torch.cat([(basis.T @ R).square().sum(1), squares.flip(0).clamp_min(0)])
    order = scores.argsort(descending=True)
    sums = torch.cat([scores.new_zeros(1), scores[order].cumsum(0)])
    count = int((sums >= (threshold - 1e-9) * sums[-1]).float().argmax())
    taken = torch.zeros_like(scores, dtype=torch.bool)
    taken[order[:count]] = True
    return taken[: len(R)], vectors.flip(1)[:, taken[len(R) :]]


class Subspaces(nn.Module):
    r"""What is kept of every task's inputs to one layer, and how each task scales those of earlier ones.

    The columns of O are an orthonormal basis of all tasks' inputs; task j's own, :math:`B_j`, are some of them. Of a
    task that has selected earlier tasks j the layer's weight is (Lin et al. 2022)

    .. math:: \tilde W = W + \sum_j W B_j (Q_j - I) B_j^\top = W + W O A O^\top

    and one matrix A in the coordinates of O is all that has to be kept. Where :math:`B_j` have columns in common, A is
    the sum of what their Q are there, and so are its steps: `weigh` multiplies its gradient by their number.

    Args:
        size: Inputs of the layer, d.
        num_tasks: T.

    Attributes:
        basis: O, its columns behind the used ones 0, (d, d).
        member: Which columns are each task's, bool (T, d).
        scaling: A of each task, once it is learned, (T, d, d).
        shift: A of the task in training, (d, d).
    """

    basis: Tensor
    member: Tensor
    scaling: Tensor

    def __init__(self, size: int, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("basis", torch.zeros(size, size))
        self.register_buffer("member", torch.zeros(num_tasks, size, dtype=torch.bool))
        self.register_buffer("scaling", torch.zeros(num_tasks, size, size))
        self.shift = nn.Parameter(torch.zeros(size, size))
        self._columns: Tensor | None = None  # of the selected tasks, while one is in training

    def energies(self, gradient: Tensor) -> Tensor:
        r"""Return :math:`\lVert G B_j \rVert_F^2` of a weight's gradient (out, d) for each task j, (T,)."""
        return self.member.to(gradient.dtype) @ (gradient @ self.basis).square().sum(0)

    def begin(self, selected: Tensor) -> None:
        """Begin a task that scales the subspaces of some tasks, bool (T,)."""
        blocks = self.member[selected].to(self.shift.dtype)
        self._counts = blocks.T @ blocks
        self._columns = self._counts.diagonal().nonzero().flatten()

    def weight(self, weight: Tensor, task: int, present: bool) -> Tensor:
        """Return the weight of a layer as a task has it, which is the present one or not."""
        A: Tensor = self.shift
        columns = self._columns
        if columns is None or not present:
            A = self.scaling[task]
            columns = (A.any(0) | A.any(1)).nonzero().flatten()
        if len(columns) == 0:
            return weight
        W, B = weight.flatten(1), self.basis[:, columns]
        return (W + W @ B @ A[columns][:, columns] @ B.T).view_as(weight)

    def project(self, gradient: Tensor, columns: Tensor | None = None) -> None:
        """Take off a weight's gradient, in place, what lies in O, or in some of its columns, bool (d,)."""
        inside = gradient.flatten(1) @ self.basis
        inside = inside if columns is None else inside * columns
        gradient -= (inside @ self.basis.T).view_as(gradient)

    def weigh(self) -> None:
        """Leave the gradient of A what steps of each Q would add up to."""
        if self.shift.grad is not None:
            self.shift.grad *= self._counts

    @torch.no_grad()
    def end(self, task: int, R: Tensor, threshold: float) -> None:
        """Keep a task's scaling, and the main directions of its inputs R (d, n)."""
        self.scaling[task] = self.shift
        self.shift.zero_()
        self._columns = None
        taken, new = task_directions(R, self.basis, threshold)
        used = int(self.member.any(0).sum())
        join_basis(self.basis, new)
        self.member[task] = taken
        self.member[task, used : used + new.shape[1]] = True


def encode_by_task(learner: Learner, view: Tensor, subspaces: Iterable[Subspaces]) -> Tensor:
    """Return the features of rows (B, *input), each under the weights that its own task has, (B, D).

    Args:
        learner: Tells whose the rows are.
        view: Prepared inputs.
        subspaces: Those of each protected layer of the backbone.
    """
    names = {layer: f"{name}.weight" for name, layer in learner.backbone.named_modules()}
    pairs = list(zip(protected_layers(learner), subspaces, strict=True))

    def of(task: int) -> dict[str, Tensor]:
        present = task == learner.task_index
        return {names[layer]: own.weight(layer.weight, task, present) for layer, own in pairs}

    return run_by_task(learner, learner.backbone, view, of)


def check_task_labels(learner: Learner, name: str) -> None:
    """Refuse a scenario that does not give task labels at test.

    Raises:
        InputError: Naming method and scenario.
    """
    if learner.scenario != "task":
        raise InputError(
            f"{name} has weights for each task, but the {learner.scenario}-incremental scenario does not tell the task "
            "at test: use scenario=task."
        )


def one_each(key: str, value: float | Sequence[float], count: int) -> list[float]:
    """Return a setting of each layer, from one for all or one a layer.

    Raises:
        InputError: If there are too many or too few.

    Example:
        >>> one_each("gpm.threshold", 0.9, 3)
        [0.9, 0.9, 0.9]
    """
    if isinstance(value, float | int):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{key} has {len(value)} values for {count} layers: give one each.")
    return list(value)


def check_plain_sgd(learner: Learner, name: str) -> None:
    """Refuse an optimizer whose steps are not its gradients times a number.

    Weight decay and Adam leave the space that gradients were projected on, as does a momentum from before.

    Raises:
        InputError: Naming method and optimizer.
    """
    if learner.strategies.owned("configure_optimizer"):
        raise InputError(
            f"{name} projects gradients, but another strategy owns configure_optimizer and changes steps: drop one."
        )
    optimizer = learner.new_optimizer([nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    if type(optimizer) is not SGD or group["momentum"] or group["weight_decay"]:
        raise InputError(
            f"{name} needs plain SGD, whose steps stay where gradients are, but the optimizer is "
            f"{type(optimizer).__name__} with momentum={group.get('momentum', 0)}, weight_decay="
            f"{group.get('weight_decay', 0)}: use optimizer=sgd optimizer.momentum=0 optimizer.weight_decay=0."
        )


def check_statistics(learner: Learner, name: str) -> None:
    """Refuse batch norm that keeps running statistics, which drift whatever the gradients are.

    Raises:
        InputError: Naming method and module.
    """
    for path, module in learner.backbone.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise InputError(
                f"{name} cannot protect the running statistics of backbone.{path}: set backbone.norm=batch_no_stats."
            )
