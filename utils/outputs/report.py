"""Draws curves and writes tables and predictions of a run."""

import csv
import logging
import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..retrieval import acceptance
from ..run import metrics
from ..system.files import whole

logger = logging.getLogger(__name__)

TRAINING = "training.png"


def draw_training(folder: Path) -> None:
    """Draws the loss and the validation recalls in `metrics.csv` by epoch, into `training.png` beside it."""
    from matplotlib.figure import Figure  # takes a quarter of a second to import
    from matplotlib.ticker import MaxNLocator

    with open(folder / metrics.FILE, newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, recall = figure.subplots(1, 2)
    losses = [float(row["loss"]) for row in rows]
    loss.plot(epochs, losses, marker="o", markersize=3, color="black")
    loss.set(xlabel="epoch", ylabel="mean loss", ylim=(0, 1.05 * max(losses) or 1), title="training")
    for column in rows[0]:
        if column.startswith("R@"):
            recall.plot(epochs, [float(row[column]) for row in rows], marker="o", markersize=3, label=column)
    recall.set(xlabel="epoch", ylabel="recall@N (%)", ylim=(0, 103), title="validation")
    recall.legend(loc="best")
    for axes in (loss, recall):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    with whole(folder / TRAINING) as path:
        save_figure(figure, path, dpi=120)


def draw_recalls(
    folder: Path, title: str, curves: Mapping[str, Sequence[float]], ticks: Sequence[int] = (1, 5, 10, 20)
) -> None:
    """Draws recall@N for N = 1, 2, ... of each named curve, in percent, into `recalls.png`.

    Args:
        folder: the run's folder.
        title: title of the figure.
        curves: curves by name.
        ticks: values of N to mark; those beyond the curves mark their end, which is their recall.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(range(1, 1 + len(curve)), curve, marker="o", markersize=3, label=name)
    axes.set(xlabel="N", ylabel="recall@N (%)", ylim=(0, 103))
    axes.set_title(drawable(title), parse_math=False)
    longest = max(map(len, curves.values()))
    axes.set_xticks(sorted({min(n, longest) for n in ticks}))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    with whole(folder / "recalls.png") as path:
        save_figure(figure, path, dpi=120)


def draw_first_match(
    folder: Path,
    title: str,
    contexts: Mapping[str, acceptance.FirstMatches],
    accepted_distance: float | None = None,
) -> None:
    """Draws precision and recall of the first match into `first_match.png`.

    Precision is drawn over recall for each encoder context, and both over the accepted distance for the first one.

    Args:
        folder: the run's folder.
        title: name of the dataset, for the title.
        contexts: first matches by context.
        accepted_distance: distance to mark; None marks none.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"first match of {drawable(title)}", parse_math=False)
    both, over_distance = figure.subplots(1, 2)
    marks = dict(zip(acceptance.PRECISIONS, "oD", strict=True))
    for number, (name, matches) in enumerate(contexts.items()):
        for criterion, curve, line, inside in (
            ("distance", acceptance.distance_curve(matches), "-", f"C{number}"),
            ("ratio", acceptance.ratio_curve(matches), "--", "white"),
        ):
            if curve is None or not curve.positives or not len(curve.thresholds):
                continue
            best = {percent: curve.at_precision(percent) for percent in marks}
            recalls = [0.0 if row is None else curve.recall[row] for row in best.values()]
            label = f"{name}, {criterion}: {', '.join(f'{recall:.1f}' for recall in recalls)}"
            both.plot(curve.recall, curve.precision, line, color=f"C{number}", linewidth=1.4, label=label)
            for percent, row in best.items():
                if row is not None:
                    point = curve.recall[row], curve.precision[row]
                    both.plot(*point, marks[percent], color=f"C{number}", markerfacecolor=inside, markersize=5)
    both.set(xlabel="recall (% of queries with a correct photo)", ylabel="precision (%)", xlim=(0, 103), ylim=(0, 103))
    if both.lines:
        both.legend(
            loc="best", fontsize="small", title="recall at 100% (●) and 99% (◆) precision", title_fontsize="small"
        )
    name, matches = next(iter(contexts.items()))
    curve = acceptance.distance_curve(matches)
    if curve.positives and len(curve.thresholds):
        # Nothing changes between two distances.
        for what, values, line in (("precision", curve.precision, "-"), ("recall", curve.recall, ":")):
            over_distance.plot(curve.thresholds, values, line, color="C0", drawstyle="steps-post", label=what)
    if accepted_distance is not None:
        label = f"--accept {acceptance.written(accepted_distance)}"
        last = curve.thresholds[-1] if len(curve.thresholds) else accepted_distance
        over_distance.axvline(min(accepted_distance, 1.05 * last), color="black", linewidth=1, label=label)
    over_distance.set(xlabel=f"accepted squared descriptor distance, {name}", ylabel="%", ylim=(0, 103))
    if over_distance.lines:
        over_distance.legend(loc="best", fontsize="small")
    for axes in (both, over_distance):
        axes.grid(alpha=0.3)
    with whole(folder / "first_match.png") as path:
        save_figure(figure, path, dpi=120)


def drawable(text: str) -> str:
    """The text on one line, with undecodable bytes replaced: matplotlib refuses to draw them.

    Use it with `parse_math=False`, since names may contain dollar signs.
    """
    return " ".join(text.encode(errors="replace").decode().split())


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Writes a PNG, without warnings about characters that matplotlib's font lacks and draws as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(path, dpi=dpi, format="png")


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
    folder: Path,
    queries: Sequence[str],
    database: Sequence[str],
    predictions: NDArray[np.int64],
    distances: NDArray[np.float32],
    *,
    correct: NDArray[np.bool_] | None = None,
    judged: NDArray[np.bool_] | None = None,
    metres: NDArray[np.float64] | None = None,
    positions: NDArray[np.float64] | None = None,
    geographic: bool = False,
    accepted_distance: float | None = None,
) -> None:
    """Writes `predictions.csv`, a row for each query and rank; unknown fields are left empty.

    Names are written byte by byte as on disk, so that a name that is not UTF-8 is kept.

    Args:
        folder: the run's folder.
        queries: Q paths.
        database: N paths.
        predictions: Q x k database indices, best first; -1 is left out.
        distances: squared L2 distances of the descriptors, Q x k.
        correct: which predictions are correct, Q x k; None if unknown.
        judged: for which of them this is known, Q x k; None for all.
        metres: distance on the ground from the query to the database image, Q x k; NaN if unknown.
        positions: positions of the database, N x 2; UTM east and north in metres.
        geographic: whether positions are latitude and longitude in degrees instead.
        accepted_distance: adds a column for whether the distance is at most this; None adds none.
    """
    axes = ("database_latitude", "database_longitude") if geographic else ("database_east", "database_north")
    digits = 7 if geographic else 2  # centimetres
    with (
        whole(folder / "predictions.csv") as path,
        open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        header = ["query", "rank", "database", "squared_descriptor_distance", "correct", "metres", *axes]
        writer.writerow(header if accepted_distance is None else [*header, "accepted"])
        for query, name in enumerate(queries):
            for rank, image in enumerate(predictions[query]):
                if image < 0:
                    continue
                known = judged is None or judged[query, rank]
                right = int(correct[query, rank]) if correct is not None and known else ""
                away = _number(metres[query, rank], 2) if metres is not None else ""
                place = ["", ""] if positions is None else [_number(value, digits) for value in positions[image]]
                distance = acceptance.written(distances[query, rank])
                row = [name, rank + 1, database[image], distance, right, away, *place]
                if accepted_distance is not None:
                    row.append(int(float(distance) <= accepted_distance))
                writer.writerow(row)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else ""


def write_paths(path: Path, images: Sequence[str]) -> None:
    """Writes a list of paths, one per line; a line break in a path is written as \\n, so that line n is image n."""
    lines = [image.replace("\n", "\\n").replace("\r", "\\r") for image in images]
    broken = [image for image, line in zip(images, lines, strict=True) if image != line]
    if broken:
        logger.warning("%s: line breaks in %d paths are written as \\n, e.g. %r", path.name, len(broken), broken[0])
    path.write_bytes(os.fsencode("".join(f"{line}\n" for line in lines)))


def write_submission(
    folder: Path, query_keys: Sequence[str], database_keys: Sequence[str], predictions: NDArray[np.int64]
) -> None:
    """Writes `submission.zip` for the MSLS challenge: a csv with a line per query, its key and the predicted keys.

    Args:
        folder: the run's folder.
        query_keys: Q keys without spaces.
        database_keys: N keys, likewise.
        predictions: Q x k database indices, best first, without -1.
    """
    assert (predictions >= 0).all()
    lines = [
        " ".join([key, *(database_keys[image] for image in row)]) + "\n"
        for key, row in zip(query_keys, predictions, strict=True)
    ]
    with whole(folder / "submission.zip") as path, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("submission.csv", os.fsencode("".join(lines)))
