"""Results for structure from motion and SLAM: a list of photo pairs, and descriptors in hloc's format.

Both name photos relative to the folder that holds database and queries: the image folder of hloc and COLMAP.
"""

import importlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..retrieval.search import Chunk
from ..system.files import atomic_write, common_root, relative_to

logger = logging.getLogger(__name__)

PAIRS, DESCRIPTORS = "pairs.txt", "global_descriptors.h5"
DATASET = "global_descriptor"  # hloc's name for an image's descriptor


def require_names(queries: Sequence[str], database: Sequence[str], *, flag: str, there: bool = True) -> None:
    """Raises ValueError if hloc and COLMAP would read a photo's name in a list as two, as a comment, or not at all.

    `flag` is the option that asks for it, `there` whether the photos exist, which those of a map may not.
    """
    if not there:
        raise ValueError(f"{flag} is for programs that read the photos, but those of the map are missing; leave it out")
    paths = [*queries, *database]
    root = common_root(paths)
    refused = [name for name in relative_to(root, paths) if not _listable(name)]
    if refused:
        raise ValueError(
            f"{flag}: hloc and COLMAP read no names with spaces, a leading #, or bytes that are not UTF-8 from a list, "
            f"which {len(refused)} of {len(paths)} below {root} have, e.g. {refused[0]!r}; rename them"
        )


def _listable(name: str) -> bool:
    return len(name.split()) == 1 and name[0] != "#" and not any("\ud800" <= letter <= "\udfff" for letter in name)


def require_one_each(test_method: str, pca_dim: int) -> None:
    """Raises ValueError if h5py is missing or a query has several descriptors; warns if hloc will rank otherwise."""
    try:
        importlib.import_module("h5py")
    except ImportError as error:
        raise ValueError("--save_h5 needs the package h5py, which is missing; pip install h5py") from error
    if test_method in ("nearest_crop", "maj_voting"):
        raise ValueError(f"--save_h5 writes one descriptor per photo, --test_method {test_method} has one per crop")
    if pca_dim:
        logger.warning("--save_h5: hloc ranks by dot product, which differs from the order of distances after a PCA")


def write_pairs(folder: Path, queries: Sequence[str], database: Sequence[str], predictions: NDArray[np.int64]) -> None:
    """Writes the run's `pairs.txt`, a line `query database` for each of the predictions, Q x k; -1 is left out.

    `require_names` must have accepted the paths.
    """
    root = common_root([*queries, *database])
    query_names, database_names = relative_to(root, queries), relative_to(root, database)
    with atomic_write(folder / PAIRS) as path, open(path, "w", encoding="utf-8", newline="\n") as file:
        for query, row in zip(query_names, predictions, strict=True):
            file.writelines(f"{query} {database_names[image]}\n" for image in row[row >= 0])
    count, missing = int((predictions >= 0).sum()), int((predictions < 0).sum())
    fewer = f", {missing} matches fewer than requested, which the index did not find" * bool(missing)
    logger.info(f"{count} pairs of {len(queries)} queries, names relative to {root}{fewer}: {folder / PAIRS}")


def write_h5(folder: Path, sides: Mapping[str, tuple[Sequence[str], Iterable[Chunk]]]) -> None:
    """Writes the run's `global_descriptors.h5`: the descriptor of each photo at `/<its name>/global_descriptor`.

    `sides` has the paths of database and queries, and their descriptors as indices and n x D, in chunks.
    """
    import h5py  # an optional package

    root = common_root([path for paths, _ in sides.values() for path in paths])
    count = 0
    with atomic_write(folder / DESCRIPTORS) as path, h5py.File(path, "w") as file:
        for paths, chunks in sides.values():
            names = relative_to(root, paths)
            for indices, rows in chunks:
                for index, row in zip(indices, rows, strict=True):
                    file.create_dataset(f"{names[index]}/{DATASET}", data=row)
            count += len(names)
    logger.info("descriptors of %d photos, names relative to %s: %s", count, root, folder / DESCRIPTORS)
