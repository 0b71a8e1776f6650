"""The run's folder, its log and its results: what happened, with what, on what."""

import itertools
import json
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Any

import faiss
import numpy
import PIL
import torch
import torchvision

from . import distributed

logger = logging.getLogger(__name__)


def runs_of(save_dir: Path) -> list[Path]:
    """The folders of earlier runs with this `save_dir`."""
    parent = Path("logs") / save_dir
    return [folder for folder in parent.iterdir() if folder.is_dir()] if parent.is_dir() else []


class TerminalFormatter(logging.Formatter):
    """The message alone, with its level in front where that is not INFO, and the rank unless it is the main process."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        message = message if record.levelno == logging.INFO else f"{record.levelname}: {message}"
        return message if distributed.is_main() else f"rank {distributed.rank()}: {message}"


class RunLog:
    """The log of a run, within a `with` block.

    The terminal shows it from the start; `open` adds the run's folder, where `info.log` has what the terminal shows and
    `debug.log` has all, tracebacks included, from the start too. Bad input, which this project raises as ValueError or
    OSError, ends the program there: one line, no traceback on the terminal, exit status 2, and no folder if none was
    opened yet. Of several processes the main one does all this, and the others say what goes wrong in them.
    """

    def __enter__(self) -> "RunLog":
        self._root = logging.getLogger()
        self._previous_level = self._root.level
        self._handlers: list[logging.Handler] = []
        self._buffer = MemoryHandler(capacity=1_000_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._root.setLevel(logging.DEBUG)
        for talkative in ("PIL", "matplotlib"):  # they describe every image and every font
            logging.getLogger(talkative).setLevel(logging.INFO)
        self._add(self._buffer, logging.DEBUG, logging.Formatter())
        level = logging.INFO if distributed.is_main() else logging.ERROR
        self._add(logging.StreamHandler(sys.stderr), level, TerminalFormatter())
        return self

    def _add(self, handler: logging.Handler, level: int, formatter: logging.Formatter) -> None:
        handler.setLevel(level)
        handler.setFormatter(formatter)
        self._handlers.append(handler)
        self._root.addHandler(handler)

    def open(self, save_dir: Path, folder: Path | None = None) -> Path:
        """Makes `logs/<save_dir>/<time>` (an absolute `save_dir` replaces `logs/<save_dir>`), or goes on in `folder`.

        Returns:
            The run's folder.
        """
        if distributed.is_main():
            folder = folder or _make_folder(Path("logs") / save_dir)
            self._open_files(folder)
        self._root.removeHandler(self._buffer)
        folder = distributed.broadcast(folder)
        assert folder is not None
        return folder

    def _open_files(self, folder: Path) -> None:
        for name, level in (("info.log", logging.INFO), ("debug.log", logging.DEBUG)):
            file = logging.FileHandler(folder / name)
            self._add(file, level, logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            for record in self._buffer.buffer:
                if record.levelno >= level:
                    file.handle(record)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception):
            logger.debug("the run ended here", exc_info=error)
        if isinstance(error, (ValueError, OSError)):
            message = str(error)
            if message.startswith("Caught "):  # from a DataLoader's worker, which wraps the message in its traceback
                message = message.splitlines()[-1].split(": ", 1)[-1]
            logger.error("%s", message)
        for handler in self._handlers:
            self._root.removeHandler(handler)
            handler.close()
        self._root.setLevel(self._previous_level)
        if isinstance(error, (ValueError, OSError)):
            raise SystemExit(2) from None


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
    """What a figure depends on besides the options: versions, device, git revision."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "faiss": faiss.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": str(distributed.world_size()),
        "git": git_revision(),
    }


def git_revision() -> str:
    """The commit that is checked out, with "-dirty" behind it if files differ; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"


def log_header(settings: dict[str, Any], device: torch.device, *, given: Sequence[str] = ()) -> None:
    """Writes the command line, the options, the versions and the device at the top of the log.

    Args:
        settings: every option by its name; for debug.log.
        device: what is computed on.
        given: names of the options that were set, which are what a reader wants to see.
    """
    logger.info("command: %s", " ".join([Path(sys.executable).name, *sys.argv]))
    logger.info("options given: %s", " ".join(as_flag(name, settings[name]) for name in given) or "none")
    logger.debug("options: %s", json.dumps(settings, default=str))
    logger.info("environment: %s", json.dumps(environment(device)))


def as_flag(name: str, value: Any) -> str:
    """An option as it is written on a command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    values = value if isinstance(value, (tuple, list)) else ["none" if value is None else value]
    return shlex.join([f"--{name}", *map(str, values)])


def log_parameters(model: torch.nn.Module) -> None:
    """Writes how many parameters the model has and how many of them are trained."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("parameters: %d trainable of %d", trainable, total)


def write_results(folder: Path, results: dict[str, Any], settings: dict[str, Any], device: torch.device) -> None:
    """Writes `results.json` into the run's folder: the results, and the options and versions that they depend on."""
    if not distributed.is_main():
        return
    content = {**results, "options": settings, "environment": environment(device)}
    (folder / "results.json").write_text(json.dumps(content, indent=2, default=str) + "\n")
    logger.info("log and results.json in %s", folder)
