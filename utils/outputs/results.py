"""What an evaluation writes besides `results.json`: tables, pictures, pages, and files for other programs."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..retrieval import first_matches
from ..run import checkpoint
from ..system.files import Outputs, absolute, atomic_write
from . import figures, match_page, pairs, tables
from .assignments import draw_assignments

logger = logging.getLogger(__name__)


def write_outputs(
    evaluation: Any,
    wanted: Any,
    failures: Outputs,
    *,
    protocol: Any,
    search: Any,
    exif: bool,
    image_key: Callable[[str], str],
    read: Callable[[str], Image.Image | None],
    assigned: Callable[[str], tuple[NDArray[np.uint8], NDArray[np.float32]]],
) -> None:
    """Writes the wanted outputs of a query set, the page of matches last. One that fails does not affect the others.

    Args:
        evaluation: a `test.Evaluation`.
        wanted, protocol, search: the groups of options; `wanted` is `outputs`.
        failures: collects what cannot be written.
        exif: whether positions to show may come from EXIF data.
        image_key: returns the image key of a path, for the submission.
        read: returns a photo for the page; None if it is missing.
        assigned: returns a photo, H x W x 3 bytes, and the soft assignment of its patches, (K+G) x h x w.
    """
    folder, query_set, searched, accept = evaluation.folder, evaluation.query_set, evaluation.search, search.accept
    dataset = located = query_set.dataset
    queries, database, predictions = dataset.queries_paths, dataset.database_paths, evaluation.predictions
    sides = {"database": database, query_set.store: queries}
    judged = None if evaluation.correct is None else dataset.judged(predictions)
    with failures.writing(f"positions in {folder / 'predictions.csv'}"):
        located = dataset.located(exif=exif)
    metres = located.metres(predictions)
    with failures.writing(str(folder / "predictions.csv")):
        tables.write_predictions(evaluation, located, judged=judged, metres=metres, accepted_distance=accept)
    if evaluation.curves:
        with failures.writing(str(folder / "recalls.png")):
            counted = int(dataset.judged_queries.sum())
            figures.draw_recalls(folder, dataset.name, evaluation.curves, protocol.recall_values, queries=counted)
        with failures.writing(str(folder / "first_match.png")):
            figures.draw_first_match(folder, dataset.name, evaluation.first_matches, accept)
    if wanted.save_submission:
        with failures.writing(str(folder / "submission.zip")):
            tables.write_submission(folder, list(map(image_key, queries)), list(map(image_key, database)), predictions)
    if wanted.save_pairs:
        with failures.writing(str(folder / pairs.PAIRS)):
            pairs.write_pairs(folder, queries, database, predictions[:, : wanted.save_pairs])
    if wanted.save_h5:
        with failures.writing(str(folder / pairs.DESCRIPTORS)):
            pairs.write_h5(folder, {name: (paths, searched.chunks(name)) for name, paths in sides.items()})
    if searched.pca is not None and searched.pca.images is not None:
        with failures.writing(str(folder / "pca.pth")):
            facts = {"dim": protocol.pca_dim, "whiten": protocol.pca_whiten, "images": str(protocol.pca_dataset_folder)}
            facts |= {"weights": evaluation.results["weights"], "resize": list(evaluation.results["resize"])}
            facts |= {"context": searched.context, "count": searched.pca.images}
            checkpoint.save(folder / "pca.pth", {**searched.pca.tensors(), "pca": facts})
    if wanted.save_descriptors:
        with failures.writing(str(folder / "descriptors")):
            searched.save(folder / "descriptors", **sides)
    if wanted.save_assignments:
        with failures.writing(str(folder / "assignments")):
            _write_assignments(evaluation, judged, wanted.save_assignments, failures, assigned)
    if wanted.save_predictions:
        title = str(dataset)
        if recalls := evaluation.recalls.get(searched.context):
            encoder = "alignment" in evaluation.results  # without one, all contexts are the same
            title += f", {searched.context}" * encoder + f", {tables.format_recalls(recalls)}"
        # A PCA, an index and a mean over crops change the norm or the distances.
        normalised = protocol.pca_whiten if protocol.pca_dim else query_set.test_method != "five_crops"
        unit = normalised and query_set.test_method != "maj_voting" and search.index is None
        accepted_rule = ""
        if accept is not None:
            accepted_rule = f"squared descriptor distance up to {first_matches.written(accept)}"
            accepted_rule += f", a similarity of {1 - accept / 2:.3f} or more" * unit
        with failures.writing(str(folder / "matches")), atomic_write(folder / "matches") as unfinished:
            match_page.write_match_page(
                unfinished,
                title=title,
                queries=queries,
                database=database,
                predictions=predictions,
                correct=evaluation.correct,
                judged=judged,
                metres=metres,
                read=read,
                similarity=1 - evaluation.distances.astype(np.float64) / 2 if unit else None,
                rule=query_set.rule,
                has_positive=query_set.has_positive,
                accepted=None if accept is None else first_matches.accepted(evaluation.distances, accept),
                accepted_rule=accepted_rule,
                shown=wanted.save_predictions,
                metres_to=lambda query: located.metres_to(query, np.arange(len(database))),
            )
        if (page := folder / "matches/index.html").exists():
            logger.info("open in a browser: %s", Path(absolute(str(page))).as_uri())


def mean_over_corruptions(evaluations: Sequence[Any]) -> dict[str, dict[str, dict[int, float]]]:
    """Logs and returns the mean recall over the corruptions of each query set, `{dataset: {context: {N: percent}}}`."""
    means: dict[str, dict[str, dict[int, float]]] = {}
    for clean, corrupted in _corrupted_sets(evaluations):
        name = clean.query_set.dataset.name
        for context, recalls in clean.recalls.items():
            mean = {n: float(np.mean([each.recalls[context][n] for each in corrupted])) for n in recalls}
            means.setdefault(name, {})[context] = mean
            words = tables.format_recalls(mean)
            logger.info("mean over corruptions (%d) of %s, %s: %s", len(corrupted), name, context, words)
    return means


def draw_corruptions(evaluations: Sequence[Any], failures: Outputs) -> None:
    """Draws recall over severity for each query set with labels, in the first context."""
    for clean, corrupted in _corrupted_sets(evaluations):
        folder, context = clean.folder.parent, clean.search.context
        if recalls := clean.recalls.get(context):
            n, title = min(recalls), f"{clean.query_set.dataset.name}, {context}"
            severities = {each.query_set.corruption: each.recalls[context][n] for each in corrupted}
            with failures.writing(str(folder / "corruptions.png")):
                figures.draw_corruptions(folder, title, recalls[n], severities, n)


def _corrupted_sets(evaluations: Sequence[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """The clean evaluation of each query set, and those of its corruptions, which lie in one folder, it first."""
    for _, (clean, *corrupted) in groupby(evaluations, key=lambda evaluation: evaluation.folder.parent):
        yield clean, corrupted


def _write_assignments(
    evaluation: Any,
    judged: NDArray[np.bool_] | None,
    count: int,
    failures: Outputs,
    assigned: Callable[[str], tuple[NDArray[np.uint8], NDArray[np.float32]]],
) -> None:
    """Draws the soft assignment of some queries, spread over all of them, and of their first matches."""
    folder: Path = evaluation.folder / "assignments"
    dataset, predictions, correct = evaluation.query_set.dataset, evaluation.predictions, evaluation.correct
    folder.mkdir()
    for query in np.linspace(0, len(predictions) - 1, min(count, len(predictions))).round().astype(int):
        with failures.writing(str(folder / f"{query:06d}.png")):
            match, verdict = predictions[query, 0], ""
            if correct is not None and judged is not None and judged[query, 0]:
                verdict = ", correct" if correct[query, 0] else ", wrong"
            shown = {f"query {query}": dataset.queries_paths[query]}
            if match >= 0:  # an approximate index may find nothing
                shown[f"first match{verdict}"] = dataset.database_paths[match]
            photos = [(f"{title}: {os.path.basename(path)}", *assigned(path)) for title, path in shown.items()]
            ghosts = evaluation.results["model"].get("ghost_clusters", 1)
            draw_assignments(folder / f"{query:06d}.png", photos, ghost_clusters=ghosts)
    logger.info("soft assignments of %d queries: %s", len(list(folder.glob("*.png"))), folder)
