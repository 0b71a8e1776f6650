"""Signals that ask a program to stop, and its child processes: standard library only."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# From schedulers, `timeout` and torchrun; Ctrl-C; a lost terminal; from submitit and `sbatch --signal`.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Within the block, `SIGNALS` are blocked; processes started there inherit that and never receive them."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def quiet_ctrl_c() -> None:
    """Makes Ctrl-C end the program without a traceback, until another handler is set."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def set_handlers(signums: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Sets a handler, and returns those before by signal; none outside of the main thread, where Python runs none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {signum: signal.signal(signum, handler) for signum in signums}


@contextmanager
def left_on_signals() -> Iterator[None]:
    """Within the block, Ctrl-C, SIGTERM and SIGHUP end the program by SystemExit with status 128 + signal: temporary
    files are removed, and no traceback is shown."""
    received: list[int] = []

    def leave(signum: int, _: FrameType | None) -> None:
        received.append(signum)
        raise SystemExit(128 + signum)

    signums = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    previous = set_handlers(signums, leave)
    try:
        yield
    except Exception:
        if received:  # a library turned SystemExit into its own error, as PyTorch does while it imports its parts
            raise SystemExit(128 + received[0]) from None
        raise
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def mapped(
    pool: Executor, call: Callable[[Item], Result], items: Sequence[Item], *, chunksize: int = 1
) -> Iterator[Iterator[Result]]:
    """Yields the results of a call for each item, in order, from a new pool, whose processes never receive `SIGNALS`.

    With the block the pool ends, and calls not started are dropped.
    """
    with pool:
        try:
            with signals_held_back():
                results = pool.map(call, items, chunksize=chunksize)
            yield results
        finally:
            pool.shutdown(cancel_futures=True)


def process_pool(workers: int | None) -> ProcessPoolExecutor:
    """A pool of `workers` processes, by default one per core, that end with their parent, however that ends: otherwise
    they would wait for work for ever."""
    return ProcessPoolExecutor(workers or os.cpu_count(), initializer=_end_with_parent)


def _end_with_parent() -> None:
    # Before the first task: a process that never had one may be left too, and keeps the others alive.
    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
