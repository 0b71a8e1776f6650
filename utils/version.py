"""The version of this repository, which the file VERSION holds: standard library only."""

from pathlib import Path


def version() -> str:
    """As in the file; "unknown" where it was left behind."""
    try:
        return (Path(__file__).parents[1] / "VERSION").read_text().strip()
    except OSError:
        return "unknown"
