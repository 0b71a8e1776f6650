"""Finds the images below a folder, photos that appear twice, and photos that cannot be read."""

import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

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
    """The content of a folder and its subfolders.

    Attributes:
        paths: sorted paths of the images.
        others: numbers of other files by lower-case suffix, "" for none, and `SPECIAL` for any that are not regular
            files.
        links: links to folders that are already listed, or that contain this one; they were not followed.
    """

    paths: list[str]
    others: Counter[str]
    links: list[str]

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


def _refuse(error: OSError) -> NoReturn:
    raise error


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether it is neither a folder nor a regular file, nor a link to one; a broken link is not special."""
    if entry.is_file(follow_symlinks=False):  # known without reading the file's status
        return False
    try:
        mode = entry.stat().st_mode
    except OSError:
        return False  # reading it will report why it cannot be read
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


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
    waiting, visited = [os.fspath(folder)], set()
    root, endings = os.path.realpath(folder), tuple(suffixes)
    while waiting:
        top = waiting.pop(0)
        real = os.path.realpath(top)
        if real in visited or root.startswith(os.path.join(real, "")):
            links.append(top)
            continue
        for parent, folders, names in os.walk(top, onerror=_refuse):
            visited.add(os.path.realpath(parent))
            below = sorted(name for name in folders if not name.startswith("."))
            folders.clear()
            for name in below:
                path = os.path.join(parent, name)
                if os.path.islink(path):
                    waiting.append(path)
                elif os.path.realpath(path) not in visited:  # a link may lead to a folder that contains a visited one
                    folders.append(name)
            with os.scandir(parent) as entries:
                special = {entry.name for entry in entries if entry.name[0] != "." and _is_special(entry)}
            others.update([SPECIAL] * len(special))
            names = [name for name in names if name[0] != "." and name not in special]
            images = [name for name in names if name.lower().endswith(endings)]
            paths += [f"{parent}{os.sep}{name}" for name in images]
            if len(images) < len(names):
                rest = (name for name in names if not name.lower().endswith(endings))
                others.update(os.path.splitext(name)[1].lower() for name in rest)
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
    left_out = listing.left_out
    if not listing.paths:
        raise ValueError(
            f"no image ({', '.join(suffixes[:3])}{', ...' if len(suffixes) > 3 else ''}) in {folder}"
            f"{f', but {left_out}' if left_out else ''}; put photos there, other formats (HEIC) converted"
        )
    if left_out:
        advice = (
            "in datasets only .jpg, .jpeg and .png count" if suffixes == IMAGE_SUFFIXES else "convert photos to JPEG"
        )
        logger.warning("%s: left out %s; %s", folder, left_out, advice)
    return listing.paths


def first_missing(folder: Path) -> str:
    """Which part of the path of a missing folder is not there, and the folders beside it, in words."""
    missing = folder.absolute()
    while not missing.parent.is_dir():
        missing = missing.parent
    if missing.exists():
        return f"{missing} is a file"
    with suppress(OSError):
        names = sorted(entry.name for entry in os.scandir(missing.parent) if entry.is_dir() and entry.name[0] != ".")
        others = f", only {', '.join(names[:5])}{', ...' * (len(names) > 5)}" * bool(names)
        return f"{missing.parent} has no {missing.name}{others}"
    return f"{missing.parent} cannot be read"


def identity(path: str) -> tuple[int, int] | str:
    """An identity that is the same for all paths, links and hard links to a file."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def unreadable(paths: Sequence[str], read: Callable[[str], object], progress: str) -> dict[str, str]:
    """The photos that cannot be read, and why.

    Args:
        paths: any number of photos.
        read: reads one, or raises ValueError.
        progress: name of the progress bar.
    """

    def reason(path: str) -> str | None:
        try:
            read(path)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = tqdm(pool.map(reason, paths), total=len(paths), desc=progress, unit="image")
        return {path: found for path, found in zip(paths, reasons, strict=True) if found is not None}
