"""Writes outputs completely or not at all; one that fails does not affect the others."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
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


class Outputs:
    """The outputs of a finished evaluation. One that fails gives one log line; the results and other outputs remain.

    Attributes:
        missing: names of the outputs that failed.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Around writing one output: any failure becomes one line that names the output and the reason."""
        try:
            yield
        except Exception as error:  # no failure here may lose a finished evaluation
            logger.debug("%s failed here", name, exc_info=error)
            logger.error("%s could not be written: %s", name, " ".join(str(error).split()) or type(error).__name__)
            self.missing.append(name)
