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
    """Keeps other processes out of a folder, which it makes if missing, to the end of a `with` block.

    The kernel holds the lock and releases it when the process ends, however that happens; forked processes do not
    inherit it. Other machines see it if the file system supports POSIX locks (NFS does; Lustre with `flock`). Without
    them, a warning says so and the folder is not locked.

    Raises:
        OSError: the folder is not writable; use another `flag`, the option that names it.
        ValueError: another process uses it; the message says which, where and since when.
    """

    def __init__(self, folder: Path, flag: str):
        self._made = not folder.exists()
        self._descriptor: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = os.path.realpath(folder / FILE)
            holder = f"this process ({os.getpid()})" if self._path in _held else self._lock(folder)
        except OSError as error:
            raise OSError(f"cannot write in {folder} ({error}); name another {flag}") from error
        if holder:
            raise ValueError(f"{folder} is in use by {holder}; wait for it or stop it, or name another {flag}")

    def _lock(self, folder: Path) -> str:
        """Locks the file, if the file system can; returns who has it, or "" if no other process does."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(descriptor, 1000).decode(errors="replace").strip()
                os.close(descriptor)
                if error.errno in _TAKEN:
                    return holder or "another process"
                logger.warning("%s cannot be locked (%s), so a second run could use it too", folder, error.strerror)
                return ""
            if os.path.exists(self._path) and os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                break
            os.close(descriptor)  # the holder removed the file between our opening and locking it
        self._descriptor = descriptor
        _held.add(self._path)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with suppress(OSError):  # a full disk: the lock still holds
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        return ""

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        """Releases the lock and removes its file, and the folder if it was created for it and is still empty."""
        if self._descriptor is not None:
            with suppress(OSError):
                os.remove(self._path)
                if self._made:
                    os.rmdir(os.path.dirname(self._path))
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self._path)


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
