"""A map that is made once and asked later: by eval.py, by a program, with or without the photos, damaged or foreign."""

import csv
import json
import os
import random
import re
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
import hubconf
import test as evaluation
from model import build_model
from utils.retrieval import place_map
from utils.retrieval.place_map import CANDIDATES, PlaceMap, write_map

SMALL = "--device=cpu --num_workers=0".split()
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Checkpoints with and without the encoder, another, and one that says what it is."""
    folder = tmp_path_factory.mktemp("weights")
    for name, encoder, seed in (("encoder", True, 1), ("plain", False, 1), ("other", False, 2)):
        torch.manual_seed(seed)
        state = build_model(backbone="dino_tiny", crossimage_encoder=encoder).state_dict()
        torch.save(state, folder / f"{name}.pth")
    written = {"backbone": "dino_tiny", "clusters": 4, "ghost_clusters": 1, "crossimage_encoder": True}
    torch.save({"model_state_dict": state, "model": written}, folder / "says.pth")
    return folder


@pytest.fixture
def run(weights, tmp_path):
    """Runs eval.py and returns the run's folder."""

    def run(*flags, model="plain"):
        save_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        flags = [*SMALL, f"--save_dir={save_dir}", f"--resume={weights}/{model}.pth", *map(str, flags)]
        flags += ["--crossimage_encoder"] if model == "encoder" else []
        eval_script.main(flags)
        (folder,) = save_dir.iterdir()
        return folder

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


def plain(photos):
    flags = "--backbone=dino_tiny --resize 56 56".split()
    return [*flags, f"--database_folder={photos}/database", f"--queries_folder={photos}/queries"]


def rows_of(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def recalls_of(folder):
    return json.loads((folder / "results.json").read_text()).get("recalls")


def refusal(capsys, call, status=2):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == status
    shown = capsys.readouterr().err.strip().splitlines()
    return next(
        line.split("error: ", 1)[-1].removeprefix("ERROR: ") for line in shown[::-1] if "rror: " in line.lower()
    )


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("plain", ()),
        ("encoder", ("--encoder_context", "independent", "file_order")),
        ("plain", ("--pca_dim=7", "--pca_dataset_folder=toy_city/images/test/database")),
        ("plain", ("--pca_dim=7", "--pca_dataset_folder=toy_city/images/test/database", "--pca_whiten")),
        ("plain", ("--test_method=five_crops", "--antialias")),
        ("plain", ("--descriptor_dtype=float16",)),
    ],
    ids=["plain", "encoder", "pca", "whitened", "prepared", "float16"],
)
def test_a_map_answers_as_the_evaluation_that_made_it(city, run, tmp_path, monkeypatch, model, flags):
    dataset = [f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city", *"--backbone=dino_tiny".split()]
    folder = run(*dataset, *"--resize 56 70".split(), f"--save_map={tmp_path}/city.npz", *flags, model=model)
    passed = []
    real = evaluation.extract
    monkeypatch.setattr("test.extract", lambda *args: passed.append(args[1]) or real(*args))
    queries = f"{city}/toy_city/images/test/queries"
    asked = run(f"--map={tmp_path}/city.npz", f"--queries_folder={queries}", model=model)
    assert passed == [sorted(str(path) for path in Path(queries).iterdir())], "the queries alone"
    if "five_crops" in str(flags):  # asked with whole photos, which the evaluation above was not
        folder = run(*dataset, *"--resize 56 70 --antialias".split())
    rows, expected = rows_of(asked), rows_of(folder)
    tolerance = 2e-3 if "float16" in str(flags) else 0
    for column in ("squared_descriptor_distance", "metres", "database_east", "database_north", "rank", "correct"):
        values = [[float(row[column]) for row in of] for of in (rows, expected)]
        np.testing.assert_allclose(*values, atol=tolerance if column.startswith("sq") else 0)
    assert [Path(row["database"]) for row in rows] == [Path(row["database"]) for row in expected]
    assert recalls_of(asked) == recalls_of(folder) and recalls_of(asked)["5"] > 0
    assert json.loads((asked / "results.json").read_text())["options"]["resize"] == [56, 70]
    size = (tmp_path / "city.npz").stat().st_size
    numbers = 15 * (7 if "pca" in str(flags) else 384) * (2 if "float16" in str(flags) else 4)
    assert numbers < size < numbers + 9000 + 4 * 8 * 384


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
    assert main.count("the photo is not here") == 2 * main.count('class="query"') == 2 * main.count("<img") == 30
    assert f"neither in {photos}/database nor moved with the map: names only" in capsys.readouterr().err


def test_a_map_finds_its_photos_through_links(made, photos, tmp_path):
    """Of a link to the folder above the map, and of one to the map itself; `..` of a link leads elsewhere."""
    (photos / "maps").mkdir()
    with open(made, "rb") as file, np.load(file) as content:
        arrays = {name: content[name] for name in content.files}
    settings = json.loads(str(arrays["settings"]))
    arrays["settings"] = np.array(json.dumps({**settings, "root_from_map": "../database", "root": "/nowhere"}))
    np.savez(photos / "maps/map.npz", **arrays)
    (tmp_path / "link").symlink_to("photos/maps")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/map.npz").symlink_to("../photos/maps/map.npz")
    for path in ("photos/maps/map.npz", "link/map.npz", "links/map.npz"):
        assert PlaceMap(tmp_path / path).root == str(photos / "database")


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
    assert len(first) == 15 and len(hits) == 3 and recalls_of(folder)["1"] == pytest.approx(100 * np.mean(hits))
    for path in queries[:3]:
        path.unlink()
    folder = run(*ask)
    shown = capsys.readouterr().err
    assert "no recall: none of the 12 queries has a position in the names" in shown
    rows = rows_of(folder)
    assert len(rows) == 12 * 15 and not any(row["correct"] or row["metres"] for row in rows)
    assert all(row["database_east"] for row in rows) and recalls_of(folder) is None
    shutil.copy(next((photos / "database").iterdir()), photos / "queries" / "known.jpg")
    os.link(next((photos / "database").iterdir()), photos / "queries" / "same.jpg")
    run(*ask, "--no_labels")
    assert "WARNING: 1 of the 14 queries are photos of the map, so they find themselves" in capsys.readouterr().err


def test_a_program_asks_with_an_array(made, photos, run, weights):
    """As eval.py answers for the file, without its modules in the way of the program's own."""
    queries = sorted((photos / "queries").iterdir())[:6]
    first = {Path(row["query"]).name: row for row in rows_of(run(*plain(photos))) if row["rank"] == "1"}
    asked = hubconf.place_map(made, weights / "plain.pth", accept=float(np.median([0.1, 0.2])))
    for path in queries:
        photo = np.asarray(Image.open(path).convert("RGB"))
        row = first[path.name]
        found, position, distance, accepted = asked.locate(photo)
        assert found == row["database"] and position == (float(row["database_east"]), float(row["database_north"]))
        assert distance == pytest.approx(float(row["squared_descriptor_distance"]), abs=2e-3)  # JPEG decoders differ
        assert accepted == (distance <= 0.15)
    assert asked.locate(np.ascontiguousarray(photo[..., ::-1])[..., ::-1]) == asked.locate(photo)  # OpenCV's
    assert hubconf.place_map(made, weights / "plain.pth").locate(photo).accepted is None
    for wrong, told in (
        (photo[..., 0], "uint8 of shape"),
        (photo / 255, "float64 of shape"),
        (str(path), "not str"),
        (photo[:0], "has no pixel"),
        (np.concatenate([photo, photo[..., :1]], axis=2), "4)"),
    ):
        with pytest.raises(ValueError, match="a photo ") as error:
            asked.locate(wrong)
        assert told in str(error.value)
    with pytest.raises(ValueError, match="with the weights of plain.pth, but .*other.pth has others"):
        hubconf.place_map(made, weights / "other.pth")
    with pytest.raises(ValueError, match="accept -1 is not a squared distance; use 0 or above"):
        hubconf.place_map(made, weights / "plain.pth", accept=-1)
    with pytest.raises(ValueError, match="no model to describe a photo with; load it with place_map of hubconf.py"):
        PlaceMap(made).locate(photo)


def test_the_accepted_distance_travels_with_the_map(city, photos, run, weights, tmp_path):
    """As `auto@` finds it, to the digits that files are written with: a distance accepts its own row."""
    dataset = [f"--eval_datasets_folder={city}", *"--eval_dataset_name=toy_city --backbone=dino_tiny".split()]
    made = run(*dataset, *"--resize 56 56 --accept=auto@5".split(), f"--save_map={tmp_path}/city.npz")
    distance = json.loads((made / "results.json").read_text())["accepted"]["distance"]
    assert PlaceMap(tmp_path / "city.npz").accept == distance
    asked = run(f"--map={tmp_path}/city.npz", f"--queries_folder={photos}/queries")
    column = [row["accepted"] for row in rows_of(asked)]
    assert column == [row["accepted"] for row in rows_of(made)] and set(column) == {"0", "1"}
    assert f"the map's accepted distance, {distance:.6g}: " in (asked / "info.log").read_text()
    assert "--accept None" not in (asked / "info.log").read_text()
    row = rows_of(asked)[0]
    own = run(f"--map={tmp_path}/city.npz", f"--queries_folder={photos}/queries", "--accept=1e-9")
    assert {row["accepted"] for row in rows_of(own)} == {"0"}
    for accept, accepted in ((float(row["squared_descriptor_distance"]), True), (1e-9, False), (None, None)):
        told = hubconf.place_map(tmp_path / "city.npz", weights / "plain.pth", accept=accept)
        place = told.locate(np.asarray(Image.open(row["query"])))
        assert place.accepted == (row["accepted"] == "1" if accepted is None else accepted)


def test_a_map_of_fewer_blocks_of_a_dinov3(city, photos, run, tmp_path, capsys):
    """Its patches are of 16 pixels."""
    torch.manual_seed(3)
    written = {"backbone": "dinov3_tiny", "backbone_blocks": 3, "clusters": 2, "ghost_clusters": 1}
    state = build_model(**written, crossimage_encoder=False).state_dict()
    file = tmp_path / "cut.pth"
    torch.save({"model_state_dict": state, "model": {**written, "crossimage_encoder": False}}, file)
    flags = [f"--resume={file}", f"--queries_folder={photos}/queries"]
    made = run(*flags, f"--database_folder={photos}/database", "--resize", 64, 64, f"--save_map={tmp_path}/city.npz")
    asked = run(*flags, f"--map={tmp_path}/city.npz")
    distances = [[float(row["squared_descriptor_distance"]) for row in rows_of(of)] for of in (made, asked)]
    np.testing.assert_allclose(*distances, atol=1e-5)
    row = rows_of(asked)[0]
    place = hubconf.place_map(tmp_path / "city.npz", file).locate(np.asarray(Image.open(row["query"])))
    assert place.distance == pytest.approx(float(row["squared_descriptor_distance"]), abs=1e-4)
    told = refusal(capsys, lambda: run(*flags, f"--map={tmp_path}/city.npz", "--backbone_blocks=4"))
    assert "--backbone_blocks 3, not 4" in told
    told = refusal(capsys, lambda: run(*flags, f"--map={tmp_path}/city.npz", "--backbone_blocks=12"))
    assert "--backbone_blocks 3, not all" in told


def test_a_distance_that_a_map_does_not_give_is_told(city, run, tmp_path, capsys):
    flags = [f"--eval_datasets_folder={city}", *"--eval_dataset_name=toy_city --backbone=dino_tiny".split()]
    flags += [*"--resize 56 56 --accept=auto@5".split(), f"--save_map={tmp_path}/city.npz"]
    for other in ("--test_method=central_crop", "--index=IVF2,Flat"):
        run(*flags, other)
        shown = capsys.readouterr().err
        assert f"--save_map keeps the distance of --accept auto@5, found by {other.replace('=', ' ')}; a map" in shown
    run(*flags, "--index=binary")
    assert "--save_map keeps" not in capsys.readouterr().err


def test_what_does_not_fit_a_map_is_refused_with_its_reason(made, photos, run, capsys):
    ask = [f"--map={made}", f"--queries_folder={photos}/queries"]
    for flags, model, told in (
        ((), "other", "map.npz was made with the weights of plain.pth, but .*/other.pth has others: .* give the"),
        (
            (),
            "encoder",
            "command line: it was made with --crossimage_encoder False, not True; query it with what it was",
        ),
        ((), "says", "says.pth: it was made with --crossimage_encoder False, not True"),
        (("--resize", "70", "56"), "plain", "command line: it was made with --resize 56 56, not 70 56"),
        (("--no-antialias",), "plain", "with --antialias True, not False"),
        (("--backbone=dino_small",), "plain", "with --backbone dino_tiny, not dino_small"),
        (("--supervlad_clusters=2", "--ghost_clusters=3"), "plain", "clusters 4, not 2, --ghost_clusters 1, not 3"),
    ):
        message = refusal(capsys, lambda flags=flags, model=model: run(*ask, *flags, model=model))
        assert re.search(told, message), message
    run(*ask, *"--resize 56 56 --backbone=dino_tiny --antialias".split())  # what the map says anyway
    torch.save(build_model(backbone="dino_tiny", clusters=2).state_dict(), photos / "two.pth")
    message = refusal(capsys, lambda: run(*ask, f"--resume={photos}/two.pth"))
    assert "map.npz was made with plain.pth, a model with --backbone dino_tiny --supervlad_clusters 4" in message


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--map=m.npz", "--map needs a folder of query photos; give --queries_folder"),
        ("--map=m.npz --queries_folder=q --database_folder=d", "--database_folder does not apply to --map: the map"),
        ("--map=m.npz --queries_folder=q --index=Flat --pca_dim=3", "--index and --pca_dim do not apply to --map"),
        ("--map=m.npz --queries_folder=q --save_map=n.npz", "--save_map does not apply to --map: the map"),
        ("--map=m.npz --queries_folder=q --encoder_context file_order", "--encoder_context does not apply to --map"),
        ("--eval_datasets_folder=d --eval_dataset_name a b --save_map=m.npz", "--save_map writes the map of one"),
    ],
)
def test_options_that_go_with_no_map(capsys, flags, told):
    assert told in refusal(capsys, lambda: eval_script.main(["--resume=file.pth", *flags.split()]))


def test_a_map_that_cannot_be_written_is_refused_before_the_extraction(photos, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("test.extract", lambda *_: pytest.fail("extracted"))
    for path, told in (
        ("city.pth", "is not a .npz file; name one, e.g. "),
        ("nowhere/city.npz", f"there is no folder {tmp_path}/nowhere; create it first"),
        ("photos", "is not a .npz file"),
    ):
        assert told in refusal(capsys, lambda path=path: run(*plain(photos), f"--save_map={tmp_path}/{path}"))
    flags = [*plain(photos), f"--save_map={tmp_path}/city.npz", "--encoder_context=file_order"]
    message = refusal(capsys, lambda: run(*flags, model="encoder"))
    assert "--encoder_context file_order batches the database's photos; give --encoder_context inde" in message
    message = refusal(capsys, lambda: run(f"--map={tmp_path}/none.npz", f"--queries_folder={photos}/queries"))
    assert f"no map at {tmp_path}/none.npz" in message


def test_a_map_is_written_whole_or_not_at_all(made, photos, run, capsys, monkeypatch):
    before = made.read_bytes()

    def half(chunks):
        for indices, rows in chunks:
            yield indices[:7], rows[:7]
            raise OSError(28, "No space left on device")

    real = evaluation.write_map
    monkeypatch.setattr("test.write_map", lambda path, chunks, **given: real(path, half(chunks), **given))
    message = refusal(capsys, lambda: run(*plain(photos), f"--save_map={made}"), status=1)
    assert f"{made} could not be written: [Errno 28] No space left on device" in message
    assert made.read_bytes() == before and [*made.parent.glob("*.tmp*")] == []
    newest = max(made.parent.parent.glob("run*/*/predictions.csv"), key=os.path.getmtime)
    assert newest.with_name("results.json").exists(), "the rest is there"
    monkeypatch.undo()
    run(*plain(photos), f"--save_map={made}")
    assert made.read_bytes() == before, "to the same bytes"


def settings(**changes):
    model = {"backbone": "dino_tiny", "clusters": 4, "ghost_clusters": 1, "crossimage_encoder": False}
    return {
        "model": model, "checkpoint": "a.pth", "weights": "0", "resize": [56, 56], "antialias": True, "upright": True,
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
@pytest.mark.parametrize(("count", "dim"), [(3000, 384), (1500, 30), (2000, 1), (9, 384), (1, 4)])
def test_the_nearest_is_that_of_an_exact_search(tmp_path, count, dim, dtype):
    """Whether a match is clear, one of many, or there is none; of equal ones the first."""
    rng = np.random.default_rng(count)
    rows = rng.standard_normal((count, dim)) * (1 + 5 * (np.arange(dim) % 7 == 0)) + 2
    rows = unit(rows) if dim > 1 else rows.astype(np.float32)
    rows[count // 2 :] = rows[: count - count // 2]  # each is there twice
    asked = written(tmp_path / "map.npz", rows, dtype=dtype)
    kept = rows.astype(dtype).astype(np.float32)
    far = rng.standard_normal((20, dim)).astype(np.float32)
    heavy = rng.standard_t(2, (20, dim)).astype(np.float32)
    near = rows[rng.integers(count, size=20)] + 0.01 * far
    for query in np.concatenate([near, unit(far), 9 * far, heavy, np.zeros((1, dim), np.float32), rows[-1:]]):
        distances = ((kept.astype(np.float64) - query) ** 2).sum(axis=1)
        index, distance = asked.nearest(query)
        assert distance == pytest.approx(distances.min(), rel=1e-5, abs=1e-6)
        assert distances[index] <= distances.min() * (1 + 1e-5) + 1e-6
        assert index == np.flatnonzero((kept == kept[index]).all(axis=1))[0]
    with pytest.raises(ValueError, match=f"the descriptor must have {dim} finite numbers; this one has"):
        asked.nearest(np.full(dim, np.nan))


def test_most_descriptors_are_told_from_the_nearest_by_their_codes(tmp_path, monkeypatch):
    """The floats of a few are gone over, not of all: that is where the time went."""
    rows = unit(np.random.default_rng(0).standard_normal((4000, 512)))
    asked = written(tmp_path / "map.npz", rows, together=1000)
    compared = []
    real = faiss.knn
    monkeypatch.setattr(faiss, "knn", lambda query, some, k: compared.append(len(some)) or real(query, some, k))
    asked.nearest(unit(rows[7:8] + 0.02)[0])
    assert sum(compared) <= place_map.FIRST
    compared.clear()
    asked.nearest(unit(np.random.default_rng(1).standard_normal((1, 512)))[0])  # of a place that is not there
    assert sum(compared) <= CANDIDATES


def test_descriptors_that_are_not_finite_are_refused(tmp_path):
    rows = np.ones((4, 8), dtype=np.float32)
    rows[2, 3] = np.inf
    with pytest.raises(ValueError, match="the map's descriptors are not finite"):
        written(tmp_path / "map.npz", rows).load()


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
            assert re.fullmatch(
                r".*map.npz is damaged or not a map of this version \(.*\); copy it again, or make .*", str(error)
            )
            assert len(str(error)) < 400
            return "refused"
        assert np.array_equal(found, rows) and asked.positions is not None and asked.resize == (56, 56)
        return "the same"  # a bit of a date, say

    chance = random.Random(0)
    for length in range(0, len(good), 97):
        assert outcome(good[:length]) == "refused"
    outcomes = []
    for _ in range(300):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        outcomes.append(outcome(bytes(data)))
    assert outcomes.count("refused") > 250
    assert outcome(b"") == outcome(b"PK\x03\x04" + bytes(100)) == "refused"
    assert outcome(good) == "the same"
    for name, arrays in {
        "foreign": {"a": np.arange(3)},
        "objects": {"settings": np.array({"a": print}, dtype=object), "paths": np.array(["a"], dtype=object)},
        "of another version": {"settings": np.array(json.dumps(settings(place_map=9)))},
    }.items():
        np.savez(path, **arrays)
        assert outcome(path.read_bytes()) == "refused", name
    path.write_bytes(good)
    with np.load(path) as arrays:
        np.savez_compressed(tmp_path / "packed.npz", **arrays)
    assert outcome((tmp_path / "packed.npz").read_bytes()) == "refused", "what unpacks to any size"
