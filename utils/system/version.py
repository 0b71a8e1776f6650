"""The version of this repository, and its commit: standard library only."""

import os
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
    # Without what a hook of another repository sets, such as GIT_DIR.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        return subprocess.run(command, cwd=root, env=ours, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"
