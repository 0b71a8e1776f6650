"""Writes outputs completely or not at all, where one that fails does not affect the others; and reads text."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path for a file or folder, which is moved to `path` at the end, or removed on failure."""
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")  # some writers go by the suffix
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # it is missing, or was a folder
            temporary.unlink()
        raise


def write_durably(path: Path, write: Callable[[BinaryIO], object], *, before: Path | None = None) -> None:
    """Writes a file of a training run through to the disk and then moves it into place; a failure leaves the old one.

    Args:
        write: writes the content into an open file.
        before: where the old file goes; by default it is replaced.
    """
    try:
        with atomic_write(path) as temporary:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if before is not None and path.exists():
                path.replace(before)
    except (OSError, RuntimeError) as error:  # torch.save reports some failed writes as RuntimeError
        remedy = "free space and use --resume auto, since earlier files are intact"
        raise OSError(f"cannot write {path} ({error}); {remedy}") from error


class Outputs:
    """The outputs of a finished evaluation. One that fails gives one log line; the results and other outputs remain."""

    def __init__(self) -> None:
        self.missing: list[str] = []  # names of those that failed

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Around writing one output: any failure becomes one line that names the output and the reason."""
        try:
            yield
        except Exception as error:  # no failure here may lose a finished evaluation
            logger.debug("%s failed here", name, exc_info=error)
            logger.error("%s could not be written: %s", name, " ".join(str(error).split()) or type(error).__name__)
            self.missing.append(name)


def write_paths(path: Path, images: Sequence[str]) -> None:
    """Writes a list of paths, one per line; a line break in a path is written as \\n, so that line n is image n."""
    lines = [image.replace("\n", "\\n").replace("\r", "\\r") for image in images]
    broken = [image for image, line in zip(images, lines, strict=True) if image != line]
    if broken:
        logger.warning("%s: line breaks in %d paths are written as \\n, e.g. %r", path.name, len(broken), broken[0])
    path.write_bytes(os.fsencode("".join(f"{line}\n" for line in lines)))


def read_text(path: Path) -> str:
    """Reads text with file names or keys, without byte order mark; bytes that are not UTF-8 are read as in file names.

    Raises:
        ValueError: it is not text.
    """
    content = path.read_bytes()
    if b"\0" in content:
        line = 1 + content.count(b"\n", 0, content.index(b"\0"))
        raise ValueError(f"{path}, line {line}: not text in UTF-8, but perhaps UTF-16; save it as UTF-8")
    return content.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def absolute(path: str) -> str:
    """The absolute path without `..` to write down: of `link/..` the folder above the one that the link leads to, as
    the file system reads it. Other links keep their names."""
    if os.pardir not in path.split(os.sep):
        return os.path.abspath(path)
    reached = os.sep
    for part in os.path.join(os.getcwd(), path).split(os.sep):
        if part == os.pardir:
            reached = os.path.dirname(os.path.realpath(reached) if os.path.islink(reached) else reached)
        elif part not in ("", os.curdir):
            reached = os.path.join(reached, part)
    return reached


def common_root(paths: Sequence[str]) -> str:
    """The deepest folder that contains all the files, see `absolute`."""
    return os.path.commonpath({absolute(folder) for folder in set(map(os.path.dirname, paths))})


def relative_to(root: str, paths: Sequence[str]) -> list[str]:
    """The paths of files relative to their `common_root`."""
    folders = {folder: absolute(folder) for folder in set(map(os.path.dirname, paths))}
    above = len(os.path.join(root, ""))
    return [os.path.join(folders[os.path.dirname(path)], os.path.basename(path))[above:] for path in paths]
