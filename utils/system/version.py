"""The version of this repository, and its commit: standard library only."""

import subprocess
from pathlib import Path


def version() -> str:
    """The version in the file; "unknown" if it is missing."""
    try:
        return (Path(__file__).parents[2] / "VERSION").read_text().strip()
    except OSError:
        return "unknown"


def git_revision() -> str:
    """The checked-out commit, followed by "-dirty" if files differ; "unknown" without git, or in another repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"
