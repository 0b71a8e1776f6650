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
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..system import distributed
from ..system.files import whole
from ..system.lock import is_held

logger = logging.getLogger(__name__)

CHECKED_BYTES = 2**26  # of a store in memory at a time while it is checked


class RowFile:
    """An array in a `.npy` file, written and read some rows at a time.

    By plain reads and writes: the pages of a memory map would count as this process's memory, and a full disk would
    kill the process without a message.

    Args:
        path: path of the file, existing or `create`d.
        shape: N and the shape of a row.
        dtype: data type on disk.
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
            file.truncate(file.tell() + self.shape[0] * self.row_bytes)

    def open(self) -> None:
        """Reads where the rows begin.

        Raises:
            ValueError: the file is not an array of this shape and data type, or not of its full length.
            OSError: it cannot be read.
        """
        with open(self.path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        expected, found = self._start + self.shape[0] * self.row_bytes, self.path.stat().st_size
        if (shape, dtype) != (self.shape, self.dtype) or found != expected:
            raise ValueError(f"{self.path.name} has {found} bytes, not {expected}, or another shape")

    def write(self, indices: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Writes the rows at `indices`, each with the shape of a row.

        Raises:
            OSError: they could not be fully written.
        """
        with open(self.path, "r+b", buffering=0) as file:
            for run, first in self._runs(indices):
                file.seek(first)
                data = np.ascontiguousarray(rows[run], dtype=self.dtype).view(np.uint8).reshape(-1).data
                while data:  # one call writes at most 2 GB
                    data = data[file.write(data) :]

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Reads the rows at `indices`.

        Raises:
            OSError: the file ends before them.
        """
        rows = np.empty((len(indices), *self.shape[1:]), dtype=self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            for run, first in self._runs(indices):
                file.seek(first)
                wanted = rows[run].view(np.uint8).reshape(-1).data
                while wanted:
                    count = file.readinto(wanted)
                    if not count:
                        raise OSError(f"{self.path} is cut short; remove it and start again")
                    wanted = wanted[count:]
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
        fingerprint: what the rows depend on; None for a temporary store, which always starts empty.
        photos: N files that the rows depend on too, by content, not by path.

    Raises:
        ValueError: the existing files hold something else; the message names what differs.
        OSError: they cannot be read or written.
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
    ):
        self.path = folder / f"{name}.npy"
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._rows = RowFile(self.path, shape, self.dtype)
        self._kept = fingerprint is not None
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            content = {"shape": list(shape), "dtype": dtype, **(fingerprint or {})}
            if photos:
                content |= {"files": _files_digest(photos), "images": None}
            if not self._goes_on(content, photos):
                try:
                    self._begin(content, photos)
                except OSError as error:
                    self.remove()
                    raise self._unwritten(error) from error
        distributed.barrier()
        self._rows.open()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def _done_path(self) -> Path:
        return self.path.with_suffix(".done")

    @property
    def _record_path(self) -> Path:
        return self.path.with_suffix(".json")

    def _begin(self, content: dict[str, Any], photos: Sequence[str]) -> None:
        if photos and content["images"] is None:
            content["images"] = _contents_digest(photos)
        # In this order, so that a half-made store can be told from other files.
        self._done_path.write_bytes(bytes(len(self)))
        self._rows.create()
        self._write_record(content)

    def _write_record(self, content: dict[str, Any]) -> None:
        with whole(self._record_path) as path:
            path.write_text(json.dumps(content, indent=2) + "\n")

    def _goes_on(self, content: dict[str, Any], photos: Sequence[str]) -> bool:
        """Whether the files exist, are intact and match."""
        if not self._kept:
            return False
        here = [path for path in (self.path, self._done_path, self._record_path) if path.exists()]
        if not here:
            return False
        if here == [self.path]:
            raise ValueError(
                f"{self.path} was not made by --descriptors_folder: there is no {self._record_path.name} beside it; "
                "move it away, or name another --descriptors_folder"
            )
        try:
            written = json.loads(self._record_path.read_text())
            if not isinstance(written, dict):
                raise ValueError("no record")
        except (ValueError, FileNotFoundError, RecursionError):
            return self._begun_anew(f"{self._record_path.name} is missing or damaged")
        if photos and "files" in written:
            same_files = written["files"] == content["files"]
            content["images"] = (same_files and written.get("images")) or _contents_digest(photos)
        _require_same(written, content, self.path)
        try:
            self._rows.open()
            count = self._done_path.stat().st_size
        except (ValueError, EOFError, FileNotFoundError) as error:
            return self._begun_anew(f"{self.path.name} or {self._done_path.name} is missing or damaged ({error})")
        if count != len(self):
            return self._begun_anew(f"{self._done_path.name} has {count} bytes for {len(self)} images")
        if written != content:  # the same photos, copied or touched
            self._write_record(content)
        self._forget_zeros()
        return True

    def _begun_anew(self, why: str) -> bool:
        logger.warning("%s in %s, so these descriptors are computed again", why, self.path.parent)
        return False

    def missing(self) -> NDArray[np.int64]:
        """Indices of the rows that are not written yet."""
        return np.flatnonzero(np.fromfile(self._done_path, dtype=np.uint8) == 0)

    def _forget_zeros(self) -> None:
        """Clears the bytes of zero rows: no image has one, but a power cut leaves them for rows not yet on the disk."""
        there = np.flatnonzero(np.fromfile(self._done_path, dtype=np.uint8))
        lost = []
        for some in np.array_split(there, -(-len(there) * self._rows.row_bytes // CHECKED_BYTES) or 1):
            if len(some):
                lost += some[~self._rows.read(some).reshape(len(some), -1).any(axis=1)].tolist()
        if lost:
            logger.warning("%d rows of %s are zeros, as after a power cut: computed again", len(lost), self.path)
            self._mark(lost, b"\0")

    def write(self, indices: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        """Writes the rows at `indices`.

        Raises:
            OSError: they could not be written, mostly for lack of space; they count as missing.
        """
        try:
            self._rows.write(indices, rows)
            self._mark(indices, b"\1")
        except OSError as error:
            raise self._unwritten(error) from error

    def _mark(self, indices: Iterable[int], byte: bytes) -> None:
        """Sets the bytes of rows: whether they are written."""
        with open(self._done_path, "r+b", buffering=0) as file:
            for index in indices:
                file.seek(int(index))
                file.write(byte)

    def _unwritten(self, error: OSError) -> OSError:
        then = "run the same command again to resume from here" if self._kept else "start again"
        return OSError(f"cannot write {self.path} ({error.strerror or error}); free space there and {then}")

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Reads the rows at `indices`, as float32."""
        return self._rows.read(indices).astype(np.float32, copy=False)

    def keep(self, folder: Path, fingerprint: Mapping[str, Any], photos: Sequence[str]) -> None:
        """Moves a temporary store into a folder on the same disk, as a store from which a run can resume.

        Args:
            folder: created if missing.
            fingerprint: what the rows depend on.
            photos: N files that they depend on too.

        Raises:
            ValueError: a photo has changed since this store was created.
            OSError: the files cannot be read, written or moved.
        """
        begun = self._record_path.stat().st_mtime
        changed = next((path for path in photos if os.stat(path).st_ctime > begun), None)
        if changed is not None:
            raise ValueError(f"{changed} has changed since")
        content = {"shape": list(self.shape), "dtype": self.dtype.name, **fingerprint}
        content |= {"files": _files_digest(photos), "images": _contents_digest(photos)}
        folder.mkdir(parents=True, exist_ok=True)
        self._write_record(content)
        for path in (self._done_path, self.path, self._record_path):
            path.replace(folder / path.name)

    def remove(self) -> None:
        """Removes the store's own files, and its folder if it is then empty."""
        with suppress(OSError):
            for path in (self._record_path, self._done_path, self.path):
                path.unlink(missing_ok=True)
            self.path.parent.rmdir()


def _require_same(written: dict[str, Any], asked: dict[str, Any], path: Path) -> None:
    if "files" in asked and "files" not in written:
        raise ValueError(
            f"{path} was made by an earlier version, which did not compare the photos; remove {path.parent}, or name "
            "another --descriptors_folder"
        )
    keys = [key for key in asked | written if key != "files" and written.get(key) != asked.get(key)]
    if {"images", "weights"} & set(keys):
        keys = [key for key in keys if key != "shape"]  # it follows from them
    if keys:
        differences = [_in_words(key, written.get(key), asked.get(key), path) for key in keys]
        raise ValueError(
            f"{path} does not match: {'; '.join(differences)}; "
            "use the same weights and options, or another --descriptors_folder"
        )


def _in_words(key: str, was: Any, now: Any, path: Path) -> str:
    """How a store differs from what is wanted; the digest of a thousand photos would tell a reader nothing."""
    photos = {"queries": "query", "pca": "PCA"}.get(path.stem, path.stem) + " photos"
    if key == "images":
        return f"the {photos} have changed"
    if key == "weights":
        return "the weights are those of another model"
    if key == "upright":
        return f"the {photos} were {'' if was else 'not '}turned as EXIF says and are {'' if now else 'not '}now"
    name = {"dtype": "--descriptor_dtype", "shape": "the shape"}.get(key, f"--{key}")
    shown = [" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in (was, now)]
    return f"{name} was {shown[0]} and is now {shown[1]}"


def _files_digest(paths: Sequence[str]) -> str:
    """Digest of what changes when a file is written, replaced, moved or touched."""

    def line(path: str) -> str:
        found = os.stat(path)
        return f"{os.path.realpath(path)!a} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"

    return digest(map(line, paths))


def _contents_digest(paths: Sequence[str]) -> str:
    """Digest of every byte of the files, in their order."""

    def of(path: str) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        found = pool.map(of, paths)
        return digest(tqdm(found, total=len(paths), desc="bytes of the photos", unit="image", delay=2))


def warn_of_leftovers(runs: Iterable[Path]) -> None:
    """Warns of descriptors that killed runs left behind, with their size and the command that removes them.

    Args:
        runs: their folders; those locked by a live process are skipped.
    """
    left = [
        folder
        for run in sorted(runs)
        for folder in sorted(_stores_of(run))
        if any(folder.glob("*.done")) and not is_held(run)
    ]
    if left:
        # Counted like `du`: rows that were never written take no space.
        size = sum(path.stat().st_blocks * 512 for folder in left for path in folder.iterdir())
        logger.warning(
            "interrupted runs left %s of descriptors that are no longer needed; to remove them: rm -r %s",
            f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB",
            " ".join(shlex.quote(str(folder)) for folder in left),
        )


def _stores_of(run: Path) -> Iterator[Path]:
    """The folders of a run's temporary descriptors: `descriptors`, which may not exist, and `extracted` of a dataset.

    Thumbnails are skipped: a page of matches has one of every photo shown.
    """
    yield run / "descriptors"
    for parent, folders, _ in os.walk(run):
        folders[:] = [name for name in folders if name != "thumbnails"]
        if os.path.basename(parent) == "extracted":
            yield Path(parent)


def kept_in(descriptors_folder: Path, dataset: str) -> Path:
    """The folder below `--descriptors_folder` with the descriptors of a dataset."""
    return descriptors_folder / dataset.replace(" ", "_")


def digest(content: Iterable[str] | Mapping[str, Tensor]) -> str:
    """A short digest of lines, or of a state dict."""
    found = hashlib.sha256()
    if isinstance(content, Mapping):
        for name, value in content.items():
            found.update(name.encode())
            found.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    else:
        for line in content:
            found.update(line.encode() + b"\n")
    return found.hexdigest()[:16]
