"""eval.py --query_corruptions: more query sets, each as if it were photos of its own."""

import numpy as np
import pytest
from helpers import refusal, results_of, rows_of

from parser import EvalOptions, parse
from utils import compare
from utils.outputs import figures

NAME = "toy_city test"


def found(run):
    """What the sets of a run found, by the names of their folders."""
    columns = ("query", "rank", "database")
    return {path.name: [[row[c] for c in columns] for row in rows_of(path)] for path in run.iterdir() if path.is_dir()}


def test_each_is_a_query_set_and_the_database_passes_once(evaluated, passed, capsys, tmp_path, monkeypatch):
    drawn, real = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, path, dpi: drawn.append(figure) or real(figure, path, 1))
    flags = ["--query_corruptions", "blur:4", "noise", "blur:4", f"--descriptors_folder={tmp_path}/kept"]
    clean, run = evaluated(), evaluated(*flags)
    assert len(passed) == 2 * 15 + (2 + 6) * 15 and (run / "corruptions.png").exists()
    results, shown = results_of(run), capsys.readouterr().err
    corrupted = [f"{NAME} queries, {each}" for each in ("blur:4", *(f"noise:{severity}" for severity in range(1, 6)))]
    assert list(results["recalls"]) == [NAME, *corrupted] and f"mean over corruptions (6) of {NAME}, " in shown
    of_sets = [results["recalls"][each]["file_order"] for each in (NAME, *corrupted)]
    assert of_sets[0] == results_of(clean)["recalls"] and rows_of(run / "clean") == rows_of(clean)
    for n, mean in results["mean_over_corruptions"][NAME]["file_order"].items():
        assert mean == pytest.approx(np.mean([recalls[n] for recalls in of_sets[1:]]))
    (axes,) = [axes for figure in drawn for axes in figure.axes if axes.get_xlabel() == "severity"]
    of_blur, of_noise = (line.get_xydata().tolist() for line in axes.lines)
    assert of_blur == [[0, of_sets[0]["1"]], [4, of_sets[1]["1"]]]
    assert of_noise == [[0, of_sets[0]["1"]], *([severity, of_sets[1 + severity]["1"]] for severity in range(1, 6))]

    assert found(evaluated(*flags)) == found(run) and len(passed) == 10 * 15
    line = refusal(capsys, lambda: evaluated(*flags, "--seed=1"))
    assert "--seed was 0 and is now 1" in line and "another --descriptors_folder" in line

    compare.main([str(run), str(evaluated("--query_corruptions", "noise:5", "--seed=1"))])
    shown = capsys.readouterr().out
    assert f"{corrupted[-1]}: other corruption" in shown and f"{NAME}: other" not in shown
    assert f"left out: {', '.join(corrupted[:-1])}\n" in shown


@pytest.mark.parametrize("method", ["single_query", "five_crops"])
def test_with_contexts_methods_and_an_index(evaluated, method):
    settings = "--encoder_context independent shuffled --index=binary --rerank=20 --query_corruptions jpeg:5".split()
    run = evaluated(*settings, f"--test_method={method}", "--save_predictions=1", model="encoder")
    assert list(results_of(run)["mean_over_corruptions"][NAME]) == ["independent", "shuffled"]
    assert f"{NAME} queries, jpeg:5" in (run / "jpeg_5/matches/index.html").read_text()


def test_plain_folders_and_a_map_without_labels(evaluated, city, tmp_path):
    test = city / "toy_city/images/test"
    asked = [f"--queries_folder={test}/queries", "--no_labels", "--query_corruptions=fog:5"]
    run = evaluated(f"--database_folder={test}/database", *asked, f"--save_map={tmp_path}/city.npz")
    of_map = evaluated(f"--map={tmp_path}/city.npz", *asked)
    assert found(run) == found(of_map) and found(run)["fog_5"] != found(run)["clean"]
    assert results_of(run)["mean_over_corruptions"] == {} and not (run / "corruptions.png").exists()


@pytest.mark.parametrize("word", ["blurr", "blur:6", "jpeg:", ":3"])
def test_what_is_no_corruption_is_named(capsys, word):
    line = refusal(capsys, lambda: parse(EvalOptions, ["--query_corruptions", "noise", word]))
    assert f"--query_corruptions: {word!r}" in line and "motion_blur" in line and ":1 to :5" in line
