"""The caption of a run, one line for all reports: strategy, stream, network, epochs, seed, device.

er · split digits, class-incremental, 5 tasks · MLP · 5 epochs · seed 0 · cpu
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cl.settings import flatten

LONGEST = 40  # the most characters of a name


class Ran(Protocol):
    """What a caption needs of a run, which may be in progress or read from its directory."""

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, nested or with dotted keys."""

    @property
    def stream(self) -> str:
        """The name of the stream; "" means the one that the configuration gives."""

    @property
    def scenario(self) -> str:
        """The scenario of the stream: "class", "task" or "domain"; "" if it is unknown."""

    @property
    def num_tasks(self) -> int:
        """The number of tasks of the stream; 0 if it is unknown."""

    @property
    def device(self) -> str:
        """The training device, such as "cuda"; "" if it is unknown."""


def caption(*runs: Ran) -> str:
    """Return the caption of a run; for several runs, a part in which they differ lists all its values.

    Args:
        runs: One or more.

    Example:
        >>> from types import SimpleNamespace as Some
        >>> config = {"strategy": {"er": {"x": 1}, "gpm": {"y": 2}}, "backbone": {"_target_": "nets.MLP"}, "epochs": 5}
        >>> run = Some(config=config, stream="split digits", scenario="class", num_tasks=5, device="cpu")
        >>> caption(run)
        'er+gpm · split digits, class-incremental, 5 tasks · MLP · 5 epochs · cpu'
        >>> caption(*(Some(**{**vars(run), "config": {"epochs": 1, "seed": seed}}) for seed in range(3)))
        'split digits, class-incremental, 5 tasks · 1 epoch · seeds 0, 1, 2 · cpu'
    """
    return " · ".join(caption_parts(*runs))


def caption_parts(*runs: Ran) -> list[str]:
    """Return the known parts of `caption`."""
    configs = [flatten(run.config) for run in runs]
    epochs, seeds = (_joined(str(config.get(key, "")) for config in configs) for key in ("epochs", "seed"))
    parts = [
        _joined(strategies(config) for config in configs),
        _joined((_what_is_learned(*pair) for pair in zip(runs, configs, strict=True)), 2 * LONGEST),
        _joined(_network(config) for config in configs),
        f"{epochs} epoch{'s' * (epochs != '1')}" if epochs else "",
        f"seed{'s' * (',' in seeds)} {seeds}" if seeds else "",
        _joined(run.device for run in runs),
    ]
    return [part for part in parts if part]


def strategies(config: Mapping[str, Any]) -> str:
    """Return the strategies of a flat configuration, such as "er+gpm"; "" if it names none.

    Example:
        >>> strategies({"strategy.er._target_": "cl.strategies.er.ER", "epochs": 5})
        'er'
    """
    return "+".join(dict.fromkeys(key.split(".")[1] for key in config if key.startswith("strategy.")))


def stream_kind(config: Mapping[str, Any]) -> str:
    """Return a name for a stream from its class and dataset, such as "split digits".

    Args:
        config: The flat configuration of the stream, without "stream.".
    """
    kind = str(config.get("_target_", "stream")).rpartition(".")[2]
    dataset = config.get("dataset.name") or str(config.get("dataset._target_", "")).rpartition(".")[2]
    return f"{kind} {dataset}".strip()


def short_path(directory: Path) -> str:
    """Return the last two parts of a run's directory, to distinguish runs with the same caption; "" without directory.

    Example:
        >>> short_path(Path("/home/me/runs/2030-01-31/12-00-00")), short_path(Path())
        ('2030-01-31/12-00-00', '')
    """
    return "/".join(shorten(part) for part in directory.parts[-2:] if part != directory.anchor)


def shorten(text: str, longest: int = LONGEST) -> str:
    """Return a name on one line, cut with an ellipsis if it is too long.

    Example:
        >>> shorten("a name"), shorten("a long name", 7)
        ('a name', 'a long…')
    """
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"


def _what_is_learned(run: Ran, config: Mapping[str, Any]) -> str:
    own = {key.removeprefix("stream."): value for key, value in config.items() if key.startswith("stream.")}
    # "stream" is the default name of a stream
    name = run.stream if run.stream not in ("", "stream") else own.get("name") or (stream_kind(own) if own else "")
    known = {
        shorten(str(name)): name,
        f"{run.scenario}-incremental": run.scenario,
        f"{run.num_tasks} task{'s' * (run.num_tasks != 1)}": run.num_tasks,
    }
    return ", ".join(text for text, value in known.items() if value)


def _network(config: Mapping[str, Any]) -> str:
    return str(config.get("backbone.name") or str(config.get("backbone._target_", "")).rpartition(".")[2])


def _joined(texts: Iterable[str], longest: int = LONGEST) -> str:
    found = dict.fromkeys(shorten(text, longest) for text in texts if text)
    return shorten(", ".join(found), 2 * LONGEST)
