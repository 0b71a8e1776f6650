"""What an evaluation is run on: query sets, their databases, and what counts as correct in them."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from utils.retrieval.descriptor_store import kept_in
from utils.retrieval.place_map import PlaceMap

from ..photos.listing import identity, list_images
from .alignment import alignment, log_alignment, pair_up
from .database_queries import DatabaseQueries, image_key, readable
from .map_queries import MapQueries
from .protocols import protocol_of, warn_of_counts

logger = logging.getLogger(__name__)

PCA_IMAGES = 16_384  # a PCA is fitted on this many at most


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to evaluate; most fields are named like eval.py's options.

    Attributes:
        queries_of: returns the query folders to search in a dataset's database.
        plain_folders: whether two plain folders are searched instead of datasets.
        accept_precision: the precision in percent whose distance is found on the val split; None for none.
    """

    eval_datasets_folder: Path
    eval_dataset_name: tuple[str, ...]
    queries_of: Callable[[str], tuple[str, ...]]
    plain_folders: bool
    database_folder: Path | None
    queries_folder: Path | None
    no_labels: bool
    positives_file: Path | None
    query_keys: Path | None
    labels_where_known: bool
    skip_unreadable: bool
    test_method: str | None
    val_positive_dist_threshold: float | None
    positive_frames: int | None
    infer_batch_size: int
    save_submission: bool
    descriptors_folder: Path | None
    accept: str | None
    accept_precision: float | None
    pca_dim: int
    pca_whiten: bool
    pca_dataset_folder: Path | None
    seed: int
    upright: bool


@dataclass(kw_only=True)
class Task:
    """A query set of a dataset, how it is evaluated, and where the results go.

    Attributes:
        dataset: the queries, and the database that the sets of a dataset share.
        queries: name of the set; "queries" if there is only one.
        of: name of the dataset, under which its descriptors are kept.
        test_method: a name from `transforms.TEST_METHODS`.
        positive_distance: a database image within this many metres of a query is correct.
        positives_file: file that lists the correct images instead; None to use the distance.
        infer_batch_size: images that share a batch in the cross-image encoder.
        subfolder: folder for the results, below the run's folder.
        folder: its full path, once the run's folder exists.
        accepted_distance: matches are accepted up to this squared descriptor distance, once it is known; None if the
            options set none.
        found_on_val: precision and recall of that distance on the val split, if it was found there.
    """

    dataset: DatabaseQueries
    queries: str
    of: str
    test_method: str
    positive_distance: float
    positives_file: Path | None
    infer_batch_size: int
    subfolder: str
    folder: Path = Path()
    accepted_distance: float | None = None
    found_on_val: dict[str, Any] | None = None

    @property
    def store(self) -> str:
        """Name under which the queries' descriptors are kept, unique among the sets and other stores."""
        name = quote(os.fsencode(self.queries), safe="")  # has no / and no =
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
    def findable(self) -> NDArray[np.bool_] | None:
        """The queries that have a correct database image or no known position, Q; None without labels."""
        if self.positives is None:
            return None
        found = np.fromiter((len(of_query) > 0 for of_query in self.positives), bool, len(self.dataset.queries_paths))
        return found | ~self.dataset.judged_queries

    @cached_property
    def alignment(self) -> dict[str, bool | int]:
        """What file order gives away in the batches of the cross-image encoder, for a labelled task."""
        assert self.positives is not None
        batch = 1 if self.test_method == "single_query" else self.infer_batch_size  # shares a batch with no other
        return alignment(self.dataset, self.positives, batch)


def select(asked: Selection, place_map: PlaceMap | None = None) -> list[list[Task]]:
    """Finds the datasets and makes a task for each query set; the tasks of a dataset share its database.

    Args:
        asked: what to evaluate.
        place_map: a map to query instead of a database, if any.

    Raises:
        FileNotFoundError, ValueError: folders, names or labels do not fit the options.
    """
    groups = []
    for name, dataset in _datasets(asked, place_map):
        _require_keys(asked, dataset)
        names = asked.queries_of(name)
        sets = dataset.sets(names)
        if names != ("queries",):
            warn_of_counts(dataset, protocol_of(name), None)
        for queries, of_set in zip(names, sets, strict=True):
            warn_of_counts(of_set, protocol_of(name), queries)
        trees = not asked.plain_folders and place_map is None
        groups.append(
            [
                Task(
                    dataset=of_set,
                    queries=queries,
                    of=f"{name} test" if trees else name,
                    test_method=asked.test_method or protocol_of(name).test_method,
                    positive_distance=positive_distance(asked, name),
                    positives_file=asked.positives_file,
                    infer_batch_size=asked.infer_batch_size,
                    subfolder="/".join(
                        [name] * (trees and len(asked.eval_dataset_name) > 1) + [queries] * (len(sets) > 1)
                    ),
                )
                for queries, of_set in zip(names, sets, strict=True)
            ]
        )
    return groups


def _datasets(asked: Selection, place_map: PlaceMap | None) -> list[tuple[str, DatabaseQueries]]:
    """The datasets, each with the name of its protocol."""
    found: list[tuple[str, DatabaseQueries]] = []
    if place_map is not None:
        assert asked.queries_folder is not None
        logger.info("%s", place_map)
        of_map = MapQueries.asked(
            place_map, asked.queries_folder, labelled=not asked.no_labels, skip_unreadable=asked.skip_unreadable
        )
        found.append((of_map.name, of_map))
    else:
        settings: dict[str, Any] = {
            "labelled": not asked.no_labels,
            "positives_file": asked.positives_file,
            "query_keys": asked.query_keys,
            "labels_where_known": asked.labels_where_known,
            "skip_unreadable": asked.skip_unreadable,
        }
        if asked.database_folder is not None and asked.queries_folder is not None:
            folders = asked.database_folder, asked.queries_folder
            name = f"{asked.queries_folder.resolve().name} in {asked.database_folder.resolve().name}"
            found.append((name, DatabaseQueries.from_folders(*folders, name=name, exif=True, **settings)))
        else:
            for name in asked.eval_dataset_name:
                sets = {"queries_names": asked.queries_of(name)}
                tree = DatabaseQueries.from_folder(asked.eval_datasets_folder, name, "test", **sets, **settings)
                found.append((name, tree))
    if asked.descriptors_folder is not None:
        kept = [kept_in(asked.descriptors_folder, dataset.name) for _, dataset in found]
        if len({*kept}) < len(kept):
            raise ValueError(
                f"--descriptors_folder would keep two of {', '.join(name for name, _ in found)} in one folder; "
                "evaluate one at a time, each with a folder of its own"
            )
    return found


def _require_keys(asked: Selection, dataset: DatabaseQueries) -> None:
    paths = dataset.queries_paths + dataset.database_paths if asked.save_submission else []
    if not all(len(image_key(path).split()) == 1 for path in paths):
        raise ValueError(
            f"--save_submission: some file names of {dataset.name} have no image key without spaces, the seventh "
            "field of @east@north@zone@letter@lat@lon@key@...; use a dataset with such names"
        )


def positive_distance(asked: Selection, name: str) -> float:
    """The distance in metres within which a dataset's database images are correct.

    Raises:
        ValueError: `positive_frames` is given but the positions do not count frames.
    """
    protocol = protocol_of(name)
    if asked.val_positive_dist_threshold is not None:
        return asked.val_positive_dist_threshold
    frames = protocol.frames if asked.positive_frames is None else asked.positive_frames
    if frames is None:
        return protocol.positive_distance
    if protocol.metres_a_frame is None:
        raise ValueError(
            f"--positive_frames: the positions of {name} do not count frames; use --val_positive_dist_threshold"
        )
    return (frames + 0.5) * protocol.metres_a_frame  # half-way to the first wrong frame


def require_folders_of_their_own(tasks: Sequence[Task]) -> None:
    """Raises ValueError if two tasks would write their results to the same folder."""
    names: dict[str, Task] = {}
    for task in tasks:
        other = names.setdefault(task.subfolder, task)
        if other is not task:
            raise ValueError(
                f"the results of {other.dataset.name} and {task.dataset.name} would go to the same folder, "
                f"{task.subfolder}; evaluate one after the other"
            )


def val_task(asked: Selection, group: Sequence[Task]) -> Task | None:
    """The val split beside a test split, on which `--accept auto@P` finds the distance; None for other --accept.

    Args:
        asked: what to evaluate.
        group: the tasks of the dataset's test split.

    Raises:
        ValueError: there is no usable val split.
    """
    if asked.accept_precision is None:
        return None
    name = group[0].of.removesuffix(" test")
    folder = asked.eval_datasets_folder / name / "images" / "val"
    remedy = f"put one into {folder}, or give --accept a distance"
    if not folder.is_dir():
        raise ValueError(f"--accept {asked.accept} needs a val split, but {name} has none; {remedy}")
    if not (folder / "queries").is_dir():  # whatever sets the test split has
        raise ValueError(f"--accept {asked.accept}: there is no folder {folder / 'queries'}; {remedy}")
    try:
        val = DatabaseQueries.from_folder(
            asked.eval_datasets_folder,
            name,
            "val",
            labels_where_known=asked.labels_where_known,
            skip_unreadable=asked.skip_unreadable,
        )
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"--accept {asked.accept} needs the val split of {name}: {error}; {remedy}") from error
    test_queries = [path for task in group for path in task.dataset.queries_paths]
    tested = set(map(identity, test_queries))
    if any(identity(path) in tested for path in val.queries_paths):
        raise ValueError(
            f"--accept {asked.accept}: queries of the val split of {name} are also in the test split, so the distance "
            f"found would be optimistic; {remedy}"
        )
    named = set(map(os.path.basename, test_queries)) & set(map(os.path.basename, val.queries_paths))
    if named:
        logger.warning(
            "%s: %d queries have the same names as test queries, e.g. %s; if they are the same photos, the distance "
            "that --accept %s finds is optimistic",
            val.name,
            len(named),
            min(named),
            asked.accept,
        )
    return replace(group[0], dataset=val, queries="queries", of=val.name)


def pca_images(asked: Selection, descriptor_dim: int) -> list[str]:
    """The images to fit a PCA on, in random order; none without a PCA.

    Args:
        asked: what to evaluate.
        descriptor_dim: dimension of a descriptor before the PCA.

    Raises:
        FileNotFoundError, ValueError: there are too few images, or descriptors are too short.
    """
    if asked.pca_dataset_folder is None:
        return []
    folder = asked.eval_datasets_folder / asked.pca_dataset_folder
    chosen = np.random.default_rng(asked.seed).permutation(list_images(folder))[:PCA_IMAGES]
    if asked.skip_unreadable:
        chosen = chosen[readable(chosen.tolist(), folder, upright=asked.upright)]
    if asked.pca_whiten and asked.pca_dim == len(chosen):
        raise ValueError(
            f"--pca_whiten: {len(chosen)} images vary in {len(chosen) - 1} directions; use --pca_dim "
            f"{len(chosen) - 1} at most"
        )
    if asked.pca_dim > min(len(chosen), descriptor_dim):
        raise ValueError(
            f"--pca_dim {asked.pca_dim}: descriptors have {descriptor_dim} numbers and {asked.pca_dataset_folder} has "
            f"{len(chosen)} images; use at most the smaller of the two"
        )
    return list(chosen.tolist())


def foresee_recalls(tasks: Sequence[Task], contexts: Sequence[str], shift: int) -> None:
    """Warns before the extraction of queries that cannot be found, and of batches that give the answer away.

    Args:
        tasks: the tasks of a dataset.
        contexts: contexts of the cross-image encoder; empty without it.
        shift: queries in the first batch of the "unaligned" context.

    Raises:
        ValueError: the context is "paired", but queries and database images do not pair up.
    """
    for task in tasks:
        if task.positives is None or task.findable is None:
            continue
        lost = int((~task.findable).sum())
        if lost:
            logger.warning(
                "%s: %d of %d queries have no %sdatabase photo %s; they count as missed, as in published figures",
                task.dataset.name,
                lost,
                int(task.dataset.judged_queries.sum()),
                "correct " * bool(task.positives_file),
                task.rule,
            )
        if contexts:
            _foresee_contexts(task, contexts, shift)


def _foresee_contexts(task: Task, contexts: Sequence[str], shift: int) -> None:
    assert task.positives is not None
    dataset, batch = task.dataset, task.infer_batch_size
    if "paired" in contexts and not pair_up(task.positives, len(dataset.database_paths)):
        raise ValueError(
            f"--encoder_context paired: {dataset.name} has {len(dataset.queries_paths)} queries and "
            f"{len(dataset.database_paths)} database images, which do not pair up one to one in the order of names; "
            "use shuffled"
        )
    same = ""
    if task.test_method == "single_query":
        same = "with --test_method single_query, each query has a batch of its own"
    elif shift % batch == 0:
        same = f"--context_shift {shift} is a multiple of the batch size {batch}"
    elif shift % batch >= len(dataset.queries_paths):
        same = f"{dataset.name} has at most {shift % batch} queries (--context_shift), which share one batch"
    if "unaligned" in contexts and same:
        logger.warning("%s: unaligned is the same as file_order", same)
    if "file_order" in contexts:
        log_alignment(dataset, task.alignment, "--encoder_context file_order unaligned")
