"""Whether the batches of the cross-image encoder give away which photos match."""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .tree import DatabaseQueries

logger = logging.getLogger(__name__)

SAME_POSITION = 0.01  # metres; coordinates are written to the centimetre


def alignment(
    dataset: DatabaseQueries, positives: Sequence[NDArray[np.int64]], batch_size: int
) -> dict[str, bool | int]:
    """Counts, for `results.json`, the queries whose batch, in file order, holds the same places as the database batch
    of the same number.

    There, an encoder that looks across a batch sees the same places on both sides, and descriptors can match by that.
    A single batch on a side gives nothing away.

    Returns:
        `queries` is the number with a correct image. For `paired`, a query's places are the correct images at its own
        position, or all correct images in a file: the pairs of a one-to-one set. For `nearest`, they are its nearest
        correct images, for two sides that follow one route. `warned` is true if the majority is paired.
    """
    masks, elsewhere = np.zeros((2, 2, len(dataset.queries_paths)), dtype=bool)
    several = min(len(dataset.queries_paths), len(dataset.database_paths)) > batch_size > 1
    queries = 0
    for query, images in enumerate(positives):
        queries += len(images) > 0
        if not several or not len(images):
            continue
        metres = dataset.metres_to(query, images)
        here = images // batch_size == query // batch_size
        metres = np.zeros(len(images)) if metres is None else metres
        for which, places in enumerate((metres <= SAME_POSITION, metres == metres.min())):
            masks[which, query] = here[places].any()
            elsewhere[which, query] = places.any() and not masks[which, query]
    for start in range(0, len(positives), batch_size):
        batch = slice(start, start + batch_size)
        masks[elsewhere[:, batch].any(axis=1), batch] = False
    paired, nearest = map(int, masks.sum(axis=1))
    return {"warned": 2 * paired > queries, "queries": queries, "paired": paired, "nearest": nearest}


def log_alignment(dataset: DatabaseQueries, counts: dict[str, bool | int]) -> None:
    """Logs the counts of `alignment`, if they are a majority."""
    if counts["warned"]:
        logger.warning(
            "%s: for %d of %d queries, the batch in file order holds exactly the places of the database batch of the "
            "same number, so the encoder sees the same places on both sides, and recall may come from that: eval.py's "
            "--encoder_context file_order unaligned tests it",
            dataset.name,
            counts["paired"],
            counts["queries"],
        )
    elif 2 * counts["nearest"] > counts["queries"]:
        logger.info(
            "%s: queries and database follow one route in the order of names (%d of %d queries share their batch with "
            "the neighbours of their nearest database image): eval.py's --encoder_context file_order unaligned shows "
            "what that adds",
            dataset.name,
            counts["nearest"],
            counts["queries"],
        )


def pair_up(positives: Sequence[NDArray[np.int64]], database: int) -> bool:
    """Whether there are as many queries as database images, and for nine of ten queries the database image of the same
    number is correct."""
    paired = [query in images for query, images in enumerate(positives)]
    return len(paired) == database and float(np.mean(paired)) >= 0.9
