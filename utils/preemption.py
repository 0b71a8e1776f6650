"""Stopping in good order when a scheduler, or Ctrl-C, asks for it."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from . import distributed


class Preemption:
    """Notes SIGTERM and SIGINT instead of dying of them, within a `with` block.

    Whoever is in it asks `agreed` where it can stop, puts things in order, and calls `stop`.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: list[Any] = []

    def __enter__(self) -> "Preemption":
        self._previous = [signal.signal(signum, self._note) for signum in self.SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in zip(self.SIGNALS, self._previous, strict=True):
            signal.signal(signum, handler)

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.signum = signum

    def agreed(self) -> bool:
        """Whether a signal has come to any process of the run; all ask at the same point, and so stop at the same."""
        self.signum = distributed.maximum(self.signum or 0) or None
        return self.signum is not None

    def stop(self) -> None:
        """Ends the program if a signal has come here, with the exit status that a shell gives for it: 128 + signal."""
        if self.signum is not None:
            raise SystemExit(128 + self.signum)


@contextmanager
def exits_on_sigterm() -> Iterator[None]:
    """Within the block, SIGTERM ends the program as an exception does, with status 143: `finally` cleans up."""

    def leave(signum: int, _: FrameType | None) -> None:
        sys.exit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
