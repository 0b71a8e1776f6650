"""Checkpoints: written completely or not at all, and found again."""

import errno
import logging
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .metrics import FILE

logger = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last_model.pth", "previous_model.pth", "best_model.pth"


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain values to a temporary file, then moves it into place: a failure leaves the old one."""
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
        content = _load(path)
        position, start = (content["epoch_num"], len(content["losses"])), content.get("started", "")
    except Exception:  # damaged files fail in many ways; they come first in their folder, so that `read` reports them
        position, start = (sys.maxsize, 0), ""
    stamp = re.match(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)(?:_(\d+))?", start or path.parent.name)
    if stamp is None:
        files = [path.with_name(name) for name in (LAST, PREVIOUS)]
        return "", max(file.stat().st_mtime_ns for file in files if file.exists()), position
    return stamp[1], int(stamp[2] or 1), position, path.parent.name == stamp[0]


def _load(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # some network mounts cannot map files into memory
        content = torch.load(path, map_location="cpu", weights_only=True)
    return dict(content)


def is_whole(path: Path, like: Mapping[str, Tensor]) -> bool:
    """Whether a file from `save` is intact, with these weights' shapes; OSError if it cannot be read now."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        state = _load(path)["model_state_dict"]
        return {name: value.shape for name, value in state.items()} == {name: v.shape for name, v in like.items()}
    except FileNotFoundError:
        return False
    except OSError as error:  # a damaged file with offsets before its start gives EINVAL, or no errno at all
        if error.errno in (None, errno.EINVAL):
            return False
        raise OSError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from error
    except Exception:  # damaged files fail in many ways
        return False


def copy_run(resumed: Path, folder: Path) -> None:
    """Copies what a run needs to go on in another folder: the checkpoint it resumes from, the best one, the table."""
    for source, name in ((resumed, LAST), (resumed.with_name(BEST), BEST), (resumed.with_name(FILE), FILE)):
        if source.exists():
            shutil.copyfile(source, folder / name)


def remove_leftovers(folder: Path) -> None:
    """Removes what processes left when they died while writing; the caller must have locked the folder."""
    for path in folder.glob("*.tmp"):
        if path.is_file():
            path.unlink()


def require_same(now: dict[str, Any], written: dict[str, Any]) -> None:
    """Raises ValueError, which names options with both values, if those of a run and its checkpoint differ."""
    differing = [
        f"{name} was {written[name]} and is now {value}"
        for name, value in now.items()
        if name in written and written[name] != value
    ]
    if differing:
        raise ValueError(
            f"the checkpoint has other options: {'; '.join(differing)}; give the same ones, or leave out --resume"
        )
