"""Locks a folder, for one process at a time."""

import errno
import fcntl
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

FILE = ".lock"

_TAKEN = (errno.EACCES, errno.EAGAIN)
_held: set[str] = set()  # by this process; the kernel's lock does not keep a process from itself


class FolderLock:
    """Keeps other processes out of a folder, from its creation to `release` or the end of a `with` block.

    The kernel holds the lock and releases it when the process ends, however that happens; forked processes do not
    inherit it. Other machines see it if the file system supports POSIX locks (NFS does; Lustre with `flock`). Without
    them, a warning says so and the folder is not locked.

    Args:
        folder: created if missing.
        flag: the option that names the folder.
        purpose: what will be done there, for an error message.

    Raises:
        OSError: the folder is not writable.
        ValueError: another process uses it; the message says which, where and since when.
    """

    def __init__(self, folder: Path, flag: str, purpose: str = "write"):
        self._made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(folder, flag, purpose, error) from error
        self._path = os.path.realpath(folder / FILE)
        self._descriptor: int | None = None
        if self._path in _held:
            raise _in_use(folder, flag, f"this process ({os.getpid()})")
        while True:
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise _unusable(folder, flag, purpose, error) from error
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                if error.errno in _TAKEN:
                    raise _in_use(folder, flag, holder) from None
                logger.warning("%s cannot be locked (%s), so a second run could use it too", folder, error.strerror)
                return
            if os.path.exists(self._path) and os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                break
            os.close(descriptor)  # the holder removed the file between our opening and locking it
        self._descriptor = descriptor
        _held.add(self._path)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with suppress(OSError):  # a full disk: the lock still holds
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())

    def release(self) -> None:
        """Releases the lock and removes its file, and the folder if it was created for it and is still empty."""
        if self._descriptor is not None:
            with suppress(OSError):
                os.remove(self._path)
                if self._made:
                    os.rmdir(os.path.dirname(self._path))
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self._path)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _unusable(folder: Path, flag: str, purpose: str, error: OSError) -> OSError:
    return OSError(f"cannot {purpose} in {folder} ({error}); name another {flag}")


def _in_use(folder: Path, flag: str, holder: str) -> ValueError:
    return ValueError(f"{folder} is in use by {holder}; wait for it or stop it, or name another {flag}")


def is_held(folder: Path) -> bool:
    """Whether a live process, including this one, has locked the folder; leaves nothing behind in it."""
    path = os.path.realpath(folder / FILE)
    if path in _held:  # opening and closing the file would release the lock
        return True
    try:
        with open(path, "r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _TAKEN
    return False
