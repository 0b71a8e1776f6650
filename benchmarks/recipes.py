"""Training recipes compared on the toy city, several seeds each; writes the tables of RECIPES.md, after its marker.

    python -m benchmarks.recipes

Each run is train.py with the options of `make demo`, a recipe's own and a seed, in a folder of its own in `--output`.
What is finished is skipped and what was cut short goes on, so the same command can be given again. The page is made
after every run, of the results.json that are there by then.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import eval as eval_script
import train as train_script
from datasets.toy_city import write_toy_city

# As the Makefile has it: options of both scripts, and of train.py.
DEMO = "--eval_dataset_name=toy_city --backbone=dino_tiny --extraction_batch_size=16 --resize 112 112"
TRAINING = "--freeze_te none --randaugment_ops 0 --lr=0.001 --train_resize 112 112 --train_batch_size=32"
ENCODERS = {"encoder": ["--crossimage_encoder"], "plain": []}
HEADINGS = {"encoder": "With the cross-image encoder", "plain": "Without the encoder"}
RELEASED, BEST = "released", "best"
MARKER = "<!-- tables: python3 -m benchmarks.recipes -->"  # what stands before it on the page is written by hand
SWITCHES = {  # each alone, by what it replaces: the encoder's training, the order of places, the schedule
    "every_step": "--encoder_training=every_step",
    "reshuffled": "--place_order=reshuffled",
    "similar": "--place_order=similar",
    "linear": "--lr_schedule=linear",
}
# A finished run: R@1 of the test split in percent by encoder context (recalls), the validation's R@1 + R@5, minutes.
Result = Mapping[str, Any]


def switches_of(encoder: str) -> list[str]:
    """The switches that change anything."""
    return [name for name in SWITCHES if ENCODERS[encoder] or name != "every_step"]


def result_of(folder: Path) -> Result | None:
    """What a run has come to; None while it is not finished."""
    trained, evaluated = (sorted((folder / part).glob("*/results.json")) for part in ("train", "eval"))
    if not trained or not evaluated:
        return None
    training, test = (json.loads(paths[-1].read_text()) for paths in (trained, evaluated))
    validation, minutes = training["validation"]["best_recalls"], folder / "minutes.json"
    return {
        "recalls": {context: result["recalls"]["1"] for context, result in test["contexts"].items()},
        "validation": validation["1"] + validation["5"],
        "minutes": json.loads(minutes.read_text()) if minutes.exists() else None,
    }


def results_of(runs: Path, seeds: Sequence[int], recipe: str) -> list[Result]:
    """Of the seeds that are finished."""
    results = (result_of(runs / recipe / f"seed{seed}") for seed in seeds)
    return [result for result in results if result is not None]


def run(folder: Path, training: Sequence[str], evaluation: Sequence[str]) -> None:
    """Trains and evaluates, as far as that was not done before."""
    if result_of(folder) is not None:
        return
    if not list(folder.glob("train/*/results.json")):
        afresh, started = not (folder / "train").exists(), time.process_time()
        train_script.main([*training, f"--save_dir={folder / 'train'}", "--resume=auto"])
        if afresh:  # else the time of a run that was cut short is not known
            (folder / "minutes.json").write_text(json.dumps((time.process_time() - started) / 60))
    shutil.rmtree(folder / "eval", ignore_errors=True)
    best, *_ = folder.glob("train/*/best_model.pth")  # the link `latest` finds it a second time
    eval_script.main([*evaluation, f"--resume={best}", f"--save_dir={folder / 'eval'}"])


def best_combination(runs: Path, encoder: str, seeds: Sequence[int]) -> str | None:
    """Of each kind the switch whose mean validation is best, if it is better than the released recipe's.

    Returns:
        Their names, joined by +; None while some of the runs are missing. The test split has no say.
    """
    names = [RELEASED, *switches_of(encoder)]
    results = {name: results_of(runs / encoder, seeds, name) for name in names}
    if any(len(finished) < len(seeds) for finished in results.values()):
        return None
    means = {name: statistics.mean(result["validation"] for result in results[name]) for name in names}
    best: dict[str, str] = {}
    for name in names[1:]:
        kind = SWITCHES[name].split("=")[0]
        if means[name] > means[best.get(kind, RELEASED)]:
            best[kind] = name
    return "+".join(best.values()) or RELEASED


def row_of(name: str, results: Sequence[Result], seeds: int, contexts: Sequence[str]) -> str:
    """A line of a table: mean, lowest and highest."""
    columns = [[result["recalls"][context] for result in results] for context in contexts]
    columns.append([result["validation"] for result in results])
    cells = [f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" for values in columns]
    minutes = [result["minutes"] for result in results if result["minutes"] is not None]
    cells.append(f"{statistics.mean(minutes):.1f}" if minutes else "-")
    name += "" if len(results) == seeds else f" ({len(results)} of {seeds} runs)"
    return f"| {' | '.join([name, *cells])} |"


def apart(results: Mapping[str, Sequence[Result]]) -> str:
    """Which switches' test recalls, in file order, all lie on one side of the released recipe's, in a sentence."""
    recalls = {name: [result["recalls"]["file_order"] for result in finished] for name, finished in results.items()}
    if not all(recalls.values()):
        return ""
    released = recalls.pop(RELEASED)
    below = [f"`{name}` below" for name, values in recalls.items() if max(values) < min(released)]
    above = [f"`{name}` above" for name, values in recalls.items() if min(values) > max(released)]
    which = ", ".join(below + above) or "none"
    return f"Switches whose test R@1 lies apart from the released recipe's for all seeds: {which}."


def tables_of(runs: Path, seeds: Sequence[int], flags: Sequence[str]) -> str:
    """The tables of RECIPES.md, of the runs that are finished."""
    shared = " ".join([*flags, *ENCODERS["encoder"]])
    shared_by = "all runs share these options, but for the last one in the second table:"
    lines = [f"Seeds {' '.join(map(str, seeds))}; {shared_by}", "", f"    train.py {shared}"]
    for encoder, heading in HEADINGS.items():
        contexts = {"file_order": "test R@1"}
        if encoder == "encoder":
            contexts = {"file_order": "test R@1, file order", "independent": "test R@1, independent"}
        header = ["recipe", *contexts.values(), "validation R@1 + R@5", "minutes"]
        lines += ["", f"## {heading}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        results = {name: results_of(runs / encoder, seeds, name) for name in (RELEASED, *switches_of(encoder))}
        for name, finished in results.items():
            label = "the released recipe" if name == RELEASED else f"`{SWITCHES[name]}`"
            lines += [row_of(label, finished, len(seeds), list(contexts))] if finished else []
        best = best_combination(runs, encoder, seeds)
        if best is not None and (finished := results_of(runs / encoder, seeds, best)):
            label = "none: no switch validates better" if best == RELEASED else best.replace("+", " + ")
            lines.append(row_of(f"best combination: {label}", finished, len(seeds), list(contexts)))
        if sentence := apart(results):
            lines += ["", sentence]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="the toy city, made if it is missing")
    parser.add_argument("--output", type=Path, default=Path("logs/recipes"), help="of the runs")
    parser.add_argument("--page", type=Path, default=Path("RECIPES.md"), help="file to write the tables to")
    parser.add_argument("--epochs", type=int, default=8, help="epochs at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    recipes = [RELEASED, *SWITCHES, BEST]
    parser.add_argument("--recipes", nargs="+", default=recipes, choices=recipes)
    given = parser.parse_args(argv)
    if not (given.data / "toy_city").exists():
        write_toy_city(given.data, progress=True)
    training = [*DEMO.split(), *TRAINING.split(), f"--epochs_num={given.epochs}"]
    data = f"--eval_datasets_folder={given.data.absolute()}"
    runs = (given.output / f"{given.epochs}epochs").absolute()

    def make(encoder: str, recipe: str, seed: int) -> None:
        flags = [SWITCHES[name] for name in recipe.split("+") if name != RELEASED]
        own = [*ENCODERS[encoder], *flags, data, f"--seed={seed}"]
        contexts = ["--encoder_context", "file_order", "independent"] if ENCODERS[encoder] else []
        run(runs / encoder / recipe / f"seed{seed}", [*training, *own], [*DEMO.split(), data, *contexts])
        text = given.page.read_text().partition(MARKER)[0] if given.page.exists() else ""
        given.page.write_text(f"{text}{MARKER}\n\n{tables_of(runs, given.seeds, training)}")

    # Seed by seed, so that each table has all of its rows soon; the best combination needs all the others.
    for seed in given.seeds:
        for encoder in ENCODERS:
            for recipe in (RELEASED, *switches_of(encoder)):
                if recipe in given.recipes:
                    make(encoder, recipe, seed)
    for encoder in ENCODERS if BEST in given.recipes else ():
        best = best_combination(runs, encoder, given.seeds)
        for seed in given.seeds if best is not None else []:
            make(encoder, best, seed)


if __name__ == "__main__":
    main()
