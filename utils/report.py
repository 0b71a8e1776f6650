"""What a run looks like: curves, tables, predictions."""

import csv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from . import metrics

TRAINING = "training.png"


def draw_training(folder: Path) -> None:
    """Draws the loss and the validation recalls of `metrics.csv`, epoch by epoch, into `training.png` beside it."""
    with open(folder / metrics.FILE, newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, recall = figure.subplots(1, 2)
    losses = [float(row["loss"]) for row in rows]
    loss.plot(epochs, losses, marker="o", markersize=3, color="black")
    loss.set(xlabel="epoch", ylabel="mean loss", ylim=(0, 1.05 * max(losses)), title="training")
    for column in rows[0]:
        if column.startswith("R@"):
            recall.plot(epochs, [float(row[column]) for row in rows], marker="o", markersize=3, label=column)
    recall.set(xlabel="epoch", ylabel="recall@N (%)", ylim=(0, 103), title="validation")
    recall.legend(loc="best")
    for axes in (loss, recall):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    figure.savefig(folder / TRAINING, dpi=120)


def draw_recalls(folder: Path, title: str, curves: Mapping[str, Sequence[float]]) -> None:
    """Draws recall@N for N = 1, 2, ... of each named curve, in percent, into `recalls.png`."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(range(1, 1 + len(curve)), curve, marker="o", markersize=3, label=name)
    axes.set(xlabel="N", ylabel="recall@N (%)", ylim=(0, 103), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(folder / "recalls.png", dpi=120)


def recall_table(table: Mapping[str, Mapping[str, Mapping[int, float]]]) -> str:
    """Recalls by dataset and encoder context as lines of text; a dataset without labels has no row."""
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
    folder: Path,
    queries: Sequence[str],
    database: Sequence[str],
    predictions: NDArray[np.int64],
    distances: NDArray[np.float32],
    correct: NDArray[np.bool_] | None,
    judged: NDArray[np.bool_] | None = None,
) -> None:
    """Writes `predictions.csv`: query, rank from 1, database image, squared L2 distance, correct (1, 0 or empty).

    Args:
        folder: the run's.
        queries: Q paths.
        database: N paths.
        predictions: Q x k database indices, best first; -1 is left out.
        distances: of the descriptors, Q x k.
        correct: Q x k, None where it is not known.
        judged: of which of them it is known, Q x k; None for all.
    """
    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "rank", "database", "squared_distance", "correct"])
        for query, path in enumerate(queries):
            for rank, image in enumerate(predictions[query]):
                if image >= 0:
                    unknown = correct is None or (judged is not None and not judged[query, rank])
                    right = "" if correct is None or unknown else int(correct[query, rank])
                    writer.writerow([path, rank + 1, database[image], f"{distances[query, rank]:.6g}", right])


def write_submission(
    folder: Path, query_keys: Sequence[str], database_keys: Sequence[str], predictions: NDArray[np.int64]
) -> None:
    """Writes `submission.zip` for the MSLS challenge: a csv with a line a query, its key and the predicted keys."""
    lines = [
        " ".join([key, *(database_keys[image] for image in row if image >= 0)]) + "\n"
        for key, row in zip(query_keys, predictions, strict=True)
    ]
    with zipfile.ZipFile(folder / "submission.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("submission.csv", "".join(lines))
