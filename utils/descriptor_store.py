"""Descriptors on disk: written in any order by several processes, read in chunks, and never computed twice."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from . import distributed


class DescriptorStore:
    """One row of numbers for each of N images, in `<name>.npy`, beside `<name>.done`, a byte for each: is it there?

    A row is written before its byte is set, so that a killed process leaves no row that is there by half; what it wrote
    stays (the operating system's memory survives a process, not a power cut). Files are read and written row by row
    rather than mapped: mapped pages would count as this process's memory.

    Args:
        folder: made if missing.
        name: of the files.
        shape: N and the shape of a row.
        dtype: of the numbers on disk, float32 or float16.
        fingerprint: what the rows depend on; None for a store that nobody comes back to, which always starts empty.

    Raises:
        ValueError: the files that are there hold something else; the message names what differs.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        shape: tuple[int, ...],
        *,
        dtype: str = "float32",
        fingerprint: Mapping[str, Any] | None = None,
    ):
        self.path = folder / f"{name}.npy"
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._row = int(np.prod(shape[1:])) * self.dtype.itemsize  # in bytes
        content = {"shape": list(shape), "dtype": dtype, **(fingerprint or {})}
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            record = self.path.with_suffix(".json")
            if fingerprint is not None and record.exists():
                _require_same(json.loads(record.read_text()), content, self.path)
            else:
                np.lib.format.open_memmap(self.path, mode="w+", dtype=self.dtype, shape=shape)
                self._done_path.write_bytes(bytes(len(self)))
                record.write_text(json.dumps(content, indent=2) + "\n")  # last: without it all is begun anew
        distributed.barrier()
        with open(self.path, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def _done_path(self) -> Path:
        return self.path.with_suffix(".done")

    def missing(self) -> NDArray[np.int64]:
        """Indices of the rows that are not there yet."""
        return np.flatnonzero(np.fromfile(self._done_path, dtype=np.uint8) == 0)

    def write(self, indices: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        """Writes rows, the ones at `indices`."""
        with open(self.path, "r+b", buffering=0) as file:
            for index, row in zip(indices, rows.astype(self.dtype), strict=True):
                file.seek(self._start + int(index) * self._row)
                if file.write(row.tobytes()) != self._row:
                    raise OSError(f"{self.path} could not be written whole; free space and start again")
        with open(self._done_path, "r+b", buffering=0) as file:
            for index in indices:
                file.seek(int(index))
                file.write(b"\1")

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Reads the rows at `indices`, as float32."""
        rows = np.empty((len(indices), *self.shape[1:]), dtype=self.dtype)
        # One read for each run of neighbours: in file order that is one in all.
        runs = np.flatnonzero(np.diff(indices, prepend=-2) != 1)
        with open(self.path, "rb", buffering=0) as file:
            for start, end in zip(runs, [*runs[1:], len(indices)], strict=True):
                file.seek(self._start + int(indices[start]) * self._row)
                wanted = rows[start:end].view(np.uint8).reshape(-1)
                if file.readinto(wanted) != len(wanted):  # type: ignore[arg-type]
                    raise OSError(f"{self.path} is cut short; remove it and start again")
        return rows.astype(np.float32, copy=False)


def _require_same(written: dict[str, Any], asked: dict[str, Any], path: Path) -> None:
    keys = [key for key in asked | written if written.get(key) != asked.get(key)]
    if "images" in keys or "weights" in keys:
        keys = [key for key in keys if key != "shape"]  # which follows from them
    if keys:
        differences = [_in_words(key, written.get(key), asked.get(key), path) for key in keys]
        raise ValueError(
            f"{path} was made otherwise: {'; '.join(differences)}; "
            "give the same weights and options, or another --descriptors_folder"
        )


def _in_words(key: str, was: Any, now: Any, path: Path) -> str:
    """How a store differs from what is wanted; nobody can read the digest of a thousand photos."""
    photos = {"queries": "query", "pca": "PCA"}.get(path.stem, path.stem) + " photos"
    if key == "images":
        return f"the {photos} have changed"
    if key == "weights":
        return "the weights are another model's"
    if key == "upright":
        return f"the {photos} were {'' if was else 'not '}turned as EXIF says and are {'' if now else 'not '}now"
    name = {"dtype": "--descriptor_dtype", "shape": "the shape"}.get(key, f"--{key}")
    shown = [" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in (was, now)]
    return f"{name} was {shown[0]} and is {shown[1]} now"


def digest(content: Iterable[str] | Mapping[str, Tensor]) -> str:
    """A short digest of some lines, or of a state dict."""
    found = hashlib.sha256()
    if isinstance(content, Mapping):
        for name, value in content.items():
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
    else:
        for line in content:
            found.update(line.encode() + b"\n")
    return found.hexdigest()[:16]
