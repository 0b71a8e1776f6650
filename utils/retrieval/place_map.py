"""A map: the descriptors of a database in one file to query later, with paths, positions and how they were made.

The file is NumPy's `.npz`, uncompressed and without pickled objects:

    descriptors     N x D, float32 or float16
    paths           N, bytes, relative to the root that the settings name
    positions       N x 2, float64, NaN where unknown; missing if all are unknown
    settings        JSON: the settings of `write_map`, the root, the version
    pca_mean, pca_components    D', D x D', if a PCA made the descriptors
    pca_deviations              D, if it is whitened
"""

import errno
import json
import logging
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from ..system import distributed
from ..system.files import whole
from . import acceptance
from .search import Chunk, UselessDescriptors, to_unit_norm

logger = logging.getLogger(__name__)

VERSION = 1
TOLD = 100  # characters of an error that are quoted, since it may quote the damaged file itself
READ_TOGETHER = 2**26  # bytes of descriptors that are read at a time, roughly
CANDIDATES = 256  # photos found by codes whose exact distances are compared
FIRST = 8  # of them, which show how many more can be the nearest
SAMPLED = 1024  # descriptors that determine the range of the codes
WITHIN = 0.999  # fraction of their numbers within that range

_PREPARATION = {"resize": "--resize", "antialias": "--antialias", "upright": "turned as EXIF says"}
_MODEL = {
    "backbone": "--backbone",
    "backbone_blocks": "--backbone_blocks",
    "clusters": "--supervlad_clusters",
    "ghost_clusters": "--ghost_clusters",
    "crossimage_encoder": "--crossimage_encoder",
}


class Place(NamedTuple):
    """Where a photo was taken, according to the map.

    Attributes:
        path: path of the nearest photo of the map; relative to the map's root if that is missing.
        position: position of that photo, UTM east and north in metres or, in a `geographic` map, latitude and longitude
            in degrees; None if unknown.
        distance: squared L2 distance of the descriptors.
        accepted: whether it is at most the map's `accept`; None if there is none.
    """

    path: str
    position: tuple[float, float] | None
    distance: float
    accepted: bool | None


class Projection(NamedTuple):
    """A fitted PCA.

    Attributes:
        mean: D'.
        components: D x D'.
        deviations: D, if it is whitened; the caller then scales descriptors to unit norm again.
    """

    mean: NDArray[np.float32]
    components: NDArray[np.float32]
    deviations: NDArray[np.float32] | None = None

    @property
    def whiten(self) -> bool:
        """Whether the PCA is whitened, as in scikit-learn."""
        return self.deviations is not None

    def transform(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Transforms n x D' to n x D."""
        # Computed as in scikit-learn, so that the numbers are those of the evaluation to the last bit.
        projected = rows @ self.components.T
        projected -= self.mean[None] @ self.components.T
        if self.deviations is not None:
            projected /= self.deviations
        return projected.astype(np.float32, copy=False)


def common_root(paths: Sequence[str]) -> str:
    """The deepest folder that contains all the files, as an absolute path; links are not followed."""
    return os.path.commonpath({os.path.dirname(os.path.abspath(path)) for path in paths})


def relative_to(root: str, paths: Sequence[str]) -> list[str]:
    """The paths of files relative to `common_root`."""
    above = len(os.path.join(root, ""))
    return [os.path.abspath(path)[above:] for path in paths]


def require_place_for(path: Path, context: str | None = None) -> None:
    """Checks that `write_map` can write the map, and that single photos can query it.

    Args:
        path: path of the map.
        context: context of the cross-image encoder, if the model has one.

    Raises:
        ValueError: one of these is not so.
    """
    folder = path.absolute().parent
    if path.suffix.lower() != ".npz" or path.is_dir():
        raise ValueError(f"--save_map {path} is not a .npz file; name one, e.g. {path.with_suffix('.npz')}")
    if not folder.is_dir():
        raise ValueError(f"--save_map {path}: there is no folder {folder}; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--save_map {path}: {folder} is not writable; name another folder")
    if context not in (None, "independent"):
        raise ValueError(
            f"--save_map: single photos query a map, but --encoder_context {context} batches the database's photos; "
            "give --encoder_context independent, first if there are more"
        )


def write_map(
    path: Path,
    chunks: Iterable[Chunk],
    *,
    paths: Sequence[str],
    positions: NDArray[np.float64] | None,
    dtype: str = "float32",
    pca: Any = None,
    **settings: Any,
) -> None:
    """Writes a map, with one chunk of descriptors in memory at a time.

    Args:
        path: file to write, completely or not at all.
        chunks: the database in its order, indices and n x D.
        paths: N paths.
        positions: N x 2; None if all are unknown.
        dtype: data type of the descriptors, float32 or float16.
        pca: the scikit-learn PCA that reduced them, if any.
        settings: `model`, arguments of `build_model`; `checkpoint`, its name; `weights`, the digest of its state dict;
            `resize`, `antialias`, `upright`, `precision`; `geographic`; `accept`, a distance or None.

    Raises:
        OSError: it cannot be written.
    """
    root = common_root(paths)
    arrays = {"paths": np.array([os.fsencode(name) for name in relative_to(root, paths)])}
    if positions is not None:
        arrays["positions"] = np.ascontiguousarray(positions, dtype="<f8")
    if pca is not None:
        arrays |= {
            "pca_mean": np.ascontiguousarray(pca.mean_, dtype="<f4"),
            "pca_components": np.ascontiguousarray(pca.components_, dtype="<f4"),
        }
        if pca.whiten:
            arrays["pca_deviations"] = np.ascontiguousarray(np.sqrt(pca.explained_variance_), dtype="<f4")
    written = {
        **settings,
        "place_map": VERSION,
        "arrays": ["descriptors", *arrays],  # so that a missing one is noticed
        "pca_in_columns": pca is not None and bool(pca.components_.flags.f_contiguous),  # affects the last bit
        "root": root,
        "root_from_map": os.path.relpath(os.path.realpath(root), os.path.realpath(path.absolute().parent)),
    }
    arrays = {"settings": np.array(json.dumps(written)), **arrays}
    numbers = np.dtype(dtype).newbyteorder("<")
    with whole(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
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

    Descriptors stay in the file until the first query by `locate` or `nearest`, which reads them into memory.

    Args:
        path: path of the file.
        describe: turns a photo, H x W x 3 bytes (RGB), into its descriptor, D' or K*D numbers, with the map's `model`,
            preparation and a batch of one; only `locate` needs it. `place_map` of hubconf.py returns a map with it.
        accept: squared distance up to which a place is accepted; None uses the map's own, if any.

    Attributes:
        model: arguments of `build_model`.
        resize, antialias, upright: how the photos were prepared, see `datasets.photos.transforms.prepare`.
        precision: precision of the backbone.
        paths: N paths, below `root`, or relative if that is None.
        root: the folder of the photos; None if they are missing.
        positions: N x 2; None if all are unknown.
        geographic: whether these are latitude and longitude.
        accept: as above.
        pca: the PCA of the descriptors, if any.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
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
            settings = _settings(_small(archive, "settings", "U").item())
            names = settings["arrays"]
            self._shape, self._dtype = _described(archive)
            count, dim = self._shape
            self._relative = [os.fsdecode(name) for name in _small(archive, "paths", "S").tolist()]
            found = _small(archive, "positions", "f") if "positions" in names else None
            self.pca: Projection | None = None
            if "pca_mean" in names:
                mean, components = (_small(archive, f"pca_{name}", "f") for name in ("mean", "components"))
                if settings.get("pca_in_columns"):
                    components = np.asfortranarray(components)
                deviations = _small(archive, "pca_deviations", "f") if "pca_deviations" in names else None
                self.pca = Projection(mean, components, deviations)
                scaled = deviations is None or deviations.shape == (dim,)
                if self.pca.components.shape != (dim, *mean.shape) or not scaled:
                    raise ValueError("its PCA does not fit its descriptors")
            if len(self._relative) != count or (found is not None and found.shape != (count, 2)):
                raise ValueError("its numbers of paths, positions and descriptors differ")
            if any(os.path.isabs(name) or ".." in name.split("/") for name in self._relative):
                raise ValueError("its paths leave its root")
        self.positions: NDArray[np.float64] | None = found
        self.model: dict[str, Any] = {"backbone_blocks": None, **settings["model"]}  # None is all of them
        self.resize: tuple[int, int] = (settings["resize"][0], settings["resize"][1])
        self.antialias: bool = settings["antialias"]
        self.upright: bool = settings["upright"]
        self.precision: str = settings["precision"]
        self.geographic: bool = settings["geographic"]
        self.accept: float | None = settings["accept"] if accept is None else accept
        self._weights: str = settings["weights"]
        self._checkpoint: str = settings["checkpoint"]
        self.named_root: str = settings["root"]
        # Relative to the file itself, and to a link to it; links above are followed, since .. leaves them.
        folders = (os.path.dirname(os.path.realpath(self.path)), os.path.realpath(self.path.absolute().parent))
        moved = [os.path.normpath(os.path.join(folder, settings["root_from_map"])) for folder in folders]
        self.root = next((root for root in (*moved, self.named_root) if self._has_photos(root)), None)
        self.paths = [os.path.join(self.root, name) for name in self._relative] if self.root else self._relative
        self._descriptors: NDArray[Any] | None = None
        self._codes: _Codes | None = None

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def descriptor_dim(self) -> int:
        """Dimension of a descriptor."""
        return self._shape[1]

    def __str__(self) -> str:
        positions = "no positions" if self.positions is None else "degrees" if self.geographic else "UTM metres"
        prepared = "{} x {}".format(*self.resize) + ", antialiased" * self.antialias
        prepared += ", turned as EXIF says" * self.upright
        photos = f"in {self.root}" if self.root else f"neither in {self.named_root} nor moved with the map: names only"
        return (
            f"map {self.path}: {len(self)} photos ({prepared}; {photos}), {self.descriptor_dim} numbers each "
            f"({self._dtype.name}), {positions}"
        )

    def _has_photos(self, root: str) -> bool:
        some = {0, len(self) // 2, len(self) - 1}
        return any(os.path.exists(os.path.join(root, self._relative[index])) for index in some)

    def require(self, asked: Mapping[str, Any], source: str) -> None:
        """Checks that a model or a preparation is the map's.

        Args:
            asked: any entries of the map's `model`, and of `resize`, `antialias` and `upright`.
            source: where they come from, e.g. the name of a file.

        Raises:
            ValueError: one differs.
        """
        made = {**self.model, "resize": self.resize, "antialias": self.antialias, "upright": self.upright}
        names = _MODEL | _PREPARATION
        differences = [
            f"{names[name]} {_shown(made[name])}, not {_shown(value)}"
            for name, value in asked.items()
            if (tuple(value) if name == "resize" else value) != made[name]
        ]
        if differences:
            raise ValueError(
                f"{self.path} does not match {source}: it was made with {', '.join(differences)}; query it with what "
                "it was made with, or make another with --save_map"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The options of an evaluation that the map decides: model, preparation of photos, and PCA."""
        model = {_MODEL[name].removeprefix("--"): value for name, value in self.model.items()}
        pca_dim = 0 if self.pca is None else self.descriptor_dim
        return {
            "resize": self.resize,
            "antialias": self.antialias,
            "upright": self.upright,
            "pca_dim": pca_dim,
            **model,
        }

    @contextmanager
    def fitting(self, source: str) -> Iterator[None]:
        """Around loading the weights in `source` into the map's model: a mismatch says what the map was made with."""
        try:
            yield
        except ValueError as error:
            model = " ".join(f"{_MODEL[name]} {value}" for name, value in self.model.items() if value is not None)
            raise ValueError(
                f"{self.path} was made with {self._checkpoint}, a model with {model}, which {source} does not fit; "
                "give the checkpoint that the map was made with, or make a map for this one with --save_map"
            ) from error

    def require_weights(self, weights: str, source: str) -> None:
        """Raises ValueError unless `weights`, the digest of the state dict in `source`, is that of the map's model."""
        if weights != self._weights:
            raise ValueError(
                f"{self.path} was made with the weights of {self._checkpoint}, but {source} has others: descriptors "
                "of two models cannot be compared; give the checkpoint that the map was made with, or make a map for "
                "this one with --save_map"
            )

    def chunks(self, *, shared: bool = False) -> Iterator[Chunk]:
        """All descriptors from the file, in chunks: indices and n x D, float32.

        Args:
            shared: only this process's share of them.

        Raises:
            OSError, ValueError: see the class.
        """
        together = max(1, READ_TOGETHER // (4 * self.descriptor_dim))
        part = distributed.shares(len(self), together)[distributed.rank()] if shared else slice(0, len(self))
        for start, rows in self._rows(part.start, part.stop, together):
            yield np.arange(start, start + len(rows)), rows.astype(np.float32)

    def _rows(self, start: int, stop: int, together: int) -> Iterator[tuple[int, NDArray[Any]]]:
        row_bytes = self.descriptor_dim * self._dtype.itemsize
        with self._reading() as archive, archive.open("descriptors.npy") as member:
            if _header(member, archive.getinfo("descriptors.npy")) != (self._shape, self._dtype):
                raise ValueError("it has changed")
            member.seek(start * row_bytes, os.SEEK_CUR)
            for first in range(start, stop, together):
                count = min(together, stop - first)
                rows = np.frombuffer(_exactly(member, count * row_bytes), self._dtype).reshape(count, -1)
                yield first, rows

    @contextmanager
    def _reading(self) -> Iterator[zipfile.ZipFile]:
        """Around reading the file: any failure becomes one line."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except (GeneratorExit, MemoryError):
            raise
        except Exception as error:  # zip files and NumPy headers can be damaged in many ways
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise OSError(f"{self.path} cannot be read ({error.strerror or error}); check the disk") from error
            told = ascii(" ".join(str(error).split()) or type(error).__name__)[1:-1]
            told = told if len(told) < TOLD else told[:TOLD] + "..."
            raise ValueError(
                f"{self.path} is damaged or not a map of this version ({told}); copy it again, or make it again with "
                "eval.py's --save_map"
            ) from error

    def load(self) -> None:
        """Reads the descriptors into memory, so that the first query takes no longer than others.

        Raises:
            OSError, ValueError: see the class.
        """
        if self._codes is None:
            descriptors = np.empty(self._shape, dtype=self._dtype)
            for start, rows in self._rows(0, len(self), max(1, READ_TOGETHER // (4 * self.descriptor_dim))):
                descriptors[start : start + len(rows)] = rows
            self._codes = _Codes(descriptors)
            self._descriptors = descriptors

    def nearest(self, descriptor: NDArray[np.float32]) -> tuple[int, float]:
        """The index of the nearest photo, and the squared distance, as by exact search.

        Args:
            descriptor: output of the model; a PCA is applied here.

        Raises:
            OSError, ValueError: see the class; or the descriptor has another length, or is not finite.
        """
        self.load()
        assert self._descriptors is not None and self._codes is not None
        query = np.asarray(descriptor, dtype=np.float32).reshape(1, -1)
        expected = self.descriptor_dim if self.pca is None else len(self.pca.mean)
        if query.shape[1] != expected or not np.isfinite(query).all():
            raise ValueError(f"the descriptor must have {expected} finite numbers; this one has {query.shape[1]}")
        if self.pca is not None:
            query = self.pca.transform(query)
            if self.pca.whiten:
                to_unit_norm(query)
        with _one_thread():
            return self._codes.nearest(query, self._descriptors)

    def locate(self, photo: NDArray[np.uint8]) -> Place:
        """Finds where a photo was taken.

        Args:
            photo: H x W x 3 bytes in RGB order (OpenCV reads BGR: use photo[..., ::-1]), upright.

        Raises:
            ValueError: it is not such an array; or see `nearest`.
        """
        if self.describe is None:
            raise ValueError("this map has no model to describe a photo with; load it with place_map of hubconf.py")
        if not isinstance(photo, np.ndarray) or photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
            told = f"{photo.dtype} of shape {photo.shape}" if isinstance(photo, np.ndarray) else type(photo).__name__
            raise ValueError(f"a photo must be a NumPy array H x W x 3 of uint8 in RGB order, not {told}")
        if not photo.size:
            raise ValueError(f"a photo of shape {photo.shape} has no pixels")
        index, distance = self.nearest(self.describe(np.ascontiguousarray(photo)))
        position = None
        if self.positions is not None and np.isfinite(self.positions[index]).all():
            position = (float(self.positions[index, 0]), float(self.positions[index, 1]))
        accepted = None if self.accept is None else bool(acceptance.accepted(np.array([distance]), self.accept)[0])
        return Place(self.paths[index], position, distance, accepted)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within the block, FAISS uses one core: more do not help with one query, and if cores are busy, waiting for a
    second one takes longer than the search."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


class _Codes:
    """A byte for each number of the descriptors; these rule out all but a few as the nearest to a query.

    Comparing bytes takes a quarter of the time of comparing floats. Values beyond the range of a byte are clipped: that
    can bring descriptors closer together but never move them apart; rounding can do both.

    Args:
        descriptors: N x D.

    Raises:
        UselessDescriptors: one is not finite.
    """

    def __init__(self, descriptors: NDArray[Any]):
        sample = descriptors[:: -(-len(descriptors) // SAMPLED)].astype(np.float32)
        _require_finite(sample)
        self._mean = sample.mean(axis=0)  # subtracting it keeps distances and makes numbers smaller
        self._step = max(float(np.quantile(np.abs(sample - self._mean), WITHIN)), 1e-12) / 127
        self._index = faiss.IndexScalarQuantizer(descriptors.shape[1], faiss.ScalarQuantizer.QT_8bit_direct)
        self._index.is_trained = True
        for start in range(0, len(descriptors), CANDIDATES):
            rows = descriptors[start : start + CANDIDATES].astype(np.float32)
            _require_finite(rows)
            self._index.add(self._encode(rows))

    def _encode(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Codes from 0 to 255, n x D."""
        return np.clip(np.rint((rows - self._mean) / self._step), -128, 127) + 128

    def nearest(self, query: NDArray[np.float32], descriptors: NDArray[Any]) -> tuple[int, float]:
        """Row and squared distance of the nearest descriptor; of equal ones, the first.

        Args:
            query: 1 x D.
            descriptors: the descriptors that were encoded.
        """
        code = self._encode(query)
        near, found = (of[0] for of in self._index.search(code, min(CANDIDATES, self._index.ntotal)))
        distance, row = _nearest_of(query, descriptors, np.sort(found[:FIRST]))
        # What rounding can add to the squared distance of the nearest one: twice the product of the difference and the
        # errors, of at most a step each, whose sum exceeds 8 steps once in 10^13 (Hoeffding), and their squares.
        reach = (distance + 16 * self._step * math.sqrt(distance)) / self._step**2 + query.shape[1]
        possible = found[near <= reach]
        if len(possible) == len(found) < self._index.ntotal:  # there may be more
            _, _, possible = self._index.range_search(code, reach)
        if len(possible) > FIRST:
            distance, row = _nearest_of(query, descriptors, np.sort(possible))
        return row, distance


def _require_finite(rows: NDArray[np.float32]) -> None:
    if not np.isfinite(rows).all():
        raise UselessDescriptors("the map's descriptors are not finite; make the map again with another checkpoint")


def _nearest_of(query: NDArray[np.float32], descriptors: NDArray[Any], rows: NDArray[np.int64]) -> tuple[float, int]:
    """The smallest squared distance of a query, 1 x D, to some rows of the descriptors, and the first such row."""
    best = (math.inf, 0)
    for start in range(0, len(rows), CANDIDATES):
        some = rows[start : start + CANDIDATES]
        distances, found = faiss.knn(query, descriptors[some].astype(np.float32, copy=False), 1)
        best = min(best, (float(distances[0, 0]), int(some[found[0, 0]])))
    return best


def _settings(text: str) -> dict[str, Any]:
    """The settings of `write_map`; checks the types of those that are used."""
    settings = json.loads(text)
    if not isinstance(settings, dict) or settings.get("place_map") != VERSION:
        raise ValueError(f"it is not version {VERSION}")
    kinds: dict[str, Any] = {
        "model": dict, "checkpoint": str, "weights": str, "resize": list, "antialias": bool, "upright": bool,
        "precision": str, "geographic": bool, "root": str, "root_from_map": str, "arrays": list,
        "accept": (int, float, type(None)),
    }  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(settings.get(name), kind):
            raise ValueError(f"its {name} is missing or not {kind}")
    model, sides = settings["model"], settings["resize"]
    of_model = {"backbone": str, "clusters": int, "ghost_clusters": int, "crossimage_encoder": bool}
    of_model |= {"backbone_blocks": int} if "backbone_blocks" in model else {}
    if {name: type(value) for name, value in model.items()} != of_model or [*map(type, sides)] != [int, int]:
        raise ValueError("its model or its size is malformed")
    return settings


def _header(member: IO[bytes], info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and data type of an array in the archive, checked against its length before memory is allocated."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    if np.lib.format.read_magic(member) != (1, 0):
        raise ValueError(f"{info.filename} is not an array of version 1.0")
    shape, in_columns, dtype = np.lib.format.read_array_header_1_0(member)
    if in_columns or dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"{info.filename} is not in rows of numbers or bytes")
    if math.prod(shape) * dtype.itemsize != info.file_size - member.tell():
        raise ValueError(f"{info.filename} does not have the length it states")
    return shape, dtype


def _small(archive: zipfile.ZipFile, name: str, kind: str) -> NDArray[Any]:
    """An array of the archive, of the given NumPy kind."""
    with archive.open(f"{name}.npy") as member:
        shape, dtype = _header(member, archive.getinfo(f"{name}.npy"))
        if dtype.kind != kind or not dtype.itemsize:
            raise ValueError(f"{name} holds {dtype}")
        length = math.prod(shape) * dtype.itemsize
        return np.frombuffer(_exactly(member, length), dtype).reshape(shape)


def _described(archive: zipfile.ZipFile) -> tuple[tuple[int, int], np.dtype[Any]]:
    with archive.open("descriptors.npy") as member:
        shape, dtype = _header(member, archive.getinfo("descriptors.npy"))
    if len(shape) != 2 or min(shape) < 1 or dtype.str not in ("<f4", "<f2"):
        raise ValueError(f"its descriptors are {dtype} of shape {shape}")
    return (shape[0], shape[1]), dtype


def _exactly(member: IO[bytes], length: int) -> bytes:
    data = member.read(length)  # the checksum is checked at the end of the member
    if len(data) != length:
        raise EOFError("it is truncated")
    return data


def _shown(value: Any) -> str:
    if value is None:  # all blocks
        return "all"
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
