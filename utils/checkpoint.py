"""Checkpoints: written whole or not at all."""

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain values to a temporary file beside `path`, then moves it into place.

    A run that dies while writing so leaves the file that was there before.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
