"""Compares runs query by query: which is better, and is that sure? It reads what runs leave; photos only for --page.

python3 -m utils.compare RUN RUN                              # two runs
python3 -m utils.compare RUN RUN RUN                          # three or more seeds of one recipe
python3 -m utils.compare RUN RUN RUN --against RUN RUN RUN    # two recipes
"""

import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .outputs.match_page import write_match_page
from .retrieval.comparison import compare_hits, in_words
from .system.command_line import Parser
from .system.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What a run found for the Q queries of a set whose labels are known."""

    results: dict[str, Any]  # its results.json
    queries: list[str]  # paths, in their order
    ranks: NDArray[np.int64]  # of the first correct match of each query; 0 if none is listed
    first: list[str]  # path of the first match of each; "" for none
    correct: dict[tuple[str, str], str]  # file names of query and match -> "1", "0" or ""

    @property
    def context(self) -> str:
        """The first encoder context, which predictions.csv is of."""
        contexts: dict[str, dict[str, Any]] = self.results.get("contexts") or {"file_order": {}}
        context, facts = next(iter(contexts.items()))
        return f"{context} (first of {facts['orders']} orders)" if facts.get("orders", 1) > 1 else context

    def hits(self, n: int) -> NDArray[np.bool_]:
        """Which queries have a correct match among the first n, Q."""
        return (self.ranks > 0) & (self.ranks <= n)


def read_run(run: Path) -> dict[str, Matches]:
    """The labelled query sets of a run, by name; raises ValueError if there is none."""
    sets = {}
    for path in sorted(run.rglob("results.json")):
        try:
            results = json.loads(path.read_bytes())
            if results["recalls"] and "dataset" in results:
                sets[results["dataset"]["name"]] = _read_set(path.parent, results)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not what a run left ({error!r}); name another run") from error
    if not sets:
        raise ValueError(f"{run} has no results.json with recalls; name the folder of a run on labelled queries")
    return sets


def _read_set(folder: Path, results: dict[str, Any]) -> Matches:
    ranks: dict[str, int] = {}
    first: dict[str, str] = {}
    correct: dict[tuple[str, str], str] = {}
    counted = set()
    with open(folder / "predictions.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        for row in csv.DictReader(file):
            query = row["query"]
            correct[os.path.basename(query), os.path.basename(row["database"])] = row["correct"]
            first.setdefault(query, row["database"])
            if row["correct"]:
                counted.add(query)
            if row["correct"] == "1":
                ranks.setdefault(query, int(row["rank"]))
    dataset = results["dataset"]
    total = dataset.get("queries_with_position", dataset["queries"])
    queries = [query for query in first if query in counted or total == dataset["queries"]]
    queries += [f"(query {n} for which nothing was found)" for n in range(total - len(queries))]
    return Matches(
        results=results,
        queries=queries,
        ranks=np.array([ranks.get(query, 0) for query in queries], dtype=np.int64),
        first=[first.get(query, "") for query in queries],
        correct=correct,
    )


def require_comparable(a: Matches, b: Matches) -> list[str]:
    """Raises ValueError if queries, database or labels differ; returns lines on what else does, or was not checked."""
    (name, dataset_a), (_, dataset_b) = ((m.results["dataset"]["name"], m.results["dataset"]) for m in (a, b))
    lines = []
    # In one order, too: a query for which an index found nothing is listed by one run only.
    names = [list(map(os.path.basename, matches.queries)) for matches in (a, b)]
    if "digests" in dataset_a and "digests" in dataset_b:
        differ = [side for side, digest in dataset_a["digests"].items() if dataset_b["digests"].get(side) != digest]
    else:
        lines.append(f"{name}: a run of 1.0.0 has no digests, so what predictions.csv names was compared")
        differ = ["database"] * (dataset_a["database"] != dataset_b["database"])
        differ += ["labels"] * any(b.correct.get(pair, right) != right for pair, right in a.correct.items())
    if names[0] != names[1] and "queries" not in differ:
        differ.append("queries in predictions.csv")
    if differ:
        raise ValueError(f"{name}: the runs have other {' and '.join(differ)}; compare runs that share them")
    for key in ("test_method", "resize", "antialias", "corruption"):
        values = [m.results.get(key, m.results.get("options", {}).get(key)) for m in (a, b)]
        if values[0] != values[1]:
            lines.append(f"{name}: other {key}, {values[0]} and {values[1]}")
    if a.context != b.context or a.context != "file_order":
        lines.append(f"{name}: encoder context {' and '.join(dict.fromkeys((a.context, b.context)))}")
    return lines


def require_recipe(runs: Sequence[Path], sets: Sequence[dict[str, Matches]]) -> None:
    """Raises ValueError unless the runs share everything but the training seed."""
    facts, seeds = [], []
    for run, run_sets in zip(runs, sets, strict=True):
        results = next(iter(run_sets.values())).results
        training = dict(results.get("checkpoint", {}).get("training") or {})
        if "seed" not in training:
            problem = f"{run} does not say with which seed its model was trained"
            raise ValueError(f"{problem}; evaluate a checkpoint of 2.0.0 or later, or compare two runs at a time")
        seeds.append(training.pop("seed"))
        same = {key: results.get(key) for key in ("model", "resize", "antialias", "test_method")}
        facts.append({**training, **same, "context": next(iter(run_sets.values())).context, "sets": sorted(run_sets)})
    differ = sorted({key for fact in facts for key in facts[0] | fact if fact.get(key) != facts[0].get(key)})
    if differ or len({*seeds}) < len(seeds):
        what = f"other {', '.join(differ)}" if differ else f"seeds {seeds}"
        remedy = "compare two runs, or give the other recipe's to --against"
        raise ValueError(f"not seeds of one recipe: they have {what}; {remedy}")


def recall_values(matches: Sequence[Matches]) -> list[int]:  # that all report
    return sorted(set.intersection(*(set(map(int, each.results["recalls"])) for each in matches)))


def compare_two(a: dict[str, Matches], b: dict[str, Matches], block: int) -> tuple[dict[str, Any], list[str]]:
    """By query set that both runs have and N what `compare_hits` says, and lines on what else differs."""
    names = [name for name in a if name in b]
    if not names:
        raise ValueError(f"no query set in common: {', '.join(a)}, and {', '.join(b)}; compare runs that share one")
    only = [name for name in [*a, *b] if name not in names]
    lines = [f"only in one of the runs, so left out: {', '.join(only)}"] * bool(only)
    compared: dict[str, Any] = {}
    for name in names:
        lines += require_comparable(a[name], b[name])
        if not 1 <= block <= len(a[name].queries):
            raise ValueError(f"block {block}: {name} has {len(a[name].queries)} queries; use 1 to that number")
        compared[name] = {
            str(n): compare_hits(a[name].hits(n), b[name].hits(n), block=block)
            for n in recall_values([a[name], b[name]])
        }
    return compared, lines


def table(compared: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparison of two runs as text."""
    wide = max(map(len, compared))
    head = f"{'':{wide}} {'N':>4} {'A (95% interval)':>20} {'B (95% interval)':>20} {'B - A (95% interval)':>24}"
    lines = [f"{head} only A only B       p"]
    for name, by_n in compared.items():
        for n, row in by_n.items():
            a, b = ("{:.1f} ({:.1f}-{:.1f})".format(row[side], *row[f"{side}_interval"]) for side in "ab")
            difference = "{:+.1f} ({:+.1f} to {:+.1f})".format(row["difference"], *row["interval"])
            counts = f"{row['only_a']:6} {row['only_b']:6} {row['p']:7.3g}"
            lines.append(f"{name:{wide}} {n:>4} {a:>20} {b:>20} {difference:>24} {counts}")
    return "\n".join(lines)


def compare_recipes(groups: Sequence[Sequence[dict[str, Matches]]]) -> dict[str, Any]:
    """Mean, range and deviation over the seeds of one or two recipes, by set and N; prints them."""
    recipes: dict[str, Any] = {}
    for name in [name for name in groups[0][0] if all(name in run for group in groups for run in group)]:
        for n in recall_values([run[name] for group in groups for run in group]):
            row: dict[str, Any] = {}
            words = []
            for side, group in zip("ab", groups, strict=False):
                recalls = np.array([100 * run[name].hits(n).mean() for run in group])
                mean, low, high, deviation = map(
                    float, (recalls.mean(), recalls.min(), recalls.max(), recalls.std(ddof=1))
                )
                row[side] = {"mean": mean, "range": [low, high], "deviation": deviation, "runs": len(group)}
                words.append(f"{mean:.1f} ({low:.1f} to {high:.1f}, deviation {deviation:.2f}, {len(group)} runs)")
            line = f"{name} R@{n}: {' against '.join(words)}"
            if len(groups) == 2:
                row["difference"] = row["b"]["mean"] - row["a"]["mean"]
                line += f": {row['difference']:+.1f} points"
            recipes.setdefault(name, {})[str(n)] = row
            print(line)
    return recipes


def write_ranks(folder: Path, a: dict[str, Matches], b: dict[str, Matches], names: Sequence[str]) -> None:
    """Writes `compare.csv`: a row a query, with the rank of its first correct match in each run, empty for none."""
    rows: list[list[Any]] = [["set", "query", "rank_a", "rank_b"]]
    for name in names:
        for query, *ranks in zip(a[name].queries, a[name].ranks, b[name].ranks, strict=True):
            rows.append([name, query, *(rank or "" for rank in ranks)])
    with (
        atomic_write(folder / "compare.csv") as path,
        open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        csv.writer(file).writerows(rows)


def write_page(folder: Path, a: Matches, b: Matches) -> None:
    """Writes a page with the queries that only one run finds at once, both first matches side by side."""
    from PIL import Image, ImageOps

    def read(path: str) -> Image.Image | None:
        try:
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except OSError:
            return None

    shown = np.flatnonzero(a.hits(1) != b.hits(1))
    database = sorted({*a.first, *b.first} - {""})
    number = {path: index for index, path in enumerate(database)}
    correct = np.stack([a.hits(1), b.hits(1)], axis=1)[shown]
    write_match_page(
        folder,
        title=f"{a.results['dataset']['name']}: the first match of A, then that of B",
        queries=[a.queries[query] for query in shown],
        database=database,
        predictions=np.array([[number.get(m.first[query], -1) for m in (a, b)] for query in shown]).reshape(-1, 2),
        read=read,
        shown=2,
        correct=correct,
        groups={"only A finds": correct[:, 0], "only B finds": correct[:, 1]},
    )


def compare(runs: Sequence[Path], against: Sequence[Path], output: Path | None, *, block: int, page: bool) -> None:
    """Compares runs, prints the result and writes it into `output`, by default the second run's folder."""
    every = [*runs, *against]
    folders = [(run.parent if run.name == "results.json" else run).resolve() for run in every]
    if len({*folders}) < max(2, len(folders)):
        raise ValueError(f"{' '.join(map(str, every))}: name two runs or more, each once")
    if page and len(every) > 2:
        raise ValueError("page shows two runs; name two, or leave it out")
    sets = [read_run(folder) for folder in folders]
    folder = output or folders[1]
    content: dict[str, Any] = {"runs": list(map(str, runs)), "against": list(map(str, against))}
    if len(every) == 2:
        compared, notes = compare_two(sets[0], sets[1], block)
        content |= {"block": block, "notes": notes, "sets": compared}
        print("\n".join([f"A: {every[0]}", f"B: {every[1]}", *notes, table(compared)]))
        for name, by_n in compared.items():
            n, row = next(iter(by_n.items()))
            print(f"{name}: {in_words(int(n), row, len(sets[0][name].queries))}")
    else:
        groups = [sets[: len(runs)], sets[len(runs) :]] if against else [sets]
        for group, names in zip(groups, (runs, against), strict=False):
            require_recipe(names, group)
        content["recipes"] = compare_recipes(groups)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "compare.json") as path:
        path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written: {folder / 'compare.json'}")
    if len(every) == 2:
        write_ranks(folder, sets[0], sets[1], list(content["sets"]))
    for name in content["sets"] if page else ():
        place = folder / "compare" / name.replace("/", "_").replace(" ", "_")
        write_page(place, sets[0][name], sets[1][name])
        print(f"open in a browser: {(place / 'index.html').resolve().as_uri()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; bad input ends the program with one line and status 2."""
    parser = Parser(prog="python3 -m utils.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its results.json")
    parser.add_argument("--against", nargs="+", type=Path, default=[], metavar="RUN", help="runs of another recipe")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder to write to (default: the second run's)")
    parser.add_argument("--page", action="store_true", help="write a page with the queries that only one run finds")
    parser.add_argument("--block", type=int, default=1, help="draw blocks of this many neighbours: for sequences")
    given = parser.parse(argv)
    try:
        compare(given.runs, given.against, given.output, block=given.block, page=given.page)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
