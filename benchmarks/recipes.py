"""Training recipes compared on the toy city, several seeds each; writes the table of RECIPES.md.

    python -m benchmarks.recipes

Each run is train.py with the options of `make demo`, a recipe's own and a seed, in a folder of its own in `--output`.
What is finished is skipped and what was cut short goes on, so the same command can be given again. The page is made
after every run, of the results.json that are there by then. Two at once, `--encoders encoder` and `--encoders plain`,
need a `--page` each; a last one without them writes the page of both.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import eval as eval_script
import train as train_script
from datasets.toy_city import write_toy_city
from utils.system.files import whole

DEMO = "--eval_dataset_name=toy_city --backbone=dino_tiny --extraction_batch_size=16"  # as the Makefile has it
TRAINING = "--freeze_te none --randaugment_ops 0 --lr=0.001"
ENCODERS = {"encoder": ["--crossimage_encoder"], "plain": []}
HEADINGS = {"encoder": "With the cross-image encoder", "plain": "Without the encoder"}
RELEASED, BEST = "released", "best"
AXES = {  # each switch alone, by what it replaces
    "the encoder's training": {"every_step": ["--encoder_training=every_step"]},
    "the order of places": {"reshuffled": ["--place_order=reshuffled"], "similar": ["--place_order=similar"]},
    "the schedule": {"linear": ["--lr_schedule=linear"]},
}
SWITCHES = {name: flags for axis in AXES.values() for name, flags in axis.items()}
RECIPES = (RELEASED, *SWITCHES, BEST)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs share.

    Attributes:
        data: holds `gsv_cities` and `toy_city`.
        output: of the runs.
        flags: of train.py, for all runs.
        evaluation: of eval.py, for all runs.
        seeds: one run each.
    """

    data: Path
    output: Path
    flags: Sequence[str]
    evaluation: Sequence[str]
    seeds: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run: R@1 of the test split in percent by encoder context, the validation's R@1 + R@5, and minutes."""

    recalls: dict[str, float]
    validation: float
    minutes: float | None


def folder_of(settings: Settings, encoder: str, flags: Sequence[str], seed: int) -> Path:
    """Where a run goes, by what it is."""
    words = [flag.rpartition("=")[2] for flag in flags] or [RELEASED]
    return settings.output / encoder / "+".join(words) / f"seed{seed}"


def result_of(folder: Path) -> Result | None:
    """What a run has come to; None while it is not finished."""
    trained, evaluated = (sorted((folder / part).glob("*/results.json")) for part in ("train", "eval"))
    if not trained or not evaluated:
        return None
    training, test = (json.loads(paths[-1].read_text()) for paths in (trained, evaluated))
    validation = training["validation"]["best_recalls"]
    minutes = folder / "minutes.json"
    return Result(
        recalls={context: found["recalls"]["1"] for context, found in test["contexts"].items()},
        validation=validation["1"] + validation["5"],
        minutes=json.loads(minutes.read_text()) if minutes.exists() else None,
    )


def run(settings: Settings, encoder: str, flags: Sequence[str], seed: int) -> Result:
    """Trains and evaluates, as far as that was not done before."""
    folder = folder_of(settings, encoder, flags, seed)
    if (found := result_of(folder)) is not None:
        return found
    train, evaluation = folder / "train", folder / "eval"
    data = f"--eval_datasets_folder={settings.data}"
    if not list(train.glob("*/results.json")):
        afresh, started = not train.exists(), time.process_time()
        train_script.main(
            [
                *settings.flags,
                *ENCODERS[encoder],
                *flags,
                data,
                f"--seed={seed}",
                f"--save_dir={train}",
                "--resume=auto",
            ]
        )
        if afresh:  # else the time of a run that was cut short is not known
            (folder / "minutes.json").write_text(json.dumps((time.process_time() - started) / 60))
    shutil.rmtree(evaluation, ignore_errors=True)
    (best,) = train.glob("*/best_model.pth")
    contexts = ["--encoder_context", "file_order", "independent"] if ENCODERS[encoder] else []
    eval_script.main([*settings.evaluation, *contexts, data, f"--resume={best}", f"--save_dir={evaluation}"])
    result = result_of(folder)
    assert result is not None
    return result


def results_of(settings: Settings, encoder: str, flags: Sequence[str]) -> list[Result]:
    """Of the seeds that are finished."""
    found = (result_of(folder_of(settings, encoder, flags, seed)) for seed in settings.seeds)
    return [result for result in found if result is not None]


def switches_of(encoder: str) -> dict[str, list[str]]:
    """The switches that change anything, by name."""
    return {name: flags for name, flags in SWITCHES.items() if ENCODERS[encoder] or name != "every_step"}


def best_combination(settings: Settings, encoder: str) -> list[str] | None:
    """Of each axis the switch whose mean validation is best, if it is better than the released recipe's.

    Returns:
        Their names; None while some of the runs are missing. The test split has no say.
    """
    names = switches_of(encoder)
    found = {name: results_of(settings, encoder, flags) for name, flags in {RELEASED: [], **names}.items()}
    if any(len(results) < len(settings.seeds) for results in found.values()):
        return None
    means = {name: statistics.mean(result.validation for result in results) for name, results in found.items()}
    best = (max((RELEASED, *(name for name in axis if name in names)), key=means.__getitem__) for axis in AXES.values())
    return [name for name in best if name != RELEASED]


def spread(values: Sequence[float]) -> str:
    """Mean, lowest and highest."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else "-"


def row_of(name: str, results: Sequence[Result], seeds: int) -> str:
    """A line of a table."""
    contexts = {context for result in results for context in result.recalls}
    cells = [name + ("" if len(results) == seeds else f" ({len(results)} of {seeds} runs)")]
    cells.append(spread([result.recalls["file_order"] for result in results]))
    if "independent" in contexts:
        cells.append(spread([result.recalls["independent"] for result in results]))
    cells.append(spread([result.validation for result in results]))
    minutes = [result.minutes for result in results if result.minutes is not None]
    cells.append(f"{statistics.mean(minutes):.1f}" if minutes else "-")
    return f"| {' | '.join(cells)} |"


def apart(settings: Settings, encoder: str) -> str:
    """Which switches' test recalls, in file order, all lie on one side of the released recipe's, in a sentence."""

    def recalls_of(flags: Sequence[str]) -> list[float]:
        return [result.recalls["file_order"] for result in results_of(settings, encoder, flags)]

    released = recalls_of([])
    found = {name: recalls_of(flags) for name, flags in switches_of(encoder).items()}
    if not released or not all(found.values()):
        return ""
    worse = [f"`{name}` below" for name, recalls in found.items() if max(recalls) < min(released)]
    better = [f"`{name}` above" for name, recalls in found.items() if min(recalls) > max(released)]
    which = ", ".join(worse + better) or "none"
    return f"Switches whose test R@1 lies apart from the released recipe's for all seeds: {which}."


def page_of(settings: Settings) -> str:
    """RECIPES.md, of the runs that are finished."""
    seeds = len(settings.seeds)
    lines = PAGE.format(
        seeds=" ".join(map(str, settings.seeds)), flags=" ".join([*settings.flags, *ENCODERS["encoder"]])
    ).splitlines()
    for encoder, flags in ENCODERS.items():
        contexts = ["test R@1, file order", "test R@1, independent"] if flags else ["test R@1"]
        header = ["recipe", *contexts, "validation R@1 + R@5", "minutes"]
        lines += [
            "",
            f"## {HEADINGS[encoder]}",
            "",
            f"| {' | '.join(header)} |",
            "|---" * len(header) + "|",
        ]
        for switch in ([], *switches_of(encoder).values()):
            if results := results_of(settings, encoder, switch):
                lines.append(row_of(f"`{' '.join(switch)}`" if switch else "the released recipe", results, seeds))
        chosen = best_combination(settings, encoder)
        if chosen is not None:
            results = results_of(settings, encoder, [flag for name in chosen for flag in SWITCHES[name]])
            label = " + ".join(chosen) or "none: no switch validates better"
            if results:
                lines.append(row_of(f"best combination: {label}", results, seeds))
        if sentence := apart(settings, encoder):
            lines += ["", sentence]
    return "\n".join(lines) + "\n"


PAGE = """# Recipes on the toy city

`python3 -m benchmarks.recipes` writes this page from the results.json of its runs; change the text there. Each row is
a mean over seeds {seeds}, with the lowest and the highest run. A seed decides the initial weights and every random
draw; the city is the same. All runs share

    train.py {flags}

(the last option in the first table only). The validation split chooses the best epoch of a run. It also chooses the
best combination: of the encoder's training, the order of places and the schedule, each the switch with the best mean
validation score, if that is better than the released recipe's. The test split decides nothing. Minutes are processor
time of training and its evaluations.

**What it says**: which differences are larger than those between seeds, on a synthetic city, with a small backbone
trained from scratch. If two ranges overlap, nothing has been shown. Three seeds allow no test of significance, and
with 220 queries alone a recall of 40 has a standard deviation of some 3 points (binomial).

**What it does not say**: anything about real cities; about DINOv2's weights with most blocks frozen, as in the recipe;
about GSV-Cities' 62,000 places; or about long training. Hard batches are meant for models that no longer learn from
easy ones, and these runs are short. In `file order` the encoder sees several views of a place, and both sides of the
toy city follow one route ([contexts](docs/evaluation.md#contexts-of-the-cross-image-encoder)); `independent` is what a
single query gets."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="the toy city, made if it is missing")
    parser.add_argument("--output", type=Path, default=Path("logs/recipes"), help="of the runs")
    parser.add_argument("--page", type=Path, default=Path("RECIPES.md"), help="file to write the tables to")
    parser.add_argument("--epochs", type=int, default=8, help="epochs at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS), choices=ENCODERS)
    parser.add_argument("--side", type=int, default=112, help="of images, in pixels")
    parser.add_argument("--places", type=int, default=32, help="a batch")
    parser.add_argument("--num_workers", type=int, help="that read; by default the scripts' own")
    given: dict[str, Any] = vars(parser.parse_args(argv))
    if not (given["data"] / "toy_city").exists():
        write_toy_city(given["data"], progress=True)
    shared = [*DEMO.split(), "--resize", str(given["side"]), str(given["side"])]
    if given["num_workers"] is not None:
        shared.append(f"--num_workers={given['num_workers']}")
    training = ["--train_resize", str(given["side"]), str(given["side"]), f"--train_batch_size={given['places']}"]
    settings = Settings(
        data=given["data"].absolute(),
        output=(given["output"] / f"{given['epochs']}epochs").absolute(),
        flags=[*shared, *TRAINING.split(), *training, f"--epochs_num={given['epochs']}"],
        evaluation=shared,
        seeds=given["seeds"],
    )

    def write_page() -> None:
        with whole(given["page"]) as path:
            path.write_text(page_of(settings))

    # Seed by seed, so that each table has all of its rows soon; the best combination needs all the others.
    for seed in settings.seeds:
        for encoder in given["encoders"]:
            for name, flags in {RELEASED: [], **switches_of(encoder)}.items():
                if name in given["recipes"]:
                    run(settings, encoder, flags, seed)
                    write_page()
    for encoder in given["encoders"] if BEST in given["recipes"] else []:
        chosen = best_combination(settings, encoder)
        for seed in settings.seeds if chosen is not None else []:
            run(settings, encoder, [flag for name in chosen or [] for flag in SWITCHES[name]], seed)
            write_page()


if __name__ == "__main__":
    main()
