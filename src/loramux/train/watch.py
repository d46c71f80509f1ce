"""Who watches a run, and who interrupts it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.train.events import Listener

if TYPE_CHECKING:
    from loramux.train.trainer import Trainer


def displays(out: Path, progress: bool, board: bool, is_joint: bool) -> list[Listener]:
    from loramux.train.board import TensorBoard
    from loramux.train.joint.live import make_live
    from loramux.train.joint.timeline import Timeline
    from loramux.train.logs import RoutingLog
    from loramux.train.progress import make_progress

    shown = [make_live() if is_joint else make_progress()] if progress else []
    logs: list[Listener] = [TensorBoard(out / "tensorboard"), RoutingLog()] if board else []
    lanes = [Timeline(out)] if board and is_joint else []
    return [*logs, *lanes, *shown]


@contextmanager
def stopped_by_signals(trainer: Trainer) -> Iterator[Any]:
    """Inside, the first Ctrl-C or SIGTERM asks the trainer to stop; a second Ctrl-C interrupts at once."""
    seen: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)
        trainer.stop()

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
