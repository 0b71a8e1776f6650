"""Writes what an evaluation found as tables: recalls for the log, predictions, and a submission."""

import csv
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..retrieval import first_matches
from ..system.files import atomic_write


def format_recalls(recalls: Mapping[int, float]) -> str:
    """`R@1: 27.0, R@5: 42.3, ...`"""
    return ", ".join(f"R@{n}: {recall:.1f}" for n, recall in recalls.items())


def recall_table(table: Mapping[str, Mapping[str, Mapping[int, float]]]) -> str:
    """A text table of recalls by dataset and encoder context; a dataset without labels has no row."""
    rows = [(dataset, context, recalls) for dataset, by in table.items() for context, recalls in by.items()]
    if not rows:
        return "no dataset has labels"
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    head = f"{'dataset':{wide[0]}}  {'context':{wide[1]}}" + "".join(f"{f'R@{n}':>7}" for n in rows[0][2])
    lines = [
        f"{dataset:{wide[0]}}  {context:{wide[1]}}" + "".join(f"{recall:7.1f}" for recall in recalls.values())
        for dataset, context, recalls in rows
    ]
    return "\n".join(["", head, *lines])


def write_predictions(
    evaluation: Any,
    located: Any,
    *,
    judged: NDArray[np.bool_] | None,
    metres: NDArray[np.float64] | None,
    accepted_distance: float | None,
) -> None:
    """Writes the run's `predictions.csv`, a row for each query and rank, names byte by byte as on disk.

    Args:
        evaluation: a `test.Evaluation`; predictions of -1 are left out.
        located: its dataset, perhaps with more positions to show.
        judged: for which predictions it is known whether they are correct, Q x k; None without labels.
        metres: distance on the ground from the query to the database image, Q x k, NaN if unknown; None if all are.
        accepted_distance: adds a column for whether the distance is at most this; None adds none.
    """
    positions, database, context = located.database_positions, located.database_paths, evaluation.search.context
    axes = ("latitude", "longitude") if located.geographic else ("east", "north")
    digits = 7 if located.geographic else 2  # centimetres
    with (
        atomic_write(evaluation.folder / "predictions.csv") as path,
        open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        header = ["query", "rank", "database", "squared_descriptor_distance", "correct", "metres"]
        header += [f"database_{axis}" for axis in axes]
        writer.writerow([*header, *["accepted"] * (accepted_distance is not None), "context"])
        for query, name in enumerate(located.queries_paths):
            for rank, image in enumerate(evaluation.predictions[query]):
                if image < 0:
                    continue
                right = int(evaluation.correct[query, rank]) if judged is not None and judged[query, rank] else ""
                away = _number(metres[query, rank], 2) if metres is not None else ""
                place = ["", ""] if positions is None else [_number(value, digits) for value in positions[image]]
                distance = first_matches.written(evaluation.distances[query, rank])
                row = [name, rank + 1, database[image], distance, right, away, *place]
                if accepted_distance is not None:
                    row.append(int(float(distance) <= accepted_distance))
                writer.writerow([*row, context])


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else ""


def write_submission(
    folder: Path, query_keys: Sequence[str], database_keys: Sequence[str], predictions: NDArray[np.int64]
) -> None:
    """Writes the run's `submission.zip` for the MSLS challenge: a line per query, its key and the predicted keys.

    Keys have no spaces; predictions, Q x k database indices, best first, have no -1.
    """
    assert (predictions >= 0).all()
    lines = [
        " ".join([key, *(database_keys[image] for image in row)]) + "\n"
        for key, row in zip(query_keys, predictions, strict=True)
    ]
    with atomic_write(folder / "submission.zip") as path, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("submission.csv", os.fsencode("".join(lines)))
