"""Bars on a terminal, lines elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cl.report.progress import ProgressBar
from example_runs import coloured, plain


class Loss:
    """A loss on a device: reading it is what costs."""

    reads = 0

    def __float__(self) -> float:
        self.reads += 1
        return 0.25


def train(bar: ProgressBar, module: SimpleNamespace, clock: list[float], steps: int, seconds: float) -> None:
    module.step = 0
    bar.on_train_start(None, module)  # type: ignore[arg-type]
    for _ in range(steps):
        module.step += 1
        clock[0] += seconds / steps
        bar.on_train_batch_end(None, module, None, None, 0)  # type: ignore[arg-type]
    bar.on_train_end(None, module)  # type: ignore[arg-type]


def learner(loss: object) -> SimpleNamespace:
    return SimpleNamespace(task_index=0, num_tasks=2, num_steps=1000, step=0, last_loss=loss)


def test_without_a_terminal_a_task_is_one_line(clock: list[float]) -> None:
    console, text = plain(width=20)
    loss = Loss()
    bar, module = ProgressBar(console), learner(loss)
    for module.task_index in range(2):
        train(bar, module, clock, steps=1000, seconds=2.5)
    expected = [f"task {k}/2: 1000 steps in 2.5 s, loss 0.2500" for k in (1, 2)]
    assert text.getvalue().splitlines() == expected
    assert loss.reads == 2


def test_the_loss_is_read_ten_times_a_second_at_most(clock: list[float]) -> None:
    console, text = coloured()
    loss = Loss()
    bar, module = ProgressBar(console), learner(loss)
    train(bar, module, clock, steps=1000, seconds=2.0)
    assert 15 <= loss.reads <= 21
    assert "task 1/2" in text.getvalue() and "loss 0.2500" in text.getvalue()
    assert module.step == 1000


def test_the_same_bars_serve_every_task_and_are_gone_in_between(clock: list[float]) -> None:
    console, text = coloured()
    bar, module = ProgressBar(console), learner(None)
    train(bar, module, clock, steps=3, seconds=1.0)
    bars = bar._bars
    begun = bars.tasks[1].start_time if bars is not None else None
    assert bars is not None and bars.tasks[1].completed == 3 and bars.tasks[0].completed == pytest.approx(0.003)
    assert not bars.live.is_started
    assert text.getvalue().endswith("\x1b[2K")  # the lines of the bars are erased
    console.print("a report")
    module.task_index = 1
    bar.on_train_start(None, module)  # type: ignore[arg-type]
    assert bar._bars is bars and bars.live.is_started
    assert begun is not None and (bars.tasks[1].start_time or 0) > begun  # its time is the task's, not the run's
    module.step = 0
    bar._draw(module)
    assert bars.tasks[1].completed == 0 and bars.tasks[0].completed == 1.0
    bar.on_exception(None, module, KeyboardInterrupt())  # type: ignore[arg-type]
    assert not bars.live.is_started
