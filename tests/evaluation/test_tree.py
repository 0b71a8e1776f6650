"""Trees of database and queries, and which of them are near each other."""

import shutil
import tracemalloc

import numpy as np
import pytest

from datasets.evaluation import positives
from datasets.evaluation.layout import split_folder
from datasets.evaluation.tree import DatabaseQueries
from datasets.photos.listing import list_images
from datasets.photos.positions import several_zones, utm_positions
from utils.retrieval import search


def test_tree_is_listed_by_name_in_every_spelling(tmp_path, caplog):
    folder = tmp_path / "p@th" / "database"
    (folder / "b").mkdir(parents=True)
    names = ["@3@4@.JPG", "@1@2.5@x@.png", "b/@-5.5@6e3@.jpeg", "@9@9@.PNG"]
    for name in (*names, "@7@7@.webp"):
        (folder / name).touch()
    paths = list_images(folder)
    assert paths == sorted(str(folder / name) for name in names)
    assert "left out 1 file (1 .webp); in datasets only .jpg, .jpeg and .png count" in caplog.text
    assert utm_positions(paths).tolist() == [[1, 2.5], [3, 4], [9, 9], [-5.5, 6000]]


@pytest.mark.parametrize("name", ["photo.jpg", "@1@.jpg", "@1@x@.jpg", "@@@.jpg", "@nan@1@.jpg"])
def test_names_without_coordinates(name):
    with pytest.raises(ValueError, match=f"2 of 3 .* {name}; .*--positives_file"):
        utm_positions(["@1@2@.jpg", name, name])


def placed(database, queries, **options):
    """A dataset of these positions."""
    paths = {"database_paths": [""] * len(database), "queries_paths": [""] * len(queries)}
    return DatabaseQueries(name="x", database_positions=database, queries_positions=queries, **paths | options)


def test_positives_are_a_closed_ball():
    database = np.array([[0.0, 0], [25, 0], [25.001, 0], [15, 20], [500, 0]])
    dataset = placed(database, np.array([[0.0, 0], [900, 900]]), queries_paths=["near", "far"])
    first, second = dataset.positives(25)
    assert sorted(first) == [0, 1, 3] and len(second) == 0
    assert str(dataset) == "x (5 database, 2 queries)"
    assert dataset.covered_images(25) == [*dataset.database_paths, "near"]


@pytest.mark.parametrize("geographic", [False, True])
def test_positives_of_some_queries_at_a_time(monkeypatch, geographic):
    """As by every distance worked out, with photos of unknown position among them."""
    rng = np.random.default_rng(0)
    positions = rng.uniform(0, 100, (70, 2)) / (111_195 if geographic else 1)
    positions[::7] = np.nan
    dataset = placed(positions[:40], positions[40:], geographic=geographic)
    monkeypatch.setattr(positives, "PAIRS_TOGETHER", 200)
    metres = np.linalg.norm(positions[40:, None] - positions[None, :40], axis=2) * (111_195 if geographic else 1)
    expected = [np.flatnonzero(row <= 25).tolist() for row in metres]
    of_queries = dataset.positives(25.0)
    assert len(of_queries) == 30 and any(expected) and [] in expected
    for each_pass in (of_queries, of_queries, [of_queries[query] for query in range(-30, 0)]):
        assert [sorted(images.tolist()) for images in each_pass] == expected
    predictions = np.tile(np.arange(40), (30, 1))
    correct = search.correct_among(predictions, of_queries)
    assert [np.flatnonzero(row).tolist() for row in correct] == expected


def test_dense_positives_do_not_fill_the_memory(monkeypatch):
    """1,000 x 1,000, all of them correct: a million pairs, of 8 bytes each if they were kept."""
    dataset = placed(np.ones((1000, 2)), np.ones((1000, 2)))
    monkeypatch.setattr(positives, "PAIRS_TOGETHER", 2**16)
    tracemalloc.start()
    correct = search.correct_among(np.arange(1000)[:, None], dataset.positives(25.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert correct.all() and peak < 4e6


@pytest.fixture
def layouts(city, tmp_path):
    """The toy city's test split as the downloader writes it, without images/, and with a set of SF-XL's name."""
    for split in ("usual/images/test", "bare/test", "sf/test"):
        shutil.copytree(city / "toy_city/images/test", tmp_path / split)
    (tmp_path / "sf/test/queries").rename(tmp_path / "sf/test/queries_v1")
    return tmp_path


def test_a_tree_of_each_layout_is_the_same(layouts):
    names = {"usual": ("queries",), "bare": ("queries",), "sf": ("queries_v1",)}
    usual, *others = (
        DatabaseQueries.from_folder(layouts, name, "test", queries_names=sets) for name, sets in names.items()
    )
    for other in others:
        assert other.sizes | {"name": "usual test"} == usual.sizes
        assert [row.tolist() for row in other.positives(25.0)] == [row.tolist() for row in usual.positives(25.0)]


def test_each_split_lies_where_it_is_found(layouts):
    shutil.copytree(layouts / "bare/test", layouts / "usual/test")
    shutil.copytree(layouts / "bare/test", layouts / "usual/val")
    for split, folder in (("test", "images/test"), ("val", "val"), ("train", "images/train")):
        assert split_folder(layouts, "usual", split) == layouts / "usual" / folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (["@32@T@", "@33@T@"], "the UTM zones 32 and 33"),
        (["@32@T@", "@32@U@", "@@@", "@", "@032@N@"], ""),
        (["@56@J@", "@56@P@"], "both hemispheres"),
        (["@1@C@", "@60@X@", "@2@@"], "the UTM zones 1 and 2 and 60 and both hemispheres"),
    ],
)
def test_several_zones(fields, words):
    assert several_zones([f"f@lder/@1@2{part}45.0@7.0@.jpg" for part in fields]) == words


def test_a_tree_of_two_zones_is_told(layouts, caplog):
    DatabaseQueries.from_folder(layouts, "usual", "test")
    assert "zones" not in caplog.text
    next((layouts / "bare/test/queries").iterdir()).rename(layouts / "bare/test/queries/@1@2@33@T@.jpg")
    DatabaseQueries.from_folder(layouts, "bare", "test")
    assert [line for line in caplog.messages if "the UTM zones" in line and " and 33" in line]
