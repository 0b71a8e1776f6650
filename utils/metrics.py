"""The table of a training run: one row an epoch, nothing in it that a repetition would change."""

import csv
import io
import os
from pathlib import Path
from typing import Any

FILE = "metrics.csv"


def append_row(folder: Path, row: dict[str, Any]) -> None:
    """Adds a row to `metrics.csv`, whole or not at all; the first one gives the columns.

    Raises:
        OSError: it could not be written; the message names the file.
    """
    path = folder / FILE
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row))
    before = path.stat().st_size if path.exists() else 0
    if not before:
        writer.writeheader()
    writer.writerow(row)
    content = text.getvalue().encode()
    try:
        with open(path, "ab", buffering=0) as file:
            if file.write(content) != len(content):
                raise OSError("the disk is full")
            os.fsync(file.fileno())
    except OSError as error:
        if path.exists():
            os.truncate(path, before)
        raise OSError(f"cannot write {path} ({error}); free space and go on with --resume auto") from error


def cut_rows(folder: Path, epochs: int) -> None:
    """Keeps one row for each of the first epochs, for a run that goes on from an older checkpoint."""
    path = folder / FILE
    if not path.exists():
        return
    header, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    columns = header.count(b",")
    rows = {line.split(b",")[0]: line for line in lines if line.count(b",") == columns and line.endswith(b"\n")}
    kept = [rows[number] for number in (str(epoch).encode() for epoch in range(1, 1 + epochs)) if number in rows]
    temporary = path.with_name(f"{FILE}.{os.getpid()}.tmp")
    temporary.write_bytes(b"".join([header, *kept] if kept else []))
    temporary.replace(path)
