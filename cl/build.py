"""From a composed configuration to an `Experiment`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl.errors import InputError
from cl.explain import flatten
from cl.files import write_text

_LEARNER = ("batch_size", "eval_batch_size", "chunk_size", "gradient_clip", "train_mask", "log_every", "seed")


def make(node: Any, *arguments: Any, **options: Any) -> Any:
    """Return what a configuration with a `_target_` describes; lists and dicts reach it as such."""
    from hydra.utils import instantiate

    return instantiate(node, *arguments, _convert_="all", **options)


def build(cfg: Any, directory: Path) -> Any:
    """Return the `Experiment` of a composed configuration.

    Args:
        cfg: What Hydra composed from `cl.conf`.
        directory: The run's directory; an unfinished run there is continued.

    Raises:
        InputError: If the configuration asks for what cannot work, or another one was begun in the directory.
    """
    import torch
    from omegaconf import OmegaConf

    from cl.backbones import initialise
    from cl.experiment import Experiment
    from cl.learner import Learner
    from cl.random import derive

    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    _keep_config(config, directory)
    stream = make(cfg.stream)
    torch.manual_seed(derive(cfg.seed, "initial weights"))
    backbone = _backbone(cfg, stream.input_shape)
    head = make(cfg.head)(backbone.num_features, stream.num_classes)
    if cfg.init is not None:
        initialise([backbone, head] if not cfg.weights else [head], cfg.init)
    strategies = {name: make(strategy) for name, strategy in (cfg.strategy or {}).items()}
    learner = Learner(
        stream,
        backbone,
        strategies,
        make(cfg.optimizer),
        make(cfg.scheduler),
        head=head,
        **{key: cfg[key] for key in _LEARNER},
    )
    if cfg.compile is not None:
        learner.compile(cfg.compile)
    reports, loggers, callbacks = _reports(cfg)
    return Experiment(
        learner,
        stream,
        make(cfg.trainer),
        epochs=cfg.epochs,
        directory=directory,
        reports=reports,
        logger=loggers,
        callbacks=callbacks,
        config=config,
        notes=_notes(cfg, backbone),
        columns=(cfg.report or {}).get("columns", "all"),
        keep=cfg.checkpoint.keep,
    )


def _notes(cfg: Any, backbone: Any) -> list[str]:
    frozen = not any(p.requires_grad for p in backbone.parameters())
    if frozen and not cfg.weights and not cfg.backbone.get("pretrained"):
        return ["The backbone is frozen at random weights: weights=CHECKPOINT gives it trained ones."]
    return []


def _backbone(cfg: Any, input_shape: tuple[int, ...]) -> Any:

    backbone = make(cfg.backbone, input_shape=input_shape)
    if cfg.weights:
        from cl.backbones import load_backbone

        load_backbone(backbone, cfg.weights)
    if cfg.freeze:
        backbone.requires_grad_(False).eval()
    return backbone


def _reports(cfg: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Sort what the groups `report` and `logger` name: reports of ours, Lightning loggers, Lightning callbacks."""
    import pytorch_lightning as pl
    from omegaconf import OmegaConf
    from pytorch_lightning.loggers import Logger

    from cl.report import Report

    parts = [
        make(part) for group in (cfg.report, cfg.logger) for part in (group or {}).values() if OmegaConf.is_config(part)
    ]
    loggers = [part for part in parts if isinstance(part, Logger)]
    loggers += [part.logger for part in parts if isinstance(getattr(part, "logger", None), Logger)]
    reports = [part for part in parts if isinstance(part, Report)]
    return reports, loggers, [part for part in parts if isinstance(part, pl.Callback)]


def _keep_config(config: dict[str, Any], directory: Path) -> None:
    """Write the resolved configuration, or compare it with the one that the directory holds.

    The directory itself is written as ".", so that a run that was moved or copied can be continued.
    """
    from omegaconf import OmegaConf

    path, text = directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)).replace(str(directory), ".")
    if path.exists():
        old, new = (flatten(OmegaConf.to_container(c)) for c in (OmegaConf.load(path), OmegaConf.create(text)))
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            listed = "; ".join(f"{key}: {old.get(key)} there, {new.get(key)} here" for key in changed[:5])
            raise InputError(
                f"{directory} holds a run of another configuration ({listed}): choose another hydra.run.dir, or "
                "repeat that configuration to continue it."
            )
        return
    write_text(path, text)
