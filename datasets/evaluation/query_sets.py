"""What an evaluation is run on: query sets, their databases, and what counts as correct in them."""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from utils.system import distributed

from ..photos.listing import also_among, list_images, scan
from .alignment import alignment, log_alignment, pair_up
from .layout import split_folder
from .left_out import readable
from .protocols import Protocol, protocol_of, warn_of_counts
from .tree import DatabaseQueries

logger = logging.getLogger(__name__)

PCA_IMAGES = 16_384  # a PCA is fitted on this many at most


@dataclass(frozen=True, kw_only=True)
class QuerySet:
    """A query set of a dataset and how it is evaluated."""

    dataset: DatabaseQueries  # the queries, and the database that the sets of a dataset share
    name: str = "queries"  # name of the set
    dataset_name: str  # name of the dataset, under which its descriptors are kept
    test_method: str  # a name from `transforms.TEST_METHODS`
    positive_distance: float  # a database image within this many metres of a query is correct
    positives_file: Path | None = None  # lists the correct images instead
    infer_batch_size: int  # images that share a batch in the cross-image encoder
    subfolder: str = ""  # folder for the results, below the run's folder
    corruption: str = ""  # of the queries, such as "blur:3", see `photos.corruptions`
    tested: bool = False  # the queries are also those of the test split, though another split is evaluated

    @property
    def store(self) -> str:
        """Name under which the queries' descriptors are kept, unique among the sets and other stores."""
        name = quote(os.fsencode(self.name), safe="")  # has no /, no = and no +
        name += f"+{self.corruption.replace(':', '_')}" * bool(self.corruption)
        return name if name.startswith("queries") else f"queries={name}"

    @property
    def rule(self) -> str:
        """The rule by which a database photo is correct, in words."""
        return f"as {self.positives_file.name} says" if self.positives_file else f"within {self.positive_distance:g} m"

    @cached_property
    def positives(self) -> Sequence[NDArray[np.int64]] | None:
        """For each query the indices of its correct database images; None without labels."""
        return self.dataset.positives(self.positive_distance) if self.dataset.labelled else None

    @cached_property
    def _counts_and_digest(self) -> tuple[NDArray[np.int64], str]:
        """How many correct database images each query has, and a digest of which, from one pass: it computes them."""
        assert self.positives is not None
        counts, digest = np.zeros(len(self.dataset.queries_paths), dtype=np.int64), hashlib.sha256()
        for query, images in enumerate(self.positives):
            counts[query] = len(images)
            digest.update(np.array([query, *np.sort(images)], dtype="<i8").tobytes())
        return counts, digest.hexdigest()[:16]

    @property
    def has_positive(self) -> NDArray[np.bool_] | None:
        """The queries that have a correct database image or no known position, Q; None without labels."""
        return None if self.positives is None else (self._counts_and_digest[0] > 0) | ~self.dataset.judged_queries

    @property
    def facts(self) -> dict[str, Any]:
        """The dataset in `results.json`: its name, sizes, and digests of file names and of what is correct."""
        digests = {}
        for side, paths in (("database", self.dataset.database_paths), ("queries", self.dataset.queries_paths)):
            names = b"\n".join(os.fsencode(os.path.basename(path)) for path in paths)
            digests[side] = hashlib.sha256(names).hexdigest()[:16]
        if self.positives is not None:
            digests["labels"] = self._counts_and_digest[1]
        return {**self.dataset.sizes, "digests": digests}

    @cached_property
    def alignment(self) -> dict[str, bool | int]:
        """What file order gives away in the batches of the cross-image encoder, for labelled queries."""
        assert self.positives is not None
        return alignment(self.dataset, self.positives, self.batch_size)

    @property
    def batch_size(self) -> int:
        """Queries that share a batch in the encoder; none do where each photo keeps its shape."""
        return 1 if self.test_method == "single_query" else self.infer_batch_size

    def with_corruptions(self, corruptions: Sequence[str]) -> list["QuerySet"]:
        """This set, then its queries under each corruption, all in folders of their own; itself if there is none.

        A kind without a severity stands for all five. This set keeps its name, so that other runs can be compared.
        """
        words = [word if ":" in word else f"{word}:{severity}" for word in corruptions for severity in range(1, 6)]
        sets = [replace(self, subfolder=os.path.join(self.subfolder, "clean"))] if words else [self]
        for word in dict.fromkeys(words):
            name = f"{self.dataset.name.removesuffix(f' {self.name}')} {self.name}, {word}"
            subfolder = os.path.join(self.subfolder, word.replace(":", "_"))
            dataset = replace(self.dataset, name=name)
            sets.append(replace(self, dataset=dataset, corruption=word, subfolder=subfolder))
        return sets


def select(data: Any, *, test_method: str | None, infer_batch_size: int) -> list[list[QuerySet]]:
    """Lists the datasets, or the two plain folders: the query sets of each dataset, which share its database.

    Args:
        data: the options of the group `data`.
        test_method: how queries are prepared; None as the dataset's protocol says.
        infer_batch_size: images that share a batch in the cross-image encoder.

    Raises:
        FileNotFoundError, ValueError: folders, names or labels do not fit the options.
    """
    settings: dict[str, Any] = {
        "labelled": not data.no_labels,
        "positives_file": data.positives_file,
        "query_keys": data.query_keys,
        "skip_unreadable": data.skip_unreadable,
    }
    common = {"infer_batch_size": infer_batch_size, "positives_file": data.positives_file}
    if data.plain_folders:
        name = f"{data.queries_folder.resolve().name} in {data.database_folder.resolve().name}"
        folders = data.database_folder, data.queries_folder
        dataset = DatabaseQueries.from_folders(*folders, name=name, exif=True, **settings)
        return [[only_set(dataset, test_method=test_method, distance=data.val_positive_dist_threshold, **common)]]
    groups: list[list[QuerySet]] = []
    for name in data.eval_dataset_name:
        names, split, protocol = data.queries_of(name), data.eval_split, protocol_of(name)
        dataset = DatabaseQueries.from_folder(data.eval_datasets_folder, name, split, queries_names=names, **settings)
        if split == "test" and names != ("queries",):
            warn_of_counts(dataset, protocol, None)
        distance = data.val_positive_dist_threshold
        groups.append([])
        for set_name, one_set in zip(names, dataset.sets(names), strict=True):
            if split == "test":
                warn_of_counts(one_set, protocol, set_name)
            several = [name] * (len(data.eval_dataset_name) > 1) + [set_name] * (len(names) > 1)
            groups[-1].append(
                QuerySet(
                    dataset=one_set,
                    name=set_name,
                    dataset_name=f"{name} {split}",
                    test_method=test_method or protocol.test_method,
                    positive_distance=protocol.positive_distance if distance is None else distance,
                    subfolder="/".join(several),
                    tested=split != "test" and _shared_with_test(one_set, data.eval_datasets_folder, name, set_name),
                    **common,
                )
            )
    names = [query_set.subfolder for group in groups for query_set in group]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"results of two query sets would go to the same folder, {twice[0]}; evaluate one at a time")
    return groups


def only_set(dataset: DatabaseQueries, *, test_method: str | None, distance: float | None, **settings: Any) -> QuerySet:
    """The one query set of plain folders or of a map, which have the defaults of `Protocol`."""
    return QuerySet(
        dataset=dataset,
        dataset_name=dataset.name,
        test_method=test_method or Protocol().test_method,
        positive_distance=Protocol().positive_distance if distance is None else distance,
        **settings,
    )


def _shared_with_test(dataset: DatabaseQueries, datasets_folder: Path, name: str, queries: str) -> bool:
    """Whether a query is also one of the test split, under any path."""
    folder = split_folder(datasets_folder, name, "test") / queries
    return folder.is_dir() and bool(also_among(dataset.queries_paths, scan(folder).paths).any())


def pca_images(
    folder: Path, *, dim: int, whiten: bool, descriptor_dim: int, seed: int, skip_unreadable: bool = False
) -> list[str]:
    """The images to fit a PCA to `dim` dimensions on, in random order; ValueError where they, or the dimensions of the
    descriptors, are too few."""
    chosen = np.random.default_rng(seed).permutation(list_images(folder))[:PCA_IMAGES]
    if skip_unreadable:
        chosen = chosen[readable(chosen.tolist(), folder, upright=False)]
    most = min(len(chosen) - whiten, descriptor_dim)  # n images vary in n - 1 directions
    if dim > most:
        raise ValueError(
            f"pca_dim {dim}: descriptors are {descriptor_dim}-dimensional and {folder} has {len(chosen)} images; use "
            f"at most {most}"
        )
    return list(chosen.tolist())


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
    shared = int(also_among(val.queries_paths, test.queries_paths).sum())
    if shared:
        logger.warning(
            "%d of the %d queries of %s are the same files as queries of %s, so that recall is optimistic",
            *(shared, len(val.queries_paths), val.name, test.name),
        )
    return val, test, shared


def warn_before_extraction(query_sets: Sequence[QuerySet], contexts: Sequence[str]) -> None:
    """Warns of queries that cannot be found, and of batches of the encoder (`contexts` is empty without it) that give
    the answer away; ValueError where the context is "paired", but queries and database images do not pair up."""
    for query_set in query_sets:
        if query_set.positives is None or query_set.has_positive is None:
            continue
        dataset = query_set.dataset
        if lost := int((~query_set.has_positive).sum()):
            logger.warning(
                "%s: %d of %d queries have no %sdatabase photo %s; they count as missed, as in published figures",
                dataset.name,
                lost,
                int(dataset.judged_queries.sum()),
                "correct " * bool(query_set.positives_file),
                query_set.rule,
            )
        if "paired" in contexts and not pair_up(query_set.positives, len(dataset.database_paths)):
            raise ValueError(
                f"encoder_context paired: {dataset.name} has {len(dataset.queries_paths)} queries and "
                f"{len(dataset.database_paths)} database images, which do not pair up one to one in the order of "
                "names; use shuffled"
            )
        batch = query_set.batch_size
        if "unaligned" in contexts and (batch == 1 or len(dataset.queries_paths) <= batch // 2):
            logger.warning("%s: queries share no batch, or all share one, so unaligned is file_order", dataset.name)
        if "file_order" in contexts:
            log_alignment(dataset, query_set.alignment)
