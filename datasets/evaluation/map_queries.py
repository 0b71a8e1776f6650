"""Queries for a map, whose database is descriptors and positions: its photos may be missing."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..photos.exif import gps_positions
from ..photos.listing import PHOTO_SUFFIXES, identity, list_images
from ..photos.positions import known, named_positions
from .left_out import readable
from .tree import DatabaseQueries

logger = logging.getLogger(__name__)


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
    own = {identity(path) for path in paths if os.path.isabs(path)}
    repeated = sum(identity(path) in own for path in queries)
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
