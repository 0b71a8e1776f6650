"""The run's folder, its log and its results: what happened, with what, on what."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy
import PIL
import torch
import torchvision

logger = logging.getLogger(__name__)


@contextmanager
def run_folder(save_dir: Path) -> Iterator[Path]:
    """Makes `logs/<save_dir>/<time>/` (an absolute `save_dir` replaces `logs/<save_dir>`) and logs into it meanwhile.

    `info.log` has what the terminal shows; `debug.log` has all, tracebacks included. Bad input, which this project
    raises as ValueError or OSError, ends the program there: one line, no traceback on the terminal, exit status 2.

    Yields:
        The folder.
    """
    folder = _make_folder(Path("logs") / save_dir)
    root = logging.getLogger()
    handlers: list[logging.Handler] = [
        logging.StreamHandler(sys.stderr),
        logging.FileHandler(folder / "info.log"),
        logging.FileHandler(folder / "debug.log"),
    ]
    previous_level = root.level
    root.setLevel(logging.DEBUG)
    for handler, level in zip(handlers, (logging.INFO, logging.INFO, logging.DEBUG), strict=True):
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        root.addHandler(handler)
    logging.getLogger("PIL").setLevel(logging.INFO)  # it describes every image it opens
    try:
        yield folder
    except (ValueError, OSError) as error:
        logger.debug("traceback of the error below", exc_info=True)
        message = str(error)
        if message.startswith("Caught "):  # from a DataLoader's worker, which wraps the message in its traceback
            message = message.splitlines()[-1].split(": ", 1)[1]
        logger.error("%s", message)
        raise SystemExit(2) from None
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(previous_level)


def _make_folder(parent: Path) -> Path:
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for name in (stamp, *(f"{stamp}_{i}" for i in range(2, 100))):  # runs started in the same second
        try:
            (parent / name).mkdir(parents=True)
            return parent / name
        except FileExistsError:
            continue
    raise SystemExit(f"cannot make a run folder in {parent}: 99 runs started in this second")


def environment(device: torch.device) -> dict[str, str]:
    """What a figure depends on besides the options: versions, device, git revision."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "faiss": faiss.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "git": revision or "unknown",
    }


def log_header(settings: dict[str, Any], device: torch.device) -> None:
    """Writes the command line, the options, the versions and the device at the top of the log."""
    logger.info("command: %s", " ".join([Path(sys.executable).name, *sys.argv]))
    logger.info("options: %s", json.dumps(settings, default=str))
    logger.info("environment: %s", json.dumps(environment(device)))


def log_parameters(model: torch.nn.Module) -> None:
    """Writes how many parameters the model has and how many of them are trained."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("parameters: %d trainable of %d", trainable, total)


def write_results(folder: Path, results: dict[str, Any], settings: dict[str, Any], device: torch.device) -> None:
    """Writes `results.json` into the run's folder: the results, and the options and versions that they depend on."""
    content = {**results, "options": settings, "environment": environment(device)}
    (folder / "results.json").write_text(json.dumps(content, indent=2, default=str) + "\n")
    logger.info("log and results.json in %s", folder)
