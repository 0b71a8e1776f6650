"""The run's folder, its log and its results, with the options and the environment that they depend on."""

import itertools
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
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

from ..retrieval.descriptor_store import warn_of_leftovers
from ..system import distributed
from ..system.files import whole
from ..system.lock import FolderLock
from ..system.reading import end_of_a_worker
from ..system.version import version
from . import checkpoint

logger = logging.getLogger(__name__)


def runs_of(save_dir: Path) -> list[Path]:
    """Folders of earlier runs with this `save_dir`."""
    parent = Path("logs") / save_dir
    return [folder for folder in parent.iterdir() if folder.is_dir()] if parent.is_dir() else []


def require_outside(folders: Iterable[Path], **places: Path | None) -> None:
    """Makes sure that a run does not write into photo folders, where the next run would list its files.

    Args:
        folders: photo folders.
        places: paths to write to, by option name; None for none.

    Raises:
        ValueError: a path lies in one of the folders.
    """
    for flag, place in places.items():
        for folder in folders if place is not None else ():
            if Path(os.path.realpath(str(place))).is_relative_to(os.path.realpath(folder)):
                raise ValueError(
                    f"{place} lies in {folder}, so later runs would read what is written there as photos; name a "
                    f"--{flag} outside of it"
                )


class Terminal:
    """A stream to a terminal that may go away: a connection is lost, or the reader of a pipe ends (`| tee` on Ctrl-C).

    The run continues without it. It replaces `sys.stderr`, so progress bars write here too.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream  # None if the program was started without one

    def write(self, text: str) -> int:
        """Writes as long as the stream works."""
        if self._stream is not None:
            try:
                return self._stream.write(text)
            except (OSError, ValueError):  # the latter from a closed file
                self._stream = None
        return len(text)

    def flush(self) -> None:
        """Flushes as long as the stream works."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._stream = None

    def isatty(self) -> bool:
        """Whether it really is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class TerminalHandler(logging.StreamHandler[Any]):
    """Prints the message with its level unless that is INFO, and with the rank unless it is the main process.

    Each message starts on a new line despite progress bars: this process clears its own bars first; the others do not
    know of them, so they start with a line break.
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

    def __init__(self, path: Path, level: int):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")  # file names may not be UTF-8
        self.setLevel(level)
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
    `rank<number>.log`.

    The run's folder is locked for this process until the block ends.
    """

    def __enter__(self) -> "RunLog":
        self._root = logging.getLogger()
        self._previous_level = self._root.level
        self._handlers: list[logging.Handler] = []
        self._locks = ExitStack()
        self._folder: Path | None = None
        self._buffer = MemoryHandler(capacity=1_000_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._root.setLevel(logging.DEBUG)
        for talkative in ("PIL", "matplotlib"):  # they log every image and every font
            logging.getLogger(talkative).setLevel(logging.INFO)
        for compiler in ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx"):  # and every graph
            logging.getLogger(compiler).setLevel(logging.WARNING)
        self._add(self._buffer, logging.DEBUG)
        self._stderr = sys.stderr
        sys.stderr = Terminal(self._stderr)  # type: ignore[assignment]
        self._add(TerminalHandler(sys.stderr), logging.INFO if distributed.is_main() else logging.ERROR)
        return self

    def _add(self, handler: logging.Handler, level: int) -> None:
        handler.setLevel(level)
        self._handlers.append(handler)
        self._root.addHandler(handler)

    def lock(self, folder: Path) -> None:
        """Keeps other runs out of a folder during this one.

        Raises:
            ValueError: another run uses it.
        """
        if distributed.is_main():
            self._locks.enter_context(FolderLock(folder, "--save_dir"))

    def open(self, save_dir: Path, folder: Path | None = None) -> Path:
        """Makes `logs/<save_dir>/<time>` (an absolute `save_dir` replaces `logs/<save_dir>`), or continues in `folder`.

        Returns:
            The run's folder.

        Raises:
            ValueError: another run uses it.
        """
        if distributed.is_main():
            folder = folder or _make_folder(Path("logs") / save_dir)
            self.lock(folder)
            checkpoint.remove_leftovers(folder)
            for name, level in (("info.log", logging.INFO), ("debug.log", logging.DEBUG)):
                try:
                    file = LogFile(folder / name, level)
                except OSError as error:
                    logger.warning("cannot write %s (%s); the run continues without it", folder / name, error.strerror)
                    continue
                self._add(file, level)
                self._copy_buffer(file)
            with suppress(OSError):  # folders that vanish meanwhile, or belong to another user
                runs = (run for run in folder.parent.iterdir() if run != folder and (run / "info.log").exists())
                warn_of_leftovers(runs)
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
        message, status = _in_one_line(error)
        if message:
            logger.error("%s", message)
        if isinstance(error, Exception) and not distributed.is_main() and self._folder is not None:
            with suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)  # on another machine's disk
                file = LogFile(self._folder / f"rank{distributed.rank()}.log", logging.DEBUG)
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


OUT_OF_MEMORY = (
    "out of memory ({}); in training, --precision bf16, --activation_checkpointing and --grad_cache_chunk 48 need "
    "less, in evaluation --extraction_batch_size 4"
)


def _in_one_line(error: BaseException | None) -> tuple[str, int]:
    """The message and exit status for an error whose traceback would not help; an empty message for others."""
    if isinstance(error, (ValueError, OSError)):
        message = str(error)
        if message.startswith("Caught "):  # from a DataLoader's worker, which wraps the message in its traceback
            message = message.splitlines()[-1].split(": ", 1)[-1]
        return message, 2
    if isinstance(error, RuntimeError) and (reason := end_of_a_worker(error)):
        return reason, 1
    if isinstance(error, RuntimeError) and distributed.is_of_a_lost_process(error):
        return "another process of the run has ended, so this one ends too", 1
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
        return OUT_OF_MEMORY.format(str(error).splitlines()[0] if str(error) else "main memory"), 1
    return "", 0


def _make_folder(parent: Path) -> Path:
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = parent / (stamp if number == 1 else f"{stamp}_{number}")  # runs started in the same second
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise OSError(f"cannot make a run folder in {parent} ({error}); name another --save_dir") from error
    raise AssertionError("itertools.count ended")


def environment(device: torch.device) -> dict[str, str]:
    """What results depend on besides the options: versions, device, this repository's version and git revision."""
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


def git_revision() -> str:
    """The checked-out commit, followed by "-dirty" if files differ; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"


def log_header(settings: dict[str, Any], device: torch.device, *, given: Sequence[str] = ()) -> None:
    """Logs the command line, the options, the versions and the device.

    Args:
        settings: every option by its name; for debug.log.
        device: device of the model.
        given: names of the options that were set, for info.log.

    If some of them come from --options, `settings["notes"]` says so.
    """
    logger.info("command: %s", " ".join([Path(sys.executable).name, *sys.argv]))
    logger.info("options given: %s", " ".join(as_flag(name, settings[name]) for name in given) or "none")
    for note in settings.get("notes", ()):
        logger.info("%s", note)
    logger.debug("options: %s", json.dumps(settings, default=str))
    logger.info("environment: %s", json.dumps(environment(device)))


def compare_with_record(settings: dict[str, Any], device: torch.device) -> None:
    """Warns how a run differs from the one whose results.json --options names, other than by the command line.

    Args:
        settings: every option by its name, as completed by the checkpoint.
        device: device of the model.
    """
    if settings["options"] is None or not distributed.is_main():
        return
    content = {}
    with suppress(OSError, ValueError):  # it was read before, but may be gone
        content = json.loads(Path(settings["options"]).read_bytes())
    now = json.loads(json.dumps(settings, default=str))
    asked = {*settings["given"], "options", "given", "notes", "started_in"}
    asked |= {"resume"}  # the header says if that is left out
    there = content.get("options", {})
    changed = [name for name in now if name in there and name not in asked and now[name] != there[name]]
    if changed:
        logger.warning(
            "different from %s, by another checkpoint, version or option: %s",
            settings["options"],
            ", ".join(f"{as_flag(name, now[name])} ({as_flag(name, there[name])} there)" for name in changed),
        )
    if unknown := [as_flag(name, value) for name, value in there.items() if name not in now]:
        logger.warning(
            "%s records options that this version does not have: %s", settings["options"], ", ".join(unknown)
        )
    here, there = environment(device), content.get("environment")
    there = there if isinstance(there, dict) else {}
    changed = [name for name in here if name in there and here[name] != there[name]]
    if changed:
        logger.info(
            "different environment from %s: %s",
            settings["options"],
            ", ".join(f"{name} {here[name]} ({there[name]} there)" for name in changed),
        )


def as_flag(name: str, value: Any) -> str:
    """An option as it is written on a command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    values = value if isinstance(value, (tuple, list)) else ["none" if value is None else value]
    return shlex.join([f"--{name}", *map(str, values)])


def log_parameters(model: torch.nn.Module) -> None:
    """Logs how many parameters the model has and how many of them are trained."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("parameters: %d trainable of %d", trainable, total)


def write_results(folder: Path, results: dict[str, Any], settings: dict[str, Any], device: torch.device) -> None:
    """Writes `results.json` into the run's folder: the results, with the options and versions that they depend on."""
    if not distributed.is_main():
        return
    content = {**results, "options": settings, "environment": environment(device)}
    with whole(folder / "results.json") as path:
        path.write_text(json.dumps(content, indent=2, default=str) + "\n")
