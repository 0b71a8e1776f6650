"""What an evaluation writes besides `results.json`: tables, pictures, pages, and files for other programs."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..retrieval import acceptance
from ..retrieval.contexts import Search
from ..run import checkpoint
from ..system.files import Outputs, whole
from . import match_page, pairs, report
from .assignments import AssignedPhoto, draw_assignments

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to write; fields are named like eval.py's options, and 0 matches or queries means none."""

    recall_values: tuple[int, ...]
    ghost_clusters: int
    save_predictions: int
    save_assignments: int
    save_descriptors: bool
    save_submission: bool
    save_pairs: int
    save_h5: bool
    save_map: Path | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found for one query set, and all that is needed to write it.

    Attributes:
        folder: folder to write to.
        dataset: name of the dataset.
        title: title of the page of matches.
        store: name of the queries' descriptors.
        search: the search that found it; it has the descriptors.
        queries: Q paths.
        database: N paths.
        predictions: Q x k database indices, best first; -1 is none.
        distances: squared L2 distances of the descriptors, Q x k.
        unit: whether the descriptors have unit norm, so that their distance gives the cosine.
        correct: which predictions are correct, Q x k; None without labels.
        judged: for which of them this is known, Q x k; None without labels.
        metres: distance from the query to the database image, Q x k; None without positions.
        positions: positions of the database, N x 2; None if none is known.
        geographic: whether positions are latitude and longitude rather than UTM metres.
        findable: the queries that have a correct image, Q; None without labels.
        rule: the rule by which a match is correct, in words.
        curves: recall@N in percent for N = 1, 2, ... by encoder context.
        first_matches: the facts by which first matches are accepted, by context.
        accepted_distance: matches are accepted up to this squared distance; None if the options set none.
        pca: facts about the fitted PCA, if any.
        key: returns the image key of a path, for the submission.
        read: returns a photo for the page; None if it is missing.
        assigned: returns a photo, H x W x 3 bytes, and the soft assignment of its patches, (K+G) x h x w.
    """

    folder: Path
    dataset: str
    title: str
    store: str
    search: Search
    queries: Sequence[str]
    database: Sequence[str]
    predictions: NDArray[np.int64]
    distances: NDArray[np.float32]
    unit: bool
    correct: NDArray[np.bool_] | None
    judged: NDArray[np.bool_] | None
    metres: NDArray[np.float64] | None
    positions: NDArray[np.float64] | None
    geographic: bool
    findable: NDArray[np.bool_] | None
    rule: str
    curves: Mapping[str, Sequence[float]]
    first_matches: Mapping[str, acceptance.FirstMatches]
    accepted_distance: float | None
    pca: Mapping[str, Any] | None
    key: Callable[[str], str]
    read: Callable[[str], Image.Image | None]
    assigned: Callable[[str], tuple[NDArray[np.uint8], NDArray[np.float32]]]


def write(found: Found, wanted: Wanted, outputs: Outputs) -> None:
    """Writes the wanted outputs, the page of matches last.

    Args:
        found: what was found for a query set.
        wanted: what to write.
        outputs: collects what cannot be written.
    """
    folder, predictions = found.folder, found.predictions
    sides = {"database": found.database, found.store: found.queries}
    with outputs.writing(str(folder / "predictions.csv")):
        report.write_predictions(
            folder,
            found.queries,
            found.database,
            predictions,
            found.distances,
            correct=found.correct,
            judged=found.judged,
            metres=found.metres,
            positions=found.positions,
            geographic=found.geographic,
            accepted_distance=found.accepted_distance,
        )
    if found.curves:
        with outputs.writing(str(folder / "recalls.png")):
            report.draw_recalls(folder, found.dataset, found.curves, wanted.recall_values)
        with outputs.writing(str(folder / "first_match.png")):
            report.draw_first_match(folder, found.dataset, found.first_matches, found.accepted_distance)
    if wanted.save_submission:
        with outputs.writing(str(folder / "submission.zip")):
            query_keys, database_keys = ([found.key(path) for path in side] for side in (found.queries, found.database))
            report.write_submission(folder, query_keys, database_keys, predictions)
    if wanted.save_pairs:
        with outputs.writing(str(folder / pairs.PAIRS)):
            pairs.write_pairs(folder, found.queries, found.database, predictions[:, : wanted.save_pairs])
    if wanted.save_h5:
        with outputs.writing(str(folder / pairs.DESCRIPTORS)):
            described = {name: (paths, found.search.chunks(name)) for name, paths in sides.items()}
            pairs.write_h5(folder, described)
    if found.pca is not None:
        with outputs.writing(str(folder / "pca.pth")):
            facts = {**found.pca, "count": found.search.pca.n_samples_}
            checkpoint.save(folder / "pca.pth", {**found.search.projection(), "pca": facts})
    if wanted.save_descriptors:
        with outputs.writing(str(folder / "descriptors")):
            found.search.save(folder / "descriptors", **sides)
    if wanted.save_assignments:
        with outputs.writing(str(folder / "assignments")):
            _write_assignments(found, wanted, outputs)
    if wanted.save_predictions:
        with outputs.writing(str(folder / "matches")):
            _write_page(found, wanted.save_predictions)


def _write_assignments(found: Found, wanted: Wanted, outputs: Outputs) -> None:
    """Draws the soft assignment of some queries, spread over all of them, and of their first matches."""
    folder, predictions, correct = found.folder / "assignments", found.predictions, found.correct
    folder.mkdir()
    count = min(wanted.save_assignments, len(predictions))
    for query in np.linspace(0, len(predictions) - 1, count).round().astype(int):
        with outputs.writing(str(folder / f"{query:06d}.png")):
            match = predictions[query, 0]
            shown = [(f"query {query}", found.queries[query])]
            if match >= 0:  # an approximate index may find nothing
                judged = correct is not None and found.judged is not None and found.judged[query, 0]
                verdict = "" if correct is None or not judged else ", correct" if correct[query, 0] else ", wrong"
                shown.append((f"first match{verdict}", found.database[match]))
            photos = []
            for title, path in shown:
                pixels, assignment = found.assigned(path)
                title = f"{title}: {os.path.basename(path)}"
                photos.append(AssignedPhoto(title=title, pixels=pixels, assignment=assignment))
            draw_assignments(folder / f"{query:06d}.png", photos, ghost_clusters=wanted.ghost_clusters)
    logger.info("soft assignments of %d queries: %s", len(list(folder.glob("*.png"))), folder)


def _write_page(found: Found, count: int) -> None:
    """Writes the page of each query and its first `count` matches."""
    first = np.s_[:, :count]
    accepted = None
    if found.accepted_distance is not None:
        accepted = acceptance.accepted(found.distances[first], found.accepted_distance)
    with whole(found.folder / "matches") as unfinished:
        match_page.write_match_page(
            unfinished,
            title=found.title,
            queries=found.queries,
            database=found.database,
            predictions=found.predictions[first],
            correct=None if found.correct is None else found.correct[first],
            judged=None if found.judged is None else found.judged[first],
            metres=None if found.metres is None else found.metres[first],
            read=found.read,
            similarity=1 - found.distances[first].astype(np.float64) / 2 if found.unit else None,
            rule=found.rule,
            findable=found.findable,
            accepted=accepted,
            accepted_rule=f"squared descriptor distance up to {found.accepted_distance}",
        )
    logger.info("open in a browser: %s", (found.folder / "matches/index.html").absolute().as_uri())
