"""Draws curves: of a training run, of recalls, and of the first match."""

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..retrieval import first_matches
from ..retrieval.comparison import wilson_interval
from ..run import metrics
from ..system.files import atomic_write
from ..system.plotting import load_matplotlib

TRAINING = "training.png"


def draw_training(folder: Path) -> None:
    """Draws the loss and the validation recalls in `metrics.csv` by epoch, into `training.png` beside it."""
    matplotlib = load_matplotlib()
    with open(folder / metrics.FILE, newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
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
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    save_figure(figure, folder / TRAINING, dpi=120)


def draw_recalls(
    folder: Path,
    title: str,
    curves: Mapping[str, Sequence[float]],
    ticks: Sequence[int] = (1, 5, 10, 20),
    *,
    queries: int | None = None,
) -> None:
    """Draws recall@N for N = 1, 2, ... of each named curve, in percent, into the run's `recalls.png`.

    Marks the N of `ticks`; those beyond the curves mark their end, which is their recall. With the number of `queries`
    that count, each curve has its 95% interval.
    """
    figure, axes = _recall_axes(title, "N", "recall@N (%)")
    for name, curve in curves.items():
        ranks = range(1, 1 + len(curve))
        axes.plot(ranks, curve, marker="o", markersize=3, label=name)
        if queries:
            low, high = 100 * wilson_interval(np.array(curve) / 100 * queries, queries)
            axes.fill_between(ranks, low, high, alpha=0.15, linewidth=0)
    longest = max(map(len, curves.values()))
    axes.set_xticks(sorted({min(n, longest) for n in ticks}))
    axes.legend(loc="best")
    save_figure(figure, folder / "recalls.png", dpi=120)


def draw_corruptions(folder: Path, title: str, clean: float, recalls: Mapping[str, float], n: int) -> None:
    """Draws recall@n in percent over severity, 0 for `clean` queries, a line for each kind of corruption, into the
    run's `corruptions.png`; the names of `recalls` are like "blur:3"."""
    figure, axes = _recall_axes(title, "severity", f"recall@{n} (%)")
    for kind in dict.fromkeys(name.partition(":")[0] for name in recalls):
        line = {0: clean} | {s: recalls[f"{kind}:{s}"] for s in range(1, 6) if f"{kind}:{s}" in recalls}
        axes.plot([*line], [*line.values()], marker="o", markersize=3, label=kind)
    axes.legend(loc="best", fontsize="small", ncols=2)
    save_figure(figure, folder / "corruptions.png", dpi=120)


def _recall_axes(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    """A figure and its axes, for recall in percent."""
    figure = load_matplotlib().figure.Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 103))
    axes.set_title(drawable(title), parse_math=False)
    axes.grid(alpha=0.3)
    return figure, axes


def draw_first_match(
    folder: Path,
    title: str,
    contexts: Mapping[str, first_matches.FirstMatches],
    accepted_distance: float | None = None,
) -> None:
    """Draws precision and recall of a dataset's first matches, by encoder context, into the run's `first_match.png`.

    Precision is drawn over recall for each context, and both over the accepted distance for the first one.
    """
    figure = load_matplotlib().figure.Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"first match of {drawable(title)}", parse_math=False)
    both, over_distance = figure.subplots(1, 2)
    for number, (name, matches) in enumerate(contexts.items()):
        curve = matches.curve
        if not curve.positives or not len(curve.thresholds):
            continue
        best = [curve.at_precision(percent) for percent in first_matches.PRECISIONS]
        recalls = [0.0 if row is None else curve.recall[row] for row in best]
        label = f"{name}: {', '.join(f'{recall:.1f}' for recall in recalls)}"
        both.plot(curve.recall, curve.precision, color=f"C{number}", linewidth=1.4, label=label)
        for row, mark in zip(best, "oD", strict=True):
            if row is not None:
                both.plot(curve.recall[row], curve.precision[row], mark, color=f"C{number}", markersize=5)
        if not number:  # nothing changes between two distances
            for what, values, line in (("precision", curve.precision, "-"), ("recall", curve.recall, ":")):
                over_distance.plot(curve.thresholds, values, line, color="C0", drawstyle="steps-post", label=what)
    both.set(xlabel="recall (% of queries with a correct photo)", ylabel="precision (%)", xlim=(0, 103), ylim=(0, 103))
    if both.lines:
        heading = "recall at 100% (●) and 99% (◆) precision"
        # Below the axes: the names of five contexts would cover the curves.
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
        both.legend(**below, fontsize="small", title=heading, title_fontsize="small")
    if accepted_distance is not None:
        label = f"--accept {first_matches.written(accepted_distance)}"
        over_distance.axvline(accepted_distance, color="black", linewidth=1, label=label)
    over_distance.set(xlabel=f"accepted squared descriptor distance, {next(iter(contexts))}", ylabel="%", ylim=(0, 103))
    if over_distance.lines:
        over_distance.legend(loc="best", fontsize="small")
    for axes in (both, over_distance):
        axes.grid(alpha=0.3)
    save_figure(figure, folder / "first_match.png", dpi=120)


def drawable(text: str) -> str:
    """The text on one line, without undecodable bytes; draw it with `parse_math=False`, since names may contain $."""
    return " ".join(text.encode(errors="replace").decode().split())


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Writes a PNG, without warnings about characters that matplotlib's font lacks and draws as boxes."""
    with atomic_write(path) as unfinished, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(unfinished, dpi=dpi, format="png")
