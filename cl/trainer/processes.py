"""Start the processes of one run, and end them all when one fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

from cl import distributed
from cl.errors import InputError
from cl.trainer.arguments import TrainerFactory, check_arguments, quiet, quiet_trainer
from cl.trainer.failures import cause

_PATIENCE = timedelta(hours=6)  # timeout of the others, since process 0 may wait for another run's reference
_GRACE = 5.0  # seconds that processes have to end by themselves after another one has failed


class Replicated(DDPStrategy):
    """Lightning's strategy with a copy of the learner in each process; gradients are summed at each optimizer step.

    DistributedDataParallel would sum them in the backward pass that belongs to its own forward pass. Here a batch is a
    chunk of minibatches, and a strategy may compute further gradients. The processes are running already.
    """

    strategy_name = "replicated"

    def _configure_launcher(self) -> None:
        """Launch nothing."""

    def setup(self, trainer: pl.Trainer) -> None:
        """Set up as for one device: no module is wrapped, and no state copied from process 0; memories differ."""
        if trainer.state.fn == TrainerFn.FITTING and self._layer_sync is not None:
            assert self.model is not None
            self.model = self._layer_sync.apply(self.model)
        super(DDPStrategy, self).setup(trainer)

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        return model

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Weight the loss by this process's share of the batch, and run the backward pass."""
        learner: Any = self.lightning_module
        return super().backward(closure_loss * (learner.rows / learner.batch_size), optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Sum the gradients over processes, then step, so that unscaling, projection and clipping see the sum."""
        learner: Any = self.lightning_module
        distributed.reduce_gradients(learner, learner.summed)
        return super().optimizer_step(optimizer, closure, model, **kwargs)


def replicated(factory: TrainerFactory) -> TrainerFactory:
    """Return a factory of Trainers for the running processes; if there is one, that which is given.

    Args:
        factory: A partial of `pl.Trainer`.
    """
    kind = _kind(factory)
    if distributed.world_size() == 1:
        return factory if kind == "auto" else partial(factory, strategy="auto")

    def build(**options: Any) -> pl.Trainer:
        trainer = factory(**options, strategy=Replicated(timeout=_PATIENCE))
        # Lightning's handler of SIGTERM would broadcast while processes are at different points, and hang.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer

    return build


def _kind(factory: TrainerFactory) -> str:
    """Return the name of the Lightning strategy that a factory asks for.

    Raises:
        InputError: If that strategy divides or wraps the weights.
    """
    kind = getattr(factory, "keywords", {}).get("strategy", "auto")
    if kind == "auto" or (isinstance(kind, str) and kind.split("_")[0] == "ddp"):
        return str(kind)
    if kind == "single_device" or isinstance(kind, pl.strategies.SingleDeviceStrategy):
        return "auto"
    name = kind if isinstance(kind, str) else type(kind).__name__
    raise InputError(
        f"trainer.strategy={name} divides or wraps the weights, which strategies read whole: use trainer=ddp, with a "
        "copy of the learner in each process."
    )


def _plan(factory: TrainerFactory) -> tuple[int, int]:
    """Return the number of processes of a run, and how many of them this process must start."""
    check_arguments(factory)
    given = {"strategy": _kind(factory), "devices": 1, "num_nodes": 1, **getattr(factory, "keywords", {})}
    if (given["strategy"], given["devices"], given["num_nodes"]) == ("auto", 1, 1):
        return 1, 1
    trainer = _trainer(partial(factory, strategy="ddp" if given["strategy"] != "auto" else "auto"))
    if trainer.world_size == 1:
        return 1, 1
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    wanted = trainer.num_devices * trainer.num_nodes
    if environment.world_size() != wanted:
        raise InputError(
            f"{environment.world_size()} processes were started, but trainer.devices={trainer.num_devices} and "
            f"trainer.num_nodes={trainer.num_nodes} make {wanted}: let them agree."
        )
    return wanted, 0 if environment.creates_processes_externally else trainer.num_devices


def _trainer(factory: TrainerFactory) -> pl.Trainer:
    with quiet():
        return quiet_trainer(factory)


def run(factory: TrainerFactory, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in as many processes as a Trainer requires, and return its result in process 0.

    The processes are started here, unless `torchrun` or a cluster has started one for each device, of which this is
    one. If one process fails or is killed, all are ended.

    Args:
        factory: A partial of `pl.Trainer`.
        work: A function that builds stream and learner, the same in each process, and trains. It must be defined in a
            module, since each process imports it anew (a script needs `if __name__ == "__main__":`).
        arguments: Its arguments, which must be picklable.

    Raises:
        InputError: If the Trainer's strategy or the number of processes does not fit, a process was killed, or a
            process raised an InputError.

    Example:
        >>> run(partial(pl.Trainer, accelerator="cpu", devices=1), max, 2, 3)
        3
    """
    world, here = _plan(factory)
    if world == 1:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and dist.is_torchelastic_launched():
            raise InputError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes for a Trainer of one: use trainer=ddp "
                "trainer.devices=(those of this machine)."
            )
        return work(*arguments)
    if not here:
        _join(factory)
        return work(*arguments)
    context = multiprocessing.get_context("spawn")
    alone = here == world
    # This process holds the store at which the others meet, so that no other program can take its port.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if alone else None  # type: ignore[attr-defined]
    children, pipes = [], []
    for local in range(here):
        mine, theirs = context.Pipe(duplex=False)
        where = (local, here, store.port if store is not None else None)
        child = context.Process(target=_child, args=(theirs, where, _hydra(), factory, work, arguments))
        child.start()
        theirs.close()
        children.append(child)
        pipes.append(mine)
    return _supervise(children, pipes)


def _join(factory: TrainerFactory, port: int | None = None) -> None:
    """Let this process join the process group."""
    strategy = _trainer(partial(factory, strategy=Replicated(timeout=_PATIENCE))).strategy
    assert isinstance(strategy, Replicated)
    if port is not None:
        size, index = strategy.num_nodes * strategy.num_processes, strategy.local_rank
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=_PATIENCE)  # type: ignore[attr-defined]
        backend = strategy._get_process_group_backend()
        dist.init_process_group(backend, store=store, rank=index, world_size=size, timeout=_PATIENCE)
    with quiet():
        strategy.setup_environment()


def _hydra() -> Any:
    """Return Hydra's configuration of the job, for interpolations in that of the run, or None without Hydra."""
    if "hydra" not in sys.modules:
        return None
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.instance().cfg


def _child(
    pipe: Connection, where: tuple[int, int, int | None], hydra: Any, factory: Any, work: Any, rest: Any
) -> None:
    """Run one process: join the others, call the function, and send its result or its error to the parent."""
    local, here, port = where
    threading.Thread(target=_follow_parent, daemon=True).start()
    os.environ["LOCAL_RANK"] = str(local)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    try:
        if hydra is not None:
            from hydra.core.hydra_config import HydraConfig
            from hydra.core.utils import setup_globals

            setup_globals()
            HydraConfig.instance().cfg = hydra
        _join(factory, port)
        value = work(*rest)
        dist.destroy_process_group()
        pipe.send(("returned", value if local == 0 else None))
    except SystemExit as error:  # after a signal, when the state is saved
        pipe.send(("left", error.code))
    except BaseException as error:
        found = cause(error)
        pipe.send(("raised", found) if found is not None else ("failed", traceback.format_exc()))
        pipe.close()
        sys.stdout.flush()
        os._exit(1)  # without waiting for the other processes, which may wait for this one


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _supervise(children: list[Any], pipes: list[Any]) -> Any:
    """Wait for all processes; if one fails, end the others after a grace period."""
    heard: list[tuple[int, str, Any]] = []  # messages in order: number of the process, kind, value
    waiting = {pipe: index for index, pipe in enumerate(pipes)}
    until: float | None = None
    handlers = _forward_signals(children)
    try:
        while waiting and (until is None or time.monotonic() < until):
            for pipe in wait(list(waiting), None if until is None else max(0.0, until - time.monotonic())):
                heard.append((waiting[pipe], *_receive(pipe)))
                index, what, _ = heard[-1]
                if what == "ended":
                    waiting.pop(pipe)
                fine = {entry[0] for entry in heard if entry[1] in ("returned", "left")}
                if until is None and index not in fine:
                    until = time.monotonic() + _GRACE
        if until is None and "left" not in [what for _, what, _ in heard]:
            return next(value for index, what, value in heard if (index, what) == (0, "returned"))
        raise _failure(heard, children)
    except BaseException:
        until = until or time.monotonic() + _GRACE
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for child in children:
            child.join(None if until is None else max(0.0, until - time.monotonic()))
            if child.is_alive():
                child.kill()
                child.join()


def _receive(pipe: Any) -> tuple[str, Any]:
    try:
        return pipe.recv()  # type: ignore[no-any-return]
    except EOFError:
        return "ended", None


def _failure(heard: list[tuple[int, str, Any]], children: list[Any]) -> BaseException:
    """Return the most informative error: one that is meant for the user, else the first."""
    for _, kind, value in heard:
        if kind in ("raised", "left"):
            return value if kind == "raised" else SystemExit(value)
    index, kind, value = next(entry for entry in heard if entry[1] != "returned")
    if kind == "failed":
        return RuntimeError(f"Process {index} of {len(children)} failed:\n{value}")
    children[index].join()
    code = children[index].exitcode
    return InputError(
        f"Process {index} of {len(children)} ended with exit code {code}, and the run with it: checkpoints are kept; "
        "to continue, repeat the command with the same hydra.run.dir."
    )


def _forward_signals(children: list[Any]) -> dict[int, Any]:
    """Forward signals that ask this process to end to the others, which save their state; return the old handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}

    def forward(number: int, frame: Any) -> None:
        for child in children:
            if child.is_alive():
                os.kill(child.pid, number)

    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    return {number: signal.signal(number, forward) for number in wanted}
