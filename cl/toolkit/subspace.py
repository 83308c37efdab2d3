"""Helpers of methods that keep updates orthogonal to the inputs of old tasks: layers, bases, checks of optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer

from cl.engine.batch import Batch
from cl.engine.strategy import LearnerLike, Strategy
from cl.errors import InputError
from cl.random import Random
from cl.toolkit.by_task import check_apart, rows_by_task
from cl.toolkit.layers import Layer, layer_inputs, trainable_layers

if TYPE_CHECKING:
    from cl.data.task import Stream, Task


def protected(learner: LearnerLike) -> nn.Module:
    """Return the module on which old tasks depend: the backbone, and the head unless each task has its own outputs.

    Tasks have their own outputs if the scenario is "task" and no two of them share classes.

    Example:
        >>> from cl.testing import toy_learner
        >>> learner, _ = toy_learner(scenario="task")
        >>> protected(learner) is learner.backbone
        True
    """
    return learner.trunk() if learner.scenario != "task" or learner.shared_outputs else learner.backbone


def protected_layers(learner: LearnerLike) -> list[Layer]:
    """Return the trainable layers of the protected module; a method has a projector for each.

    Example:
        >>> from cl.testing import toy_learner
        >>> len(protected_layers(toy_learner()[0]))
        3
    """
    return trainable_layers(protected(learner))


def silence_others(learner: LearnerLike, layers: Sequence[Layer]) -> None:
    """Remove the gradients of all protected parameters but the weights of layers: biases, norms, embeddings."""
    weights = {layer.weight for layer in layers}
    for parameter in protected(learner).parameters():
        if parameter not in weights:
            parameter.grad = None


def sampled_inputs(learner: LearnerLike, task: Task, num_samples: int, random: Random) -> list[Tensor]:
    """Return the representation (d, n) of each protected layer on a sample of a task's training examples.

    The network is in evaluation mode; see `cl.toolkit.layers.layer_inputs`.
    """
    batch = sampled(learner, task, num_samples, random)
    with learner.evaluating():
        return layer_inputs(protected_layers(learner), lambda: learner(learner.prepare(batch.x), batch.task))


def sampled_gradients(learner: LearnerLike, task: Task, num_samples: int, random: Random) -> Sequence[Tensor]:
    """Return the gradient (out, d) of each protected layer's weight on a sample of a task's training examples.

    It is the gradient of the learner's loss; the network is in evaluation mode.
    """
    batch = sampled(learner, task, num_samples, random)
    weights = [layer.weight for layer in protected_layers(learner)]
    with learner.evaluating():
        loss = learner.criterion(learner(learner.prepare(batch.x), batch.task), batch)
    return [g.flatten(1) for g in torch.autograd.grad(loss, weights)]


def sampled(learner: LearnerLike, task: Task, num_samples: int, random: Random) -> Batch:
    """Return `num_samples` random training examples of a task, or all if there are fewer, on the learner's device."""
    rows = random.generator.choice(len(task.train), min(num_samples, len(task.train)), replace=False)
    x, y, label = (column.to(learner.device) for column in task.train.take(torch.from_numpy(rows)).tensors())
    return Batch(x, y, label)


def new_directions(R: Tensor, projector: Tensor, threshold: float, fewer: int = 0) -> Tensor:
    r"""Return the fewest new directions (d, r) with which a basis M spans a share of the energy of a task's inputs.

    They are singular vectors of the residual :math:`\hat R = R - M M^\top R` of the representation R, as many as are
    needed for (Saha, Garg and Roy 2021, equation 9)

    .. math:: \lVert M M^\top R \rVert_F^2 + \sum_{i \le r} \hat\sigma_i^2 \ge \epsilon \lVert R \rVert_F^2

    Singular values come from the eigenvalues of :math:`\hat R \hat R^\top`, in double precision.

    Args:
        R: Representation (d, n).
        projector: M M^T of the present basis, (d, d).
        threshold: epsilon, in [0, 1].
        fewer: Number of directions to return less than that, for the rule of a released code.

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
    """Append orthonormal directions (d, r) to the columns of a basis (d, d), whose unused columns are 0, in place.

    Example:
        >>> M = torch.zeros(2, 2)
        >>> join_basis(M, torch.tensor([[0.0], [1.0]]))
        >>> M.tolist()
        [[0.0, 0.0], [1.0, 0.0]]
    """
    rest = basis[:, int(basis.any(0).sum()) :]
    rest[:, : new.shape[1]] = new[:, : rest.shape[1]].to(basis.dtype)


def task_directions(R: Tensor, basis: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    r"""Return the fewest directions, of a basis or new, that span a share of the energy of a task's inputs.

    A column :math:`o_i` of the basis has the energy :math:`\lVert o_i^\top R \rVert^2`, a singular vector of the
    residual :math:`\hat\sigma_i^2`. Directions are taken in the order of energy until they add up to
    :math:`\epsilon \lVert R \rVert_F^2` (Lin et al. 2022). So the subspace of a task need not contain all of the basis.

    Args:
        R: Representation (d, n).
        basis: Orthonormal columns, and unused ones of 0, (d, d).
        threshold: epsilon, in [0, 1].

    Returns:
        Whether each column of the basis is taken, bool (d,); and the new directions (d, r).

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


class _Scale(torch.autograd.Function):
    """The function x + x O M O^T with M = A or A^T, whose gradient of A is multiplied by `counts`.

    The gradient of A is written once, into one new matrix, to save memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, basis: Tensor, counts: Tensor, transposed: bool) -> Tensor:
        inside, M = x @ basis, A[: len(counts), : len(counts)]
        ctx.save_for_backward(inside, A, basis, counts)
        ctx.transposed = transposed
        return x + inside @ (M.T if transposed else M) @ basis.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        inside, A, basis, counts = ctx.saved_tensors
        M, whole = A[: len(counts), : len(counts)], torch.zeros_like(A)
        outside = gradient.to(A.dtype) @ basis  # under autocast, the forward pass has another type
        pair = inside.to(outside.dtype).flatten(0, -2), outside.flatten(0, -2)
        left, right = reversed(pair) if ctx.transposed else pair
        torch.mul(left.T @ right, counts, out=whole[: len(counts), : len(counts)])
        through = None
        if ctx.needs_input_grad[0]:
            through = gradient + (outside @ (M if ctx.transposed else M.T) @ basis.T).to(gradient.dtype)
        return through, whole, None, None, None


class Subspaces(nn.Module):
    r"""The subspaces of all tasks' inputs to one layer, and the matrices by which each task scales earlier ones.

    The columns of O are an orthonormal basis of the inputs of all tasks; the basis of task j, :math:`B_j`, is a subset
    of them. For a task that has selected earlier tasks j, the layer's weight is (Lin et al. 2022)

    .. math:: \tilde W = W + \sum_j W B_j (Q_j - I) B_j^\top = W + W O A O^\top

    so that one matrix A in the coordinates of O is stored for each task. Where several :math:`B_j` share columns, an
    entry of A is the sum of entries of several :math:`Q_j - I`, each of which makes a step of its own. So the gradient
    of an entry of A is multiplied by their number.

    Args:
        size: Number of inputs of the layer, d.
        num_tasks: Number of tasks, T.

    Attributes:
        basis: O, whose unused columns are 0, (d, d).
        member: Whether each column is in the basis of each task, bool (T, d).
        scaling: A of each task that is learned, (T, d, d).
        shift: A of the task in training, (d, d).
        directions: The columns of O at the beginning of the task in training, (d, r).
        columns: `member` for these columns, as numbers, (T, r).
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
        self._counts: Tensor | None = (
            None  # while a task trains: the number of selected tasks that have both of two columns
        )

    @property
    def used(self) -> int:
        """Number of columns of the basis that are in use."""
        return int(self.member.any(0).sum())

    def energies(self, gradient: Tensor) -> Tensor:
        r"""Return :math:`\lVert G B_j \rVert_F^2` of a weight's gradient (out, d) for each task j, (T,)."""
        return self.member.to(gradient.dtype) @ (gradient @ self.basis).square().sum(0)

    def begin(self, selected: Tensor) -> None:
        """Begin a task that scales the subspaces of selected earlier tasks, bool (T,)."""
        used = self.used
        self.directions, self.columns = self.basis[:, :used], self.member[:, :used].to(self.shift.dtype)
        blocks = self.columns[selected]
        self._counts, self._scales = blocks.T @ blocks, bool(blocks.any())
        self._projector = self.directions @ self.directions.T if 2 * used > len(self.basis) else None

    def weight(self, weight: Tensor, task: int, present: bool) -> Tensor:
        """Return the layer's weight, scaled for a task; `present` says whether it is the task in training."""
        return self._scaled(weight.flatten(1), task, present, False).view_as(weight)

    def inputs(self, x: Tensor, task: int, present: bool) -> Tensor:
        r"""Return the scaled inputs :math:`x'` (..., d) of a linear layer, with :math:`x' W^\top = x \tilde W^\top`."""
        return self._scaled(x, task, present, True)

    def _scaled(self, x: Tensor, task: int, present: bool, transposed: bool) -> Tensor:
        if present and self._counts is not None:
            if not self._scales:
                return x
            return _Scale.apply(x, self.shift, self.directions, self._counts, transposed)  # type: ignore[no-any-return]
        used = self.used
        basis, A = self.basis[:, :used], self.scaling[task, :used, :used]
        return x + x @ basis @ (A.T if transposed else A) @ basis.T if bool(A.any()) else x

    def project(self, gradient: Tensor) -> None:
        """Remove the part of a weight's gradient that is in the span of O, in place."""
        g, basis, projector = gradient.flatten(1), self.directions, self._projector
        gradient -= (g @ basis @ basis.T if projector is None else g @ projector).view_as(gradient)

    @torch.no_grad()
    def end(self, task: int, R: Tensor, threshold: float) -> None:
        """Store a task's scaling, and add the main directions of its inputs R (d, n) to the basis."""
        self.scaling[task] = self.shift
        self.shift.zero_()
        self._counts = None
        taken, new = task_directions(R, self.basis, threshold)
        used = self.used
        join_basis(self.basis, new)
        self.member[task] = taken
        self.member[task, used : used + new.shape[1]] = True


class ScaledByTask(Strategy):
    r"""Base class of methods that scale weights in the subspaces of old tasks; examples get the weights of their task.

    Attributes:
        threshold: The share of the inputs' energy that a task's subspace spans, one number or one for each layer.
        thresholds: The same, as a list with one number for each layer.
        subspaces: The subspaces of each protected layer.
    """

    scenarios = ("task",)
    targets = ("label", "multilabel", "regression")
    needs = ("boundaries", "sgd")
    uses_task = True
    threshold: float | Sequence[float]
    subspaces: Sequence[Subspaces]

    def setup(self, learner: LearnerLike, stream: Stream) -> None:
        """Allocate the subspaces of each layer; refuse streams, networks and optimizers that do not fit the method."""
        name = type(self).__name__
        check_apart(name, learner, stream)
        check_plain_sgd(learner, name)
        check_statistics(learner, name)
        check_trained(learner, name)
        if learner.train_mask != learner.scenario:
            raise InputError(
                f"{name} selects tasks by the loss over the task's own classes, not over train_mask="
                f"{learner.train_mask}: drop train_mask."
            )
        self.random = Random()
        sizes = [layer.weight[0].numel() for layer in protected_layers(learner)]
        self.thresholds = one_each(f"{name.lower()}.threshold", self.threshold, len(sizes))
        self.subspaces = nn.ModuleList(Subspaces(size, len(stream)) for size in sizes)  # type: ignore[assignment]

    def encode(self, learner: LearnerLike, view: Tensor) -> Tensor:
        """Return features, for each example under the weights of its task."""
        return self._run(learner, learner.backbone, view)

    def classify(self, learner: LearnerLike, features: Tensor) -> Tensor:
        """Return logits; if tasks share outputs, for each example under the weights of its task."""
        if not learner.shared_outputs:
            return learner.head(features)  # type: ignore[no-any-return]
        return self._run(learner, learner.head, features)

    def _run(self, learner: LearnerLike, module: nn.Module, inputs: Tensor) -> Tensor:
        names = {layer: f"{name}.weight".lstrip(".") for name, layer in module.named_modules()}
        pairs = zip(protected_layers(learner), self.subspaces, strict=True)
        own = [(layer, part) for layer, part in pairs if layer in names]

        def run(rows: Tensor, task: int) -> Tensor:
            present, weights = task == learner.task_index, {}
            with ExitStack() as hooks:
                for layer, part in own:
                    # a batch has fewer examples than a linear layer has outputs: scaling inputs is cheaper
                    if isinstance(layer, nn.Linear):
                        scale = partial(_scaled, part, task, present)
                        hooks.callback(layer.register_forward_pre_hook(scale).remove)
                    else:
                        weights[names[layer]] = part.weight(layer.weight, task, present)
                return functional_call(module, weights, (rows,))  # type: ignore[no-any-return]

        return rows_by_task(learner, inputs, run)


def _scaled(
    part: Subspaces, task: int, present: bool, layer: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return part.inputs(inputs[0], task, present), *inputs[1:]


def one_each(key: str, value: float | Sequence[float], count: int) -> list[float]:
    """Return a setting for each of `count` layers, from one number for all or a list.

    Raises:
        InputError: If the list has another length.

    Example:
        >>> one_each("gpm.threshold", 0.9, 3)
        [0.9, 0.9, 0.9]
    """
    if isinstance(value, float | int):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{key} has {len(value)} values for {count} layers: give one each.")
    return list(value)


def check_plain_sgd(learner: LearnerLike, name: str) -> None:
    """Refuse an optimizer whose steps are not a multiple of the gradient.

    Steps with weight decay, of Adam, or with momentum from earlier tasks leave the space onto which gradients are
    projected.

    Raises:
        InputError: If the optimizer is not plain SGD; names method and optimizer.
    """
    optimizer = _steps(learner)
    if optimizer is None:
        raise InputError(
            f"{name} projects gradients, but another strategy owns configure_optimizer and changes steps: drop one."
        )
    group = optimizer.param_groups[0]
    if type(optimizer) is not SGD or group["momentum"] or group["weight_decay"]:
        raise InputError(
            f"{name} needs plain SGD, whose steps follow the projected gradients, but the optimizer is "
            f"{type(optimizer).__name__} with momentum={group.get('momentum', 0)}, weight_decay="
            f"{group.get('weight_decay', 0)}: use optimizer=sgd optimizer.momentum=0 optimizer.weight_decay=0."
        )


def check_trained(learner: LearnerLike, name: str) -> None:
    """Refuse a learner without trainable protected weights.

    Raises:
        InputError: If there are none; names the method.
    """
    if not any(p.requires_grad for p in protected(learner).parameters()):
        raise InputError(
            f"{name} protects trainable weights of the backbone, which has none: drop it, or unfreeze them."
        )


def remark_rescaled(name: str, learner: LearnerLike) -> str | None:
    """Return a remark that the optimizer's steps do not follow projected gradients; None if it is SGD.

    Example:
        >>> from cl.testing import toy_learner
        >>> remark_rescaled("GEM", toy_learner()[0])
    """
    optimizer = _steps(learner)
    if type(optimizer) is SGD:
        return None
    who = "another strategy" if optimizer is None else type(optimizer).__name__
    return (
        f"{name} projects gradients, which {who} then rescales: a step may still increase the loss on stored examples. "
        "Its paper uses optimizer=sgd."
    )


def _steps(learner: LearnerLike) -> Optimizer | None:
    # a new optimizer of the kind that trains; None if a strategy owns it
    if learner.strategies.owned("configure_optimizer"):
        return None
    return learner.new_optimizer([nn.Parameter(torch.zeros(1))])


def check_statistics(learner: LearnerLike, name: str) -> None:
    """Refuse batch norm with running statistics, which change whatever the gradients are.

    Raises:
        InputError: If there is such a module; names method and module.
    """
    for path, module in learner.backbone.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise InputError(
                f"{name} cannot protect the running statistics of backbone.{path}: set backbone.norm=batch_no_stats."
            )
