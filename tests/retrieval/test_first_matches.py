"""When to believe a first match: the curve against plain loops and scikit-learn, --accept as a user gives it."""

import json
import shutil

import numpy as np
import pytest
from helpers import results_of, rows_of
from pages import Page
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve

from utils.outputs import figures
from utils.retrieval.contexts import Search
from utils.retrieval.first_matches import FirstMatches, first_matches, in_words, pooled


def of_distances(distances, correct, positives):
    has_positive = np.arange(len(distances)) < positives
    return FirstMatches(distances=np.asarray(distances), correct=np.asarray(correct), has_positive=has_positive)


def by_hand(distances, correct, positives):
    """Threshold, accepted, precision and recall, one threshold at a time."""
    points = []
    for threshold in sorted({*distances}):
        taken = [right for distance, right in zip(distances, correct, strict=True) if distance <= threshold]
        points.append((threshold, len(taken), 100 * sum(taken) / len(taken), 100 * sum(taken) / positives))
    return points


def points_of(curve):
    return list(zip(curve.thresholds, curve.accepted, curve.precision, curve.recall, strict=True))


def test_hand_placed_distances():
    distances = [0.4, 0.1, 0.3, 0.2, 0.3, 0.5, np.inf]
    curve = of_distances(distances, [False, True, True, True, False, True, False], positives=5).curve
    assert curve.thresholds.tolist() == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert curve.accepted.tolist() == [1, 2, 4, 5, 6], "both at 0.3 together; what was not found never"
    np.testing.assert_allclose(curve.precision, [100, 100, 75, 60, 200 / 3])
    np.testing.assert_allclose(curve.recall, [20, 40, 60, 60, 80])
    assert [curve.at_precision(p) for p in (100, 99, 75, 61, 60, 10)] == [1, 1, 2, 4, 4, 4]
    assert [curve.at(t) for t in (0.05, 0.1, 0.29, 0.3, 9.0)] == [None, 0, 1, 2, 4]
    assert curve.point(None) == {"threshold": None, "accepted": 0, "precision": None, "recall": 0.0}
    nothing = of_distances([0.1, 0.2], [False, False], positives=1).curve
    assert nothing.at_precision(1) is None and nothing.recall.tolist() == [0, 0]
    assert of_distances([np.inf] * 2, [False] * 2, positives=0).curve.at_precision(1) is None


@pytest.mark.parametrize("seed", range(2))
def test_the_curve_is_that_of_plain_loops_and_of_scikit_learn(seed):
    """scikit-learn's recall is of the correct first matches; ours of all queries that could have had one."""
    rng = np.random.default_rng(seed)
    distances = rng.integers(1, 30, 200) / 16  # many of them the same
    has_positive = rng.random(200) < 0.8
    correct = has_positive & (rng.random(200) < np.exp(-distances))
    matches = FirstMatches(distances=distances, correct=correct, has_positive=has_positive)
    np.testing.assert_allclose(points_of(matches.curve), by_hand(distances, correct, has_positive.sum()))
    precision, recall, thresholds = precision_recall_curve(correct, -distances)
    np.testing.assert_allclose(matches.curve.thresholds[::-1], -thresholds)
    np.testing.assert_allclose(matches.curve.precision[::-1], 100 * precision[:-1])
    np.testing.assert_allclose(matches.curve.recall[::-1], 100 * recall[:-1] * correct.sum() / has_positive.sum())
    assert matches.average_precision == pytest.approx(100 * average_precision_score(correct, -distances))


HAND_PLACED = {  # five queries
    "distances": np.array([1, 2, 1, 0, 9], dtype=np.float32),
    "predictions": np.array([0, 2, 0, 3, -1]),
    "correct": np.array([True, False, True, True, True]),
}


def test_what_is_not_known_does_not_count():
    all_known = np.ones(5, dtype=bool)
    matches = first_matches(**HAND_PLACED, has_positive=all_known, judged=all_known)
    assert matches.distances.tolist() == [1, 2, 1, 0, np.inf]
    assert matches.correct.tolist() == [True, False, True, True, False], "nothing was found for the last"
    assert pooled([matches, matches]).distances.tolist() == [1, 2, 1, 0, np.inf] * 2
    judged, has_positive = np.array([True, True, False, True, False]), np.array([True, False, True, True, True])
    summary = first_matches(**HAND_PLACED, has_positive=has_positive, judged=judged).summary()
    assert (summary["queries"], summary["queries_with_positives"], summary["queries_left_out"]) == (3, 2, 2)
    best = summary["distance"]["recall_at_precision"]["100"]
    assert best == {"threshold": 1.0, "accepted": 2, "precision": 100.0, "recall": 100.0}
    assert summary["distance"]["curve"]["precision"] == pytest.approx([100, 100, 200 / 3])
    assert "recall 100.0 at 100% precision" in in_words(summary) and "2 queries left out" in in_words(summary)

    none = np.zeros(5, dtype=bool)  # without anything to find there is no recall
    summary = first_matches(**{**HAND_PLACED, "correct": none}, has_positive=none, judged=~none).summary()
    point = {"threshold": None, "accepted": 0, "precision": None, "recall": None}
    assert summary["distance"]["recall_at_precision"]["100"] == point
    assert summary["distance"]["average_precision"] == 0 and "no query" in in_words(summary)
    assert json.dumps(summary, allow_nan=False)


def test_the_picture_shows_the_curves(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path, dpi: drawn.append(figure) or path.touch())
    known = np.ones(5, dtype=bool)
    matches = first_matches(**HAND_PLACED, has_positive=known, judged=known)
    nothing = first_matches(**{**HAND_PLACED, "correct": ~known}, has_positive=~known, judged=known)
    for threshold in (0.5, None):
        contexts = {"independent": matches, "shuffled": nothing}
        figures.draw_first_match(tmp_path, "a $city$ \udcff", contexts, threshold)
        both, over_distance = drawn.pop().axes
        assert both.lines[0].get_xdata().tolist() == [20, 60, 60] and both.lines[0].get_ydata()[-1] == 75
        assert [text.get_text() for text in both.get_legend().get_texts()] == ["independent: 60.0, 60.0"]
        precision, recall, *line = over_distance.lines
        assert precision.get_xdata().tolist() == [0, 1, 2] == recall.get_xdata().tolist()
        assert [each.get_xdata()[0] for each in line] == ([] if threshold is None else [0.5])
    figures.draw_first_match(tmp_path, "nothing", {"independent": nothing}, 0.1)


def first_of(folder):
    """Distance of each query's first match as the file has it, and whether it is correct."""
    rows = [row for row in rows_of(folder) if row["rank"] == "1"]
    distances = np.array([float(row["squared_descriptor_distance"]) for row in rows])
    return distances, np.array([row["correct"] == "1" for row in rows])


@pytest.mark.drawn
def test_a_run_tells_how_far_its_first_matches_can_be_believed(evaluated, capsys):
    folder = evaluated()
    distances, correct = first_of(folder)
    by_distance = results_of(folder)["contexts"]["file_order"]["first_match"]["distance"]
    expected, curve = by_hand(distances, correct, 15), by_distance["curve"]
    np.testing.assert_allclose(list(zip(*(curve[key] for key in curve), strict=True)), expected)
    best = max((point for point in expected if point[2] == 100), default=(None, 0, None, 0))
    assert tuple(by_distance["recall_at_precision"]["100"].values()) == pytest.approx(best)
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("first match of toy_city test: recall")]
    assert f"average precision {by_distance['average_precision']:.1f}" in line
    assert lines[-1].startswith("Recalls on toy_city test"), "the result comes last"
    with Image.open(folder / "first_match.png") as picture, Image.open(folder / "recalls.png") as recalls:
        assert picture.size[0] > recalls.size[0] > 300
    assert "accepted" not in rows_of(folder)[0] and "accepted" not in results_of(folder)


def test_each_context_has_its_own(evaluated):
    folder = evaluated(*"--encoder_context independent shuffled --accept=0.1".split(), model="encoder")
    matches = {name: context["first_match"] for name, context in results_of(folder)["contexts"].items()}
    assert matches["independent"]["queries"] == 15 and matches["shuffled"]["queries"] == 75
    distances, _ = first_of(folder)  # of the first context
    assert matches["independent"]["distance"]["curve"]["threshold"] == sorted({*distances.tolist()})
    assert results_of(folder)["accepted"]["accepted"] == (distances <= 0.1).sum()


def test_a_distance_is_accepted_as_the_file_writes_it(evaluated, capsys):
    """A threshold copied from predictions.csv accepts its own row, and no more than what is as near."""
    rows = rows_of(evaluated())
    copied = sorted((row["squared_descriptor_distance"] for row in rows), key=float)[40]
    folder = evaluated(f"--accept={copied}", "--save_predictions=3")
    again = rows_of(folder)
    for row, before in zip(again, rows, strict=True):
        near = float(row["squared_descriptor_distance"]) <= float(copied)
        assert row.pop("accepted") == str(int(near)) and row == before
    distances, correct = first_of(folder)
    taken = distances <= float(copied)
    assert 0 < taken.sum() < 15
    accepted = results_of(folder)["accepted"]
    assert (accepted["distance"], accepted["accepted"], accepted["queries"]) == (float(copied), taken.sum(), 15)
    assert accepted["precision"] == pytest.approx(100 * correct[taken].mean())
    assert accepted["recall"] == pytest.approx(100 * correct[taken].sum() / 15)
    assert f"{copied}: {taken.sum()} of 15 first matches, precision" in capsys.readouterr().err
    page = Page(folder / "matches/index.html")
    assert page.filters["accepted"][-1] == f"({taken.sum()})"
    assert page.filters["false-alarm"][-1] == f"({(taken & ~correct).sum()})"


def test_the_val_split_gives_a_distance(evaluated, city, tmp_path, capsys):
    """As a run on it as test split does; the line says where its queries are those of the test split."""
    images = tmp_path / "data/toy_city/images"
    shutil.copytree(city / "toy_city/images/val", images / "test")
    (images / "val").symlink_to("test")
    as_test, as_val = (
        results_of(folder) for folder in (evaluated(data=tmp_path / "data"), evaluated("--eval_split=val"))
    )
    assert as_test["contexts"] == as_val["contexts"] and "optimistic" not in capsys.readouterr().err
    folder = evaluated("--eval_split=val", data=tmp_path / "data")
    assert "optimistic" in capsys.readouterr().err and results_of(folder)["split"] == "val"


def test_a_photo_without_a_position_is_neither_right_nor_a_false_alarm(evaluated, city, tmp_path):
    folders = []
    for side in ("database", "queries"):
        folders.append(f"--{side}_folder={tmp_path}/{side}")
        shutil.copytree(city / "toy_city/images/test" / side, tmp_path / side)
    for number, path in enumerate(sorted((tmp_path / "database").iterdir())[:6]):
        path.rename(path.with_name(f"nowhere{number}.jpg"))
    next(iter(sorted((tmp_path / "queries").iterdir()))).rename(tmp_path / "queries/somewhere.jpg")
    folder = evaluated(*folders, "--accept=9")
    first_match = results_of(folder)["contexts"]["file_order"]["first_match"]
    known = [row for row in rows_of(folder) if row["rank"] == "1" and row["correct"]]
    assert first_match["queries"] == len(known) < 15 and first_match["queries_left_out"] == 15 - len(known)
    right = sum(row["correct"] == "1" for row in known)
    accepted = results_of(folder)["accepted"]
    assert (accepted["accepted"], accepted["judged"]) == (15, len(known))
    assert accepted["precision"] == pytest.approx(100 * right / len(known))


def test_without_labels_a_distance_is_enough(city, evaluated, tmp_path):
    folders = [f"--{side}_folder={city}/toy_city/images/test/{side}" for side in ("database", "queries")]
    folder = evaluated(*folders, "--no_labels", "--accept=0.1")
    distances, _ = first_of(folder)
    assert results_of(folder)["accepted"] == {"distance": 0.1, "accepted": (distances <= 0.1).sum(), "queries": 15}
    assert not (folder / "first_match.png").exists()
    assert [row["accepted"] == "1" for row in rows_of(folder) if row["rank"] == "1"] == (distances <= 0.1).tolist()


def test_what_an_index_does_not_find_is_never_accepted(evaluated, monkeypatch):
    real = Search.run

    def nothing_for_the_first(self, *args, **settings):
        ((distances, predictions),) = real(self, *args, **settings)
        distances[0], predictions[0] = np.finfo(np.float32).max, -1
        return [(distances, predictions)]

    monkeypatch.setattr(Search, "run", nothing_for_the_first)
    results = results_of(evaluated("--accept=1e38"))
    assert results["accepted"]["accepted"] == 14
    assert results["contexts"]["file_order"]["first_match"]["distance"]["curve"]["accepted"][-1] == 14
    assert results["contexts"]["file_order"]["first_match"]["queries_with_positives"] == 15
