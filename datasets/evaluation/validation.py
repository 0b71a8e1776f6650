"""The splits on which a training run chooses its best epoch and reports it."""

import logging
from pathlib import Path

from utils.system import distributed

from ..photos.listing import identity
from .alignment import alignment, log_alignment
from .tree import DatabaseQueries

logger = logging.getLogger(__name__)


def validation_and_test(
    datasets_folder: Path, name: str, *, distance: float, query_keys: Path | None, batch_size: int | None
) -> tuple[DatabaseQueries, DatabaseQueries, int]:
    """The validation and test splits of a dataset, and how many validation queries are test queries too.

    Warns of that, by the files and whatever their names, and if file order tells the cross-image encoder which photos
    match.

    Args:
        datasets_folder: folder that holds the dataset.
        name: name of the dataset's folder.
        distance: a database image within this many metres of a query is correct.
        query_keys: a text file with the keys of the queries to keep, if not all.
        batch_size: images that share a batch in the encoder; None without it.
    """
    splits = []
    for part in ("val", "test"):
        split = DatabaseQueries.from_folder(datasets_folder, name, part, query_keys=query_keys)
        near = split.positives(distance)
        if not any(len(images) for images in near):
            raise ValueError(
                f"{split}: no query has a database image within {distance:g} m, so every recall would be 0; check the "
                "split, or give a larger val_positive_dist_threshold"
            )
        if batch_size is not None and distributed.is_main():
            log_alignment(split, alignment(split, near, batch_size))
        splits.append(split)
    val, test = splits
    tested = set(map(identity, test.queries_paths))
    shared = sum(identity(path) in tested for path in val.queries_paths)
    if shared:
        logger.warning(
            "%d of the %d queries of %s are the same files as queries of %s, so that recall is optimistic",
            *(shared, len(val.queries_paths), val.name, test.name),
        )
    return val, test, shared
