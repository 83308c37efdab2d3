"""From a composed configuration to an `Experiment`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from cl.app import sweep
from cl.app.instantiate import instantiate, instantiate_as, takes
from cl.app.validate import protocol_of, store, validate
from cl.errors import InputError
from cl.files import expand_path
from cl.settings import SETTINGS


def build(cfg: Any, directory: Path) -> Any:
    """Return the `Experiment` of a composed configuration.

    Args:
        cfg: The configuration that Hydra composed from `cl.conf`.
        directory: The run's directory; an unfinished run there is continued.

    Raises:
        InputError: If the configuration cannot work, or the directory holds a run of another configuration.
    """
    from cl.distributed import rank
    from cl.engine.branch import Branch
    from cl.engine.experiment import Experiment

    config = validate(cfg, directory)
    protocol = protocol_of(cfg) if cfg.get("protocol") else None
    raw = build_stream(cfg, protocol)
    instruments = _instruments(cfg, raw)
    learner, stream = _learner(cfg, raw, partial(_strategies, cfg), instruments)
    if stream is not raw:
        instruments = _instruments(cfg, stream)  # which measure on features, too
    reports, loggers, callbacks = _reports(cfg)
    experiment = Experiment(
        learner,
        stream,
        instantiate(cfg.trainer),
        epochs=cfg.epochs,
        directory=directory,
        reports=reports,
        logger=loggers,
        callbacks=callbacks,
        config=config,
        notes=_ignored(cfg) + _notes(cfg, learner.backbone) + ([protocol.remark] if protocol else []),
        tuning={"protocol": protocol.name, **protocol.found(), **protocol.budget()} if protocol else {},
        columns=(cfg.get("report") or {}).get("columns", "all"),
        keep=cfg.checkpoint.keep,
        every=cfg.checkpoint.every,
        instruments=instruments,
        scalars=[_scalar(node) for _, node in _mappings(cfg, "scalar")],
        references=_references(cfg, config, reports, raw),
        branch=Branch.parse(cfg["from"]) if cfg["from"] else None,
        allow_changed=cfg.allow_changed,
    )
    if rank() == 0:
        store(config, directory)  # after everything is built, so that a configuration that fails leaves no files
    return experiment


def build_learner(cfg: Any) -> tuple[Any, Any]:
    """Return the untrained `Learner` of a configuration, and the `Stream` that it is built for."""
    return _learner(
        cfg, build_stream(cfg, protocol_of(cfg) if cfg.get("protocol") else None), partial(_strategies, cfg)
    )


def _strategies(cfg: Any) -> dict[str, Any]:
    from cl.engine.strategy import Strategy

    return {name: instantiate_as(node, Strategy) for name, node in _mappings(cfg, "strategy")}


def changed_since(cfg: Any, config: dict[str, Any], directory: Path) -> list[str]:
    """Return the changes of data and of the user's code since a directory's run finished, a few words each.

    Raises:
        InputError: If the stream cannot be built any more.
    """
    from cl.data.provenance import changes, provenance, stored
    from cl.engine.branch import Branch

    before = stored(directory)
    if before is None:  # the run is of an earlier version, which did not store it
        return []
    starts = {"from": Branch.parse(cfg["from"]).checkpoint} if cfg["from"] else {}
    found = provenance(build_stream(cfg, protocol_of(cfg) if cfg.get("protocol") else None), config, starts=starts)
    return changes(before, {**found, "code": {**before["code"], **found["code"]}})


def build_stream(cfg: Any, protocol: Any = None) -> Any:
    """Return the `Stream` of a configuration: the whole of it, or the part that a protocol leaves."""
    from cl.data.task import Stream

    stream = instantiate_as(cfg.stream, Stream)
    if cfg.scenario is not None and cfg.scenario != stream.scenario:
        raise InputError(
            f"scenario={cfg.scenario}, but {stream.name!r} is {stream.scenario}-incremental: drop it, or write "
            "scenario: ${scenario} in the YAML of the stream."
        )
    return protocol.apply(stream) if protocol else stream


def _ignored(cfg: Any) -> list[str]:
    """Return a remark if the seed was set, but the stream's configuration does not pass it on to the stream."""
    reaches = cfg.seed == 0 or "seed" in cfg.stream or not takes(cfg.stream, "seed", by_name=True)
    sentence = (
        f"seed={cfg.seed} does not reach the stream, which is the same for every seed: write seed: ${{seed}} in its "
        "YAML, or '+stream.seed=${seed}' on the command line."
    )
    return [] if reaches else [sentence]


def _learner(cfg: Any, stream: Any, strategies: Callable[[], Any], instruments: Any = None) -> tuple[Any, Any]:
    """Return the learner of a stream as configured, and the stream that it learns; see `features_once`.

    Args:
        cfg: The configuration.
        stream: The stream.
        strategies: Builds the strategies, by name.
        instruments: The instruments of the run, by name.
    """
    from cl.app.features_once import features_once
    from cl.backbones.frozen import past_blocks
    from cl.backbones.networks import initialise
    from cl.engine.learner import Learner
    from cl.engine.network import network
    from cl.engine.preflight import check_optimizer

    values = {key for key, row in SETTINGS.items() if row.type is not None}
    options = {key: cfg[key] for key in inspect.signature(Learner).parameters if key in values}
    folder = cfg.get("feature_dir")

    def make(depth: int) -> tuple[Any, Any]:
        made = strategies()
        backbone, head = network(stream, partial(_backbone, cfg), instantiate(cfg.head), cfg.seed)
        if cfg.init is not None:
            initialise([backbone, head] if not cfg.weights else [head], cfg.init)
        optimizer, scheduler = instantiate(cfg.optimizer), _scheduler(cfg)
        check_optimizer(optimizer, scheduler, stream, cfg.trainer)
        learned = past_blocks(stream, backbone, depth, expand_path(folder)) if depth else stream
        learner = Learner(learned, backbone, made, optimizer, scheduler, head=head, **options)
        if cfg.compile is not None:
            learner.compile(cfg.compile)
        return learner, learned

    return features_once(make, instruments) if folder else make(0)


def _scheduler(cfg: Any) -> Any:
    """Return the factory of learning-rate schedules, or None; the learner fills in lengths that are null."""
    from omegaconf import open_dict

    from cl.engine.schedules import LENGTHS

    node = cfg.get("scheduler")
    if node is None:
        return None
    node = node.copy()
    with open_dict(node):
        unset = {key: node.pop(key) for key in LENGTHS if key in node and node[key] is None}
    factory = instantiate(node)
    factory.keywords.update(unset)
    return factory


def _instruments(cfg: Any, stream: Any) -> dict[str, Any]:
    """Return the instruments, which measure more than R, by name."""
    from cl.engine.instrument import Instrument
    from cl.measure.choose import chosen

    own = {name: instantiate_as(node, Instrument) for name, node in _mappings(cfg, "instrument")}
    report = cfg.get("report") or {}
    looks = {key: report[key] for key in ("every", "points", "subset", "flops") if key in report}
    return chosen(stream, probes=list(cfg.probes), estimators=list(cfg.estimators), own=own, **looks)


def _scalar(node: Any) -> Any:
    """Return the scalar that a `_target_` names, or that it builds from arguments."""
    from hydra.utils import get_object

    from cl.metrics.scalar import Scalar

    try:
        found = get_object(node._target_)
    except Exception:  # `instantiate_as` reports what is wrong
        found = None
    return found if isinstance(found, Scalar) and len(node) == 1 else instantiate_as(node, Scalar)


def _references(cfg: Any, config: dict[str, Any], reports: list[Any], raw: Any) -> Any:
    """Return the function that trains the references or reads them from their files; None without references."""
    from cl.measure.references import References, reference_experiment

    if not cfg.references:
        return None
    report = cfg.get("report") or {}
    spans = {key: report[key] for key in ("every", "points", "subset") if key in report}

    def experiment(stream: Any, strategies: dict[str, Any]) -> Any:
        learner, learned = _learner(cfg, stream, partial(deepcopy, strategies))
        return reference_experiment(learner, learned, instantiate(cfg.trainer), cfg.epochs, **spans)

    measure = References(list(cfg.references), experiment, Path(cfg.reference_dir), config, reports).measure
    return lambda _: measure(raw)


def _notes(cfg: Any, backbone: Any) -> list[str]:
    notes = []
    weights = list(backbone.parameters())
    frozen = not any(p.requires_grad for p in weights)
    trained = cfg.weights or cfg.backbone.get("pretrained") or getattr(backbone, "pretrained", False)
    if weights and frozen and not trained:
        notes.append("The backbone is frozen at random weights: weights=CHECKPOINT gives it trained ones.")
    return notes


def _backbone(cfg: Any, input_shape: tuple[int, ...]) -> Any:
    """Return the backbone; `input_shape` is passed on if its class takes it, which a user's own need not."""
    from torch import nn

    wants = takes(cfg.backbone, "input_shape")
    backbone = instantiate_as(cfg.backbone, nn.Module, **({"input_shape": input_shape} if wants else {}))
    if cfg.weights:
        from cl.backbones.networks import load_backbone

        load_backbone(backbone, cfg.weights)
    if cfg.freeze:
        from cl.backbones.blocks import freeze

        freeze(backbone, None if cfg.freeze is True else cfg.freeze)
    return backbone


def _reports(cfg: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Build the entries of `report`, `logger` and `callbacks`; return reports, Lightning loggers and callbacks."""
    import pytorch_lightning as pl
    from omegaconf import OmegaConf
    from pytorch_lightning.loggers import Logger

    from cl.distributed import rank
    from cl.report.contract import Report

    parts = [
        instantiate(part)
        for group in ("report", "logger", "callbacks")
        for part in (cfg.get(group) or {}).values()
        if OmegaConf.is_config(part)
    ]
    for part in parts:
        _check_inside(part)
        if sweep.running() and hasattr(part, "brief"):
            part.brief = True
    loggers = [part for part in parts if isinstance(part, Logger)]
    loggers += [part.logger for part in parts if isinstance(getattr(part, "logger", None), Logger)]
    if rank() > 0:  # only process 0 reports and logs
        mute = Report, Logger, pl.callbacks.ProgressBar
        return [], [], [part for part in parts if isinstance(part, pl.Callback) and not isinstance(part, mute)]
    reports = [part for part in parts if isinstance(part, Report)]
    return reports, loggers, [part for part in parts if isinstance(part, pl.Callback)]


def _mappings(cfg: Any, group: str) -> list[tuple[str, Any]]:
    """Return the entries of a group by name, each of which must be a mapping with a `_target_`."""
    from omegaconf import OmegaConf

    entries = (cfg.get(group) or {}).items()
    for name, node in entries:
        if not OmegaConf.is_dict(node):
            raise InputError(f"{group}.{name}={node} must be a mapping with a _target_.")
    return list(entries)


def _check_inside(logger: Any) -> None:
    """Refuse a logger whose name or version is a path that leads out of its folder."""
    folder, inside = getattr(logger, "save_dir", None), getattr(logger, "log_dir", None)
    if isinstance(folder, str) and isinstance(inside, str):
        root = Path(folder).resolve()
        if root not in (Path(inside).resolve(), *Path(inside).resolve().parents):
            raise InputError(f"A logger of {folder} would write to {inside}, outside of it: give it a plain name.")
