"""What a run looks like, as pictures."""

import csv
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
    recall.legend(loc="lower right")
    for axes in (loss, recall):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    figure.savefig(folder / TRAINING, dpi=120)
