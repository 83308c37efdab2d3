"""A clock that tests set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cl.report import progress as progress_module


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now
