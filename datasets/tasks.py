"""What an evaluation is asked for: the sets of queries, their databases, and what counts as correct in them."""

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

from utils.descriptor_store import kept_in
from utils.place_map import PlaceMap

from .alignment import alignment, log_alignment, pair_up
from .database_queries import DatabaseQueries, image_key, readable
from .map_queries import MapQueries
from .photo_files import identity, list_images
from .protocols import protocol_of, warn_of_counts

logger = logging.getLogger(__name__)

PCA_IMAGES = 16_384  # that a PCA is fitted on, at most


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is evaluated, by the names of eval.py's options.

    Attributes:
        queries_of: the folders of queries that are searched in a dataset's database.
        plain_folders: whether two folders of anyone's photos are searched, rather than datasets.
        accept_precision: the precision, in percent, whose distance is found on the val split; None for none.
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
    """One set of queries of a dataset, how it is evaluated, and where the results go.

    Attributes:
        dataset: the queries, and the database that the sets of a dataset share.
        queries: name of the set, "queries" where there is one.
        of: name of the dataset, under which its descriptors are kept.
        test_method: a name from `transforms.TEST_METHODS`.
        positive_distance: a database image this near to a query is correct, in metres.
        positives_file: or what this file says; None for the distance.
        infer_batch_size: images that share a batch in the cross-image encoder.
        subfolder: of the run's folder, where the results go.
        folder: that, once the run has one.
        accepted_distance: matches are accepted up to this squared distance of descriptors, once it is known; None
            where nobody asks for it.
        found_on_val: what that distance gives on the val split, where it was found there.
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
        """What the descriptors of the queries are kept under: of no two sets the same, nor a name of other stores."""
        name = quote(os.fsencode(self.queries), safe="")  # which has no / and no =
        return name if name.startswith("queries") else f"queries={name}"

    @property
    def rule(self) -> str:
        """What makes a database photo correct, in words."""
        return f"as {self.positives_file.name} says" if self.positives_file else f"within {self.positive_distance:g} m"

    @cached_property
    def positives(self) -> Sequence[NDArray[np.int64]] | None:
        """For each query the indices of its correct database images; None without labels."""
        return self.dataset.positives(self.positive_distance) if self.dataset.labelled else None

    @cached_property
    def findable(self) -> NDArray[np.bool_] | None:
        """The queries that have a correct database image, or a position that is not known, Q; None without labels."""
        if self.positives is None:
            return None
        found = np.fromiter((len(of_query) > 0 for of_query in self.positives), bool, len(self.dataset.queries_paths))
        return found | ~self.dataset.judged_queries

    @cached_property
    def alignment(self) -> dict[str, bool | int]:
        """What the batches of the cross-image encoder tell in file order; of a labelled task."""
        assert self.positives is not None
        batch = 1 if self.test_method == "single_query" else self.infer_batch_size  # such a query has no company
        return alignment(self.dataset, self.positives, batch)


def select(asked: Selection, place_map: PlaceMap | None = None) -> list[list[Task]]:
    """The datasets asked for, with a task for each set of queries; the tasks of a dataset share its database.

    Args:
        asked: what is evaluated.
        place_map: the map that is queried instead of a database, if any.

    Raises:
        FileNotFoundError, ValueError: folders, names or labels do not fit what is asked for.
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
    """Each with the name of its protocol."""
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
                f"--descriptors_folder would keep two of {', '.join(name for name, _ in found)} in one folder; take "
                "one at a time, each with a folder of its own"
            )
    return found


def _require_keys(asked: Selection, dataset: DatabaseQueries) -> None:
    paths = dataset.queries_paths + dataset.database_paths if asked.save_submission else []
    if not all(len(image_key(path).split()) == 1 for path in paths):
        raise ValueError(
            f"--save_submission: some file names of {dataset.name} have no image key without spaces, the seventh "
            "field of @east@north@zone@letter@lat@lon@key@...; use a tree with such names"
        )


def positive_distance(asked: Selection, name: str) -> float:
    """How near a correct database image of a dataset is, in metres.

    Raises:
        ValueError: `positive_frames` are asked of positions that do not count frames.
    """
    protocol = protocol_of(name)
    if asked.val_positive_dist_threshold is not None:
        return asked.val_positive_dist_threshold
    frames = protocol.frames if asked.positive_frames is None else asked.positive_frames
    if frames is None:
        return protocol.positive_distance
    if protocol.metres_a_frame is None:
        raise ValueError(f"--positive_frames: the positions of {name} do not count frames; use metres")
    return (frames + 0.5) * protocol.metres_a_frame  # half-way to the first frame too far


def require_folders_of_their_own(tasks: Sequence[Task]) -> None:
    """Raises ValueError if the results of two tasks would go to one folder."""
    names: dict[str, Task] = {}
    for task in tasks:
        other = names.setdefault(task.subfolder, task)
        if other is not task:
            raise ValueError(
                f"the results of {other.dataset.name} and {task.dataset.name} would go to one folder, "
                f"{task.subfolder}; evaluate one after the other"
            )


def val_task(asked: Selection, group: Sequence[Task]) -> Task | None:
    """What `--accept auto@P` finds the distance on: the val split beside a test split; None where nobody asks for it.

    Args:
        asked: what is evaluated.
        group: the tasks of the dataset's test split.

    Raises:
        ValueError: there is no val split that can be used.
    """
    if asked.accept_precision is None:
        return None
    name = group[0].of.removesuffix(" test")
    folder = asked.eval_datasets_folder / name / "images" / "val"
    remedy = f"put one into {folder}, or give --accept a distance"
    if not folder.is_dir():
        raise ValueError(f"--accept {asked.accept} is found on the val split, and {name} has none; {remedy}")
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
        raise ValueError(f"--accept {asked.accept} is found on the val split of {name}: {error}; {remedy}") from error
    test_queries = [path for task in group for path in task.dataset.queries_paths]
    tested = set(map(identity, test_queries))
    if any(identity(path) in tested for path in val.queries_paths):
        raise ValueError(
            f"--accept {asked.accept}: queries of the val split of {name} are those of the test split, whose own "
            f"distance would flatter it; {remedy}"
        )
    named = set(map(os.path.basename, test_queries)) & set(map(os.path.basename, val.queries_paths))
    if named:
        logger.warning(
            "%s: %d queries have the names of queries of the test split, e.g. %s; if they are the same photos, what "
            "--accept %s finds flatters it",
            val.name,
            len(named),
            min(named),
            asked.accept,
        )
    return replace(group[0], dataset=val, queries="queries", of=val.name)


def pca_images(asked: Selection, descriptor_dim: int) -> list[str]:
    """The images that a PCA is fitted on, in random order; none where none is asked for.

    Args:
        asked: what is evaluated.
        descriptor_dim: numbers in a descriptor before the PCA.

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
            f"{len(chosen)} images; use no more than the smaller of the two"
        )
    return list(chosen.tolist())


def foresee_recalls(tasks: Sequence[Task], contexts: Sequence[str], shift: int) -> None:
    """Says before the extraction what recalls will tell: queries that cannot be found, and batches that give the
    answer away.

    Args:
        tasks: of a dataset.
        contexts: of the cross-image encoder; none without it.
        shift: queries in the first batch of the "unaligned" context.

    Raises:
        ValueError: the "paired" context is asked for, and queries and database images do not pair up.
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
            "take shuffled"
        )
    same = ""
    if task.test_method == "single_query":
        same = "queries share a batch with none by --test_method single_query"
    elif shift % batch == 0:
        same = f"--context_shift {shift} is whole batches of {batch}"
    elif shift % batch >= len(dataset.queries_paths):
        same = f"{dataset.name} has no more than {shift % batch} queries, --context_shift, which share one batch"
    if "unaligned" in contexts and same:
        logger.warning("%s: unaligned is file_order then", same)
    if "file_order" in contexts:
        log_alignment(dataset, task.alignment, "--encoder_context file_order unaligned")
