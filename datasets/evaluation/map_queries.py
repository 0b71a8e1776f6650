"""Queries for a map, whose database is descriptors and positions: its photos may be missing."""

import logging
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.retrieval.place_map import PlaceMap

from ..photos.exif import gps_positions
from ..photos.listing import PHOTO_SUFFIXES, identity, list_images
from .database_queries import DatabaseQueries, known, named_positions, readable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MapQueries(DatabaseQueries):
    """A map and its query photos; labelled if some of both have positions.

    Attributes:
        map_positions: N x 2, for display; None if all are unknown.
        asked_positions: positions of the queries, Q x 2, NaN where unknown.
        map_geographic: whether positions are latitude and longitude.
        photos_there: whether the map's photos exist.
    """

    map_positions: NDArray[np.float64] | None
    asked_positions: NDArray[np.float64]
    map_geographic: bool
    photos_there: bool

    @classmethod
    def asked(
        cls, place_map: PlaceMap, folder: Path, *, labelled: bool = True, skip_unreadable: bool = False
    ) -> "MapQueries":
        """Lists a folder of query photos for a map. Positions must be of the map's kind, degrees from EXIF data or
        metres from names; recall counts the queries that have one.

        Args:
            place_map: the map.
            folder: its subfolders are listed too; photos of all formats count.
            labelled: whether to compute recall at all.
            skip_unreadable: leave out photos that cannot be read, which requires reading all of them.

        Raises:
            FileNotFoundError, ValueError: see `list_images`; or no photo can be read.
        """
        queries = list_images(folder, PHOTO_SUFFIXES)
        if skip_unreadable:
            queries = list(compress(queries, readable(queries, folder, upright=place_map.upright)))
        there = set(map(identity, place_map.paths if place_map.root else ()))
        own = sum(identity(path) in there for path in queries)
        if own:
            logger.warning("%d of the %d queries are photos of the map, so they find themselves", own, len(queries))
        positions, geographic = place_map.positions, place_map.geographic
        found = np.full((len(queries), 2), np.nan)
        if positions is not None:
            found = gps_positions(queries) if geographic else named_positions(queries)
        where = "EXIF data" if geographic else "the names"
        dataset = cls(
            name=f"{folder.resolve().name} in {place_map.path.stem}",
            database_paths=place_map.paths,
            queries_paths=queries,
            map_positions=positions,
            asked_positions=found,
            map_geographic=geographic,
            photos_there=place_map.root is not None,
        )
        if not labelled:
            return dataset
        if positions is None or not known(positions).any():
            logger.info("no recall: the map has no positions")
            return dataset
        if not known(found).any():
            logger.info("no recall: none of the %d queries has a position in %s", len(queries), where)
            return dataset
        dataset = replace(dataset, database_positions=positions, queries_positions=found, geographic=geographic)
        dataset._warn_of_positions()
        return dataset

    def located(self, *, exif: bool) -> DatabaseQueries:
        """See `DatabaseQueries.located`; positions come from the map, and from the listing of the queries."""
        if self.map_positions is None:
            return self
        return replace(
            self,
            database_positions=self.map_positions,
            queries_positions=self.asked_positions,
            geographic=self.map_geographic,
        )
