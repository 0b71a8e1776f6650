"""A map that is made once and asked later: by eval.py, by a program, with or without the photos, damaged or foreign."""

import json
import os
import random
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import h5py
import numpy as np
import pytest
from helpers import MODEL, only_run, refusal, results_of, rows_of, save_weights
from PIL import Image

import eval as eval_script
import hubconf
import test as evaluation
from utils.retrieval.place_map import PlaceMap, write_map


@pytest.fixture
def run(weights, tmp_path):
    """Runs eval.py, which a map tells backbone and size, and returns the run's folder."""

    def run(*flags, model="plain"):
        save_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        encoder = ["--crossimage_encoder"] * (model == "encoder")
        small = ["--device=cpu", "--num_workers=0", f"--save_dir={save_dir}", f"--resume={weights}/{model}.pth"]
        eval_script.main([*small, *encoder, *map(str, flags)])
        return only_run(save_dir)

    return run


@pytest.fixture
def photos(city, tmp_path):
    """The toy city's test photos as two plain folders, in one that can be moved."""
    for side in ("database", "queries"):
        shutil.copytree(city / "toy_city/images/test" / side, tmp_path / "photos" / side)
    return tmp_path / "photos"


@pytest.fixture
def made(run, photos, tmp_path):
    """A map of the plain folders."""
    run(*plain(photos), f"--save_map={tmp_path}/photos/map.npz")
    return photos / "map.npz"


@pytest.fixture
def dataset(city):
    """The toy city as a dataset."""
    return [f"--eval_datasets_folder={city}", *"--eval_dataset_name=toy_city --backbone=dino_tiny".split()]


def plain(photos):
    flags = "--backbone=dino_tiny --resize 56 56".split()
    return [*flags, f"--database_folder={photos}/database", f"--queries_folder={photos}/queries"]


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("encoder", ("--antialias", "--encoder_context", "independent", "file_order")),
        ("plain", ("--pca_dim=7", "--pca_dataset_folder=toy_city/images/test/database", "--pca_whiten")),
        ("plain", ("--pca_dim=7", "--pca_dataset_folder=toy_city/images/test/database", "--descriptor_dtype=float16")),
    ],
    ids=["encoder", "whitened", "float16"],
)
def test_a_map_answers_as_the_evaluation_that_made_it(city, dataset, run, tmp_path, monkeypatch, model, flags):
    folder = run(*dataset, *"--resize 56 70".split(), f"--save_map={tmp_path}/city.npz", *flags, model=model)
    passed, real = [], evaluation.extract
    monkeypatch.setattr("test.extract", lambda *args: passed.append(args[1]) or real(*args))
    queries = f"{city}/toy_city/images/test/queries"
    asked = run(f"--map={tmp_path}/city.npz", f"--queries_folder={queries}", model=model)
    assert passed == [sorted(str(path) for path in Path(queries).iterdir())], "the queries alone"
    rows, expected = rows_of(asked), rows_of(folder)
    tolerance = 2e-3 if "float16" in str(flags) else 0
    for column in ("squared_descriptor_distance", "metres", "database_east", "database_north", "rank", "correct"):
        values = [[float(row[column]) for row in of] for of in (rows, expected)]
        np.testing.assert_allclose(*values, atol=tolerance if column.startswith("sq") else 0)
    assert [Path(row["database"]) for row in rows] == [Path(row["database"]) for row in expected]
    results = results_of(asked)
    assert results["recalls"] == results_of(folder)["recalls"] and results["recalls"]["5"] > 0
    assert results["options"]["resize"] == [56, 70]


def test_a_map_moves_with_its_photos_and_does_without_them(made, photos, run, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    moved = photos.rename(tmp_path / "elsewhere" / "city")
    ask = [f"--queries_folder={moved}/queries", "--save_predictions=2"]
    folder = run(f"--map={moved}/map.npz", *ask)
    database = [row["database"] for row in rows_of(folder)]
    assert all(Path(path).parent == moved / "database" for path in database)
    assert "the photo is not here" not in (folder / "matches/index.html").read_text().split("<main>")[1]
    # The map alone: found by the path that it names, and once that is gone too, by name.
    alone = shutil.move(moved / "map.npz", tmp_path / "map.npz")
    moved.rename(photos)
    ask[0] = f"--queries_folder={photos}/queries"
    capsys.readouterr()
    found = [row["database"] for row in rows_of(run(f"--map={alone}", *ask))]
    assert found == [path.replace(str(moved), str(photos)) for path in database]
    assert f"in {photos}/database)" in capsys.readouterr().err
    shutil.rmtree(photos / "database")
    folder = run(f"--map={alone}", *ask)
    assert [row["database"] for row in rows_of(folder)] == [Path(path).name for path in database]
    assert {row["correct"] for row in rows_of(folder)} == {"0", "1"}, "positions are in the map"
    main = (folder / "matches/index.html").read_text().split("<main>")[1]
    assert main.count("the photo is not here") == main.count("<figure") - main.count('class="query"')
    assert f"neither in {photos}/database nor moved with the map: names only" in capsys.readouterr().err


def test_a_copied_map_names_the_photos_that_it_was_made_of(made, photos, tmp_path, caplog):
    """Beside other photos of the same names: those that have their sizes, wherever they are, or names."""
    other = tmp_path / "other"
    (other / "database").mkdir(parents=True)
    names = sorted(path.name for path in (photos / "database").iterdir())
    for name in names:
        Image.new("RGB", (20, 20)).save(other / "database" / name)
    copied = shutil.copy(made, other / "map.npz")
    asked = PlaceMap(copied)
    assert asked.root == str(photos / "database") and asked.photos_there and asked.paths == PlaceMap(made).paths
    (photos / "database" / names[0]).write_bytes(b"replaced")
    asked = PlaceMap(copied)
    assert asked.paths == [names[0], *(f"{photos}/database/{name}" for name in names[1:])] and not asked.photos_there
    assert f"1 of 15 photos in {photos}/database are not those of {copied}" in caplog.text and names[0] in caplog.text
    shutil.rmtree(photos / "database")
    asked = PlaceMap(copied)
    assert asked.root is None and asked.paths == names, "of the other photos none is the map's"


def test_a_map_of_version_1_0_0_has_no_sizes(made, photos, tmp_path):
    with np.load(made) as content:
        arrays = {name: content[name] for name in content.files if name != "sizes"}
    settings = json.loads(str(arrays["settings"]))
    settings["arrays"].remove("sizes")
    np.savez(photos / "old.npz", **{**arrays, "settings": np.array(json.dumps(settings))})
    old, new = PlaceMap(photos / "old.npz"), PlaceMap(made)
    assert (old.paths, old.root, old.photos_there) == (new.paths, new.root, True)


def test_photos_behind_a_link_are_named_as_the_file_system_finds_them(photos, run, tmp_path):
    """`link/..` is not the folder that holds the link: in pairs, descriptors, page, map. Other links stay."""
    (photos / "database/deep").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here/link").symlink_to(photos / "database/deep")
    (tmp_path / "here/city").symlink_to(photos)
    flags = ["--backbone=dino_tiny", *"--resize 56 56".split(), "--save_pairs=1", "--save_h5", "--save_predictions=1"]
    flags += [f"--database_folder={tmp_path}/here/link/..", f"--save_map={tmp_path}/here/map.npz"]
    folder = run(*flags, f"--queries_folder={tmp_path}/here/city/./queries/../queries")
    named = [path for line in (folder / "pairs.txt").read_text().split("\n")[:-1] for path in line.split()]
    assert len(named) == 30 and all((tmp_path / name).exists() for name in named)
    assert {name.split("@")[0] for name in named} == {"here/city/queries/", "photos/database/"}
    with h5py.File(folder / "global_descriptors.h5") as file:
        assert all(name in file for name in named)
    links = re.findall('href="([^"]*jpg)"', (folder / "matches/index.html").read_text())
    assert links and all(Path(os.path.normpath(folder / "matches" / unquote(link))).exists() for link in links)
    assert PlaceMap(tmp_path / "here/map.npz").root == str(photos / "database")


def test_recall_counts_the_queries_that_have_a_position(made, photos, run, tmp_path, capsys):
    """Of the map's kind; the others are searched, and where none has one that is said."""
    queries = sorted((photos / "queries").iterdir())
    for number, path in enumerate(queries[3:]):
        path.rename(path.with_name(f"z{number}.jpg"))
    ask = [f"--map={made}", f"--queries_folder={photos}/queries"]
    folder = run(*ask)
    shown = capsys.readouterr().err
    assert "12 of 15 queries have no position" in shown and "15 queries, 3 of them with a position): R@1" in shown
    first = [row for row in rows_of(folder) if row["rank"] == "1"]
    hits = [int(row["correct"]) for row in first if row["correct"]]
    assert len(first) == 15 and len(hits) == 3
    assert results_of(folder)["recalls"]["1"] == pytest.approx(100 * np.mean(hits))
    for path in queries[:3]:
        path.unlink()
    os.link(next((photos / "database").iterdir()), photos / "queries" / "same.jpg")
    folder = run(*ask)
    shown = capsys.readouterr().err
    assert "no recall: none of the 13 queries has a position in the names" in shown
    assert "WARNING: 1 of the 13 queries are photos of the map, so they find themselves" in shown
    rows = rows_of(folder)
    assert len(rows) == 13 * 15 and not any(row["correct"] or row["metres"] for row in rows)
    assert all(row["database_east"] for row in rows) and "recalls" not in results_of(folder)


def test_a_program_asks_with_an_array(made, photos, run, weights):
    """As eval.py answers for the file, without its modules in the way of the program's own."""
    queries = sorted((photos / "queries").iterdir())[:6]
    first = {Path(row["query"]).name: row for row in rows_of(run(*plain(photos))) if row["rank"] == "1"}
    asked = hubconf.place_map(made, weights / "plain.pth", accept=0.15)
    for path in queries:
        photo = np.asarray(Image.open(path).convert("RGB"))
        row = first[path.name]
        found, position, distance, accepted = asked.locate(photo)
        assert found == row["database"] and position == (float(row["database_east"]), float(row["database_north"]))
        assert distance == pytest.approx(float(row["squared_descriptor_distance"]), abs=2e-3)  # JPEG decoders differ
        assert accepted == (distance <= 0.15)
    assert asked.locate(np.ascontiguousarray(photo[..., ::-1])[..., ::-1]) == asked.locate(photo)  # OpenCV's
    assert hubconf.place_map(made, weights / "plain.pth").locate(photo).accepted is None
    for call, problem in (
        (lambda: asked.locate(photo / 255), "float64 of shape"),
        (lambda: asked.locate(photo[:0]), r"uint8 of shape \(0,"),
        (lambda: asked.locate(np.zeros((2, 2, 4), dtype=np.uint8)), r"4\)"),
        (lambda: hubconf.place_map(made, weights / "other.pth"), "plain.pth, but .*other.pth"),
        (lambda: hubconf.place_map(made, weights / "plain.pth", accept=-1), "accept -1"),
        (lambda: PlaceMap(made).locate(photo), "place_map of hubconf.py"),
    ):
        with pytest.raises(ValueError, match=problem):
            call()


def test_the_accepted_distance_travels_with_the_map(photos, run, weights, tmp_path):
    made = run(*plain(photos), "--accept=0.15", f"--save_map={tmp_path}/city.npz")
    ask = [f"--map={tmp_path}/city.npz", f"--queries_folder={photos}/queries"]
    asked = rows_of(run(*ask))
    column = [row["accepted"] for row in asked]
    assert column == [row["accepted"] for row in rows_of(made)] and set(column) == {"0", "1"}
    assert {row["accepted"] for row in rows_of(run(*ask, "--accept=1e-9"))} == {"0"}
    place_map = hubconf.place_map(tmp_path / "city.npz", weights / "plain.pth")
    assert place_map.locate(np.asarray(Image.open(asked[0]["query"]))).accepted == (asked[0]["accepted"] == "1")


def test_what_does_not_fit_a_map_is_refused_with_its_reason(made, photos, run, capsys):
    ask = [f"--map={made}", f"--queries_folder={photos}/queries"]
    for flags, model, problem in (
        ((), "other", "plain.pth, but .*/other.pth.*save_map"),
        ((), "encoder", "command line.*crossimage_encoder False, not True.*save_map"),
        ((), "says", "says.pth.*crossimage_encoder False, not True"),
        (("--backbone_blocks=3",), "plain", "backbone_blocks all, not 3"),
        (("--supervlad_clusters=2", "--ghost_clusters=3"), "plain", "clusters 4, not 2, --ghost_clusters 1, not 3"),
    ):
        message = refusal(capsys, lambda flags=flags, model=model: run(*ask, *flags, model=model))
        assert str(made) in message and re.search(problem, message), message
    save_weights(photos / "two.pth", clusters=2)
    message = refusal(capsys, lambda: run(*ask, f"--resume={photos}/two.pth"))
    assert str(made) in message and "plain.pth" in message and "clusters 4" in message and "--save_map" in message


def test_a_map_that_cannot_be_written_is_refused_before_the_extraction(photos, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("test.extract", lambda *_: pytest.fail("extracted"))
    for path in ("city.pth", "nowhere/city.npz", "photos"):
        line = refusal(capsys, lambda path=path: run(*plain(photos), f"--save_map={tmp_path}/{path}"))
        assert f"--save_map {tmp_path}/{path}" in line
    flags = [*plain(photos), f"--save_map={tmp_path}/city.npz", "--encoder_context=file_order"]
    line = refusal(capsys, lambda: run(*flags, model="encoder"))
    assert "encoder_context file_order" in line and "encoder_context independent" in line
    line = refusal(capsys, lambda: run(f"--map={tmp_path}/none.npz", f"--queries_folder={photos}/queries"))
    assert f"no map at {tmp_path}/none.npz" in line


def test_a_map_is_written_whole_or_not_at_all(made, photos, run, capsys, monkeypatch):
    before = made.read_bytes()

    def half(chunks):
        for indices, rows in chunks:
            yield indices[:7], rows[:7]
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("eval.write_map", lambda path, chunks, **given: write_map(path, half(chunks), **given))
    line = refusal(capsys, lambda: run(*plain(photos), f"--save_map={made}"), status=1)
    assert f"{made} could not be written: [Errno 28]" in line
    assert made.read_bytes() == before and [*made.parent.glob("*.tmp*")] == []
    newest = max(made.parent.parent.glob("run*/*/predictions.csv"), key=os.path.getmtime)
    assert newest.with_name("results.json").exists(), "the rest is there"
    monkeypatch.undo()
    run(*plain(photos), f"--save_map={made}")
    assert made.read_bytes() == before, "to the same bytes"


def settings(**changes):
    return {
        "model": MODEL, "checkpoint": "a.pth", "weights": "0", "resize": [56, 56], "antialias": True, "upright": True,
        "precision": "fp32", "geographic": False, "accept": None, **changes,
    }  # fmt: skip


def written(path, rows, *, positions=None, dtype="float32", together=100, **changes):
    chunks = (
        (np.arange(at, min(at + together, len(rows))), rows[at : at + together]) for at in range(0, len(rows), together)
    )
    paths = [f"/photos/{number:05d}.jpg" for number in range(len(rows))]
    write_map(path, chunks, paths=paths, positions=positions, dtype=dtype, **settings(**changes))
    return PlaceMap(path)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("count", "dim"), [(900, 384), (1, 4)])
def test_the_nearest_is_that_of_an_exact_search(tmp_path, count, dim, dtype):
    """Of equal ones the first."""
    rng = np.random.default_rng(count)
    rows = unit(rng.standard_normal((count, dim)))
    rows[count // 2 :] = rows[: count - count // 2]  # each is there twice
    asked = written(tmp_path / "map.npz", rows, dtype=dtype)
    kept = rows.astype(dtype).astype(np.float32)
    far = unit(rng.standard_normal((20, dim)))
    for query in np.concatenate([rows[rng.integers(count, size=20)] + 0.01 * far, 9 * far, kept[-1:]]):
        distances = ((kept.astype(np.float64) - query) ** 2).sum(axis=1)
        asked.describe = lambda _, query=query: query
        place = asked.locate(np.zeros((1, 1, 3), dtype=np.uint8))
        index, distance = int(Path(place.path).stem), place.distance
        assert distance == pytest.approx(distances.min(), rel=1e-5, abs=1e-6)
        assert distances[index] == distances.min() and index == np.argmin(distances)
    assert distance == 0, "to itself"
    for wrong in (np.full(dim, np.nan), np.ones(dim + 1)):
        asked.describe = lambda _, wrong=wrong: wrong
        with pytest.raises(ValueError, match=f"must have {dim} finite numbers; this one has {len(wrong)}"):
            asked.locate(np.zeros((1, 1, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="descriptors are not finite"):
        written(tmp_path / "map.npz", np.full((4, 8), np.inf, dtype=np.float32)).load()


def test_names_of_any_bytes_and_unknown_positions_come_back(tmp_path):
    paths = [os.fsencode(tmp_path) + name for name in (b"/a b/\xff.jpg", "/ä/1.jpg".encode(), b"/c.jpg")]
    rows = unit(np.eye(3) + 0.1)
    positions = np.array([[1.5, 2.5], [np.nan, 1], [3, 4]])
    write_map(
        tmp_path / "map.npz",
        [(np.arange(3), rows)],
        paths=list(map(os.fsdecode, paths)),
        positions=positions,
        **settings(geographic=True, accept=0.25),
    )
    asked = PlaceMap(tmp_path / "map.npz", describe=lambda photo: rows[photo[0, 0, 0]])
    assert [os.fsencode(name) for name in asked.paths] == [path[len(os.fsencode(tmp_path)) + 1 :] for path in paths]
    assert asked.named_root == str(tmp_path) and asked.root is None and asked.geographic
    found = [asked.locate(np.full((2, 2, 3), number, dtype=np.uint8)) for number in range(3)]
    assert [place.position for place in found] == [(1.5, 2.5), None, (3, 4)]
    assert [place.path for place in found] == asked.paths and all(place.accepted for place in found)


def test_what_is_damaged_or_no_map_is_one_line(tmp_path):
    """Cut short, with bytes changed, of somebody else; never an array of another map."""
    path = tmp_path / "map.npz"
    rows = unit(np.random.default_rng(0).standard_normal((12, 16)))
    written(path, rows, positions=np.ones((12, 2)))
    good = path.read_bytes()

    def outcome(data):
        path.write_bytes(data)
        try:
            asked = PlaceMap(path)
            found = np.concatenate([chunk for _, chunk in asked.chunks()])
        except ValueError as error:
            assert re.search(r"map.npz is damaged .*--save_map", str(error)) and len(str(error)) < 400
            return "refused"
        assert np.array_equal(found, rows) and asked.positions is not None and asked.resize == (56, 56)
        return "the same"  # a bit of a date, say

    chance = random.Random(0)
    for length in range(0, len(good), 197):
        assert outcome(good[:length]) == "refused"
    outcomes = []
    for _ in range(150):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        outcomes.append(outcome(bytes(data)))
    assert outcomes.count("refused") > 125
    assert outcome(b"") == outcome(b"PK\x03\x04" + bytes(100)) == "refused"
    opened = written(path, unit(np.eye(4, 8)))
    written(path, unit(np.eye(6, 8)))
    with pytest.raises(ValueError, match="it has changed"):
        list(opened.chunks())
    assert outcome(good) == "the same"
    for name, arrays in {
        "foreign": {"a": np.arange(3)},
        "objects": {"settings": np.array({"a": print}, dtype=object), "paths": np.array(["a"], dtype=object)},
        "of another version": {"settings": np.array(json.dumps(settings(place_map=9)))},
    }.items():
        np.savez(path, **arrays)
        assert outcome(path.read_bytes()) == "refused", name


def test_a_model_that_this_version_does_not_know_is_named(tmp_path):
    """A later version's option; one that this version has left out is the default."""
    rows = np.eye(3, dtype="f")
    with pytest.raises(ValueError, match="map.npz.*knows no model with layer, tokens"):
        written(tmp_path / "map.npz", rows, model={**MODEL, "tokens": 3, "layer": "gem"})
    assert written(tmp_path / "map.npz", rows, model={**MODEL, "backbone_blocks": 5}).model["backbone_blocks"] == 5
    assert written(tmp_path / "map.npz", rows, more=[1]).model == {**MODEL, "backbone_blocks": None}
