"""From a composed configuration to an `Experiment`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl.arguments import check_value
from cl.errors import InputError, check_range
from cl.explain import flatten
from cl.files import write_text
from cl.make import made, make

Whole, Number, Text, Options = int | None, float | None, str | None, dict[str, Any] | None
# The keys that no `_target_` takes, and what they are.
_KEYS: dict[str, Any] = {
    **{"seed": int, "epochs": int, "batch_size": int, "eval_batch_size": Whole, "chunk_size": Whole, "log_every": int},
    **{"gradient_clip": Number, "train_mask": Text, "compile": Text, "init": Text, "weights": Text, "freeze": bool},
    **{"probes": Sequence[str], "estimators": Sequence[str], "references": Sequence[str], "reference_dir": str},
    **{"checkpoint": dict[str, Any], "checkpoint.keep": Whole, "report.columns": str | int, "report.every": Whole},
    **{"report.points": Whole, "report.subset": int, "report.flops": bool, "scenario": Text, "strategy": Options},
    **{"report": Options, "logger": Options, "protocol": Options, "protocol.name": str, "protocol.num_tasks": Whole},
    **{"protocol.tuned": Text},
}
_NEEDED = ("stream", "backbone", "head", "optimizer", "trainer")
_LEARNER = ("batch_size", "eval_batch_size", "chunk_size", "gradient_clip", "train_mask", "log_every", "seed")


def build(cfg: Any, directory: Path) -> Any:
    """Return the `Experiment` of a composed configuration.

    Args:
        cfg: What Hydra composed from `cl.conf`.
        directory: The run's directory; an unfinished run there is continued.

    Raises:
        InputError: If the configuration asks for what cannot work, or another one was begun in the directory.
    """
    from omegaconf import OmegaConf

    from cl.experiment import Experiment
    from cl.protocol import Protocol
    from cl.strategy import Strategy
    from cl.task import Stream

    _check(cfg)
    protocol = Protocol(**cfg.protocol) if cfg.get("protocol") else None
    for key, value in (protocol.found() if protocol else {}).items():
        OmegaConf.update(cfg, key, value)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    text = _config_text(config, directory)
    stream = made(cfg.stream, Stream)
    stream = protocol.apply(stream) if protocol else stream
    strategies = {name: made(node, Strategy) for name, node in _mappings(cfg, "strategy")}
    learner = _learner(cfg, stream, strategies)
    reports, loggers, callbacks = _reports(cfg)
    experiment = Experiment(
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
        columns=(cfg.get("report") or {}).get("columns", "all"),
        keep=cfg.checkpoint.keep,
        instruments=_instruments(cfg, stream),
        references=_references(cfg, config, reports),
    )
    if not (directory / "config.yaml").exists():  # only now: what cannot be built is no run to continue
        write_text(directory / "config.yaml", text)
    return experiment


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
    optimizer, scheduler = make(cfg.optimizer), None if cfg.get("scheduler") is None else make(cfg.scheduler)
    _check_optimizer(optimizer, scheduler, stream)
    learner = Learner(stream, backbone, strategies, optimizer, scheduler, head=head, **options)
    if cfg.compile is not None:
        learner.compile(cfg.compile)
    return learner


def _instruments(cfg: Any, stream: Any) -> dict[str, Any]:
    """Return what is measured beside R."""
    from cl.instruments.curves import LearningCurves
    from cl.instruments.resources import Resources

    report = cfg.get("report") or {}
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
        report = cfg.get("report") or {}
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

    from cl.report import Report

    parts = [
        make(part)
        for group in ("report", "logger")
        for part in (cfg.get(group) or {}).values()
        if OmegaConf.is_config(part)
    ]
    for part in parts:
        _check_inside(part)
    loggers = [part for part in parts if isinstance(part, Logger)]
    loggers += [part.logger for part in parts if isinstance(getattr(part, "logger", None), Logger)]
    reports = [part for part in parts if isinstance(part, Report)]
    return reports, loggers, [part for part in parts if isinstance(part, pl.Callback)]


def _mappings(cfg: Any, group: str) -> list[tuple[str, Any]]:
    """Return the entries of a group by name, each of which describes one thing."""
    from omegaconf import OmegaConf

    entries = (cfg.get(group) or {}).items()
    for name, node in entries:
        if not OmegaConf.is_dict(node):
            raise InputError(f"{group}.{name}={node} must be a mapping with a _target_.")
    return list(entries)


def _check_inside(logger: Any) -> None:
    """Refuse a logger whose name or version would lead out of its folder."""
    folder, inside = getattr(logger, "save_dir", None), getattr(logger, "log_dir", None)
    if isinstance(folder, str) and isinstance(inside, str):
        root = Path(folder).resolve()
        if root not in (Path(inside).resolve(), *Path(inside).resolve().parents):
            raise InputError(f"A logger of {folder} would write to {inside}, outside of it: give it a plain name.")


def _config_text(config: dict[str, Any], directory: Path) -> str:
    """Return the resolved configuration as it is kept; refuse another than the one that the directory holds.

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
    return text


def _check(cfg: Any) -> None:
    """Refuse groups that are not there, and values of the wrong type."""
    from omegaconf import OmegaConf

    for group in _NEEDED:
        if cfg.get(group) is None:
            raise InputError(f"There is no {group}: choose one, as cl-run --help lists them.")
    for key, annotation in _KEYS.items():
        parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
        if OmegaConf.is_dict(parent) and key.rpartition(".")[2] in parent:
            value = parent[key.rpartition(".")[2]]
            check_value(key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, annotation)
    check_range("", 0, seed=cfg.seed, epochs=cfg.epochs)
    check_range("", 0, above=True, gradient_clip=cfg.gradient_clip)


def _check_optimizer(optimizer: Any, scheduler: Any, stream: Any) -> None:
    """Build and step both once, on a parameter of their own, so that what they refuse is known before training."""
    import torch
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    made_of = optimizer([torch.nn.Parameter(torch.zeros(1))])
    if not isinstance(made_of, torch.optim.Optimizer):
        raise InputError(f"optimizer makes a {type(made_of).__name__}, not an optimizer: correct its _target_.")
    schedule = scheduler(made_of) if scheduler is not None else None
    if isinstance(schedule, ReduceLROnPlateau) and any(task.val is None for task in stream):
        raise InputError("ReduceLROnPlateau watches the validation loss, but a task has none: set stream.val_fraction.")
    try:
        made_of.step()
        if schedule is not None:
            schedule.step(0.0) if isinstance(schedule, ReduceLROnPlateau) else schedule.step()
    except Exception as error:
        raise InputError(f"Optimizer and scheduler cannot step ({error}): correct their arguments.") from error
