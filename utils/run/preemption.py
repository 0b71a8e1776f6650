"""Stops a run cleanly when a scheduler, a lost terminal or Ctrl-C asks for it."""

import logging
import math
import os
import signal
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from ..system import distributed
from ..system.signals import SIGNALS, set_handlers

logger = logging.getLogger(__name__)

COPY_WITHIN = 0.3  # seconds after a signal within which another of its kind is a copy


class Preemption:
    """Catches the signals that ask the program to stop, as a `with` block.

    In the block, call `agreed` or `stop` wherever the program can end. It reports the signal at once and, when it ends,
    what to do next. A second Ctrl-C ends it immediately (but not the copy that torchrun or `timeout` passes on, which
    comes with the first). A SIGHUP that was ignored before, as with `nohup`, stays ignored. In another thread than the
    main one, as of a notebook or a server, signals stay with the program.

    Args:
        at_once: raise SystemExit when the signal comes, for a program that can stop anywhere.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.advice = "nothing was finished; run the same command to start again"  # the last line, of the work so far
        self.signum: int | None = None
        self._at_once = at_once
        self._interrupted = math.inf  # time of the first Ctrl-C
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        signums = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self._previous = set_handlers(signums, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
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
            doing = "stopping" if self._at_once else "finishing the current step"
            hint = ", Ctrl-C again ends at once" if signum == signal.SIGINT else ""
            # Not by logging: the signal may have interrupted it.
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{signal.Signals(signum).name}: {doing}{hint}\n".encode())
        if self._at_once and not again:
            self.stop()

    def agreed(self) -> bool:
        """Whether any process of the run received a signal; all call this at the same point, so all stop there."""
        self.signum = distributed.maximum(self.signum or 0) or None
        return self.signum is not None

    def stop(self) -> None:
        """Ends the program if this process received a signal, with the exit status of a shell: 128 + signal."""
        if self.signum is not None:
            raise SystemExit(128 + self.signum)
