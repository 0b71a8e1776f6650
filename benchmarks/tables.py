"""The tables of the pages, written from the records in benchmarks/results.

    python -m benchmarks.tables            # writes each table between its markers
    python -m benchmarks.tables --check    # writes nothing; names what differs from its records, exit status 1
    python -m benchmarks.tables --add logs/default/<time>/results.json --name corridor_plain [--replace]

A record is a JSON file. Its `kind` is `measured` where a run of this repository left it, with options, versions, device
and git revision; `published` where the figures are other people's; `noted` where they are ours and no record of the run
is left. The last two name their `source`.

tables.md has each table with fields of `str.format` in place of the figures, `{record[key][key]:format}`, where a
format of numbers such as `1 5 10` stands for the cells of recall@N, and a list is joined by commas. A page shows it
between `<!-- table: name -->` and `<!-- end -->`. Figures within sentences are written by hand; those that repeat a
record are under `<!-- prose: page -->` in tables.md, and checked.
"""

import argparse
import json
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.evaluation.protocols import PROTOCOLS
from utils.system.files import whole

ROOT = Path(__file__).parents[1]
RESULTS, DEFINITIONS = "benchmarks/results", "benchmarks/tables.md"
PAGES = ("README.md", "REPRODUCE.md", "benchmarks/README.md", "docs/*.md")
MARKED = re.compile(r"^(<!-- (table|prose): (\S+) -->\n)((?:(?!<!-- ).)*)^(<!-- end -->)$", re.DOTALL | re.MULTILINE)
BEGINNING, END = (re.compile(marker, re.MULTILINE) for marker in ("^<!-- (?:table|prose):", "^<!-- end -->"))
KINDS = {"measured": "environment", "published": "source", "noted": "source"}  # and what each must have
DERIVED, DERIVED_FROM = "derived", ("compare", "noted_rate")  # what follows from records, and from which
LEFT_OUT = {"first_match"}  # of a run's results.json: curves, which no table shows


class Record(dict[Any, Any]):
    """What is in braces in a JSON file. The format `1 5 10` gives the percentages under these keys, a cell each."""

    def __format__(self, keys: str) -> str:
        if not keys:
            raise ValueError(f"no figure, but {', '.join(map(str, self))}")
        return " | ".join(f"{self[int(key)]:.1f}" for key in keys.split())


class Several(list[Any]):
    """Figures of several runs. A format holds for each."""

    def __format__(self, form: str) -> str:
        return ", ".join(f"{value:{form}}" for value in self)


def read_json(path: Path, **settings: Any) -> Any:
    """What is in braces in a file.

    Raises:
        ValueError: it is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), **settings)
    except (ValueError, RecursionError) as error:  # nested too deep
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a record: it does not begin with {{")
    return content


def read_record(path: Path) -> Record:
    """A record, with numbers for keys that are numbers, and without what is null: that is no figure.

    Raises:
        ValueError: it is no record.
    """

    def convert(pairs: list[tuple[str, Any]]) -> Record:
        return Record(
            (int(key) if key.isdigit() else key, Several(value) if isinstance(value, list) else value)
            for key, value in pairs
            if value is not None
        )

    content = read_json(path, object_pairs_hook=convert)
    kind = content.get("kind")
    if kind not in KINDS or not content.get(KINDS[kind]):
        rule = ", ".join(f"{name} with its {needed}" for name, needed in KINDS.items())
        raise ValueError(f"{path}: a record's kind is one of {rule}; this one's is {kind}")
    return content


def read_records(root: Path) -> dict[str, Any]:
    """All of them by name, and as `derived` what follows from them and from the protocols by arithmetic.

    Raises:
        ValueError: one of them is no record, or lacks what others follow from.
    """
    records: dict[str, Any] = {path.stem: read_record(path) for path in sorted((root / RESULTS).glob("*.json"))}
    photos = {name: of.database + of.queries[-1] for name, of in PROTOCOLS.items() if of.database and of.queries}
    try:
        start = sum(records["compare"][f"{part} 300000 images, s"] for part in ("listing", "parsing", "positives"))
        per_hour = 3600 * records["noted_rate"]["images/s"]
    except KeyError as error:
        raise ValueError(f"{root / RESULTS} has no {error}, from which other figures follow") from error
    hours = {name: count / per_hour for name, count in photos.items()}
    return records | {DERIVED: Record(photos=photos, hours=hours, start=start)}


def filled(name: str, text: str, records: Mapping[str, Any]) -> str:
    """A table or a piece of prose with its figures.

    Raises:
        ValueError: a field stands for nothing, or for something else than a figure.
    """
    try:
        text = text.format_map(records)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{DEFINITIONS}: {name}: {type(error).__name__}: {error}") from error
    return re.sub(r"(?<=\d)e-0", "e-", text)  # 1.5e-8, not 1.5e-08


def marked(path: Path, text: str) -> list[re.Match[str]]:
    """What stands between markers.

    Raises:
        ValueError: a marker is alone.
    """
    found = list(MARKED.finditer(text))
    if not len(found) == len(BEGINNING.findall(text)) == len(END.findall(text)):
        raise ValueError(f"{path}: <!-- table: name --> and <!-- end --> must come in pairs, each on a line of its own")
    return found


class Definitions:
    """tables.md, with the figures of the records.

    Attributes:
        tables: lines of Markdown by name.
        prose: by page, what its sentences say of a record.
    """

    def __init__(self, root: Path):
        path, records = root / DEFINITIONS, read_records(root)
        self.tables: dict[str, str] = {}
        self.prose: dict[str, list[str]] = {}
        for match in marked(path, path.read_text()):
            _, what, name, text, _ = match.groups()
            text = filled(name, text, records)
            if what == "table":
                self.tables[name] = text
            else:
                self.prose[name] = text.splitlines()

    def page(self, path: Path, text: str) -> str:
        """The text of a page with the tables that it should have.

        Raises:
            ValueError: there is no such table.
        """
        for match in marked(path, text):
            if match[3] not in self.tables:
                raise ValueError(f"{path}: {DEFINITIONS} has no table {match[3]}; it has {', '.join(self.tables)}")
        return MARKED.sub(lambda match: match[1] + self.tables[match[3]] + match[5], text)

    def differences(self, root: Path) -> Iterator[str]:
        """A line for each table and each figure in a sentence that is not what the records say."""
        names = {path.relative_to(root).as_posix(): path for path in pages(root)}
        for missing in self.prose.keys() - names.keys():
            yield f"{missing}: there is no such page, but {DEFINITIONS} has figures of its sentences"
        for name, path in names.items():
            text = path.read_text()
            for now, right in zip(marked(path, text), marked(path, self.page(path, text)), strict=True):
                if now[4] != right[4]:
                    yield f"{name}: the table {now[3]} is not that of its records; run python -m benchmarks.tables"
            words = " ".join(text.split())
            for figure in self.prose.get(name, []):
                if figure not in words:
                    yield f'{name}: no sentence says "{figure}", which is what the records say'


def pages(root: Path) -> list[Path]:
    """The pages that have tables."""
    return [path for pattern in PAGES for path in sorted(root.glob(pattern))]


def without_paths(value: Any) -> Any:
    """What a run left, with the last part of each path in place of the path, and without what no table shows."""
    if isinstance(value, dict):
        return {key: without_paths(of) for key, of in value.items() if key not in LEFT_OUT}
    if isinstance(value, list):
        return [without_paths(of) for of in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value


def read_run(path: Path) -> dict[str, Any]:
    """The results.json of a run or a benchmark.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    remedy = "name the results.json that train.py, eval.py or a benchmark left"
    try:
        content = read_json(path)
    except OSError as error:
        raise ValueError(f"--add {path} cannot be read ({error.strerror or error}); {remedy}") from error
    except ValueError as error:
        raise ValueError(f"--add {error}; {remedy}") from error
    if "kind" in content:
        raise ValueError(f"--add {path} is a record already (its kind is {content['kind']}); {remedy}")
    environment = content.get("environment")
    if not isinstance(environment, dict) or not environment:
        raise ValueError(
            f"--add {path} is not the results.json of a run: it does not say on what it ran (environment); {remedy}"
        )
    return content


def add(root: Path, results: Path, name: str, note: str | None, *, replace: bool = False) -> Iterator[str]:
    """Makes a record of a run's results.json; yields lines to print.

    Raises:
        ValueError: the file is not that of a run, or the name cannot stand in a field, or is that of a record and this
            is not to be replaced.
    """
    if not name.isidentifier() or name == DERIVED:
        raise ValueError(
            f"--name {name}: a record's name is letters, digits and _, and not {DERIVED}, which stands for what "
            "follows from others; choose another, such as corridor_plain"
        )
    path = root / RESULTS / f"{name}.json"
    there = path.exists()
    if there and not replace:
        raise ValueError(f"--name {name}: {path} already exists; choose another name, or replace it with --replace")
    content = read_run(results)
    shown = list(showing(root, name))
    environment = content.pop("environment")
    run = {"kind": "measured", "run": results.resolve().parent.name} | ({"note": note} if note else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_text(json.dumps({**run, **without_paths(content), "environment": environment}, indent=1) + "\n")
    yield f"{'replaced' if there else 'written'}: {path}"
    revision = environment.get("git")
    if revision in (None, "unknown") or str(revision).endswith("-dirty"):
        what = f"is {revision}, with changes that no commit has" if revision not in (None, "unknown") else "is unknown"
        yield f"warning: the git revision of the run {what}: nobody else can repeat it; commit, and run it again"
    if shown:
        yield f"shown by {', '.join(shown)}; python -m benchmarks.tables writes the tables"
    else:
        yield f"no table shows it yet: add a row to {DEFINITIONS}"


def showing(root: Path, name: str) -> Iterator[str]:
    """The tables, and the pages in whose sentences, a record's figures stand.

    Raises:
        ValueError: tables.md is not as `str.format` wants it.
    """
    names = {name, DERIVED} if name in DERIVED_FROM else {name}
    for match in marked(root / DEFINITIONS, (root / DEFINITIONS).read_text()):
        try:
            fields = {re.split(r"[.\[]", field)[0] for _, field, _, _ in string.Formatter().parse(match[4]) if field}
        except ValueError as error:
            raise ValueError(f"{DEFINITIONS}: {match[3]}: {error}") from error
        if fields & names:
            yield f"the table {match[3]}" if match[2] == "table" else f"sentences of {match[3]}"


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Writes or checks the tables, or adds a record.

    Returns:
        The exit status: 1 if something on a page is not what the records say.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page differs")
    what.add_argument("--add", type=Path, metavar="RESULTS_JSON", help="make a record of what a run left")
    parser.add_argument("--name", help="of the record that --add makes")
    parser.add_argument("--note", help="what its options do not say, such as where the weights come from")
    parser.add_argument("--replace", action="store_true", help="let --add replace the record that has this name")
    given = parser.parse_args(argv)
    try:
        if given.add is not None:
            if given.name is None:
                raise ValueError("--add needs a --name for the record, such as --name=corridor_plain")
            for line in add(root, given.add, given.name, given.note, replace=given.replace):
                print(line)
            return 0
        for flag in ("name", "note", "replace"):
            if getattr(given, flag):
                raise ValueError(f"--{flag} is about the record that --add makes; give --add too, or leave it out")
        definitions = Definitions(root)
        for path in pages(root) if not given.check else ():
            text = path.read_text()
            if (right := definitions.page(path, text)) != text:
                with whole(path) as temporary:
                    temporary.write_text(right)
                print(f"written: {path.relative_to(root)}")
        differences = list(definitions.differences(root))
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename} cannot be read or written ({error.strerror}); restore it, or free it for you")
    print("\n".join(differences or ["all tables are those of their records"]))
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
