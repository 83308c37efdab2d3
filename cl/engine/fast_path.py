"""When a training step may call torch's optimizer directly: Lightning's wrappers cost as much as a small model."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.strategies import SingleDeviceStrategy

_STEP_HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")


def is_plain(trainer: pl.Trainer) -> bool:
    """Say whether Lightning's optimizer wrappers do nothing: one device, no loss scaling, no callback around the step.

    Example:
        >>> is_plain(pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False))
        True
    """
    precision = trainer.precision_plugin
    unscaled = type(precision) is Precision or (isinstance(precision, MixedPrecision) and precision.scaler is None)
    listened = any(
        getattr(type(callback), hook) is not getattr(pl.Callback, hook)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        for hook in _STEP_HOOKS
    )
    return unscaled and not listened and type(trainer.strategy) is SingleDeviceStrategy
