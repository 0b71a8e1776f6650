"""The tables of the pages, written from the records in benchmarks/results.

    python -m benchmarks.tables            # writes each table between its markers
    python -m benchmarks.tables --check    # writes nothing; names what differs from its records, exit status 1
    python -m benchmarks.tables --add corridor_plain logs/default/<time>/results.json

A record is a JSON file. Its `kind` is `measured` where a run of this repository left it, with options, versions, device
and git revision; `published` where the figures are other people's; `noted` where they are ours and no record of the run
is left. The last two name their `source`.

tables.md has each table with fields of `str.format` in place of the figures, `{record[key][key]:format}`, where a
format of numbers such as `1 5 10` stands for the cells of recall@N, and a list is joined by commas. A page shows it
between `<!-- table: name -->` and `<!-- end -->`. Figures within sentences are written by hand.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets.evaluation.protocols import PROTOCOLS

ROOT = Path(__file__).parents[1]
RESULTS, DEFINITIONS = "benchmarks/results", "benchmarks/tables.md"
PAGES = ("README.md", "REPRODUCE.md", "benchmarks/README.md", "docs/*.md")
TABLE = re.compile(r"^(<!-- table: (\S+) -->\n)(.*?)^(<!-- end -->)$", re.DOTALL | re.MULTILINE)


class Record(dict[Any, Any]):
    """What is in braces in a JSON file. The format `1 5 10` gives the percentages under these keys, a cell each."""

    def __format__(self, keys: str) -> str:
        return " | ".join(f"{self[int(key)]:.1f}" for key in keys.split())


class Several(list[Any]):
    """Figures of several runs. A format holds for each."""

    def __format__(self, form: str) -> str:
        return ", ".join(f"{value:{form}}" for value in self)


def read_record(path: Path) -> Record:
    """A record, with numbers for keys that are numbers."""

    def convert(pairs: list[tuple[str, Any]]) -> Record:
        return Record(
            (int(key) if key.isdigit() else key, Several(value) if isinstance(value, list) else value)
            for key, value in pairs
        )

    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=convert)


def tables_of(root: Path) -> dict[str, str]:
    """All tables by name, filled from the records and from what follows from them and the protocols by arithmetic."""
    records: dict[str, Any] = {path.stem: read_record(path) for path in (root / RESULTS).glob("*.json")}
    photos = {name: of.database + of.queries[-1] for name, of in PROTOCOLS.items() if of.database and of.queries}
    per_hour = 3600 * records["noted_rate"]["images/s"]
    records["derived"] = {"photos": photos, "hours": {name: count / per_hour for name, count in photos.items()}}
    tables = {}
    for _, name, text, _ in TABLE.findall((root / DEFINITIONS).read_text()):
        try:
            tables[name] = re.sub(r"(?<=\d)e-0", "e-", text.format_map(records))  # 1.5e-8, not 1.5e-08
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{DEFINITIONS}: {name}: {type(error).__name__}: {error}") from error
    return tables


def pages(root: Path) -> list[Path]:
    """The pages that have tables."""
    return [path for pattern in PAGES for path in sorted(root.glob(pattern))]


def without_paths(value: Any) -> Any:
    """What a run left, with the last part of each path in place of the path, and without curves."""
    if isinstance(value, dict):
        return {key: without_paths(content) for key, content in value.items() if key != "first_match"}
    if isinstance(value, list):
        return [without_paths(content) for content in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value


def add(root: Path, name: str, results: Path) -> None:
    """Makes a record of a run's results.json."""
    content = json.loads(results.read_text(encoding="utf-8"))
    environment = content.pop("environment")
    if str(environment.get("git", "unknown")).endswith(("unknown", "-dirty")):
        print("warning: the run's code is that of no commit, so nobody else can repeat it; commit, and run it again")
    record = {"kind": "measured", "run": results.resolve().parent.name, **without_paths(content)}
    path = root / RESULTS / f"{name}.json"
    path.write_text(json.dumps({**record, "environment": environment}, indent=1) + "\n")
    print(f"written: {path}; a row of {DEFINITIONS} shows it, python -m benchmarks.tables writes the tables")


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Writes or checks the tables, or adds a record; returns the exit status, 1 if --check names something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page differs")
    parser.add_argument("--add", nargs=2, metavar=("NAME", "FILE"), help="make a record of a run's results.json")
    given = parser.parse_args(argv)
    if given.add:
        add(root, given.add[0], Path(given.add[1]))
        return 0
    tables, status = tables_of(root), 0
    for path in pages(root):
        text = path.read_text()
        right = TABLE.sub(lambda match: match[1] + tables[match[2]] + match[4], text)
        if right != text and given.check:
            print(f"{path.relative_to(root)}: a table is not that of its records; run python -m benchmarks.tables")
            status = 1
        elif right != text:
            path.write_text(right)
            print(f"written: {path.relative_to(root)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
