"""Checkpoints: written completely or not at all, and found again."""

import logging
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last_model.pth", "previous_model.pth", "best_model.pth"


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain values to a temporary file beside `path`, then moves it into place.

    If a run dies while writing, or the disk is full, the previous file remains.

    Raises:
        OSError: it could not be written; the message names the file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports some failed writes as RuntimeError
        temporary.unlink(missing_ok=True)
        before = "earlier checkpoints are intact; " if path.exists() else ""
        raise OSError(f"cannot write {path} ({error}); {before}free space and use --resume auto") from error
    if path.name == LAST and path.exists():
        os.replace(path, path.with_name(PREVIOUS))
    os.replace(temporary, path)


def newest(folders: Iterable[Path], *, read: Callable[[Path], object]) -> Path | None:
    """The most advanced intact checkpoint in the folders; None if there is none.

    The run that was written to last counts, and within it the epoch and step in the files, since clocks can go back.

    Args:
        folders: folders of runs.
        read: reads a file, raising ValueError if it is damaged.
    """
    runs = [[path for name in (LAST, PREVIOUS) if (path := folder / name).is_file()] for folder in folders]
    for paths in sorted(filter(None, runs), key=lambda paths: max(p.stat().st_mtime_ns for p in paths), reverse=True):
        for path in sorted(paths, key=_position, reverse=True):
            try:
                read(path)
                return path
            except ValueError as error:
                logger.warning("%s: trying the one before", error)
    return None


def _position(path: Path) -> tuple[int, int]:
    """Epochs and steps of a checkpoint, without its tensors; damaged ones sort first, so that `read` reports them."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content["epoch_num"], len(content["losses"])
    except Exception:  # damaged files fail in many ways
        return sys.maxsize, 0


def is_whole(path: Path, like: Mapping[str, Tensor]) -> bool:
    """Whether a file from `save` exists and is intact, with weights of these names and shapes."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model_state_dict"]
        return {name: value.shape for name, value in state.items()} == {name: v.shape for name, v in like.items()}
    except Exception:  # damaged files fail in many ways
        return False


def remove_leftovers(folder: Path) -> None:
    """Removes what processes left when they died while writing; the caller must have locked the folder."""
    for path in folder.glob("*.tmp"):
        if path.is_file():
            path.unlink()


def require_same(asked: dict[str, Any], written: dict[str, Any]) -> None:
    """Compares the options of a run with those of its checkpoint.

    Raises:
        ValueError: some differ; the message names each, with both values.
    """
    differing = [
        f"{name} was {written[name]} and is now {value}"
        for name, value in asked.items()
        if name in written and written[name] != value
    ]
    if differing:
        raise ValueError(
            f"the checkpoint was written with other options: {'; '.join(differing)}; "
            "give the same ones to resume, or start a new run without --resume"
        )
