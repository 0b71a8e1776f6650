"""Stopping in good order when a scheduler, a lost terminal or Ctrl-C asks for it."""

import logging
import math
import os
import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from . import distributed
from .signals import SIGNALS

logger = logging.getLogger(__name__)

COPY_WITHIN = 0.3  # seconds after a signal, in which another of its kind is a copy


class Preemption:
    """Notes the signals that ask to stop instead of dying of them, within a `with` block.

    Whoever is in it asks `agreed` or calls `stop` where the program can end. The program says at once that it was
    asked, and when it ends, what to do next. A second Ctrl-C ends it on the spot (but not the copy that torchrun or
    `timeout` passes on, which comes with the first). A SIGHUP that was ignored before, as `nohup` does, stays so.

    Args:
        at_once: leave by SystemExit when the signal comes, for a program that can be left anywhere.

    Attributes:
        advice: what becomes of the work so far, for the last line.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.advice = "nothing was finished; the same command begins again"
        self.signum: int | None = None
        self._at_once = at_once
        self._interrupted = math.inf  # when Ctrl-C came first
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        for signum in SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.signum is not None and isinstance(error, SystemExit):
            logger.warning("stopped by %s: %s", signal.Signals(self.signum).name, self.advice)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: FrameType | None) -> None:
        again, self.signum = self.signum is not None, signum
        now = time.monotonic()
        if signum == signal.SIGINT and now - self._interrupted > COPY_WITHIN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        if signum == signal.SIGINT:
            self._interrupted = min(self._interrupted, now)
        if not again and distributed.is_main():
            doing = "stopping" if self._at_once else "finishing the step under way"
            hint = ", Ctrl-C again ends at once" if signum == signal.SIGINT else ""
            # Not by logging: the signal may have come in the middle of a line of it.
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{signal.Signals(signum).name}: {doing}{hint}\n".encode())
        if self._at_once and not again:
            self.stop()

    def agreed(self) -> bool:
        """Whether a signal has come to any process of the run; all ask at the same point, and so stop at the same."""
        self.signum = distributed.maximum(self.signum or 0) or None
        return self.signum is not None

    def stop(self) -> None:
        """Ends the program if a signal has come here, with the exit status that a shell gives for it: 128 + signal."""
        if self.signum is not None:
            raise SystemExit(128 + self.signum)
