"""The run's folder, its log and its results, with the options and the environment that they depend on."""

import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Collection, Iterable
from contextlib import ExitStack, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import faiss
import numpy
import PIL
import torch
import torchvision
from tqdm import tqdm

from ..system import distributed
from ..system.command_line import with_dashes, write_all_names
from ..system.files import atomic_write
from ..system.lock import FolderLock
from ..system.reading import end_of_a_worker
from ..system.version import git_revision, version
from . import options_file

logger = logging.getLogger(__name__)


def runs_of(save_dir: Path) -> list[Path]:
    """Folders of earlier runs with this `save_dir`."""
    parent = Path("logs") / save_dir
    folders = parent.iterdir() if parent.is_dir() else ()
    return [folder for folder in folders if folder.is_dir() and not folder.is_symlink()]  # a link names a run twice


def require_outside(folders: Iterable[Path], **places: Path | None) -> None:
    """Makes sure that no place to write to lies in a photo folder, where the next run would list the files as photos.

    Raises:
        ValueError: one does; the message has its name.
    """
    for (name, place), folder in itertools.product(places.items(), folders):
        if place is not None and Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder)):
            raise ValueError(
                f"{place} lies in {folder}, so later runs would read what is written there as photos; name a {name} "
                "outside of it"
            )


class Terminal:
    """A stream to a terminal that may go away: a connection is lost, or the reader of a pipe ends (`| tee` on Ctrl-C).

    The run continues without it. It replaces `sys.stderr`, so progress bars write here too.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream  # None if the program was started without one, or it has gone

    def _attempt(self, method: str, *arguments: str) -> None:
        if self._stream is not None:
            try:
                getattr(self._stream, method)(*arguments)
            except (OSError, ValueError):  # the latter from a closed file
                self._stream = None

    def write(self, text: str) -> int:
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        self._attempt("flush")

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class TerminalHandler(logging.StreamHandler[Any]):
    """Prints the message with its level unless that is INFO, and with the rank unless it is the main process.

    This process clears its own progress bars first; others do not know of them, so they start with a line break.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        message = message if record.levelno == logging.INFO else f"{record.levelname}: {message}"
        return message if distributed.is_main() else f"\nrank {distributed.rank()}: {message}"

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


class LogFile(logging.FileHandler):
    """A log file; if it can no longer be written, the run continues without it after one warning on the terminal."""

    failed = False

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")  # file names may not be UTF-8
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def handleError(self, _: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            logger.warning("cannot write %s (%s); the run continues without it", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        with suppress(OSError):  # if it could not be written before, closing fails too
            super().close()


class RunLog:
    """The log of a run, as a `with` block.

    The terminal shows it from the start; `open` adds the run's folder, where `info.log` has what the terminal shows and
    `debug.log` has everything, with tracebacks; both also start from the beginning. Bad input (ValueError or OSError in
    this project) ends the program: one line, no traceback on the terminal, exit status 2, and no folder if none was
    opened yet. With several processes, the main one does all this; the others report only their errors, in full in
    `rank<number>.log`. The run's folder is locked for this process until the block ends.

    Args:
        flags: names of the command's options; an error of the libraries names parameters, and the line adds the dashes.
    """

    def __init__(self, flags: Collection[str] = ()):
        self._flags = flags

    def __enter__(self) -> "RunLog":
        self._root = logging.getLogger()
        self._previous_level = self._root.level
        self._handlers: list[logging.Handler] = []
        self._locks = ExitStack()
        self._folder: Path | None = None
        self._buffer = MemoryHandler(capacity=1_000_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._root.setLevel(logging.DEBUG)
        # They log every image, every font and every graph.
        for talkative in ("PIL", "matplotlib", "torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx"):
            logging.getLogger(talkative).setLevel(logging.WARNING)
        self._add(self._buffer, logging.DEBUG)
        write_all_names()
        self._stderr = sys.stderr
        sys.stderr = Terminal(self._stderr)  # type: ignore[assignment]
        self._add(TerminalHandler(sys.stderr), logging.INFO if distributed.is_main() else logging.ERROR)
        return self

    def _add(self, handler: logging.Handler, level: int) -> None:
        handler.setLevel(level)
        self._handlers.append(handler)
        self._root.addHandler(handler)

    def lock(self, folder: Path) -> None:
        """Keeps other runs out of a folder during this one; raises ValueError if one uses it."""
        if distributed.is_main():
            self._locks.enter_context(FolderLock(folder, "--save_dir"))

    def open(self, save_dir: Path, folder: Path | None = None, *, named: bool = False) -> Path:
        """Makes `logs/<save_dir>/<time>` (an absolute `save_dir` replaces `logs/<save_dir>`), or continues in a folder.

        If `save_dir` was `named`, a run whose folder cannot be written to continues in a new one.

        Raises:
            ValueError: another run uses it.
        """
        if distributed.is_main():
            parent = Path("logs") / save_dir
            if folder is not None and named and not os.access(folder, os.W_OK):
                logger.info("the run goes on in --save_dir %s, since %s cannot be written to", save_dir, folder)
                folder = None
            elif folder is not None and named and folder.resolve().parent != parent.resolve():
                logger.warning("--save_dir %s is not used: the run goes on in its folder, %s", save_dir, folder)
            folder = folder or _make_folder(parent)
            self.lock(folder)
            for path in folder.glob("*.tmp*"):  # what processes left that died while writing
                if path.is_file():
                    path.unlink()
            for name, level in (("info.log", logging.INFO), ("debug.log", logging.DEBUG)):
                file = LogFile(folder / name)
                self._add(file, level)
                self._copy_buffer(file)
            self._root.removeHandler(self._buffer)
        self._folder = distributed.broadcast(folder)
        assert self._folder is not None
        return self._folder

    def _copy_buffer(self, file: LogFile) -> None:
        for record in self._buffer.buffer:
            if record.levelno >= file.level:
                file.handle(record)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception):
            logger.debug("the run ended here", exc_info=error)
        message, status = _in_one_line(error, self._flags)
        if message:
            logger.error("%s", message)
        if isinstance(error, Exception) and not distributed.is_main() and self._folder is not None:
            with suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)  # on another machine's disk
                file = LogFile(self._folder / f"rank{distributed.rank()}.log")
                self._copy_buffer(file)
                file.close()
        for handler in self._handlers:
            self._root.removeHandler(handler)
            handler.close()
        self._root.setLevel(self._previous_level)
        sys.stderr = self._stderr
        self._locks.close()
        if message:
            raise SystemExit(status) from None


def _in_one_line(error: BaseException | None, flags: Collection[str]) -> tuple[str, int]:
    """The message and exit status for an error whose traceback would not help; an empty message for others."""
    if isinstance(error, (ValueError, OSError)):
        message = str(error)
        if message.startswith("Caught "):  # from a DataLoader's worker, which wraps the message in its traceback
            message = message.splitlines()[-1].split(": ", 1)[-1]
        return with_dashes(message, flags), 2
    if isinstance(error, RuntimeError) and (reason := end_of_a_worker(error)):
        return reason, 1
    lost = distributed.world_size() > 1 and ("by peer" in str(error) or "remote process exited" in str(error))
    if isinstance(error, RuntimeError) and lost:  # Gloo and NCCL say so
        return "another process of the run has ended, so this one ends too", 1
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
        remedy = "--precision bf16, --activation_checkpointing and --grad_cache_chunk 48 need less in training"
        first = [*str(error).splitlines(), "main memory"][0]
        return f"out of memory ({first}); {remedy}, --extraction_batch_size 4 in evaluation", 1
    return "", 0


def _make_folder(parent: Path) -> Path:
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = parent / (stamp if number == 1 else f"{stamp}_{number}")  # runs started in the same second
            with suppress(FileExistsError):
                folder.mkdir()
                _link(folder)
                return folder
    except OSError as error:
        raise OSError(f"cannot make a run folder in {parent} ({error}); name another --save_dir") from error
    raise AssertionError("itertools.count ended")


def _link(folder: Path) -> None:
    """Lets `latest` beside a new run's folder lead to it, where links are possible; a file of that name stays."""
    link, temporary = folder.with_name("latest"), folder.with_name(f".{folder.name}")
    if link.is_symlink() or not link.exists():
        with suppress(OSError):
            temporary.symlink_to(folder.name)
            temporary.replace(link)


def environment(device: torch.device) -> dict[str, str]:
    """What results depend on besides the options."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "faiss": faiss.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": str(distributed.world_size()),
        "version": version(),
        "git": git_revision(),
    }


def log_header(options: Any, device: torch.device) -> None:
    """Logs the command line, the options, the versions and the device.

    Options have `flat`, each by its name; `given`, the names of those that were set; and `notes`, lines about them.
    """
    logger.info("command: %s", " ".join([Path(sys.executable).name, *sys.argv]))
    given = [options_file.as_typed(name, options.flat[name]) for name in options.given]
    logger.info("options given: %s", " ".join(given) or "none")
    for note in options.notes:
        logger.warning("%s", note)
    logger.debug("options: %s", json.dumps(options.flat, default=str))
    logger.info("environment: %s", json.dumps(environment(device)))


def write_options(folder: Path, options: Any) -> None:
    """Writes the options that were given into the run's folder, to repeat it; see `options_file`."""
    if distributed.is_main():
        options_file.write(folder, options.flat)


def write_results(folder: Path, results: dict[str, Any], options: Any, device: torch.device) -> None:
    """Writes `results.json` into the run's folder: the results, with the options and versions that they depend on."""
    if not distributed.is_main():
        return
    content = {**results, "options": options.flat, "environment": environment(device)}
    with atomic_write(folder / "results.json") as path:
        path.write_text(json.dumps(content, indent=2, default=str) + "\n")
