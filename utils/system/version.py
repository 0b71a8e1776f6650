"""The version of this repository, from the file VERSION: standard library only."""

from pathlib import Path


def version() -> str:
    """The version in the file; "unknown" if it is missing."""
    try:
        return (Path(__file__).parents[2] / "VERSION").read_text().strip()
    except OSError:
        return "unknown"
