"""Checkpoints: written completely or not at all, and found again."""

import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..system.files import write_durably
from .metrics import FILE

logger = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last_model.pth", "previous_model.pth", "best_model.pth"


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain values, completely or not at all; the `LAST` one before becomes `PREVIOUS`."""
    before = path.with_name(PREVIOUS) if path.name == LAST else None
    write_durably(path, lambda file: torch.save(content, file), before=before)


def newest(folders: Iterable[Path], *, read: Callable[[Path], object]) -> Path | None:
    """The most advanced intact checkpoint of the run that was started last; None if there is none.

    Files and names of folders say when a run was started and how far it has come: clocks can go back, and a copy is
    new. Only folders of other names, whose files do not say, are ordered by the time of the last change. `read` raises
    ValueError for a damaged file.
    """
    paths = [path for folder in folders for name in (LAST, PREVIOUS) if (path := folder / name).is_file()]
    ordered = sorted(paths, key=_started_and_position, reverse=True)
    for path in ordered:
        try:
            read(path)
        except ValueError as error:
            logger.warning("%s: trying the one before", error)
            continue
        if others := sorted({str(other.parent) for other in paths if other.parent != path.parent}):
            logger.info("%s is of the run that was started last; there are also %s", path, ", ".join(others))
        return path
    return None


def _started_and_position(path: Path) -> tuple[Any, ...]:
    """When the run of a checkpoint was started, how far it has come, and whether it is in its first folder."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # some network mounts cannot map files into memory
            content = torch.load(path, map_location="cpu", weights_only=True)
        position, start = (content["epoch_num"], len(content["losses"])), content.get("started", "")
    except Exception:  # damaged files fail in many ways; they come first in their folder, so that `read` reports them
        position, start = (sys.maxsize, 0), ""
    stamp = re.match(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)(?:_(\d+))?", start or path.parent.name)
    if stamp is None:
        return "", max(file.stat().st_mtime_ns for file in path.parent.glob("*_model.pth")), position
    return stamp[1], int(stamp[2] or 1), position, path.parent.name == stamp[0]


def is_whole(path: Path, like: Mapping[str, Tensor], *, read: Callable[[Path], dict[str, Any]]) -> bool:
    """Whether a file from `save` is intact, with these weights' shapes; `read` as in `newest`."""
    try:
        state = read(path)["model_state_dict"]
    except (FileNotFoundError, KeyError, ValueError):
        return False
    return {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in like.items()}


def copy_run(resumed: Path, folder: Path) -> None:
    """Copies what a run needs to go on in another folder: the checkpoint it resumes from, the best one, the table."""
    for source, name in ((resumed, LAST), (resumed.with_name(BEST), BEST), (resumed.with_name(FILE), FILE)):
        if source.exists():
            shutil.copyfile(source, folder / name)
