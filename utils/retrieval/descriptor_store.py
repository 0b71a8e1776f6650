"""Descriptors on disk: written in any order by several processes, read in chunks, and never computed twice."""

import hashlib
import json
import logging
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..system import distributed
from ..system.files import atomic_write
from ..system.lock import is_held

logger = logging.getLogger(__name__)

EXTRACTED = "extracted"  # folder of a run for the descriptors that it needs until it has searched
CHECKED_BYTES = 2**26  # of a store in memory at a time while it is checked


class RowFile:
    """An array in a `.npy` file, existing or `create`d, written and read some rows at a time.

    By plain reads and writes: the pages of a memory map would count as this process's memory, and a full disk would
    kill the process without a message. `shape` is N and the shape of a row.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]):
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self.row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
        self._start = 0

    def create(self) -> None:
        """Creates the file, or replaces it; rows that are not written yet are zero and take no space."""
        with open(self.path, "wb") as file:
            description = np.lib.format.dtype_to_descr(self.dtype)
            header = {"descr": description, "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
            self._start = file.tell()
            file.truncate(self._start + self.shape[0] * self.row_bytes)

    def open(self) -> None:
        """Reads where the rows begin; raises ValueError if the file has another shape, data type or length."""
        with open(self.path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        expected, size = self._start + self.shape[0] * self.row_bytes, self.path.stat().st_size
        if (shape, dtype) != (self.shape, self.dtype) or size != expected:
            raise ValueError(f"{self.path.name} has {size} bytes, not {expected}, or another shape")

    def write(self, indices: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Writes the rows at `indices`."""
        with open(self.path, "r+b") as file:
            for run, first in self._runs(indices):
                file.seek(first)
                file.write(np.ascontiguousarray(rows[run], dtype=self.dtype).data)

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Reads the rows at `indices`; raises OSError if the file ends before them."""
        rows = np.empty((len(indices), *self.shape[1:]), dtype=self.dtype)
        with open(self.path, "rb") as file:
            for run, first in self._runs(indices):
                file.seek(first)
                if file.readinto(rows[run].data) < rows[run].nbytes:
                    raise OSError(f"{self.path} is cut short; remove it and start again")
        return rows

    def _runs(self, indices: NDArray[np.int64]) -> Iterator[tuple[slice, int]]:
        """The runs of consecutive `indices`, each with its offset in the file; in file order, there is one run."""
        starts = np.flatnonzero(np.diff(indices, prepend=-2) != 1)
        for start, end in zip(starts, [*starts[1:], len(indices)], strict=True):
            yield slice(start, end), self._start + int(indices[start]) * self.row_bytes


class DescriptorStore:
    """A row of numbers for each of N images in `<name>.npy`; `<name>.done` has a byte per image: 1 if it is written.

    A row is written before its byte is set, so a killed process leaves no half-written row that counts; what it wrote
    stays (the operating system's memory survives a process, but not a power cut). `<name>.json` says what the rows
    depend on. If one of the three files is missing or damaged, all is computed again, with a warning.

    Args:
        folder: created if missing.
        name: name of the files.
        shape: N and the shape of a row.
        dtype: data type on disk, float32 or float16.
        fingerprint: what the rows depend on; None for a store that always starts empty.
        photos: N files that the rows depend on too: by size, times and place or, if these have changed since, by the
            bytes that an earlier store with `kept` has noted.
        kept: whether the store is to be used for long, so that copies of the photos must be known.

    Raises:
        ValueError: the existing files hold something else.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        shape: tuple[int, ...],
        *,
        dtype: str = "float32",
        fingerprint: Mapping[str, Any] | None = None,
        photos: Sequence[str] = (),
        kept: bool = False,
    ):
        self.path, self._done_path, self._record_path = (folder / f"{name}.{kind}" for kind in ("npy", "done", "json"))
        self.shape = shape
        self._rows = RowFile(self.path, shape, np.dtype(dtype))
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            content = {"shape": list(shape), "dtype": dtype, **(fingerprint or {})}
            if photos:
                content |= {"files": _files_digest(photos), "images": None}
            if fingerprint is None or not self._goes_on(content, photos):
                self._begin(content, photos if kept else ())
        distributed.barrier()
        self._rows.open()

    def __len__(self) -> int:
        return self.shape[0]

    def _begin(self, content: dict[str, Any], photos: Sequence[str]) -> None:
        if photos:
            content["images"] = content["images"] or _contents_digest(photos)
        try:  # in this order, so that a half-made store can be told from other files
            self._done_path.write_bytes(bytes(len(self)))
            self._rows.create()
            self._write_record(content)
        except OSError as error:
            self.remove()
            raise self._unwritten(error) from error

    def _write_record(self, content: dict[str, Any]) -> None:
        with atomic_write(self._record_path) as path:
            path.write_text(json.dumps(content, indent=2) + "\n")

    def _goes_on(self, content: dict[str, Any], photos: Sequence[str]) -> bool:
        """Whether the files exist, are intact and match."""
        here = [path for path in (self.path, self._done_path, self._record_path) if path.exists()]
        if not here:
            return False
        if here == [self.path]:
            problem = f"{self.path} was not made by --descriptors_folder, since {self._record_path.name} is missing"
            raise ValueError(f"{problem}; move it away, or name another --descriptors_folder")
        damaged = "%s is missing or damaged, or a file beside it (%s), so these descriptors are computed again"
        try:
            written = dict(json.loads(self._record_path.read_text()))
        except (ValueError, TypeError, FileNotFoundError, RecursionError) as error:  # others of reading are no damage
            logger.warning(damaged, self._record_path, error)
            return False
        expected = dict(written)
        if photos:
            untouched = written.get("files") == content["files"]
            content["images"] = (untouched and written.get("images")) or _contents_digest(photos)
            if untouched:
                expected["images"] = content["images"]
        _require_same(expected, content, self.path)
        try:
            self._rows.open()
            if (count := self._done_path.stat().st_size) != len(self):
                raise ValueError(f"{count} bytes for {len(self)} images")
        except (ValueError, EOFError, FileNotFoundError) as error:
            logger.warning(damaged, self.path, error)
            return False
        if written != content:  # the same photos, copied or touched, or their bytes are known only now
            self._write_record(content)
        self._forget_zeros()
        return True

    def missing(self) -> NDArray[np.int64]:
        """Indices of the rows that are not written yet."""
        return np.flatnonzero(np.fromfile(self._done_path, dtype=np.uint8) == 0)

    def _forget_zeros(self) -> None:
        """Clears the bytes of zero rows: no image has one, but a power cut leaves them for rows not yet on the disk."""
        there = np.flatnonzero(np.fromfile(self._done_path, dtype=np.uint8))
        together = max(1, CHECKED_BYTES // self._rows.row_bytes)
        lost: list[int] = []
        for some in (there[start : start + together] for start in range(0, len(there), together)):
            lost += some[~self._rows.read(some).reshape(len(some), -1).any(axis=1)].tolist()
        if lost:
            logger.warning("%d rows of %s are zeros, as after a power cut: computed again", len(lost), self.path)
            self._mark(lost, b"\0")

    def write(self, indices: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        """Writes the rows at `indices`; those that raise OSError, mostly for lack of space, count as missing."""
        try:
            self._rows.write(indices, rows)
            self._mark(indices, b"\1")
        except OSError as error:
            raise self._unwritten(error) from error

    def _mark(self, indices: Iterable[int], byte: bytes) -> None:
        with open(self._done_path, "r+b", buffering=0) as file:
            for index in indices:
                file.seek(int(index))
                file.write(byte)

    def _unwritten(self, error: OSError) -> OSError:
        reason = error.strerror or error
        return OSError(f"cannot write {self.path} ({reason}); free space there and run the same command again")

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._rows.read(indices).astype(np.float32, copy=False)

    def remove(self) -> None:
        """Removes the store's own files, and its folder if it is then empty, with that of all datasets."""
        with suppress(OSError):
            for path in (self._record_path, self._done_path, self.path):
                path.unlink(missing_ok=True)
            self.path.parent.rmdir()
            if self.path.parent.parent.name == EXTRACTED:
                self.path.parent.parent.rmdir()


def _require_same(written: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Raises ValueError if a store's record differs from what is wanted; digests would tell a reader nothing."""
    names = {"dtype": "--descriptor_dtype", "shape": "the shape", "upright": "turning photos as EXIF says"}
    differences = []
    for key in [key for key in wanted | written if key != "files" and written.get(key) != wanted.get(key)]:
        values = (written.get(key), wanted.get(key))
        was, now = (" ".join(map(str, value)) if isinstance(value, list) else value for value in values)
        if key == "images":
            change = "have changed" if was else "were changed, moved or copied"
            differences.append(f"the photos of {path.stem} {change}")
        elif key == "weights":
            differences.append("the weights are those of another model")
        else:
            differences.append(f"{names.get(key, f'--{key}')} was {was} and is now {now}")
    if differences:
        remedy = "use the same weights and options, or another --descriptors_folder"
        raise ValueError(f"{path} does not match: {'; '.join(differences)}; {remedy}")


def _files_digest(paths: Sequence[str]) -> str:
    """Digest of what changes when a file is written, replaced, moved or touched."""
    lines = []
    for path in paths:
        stat = os.stat(path)
        lines.append(f"{os.path.realpath(path)!a} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}")
    return digest(lines)


def _contents_digest(paths: Sequence[str]) -> str:
    """Digest of every byte of the files, in their order."""

    def file_digest(path: str) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_digest, paths)
        return digest(tqdm(digests, total=len(paths), desc="bytes of the photos", unit="image", delay=2))


def warn_of_leftovers(runs: Iterable[Path]) -> None:
    """Warns of descriptors in the folders of runs that were killed or failed: how to go on from them, or remove them.

    Runs of live processes, which lock their folders, are skipped.
    """
    for run in sorted(runs):
        if not [*run.glob("descriptors/*.done"), *run.glob(f"{EXTRACTED}/**/*.done")] or is_held(run):
            continue
        top = run / EXTRACTED if (run / EXTRACTED).is_dir() else run / "descriptors"  # of eval.py, of train.py
        # Counted like `du`: rows that were never written take no space.
        megabytes = sum(path.stat().st_blocks * 512 for path in top.rglob("*") if path.is_file()) / 1e6
        shown = shlex.quote(str(top))
        go_on = f"eval.py goes on from them with its command and --descriptors_folder={shown}; "
        go_on *= top.name == EXTRACTED
        words = "an interrupted run left %.1f MB of descriptors; %sto remove them: rm -r %s"
        logger.warning(words, megabytes, go_on, shown)


def kept_in(descriptors_folder: Path, dataset: str) -> Path:
    """The folder below `--descriptors_folder` with the descriptors of a dataset."""
    return descriptors_folder / dataset.replace(" ", "_")


def digest(lines: Iterable[str]) -> str:
    """A short digest of lines."""
    sha = hashlib.sha256()
    for line in lines:
        sha.update(line.encode() + b"\n")
    return sha.hexdigest()[:16]
