"""Finds the images below a folder, and photos that appear twice."""

import logging
import os
import stat
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# For datasets: more formats would change the figures of a dataset that happens to contain such a file.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

# For plain folders: the photo formats that Pillow reads by itself; of several frames, the first counts.
PHOTO_SUFFIXES = (
    *IMAGE_SUFFIXES, ".jpe", ".jfif", ".mpo", ".apng", ".webp", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".tif",
    ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".pcx",
    ".sgi", ".qoi", ".dds", ".psd",
)  # fmt: skip

# Camera formats that nothing here reads.
UNREAD_PHOTOS = (
    ".heic", ".heif", ".hif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".raf", ".orf", ".rw2", ".pef",
    ".srw",
)  # fmt: skip

SPECIAL = "pipe, socket or device"  # counted like a suffix; reading one may block for ever


@dataclass(frozen=True)
class Listing:
    """The content of a folder and its subfolders."""

    paths: list[str]  # of the images, sorted
    others: Counter[str]  # other files by lower-case suffix, "" for none, and `SPECIAL` for what is no regular file
    links: list[str]  # to folders already listed, or that contain this one; they were not followed

    @property
    def left_out(self) -> str:
        """What was left out, e.g. "3 files (2 .heic, 1 .mov)"; "" if nothing."""
        said = []
        if count := self.others.total():
            kinds = ", ".join(f"{n:,} {suffix or 'without suffix'}" for suffix, n in self.others.most_common())
            said.append(f"{count:,} file{'s' if count > 1 else ''} ({kinds})")
        if self.links:
            said.append(f"{len(self.links)} link{'s' if len(self.links) > 1 else ''} to folders already listed")
            said[-1] += f", e.g. {self.links[0]}"
        return " and ".join(said)


def _mode(entry: os.DirEntry[str]) -> int:
    """What an entry is or links to, as `stat` tells; a broken link is a file: reading it will tell what is wrong."""
    if entry.is_file(follow_symlinks=False):  # known without reading the file's status
        return stat.S_IFREG
    try:
        return entry.stat().st_mode
    except OSError:
        return stat.S_IFREG


def scan(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Listing:
    """Lists the images below a folder.

    Names that begin with a dot are skipped, and only regular files, or links to them, count as images. A folder is
    visited once: links to folders come after the folders themselves, each in the order of names, and the first path to
    a folder is kept.

    Raises:
        OSError: a folder cannot be read.
    """
    paths: list[str] = []
    others: Counter[str] = Counter()
    links: list[str] = []
    waiting, visited = deque([os.fspath(folder)]), set()  # first the folders below the last one, then links
    root, endings = os.path.realpath(folder), tuple(suffixes)
    while waiting:
        parent = waiting.popleft()
        real = os.path.realpath(parent)
        if real in visited or root.startswith(os.path.join(real, "")):
            if os.path.islink(parent):  # not a folder below a link to what contains a visited one
                links.append(parent)
            continue
        visited.add(real)
        with os.scandir(parent) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
        folders: list[str] = []
        for entry in sorted(shown, key=attrgetter("name")):
            if stat.S_ISDIR(mode := _mode(entry)):
                (waiting if entry.is_symlink() else folders).append(entry.path)
            elif not stat.S_ISREG(mode):
                others[SPECIAL] += 1
            elif entry.name.lower().endswith(endings):
                paths.append(entry.path)
            else:
                others[os.path.splitext(entry.name)[1].lower()] += 1
        waiting.extendleft(reversed(folders))
    return Listing(sorted(paths), others, links)


def list_images(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[str]:
    """Paths of the images below a folder, sorted by name, see `scan`; the log says what was left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}: {first_missing(folder)}; check --eval_datasets_folder and --eval_dataset_name, or "
            "--database_folder and --queries_folder"
        )
    listing = scan(folder, suffixes)
    plain = suffixes != IMAGE_SUFFIXES
    if not listing.paths:
        kinds = ", ".join(IMAGE_SUFFIXES) + ", ..." * plain
        others = f", but {listing.left_out}" if listing.left_out else ""
        raise ValueError(f"no image ({kinds}) in {folder}{others}; put photos there, other formats (HEIC) converted")
    if listing.left_out:
        advice = "convert photos to JPEG" if plain else "in datasets only .jpg, .jpeg and .png count"
        logger.warning("%s: left out %s; %s", folder, listing.left_out, advice)
    return listing.paths


def first_missing(folder: Path) -> str:
    """Which part of the path of a missing folder is not there, and the folders beside it, in words."""
    missing = folder.absolute()
    while not missing.parent.is_dir():
        missing = missing.parent
    names = sorted(entry.name for entry in os.scandir(missing.parent) if entry.is_dir() and entry.name[0] != ".")
    others = f", only {', '.join(names[:5])}{', ...' * (len(names) > 5)}" * bool(names)
    return f"{missing.parent} has no folder {missing.name}{others}"


def identity(path: str) -> tuple[int, int] | str:
    """An identity that is the same for all paths, links and hard links to a file."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def also_among(paths: Sequence[str], others: Sequence[str]) -> NDArray[np.bool_]:
    """Which of the paths are the same file as one of the others, whatever their names."""
    files = set(map(identity, others))
    return np.array([identity(path) in files for path in paths], dtype=bool)
