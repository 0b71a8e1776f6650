"""A map: the descriptors of a database in one file to query later, with paths, positions and how they were made.

The file is NumPy's `.npz`, uncompressed and without pickled objects:

    descriptors     N x D, float32 or float16
    paths           N, bytes, relative to the root that the settings name
    sizes           N, int64, of the photos in bytes, -1 where missing; a map of version 1.0.0 has none
    positions       N x 2, float64, NaN where unknown; missing if all are unknown
    settings        JSON: the settings of `write_map`, the root, the version
    pca_mean, pca_components    D', D x D', if a PCA made the descriptors
    pca_deviations              D, if it is whitened
"""

import errno
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from ..system.files import atomic_write, common_root, relative_to
from . import first_matches
from .projection import Projection
from .search import Chunk, cores, require_finite

logger = logging.getLogger(__name__)

VERSION = 1
READ_TOGETHER = 2**26  # bytes of descriptors that are read at a time, roughly

REMEDY = "give the checkpoint that the map was made with, or make a map for this one with save_map"
MODEL = ("backbone", "backbone_blocks", "clusters", "ghost_clusters", "crossimage_encoder")


class Place(NamedTuple):
    """Where a photo was taken, according to the nearest photo of the map."""

    path: str  # of that photo; relative to the map's root if that is missing
    position: tuple[float, float] | None  # UTM metres or, in a `geographic` map, degrees; None if unknown
    distance: float  # of the descriptors, squared L2
    accepted: bool | None  # whether that is at most the map's `accept`; None if there is none


def require_place_for(path: Path, context: str | None = None) -> None:
    """Raises ValueError unless a map can be written, and describes its photos one by one, as queries are.

    `context` is that of the cross-image encoder, if the model has one.
    """
    folder = path.absolute().parent
    if path.suffix.lower() != ".npz" or path.is_dir():
        raise ValueError(f"save_map {path} is not a .npz file; name one, e.g. {path.with_suffix('.npz')}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"save_map {path}: {folder} is no folder to write to; create it first, or name another")
    if context not in (None, "independent"):
        problem = f"save_map: single photos query a map, but encoder_context {context} batches the database's"
        raise ValueError(f"{problem}; give encoder_context independent, first if there are more")


def write_map(
    path: Path,
    chunks: Iterable[Chunk],
    *,
    paths: Sequence[str],
    positions: NDArray[np.float64] | None,
    dtype: str = "float32",
    pca: Projection | None = None,
    **settings: Any,
) -> None:
    """Writes a map, completely or not at all, with one chunk of descriptors in memory at a time.

    Args:
        path: file to write.
        chunks: the database in its order, indices and n x D.
        paths: N paths.
        positions: N x 2; None if all are unknown.
        dtype: data type of the descriptors, float32 or float16.
        pca: what reduced them, if anything did.
        settings: `model`, arguments of `build_model`; `checkpoint`, its name; `weights`, the digest of its state dict;
            `resize`, `antialias`, `upright`, `precision`; `geographic`; `accept`, a distance or None.
    """
    root = common_root(paths)
    arrays = {"paths": np.array([os.fsencode(name) for name in relative_to(root, paths)])}
    arrays["sizes"] = np.array(list(map(_size, paths)), dtype="<i8")
    if positions is not None:
        arrays["positions"] = np.ascontiguousarray(positions, dtype="<f8")
    if pca is not None:
        stored = {"mean": pca.mean, "components": pca.components, "deviations": pca.deviations}
        arrays |= {f"pca_{name}": np.ascontiguousarray(a, dtype="<f4") for name, a in stored.items() if a is not None}
    written = {
        **settings,
        "place_map": VERSION,
        "arrays": ["descriptors", *arrays],  # so that a missing one is noticed
        "pca_in_columns": pca is not None and bool(pca.components.flags.f_contiguous),  # affects the last bit
        "root": root,
        "root_from_map": os.path.relpath(os.path.realpath(root), os.path.realpath(path.absolute().parent)),
    }
    arrays = {"settings": np.array(json.dumps(written)), **arrays}
    numbers = np.dtype(dtype).newbyteorder("<")
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
        with archive.open("descriptors.npy", "w", force_zip64=True) as member:
            end = 0
            for indices, rows in chunks:
                if not end:
                    header = {"descr": numbers.str, "fortran_order": False, "shape": (len(paths), rows.shape[1])}
                    np.lib.format.write_array_header_1_0(member, header)
                assert indices[0] == end and len(rows) == len(indices)
                end = indices[-1] + 1
                member.write(np.ascontiguousarray(rows, dtype=numbers).data.cast("B"))
            assert end == len(paths)
    size = path.stat().st_size / 1e6
    logger.info("map of %d photos, %.3g MB, paths relative to %s: %s", len(paths), size, root, path)


class PlaceMap:
    """A map that `write_map` wrote, to query where a photo was taken.

    Descriptors stay in the file until the first query by `locate`, which reads them into memory.

    Args:
        path: path of the file.
        describe: turns a photo, H x W x 3 bytes (RGB), into its descriptor, D' or K*D numbers, with the map's `model`,
            preparation and a batch of one; only `locate` needs it. `place_map` of hubconf.py returns a map with it.
        accept: squared distance up to which a place is accepted; None uses the map's own, if any.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is damaged or not a map; or `accept` is not a distance.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        describe: Callable[[NDArray[np.uint8]], NDArray[np.float32]] | None = None,
        accept: float | None = None,
    ):
        self.path = Path(path)
        self.describe = describe
        if accept is not None and not accept >= 0:
            raise ValueError(f"accept {accept} is not a squared distance; use 0 or above")
        if not self.path.is_file():
            raise FileNotFoundError(f"no map at {path}; check the path, or make one with eval.py's --save_map")
        with self._reading() as archive:
            settings = json.loads(archive["settings"].item())
            if settings["place_map"] != VERSION:
                raise ValueError(f"it is version {settings['place_map']}, not {VERSION}")
            if unknown := sorted(settings["model"].keys() - {*MODEL}):
                raise ValueError(f"this version knows no model with {', '.join(unknown)}")
            arrays = {name: archive[name] for name in settings["arrays"] if name != "descriptors"}
            with archive.zip.open("descriptors.npy") as member:
                self._shape, self._dtype = _header(member)
            if any(len(arrays[name]) != len(self) for name in ("paths", "sizes", "positions") if name in arrays):
                raise ValueError("its numbers of paths, sizes, positions and descriptors differ")
            sizes = arrays.get("sizes", np.full(len(self), -1))
            names = [os.fsdecode(name) for name in arrays["paths"].tolist()]
            if any(os.path.isabs(name) or ".." in name.split("/") for name in names):
                raise ValueError("its paths leave its root")
            self.positions: NDArray[np.float64] | None = arrays.get("positions")  # N x 2
            self.pca: Projection | None = None
            if "pca_mean" in arrays:
                in_order = np.asfortranarray if settings["pca_in_columns"] else np.ascontiguousarray
                components = in_order(arrays["pca_components"])
                self.pca = Projection(arrays["pca_mean"], components, arrays.get("pca_deviations"))
            # Arguments of `build_model`; None is all blocks.
            self.model: dict[str, Any] = {"backbone_blocks": None, **settings["model"]}
            self.resize: tuple[int, int] = tuple(settings["resize"])
            self.antialias: bool = settings["antialias"]
            self.upright: bool = settings["upright"]
            self.precision: str = settings["precision"]  # of the backbone
            self.geographic: bool = settings["geographic"]  # positions are latitude and longitude in degrees
            self.accept: float | None = settings["accept"] if accept is None else accept
            self._weights: str = settings["weights"]
            self._checkpoint: str = settings["checkpoint"]
            self.named_root: str = settings["root"]
            # Relative to the file itself; links are followed, since .. leaves them.
            folder = os.path.dirname(os.path.realpath(self.path))
            moved = os.path.normpath(os.path.join(folder, settings["root_from_map"]))
        # The folder of the photos, None if they are missing; N paths below it, and names where they are not there.
        self.root, self.paths, others = _find_photos((moved, self.named_root), names, sizes)
        self.photos_there = self.root is not None and not len(others)
        if len(others):
            facts = len(others), len(self), self.root, self.path, names[others[0]]
            logger.warning("%d of %d photos in %s are not those of %s (another size), e.g. %s: only named", *facts)
        self._descriptors: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def descriptor_dim(self) -> int:
        return self._shape[1]

    def __str__(self) -> str:
        positions = "no positions" if self.positions is None else "degrees" if self.geographic else "UTM metres"
        prepared = "{} x {}".format(*self.resize) + ", antialiased" * self.antialias
        prepared += ", turned as EXIF says" * self.upright
        photos = f"in {self.root}" if self.root else f"neither in {self.named_root} nor moved with the map: names only"
        descriptors = f"{self.descriptor_dim}-dimensional descriptors ({self._dtype.name})"
        return f"map {self.path}: {len(self)} photos ({prepared}; {photos}), {descriptors}, {positions}"

    def require(self, wanted: Mapping[str, Any], source: str) -> None:
        """Raises ValueError unless any entries of a `model`, and `resize`, `antialias` and `upright`, are the map's.

        `source` is where they come from, e.g. the name of a file.
        """
        made = {**self.model, "resize": self.resize, "antialias": self.antialias, "upright": self.upright}
        differences = [
            f"{name} {_shown(made[name])}, not {_shown(value)}"
            for name, value in wanted.items()
            if (tuple(value) if name == "resize" else value) != made[name]
        ]
        if differences:
            problem = f"{self.path} does not match {source}: it was made with {', '.join(differences)}"
            raise ValueError(f"{problem}; query it with that, or make another with save_map")

    @contextmanager
    def fitting(self, source: str) -> Iterator[None]:
        """Around loading the weights in `source` into the map's model: a mismatch says what the map was made with."""
        try:
            yield
        except ValueError as error:
            model = ", ".join(f"{name} {value}" for name, value in self.model.items() if value is not None)
            problem = f"{self.path} was made with {self._checkpoint}, a model with {model}"
            raise ValueError(f"{problem}, which {source} does not fit; {REMEDY}") from error

    def require_weights(self, weights: str, source: str) -> None:
        """Raises ValueError unless `weights`, the digest of the state dict in `source`, is that of the map's model."""
        if weights != self._weights:
            problem = f"{self.path} was made with the weights of {self._checkpoint}, but {source} has others"
            raise ValueError(f"{problem}; {REMEDY}")

    def chunks(self) -> Iterator[Chunk]:
        """All descriptors from the file, in chunks: indices and n x D, float32."""
        together = max(1, READ_TOGETHER // (4 * self.descriptor_dim))
        with self._reading() as archive, archive.zip.open("descriptors.npy") as member:
            if _header(member) != (self._shape, self._dtype):
                raise ValueError("it has changed")
            for start in range(0, len(self), together):
                count = min(together, len(self) - start)
                data = member.read(count * self.descriptor_dim * self._dtype.itemsize)  # checks the sum at the end
                rows = np.frombuffer(data, self._dtype).reshape(count, self.descriptor_dim).astype(np.float32)
                yield np.arange(start, start + count), rows

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        """Around reading the file, an `np.lib.npyio.NpzFile`: any failure becomes one line."""
        try:
            with np.load(self.path) as archive:
                yield archive
        except Exception as error:  # zip files and NumPy headers can be damaged in many ways
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # as a damaged offset gives
                raise OSError(f"{self.path} cannot be read ({error.strerror}); check the disk") from error
            message = ascii(f"{type(error).__name__}: {error}")[1:-1][:100]  # it may quote the damaged file itself
            problem = f"{self.path} is damaged or not a map of this version ({message})"
            raise ValueError(f"{problem}; copy it again, or make it again with eval.py's --save_map") from error

    def load(self) -> NDArray[np.float32]:
        """Reads the descriptors, N x D, into memory once, so that the first query takes no longer than others."""
        if self._descriptors is None:
            descriptors = np.empty(self._shape, dtype=np.float32)
            for indices, rows in self.chunks():
                require_finite(rows)
                descriptors[indices] = rows
            self._descriptors = descriptors
        return self._descriptors

    def locate(self, photo: NDArray[np.uint8]) -> Place:
        """Finds where an upright photo was taken, by exact search.

        Args:
            photo: H x W x 3 bytes in RGB order (of OpenCV's BGR photo[..., ::-1]).

        Raises:
            OSError, ValueError: see the class; or there is no `describe`, or `photo` is none, or its descriptor has
                another length or is not finite.
        """
        if self.describe is None:
            raise ValueError("this map has no model to describe a photo with; load it with place_map of hubconf.py")
        given = f"{photo.dtype} of shape {photo.shape}" if isinstance(photo, np.ndarray) else type(photo).__name__
        if not given.startswith("uint8") or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
            raise ValueError(f"a photo must be a NumPy array H x W x 3 of uint8 in RGB order, not {given}")
        descriptors = self.load()
        query = np.asarray(self.describe(np.ascontiguousarray(photo)), dtype=np.float32).reshape(1, -1)
        expected = self.descriptor_dim if self.pca is None else len(self.pca.mean)
        if query.shape[1] != expected or not np.isfinite(query).all():
            raise ValueError(f"the descriptor must have {expected} finite numbers; this one has {query.shape[1]}")
        if self.pca is not None:
            query = self.pca.transform(query)
        with cores(1):  # waiting for a second busy core takes longer than the search
            distances, rows = faiss.knn(query, descriptors, 1)
        index, distance = int(rows[0, 0]), float(distances[0, 0])
        position = None
        if self.positions is not None and np.isfinite(self.positions[index]).all():
            position = (float(self.positions[index, 0]), float(self.positions[index, 1]))
        accepted = None if self.accept is None else bool(first_matches.accepted(distances, self.accept))
        return Place(self.paths[index], position, distance, accepted)


def _header(member: IO[bytes]) -> tuple[tuple[int, int], np.dtype[Any]]:
    """Shape and data type of the descriptors, whose rows follow in the stream."""
    np.lib.format.read_magic(member)
    shape, in_columns, dtype = np.lib.format.read_array_header_1_0(member)
    if len(shape) != 2 or in_columns or dtype.str not in ("<f4", "<f2"):
        raise ValueError(f"its descriptors are {dtype} of shape {shape}")
    return (shape[0], shape[1]), dtype


def _size(path: str) -> int:
    """Size of a file in bytes; -1 if it is missing."""
    return os.path.getsize(path) if os.path.exists(path) else -1


def _find_photos(
    roots: Sequence[str], names: list[str], sizes: NDArray[np.int64]
) -> tuple[str | None, list[str], NDArray[np.int64]]:
    """Finds the photos of a map in the folder that has most of them, of equal ones the first.

    Returns that folder, None if no photo is in any; N paths; and the indices of those where it has another file, which
    are names only.
    """
    there = {root: np.array([_size(os.path.join(root, name)) for name in names]) for root in roots}
    fits = {root: (here >= 0) & ((sizes < 0) | (here == sizes)) for root, here in there.items()}
    root = max(roots, key=lambda root: fits[root].sum())
    if not fits[root].any():
        return None, names, np.empty(0, dtype=np.int64)
    others = np.flatnonzero((there[root] >= 0) & ~fits[root])
    paths = [os.path.join(root, name) for name in names]
    for index in others:
        paths[index] = names[index]
    return root, paths, others


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else "all" if value is None else str(value)
