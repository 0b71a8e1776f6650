"""A place recognition dataset on disk: database and query photos with positions in the file names.

<folder>/images/<split>/{database,queries}/**/@<UTM east>@<UTM north>@...@.jpg
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, compress
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from utils.system import distributed

from ..photos.exif import gps_positions
from ..photos.listing import PHOTO_SUFFIXES, identity, list_images, unreadable
from ..photos.transforms import read_pixels
from .positives import read_positives, read_text

logger = logging.getLogger(__name__)

EARTH_RADIUS = 6_371_009.0  # mean, in metres
PAIRS_TOGETHER = 2**20  # pairs of a query and a positive that are in memory at a time, roughly
LISTED = 20  # photos named in one line of the log, at most; debug.log has all


def utm_positions(paths: Sequence[str]) -> NDArray[np.float64]:
    """UTM east and north of each image from its file name, N x 2, in metres.

    Raises:
        ValueError: names have no coordinates; it says how many.
    """
    positions = named_positions(paths)
    _require_named((paths,), (positions,))
    return positions


def _require_named(sides: Sequence[Sequence[str]], positions: Sequence[NDArray[np.float64]]) -> None:
    """Raises ValueError if a name on any side has no coordinates; it counts all."""
    lost = [path for paths, found in zip(sides, positions, strict=True) for path in compress(paths, ~known(found))]
    if lost:
        some = all(known(found).any() for found in positions)
        raise ValueError(
            f"{len(lost)} of {sum(map(len, sides))} file names have no UTM coordinates, e.g. {lost[0]}; name photos "
            "@<UTM east>@<UTM north>@...@.jpg, or run eval.py with "
            f"{'--labels_where_known to count only the others, ' if some else ''}a --positives_file, or --no_labels to "
            "search without labels"
        )


def named_positions(paths: Sequence[str]) -> NDArray[np.float64]:
    """Like `utm_positions`, but NaN for names without coordinates."""
    positions = np.full((len(paths), 2), np.nan)
    for row, path in enumerate(paths):
        with suppress(ValueError):
            # Only the name: a folder above may contain an @ too.
            _, east, north, *_ = os.path.basename(path).split("@")
            positions[row] = float(east), float(north)
    return positions


def _first_nowhere(positions: NDArray[np.float64]) -> int | None:
    nowhere = np.flatnonzero(~known(positions))
    return int(nowhere[0]) if len(nowhere) else None


def photo_positions(
    database: Sequence[str], queries: Sequence[str], *, exif: bool = True, where_known: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64], bool]:
    """Positions of photos from their names or, if a name has none, of all photos from their EXIF data.

    Args:
        database: paths of N photos.
        queries: paths of Q photos.
        exif: whether to use EXIF data.
        where_known: photos without a position get NaN. Names or EXIF data are used, whichever more photos have.

    Returns:
        Positions of the database photos and the queries, N x 2 and Q x 2; and whether they are latitude and longitude
        in degrees rather than UTM east and north in metres.

    Raises:
        ValueError: a photo has no position of the kind used; with `where_known`, no photo of a side has one.
    """
    named = named_positions(database), named_positions(queries)
    unnamed = [_first_nowhere(positions) for positions in named]
    if unnamed == [None, None]:
        return *named, False
    if not exif and not where_known:
        _require_named((database, queries), named)
    taken = (gps_positions(database), gps_positions(queries)) if exif else named
    if where_known:
        by_name, by_exif = (sum(int(known(positions).sum()) for positions in of) for of in (named, taken))
        if exif and by_name and by_exif:
            logger.warning(
                "%d photos have UTM coordinates in their names and %d a position in their EXIF data; the more common "
                "is used: %s",
                by_name,
                by_exif,
                "EXIF" if by_exif > by_name else "the names",
            )
        found, geographic = (taken, True) if by_exif > by_name else (named, False)
        for what, positions in zip(("database photos", "queries"), found, strict=True):
            if not known(positions).any():
                raise ValueError(
                    f"--labels_where_known: none of the {len(positions)} {what} has a position in its name or EXIF "
                    "data; use --no_labels to search without labels"
                )
        return *found, geographic
    example = queries[unnamed[1]] if unnamed[0] is None and unnamed[1] is not None else database[unnamed[0] or 0]
    for what, paths, positions in (("database", database, taken[0]), ("query", queries, taken[1])):
        nowhere = _first_nowhere(positions)
        if nowhere is not None:
            which = f"{int((~known(positions)).sum())} of {len(paths)} {what} photos have no GPS position"
            some_named = any(known(of).any() for of in named)
            if some_named:
                lost = (
                    f"{which} in their EXIF data, e.g. {paths[nowhere]}, and not all names have UTM coordinates, e.g. "
                    f"{example}"
                )
            else:
                lost = f"{which}: neither EXIF nor the file name gives one, e.g. {paths[nowhere]}"
            some = some_named or all(known(of).any() for of in taken)
            raise ValueError(
                f"{lost}; {'remove such photos, ' if some else ''}name all of them @<UTM east>@<UTM north>@...@.jpg, "
                f"{'count only the others with --labels_where_known, ' if some else ''}or search without positions "
                "with --no_labels"
            )
    return *taken, True


def known(positions: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of N x 2 positions are known, N."""
    return np.asarray(np.isfinite(positions).all(axis=1))


def like_degrees(positions: NDArray[np.float64]) -> bool:
    """Whether N x 2 numbers in metres look like latitude and longitude, in either order.

    That is, 9 of 10 lie within 90 and 180, so that an outlier does not hide the others, and these are not all whole
    numbers: metres on a small map often are, degrees never.
    """
    found = positions[known(positions)]
    for bounds in ((90, 180), (180, 90)):
        within = found[(np.abs(found) <= bounds).all(axis=1)]
        if len(within) and 10 * len(within) >= 9 * len(found) and (within != np.floor(within)).any():
            return True
    return False


def haversine_metres(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances on the mean sphere in metres between latitudes and longitudes in degrees, ... x 2 each."""
    a, b = np.radians(a), np.radians(b)
    squared = np.sin((b - a) / 2) ** 2  # of half the chord, along each axis
    along = squared[..., 0] + np.cos(a[..., 0]) * np.cos(b[..., 0]) * squared[..., 1]
    return 2 * EARTH_RADIUS * np.arcsin(np.sqrt(along.clip(0, 1)))


def image_key(path: str) -> str:
    """The image's own key, e.g. in MSLS: the seventh field of `@east@north@zone@letter@lat@lon@key@...`, or ""."""
    fields = os.path.basename(path).split("@")
    return fields[7] if len(fields) > 8 else ""


def database_folder(split: Path) -> Path:
    """The folder of a split's database images: `database`, or else `gallery`, as in SVOX."""
    folder = split / "database"
    return split / "gallery" if not folder.is_dir() and (split / "gallery").is_dir() else folder


class _Near(Sequence[NDArray[np.int64]]):
    """For each query, the database images within a distance; computed at each access, since dense ones fill the memory.

    Args:
        database: N x 2 positions, NaN where unknown.
        queries: Q x 2, likewise.
        geographic: whether these are latitude and longitude in degrees.
        distance: in metres, inclusive.
    """

    def __init__(
        self, database: NDArray[np.float64], queries: NDArray[np.float64], *, geographic: bool, distance: float
    ):
        self._found_in = np.flatnonzero(known(database))
        placed, self._queries = database[self._found_in], queries
        self._tree: Any = None
        self._radius = distance
        if geographic:
            placed, self._queries = np.radians(placed), np.radians(queries)
            self._radius = distance / EARTH_RADIUS
        if len(placed):
            from sklearn.neighbors import BallTree, KDTree  # takes nearly a second to import

            self._tree = (
                BallTree(placed, leaf_size=30, metric="haversine") if geographic else KDTree(placed, leaf_size=30)
            )

    def __len__(self) -> int:
        return len(self._queries)

    def _of(self, queries: slice) -> Iterator[NDArray[np.int64]]:
        where = self._queries[queries]
        located = known(where)
        rows = iter(())
        if self._tree is not None and located.any():
            rows = iter(self._tree.query_radius(where[located], self._radius))
        for is_located in located:
            yield self._found_in[next(rows)] if is_located and self._tree is not None else self._found_in[:0]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        counts = np.zeros(len(self), dtype=np.int64)
        located = known(self._queries)
        if self._tree is not None and located.any():
            counts[located] = self._tree.query_radius(self._queries[located], self._radius, count_only=True)
        together = np.cumsum(counts) // PAIRS_TOGETHER
        bounds = [0, *(1 + np.flatnonzero(np.diff(together))).tolist(), len(self)]
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            yield from self._of(slice(start, end))

    @overload
    def __getitem__(self, query: int) -> NDArray[np.int64]: ...
    @overload
    def __getitem__(self, query: slice) -> list[NDArray[np.int64]]: ...
    def __getitem__(self, query: int | slice) -> NDArray[np.int64] | list[NDArray[np.int64]]:
        if isinstance(query, slice):
            return [self[index] for index in range(*query.indices(len(self)))]
        index = range(len(self))[query]
        return next(self._of(slice(index, index + 1)))


@dataclass(frozen=True, kw_only=True)
class DatabaseQueries:
    """One split of a dataset.

    Attributes:
        name: name to show.
        database_paths: N images.
        queries_paths: Q images.
        database_positions: N x 2 UTM east and north in metres, NaN where unknown; None if all are unknown.
        queries_positions: Q x 2, likewise.
        geographic: whether positions are latitude and longitude in degrees instead.
        known_positives: for each query, the indices of its correct database images, if a file lists them.
        set_sizes: the number of queries in each of several consecutive sets; empty for one set.
    """

    name: str
    database_paths: list[str]
    queries_paths: list[str]
    database_positions: NDArray[np.float64] | None = None
    queries_positions: NDArray[np.float64] | None = None
    geographic: bool = False
    known_positives: list[NDArray[np.int64]] | None = None
    set_sizes: tuple[int, ...] = ()

    @classmethod
    def from_folder(
        cls,
        datasets_folder: Path,
        name: str,
        split: str,
        *,
        queries_names: Sequence[str] = ("queries",),
        **settings: Any,
    ) -> "DatabaseQueries":
        """Lists `<datasets_folder>/<name>/images/<split>/{database,queries}`, like `from_folders`.

        Args:
            datasets_folder: folder that holds the dataset.
            name: name of the dataset's folder.
            split: train, val or test.
            queries_names: the query folders, each a set of its own.
            settings: arguments of `from_folders`.

        Raises:
            FileNotFoundError: there is no such query set; it names those that exist.
        """
        folder = datasets_folder / name / "images" / split
        database = database_folder(folder)
        lost = [queries for queries in queries_names if not (folder / queries).is_dir()]
        others = sorted(path.name for path in folder.glob("queries*") if path.is_dir())
        if lost and others:
            raise FileNotFoundError(
                f"no folder {folder / lost[0]}; the query sets there are {', '.join(others)}: name them with eval.py's "
                "--queries_names"
            )
        sets = [folder / queries for queries in queries_names]
        return cls.from_folders(database, *sets, name=f"{name} {split}", **settings)

    @classmethod
    def from_folders(
        cls,
        database_folder: Path,
        *queries_folders: Path,
        name: str,
        labelled: bool = True,
        exif: bool = False,
        positives_file: Path | None = None,
        query_keys: Path | None = None,
        labels_where_known: bool = False,
        skip_unreadable: bool = False,
    ) -> "DatabaseQueries":
        """Lists a folder of database images and one or more query folders.

        Args:
            database_folder: its subfolders are listed too.
            queries_folders: likewise; each is a set of its own, see `sets`.
            name: name to show.
            labelled: whether to read positions; without them and a file, no correct images are known.
            exif: whether these are plain folders: photos of all formats, turned as their EXIF data says, with positions
                in names or EXIF data; queries that are also in the database are left out of it.
            positives_file: lists the correct images, see `read_positives`; its indices refer to what the folders hold
                (the queries after `query_keys`), before anything is left out. For one query set only.
            query_keys: a text file; only queries whose `image_key` is in it are kept.
            labels_where_known: photos without a position are searched, but never counted or correct.
            skip_unreadable: leave out photos that cannot be read, which requires reading all of them.

        Raises:
            FileNotFoundError, ValueError: see `list_images`, `utm_positions`, `photo_positions` and `read_positives`;
                or nothing is left.
        """
        suffixes = {"suffixes": PHOTO_SUFFIXES} if exif else {}
        database = list_images(database_folder, **suffixes)
        sets = [list_images(folder, **suffixes) for folder in queries_folders]
        if query_keys is not None:
            sets = [_with_keys(queries, query_keys) for queries in sets]
        queries = list(chain(*sets))
        positives = None
        if positives_file is not None:
            (queries_folder,) = queries_folders
            positives = read_positives(positives_file, database, queries, (database_folder, queries_folder))
        stays, asked = (
            _other_than_queries(database, queries, database_folder, keep=not exif),
            np.ones(len(queries), bool),
        )
        if skip_unreadable:
            stays &= readable(database, database_folder, upright=exif)
            asked &= np.concatenate(
                [readable(of, folder, upright=exif) for of, folder in zip(sets, queries_folders, strict=True)]
            )
        if not stays.any():
            raise ValueError(
                f"every photo in {database_folder} {'that can be read ' if skip_unreadable else ''}is also a query, in "
                f"{', '.join(map(str, queries_folders))}; name a --database_folder that holds more than the queries"
            )
        sizes: tuple[int, ...] = ()
        if len(sets) > 1:
            bounds = np.cumsum([0, *map(len, sets)])
            sizes = tuple(int(asked[a:b].sum()) for a, b in zip(bounds[:-1], bounds[1:], strict=True))
        database, queries = list(compress(database, stays)), list(compress(queries, asked))
        if positives is not None:
            if not (stays.all() and asked.all()):
                number = np.cumsum(stays) - 1  # new index of each database image
                named = list(compress(positives, asked))
                positives = [number[found[stays[found]]] for found in named]
                lost = sum(
                    len(left) < len(found) and not len(left) for left, found in zip(positives, named, strict=True)
                )
                if lost:
                    logger.warning(
                        "%s: for %d of %d queries, all correct photos in %s were left out of the database because they "
                        "are also queries%s; they count as missed",
                        name,
                        lost,
                        len(queries),
                        positives_file,
                        " or unreadable" if skip_unreadable else "",
                    )
            return cls(name=name, database_paths=database, queries_paths=queries, known_positives=positives)
        if not labelled:
            return cls(name=name, database_paths=database, queries_paths=queries, set_sizes=sizes)
        of_database, of_queries, geographic = photo_positions(
            database, queries, exif=exif, where_known=labels_where_known
        )
        dataset = cls(
            name=name,
            database_paths=database,
            queries_paths=queries,
            database_positions=of_database,
            queries_positions=of_queries,
            geographic=geographic,
            set_sizes=sizes,
        )
        dataset._warn_of_positions()
        return dataset

    def sets(self, names: Sequence[str]) -> list["DatabaseQueries"]:
        """Each query set with the shared database; its name follows the dataset's, except for plain `queries`.

        Args:
            names: names of the sets, one for each.

        Raises:
            ValueError: no query of a set has a position, so recall could not be computed.
        """
        if names == ("queries",):
            return [self]
        parts, start = [], 0
        for name, size in zip(names, self.set_sizes or (len(self.queries_paths),), strict=True):
            part = slice(start, start := start + size)
            positions = None if self.queries_positions is None else self.queries_positions[part]
            if positions is not None and not known(positions).any():
                raise ValueError(
                    f"--labels_where_known: none of the {len(positions)} queries in {name} has a position; leave that "
                    "set out of --queries_names, or use --no_labels to search without labels"
                )
            queries = self.queries_paths[part]
            name = f"{self.name} {name}"
            parts.append(replace(self, name=name, queries_paths=queries, queries_positions=positions, set_sizes=()))
        return parts

    def _warn_of_positions(self) -> None:
        assert self.database_positions is not None and self.queries_positions is not None
        sides = {"database images": self.database_positions, "queries": self.queries_positions}
        unknown = [
            f"{count} of {len(positions)} {what}"
            for what, positions in sides.items()
            if (count := int((~known(positions)).sum()))
        ]
        if unknown:
            logger.warning(
                "%s: %s have no position; they are searched and shown, but recall counts only the other queries, and "
                "no image without a position as correct",
                self.name,
                " and ".join(unknown),
            )
        self._warn_of_degrees()

    def _warn_of_degrees(self) -> None:
        sides = {"database images": self.database_positions, "queries": self.queries_positions}
        for what, positions in sides.items():
            if positions is not None and not self.geographic and like_degrees(positions):
                logger.warning(
                    "%s: the positions of the %s look like degrees (nearly all within 90 and 180), but are read as "
                    "metres, so everything is near; write UTM metres into the names, or degrees into EXIF data",
                    self.name,
                    what,
                )

    def __str__(self) -> str:
        counted = int(self.judged_queries.sum()) if self.labelled else len(self.queries_paths)
        of_them = f", {counted} of them with a position" if counted < len(self.queries_paths) else ""
        return f"{self.name} ({len(self.database_paths)} database, {len(self.queries_paths)} queries{of_them})"

    @property
    def sizes(self) -> dict[str, Any]:
        """Name and numbers of images, for `results.json`."""
        sizes = {"name": self.name, "database": len(self.database_paths), "queries": len(self.queries_paths)}
        if self.labelled and not self.judged_queries.all():
            sizes["queries_with_position"] = int(self.judged_queries.sum())
        return sizes

    @property
    def judged_queries(self) -> NDArray[np.bool_]:
        """The queries that recall counts, since their correct images are known: Q."""
        if self.known_positives is not None or self.queries_positions is None:
            return np.full(len(self.queries_paths), self.labelled)
        return known(self.queries_positions)

    def judged(self, predictions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For which predictions it is known if they are correct, Q x k: by both positions, or by a file."""
        judged = np.repeat(self.judged_queries[:, None], predictions.shape[1], axis=1)
        if self.known_positives is None and self.database_positions is not None:
            judged &= known(self.database_positions)[predictions]
        return judged

    @property
    def labelled(self) -> bool:
        """Whether correct images are known."""
        return self.known_positives is not None or self.database_positions is not None

    def covered_images(self, distance: float) -> list[str]:
        """Paths of the database images, and of the queries with one of them within `distance` metres."""
        near = self.positives(distance)
        return self.database_paths + [path for path, found in zip(self.queries_paths, near, strict=True) if len(found)]

    def positives(self, distance: float) -> Sequence[NDArray[np.int64]]:
        """For each query, the indices of its correct database images: those in the file, else those within `distance`
        metres of it (inclusive). The latter are computed at each pass, for some queries at a time."""
        if self.known_positives is not None:
            return self.known_positives
        assert self.database_positions is not None and self.queries_positions is not None
        return _Near(self.database_positions, self.queries_positions, geographic=self.geographic, distance=distance)

    def located(self, *, exif: bool) -> "DatabaseQueries":
        """The same photos with their known positions, for display only: they do not decide what is correct.

        Args:
            exif: whether to use EXIF data; names or EXIF data are used, whichever more photos have.

        Raises:
            ValueError: see `gps_positions`.
        """
        if self.database_positions is not None:
            return self
        sides = self.database_paths, self.queries_paths
        found, geographic = [named_positions(paths) for paths in sides], False
        if exif:
            taken = [gps_positions(paths) for paths in sides]
            by_name, by_exif = (sum(int(known(positions).sum()) for positions in of) for of in (found, taken))
            found, geographic = (taken, True) if by_exif > by_name else (found, False)
        if not known(found[0]).any():
            return self
        located = replace(
            self,
            database_positions=found[0],
            queries_positions=found[1],
            geographic=geographic,
            known_positives=None,
        )
        located._warn_of_degrees()
        return located

    def metres(self, predictions: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """Distance of each query to its predicted database images, Q x k, NaN where a position is unknown; None without
        positions."""
        if self.database_positions is None or self.queries_positions is None:
            return None
        return self._apart(self.queries_positions[:, None], self.database_positions[predictions])

    def metres_to(self, query: int, images: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """Distance of a query to some database images, like `metres`."""
        if self.database_positions is None or self.queries_positions is None:
            return None
        return self._apart(self.queries_positions[query], self.database_positions[images])

    def metres_from_first(self, predictions: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """Distance of each query's predicted database images to the first of them, like `metres`."""
        if self.database_positions is None:
            return None
        found = self.database_positions[predictions]
        return self._apart(found[:, :1], found)

    def _apart(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        return haversine_metres(a, b) if self.geographic else np.linalg.norm(b - a, axis=-1)


def _other_than_queries(
    database: Sequence[str], queries: Sequence[str], folder: Path, *, keep: bool
) -> NDArray[np.bool_]:
    """Which database images stay: all but those that are also queries, under any path, or all with `keep`. The log
    counts them either way."""
    of_queries = set(map(identity, queries))
    shared = np.array([identity(path) in of_queries for path in database])
    if shared.any():
        logger.warning(
            "%d of the %d photos in %s are also queries: %s",
            shared.sum(),
            len(shared),
            folder,
            "they find themselves, and stay, as in published figures" if keep else "they are left out of the database",
        )
    return np.ones_like(shared) if keep else ~shared


def readable(paths: Sequence[str], folder: Path, *, upright: bool) -> NDArray[np.bool_]:
    """Which photos can be read, with `upright` or without; the log counts and names the others.

    Raises:
        ValueError: none can be read.
    """
    found = distributed.on_main(
        lambda: unreadable(paths, partial(read_pixels, upright=upright), progress=f"reading {folder.name}")
    )
    if found:
        for reason in found.values():
            logger.debug("%s", reason)
        more = f" and {len(found) - LISTED} more, see debug.log" if len(found) > LISTED else ""
        logger.warning(
            "%d of %d photos in %s cannot be read and are left out: %s%s",
            len(found),
            len(paths),
            folder,
            ", ".join(list(found)[:LISTED]),
            more,
        )
    if len(found) == len(paths):
        raise ValueError(f"none of the {len(paths)} photos in {folder} can be read; replace them")
    return np.array([path not in found for path in paths])


def _with_keys(paths: list[str], keys_file: Path) -> list[str]:
    if not keys_file.is_file():
        raise FileNotFoundError(f"no file {keys_file}; check --query_keys")
    keys = set(read_text(keys_file).replace(",", " ").replace(";", " ").split())
    kept = [path for path in paths if image_key(path) in keys]
    if not kept:
        raise ValueError(
            f"none of the {len(keys)} keys in {keys_file} is a query's key, e.g. {image_key(paths[0])!r}; "
            "give a text file of query keys"
        )
    if len(kept) < len(keys):
        logger.warning("%d of the %d keys in %s match no query", len(keys) - len(kept), len(keys), keys_file)
    return kept
