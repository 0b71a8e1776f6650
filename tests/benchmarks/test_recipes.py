"""The table of recipes: of runs that are finished, by what they left."""

import json

import pytest
from helpers import only_run, results_of

from benchmarks import recipes

SEEDS = [0, 1, 2]


def write_run(runs, encoder, recipe, seed, *, test, validation, independent=None, minutes=None):
    folder = runs / encoder / recipe / f"seed{seed}"
    contexts = {"file_order": test} | ({} if independent is None else {"independent": independent})
    for part, content in (
        ("train", {"validation": {"best_recalls": {"1": validation, "5": 50.0}}}),
        ("eval", {"contexts": {name: {"recalls": {"1": recall}} for name, recall in contexts.items()}}),
    ):
        (folder / part / "2026").mkdir(parents=True)
        (folder / part / "2026" / "results.json").write_text(json.dumps(content))
    if minutes:
        (folder / "minutes.json").write_text(str(minutes))


def test_the_best_combination_is_chosen_by_validation(tmp_path):
    """similar validates better than reshuffled, linear worse than the released recipe, whatever the test split says."""
    validations = {"reshuffled": 41, "similar": 44, "linear": 38}
    for seed in SEEDS:
        write_run(tmp_path, "plain", "released", seed, test=30 + seed, validation=40 + seed, minutes=5)
        for name, value in validations.items():
            assert recipes.best_combination(tmp_path, "plain", SEEDS) is None, "runs are missing"
            write_run(tmp_path, "plain", name, seed, test=100 - value, validation=value + seed)
    assert recipes.best_combination(tmp_path, "plain", SEEDS) == "similar"
    page = recipes.tables_of(tmp_path, SEEDS, []).split("## Without")[1].splitlines()
    assert page[2] == "| recipe | test R@1 | validation R@1 + R@5 | minutes |"
    assert page[4] == "| the released recipe | 31.0 (30.0 to 32.0) | 91.0 (90.0 to 92.0) | 5.0 |"
    assert page[-3] == "| best combination: similar | 56.0 (56.0 to 56.0) | 95.0 (94.0 to 96.0) | - |"
    assert page[-1].endswith("for all seeds: `reshuffled` above, `similar` above, `linear` above.")
    assert sum("every_step" in line for line in page) == 0, "it is of the encoder"


def test_unfinished_rows_say_so(tmp_path):
    write_run(tmp_path, "encoder", "released", 1, test=30, validation=40, independent=20.5)
    page = recipes.tables_of(tmp_path, SEEDS, ["--a"])
    assert "for all seeds" not in page, "not all switches have run"
    assert "| the released recipe (1 of 3 runs) | 30.0 (30.0 to 30.0) | 20.5 (20.5 to 20.5) | 90.0" in page
    assert "Seeds 0 1 2;" in page and "train.py --a --crossimage_encoder\n" in page


def test_only_ranges_that_do_not_meet_are_called_apart():
    tests = {"released": (30, 31), "reshuffled": (10, 29), "similar": (10, 30), "linear": (30, 35)}
    results = {name: [{"recalls": {"file_order": recall}} for recall in recalls] for name, recalls in tests.items()}
    assert recipes.apart(results).endswith("for all seeds: `reshuffled` below.")


@pytest.mark.slow
def test_runs_are_made_once_and_gone_on_with(city, tmp_path, monkeypatch):
    (tmp_path / "RECIPES.md").write_text(f"By hand.\n\n{recipes.MARKER}\n\nOld tables.\n")
    flags = [f"--data={city}", f"--output={tmp_path}/runs", f"--page={tmp_path}/RECIPES.md", "--epochs=1", "--seeds=0"]
    flags += ["--recipes", "released", "every_step"]
    monkeypatch.setattr(recipes, "DEMO", f"{recipes.DEMO} --resize 56 56 --num_workers=0")
    monkeypatch.setattr(recipes, "TRAINING", "--freeze_te 11 --train_resize 56 56 --train_batch_size=8")
    real, runs = recipes.train_script.main, []

    def cut_short(argv):
        runs.append(argv)
        if len(runs) == 2:
            raise SystemExit(143)
        return real(argv)

    monkeypatch.setattr(recipes.train_script, "main", cut_short)
    with pytest.raises(SystemExit):
        recipes.main(flags)
    assert len(runs) == 2
    recipes.main(flags)
    assert len(runs) == 4 and runs[2] == runs[1], "the one cut short, and the next"
    recipes.main(flags)
    assert len(runs) == 4
    page = (tmp_path / "RECIPES.md").read_text().split("## ")
    assert page[0].startswith(f"By hand.\n\n{recipes.MARKER}\n\nSeeds 0;")
    with_encoder, without = page[1].splitlines(), page[2].splitlines()
    assert len(without) == 5 and without[4].startswith("| the released recipe |")
    assert len(with_encoder[4].split("|")) == 7 and with_encoder[4].split("|")[5].strip() != "-"
    # What the table says is what eval.py says.
    results = tmp_path / "runs/1epochs/encoder/every_step/seed0"
    contexts = results_of(only_run(results / "eval"))["contexts"]
    row = next(line for line in with_encoder if "every_step" in line).split("|")
    recalls = [contexts[name]["recalls"]["1"] for name in ("file_order", "independent")]
    assert [float(cell.split("(")[0]) for cell in row[2:4]] == pytest.approx(recalls, abs=0.051)
