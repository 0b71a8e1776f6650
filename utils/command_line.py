"""Command lines that answer at once: standard library only."""

import argparse
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from types import FrameType
from typing import Any


class Parser(argparse.ArgumentParser):
    """An argument parser that names the option which a misspelt one may stand for, and takes no abbreviations."""

    def __init__(self, **settings: Any):
        self._flags: list[str] = []
        super().__init__(allow_abbrev=False, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse's."""
        action = super().add_argument(*names, **settings)
        self._flags += action.option_strings
        return action

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Reads the command line (`sys.argv` when None); a mistake in it ends the program with status 2."""
        found, unknown = self.parse_known_args(argv)
        if unknown:
            near = get_close_matches(unknown[0].split("=")[0], self._flags, n=1)
            self.error(f"unknown option {unknown[0]}" + "".join(f", did you mean {flag}?" for flag in near))
        return found


def quiet_ctrl_c() -> None:
    """From here on Ctrl-C ends the program without a traceback, until something else is made of it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def left_on_signals() -> Iterator[None]:
    """Within the block Ctrl-C, SIGTERM and SIGHUP end the program by SystemExit, with status 128 + signal: what is
    temporary is cleaned up, and no traceback is shown."""

    def leave(signum: int, _: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signums = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    previous = {signum: signal.signal(signum, leave) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@cache
def end_with_parent() -> None:
    """To be called in a process of a pool: it leaves signals to the one that started it and ends with it, however that
    ends; a pool's process would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
