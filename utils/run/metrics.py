"""The table of a training run: one row per epoch, with nothing that differs when the run is repeated."""

import csv
import io
import logging
from pathlib import Path
from typing import Any

from ..system.files import write_durably

logger = logging.getLogger(__name__)

FILE = "metrics.csv"


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Adds a row to `metrics.csv`, completely or not at all; the first row defines the columns."""
    path = folder / FILE
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row))
    before = path.read_bytes() if path.exists() else b""
    if not before:
        writer.writeheader()
    writer.writerow(row)
    write_durably(path, lambda file: file.write(before + text.getvalue().encode()))


def cut_rows(folder: Path, epochs: int) -> None:
    """Keeps one row for each of the first epochs, for a run that resumes from an older checkpoint."""
    path = folder / FILE
    if not path.exists():
        return
    content = path.read_bytes()  # empty, or with half a line, in a run of 1.0.0 that was killed
    header, *lines = content.splitlines(keepends=True) or [b""]
    columns = header.count(b",")
    rows = {line.split(b",")[0]: line for line in lines if line.count(b",") == columns and line.endswith(b"\n")}
    kept = [rows[number] for number in (b"%d" % epoch for epoch in range(1, 1 + epochs)) if number in rows]
    if len(kept) < epochs:
        logger.warning("%s lacks rows for %d of the %d epochs so far", path, epochs - len(kept), epochs)
    wanted = b"".join([header, *kept]) if header.endswith(b"\n") else b""
    if wanted != content:
        write_durably(path, lambda file: file.write(wanted))
