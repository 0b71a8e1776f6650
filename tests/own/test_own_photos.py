"""Anyone's photos: positions from EXIF data, held the right way up, antialiased."""

import csv
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from sklearn.metrics.pairwise import haversine_distances

import eval as eval_script
from datasets.check import main as check
from datasets.evaluation.database_queries import (
    EARTH_RADIUS,
    DatabaseQueries,
    haversine_metres,
    photo_positions,
)
from datasets.photos.batches import ImageList
from datasets.photos.exif import gps_position, gps_positions
from datasets.photos.transforms import read_pixels
from model import build_model
from parser import EvalOptions, parse

SMALL = "--backbone=dino_tiny --device=cpu --num_workers=0 --resize 56 56".split()


def gps_exif(latitude, longitude, **tags):
    """EXIF data as a phone writes it: whole degrees and minutes, hundredths of a second, and a letter for the sign.

    Tags given by name replace these, None removes one.
    """

    def sexagesimal(value):
        minutes, seconds = divmod(round(abs(value) * 360_000), 6000)
        return (float(minutes // 60), float(minutes % 60), seconds / 100)

    exif = Image.Exif()
    written = {
        "GPSLatitudeRef": "N" if latitude >= 0 else "S",
        "GPSLatitude": sexagesimal(latitude),
        "GPSLongitudeRef": "E" if longitude >= 0 else "W",
        "GPSLongitude": sexagesimal(longitude),
        **tags,
    }
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS[name]: value for name, value in written.items() if value is not None}
    return exif


def turned_exif(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.fixture
def photo(tmp_path):
    """Writes a photo of noise and returns its path."""

    def write(name, *, exif=None, size=(160, 120), seed=0, **settings):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        if exif is not None:
            settings["exif"] = exif
        Image.fromarray(pixels).resize(size).save(path, **settings)
        return str(path)

    return write


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize(
    ("latitude", "longitude"), [(48.858222, 2.2945), (-33.856784, 151.215297), (40.689249, -74.0445), (-0.000278, 0.0)]
)
def test_gps(photo, name, latitude, longitude):
    found = gps_position(photo(name, exif=gps_exif(latitude, longitude)))
    assert found == pytest.approx((latitude, longitude), abs=0.006 / 3600)  # half of a hundredth of a second


def test_no_gps(photo):
    without = gps_exif(48.0, 2.0, GPSLongitudeRef=None)
    letters = gps_exif(48.0, 2.0, GPSLatitudeRef="X")
    blank = gps_exif(-33.0, 151.0, GPSLatitudeRef=" ")
    no_fix = gps_exif(0.0, 0.0)
    nowhere_on_earth = gps_exif(95.0, 2.0)
    short = gps_exif(48.0, 2.0, GPSLatitude=(48.0, 30.0))
    paths = [
        photo(f"{n}.jpg", exif=exif)
        for n, exif in enumerate((None, without, letters, blank, no_fix, nowhere_on_earth, short))
    ]
    assert np.isnan(gps_positions(paths)).all()


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_photos_are_turned_as_exif_says_for_plain_folders_only(photo, suffix):
    for orientation in range(1, 9):
        path = photo(f"{orientation}.{suffix}", exif=turned_exif(orientation), quality=95)
        as_stored = read_pixels(path)
        assert as_stored.shape == (3, 120, 160)
        upright = read_pixels(path, upright=True)
        assert upright.shape == ((3, 120, 160) if orientation < 5 else (3, 160, 120))
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(upright.permute(1, 2, 0).numpy(), expected)
        assert torch.equal(ImageList([path])[0], as_stored)
        assert torch.equal(ImageList([path], upright=True)[0], upright)
    # Turned by hand: 6 is a camera held upright, whose stored columns are the rows of the scene.
    path = photo(f"6.{suffix}", exif=turned_exif(6), quality=95)
    turned = read_pixels(path, upright=True).permute(1, 2, 0).numpy()
    assert np.array_equal(turned, np.rot90(read_pixels(path).permute(1, 2, 0).numpy(), -1))


@pytest.mark.parametrize("suffix", ["webp", "avif", "tif"])
def test_photos_of_other_formats_are_turned_once(photo, suffix):
    for orientation in range(1, 9):
        settings = {"tiffinfo": {274: orientation}} if suffix == "tif" else {"exif": turned_exif(orientation)}
        path = photo(f"{orientation}.{suffix}", **settings)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert expected.shape == ((120, 160, 3) if orientation < 5 else (160, 120, 3))
        assert np.array_equal(read_pixels(path, upright=True).permute(1, 2, 0).numpy(), expected)


def test_odd_exif(photo):
    exif = turned_exif(6)
    exif[ExifTags.Base.Make] = "maker"
    # The maker's tag turned into the image's width: text where a number belongs.
    odd = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")
    for suffix in ("jpg", "png"):
        assert read_pixels(photo(f"odd.{suffix}", exif=odd), upright=True).shape == (3, 160, 120)
        garbage = photo(f"garbage.{suffix}", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
        assert read_pixels(garbage, upright=True).shape == (3, 120, 160)
        assert read_pixels(photo(f"none.{suffix}", exif=turned_exif(9)), upright=True).shape == (3, 120, 160)
    # XMP data in front of the EXIF data, as some programs write it.
    path = Path(photo("xmp.jpg", exif=turned_exif(6)))
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x/>"
    stored = path.read_bytes()
    path.write_bytes(stored[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + stored[2:])
    assert read_pixels(path, upright=True).shape == (3, 160, 120)


# A street of Paris: a database photo every 20 m northwards, and queries 4 m beside the first two and far away.
METRE = 1 / 111_195.0  # in degrees of latitude
HOME = (48.8584, 2.2945)


@pytest.fixture
def walk(photo, tmp_path):
    for n in range(5):
        photo(f"map/IMG_{n}.jpg", exif=gps_exif(HOME[0] + 20 * n * METRE, HOME[1]), seed=n)
    for n in range(2):
        east = 4 * METRE / math.cos(math.radians(HOME[0]))
        photo(f"today/IMG_{n}.jpg", exif=gps_exif(HOME[0] + 20 * n * METRE, HOME[1] + east), seed=n)
    photo("today/IMG_2.jpg", exif=gps_exif(HOME[0] + 1, HOME[1]), seed=7)
    return tmp_path / "map", tmp_path / "today"


def test_positives_and_distances_by_gps(walk):
    dataset = DatabaseQueries.from_folders(*walk, name="walk", exif=True)
    assert dataset.geographic
    assert [sorted(found.tolist()) for found in dataset.positives(25.0)] == [[0, 1], [0, 1, 2], []]
    metres = dataset.metres(np.array([[0, 1], [4, 1], [0, 0]]))
    # A degree is 111,195 m of latitude on the mean sphere; GPS as written is within 0.4 m.
    expected = [[4, math.hypot(4, 20)], [math.hypot(4, 60), 4], [111_195, 111_195]]
    np.testing.assert_allclose(metres, expected, atol=0.6)


def test_distances_over_the_sphere():
    """As scikit-learn computes them, from a metre to the other side of the earth."""
    degrees = np.random.default_rng(0).uniform((-90, -180), (90, 180), (200, 2))
    degrees = np.concatenate((degrees, degrees[:50] + 1e-5, [[90, 0], [-90, 0], [0, 180], [0, -180], [0, 0]]))
    expected = EARTH_RADIUS * haversine_distances(np.radians(degrees))
    np.testing.assert_allclose(haversine_metres(degrees[:, None], degrees[None]), expected, rtol=1e-9, atol=1e-6)


def test_names_come_before_exif(photo, tmp_path):
    for side in ("map", "today"):
        photo(f"{side}/@100.5@200@.jpg", exif=gps_exif(*HOME))
    dataset = DatabaseQueries.from_folders(tmp_path / "map", tmp_path / "today", name="both", exif=True)
    assert not dataset.geographic and dataset.database_positions.tolist() == [[100.5, 200.0]]


@pytest.fixture
def evaluated(tmp_path):
    torch.manual_seed(1)
    torch.save(build_model(backbone="dino_tiny").state_dict(), tmp_path / "weights.pth")

    def run(*flags):
        save_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        eval_script.main([*SMALL, f"--resume={tmp_path}/weights.pth", f"--save_dir={save_dir}", *map(str, flags)])
        (folder,) = save_dir.iterdir()
        return folder

    return run


def test_a_walk_is_evaluated(walk, evaluated):
    folder = evaluated(f"--database_folder={walk[0]}", f"--queries_folder={walk[1]}", "--save_predictions=3")
    results = json.loads((folder / "results.json").read_text())
    # The first two queries are the database's own photos, the third one is nowhere near.
    assert results["recalls"]["1"] == pytest.approx(200 / 3) and results["positive_distance"] == 25.0
    assert results["options"]["antialias"] is True
    with open(folder / "predictions.csv", newline="") as file:
        first = [row for row in csv.DictReader(file) if row["rank"] == "1"]
    assert [row["correct"] for row in first] == ["1", "1", "0"]
    page = (folder / "matches" / "index.html").read_text()
    assert re.search(r"</i> [34]\.\d m, similarity", page) and "</i> 111.2 km, similarity" in page


def test_a_map_of_phone_photos_is_asked_by_what_is_in_their_exif_data(walk, photo, evaluated, tmp_path, capsys):
    made = evaluated(f"--database_folder={walk[0]}", f"--queries_folder={walk[1]}", f"--save_map={tmp_path}/walk.npz")
    shutil.rmtree(walk[0])
    ask = f"--map={tmp_path}/walk.npz", f"--queries_folder={walk[1]}"
    asked = evaluated(*ask, "--save_predictions=2")
    recalls = [json.loads((folder / "results.json").read_text())["recalls"] for folder in (made, asked)]
    assert recalls[0] == recalls[1] and recalls[0]["1"] == pytest.approx(200 / 3)
    told = [[(row["metres"], row["correct"], row["database_latitude"]) for row in csv_rows(of)] for of in (made, asked)]
    assert told[0] == told[1] and float(told[0][0][0]) == pytest.approx(4, abs=0.6)
    photo("today/@1@2@.jpg")  # UTM metres, which degrees cannot be compared with
    evaluated(*ask)
    assert "1 of 4 queries have no position" in capsys.readouterr().err
    for path in walk[1].glob("IMG*"):
        path.unlink()
    evaluated(*ask)
    assert "none of the 1 queries has a position in EXIF data" in capsys.readouterr().err


def test_a_photo_without_a_position(walk, photo, evaluated, capsys):
    photo("today/sub/nowhere.jpg")
    folders = f"--database_folder={walk[0]}", f"--queries_folder={walk[1]}"
    with pytest.raises(SystemExit):
        evaluated(*folders)
    assert "1 of 4 query photos have no GPS position" in (shown := capsys.readouterr().err)
    assert "nowhere.jpg" in shown and "--no_labels" in shown
    with pytest.raises(ValueError, match=r"1 of 1 database photos .* coordinates, e.g. .*/b/oops.jpg; remove"):
        photo_positions([photo("a/@1@2@.jpg")], [photo("b/oops.jpg")])
    assert not (evaluated(*folders, "--no_labels") / "recalls.png").exists()


NEITHER = "neither EXIF nor the file name gives"
NAME_ALL = "name all of them @<UTM east>@<UTM north>@...@.jpg, "
SOME = "count only the others with --labels_where_known, "


@pytest.mark.parametrize(
    ("known_sides", "said", "remedy"),
    [
        ("map today", "1 of 2 database photos have no GPS position: ", f"; remove such photos, {NAME_ALL}{SOME}or "),
        ("today", "1 of 1 database photos have no GPS position: ", f"; {NAME_ALL}or "),
        ("map", "1 of 2 database photos have no GPS position: ", f"; {NAME_ALL}or "),
        ("", "1 of 1 database photos have no GPS position: ", f"; {NAME_ALL}or "),
    ],
)
def test_where_no_name_has_a_position_none_is_asked_for_in_all(known_sides, said, remedy, photo):
    """And of what cannot help where a side has no position at all, nothing is said."""
    sides = [[photo(f"{side}/lost.jpg")] for side in ("map", "today")]
    for paths, side in zip(sides, ("map", "today"), strict=True):
        if side in known_sides.split():
            paths.append(photo(f"{side}/found.jpg", exif=gps_exif(*HOME)))
    with pytest.raises(ValueError) as error:
        photo_positions(*sides)
    assert str(error.value) == (
        f"{said}{NEITHER} one, e.g. {sides[0][0]}{remedy}search without positions with --no_labels"
    )


@pytest.mark.parametrize("some_named", [False, True])
def test_check_gives_the_remedy_of_photos_without_a_position_once(some_named, photo, tmp_path, capsys):
    found = photo("map/found.jpg", exif=gps_exif(*HOME), seed=9)
    lost = [photo(f"{folder}/lost_{n}.jpg", seed=n) for n, folder in enumerate(("map", "map", "today"))]
    what = f"{NEITHER} a position"
    if some_named:
        photo("today/@1@2@.jpg", exif=gps_exif(*HOME), seed=8)
        what = "no GPS position in its EXIF data, and not all names have UTM coordinates"
    assert check([f"{tmp_path}/map", f"{tmp_path}/today", "--workers=1"]) == 1
    *_, first, second, third, last = capsys.readouterr().out.splitlines()
    assert first == (
        f"no-position: {lost[0]}: {what}; leave out such photos, search with --labels_where_known or --no_labels, or "
        "name all photos @<UTM east>@<UTM north>@...@.jpg"
    )
    assert [second, third] == [f"no-position: {path}: {what}" for path in lost[1:]]
    assert last == f"3 faults in {4 + some_named} images"
    os.unlink(found)
    if not some_named:
        assert check([f"{tmp_path}/map", f"{tmp_path}/today", "--workers=1"]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[2:] == [
            *(
                f"no-position: {tmp_path}/{side}: no photo has a position: neither EXIF nor a file name gives one; use "
                "--no_labels"
                for side in ("map", "today")
            ),
            "2 faults in 3 images",
        ]


def csv_rows(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_labels_where_they_are_known(walk, photo, evaluated, capsys):
    """The walk, a copy of whose last query lies in the database without a position, and a query without one."""
    photo("map/lost.jpg", seed=7)
    photo("today/lost.jpg", seed=0)
    folders = f"--database_folder={walk[0]}", f"--queries_folder={walk[1]}"
    with pytest.raises(SystemExit):
        evaluated(*folders)
    assert "1 of 6 database photos have no GPS" in (shown := capsys.readouterr().err)
    assert "with --labels_where_known, or" in shown
    folder = evaluated(*folders, "--labels_where_known", "--save_predictions=6", "--save_assignments=2")
    shown = capsys.readouterr().err
    assert "1 of 6 database images and 1 of 4 queries have no position" in shown
    assert "Recalls on today in map (6 database, 4 queries, 3 of them with a position): R@1: 66.7" in shown
    results = json.loads((folder / "results.json").read_text())
    assert results["recalls"]["1"] == pytest.approx(200 / 3) and results["recalls"]["5"] == pytest.approx(200 / 3)
    assert results["dataset"] == {"name": "today in map", "database": 6, "queries": 4, "queries_with_position": 3}
    rows = csv_rows(folder)
    assert len(rows) == 4 * 6
    for row in rows:
        known = "lost" not in row["query"] and "lost" not in row["database"]
        assert row["correct"] in (("0", "1") if known else ("",))
    page = (folder / "matches" / "index.html").read_text()
    assert page.count('class="unknown"') == 4 + 6 - 1 and "nan" not in page
    assert "first match wrong (0)" in page  # the first match of the far query is the photo without a position
    assert "no correct match among 6 (1)" in page


def test_labels_where_known_by_names(photo, tmp_path):
    for name in ("map/@1000@0@.jpg", "map/lost.jpg", "today/@1010@0@.jpg", "today/@9000@0@.jpg", "today/lost.jpg"):
        photo(name)
    sides = tmp_path / "map", tmp_path / "today"
    for exif in (True, False):
        dataset = DatabaseQueries.from_folders(*sides, name="x", exif=exif, labels_where_known=True)
        assert [found.tolist() for found in dataset.positives(25.0)] == [[0], [], []]
        assert dataset.judged_queries.tolist() == [True, True, False]
        assert str(dataset) == "x (2 database, 3 queries, 2 of them with a position)"
        metres = dataset.metres(np.array([[0, 1], [1, 0], [0, 1]]))
        np.testing.assert_array_equal(metres, [[10, np.nan], [np.nan, 8000], [np.nan, np.nan]])
    message = (
        "2 of 5 file names have no UTM coordinates, e.g. .*map/lost.jpg; .* run eval.py with --labels_where_known "
    )
    with pytest.raises(ValueError, match=message):
        DatabaseQueries.from_folders(*sides, name="x")


def test_what_more_photos_have_counts(photo, tmp_path, caplog):
    here = gps_exif(*HOME)
    photo("map/@1@2@.jpg")
    photo("map/a.jpg", exif=here)
    photo("today/@1@2@.jpg", exif=here)
    sides = tmp_path / "map", tmp_path / "today"
    dataset = DatabaseQueries.from_folders(*sides, name="x", exif=True, labels_where_known=True)
    assert not dataset.geographic and dataset.positives(25.0)[0].tolist() == [0]
    assert "2 photos have UTM coordinates in their names and 2 a position in their EXIF data" in caplog.text
    photo("map/b.jpg", exif=here)
    dataset = DatabaseQueries.from_folders(*sides, name="x", exif=True, labels_where_known=True)
    assert dataset.geographic and dataset.positives(25.0)[0].tolist() == [1, 2]
    assert "the more common is used: EXIF" in caplog.text


def test_labels_where_nothing_is_known(photo, tmp_path, capsys, evaluated):
    photo("map/a.jpg")
    photo("today/b.jpg", exif=gps_exif(*HOME))
    folders = f"--database_folder={tmp_path}/map", f"--queries_folder={tmp_path}/today"
    with pytest.raises(SystemExit) as stop:
        evaluated(*folders, "--labels_where_known")
    assert stop.value.code == 2
    assert "none of the 1 database photos has a position" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        parse(EvalOptions, ["--resume=x", *folders, "--labels_where_known", "--no_labels"])
    assert "--labels_where_known applies to labels from positions" in capsys.readouterr().err


def test_places_are_told_without_labels(walk, photo, evaluated):
    """A robot's question: where is this, which has no position itself?"""
    photo("today/sub/nowhere.jpg", seed=3)
    photo("map/nowhere.jpg", seed=9)
    folder = evaluated(f"--database_folder={walk[0]}", f"--queries_folder={walk[1]}", "--no_labels")
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["correct"] for row in rows} == {""}
    (answer,) = [row for row in rows if row["query"].endswith("nowhere.jpg") and row["rank"] == "1"]
    assert answer["database"].endswith("IMG_3.jpg") and answer["metres"] == ""
    assert float(answer["database_latitude"]) == pytest.approx(HOME[0] + 60 * METRE, abs=2e-6)
    assert float(answer["database_longitude"]) == pytest.approx(HOME[1], abs=2e-6)
    (first,) = [row for row in rows if "today/IMG_0" in row["query"] and "IMG_2" in row["database"]]
    assert float(first["metres"]) == pytest.approx(math.hypot(4, 40), abs=0.6)
    assert {row["database_latitude"] for row in rows if row["database"].endswith("nowhere.jpg")} == {""}


def test_antialias_is_for_plain_folders():
    folders = ["--database_folder=a", "--queries_folder=b"]
    assert parse(EvalOptions, ["--resume=x", *folders]).antialias is True
    assert parse(EvalOptions, ["--resume=x", "--no-antialias", *folders]).antialias is False
    assert parse(EvalOptions, ["--resume=x", "--eval_datasets_folder=d"]).antialias is False
    assert parse(EvalOptions, ["--resume=x", "--eval_datasets_folder=d", "--antialias"]).antialias is True
