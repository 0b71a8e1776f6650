"""The table of a training run: one row an epoch, nothing in it that a repetition would change."""

import csv
from pathlib import Path
from typing import Any

FILE = "metrics.csv"


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Adds a row to `metrics.csv`; the first one gives the columns."""
    new = not (folder / FILE).exists()
    with open(folder / FILE, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def cut_rows(folder: Path, epochs: int) -> None:
    """Drops what lies beyond the given number of epochs, for a run that goes on from an older checkpoint."""
    path = folder / FILE
    if epochs == 0:
        path.unlink(missing_ok=True)  # the header may be half-written
    elif path.exists():
        temporary = path.with_name(FILE + ".tmp")
        temporary.write_text("".join(path.read_text().splitlines(keepends=True)[: 1 + epochs]))
        temporary.replace(path)
