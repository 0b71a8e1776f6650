"""When to believe a first match: the curve against plain loops and scikit-learn, --accept as a user gives it."""

import csv
import json
import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve
from test_match_page import Page

import eval as eval_script
import test as evaluation
from datasets.evaluation.database_queries import DatabaseQueries
from model import build_model
from parser import EvalOptions, parse
from utils.outputs import match_page, report
from utils.retrieval import acceptance
from utils.retrieval.acceptance import curve_of, first_matches, pooled, summary
from utils.retrieval.contexts import Search

SMALL = "--backbone=dino_tiny --device=cpu --num_workers=0 --resize 56 56".split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name, encoder in (("plain", False), ("encoder", True)):
        torch.manual_seed(1)
        torch.save(build_model(backbone="dino_tiny", crossimage_encoder=encoder).state_dict(), folder / f"{name}.pth")
    return folder


@pytest.fixture
def evaluated(city, weights, tmp_path):
    """Runs eval.py and returns the run's folder."""

    def run(*flags, data=city, model="plain"):
        save_dir = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        flags = [*SMALL, f"--save_dir={save_dir}", f"--resume={weights}/{model}.pth", *map(str, flags)]
        flags += ["--crossimage_encoder"] * (model == "encoder")
        if not any(flag.startswith("--database_folder") for flag in flags):
            flags += [f"--eval_datasets_folder={data}"]
            flags += ["--eval_dataset_name=toy_city"] * ("--eval_dataset_name" not in flags)
        eval_script.main(flags)
        (folder,) = save_dir.iterdir()
        return folder

    return run


@pytest.fixture
def copied(city, tmp_path):
    """Copies the tree of the toy city, to be changed."""

    def copy(name):
        shutil.copytree(city / "toy_city", tmp_path / name / "toy_city")
        return tmp_path / name, tmp_path / name / "toy_city/images"

    return copy


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def rows_of(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def first_of(folder):
    """Distance of each query's first match as the file has it, whether it is correct, and which query it is."""
    rows = [row for row in rows_of(folder) if row["rank"] == "1"]
    distances = np.array([float(row["squared_descriptor_distance"]) for row in rows])
    return distances, np.array([row["correct"] == "1" for row in rows]), [row["query"] for row in rows]


def last_street(folder):
    """Its five photos: streets lie one after the other, from west to east."""
    return sorted(folder.iterdir(), key=lambda path: float(path.name.split("@")[1]))[-5:]


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
    distances = np.array([0.4, 0.1, 0.3, 0.2, 0.3, 0.5, np.inf])
    correct = np.array([False, True, True, True, False, True, False])
    curve = curve_of(distances, correct, positives=5)
    assert curve.thresholds.tolist() == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert curve.accepted.tolist() == [1, 2, 4, 5, 6], "both at 0.3 together; what was not found never"
    np.testing.assert_allclose(curve.precision, [100, 100, 75, 60, 200 / 3])
    np.testing.assert_allclose(curve.recall, [20, 40, 60, 60, 80])
    assert [curve.at_precision(p) for p in (100, 99, 75, 61, 60, 10)] == [1, 1, 2, 4, 4, 4]
    assert [curve.at(t) for t in (0.05, 0.1, 0.29, 0.3, 9.0)] == [None, 0, 1, 2, 4]
    assert curve.point(None) == {"threshold": None, "accepted": 0, "precision": None, "recall": 0.0}
    nothing = curve_of(np.array([0.1, 0.2]), np.array([False, False]), positives=1)
    assert nothing.at_precision(1) is None and nothing.recall.tolist() == [0, 0]
    assert curve_of(np.full(2, np.inf), np.array([False, False]), positives=0).at_precision(1) is None


@pytest.mark.parametrize("seed", range(4))
def test_the_curve_is_that_of_plain_loops_and_of_scikit_learn(seed):
    """scikit-learn's recall is of the correct first matches; ours of all queries that could have had one."""
    rng = np.random.default_rng(seed)
    distances = rng.integers(1, 30, 200) / 16  # many of them the same
    findable = rng.random(200) < 0.8
    correct = findable & (rng.random(200) < np.exp(-distances))
    curve = curve_of(distances, correct, int(findable.sum()))
    np.testing.assert_allclose(points_of(curve), by_hand(distances, correct, findable.sum()))
    precision, recall, thresholds = precision_recall_curve(correct, -distances)
    np.testing.assert_allclose(curve.thresholds[::-1], -thresholds)
    np.testing.assert_allclose(curve.precision[::-1], 100 * precision[:-1])
    np.testing.assert_allclose(curve.recall[::-1], 100 * recall[:-1] * correct.sum() / findable.sum())
    found = acceptance.average_precision(distances, correct)
    assert found == pytest.approx(100 * average_precision_score(correct, -distances))


def test_99_percent_of_ten_thousand_is_met_to_the_query():
    correct = np.ones(1000, dtype=bool)
    correct[-10:] = False
    curve = curve_of(np.arange(1000.0) + 1, correct, positives=1000)
    assert curve.accepted[curve.at_precision(99)] == 1000 and curve.accepted[curve.at_precision(99.01)] == 999


def hand_placed():
    """Five queries that search four images, of which 0 and 1 are one place, and 2 and 3 another."""
    distances = np.array([[1, 2, 4, 8], [2, 3, 4, 5], [1, 2, 3, 4], [0, 0, 0, 1], [9, 9, 9, 9]], dtype=np.float32)
    predictions = np.array([[0, 1, 2, 3], [2, 0, 1, 3], [0, 1, -1, -1], [3, 0, 1, 2], [-1, -1, -1, -1]])
    correct = np.array([True, False, True, True, True])
    place = np.array([0, 0, 1, 1])
    elsewhere = place[predictions] != place[predictions[:, :1]]
    return distances, predictions, correct, elsewhere


def test_hand_placed_ratios():
    distances, predictions, correct, elsewhere = hand_placed()
    findable = judged = np.ones(5, dtype=bool)
    found = first_matches(
        distances, predictions, correct=correct, findable=findable, judged=judged, elsewhere=elsewhere
    )
    # The first of another place; the last found where there is none; 0 / 0 is of no use; nothing found.
    assert found.ratios.tolist() == [0.25, 0.666667, 0.5, 1.0, np.inf] and found.bounded == 1
    assert found.distances.tolist() == [1, 2, 1, 0, np.inf] and found.correct.tolist() == [
        True,
        False,
        True,
        True,
        False,
    ]
    of = summary(found)
    assert of["ratio"]["recall_at_precision"]["100"] == {
        "threshold": 0.5,
        "accepted": 2,
        "precision": 100.0,
        "recall": 40.0,
    }
    assert of["distance"]["recall_at_precision"]["99"]["threshold"] == 1.0
    assert of["distance"]["curve"]["accepted"] == [1, 3, 4] and of["queries_with_positives"] == 5
    assert "for 1 of 5 queries none of 4 matches is that far away" in acceptance.in_words(of, 4, 25.0)


def test_what_is_not_known_does_not_count():
    distances, predictions, correct, elsewhere = hand_placed()
    judged = np.array([True, True, False, True, False])
    findable = np.array([True, False, True, True, True])
    found = first_matches(
        distances, predictions, correct=correct, findable=findable, judged=judged, elsewhere=None, no_ratio="why"
    )
    of = summary(found)
    assert (of["queries"], of["queries_with_positives"], of["queries_left_out"]) == (3, 2, 2)
    assert of["distance"]["recall_at_precision"]["100"]["recall"] == 100.0, "two of the two that can be found"
    assert of["distance"]["curve"]["precision"] == pytest.approx([100, 100, 200 / 3])
    assert of["ratio"] is None and of["no_ratio"] == "why"
    assert "since why; 2 queries left out" in acceptance.in_words(of, 4, 25.0)
    near = first_matches(
        distances, predictions, correct=correct, findable=findable, judged=judged, elsewhere=elsewhere & False
    )
    assert near.ratios is None and near.no_ratio == "no match among 4 is from another place than the first"


def test_without_anything_to_find_there_is_no_recall():
    distances, predictions, _, elsewhere = hand_placed()
    none = np.zeros(5, dtype=bool)
    of = summary(first_matches(distances, predictions, correct=none, findable=none, judged=~none, elsewhere=elsewhere))
    point = {"threshold": None, "accepted": 0, "precision": None, "recall": None}
    assert of["distance"]["recall_at_precision"]["100"] == point and of["distance"]["average_precision"] == 0
    assert "there is no recall" in acceptance.in_words(of, 4, 25.0) and json.dumps(of, allow_nan=False)


def test_orders_are_judged_together():
    """As if the queries of all came one after the other."""
    distances, predictions, correct, elsewhere = hand_placed()
    known = np.ones(5, dtype=bool)
    orders = [
        first_matches(d, predictions, correct=correct, findable=known, judged=known, elsewhere=elsewhere)
        for d in (distances, 2 * distances)
    ]
    twice = pooled(orders)
    assert twice.distances.tolist() == [1, 2, 1, 0, np.inf, 2, 4, 2, 0, np.inf]
    assert len(twice.ratios) == 10 and twice.bounded == 2 and summary(twice)["queries"] == 10


def test_nordlands_size_takes_no_time():
    rng = np.random.default_rng(0)
    shape = 27_592, 20
    distances = np.sort(rng.random(shape, dtype=np.float32), axis=1)
    predictions = rng.integers(0, 27_592, shape)
    known, correct = np.ones(shape[0], dtype=bool), rng.random(shape[0]) < 0.9
    acceptance.average_precision(np.array([1.0, 2.0]), np.array([True, False]))  # the import is not counted
    start = time.process_time()
    of = summary(
        first_matches(
            distances, predictions, correct=correct, findable=known, judged=known, elsewhere=rng.random(shape) < 0.1
        )
    )
    assert time.process_time() - start < 1
    assert len(of["distance"]["curve"]["precision"]) == acceptance.CURVE_POINTS


@pytest.mark.drawn
def test_a_run_tells_how_far_its_first_matches_can_be_believed(evaluated, capsys):
    folder = evaluated()
    distances, correct, _ = first_of(folder)
    found = results_of(folder)["contexts"]["file_order"]["first_match"]
    expected = by_hand(distances, correct, 15)
    curve = found["distance"]["curve"]
    np.testing.assert_allclose(list(zip(*(curve[key] for key in curve), strict=True)), expected)
    assert found["distance"]["average_precision"] == pytest.approx(100 * average_precision_score(correct, -distances))
    best = max((point for point in expected if point[2] == 100), default=(None, 0, None, 0))
    assert tuple(found["distance"]["recall_at_precision"]["100"].values()) == pytest.approx(best)
    # The ratio, from the rows of the file.
    rows, ratios = rows_of(folder), []
    for query in dict.fromkeys(row["query"] for row in rows):
        of = [row for row in rows if row["query"] == query]
        place = [np.array([float(row["database_east"]), float(row["database_north"])]) for row in of]
        far = next(i for i, at in enumerate(place) if np.linalg.norm(at - place[0]) > 25)
        ratios.append(float(of[0]["squared_descriptor_distance"]) / float(of[far]["squared_descriptor_distance"]))
    assert found["ratio"]["queries_bounded"] == 0
    assert found["ratio"]["curve"]["threshold"] == pytest.approx(sorted(ratios), abs=1e-6)
    assert found["ratio"]["average_precision"] == pytest.approx(
        100 * average_precision_score(correct, -np.array(ratios)), abs=1e-6
    )
    lines = capsys.readouterr().err.splitlines()
    (line,) = [
        line for line in lines if line.startswith("first match of toy_city test: by its squared distance recall")
    ]
    assert f"average precision {found['distance']['average_precision']:.1f}; by its ratio to the first match" in line
    assert lines[-1].startswith("Recalls on toy_city test"), "the result comes last"
    with Image.open(folder / "first_match.png") as picture, Image.open(folder / "recalls.png") as recalls:
        assert picture.size[0] > recalls.size[0] > 300
    assert "accepted" not in rows[0] and "accepted" not in results_of(folder)


def test_the_picture_shows_the_curves(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path, dpi: figures.append(figure) or path.touch())
    distances, predictions, correct, elsewhere = hand_placed()
    known = np.ones(5, dtype=bool)
    found = first_matches(distances, predictions, correct=correct, findable=known, judged=known, elsewhere=elsewhere)
    nothing = first_matches(
        distances, predictions, correct=~known, findable=~known, judged=known, elsewhere=None, no_ratio="why"
    )
    for threshold, drawn in ((0.5, 0.5), (1e30, 2.1), (None, None)):
        report.draw_first_match(tmp_path, "a $city$ \udcff", {"independent": found, "shuffled": nothing}, threshold)
        both, over_distance = figures.pop().axes
        by_distance, *_ = both.lines
        assert by_distance.get_xdata().tolist() == [20, 60, 60] and by_distance.get_ydata()[-1] == 75
        labels = [text.get_text() for text in both.get_legend().get_texts()]
        assert labels == ["independent, distance: 60.0, 60.0", "independent, ratio: 40.0, 40.0"]
        precision, recall, *line = over_distance.lines
        assert precision.get_xdata().tolist() == [0, 1, 2] == recall.get_xdata().tolist()
        assert [at.get_xdata()[0] for at in line] == ([] if threshold is None else [drawn])
    report.draw_first_match(tmp_path, "nothing", {"independent": nothing}, 0.1)


@pytest.mark.drawn
def test_each_context_has_its_own(evaluated):
    contexts = "--encoder_context independent shuffled --context_seeds=2 --infer_batch_size=4".split()
    folder = evaluated(*contexts, "--accept=0.1", model="encoder")
    found = {name: of["first_match"] for name, of in results_of(folder)["contexts"].items()}
    assert found["independent"]["queries"] == 15 and found["shuffled"]["queries"] == 30
    assert found["independent"]["distance"]["curve"] != found["shuffled"]["distance"]["curve"]
    distances, *_ = first_of(folder)  # of the first context
    assert found["independent"]["distance"]["curve"]["threshold"] == sorted({*distances.tolist()})
    assert results_of(folder)["accepted"]["accepted"] == (distances <= 0.1).sum()


@pytest.mark.drawn
def test_queries_of_unknown_streets_are_false_alarms(evaluated, copied, capsys):
    """They lower the precision, and leave the recall as it is: it is of the queries that have a correct photo."""
    (unknown, test), (known, without) = ((data, images / "test") for data, images in map(copied, ("unknown", "known")))
    for folder in (test / "database", without / "database", without / "queries"):
        for path in last_street(folder):
            path.unlink()
    folders = evaluated(data=unknown), evaluated(data=known)
    first, second = (results_of(folder)["contexts"]["file_order"]["first_match"] for folder in folders)
    assert (first["queries"], first["queries_with_positives"]) == (15, 10) != (10, 10)
    assert (second["queries"], second["queries_with_positives"]) == (10, 10)
    assert results_of(folders[0])["queries_without_positives"] == 5
    (d, right, _), (d_known, right_known, _) = map(first_of, folders)
    assert right.sum() == right_known.sum() > 0
    ends = [{key: of["distance"]["curve"][key][-1] for key in ("precision", "recall")} for of in (first, second)]
    assert ends[0]["precision"] == pytest.approx(100 * right.sum() / 15)
    assert ends[1]["precision"] == pytest.approx(100 * right.sum() / 10)
    assert ends[0]["recall"] == ends[1]["recall"] == pytest.approx(100 * right.sum() / 10)
    for threshold in d_known:
        lower, higher = (right[values <= threshold].mean() for values, right in ((d, right), (d_known, right_known)))
        assert lower <= higher


def test_a_photo_without_a_position_is_neither_right_nor_a_false_alarm(evaluated, copied):
    data, images = copied("some")
    paths = sorted((images / "test/database").iterdir())[:6]
    for number, path in enumerate(paths):
        path.rename(path.with_name(f"nowhere{number}.jpg"))
    (query, *_) = sorted((images / "test/queries").iterdir())
    query.rename(query.with_name("somewhere.jpg"))
    folder = evaluated("--labels_where_known", "--accept=9", data=data)
    found = results_of(folder)["contexts"]["file_order"]["first_match"]
    known = [row for row in rows_of(folder) if row["rank"] == "1" and row["correct"]]
    assert found["queries"] == len(known) < 15 and found["queries_left_out"] == 15 - len(known)
    right = sum(row["correct"] == "1" for row in known)
    assert found["distance"]["curve"]["precision"][-1] == pytest.approx(100 * right / len(known))
    accepted = results_of(folder)["accepted"]
    assert (accepted["accepted"], accepted["judged"]) == (15, len(known))
    told = (
        f"--accept 9: 15 of 15 first matches are accepted, {len(known)} of them judged, since positions are missing, "
    )
    assert told + f"precision {100 * right / len(known):.1f}" in (folder / "info.log").read_text()


def test_a_distance_is_accepted_as_the_file_writes_it(evaluated, capsys):
    """A threshold copied from predictions.csv accepts its own row, and no more than what is as near."""
    rows = rows_of(evaluated())
    copied = sorted((row["squared_descriptor_distance"] for row in rows), key=float)[40]
    folder = evaluated(f"--accept={copied}", "--save_predictions=3")
    again = rows_of(folder)
    for row, before in zip(again, rows, strict=True):
        near = float(row["squared_descriptor_distance"]) <= float(copied)
        assert row.pop("accepted") == str(int(near)) and row == before
    distances, correct, _ = first_of(folder)
    taken = distances <= float(copied)
    assert 0 < taken.sum() < 15
    found = results_of(folder)["accepted"]
    assert (found["accept"], found["distance"]) == (copied, float(copied))
    assert (found["accepted"], found["queries"]) == (taken.sum(), 15)
    assert found["precision"] == pytest.approx(100 * correct[taken].mean())
    assert found["recall"] == pytest.approx(100 * correct[taken].sum() / 15)
    line = f"--accept {copied}: {taken.sum()} of 15 first matches are accepted, precision {found['precision']:.1f}"
    assert line in capsys.readouterr().err
    # And on the page.
    page = Page(folder / "matches/index.html")
    for number in range(15):
        for figure, row in zip(page.figures(number)[1:], again[15 * number : 15 * number + 3], strict=True):
            near = float(row["squared_descriptor_distance"]) <= float(copied)
            assert figure["frame"] == ("correct" if row["correct"] == "1" else "wrong") + " rejected" * (not near)
    assert page.filters["accepted"][-1] == f"({taken.sum()})"
    assert page.filters["false-alarm"][-1] == f"({(taken & ~correct).sum()})"
    assert f"squared descriptor distance up to {float(copied)}" in page.path.read_text()


def test_a_page_with_accepted_matches(tmp_path):
    paths = [str(tmp_path / f"{n}.jpg") for n in range(3)]
    for path in paths:
        Image.new("RGB", (30, 20)).save(path)
    settings = {"title": "x", "queries": paths[:2], "database": paths[1:], "predictions": np.array([[0, 1], [1, -1]])}
    settings |= {"metres": None, "read": Image.open, "accepted": np.array([[True, False], [False, True]])}
    page = Page(match_page.write_match_page(tmp_path / "a", correct=None, **settings))
    assert [[f["frame"] for f in row["figures"]] for row in page.rows] == [
        ["query", "unknown", "unknown rejected"],
        ["query", "unknown rejected"],
    ]
    assert {value: words[-1] for value, words in page.filters.items()} == {
        "all": "(2)",
        "accepted": "(1)",
        "rejected": "(1)",
    }
    assert [row["kinds"] for row in page.rows] == [["all", "accepted"], ["all", "rejected"]]
    wrong = Page(match_page.write_match_page(tmp_path / "b", correct=np.zeros((2, 2), dtype=bool), **settings))
    assert "false-alarm" in wrong.rows[0]["kinds"] and "false-alarm" not in wrong.rows[1]["kinds"]


AS_ON_TEST = {
    "several orders": ["--encoder_context=shuffled", "--context_seeds=2", "--infer_batch_size=4"],
    "crops": ["--test_method=nearest_crop"],
    "a PCA": ["--pca_dim=6", "--pca_dataset_folder=toy_city/images/train"],
    "an index": ["--index=IVF2,Flat"],
}


@pytest.mark.parametrize("flags", AS_ON_TEST.values(), ids=AS_ON_TEST)
def test_the_distance_of_a_precision_is_that_of_the_val_split(evaluated, copied, capsys, flags):
    """Found as a run on it would find it, with the same settings; then used on the test split."""
    swapped, images = copied("swapped")
    shutil.rmtree(images / "test")
    (images / "val").rename(images / "test")
    model = "encoder" if any("context" in flag for flag in flags) else "plain"
    of_val = evaluated(*flags, data=swapped, model=model)
    ((_, found),) = results_of(of_val)["contexts"].items()
    curve = found["first_match"]["distance"]["curve"]
    percent = int(max(curve["precision"][2:]))
    enough = [t for t, p in zip(curve["threshold"], curve["precision"], strict=True) if p >= percent]
    capsys.readouterr()
    asked = f"auto@{percent}"
    folder = evaluated(*flags, f"--accept={asked}", model=model)
    shown = capsys.readouterr().err
    accepted = results_of(folder)["accepted"]
    threshold, of_val = accepted["distance"], accepted["found_on"]
    assert of_val["name"] == "toy_city val" and of_val["threshold"] == threshold
    point = curve["threshold"].index(threshold)
    assert {key: of_val[key] for key in curve} == {key: values[point] for key, values in curve.items()}
    first = f"{of_val['accepted']} of {of_val['first_matches']} first matches are accepted, precision "
    assert f"{first}{of_val['precision']:.1f}, recall {of_val['recall']:.1f}" in shown
    assert threshold == max(enough), "all points are there, of so few queries"
    said = f"--accept {asked} is {threshold:.6g}, the largest squared distance with that precision on toy_city val (10 "
    assert said in shown and f"--accept {asked} ({threshold:.6g}): " in shown
    for row in rows_of(folder):
        assert row["accepted"] == str(int(float(row["squared_descriptor_distance"]) <= threshold))
    assert {path.name for path in folder.iterdir()} - {"pca.pth"} == {
        "info.log", "debug.log", "results.json", "predictions.csv", "recalls.png", "first_match.png"
    }  # fmt: skip


def test_nothing_of_the_test_split_moves_with_it(evaluated, tmp_path, monkeypatch):
    """And what was extracted of the val split is kept beside it, and used again."""
    kept = f"--descriptors_folder={tmp_path}/kept"
    plain, auto = evaluated(), evaluated("--accept=auto@30", kept)
    for name in ("recalls", "contexts", "queries_without_positives"):
        assert results_of(plain)[name] == results_of(auto)[name]
    without = [{key: value for key, value in row.items() if key != "accepted"} for row in rows_of(auto)]
    assert without == rows_of(plain)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"toy_city_test", "toy_city_val"}
    monkeypatch.setattr("test.image_batches", lambda paths, **_: iter(()) if not paths else 1 / 0)
    assert results_of(evaluated("--accept=auto@30", kept))["accepted"] == results_of(auto)["accepted"]


def refused(evaluated, capsys, *flags, **settings):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        evaluated(*flags, **settings)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ERROR")]
    assert exit_.value.code == 2
    return error


def test_a_val_split_that_cannot_be_used(evaluated, copied, tmp_path, capsys, monkeypatch):
    data, images = copied("tree")
    monkeypatch.setattr("test.extract", None)  # all of it is known before
    remedy = f"; put one into {images}/val, or give --accept a distance"
    (images / "val").rename(images / "elsewhere")
    error = refused(evaluated, capsys, "--accept=auto@99", data=data)
    assert error == f"ERROR: --accept auto@99 needs a val split, but toy_city has none{remedy}"
    (images / "val").symlink_to("test")
    error = refused(evaluated, capsys, "--accept=auto@99", data=data)
    assert "queries of the val split of toy_city are also in the test split" in error and error.endswith(remedy)
    (images / "val").unlink()
    (images / "val/queries_night").mkdir(parents=True)
    error = refused(evaluated, capsys, "--accept=auto@99", data=data)
    assert error == f"ERROR: --accept auto@99: there is no folder {images}/val/queries{remedy}"
    (images / "val/queries").mkdir(parents=True)
    assert "no folder" in refused(evaluated, capsys, "--accept=auto@99", data=data)
    shutil.copytree(images / "test/database", images / "val/database")
    shutil.copy(next((images / "test/queries").iterdir()), images / "val/queries/0.jpg")
    error = refused(evaluated, capsys, "--accept=auto@99", data=data)
    assert "1 of 16 file names have no UTM coordinates" in error and error.endswith(remedy)
    assert not list(tmp_path.glob("run*"))


def test_an_index_that_the_val_split_is_too_small_for(evaluated, capsys, tmp_path, monkeypatch):
    """10 database images there, and 15 in the test split."""
    monkeypatch.setattr("test.extract", None)
    error = refused(evaluated, capsys, "--accept=auto@30", "--index=IVF12,Flat")
    assert "FAISS" in error and not list(tmp_path.glob("run*"))


def test_copies_of_the_test_split_are_told(evaluated, copied, capsys):
    data, images = copied("same")
    shutil.rmtree(images / "val")
    shutil.copytree(images / "test", images / "val")
    evaluated("--accept=auto@1", data=data)
    shown = capsys.readouterr().err
    assert "WARNING: toy_city val: 15 queries have the same names as test queries, e.g. @" in shown


def test_a_precision_that_no_distance_gives(evaluated, copied, tmp_path, capsys):
    data, images = copied("apart")
    for path in (images / "val/queries").iterdir():  # nothing is near
        _, east, *rest = path.name.split("@")
        path.rename(path.with_name("@".join(["", str(float(east) + 9e5), *rest])))
    error = refused(evaluated, capsys, "--accept=auto@99.5", data=data)
    assert error == (
        "ERROR: --accept auto@99.5: on toy_city val no distance gives 99.5% precision, only up to 0.0%; use a lower P, "
        "or give a distance"
    )
    (kept,) = tmp_path.glob("run*/*/kept")
    assert {path.name for path in kept.rglob("*.npy")} == {"database.npy", "queries.npy"}, "for another precision"


def test_without_labels_a_distance_is_enough(city, evaluated, tmp_path, capsys):
    for side in ("database", "queries"):
        shutil.copytree(city / "toy_city/images/test" / side, tmp_path / side)
    folders = [f"--database_folder={tmp_path}/database", f"--queries_folder={tmp_path}/queries", "--no_labels"]
    folder = evaluated(*folders, "--accept=0.1")
    distances, *_ = first_of(folder)
    assert f"--accept 0.1: {(distances <= 0.1).sum()} of 15 first matches are accepted\n" in capsys.readouterr().err
    assert not (folder / "first_match.png").exists() and "precision" not in results_of(folder)["accepted"]
    assert [row["accepted"] == "1" for row in rows_of(folder) if row["rank"] == "1"] == (distances <= 0.1).tolist()


def test_a_positives_file_gives_no_metres(evaluated, tmp_path, capsys):
    (tmp_path / "right.csv").write_text("query,database\n" + "".join(f"{n},{n}\n" for n in range(12)))
    found = results_of(evaluated(f"--positives_file={tmp_path}/right.csv"))["contexts"]["file_order"]["first_match"]
    assert found["ratio"] is None and found["queries_with_positives"] == 12 and found["queries"] == 15
    assert "; no ratio to another place, since --positives_file gives no metres\n" in capsys.readouterr().err


@pytest.mark.drawn
def test_votes_are_no_distances(evaluated, capsys):
    found = results_of(evaluated("--test_method=maj_voting"))["contexts"]["file_order"]["first_match"]
    assert found["ratio"] is None and found["distance"]["average_precision"] > 0
    assert "; no ratio to another place, since votes lower the distances" in capsys.readouterr().err


@pytest.mark.drawn
def test_a_search_of_one_match_has_no_ratio(evaluated, capsys):
    evaluated("--recall_values", 1)
    assert "since no match among 1 is from another place than the first" in capsys.readouterr().err


@pytest.mark.drawn
def test_what_an_index_does_not_find_is_never_accepted(evaluated, monkeypatch, capsys):
    real = Search.run

    def nothing_for_the_first(self, *args, **settings):
        ((distances, predictions),) = real(self, *args, **settings)
        distances[0], predictions[0] = np.finfo(np.float32).max, -1
        return [(distances, predictions)]

    monkeypatch.setattr(Search, "run", nothing_for_the_first)
    folder = evaluated("--accept=1e38")
    found = results_of(folder)
    assert found["accepted"]["accepted"] == 14
    assert found["contexts"]["file_order"]["first_match"]["distance"]["curve"]["accepted"][-1] == 14
    assert found["contexts"]["file_order"]["first_match"]["queries_with_positives"] == 15


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--accept=nan",
            "--accept nan is not a number; give a squared descriptor distance above 0, as in predictions.csv",
        ),
        ("--accept=near", "--accept near is not a number"),
        ("--accept=auto", "--accept auto is not a number; give a squared descriptor distance"),
        ("--accept -0.5", "--accept -0.5 is not above 0"),
        ("--accept=0", "--accept 0 is not above 0"),
        ("--accept=-inf", "--accept -inf is not above 0"),
        ("--accept=inf", "--accept inf is not finite"),
        ("--accept=auto@0", "auto@ takes a precision in percent, above 0 and up to 100, e.g. auto@99"),
        ("--accept=auto@-5", "auto@ takes a precision"),
        ("--accept=auto@101", "auto@ takes a precision"),
        ("--accept=auto@nan", "auto@ takes a precision"),
        ("--accept=auto@99%", "auto@ takes a precision"),
        ("--accept=auto@99 --no_labels", "--no_labels rules out: precision needs labels; give a distance"),
        ("--accept=auto@99 --positives_file=f", "--positives_file rules out: the file covers the test split only"),
        ("--accept=0.3 --test_method=maj_voting", "with --test_method maj_voting, votes lower the distances"),
    ],
)
def test_what_accept_does_not_take(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(EvalOptions, ["--eval_datasets_folder=D", "--resume=x", *flags.split()])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_plain_folders_have_no_val_split(capsys):
    flags = ["--database_folder=a", "--queries_folder=b", "--resume=x", "--accept=auto@99"]
    with pytest.raises(SystemExit):
        parse(EvalOptions, flags)
    assert "--database_folder rules out: plain folders have no val split; give a dist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "taken"), [("0.5", (0.5, None)), ("1e-3", (0.001, None)), ("auto@97.5", (None, 97.5))]
)
def test_what_accept_takes(text, taken):
    options = parse(EvalOptions, ["--eval_datasets_folder=D", "--resume=x", "--accept", text])
    assert (options.accept_distance, options.accept_precision) == taken
    assert parse(EvalOptions, ["--eval_datasets_folder=D", "--resume=x"]).accept_distance is None


def test_keys_are_of_the_test_split(evaluated, city, copied, tmp_path, capsys):
    data, images = copied("keys")
    for side in ("val", "test"):
        for number, path in enumerate(sorted((images / side / "queries").iterdir())):
            fields = path.name.split("@")
            fields[7] = f"{side}{number:02d}"
            path.rename(path.with_name("@".join(fields)))
    (tmp_path / "keys.txt").write_text("test03\ntest05\n")
    evaluated("--accept=auto@1", f"--query_keys={tmp_path}/keys.txt", data=data)
    shown = capsys.readouterr().err
    assert (
        "toy_city val (10 database, 10 queries), file_order, all its queries, since --query_keys applies to the"
        in shown
    )


def test_the_dataset_knows_how_far_matches_are_apart(city):
    dataset = DatabaseQueries.from_folder(city, "toy_city", "test")
    predictions = np.array([[3, 0, 14], [2, 2, 5]])
    found = dataset.database_positions[predictions]
    expected = [[np.linalg.norm(found[q, 0] - found[q, rank]) for rank in range(3)] for q in range(2)]
    np.testing.assert_allclose(dataset.metres_from_first(predictions), expected)
    degrees = np.array([[48.0, 2.0], [48.001, 2.0], [np.nan, 2.0]])
    on_earth = replace(dataset, database_positions=degrees, geographic=True)
    (apart,) = on_earth.metres_from_first(np.array([[0, 1, 2]]))
    assert apart[:2] == pytest.approx([0, 111.2], abs=0.1) and np.isnan(apart[2])
    assert replace(dataset, database_positions=None).metres_from_first(predictions) is None


def test_sigterm_in_the_val_split_leaves_nothing(evaluated, tmp_path, monkeypatch):
    real = evaluation.extract

    def killed_after(*args):
        real(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("test.extract", killed_after)
    with pytest.raises(SystemExit) as exit_:
        evaluated("--accept=auto@30")
    (folder,) = tmp_path.glob("run*/*")
    assert exit_.value.code == 128 + signal.SIGTERM
    assert {path.name for path in folder.iterdir()} == {"info.log", "debug.log"}


def test_a_search_of_the_val_split_that_fails_keeps_what_was_extracted(evaluated, tmp_path, monkeypatch, capsys):
    def fails(*args, **settings):
        raise ValueError("FAISS cannot")

    monkeypatch.setattr(Search, "run", fails)
    refused(evaluated, capsys, "--accept=auto@30")
    (folder,) = tmp_path.glob("run*/*")
    assert {path.name for path in folder.rglob("*.npy")} == {"database.npy", "queries.npy"}
    assert {path.name for path in folder.iterdir()} == {"info.log", "debug.log", "kept"}


def test_each_dataset_has_its_own_distance(evaluated, copied):
    data, images = copied("two")
    (data / "other/images").mkdir(parents=True)
    (data / "other/images/test").symlink_to(images / "val")
    (data / "other/images/val").symlink_to(images / "test")
    folder = evaluated("--accept=auto@30", "--eval_dataset_name", "toy_city", "other", data=data)
    found = {name: results_of(folder / name)["accepted"]["distance"] for name in ("toy_city", "other")}
    alone = results_of(evaluated("--accept=auto@30", data=data))["accepted"]["distance"]
    assert found["toy_city"] == alone != found["other"]
