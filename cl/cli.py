"""`cl-run`: the Hydra application that composes, checks and runs an experiment."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from cl.errors import DivergenceError, InputError, unknown

_LEARNER = ("batch_size", "eval_batch_size", "chunk_size", "gradient_clip", "train_mask", "log_every", "seed")


def main() -> None:
    """Run `cl-run`; errors of the user's are one sentence, without a traceback."""
    if importlib.util.find_spec("cl.conf") is None:
        sys.exit("clsim is not installed, so its configuration cannot be found: run `pip install -e .` first.")
    import hydra
    from hydra.errors import ConfigCompositionException, MissingConfigException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand errors over as they are; they are made readable below
    application = hydra.main(version_base="1.3", config_path="pkg://cl.conf", config_name="config")(run)
    try:
        application()
    except MissingConfigException as error:
        sys.exit(_missing(error))
    except ConfigCompositionException as error:
        sys.exit(_readable(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted. Checkpoints of finished tasks are kept; run again with the same hydra.run.dir to go on.")


def run(cfg: Any) -> None:
    """Build the experiment that a composed configuration describes, and run it; what the user can mend ends it here."""
    from hydra.core.hydra_config import HydraConfig

    try:
        build(cfg, Path(HydraConfig.get().runtime.output_dir)).run()
    except Exception as error:
        cause = _ours(error)
        if cause is None:
            raise
        sys.exit(str(cause))  # Hydra would put a line and a traceback around the sentence


def build(cfg: Any, directory: Path) -> Any:
    """Return the `Experiment` of a composed configuration.

    Args:
        cfg: What Hydra composed from `cl.conf`.
        directory: The run's directory; an unfinished run there is continued.

    Raises:
        InputError: If the configuration asks for what cannot work, or another one was begun in the directory.
    """
    import torch
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from cl.backbones import initialise
    from cl.experiment import Experiment
    from cl.learner import Learner
    from cl.random import derive

    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    _keep_config(config, directory)
    stream = instantiate(cfg.stream)
    torch.manual_seed(derive(cfg.seed, "initial weights"))
    backbone = _backbone(cfg, stream.input_shape)
    head = instantiate(cfg.head)(backbone.num_features, stream.num_classes)
    if cfg.init is not None:
        initialise([backbone, head] if not cfg.weights else [head], cfg.init)
    strategies = {name: instantiate(strategy) for name, strategy in (cfg.strategy or {}).items()}
    learner = Learner(
        stream,
        backbone,
        strategies,
        instantiate(cfg.optimizer),
        instantiate(cfg.scheduler),
        head=head,
        **{key: cfg[key] for key in _LEARNER},
    )
    reports, loggers, callbacks = _reports(cfg)
    return Experiment(
        learner,
        stream,
        instantiate(cfg.trainer),
        epochs=cfg.epochs,
        directory=directory,
        reports=reports,
        logger=loggers,
        callbacks=callbacks,
        config=config,
        notes=_notes(cfg, backbone),
    )


def _notes(cfg: Any, backbone: Any) -> list[str]:
    frozen = not any(p.requires_grad for p in backbone.parameters())
    if frozen and not cfg.weights and not cfg.backbone.get("pretrained"):
        return ["The backbone is frozen at random weights: weights=CHECKPOINT gives it trained ones."]
    return []


def _backbone(cfg: Any, input_shape: tuple[int, ...]) -> Any:
    from hydra.utils import instantiate

    backbone = instantiate(cfg.backbone, input_shape=input_shape)
    if cfg.weights:
        from cl.backbones import load_backbone

        load_backbone(backbone, cfg.weights)
    if cfg.freeze:
        backbone.requires_grad_(False).eval()
    return backbone


def _reports(cfg: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Sort what the groups `report` and `logger` name: reports of ours, Lightning loggers, Lightning callbacks."""
    import pytorch_lightning as pl
    from hydra.utils import instantiate
    from pytorch_lightning.loggers import Logger

    from cl.report import Report

    parts = [instantiate(part) for group in (cfg.report, cfg.logger) for part in (group or {}).values() if part]
    loggers = [part for part in parts if isinstance(part, Logger)]
    loggers += [part.logger for part in parts if isinstance(getattr(part, "logger", None), Logger)]
    reports = [part for part in parts if isinstance(part, Report)]
    return reports, loggers, [part for part in parts if isinstance(part, pl.Callback)]


def _keep_config(config: dict[str, Any], directory: Path) -> None:
    """Write the resolved configuration, or compare it with the one that the directory holds."""
    from omegaconf import OmegaConf

    path = directory / "config.yaml"
    if path.exists():
        old, new = (_flatten(c) for c in (OmegaConf.to_container(OmegaConf.load(path)), config))
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            listed = "; ".join(f"{key}: {old.get(key)} there, {new.get(key)} here" for key in changed[:5])
            raise InputError(
                f"{directory} holds a run of another configuration ({listed}): choose another hydra.run.dir, or "
                "repeat that configuration to continue it."
            )
        return
    directory.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    os.replace(temporary, path)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, branch in tree.items() for k, v in _flatten(branch, f"{prefix}.{key}".strip(".")).items()}


def _ours(error: BaseException | None) -> BaseException | None:
    """Find the sentence for the user in a chain of causes."""
    while error is not None and not isinstance(error, InputError | DivergenceError):
        error = error.__cause__ or error.__context__
    return error


def _missing(error: Any) -> str:
    """Name the nearest options where a group has none of that name."""
    import re
    from importlib.resources import files

    found = re.search(r"Could not (?:find|load) '([^']+)'", str(error))
    group, _, name = (found.group(1) if found else str(error.missing_cfg_file or "")).rpartition("/")
    folder = files("cl.conf").joinpath(group)
    own = [entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml")] if folder.is_dir() else []
    options = {*own, *(error.options or ())}
    return str(unknown(group, name, options)) if group and options else " ".join(str(error).split())


def _readable(error: Exception) -> str:
    """Name the nearest keys where an override names a key that does not exist."""
    import difflib
    import re

    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    text = str(error)
    match = re.search(r"Could not (?:override|append to config) '?([\w.@]+)'?|override '([\w.@/]+)'", text)
    if match is None:
        return " ".join(text.split())
    key = match.group(1) or match.group(2)
    GlobalHydra.instance().clear()
    with initialize_config_module("cl.conf", version_base="1.3"):
        groups = [a.split("=")[0] + "=" + a.split("=")[1] for a in sys.argv[1:] if a.count("=") == 1 and "." not in a]
        try:
            known = list(_flatten_keys(compose("config", overrides=[g for g in groups if not g.startswith(key)])))
        except Exception:
            known = list(_flatten_keys(compose("config")))
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "see cl-run --help for the keys."
    return f"There is no key {key!r} in the configuration: {hint} (To add a new one, write +{key}=...)"


def _flatten_keys(cfg: Any) -> list[str]:
    from omegaconf import OmegaConf

    return list(_flatten(OmegaConf.to_container(cfg, resolve=False)))
