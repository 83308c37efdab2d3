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
    from omegaconf import OmegaConf

    from cl.distributed import rank
    from cl.experiment import Experiment
    from cl.protocol import Protocol

    protocol = Protocol(**cfg.protocol) if cfg.protocol else None
    for key, value in (protocol.found() if protocol else {}).items():
        OmegaConf.update(cfg, key, value)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    if rank() == 0:
        _keep_config(config, directory)
    stream = protocol.apply(make(cfg.stream)) if protocol else make(cfg.stream)
    strategies = {name: make(strategy) for name, strategy in (cfg.strategy or {}).items()}
    learner = _learner(cfg, stream, strategies)
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
        notes=_notes(cfg, learner.backbone) + ([protocol.remark] if protocol else []),
        tuning={"protocol": protocol.name, **protocol.found(), **protocol.budget()} if protocol else {},
        columns=(cfg.report or {}).get("columns", "all"),
        keep=cfg.checkpoint.keep,
        instruments=_instruments(cfg, stream),
        references=_references(cfg, config, reports),
    )


def _learner(cfg: Any, stream: Any, strategies: dict[str, Any]) -> Any:
    """Return the learner of a stream; the same seed gives the same initial weights, whatever the strategies."""
    import torch

    from cl.backbones import initialise
    from cl.learner import Learner
    from cl.random import derive

    torch.manual_seed(derive(cfg.seed, "initial weights"))
    backbone = _backbone(cfg, stream.input_shape)
    head = make(cfg.head)(backbone.num_features, stream.num_classes)
    if cfg.init is not None:
        initialise([backbone, head] if not cfg.weights else [head], cfg.init)
    options = {key: cfg[key] for key in _LEARNER}
    learner = Learner(stream, backbone, strategies, make(cfg.optimizer), make(cfg.scheduler), head=head, **options)
    if cfg.compile is not None:
        learner.compile(cfg.compile)
    return learner


def _instruments(cfg: Any, stream: Any) -> dict[str, Any]:
    """Return what is measured beside R."""
    from cl.instruments.curves import LearningCurves
    from cl.instruments.resources import Resources

    report = cfg.report or {}
    rows = report.get("subset", 1000)
    found: dict[str, Any] = {"resources": Resources(flops=report.get("flops", False))}
    if report.get("every") is not None or report.get("points") is not None:
        found["curves"] = LearningCurves(stream, report.get("every"), report.get("points"), rows)
    if cfg.probes:
        from cl.instruments.probes import Probes

        found["probes"] = Probes(stream, list(cfg.probes), rows)
    if cfg.estimators:
        from cl.instruments.estimates import Estimates

        found["estimates"] = Estimates(stream, list(cfg.estimators), rows)
    return found


def _references(cfg: Any, config: dict[str, Any], reports: list[Any]) -> Any:
    """Return what makes the references, or None where none are wanted."""
    from cl.experiment import Experiment
    from cl.instruments.curves import LearningCurves
    from cl.references import References

    if not cfg.references:
        return None

    def experiment(stream: Any, strategies: dict[str, Any]) -> Any:
        report = cfg.report or {}
        every, points = report.get("every"), report.get("points")
        points = 10 if every is None and points is None else points
        curves = {"curves": LearningCurves(stream, every, points, report.get("subset", 1000))}
        return Experiment(
            _learner(cfg, stream, strategies),
            stream,
            make(cfg.trainer),
            epochs=cfg.epochs,
            instruments=curves if len(stream) == 1 else {},
        )

    def say(text: str) -> None:
        for report in reports:
            report.say(text)

    return References(list(cfg.references), experiment, Path(cfg.reference_dir), config, say).measure


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

    from cl.distributed import rank
    from cl.report import Report

    parts = [
        make(part) for group in (cfg.report, cfg.logger) for part in (group or {}).values() if OmegaConf.is_config(part)
    ]
    loggers = [part for part in parts if isinstance(part, Logger)]
    loggers += [part.logger for part in parts if isinstance(getattr(part, "logger", None), Logger)]
    if rank() > 0:  # process 0 alone speaks
        mute = Report, Logger, pl.callbacks.ProgressBar
        return [], [], [part for part in parts if isinstance(part, pl.Callback) and not isinstance(part, mute)]
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
