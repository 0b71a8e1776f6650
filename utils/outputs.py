"""What a run leaves on disk: whole or not there, and one that fails takes no other with it."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives the path to write a file or a folder at, which is moved to `path` at the end, and removed if that fails."""
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")  # some go by the suffix
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # it is not there, or was a folder
            temporary.unlink()
        raise


class Outputs:
    """What a finished evaluation writes. An output that fails costs a line, and neither the others nor the result.

    Attributes:
        missing: the names of those that failed.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Around what writes one output: whatever goes wrong there becomes one line that names it and the reason."""
        try:
            yield
        except Exception as error:  # nothing that may go wrong here is worth a finished evaluation
            logger.debug("%s ended here", name, exc_info=error)
            logger.error("%s could not be written: %s", name, " ".join(str(error).split()) or type(error).__name__)
            self.missing.append(name)
