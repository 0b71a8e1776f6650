"""A place recognition dataset on disk: database and query photos with positions in the file names.

<folder>/images/<split>/{database,queries}/**/@<UTM east>@<UTM north>@...@.jpg, or the same without images/
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..photos.exif import gps_positions
from ..photos.listing import IMAGE_SUFFIXES, PHOTO_SUFFIXES, also_among, list_images
from ..photos.positions import (
    haversine_metres,
    known,
    like_degrees,
    named_positions,
    photo_positions,
    several_zones,
    utm_positions,
)
from .layout import database_folder, split_folder
from .left_out import other_than_queries, readable, renumbered, with_keys
from .positives import Near, read_positives

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DatabaseQueries:
    """One split of a dataset: N database images and Q queries."""

    name: str
    database_paths: list[str]
    queries_paths: list[str]
    database_positions: NDArray[np.float64] | None = None  # N x 2, UTM east and north in metres, NaN where unknown
    queries_positions: NDArray[np.float64] | None = None  # Q x 2, likewise
    geographic: bool = False  # positions are latitude and longitude in degrees instead
    known_positives: list[NDArray[np.int64]] | None = None  # each query's correct database images, if a file says
    set_sizes: tuple[int, ...] = ()  # number of queries in each of several consecutive sets; empty for one set
    shown: "DatabaseQueries | None" = None  # the same with positions for display, see `located`, if known beforehand

    @classmethod
    def from_folder(
        cls, folder: Path, name: str, split: str, *, queries_names: Sequence[str] = ("queries",), **settings: Any
    ) -> "DatabaseQueries":
        """Lists a split of the dataset `name` below a folder of datasets, with the settings of `from_folders`."""
        folder = split_folder(folder, name, split)
        missing = [queries for queries in queries_names if not (folder / queries).is_dir()]
        others = sorted(path.name for path in folder.glob("queries*") if path.is_dir())
        if missing and others:
            raise FileNotFoundError(
                f"no folder {folder / missing[0]}; the query sets there are {', '.join(others)}: name them with "
                "eval.py's --queries_names"
            )
        sets = (folder / queries for queries in queries_names)
        return cls.from_folders(database_folder(folder), *sets, name=f"{name} {split}", **settings)

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
        skip_unreadable: bool = False,
    ) -> "DatabaseQueries":
        """Lists a folder of database images and one or more query folders.

        Args:
            queries_folders: each is a set of its own, see `sets`; subfolders are listed too.
            labelled: whether to read positions; without them and a file, no correct images are known.
            exif: whether these are plain folders: photos of all formats, turned as their EXIF data says, with positions
                in names or EXIF data, some of which may be missing; the database goes without photos that are queries.
            positives_file: lists the correct images of one query set, see `read_positives`; its indices refer to what
                the folders hold (the queries after `query_keys`), before anything is left out.
            query_keys: a text file; only queries whose `image_key` is in it are kept.
            skip_unreadable: leave out photos that cannot be read, which requires reading all of them.

        Raises:
            FileNotFoundError, ValueError: a folder or file is missing or unusable, nothing is left, or no photo of a
                side has a position.
        """
        suffixes = PHOTO_SUFFIXES if exif else IMAGE_SUFFIXES
        database = list_images(database_folder, suffixes)
        sets = [list_images(folder, suffixes) for folder in queries_folders]
        if query_keys is not None:
            sets = [with_keys(queries, query_keys) for queries in sets]
        queries = list(chain(*sets))
        positives = None
        if positives_file is not None:
            folders = database_folder, queries_folders[0]
            positives = read_positives(positives_file, database, queries, folders)
        stay = other_than_queries(database, queries, database_folder, keep=not exif)
        taken = [np.ones(len(paths), dtype=bool) for paths in sets]
        if skip_unreadable:
            stay &= readable(database, database_folder, upright=exif)
            taken = [readable(*paths_folder, upright=exif) for paths_folder in zip(sets, queries_folders, strict=True)]
        if not stay.any():
            raise ValueError(
                f"every photo in {database_folder} {'that can be read ' if skip_unreadable else ''}is also a query, in "
                f"{', '.join(map(str, queries_folders))}; name a database_folder that holds more than the queries"
            )
        if positives is not None:
            positives = renumbered(list(compress(positives, np.concatenate(taken))), stay)
        dataset = cls(
            name=name,
            database_paths=list(compress(database, stay)),
            queries_paths=list(compress(queries, np.concatenate(taken))),
            known_positives=positives,
            set_sizes=tuple(int(mask.sum()) for mask in taken),
        )
        return dataset._with_positions(exif=exif) if labelled and positives is None else dataset

    def _with_positions(self, *, exif: bool) -> "DatabaseQueries":
        if exif:
            database, queries, geographic = photo_positions(self.database_paths, self.queries_paths)
        else:
            positions = utm_positions(self.database_paths + self.queries_paths)
            database, queries = np.split(positions, [len(self.database_paths)])
            geographic = False
        located = replace(self, database_positions=database, queries_positions=queries, geographic=geographic)
        nowhere = [what for what, positions in located._sides.items() if not known(positions).any()]
        if nowhere:
            where = "name or EXIF data" if len(nowhere) == 2 else "EXIF data" if geographic else "name"
            raise ValueError(
                f"none of the {len(located._sides[nowhere[0]])} {nowhere[0]} has a position in its {where}; use "
                "no_labels to search without labels"
            )
        located._warn_of_positions()
        return located

    def sets(self, names: Sequence[str]) -> list["DatabaseQueries"]:
        """Each query set with the shared database; its name follows the dataset's, except for plain `queries`."""
        if names == ("queries",):
            return [self]
        parts, start = [], 0
        for name, size in zip(names, self.set_sizes, strict=True):
            part = slice(start, start := start + size)
            positions = None if self.queries_positions is None else self.queries_positions[part]
            named = replace(self, name=f"{self.name} {name}", set_sizes=())
            parts.append(replace(named, queries_paths=self.queries_paths[part], queries_positions=positions))
        return parts

    @property
    def _sides(self) -> dict[str, NDArray[np.float64]]:
        assert self.database_positions is not None and self.queries_positions is not None
        return {"database images": self.database_positions, "queries": self.queries_positions}

    def _warn_of_positions(self) -> None:
        unknown = {f"{len(positions)} {what}": (~known(positions)).sum() for what, positions in self._sides.items()}
        if some := " and ".join(f"{count} of {side}" for side, count in unknown.items() if count):
            logger.warning(
                "%s: %s have no position; they are searched and shown, but recall counts only the other queries, and "
                "no image without a position as correct",
                self.name,
                some,
            )
        self._warn_of_metres()

    def _warn_of_metres(self) -> None:
        if self.geographic:
            return
        for what in (what for what, positions in self._sides.items() if like_degrees(positions)):
            logger.warning(
                "%s: the positions of the %s look like degrees (nearly all within 90 and 180), but are read as metres, "
                "so everything is near; write UTM metres into the names, or degrees into EXIF data",
                self.name,
                what,
            )
        if zones := several_zones(self.database_paths + self.queries_paths):
            logger.warning("%s: file names state %s; metres between them are wrong", self.name, zones)

    def __str__(self) -> str:
        counted = int(self.judged_queries.sum()) if self.labelled else len(self.queries_paths)
        partly = f", {counted} of them with a position" if counted < len(self.queries_paths) else ""
        return f"{self.name} ({len(self.database_paths)} database, {len(self.queries_paths)} queries{partly})"

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
        return [*self.database_paths, *compress(self.queries_paths, map(len, self.positives(distance)))]

    def positives(self, distance: float) -> Sequence[NDArray[np.int64]]:
        """For each query, the indices of its correct database images: those in the file, else those within `distance`
        metres of it (inclusive). The latter are computed at each pass, for some queries at a time."""
        if self.known_positives is not None:
            return self.known_positives
        assert self.database_positions is not None and self.queries_positions is not None
        return Near(self.database_positions, self.queries_positions, geographic=self.geographic, distance=distance)

    def located(self, *, exif: bool) -> "DatabaseQueries":
        """The same photos with their known positions, for display only: they do not decide what is correct. `exif` as
        in `photo_positions`."""
        if self.shown is not None or self.database_positions is not None:
            return self.shown or self
        database, queries, geographic = photo_positions(self.database_paths, self.queries_paths, exif=exif)
        if not known(database).any():
            return self
        located = replace(
            self, database_positions=database, queries_positions=queries, geographic=geographic, known_positives=None
        )
        located._warn_of_metres()
        return located

    def metres(self, predictions: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """Distance of each query to its predicted database images, Q x k, NaN where a position is unknown; None without
        positions."""
        return self.metres_to(slice(None), predictions)

    def metres_to(self, query: int | slice, images: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """Distance of a query to some database images, like `metres`."""
        if self.database_positions is None or self.queries_positions is None:
            return None
        a, b = self.queries_positions[query][..., None, :], self.database_positions[images]
        return haversine_metres(a, b) if self.geographic else np.linalg.norm(b - a, axis=-1)


def map_queries(
    folder: Path,
    *,
    name: str,
    paths: Sequence[str],
    positions: NDArray[np.float64] | None,
    geographic: bool,
    upright: bool,
    labelled: bool = True,
    skip_unreadable: bool = False,
) -> DatabaseQueries:
    """Lists a folder of query photos, of all formats, for a map. Positions must be of the map's kind, degrees from EXIF
    data or metres from names; recall counts the queries that have one, and without any there is none.

    Args:
        folder: its subfolders are listed too.
        name: name to show.
        paths: photos of the map, N; those that are missing have no folder.
        positions: their positions, N x 2, NaN where unknown; None if all are unknown.
        geographic: whether these are latitude and longitude.
        upright, skip_unreadable: as in `readable`.
        labelled: whether to compute recall at all.
    """
    queries = list_images(folder, PHOTO_SUFFIXES)
    if skip_unreadable:
        queries = list(compress(queries, readable(queries, folder, upright=upright)))
    repeated = also_among(queries, list(filter(os.path.isabs, paths))).sum()
    if repeated:
        logger.warning("%d of the %d queries are photos of the map, so they find themselves", repeated, len(queries))
    dataset = located = DatabaseQueries(name=name, database_paths=list(paths), queries_paths=queries)
    missing = "the map has no positions"
    if positions is not None:
        queried = gps_positions(queries) if geographic else named_positions(queries)
        located = replace(dataset, database_positions=positions, queries_positions=queried, geographic=geographic)
        if labelled and known(queried).any() and known(positions).any():
            located._warn_of_positions()
            return located
        missing = f"none of the {len(queries)} queries has a position in {'EXIF data' if geographic else 'the names'}"
    if labelled:
        logger.info("no recall: %s", missing)
    return replace(dataset, shown=located)
