"""Queries of a map, whose database is known by its descriptors and positions: its photos need not be there."""

import logging
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.place_map import PlaceMap

from .database_queries import DatabaseQueries, known, named_positions, readable
from .exif import gps_positions
from .photo_files import PHOTO_SUFFIXES, identity, list_images

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MapQueries(DatabaseQueries):
    """A map and the photos that it is asked with; labelled where some of both have positions.

    Attributes:
        map_positions: N x 2, to be shown; None where nothing is known of them.
        asked_positions: Q x 2, not a number where unknown.
        map_geographic: whether positions are latitude and longitude.
        photos_there: whether the map's photos are.
    """

    map_positions: NDArray[np.float64] | None
    asked_positions: NDArray[np.float64]
    map_geographic: bool
    photos_there: bool

    @classmethod
    def asked(
        cls, place_map: PlaceMap, folder: Path, *, labelled: bool = True, skip_unreadable: bool = False
    ) -> "MapQueries":
        """Lists a folder of photos to ask a map with. Their positions are of the map's kind, degrees from EXIF data or
        metres from the names, and recall counts the queries that have one.

        Args:
            place_map: the map.
            folder: searched below, too; photos of every format count.
            labelled: whether to count at all.
            skip_unreadable: leave out photos that cannot be read, which takes reading all of them.

        Raises:
            FileNotFoundError, ValueError: as `list_images`; or no photo can be read.
        """
        queries = list_images(folder, PHOTO_SUFFIXES)
        if skip_unreadable:
            queries = list(compress(queries, readable(queries, folder, upright=place_map.upright)))
        there = set(map(identity, place_map.paths if place_map.root else ()))
        own = sum(identity(path) in there for path in queries)
        if own:
            logger.warning("%d of the %d queries are photos of the map: they find themselves", own, len(queries))
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
            logger.info("no recall: none of the %d queries has a position, which is sought in %s", len(queries), where)
            return dataset
        dataset = replace(dataset, database_positions=positions, queries_positions=found, geographic=geographic)
        dataset._warn_of_positions()
        return dataset

    def located(self, *, exif: bool) -> DatabaseQueries:
        """As of any dataset; what is known stands in the map and was sought when the queries were listed."""
        if self.map_positions is None:
            return self
        return replace(
            self,
            database_positions=self.map_positions,
            queries_positions=self.asked_positions,
            geographic=self.map_geographic,
        )
