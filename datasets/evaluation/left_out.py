"""Which of the listed photos take part in an evaluation."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from utils.system import distributed
from utils.system.files import read_text

from ..photos.listing import also_among
from ..photos.positions import image_key
from ..photos.transforms import read_pixels

logger = logging.getLogger(__name__)

LISTED = 20  # photos named in one line of the log, at most; debug.log has all


def other_than_queries(
    database: Sequence[str], queries: Sequence[str], folder: Path, *, keep: bool
) -> NDArray[np.bool_]:
    """Which database images stay: all but those that are also queries, under any path, or all with `keep`. The log
    counts them either way."""
    shared = also_among(database, queries)
    if shared.any():
        what = "they find themselves, and stay, as is usual" if keep else "they are left out of the database"
        logger.warning("%d of the %d photos in %s are also queries: %s", shared.sum(), len(shared), folder, what)
    return np.ones_like(shared) if keep else ~shared


def readable(paths: Sequence[str], folder: Path, *, upright: bool) -> NDArray[np.bool_]:
    """Which photos can be read, with `upright` or without, at least one; the log counts and names the others."""

    def reason(path: str) -> str:
        try:
            read_pixels(path, upright=upright)
        except ValueError as error:
            return str(error)
        return ""

    def all_reasons() -> list[str]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(tqdm(pool.map(reason, paths), f"reading {folder.name}", len(paths), unit="image"))

    reasons = distributed.on_main(all_reasons)
    if lost := list(compress(paths, reasons)):
        logger.debug("%s", "\n".join(filter(None, reasons)))
        shown = ", ".join(lost[:LISTED]) + ", ... (see debug.log)" * (len(lost) > LISTED)
        wording = "%d of %d photos in %s cannot be read and are left out: %s"
        logger.warning(wording, len(lost), len(paths), folder, shown)
    if len(lost) == len(paths):
        raise ValueError(f"none of the {len(paths)} photos in {folder} can be read; replace them")
    return np.array([not why for why in reasons])


def with_keys(queries: Sequence[str], keys_file: Path) -> list[str]:
    """The queries whose `image_key` stands in a text file, at least one; the log counts the keys without one."""
    if not keys_file.is_file():
        raise FileNotFoundError(f"no file {keys_file}; check query_keys")
    keys = set(read_text(keys_file).replace(",", " ").replace(";", " ").split())
    kept = [path for path in queries if image_key(path) in keys]
    if not kept:
        key = image_key(queries[0])
        raise ValueError(f"none of the {len(keys)} keys in {keys_file} is a query's, e.g. {key!r}; check query_keys")
    if len(kept) < len(keys):
        logger.warning("%d of the %d keys in %s match no query", len(keys) - len(kept), len(keys), keys_file)
    return kept


def renumbered(positives: Sequence[NDArray[np.int64]], stay: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """The correct images of each query, as indices of the database images that stay; the log counts the queries that
    lose all theirs."""
    if stay.all():
        return list(positives)
    number = np.cumsum(stay) - 1
    kept = [number[images[stay[images]]] for images in positives]
    lost = sum(len(images) > 0 and not len(left) for images, left in zip(positives, kept, strict=True))
    if lost:
        why = "all correct photos are also queries or cannot be read, so they are not in the database"
        logger.warning("for %d of %d queries, %s; they count as missed", lost, len(positives), why)
    return kept
