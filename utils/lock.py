"""A folder for one process at a time."""

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
_held: set[str] = set()  # by this process, which a lock of the kernel's does not keep from itself


class FolderLock:
    """Keeps other processes out of a folder, from its making to `release` or the end of a `with` block.

    The kernel holds the lock and drops it with the process, however that ends; processes forked from it do not have
    it. Other machines see it where their file system carries POSIX locks (NFS does, Lustre if mounted so). Where it
    carries none, a warning says so and the folder is open to all.

    Args:
        folder: made if missing.
        flag: of the command line, that named the folder.
        purpose: what is to be done in it, for an error.

    Raises:
        OSError: nothing can be written there.
        ValueError: another process has it; the message says which, where and since when.
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
                logger.warning("%s cannot be locked (%s): nothing keeps a second run out", folder, error.strerror)
                return
            if os.path.exists(self._path) and os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                break
            os.close(descriptor)  # its holder removed the file between our opening and locking it
        self._descriptor = descriptor
        _held.add(self._path)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())

    def release(self) -> None:
        """Lets others in; nothing of the lock is left, nor a folder that was made for it and is still empty."""
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
    """Whether a live process has the folder, this one included; leaves nothing behind in it."""
    path = os.path.realpath(folder / FILE)
    if path in _held:  # to open and close the file would drop the lock
        return True
    try:
        with open(path, "r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _TAKEN
    return False
