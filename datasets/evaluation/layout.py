"""Where a dataset's tree has its splits, and a split its database: standard library only."""

from pathlib import Path


def split_folder(datasets_folder: Path, name: str, split: str) -> Path:
    """The folder of a dataset's split: `<name>/images/<split>`, or else `<name>/<split>`, as MSLS and SF-XL have it."""
    usual, bare = (datasets_folder / name / part / split for part in ("images", ""))
    return bare if bare.is_dir() and not usual.is_dir() else usual


def database_folder(split: Path) -> Path:
    """The folder of a split's database images: `database`, or else `gallery`, as in SVOX."""
    folder = split / "database"
    return split / "gallery" if not folder.is_dir() and (split / "gallery").is_dir() else folder
