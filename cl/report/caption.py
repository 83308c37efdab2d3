"""What ran, in one line that pictures, tables and the terminal share: strategy, stream, network, epochs, seed, device.

er · split digits, class-incremental, 5 tasks · MLP · 5 epochs · seed 0 · cpu
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cl.settings import flatten

LONGEST = 40  # characters of a name


class Ran(Protocol):
    """What is looked at of a run, whether it goes on or is read from its directory."""

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, nested or with dotted keys."""

    @property
    def stream(self) -> str:
        """The name of the stream; "" takes one from the configuration."""

    @property
    def scenario(self) -> str:
        """Of the stream: "class", "task" or "domain"; "" where it is not known."""

    @property
    def num_tasks(self) -> int:
        """Of the stream; 0 where it is not known."""

    @property
    def device(self) -> str:
        """What is trained on, such as "cuda"; "" where it is not known."""


def caption(*runs: Ran) -> str:
    """Return what ran; of several runs, what they share and, in turn, what they do not.

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
    """Return the parts of `caption`, those that are known."""
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
    """Return the strategies of a flat configuration, as in "er+gpm"; "" where it names none.

    Example:
        >>> strategies({"strategy.er._target_": "cl.strategies.er.ER", "epochs": 5})
        'er'
    """
    return "+".join(dict.fromkeys(key.split(".")[1] for key in config if key.startswith("strategy.")))


def stream_kind(config: Mapping[str, Any]) -> str:
    """Return what a stream is called whose own name is not known, as in "split digits".

    Args:
        config: The flat configuration of the stream, without "stream.".
    """
    kind = str(config.get("_target_", "stream")).rpartition(".")[2]
    dataset = config.get("dataset.name") or str(config.get("dataset._target_", "")).rpartition(".")[2]
    return f"{kind} {dataset}".strip()


def short_path(directory: Path) -> str:
    """Return the end of a run's directory, which tells apart two runs of one caption; "" for a run without one.

    Example:
        >>> short_path(Path("/home/me/runs/2030-01-31/12-00-00")), short_path(Path())
        ('2030-01-31/12-00-00', '')
    """
    return "/".join(shorten(part) for part in directory.parts[-2:] if part != directory.anchor)


def shorten(text: str, longest: int = LONGEST) -> str:
    """Return a name on one line, cut by an ellipsis where it is long.

    Example:
        >>> shorten("a name"), shorten("a long name", 7)
        ('a name', 'a long…')
    """
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"


def _what_is_learned(run: Ran, config: Mapping[str, Any]) -> str:
    own = {key.removeprefix("stream."): value for key, value in config.items() if key.startswith("stream.")}
    # "stream" is what a stream is called that was given no name
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
