"""Anyone's photos in GSV-Cities' form: from trees, phones and tables, with what is held out, and what is refused."""

import csv
import os
import re
import shlex
import shutil
from collections import Counter
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from test_own_photos import gps_exif

import train as train_script
from datasets import to_gsv_cities
from datasets.check import main as check
from datasets.evaluation.database_queries import DatabaseQueries
from datasets.own.photos import parse_time
from datasets.own.places import apart, cells_of, connected_share, heading_bins, map_shape
from datasets.own.utm import to_utm, zone_of
from datasets.photos import transforms
from datasets.training import randaugment
from datasets.training.gsv_cities import GSVCities, PlaceBatches
from parser import TrainOptions, parse

KEPT = {"train", *(f"{split}/{part}" for split in ("val", "test") for part in ("database", "queries"))}


@pytest.fixture(scope="session")
def small_photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def table(tmp_path, small_photo):
    """Writes a csv whose rows begin with a file name, and the photos that these name; returns its path."""

    def write(header, *rows, missing=()):
        (tmp_path / "in").mkdir(exist_ok=True)
        for row in rows:
            name = row.split(",")[0]
            if name and name not in missing and not (tmp_path / "in" / name).exists():
                shutil.copy(small_photo, tmp_path / "in" / name)
        (tmp_path / "in" / "photos.csv").write_text("\n".join((header, *rows)) + "\n")
        return tmp_path / "in" / "photos.csv"

    return write


@pytest.fixture
def converted(tmp_path, capsys):
    """Converts, and returns the output, the lines printed, and each photo's use and place by file name."""

    def run(source, *flags):
        output = tmp_path / "out"
        assert to_gsv_cities.main([str(source), f"--output={output}", *flags]) == 0
        with open(output / "photos.csv", newline="", errors="surrogateescape") as file:
            fates = {os.path.basename(row["path"]): (row["use"], row["place"]) for row in csv.DictReader(file)}
        lines = capsys.readouterr().out.splitlines()
        assert lines[:-1] == (output / "summary.txt").read_text().splitlines()
        return output, lines, fates

    return run


def rows_at(*places, each=4):
    """Rows path,east,north of so many photos at each position."""
    return [f"p{i}_{j}.jpg,{x},{y}" for i, (x, y) in enumerate(places) for j in range(each)]


@pytest.fixture
def toy_tree(city, tmp_path):
    """The toy city's training photos of London as a tree, and the place of each by file name."""
    places = {}
    with open(city / "gsv_cities/Dataframes/London.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    degrees = np.array([(float(row["lat"]), float(row["lon"])) for row in rows])
    for row, (east, north) in zip(rows, to_utm(degrees, *zone_of(degrees)), strict=True):
        (source,) = (city / "gsv_cities/Images/London").glob(f"*{row['panoid']}.jpg")
        date = f"{row['year']}{int(row['month']):02d}"
        name = (
            f"@{east:.2f}@{north:.2f}@30@U@{row['lat']}@{row['lon']}@{row['panoid']}@@{row['northdeg']}@@@@{date}@@.jpg"
        )
        target = tmp_path / "tree/images/train" / ("database" if len(places) % 2 else "queries") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
        places[name] = row["place_id"]
    return tmp_path / "tree", places, rows


def test_the_toy_city_as_a_tree_comes_back_as_its_own_places(toy_tree, city, converted, capsys):
    tree, own, rows = toy_tree
    output, lines, fates = converted(tree, "--gap=10", "--name=London")
    assert set(fates) == set(own) and {use for use, _ in fates.values()} == {"train"}
    assert len({(own[name], place) for name, (_, place) in fates.items()}) == len(set(own.values())) == 8
    assert len({place for _, place in fates.values()}) == 8
    assert lines[:2] == ["40 photos, of which 40 make 8 places to train on", "photos per place: 5 to 5"]
    # The same photos, months and directions as in its own form, read as the 23 cities are.
    mine, theirs = (GSVCities(f / "gsv_cities", cities=["London"], transform=None) for f in (output, city))
    assert len(mine) == len(theirs) == 8
    groups = [
        {frozenset(os.path.realpath(path) for path in places.image_paths(i)) for i in range(8)}
        for places in (mine, theirs)
    ]
    assert groups[0] == groups[1]
    with open(output / "gsv_cities/Dataframes/London.csv", newline="") as file:
        table = list(csv.DictReader(file))
    kept = ("year", "month", "northdeg", "lat", "lon")
    values = [Counter(tuple(float(row[name]) for name in kept) for row in of) for of in (table, rows)]
    assert values[0] == values[1]
    assert check([f"{output}/gsv_cities", "--workers=1"]) == 0, capsys.readouterr().out
    assert (
        all(os.path.islink(path) for path in mine.all_image_paths()) and (output / "places.png").stat().st_size > 5000
    )


def test_the_toy_city_as_a_table_is_trained_on_to_the_same_bits(city, tmp_path, converted):
    """With its places as labels and its photos in their order: the same labels, order of batches and images drawn."""
    own = GSVCities(city / "gsv_cities", cities=["Boston"], transform=randaugment.TrainingTransform((14, 14), 3))
    with open(city / "gsv_cities/Dataframes/Boston.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    paths = [path for place in range(len(own)) for path in own.image_paths(place)]
    assert [row["panoid"] for row in rows] == [path.rpartition("_")[2][:-4] for path in paths]
    lines = [
        f"{path},{row['lat']},{row['lon']},{int(row['place_id']):05d}" for path, row in zip(paths, rows, strict=True)
    ]
    (tmp_path / "boston.csv").write_text("\n".join(("path,lat,lon,label", *lines)) + "\n")
    output, _, _ = converted(tmp_path / "boston.csv", "--gap=10", "--name=Boston")
    mine = GSVCities(output / "gsv_cities", transform=own.transform)
    assert mine.labels.tolist() == own.labels.tolist()
    for place in range(len(own)):
        assert [os.path.realpath(path) for path in mine.image_paths(place)] == own.image_paths(place)
    assert (PlaceBatches(mine, batch_size=3).order(2) == PlaceBatches(own, batch_size=3).order(2)).all()
    assert torch.equal(mine[1, 2][0], own[1, 2][0])


def test_a_conversion_is_trained_on_beside_other_folders(toy_tree, city, converted, tmp_path, caplog):
    """Its held-out area validates and tests; hard batches mix the folders; nothing else is needed."""
    output, lines, fates = converted(toy_tree[0], "--gap=10", "--val_share=0.3", "--test_share=0.2", "--copy")
    flags = (
        f"--eval_datasets_folder={output} --eval_dataset_name=Mine --train_dataset_folder {output}/gsv_cities "
        f"{city}/gsv_cities --backbone=dino_tiny --device=cpu --num_workers=0 --resize 56 56 --train_resize 56 56 "
        f"--train_batch_size=4 --epochs_num=2 --place_order=similar --save_dir={tmp_path}/run"
    )
    with caplog.at_level("INFO"):
        train_script.main(flags.split())
    places = len({place for use, place in fates.values() if use == "train"}) + 16
    assert f"training on {places} places (" in caplog.text and "3 cities, 2 folders" in caplog.text
    assert f"epoch 2: described {places // 4 * 4} of {places} places in " in caplog.text
    used = Counter(use for use, _ in fates.values())
    test = f"Mine test ({used['test/database']} database, {used['test/queries']} queries)"
    assert f"Recalls on {test}" in caplog.text and used["val/queries"] >= 4
    # No photo that is held out lies near one that is trained on.
    positions = {name: np.array(name.split("@")[1:3], dtype=float) for name, (use, _) in fates.items() if use in KEPT}
    for a, (use, _) in fates.items():
        for b, (other, _) in fates.items():
            if use == "train" and other.startswith(("val", "test")):
                assert np.hypot(*(positions[a] - positions[b])) >= 10
    assert not any(path.is_symlink() for path in output.rglob("*.jpg"))


def test_utm():
    """The CN Tower, as encyclopedias give it, a point where the zone's middle meets the equator, and the south."""
    tower = np.array([[43.642567, -79.387139]])
    assert zone_of(tower) == (17, True)
    np.testing.assert_allclose(to_utm(tower, 17, True), [[630084, 4833438]], atol=1)
    np.testing.assert_allclose(to_utm(np.array([[0.0, 3.0]]), 31, True), [[500_000, 0]], atol=1e-6)
    np.testing.assert_allclose(to_utm(np.array([[0.0, 4.0]]), 31, True), [[611_280.4, 0]], atol=1)  # by tables
    opera = np.array([[-33.856784, 151.215297]])
    assert zone_of(opera) == (56, False)
    np.testing.assert_allclose(to_utm(opera, 56, False), [[334_896, 6_252_292]], atol=5)
    with pytest.raises(ValueError, match="convert one region at a time"):
        zone_of(np.array([[50.0, 0.0], [50.0, 13.0]]))


def test_cells_are_what_stands_together_and_squares_of_what_does_not():
    """Clumps that a grid would cut stay whole; a street of a photo a metre is cut every 10 m."""
    clumps = np.array([(x + dx, dy) for x in (0, 25, 50) for dx in (-2.4, 0.1, 2.4) for dy in (-1, 1)], dtype=float)
    assert np.unique(cells_of(clumps, 10.0), return_counts=True)[1].tolist() == [6, 6, 6]
    street = np.column_stack((np.arange(40.0), np.full(40, 100.0)))
    cells = cells_of(np.concatenate((clumps, street)), 10.0)
    assert np.unique(cells[18:], return_counts=True)[1].tolist() == [10] * 4
    assert not set(cells[:18]) & set(cells[18:])


def test_places_nearer_than_the_gap_do_not_stay_together():
    """At 0, 40, 80 and 130 m: the one at 40 has more photos; photos, not middles, count; opposite directions do not."""
    x = np.array([0, 0, 40, 40, 40, 80, 80, 130, 130], dtype=float)
    places = np.array([0, 0, 1, 1, 1, 2, 2, 3, 3])
    metres, same = np.column_stack((x, np.zeros(9))), np.zeros(9, dtype=int)
    assert set(places[apart(metres, places, same, 50.0, 1)]) == {1, 3}
    assert set(places[apart(metres, places, same, 40.0, 1)]) == {0, 1, 2, 3}, "40 m is not nearer than 40 m"
    assert apart(metres, places, same, 0.0, 1).all()
    directions = np.where(places == 2, 2, 0)
    assert set(places[apart(metres, places, directions, 50.0, 4)]) == {1, 2, 3}
    assert set(places[apart(metres, places, directions - (directions == 2), 50.0, 4)]) == {1, 3}, "neighbours overlap"
    assert set(places[apart(metres, places, np.where(places == 2, 3, 0), 50.0, 4)]) == {1, 3}, "all the way round"


def test_headings_fall_into_directions():
    photos = [to_gsv_cities.Photo(path="", heading=h) for h in (0, 44.9, 45, 134, 225, 315, 359, None)]
    assert heading_bins(photos, 4).tolist() == [0, 0, 1, 1, 3, 0, 0, -1]
    assert heading_bins(photos, 1).tolist() == [0] * 8


def test_a_share_is_of_cells_that_hang_together():
    """On a line of 100 cells, 20 of them; a second line far away is begun where the first is used up."""
    metres = np.column_stack((np.repeat(np.arange(100.0) * 10, 2), np.zeros(200)))
    cells = np.repeat(np.arange(100), 2)
    for seed in range(5):
        held = np.flatnonzero(connected_share(metres, cells, 0.2, 20.0, np.random.default_rng(seed))[::2])
        assert len(held) == 20 and held.max() - held.min() == 19
    metres[100:, 1] = 1e4
    held = connected_share(metres, cells, 0.6, 20.0, np.random.default_rng(0))[::2]
    assert held.sum() == 60 and (held[:50].all() or held[50:].all())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024:05:31 12:34:56", (2024, 5, 31, 12, 34, 56)),
        ("2024-05-31T12:34:56", (2024, 5, 31, 12, 34, 56)),
        ("2024-05-31T14:34:56+02:00", (2024, 5, 31, 12, 34, 56)),
        ("2024-05-31", (2024, 5, 31)),
        ("202405", (2024, 5, 1)),
        ("202412", (2024, 12, 1)),
        ("2024-12", (2024, 12, 1)),
        ("20241201", (2024, 12, 1)),
        ("2024", (2024, 1, 1)),
        ("13", None),
        ("nan", None),
        ("20240531_123456", (2024, 5, 31, 12, 34, 56)),
        ("1717158896", (2024, 5, 31, 12, 34, 56)),
    ],
)
def test_times(text, expected):
    if expected is None:
        with pytest.raises(ValueError):
            parse_time(text)
    else:
        assert parse_time(text) == datetime(*expected)


def phone_exif(latitude, longitude, *, time=None, heading=None, orientation=None):
    exif = gps_exif(latitude, longitude, **({} if heading is None else {"GPSImgDirection": heading}))
    if time:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = time
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    return exif


def test_phone_photos(tmp_path, small_photo, converted):
    """Two places 110 m apart; photos on the side, without a position, broken, there twice; and a video."""
    folder = tmp_path / "phone" / "2024"
    folder.mkdir(parents=True)
    image = Image.open(small_photo)
    for place in range(2):
        for i in range(4):
            exif = phone_exif(
                48.8580 + place * 0.001,
                2.2945,
                time=f"2024:0{1 + i}:02 03:04:05",
                heading=350.6 if i else None,
                orientation=6 if (place, i) == (1, 2) else None,
            )
            image.save(folder / f"p{place}_{i}.{'jpg' if i else 'png'}", exif=exif)
    image.save(folder / "nowhere.jpg")
    image.save(folder / "zero.jpg", exif=phone_exif(0.0, 0.0))
    (folder / "broken.jpg").write_bytes(small_photo.read_bytes()[:300])
    (folder / "z.jpg").symlink_to(folder / "p0_1.jpg")
    (folder / "film.mov").touch()
    output, lines, fates = converted(tmp_path / "phone", "--name=Paris")
    assert [line for line in lines if line.startswith("dropped")] == [
        "dropped: 1, the same file as another photo",
        "dropped: 1, cannot be read",
        "dropped: 2, no GPS position in EXIF data",
    ]
    assert lines[0] == f"{tmp_path}/phone: left out 1 file (1 .mov); convert other formats (HEIC) to JPEG"
    assert lines[1] == "12 photos, of which 8 make 2 places to train on"
    assert "1 photos were rewritten, turned as EXIF says" in lines
    assert fates["broken.jpg"][0] == "cannot be read" and fates["p0_0.png"] == ("train", fates["p0_3.jpg"][1])
    names = sorted(path.name for path in (output / "gsv_cities/Images/Paris").iterdir())
    assert len(names) == 8 and any("_2024_02_351_48.858_2.2945_" in name for name in names)
    (turned,) = [path for path in (output / "gsv_cities/Images/Paris").iterdir() if not path.is_symlink()]
    assert Image.open(turned).size == (24, 32)
    upright = transforms.read_pixels(folder / "p1_2.jpg", upright=True).float()
    assert (transforms.read_pixels(turned).float() - upright).abs().mean() < 20 and upright.shape == (3, 32, 24)
    places = GSVCities(output / "gsv_cities", transform=randaugment.TrainingTransform((14, 14), 0))
    assert len(places) == 2 and places[0, 0][0].shape == (4, 3, 14, 14)


def test_a_table_with_degrees_headings_and_times(table, converted):
    """One spot seen to the north and to the south is two places, which may stay together."""
    rows = [
        f"{side}{i}.jpg,52.5,13.4,{heading},2020-0{i + 1}-01"
        for side, heading in (("n", 5), ("s", 178))
        for i in range(4)
    ]
    rows += [f"w{i}.jpg,52.5,13.4,{heading},2021-01-01" for i, heading in enumerate((44, 46, "", 300))]
    source = table("Path,Lat,Lon,Heading,Time,Note", *(f"{row},x" for row in rows))
    output, lines, fates = converted(source, "--heading_bins=4")
    assert "columns ignored: note" in lines[0]
    assert {fates[f"n{i}.jpg"] for i in range(4)} == {("train", "0")} == {fates["w0.jpg"]}
    assert {fates[f"s{i}.jpg"] for i in range(4)} == {("train", "1")}
    assert fates["w2.jpg"][0].startswith("no heading") and fates["w1.jpg"][0].startswith("a place of fewer than 4")
    table_rows = (output / "gsv_cities/Dataframes/Mine.csv").read_text().splitlines()
    assert table_rows[1].startswith("0,2020,1,5,Mine,52.5000000,13.4000000,")
    one = converted
    shutil.rmtree(output)
    with pytest.raises(SystemExit):  # one place, where directions do not count
        one(source)


def test_of_a_dataset_the_train_split_alone_is_converted(toy_tree, city, tmp_path, converted, capsys):
    tree, own, _ = toy_tree
    (tree / "images/test").symlink_to(city / "toy_city/images/test")
    output, lines, fates = converted(tree, "--gap=10")
    assert set(fates) == set(own) and lines[0] == f"{tree}: only its train split is converted; test are for evaluation"
    shutil.rmtree(output)
    source = city / "toy_city"
    (tmp_path / "only/images").mkdir(parents=True)
    (tmp_path / "only/images/test").symlink_to(source / "images/test")
    _, lines, _ = converted(tmp_path / "only", "--gap=5", "--min_images=2")
    assert lines[0] == f"{tmp_path}/only has no train split: do not evaluate models trained on it on its test"
    assert any("places have fewer than 4 photos: train.py leaves them out unless" in line for line in lines)


def test_zones_are_not_on_one_map(tmp_path, small_photo, converted):
    """The same metres in London and in Sydney, and in two letters of one zone, which are one map."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for zone in ("30@U", "30@T", "56@H"):
        for i in range(4):
            shutil.copy(small_photo, folder / f"@700000.0@5700000.{i}@{zone}@@@{zone[-1]}{i}@.jpg")
    output, lines, fates = converted(folder)
    assert lines[0].startswith("names are in 2 UTM zones (30north 56south), whose metres cannot be compared")
    assert lines[1] == "12 photos, of which 12 make 2 places to train on" and lines[2].endswith("4 to 8")


def test_labels_do_without_positions(table, converted):
    source = table("path,label", *(f"{name}{i}.jpg,{name}" for name in "abcd" for i in range(4)), "e.jpg,", "f.jpg,f")
    output, lines, fates = converted(source, "--val_share=0.2")
    assert fates["e.jpg"][0] == "no label" and fates["f.jpg"][0].startswith(("a place of fewer", "val"))
    assert (
        any(line.startswith("no plot: there are only labels") for line in lines)
        and not (output / "places.png").exists()
    )
    assert len({place for use, place in fates.values() if use == "train"}) == 3
    dataset = DatabaseQueries.from_folder(output, "Mine", "test")
    assert all(len(found) for found in dataset.positives(25.0)[:2]) and len(dataset.queries_paths) >= 2


def test_what_is_held_out_by_an_area_and_by_time(table, converted):
    """East of 500 m; the place at 470 m is within the gap of it; the later photos ask."""
    positions = [(x, 100) for x in (0, 100, 200, 470, 500, 560, 600)]
    rows = [f"{row},20{10 + i % 4}-01-01" for i, row in enumerate(rows_at(*positions))] + ["q.jpg,690,100,2013-01-01"]
    output, lines, fates = converted(table("path,east,north,time", *rows), "--val_area", "700", "200", "500", "0")
    assert {fates[f"p{i}_0.jpg"][0] for i in range(3)} == {"train"}
    assert fates["p3_0.jpg"][0] == "nearer than --gap to what is held out for val"
    for i in range(4, 7):
        assert [fates[f"p{i}_{j}.jpg"][0] for j in range(4)] == ["val/database"] * 2 + ["val/queries"] * 2
    assert "val: 6 database photos and 7 queries, the later ones; 1 queries have no database photo within 25 m" in lines
    assert "test is a link to val: the best epoch is chosen and tested on the same photos" in lines
    val, test = (DatabaseQueries.from_folder(output, "Mine", split) for split in ("val", "test"))
    assert len(test.queries_paths) == 7 and sorted(map(len, val.positives(25.0))) == [0] + [2] * 6
    assert "the columns lat and lon hold metres / 111,320, since not all photos have degrees" in lines


def test_what_is_held_out_at_random(table, converted):
    source = table("path,lat,lon", *(f"p{i}.jpg,{0.001 * (i // 4)},10.0" for i in range(4, 44)))
    output, lines, fates = converted(source, "--val_area", "0.0085", "9", "0.1", "11", "--test_share=0.2", "--seed=3")
    uses = Counter(use for use, _ in fates.values())
    assert (uses["val/database"], uses["val/queries"], uses["test/database"], uses["test/queries"]) == (4, 4, 4, 4)
    assert any(line.startswith("test: 4 database photos and 4 queries, drawn at random") for line in lines)
    order = [PlaceBatches(GSVCities(output / "gsv_cities", transform=None), batch_size=2).order(0).tolist()]
    assert len(order[0]) == uses["train"] // 4


def test_areas_that_share_photos_say_so(table, converted):
    """Validation has them; the 2 photos at 150 m lie within the gap around it, and those at 200 m are the test's."""
    rows = [f"p{i}.jpg,{50 * (i // 2)},5000,{2020 + i % 2}-05" for i in range(28)]
    flags = ["--val_area", "0", "4999", "120", "5001", "--test_area", "50", "4999", "220", "5001", "--min_images=2"]
    _, lines, fates = converted(table("path,east,north,time", *rows), *flags, "--gap=60")
    assert "6 photos in --test_area are not in test: they are in val or near it" in lines
    uses = [fates[f"p{i}.jpg"][0] for i in range(10)]
    assert uses[:6] == ["val/database", "val/queries"] * 3 and uses[8:] == ["test/database", "test/queries"]
    assert uses[6:8] == ["nearer than --gap to what is held out for val"] * 2


def test_what_has_no_part_beside_labels_is_said(table, tmp_path, converted):
    """And a label that is in two places far apart: of 3 labels here, one, 300 m from end to end."""
    rows = [f"p{i}.jpg,{200 * (i // 4) + 300 * (i == 7)},5000,L{i // 4}" for i in range(12)]
    _, lines, _ = converted(table("path,east,north,label", *rows), "--gap=30")
    assert "labels define the places: --cell has no effect; 1 labels reach farther than 30 m, L1 300 m" in lines
    shutil.rmtree(tmp_path / "out")
    _, lines, _ = converted(table("path,east,north,label", *(row.replace(",500,", ",200,") for row in rows)))
    assert "labels define the places: --cell has no effect" in lines
    shutil.rmtree(tmp_path / "out")
    _, lines, _ = converted(table("path,label", *(f"p{i}.jpg,L{i // 4}" for i in range(12))))
    assert "labels define the places: --cell and --gap have no effect" in lines


@pytest.mark.parametrize("kind", ["a file", "too long", "no such place"])
def test_an_output_that_cannot_be_made_is_refused_before_photos_are_read(kind, table, tmp_path, capsys, monkeypatch):
    """But where only making it tells, which names the option all the same; nothing is left."""
    rows = [f"p{i}.jpg,{200 * (i // 4)},5000" for i in range(12)]
    source = table("path,east,north", *rows)
    output = {
        "a file": source / "below" / "out",
        "too long": tmp_path / ("x" * 300),
        "no such place": Path("/proc/none/out"),
    }[kind]
    if kind != "no such place":
        monkeypatch.setattr(to_gsv_cities, "collect", lambda *_, **__: pytest.fail("photos were read"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        to_gsv_cities.main([str(source), f"--output={output}"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and f"error: --output {output} cannot be created" in message
    assert message.endswith("name another folder") and sorted(tmp_path.rglob("*")) == before


def test_a_photo_far_from_all_others_is_named(table, tmp_path, capsys):
    rows = [f"p{i}.jpg,{48 + 0.01 * (i // 4)},2" for i in range(12)] + ["wrong.jpg,-33,151"]
    with pytest.raises(SystemExit):
        to_gsv_cities.main([str(table("path,lat,lon", *rows)), f"--output={tmp_path}/out"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert "convert one region at a time; farthest from the others is " in message and message.endswith("/in/wrong.jpg")


def test_copies_are_counted(tmp_path, table, converted):
    """Byte for byte, under another name; a link is the same file, and left out as before."""
    rows = [f"p{i}.jpg,{100 * (i // 4)},5000" for i in range(12)]
    source = table("path,east,north", *rows)
    for i in range(12):
        if i != 7:
            pixels = np.random.default_rng(i + 1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / f"p{i}.jpg")
    _, lines, fates = converted(source)
    assert not any("byte for byte" in line for line in lines)
    shutil.rmtree(tmp_path / "out")
    shutil.copy(tmp_path / "in" / "p2.jpg", tmp_path / "in" / "p7.jpg")
    _, lines, fates = converted(source)
    (line,) = (line for line in lines if "byte for byte" in line)
    assert line.startswith("1 photos are copies of others, byte for byte, e.g. ")
    assert "p7.jpg of " in line and "p2.jpg: kept" in line and fates["p7.jpg"] == ("train", "1")


def test_an_output_is_there_whole_or_not_at_all(table, tmp_path, monkeypatch, capsys):
    source = table("path,east,north", *rows_at((1, 0), (100, 0)))
    flags = [str(source), f"--output={tmp_path}/out"]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(to_gsv_cities, "draw_map", full)
        with pytest.raises(SystemExit) as exit_:
            to_gsv_cities.main(flags)
    assert exit_.value.code == 2 and "No space left" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    (tmp_path / "out.tmp" / "gsv_cities").mkdir(parents=True)  # of one that was killed
    assert to_gsv_cities.main(flags) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    with pytest.raises(SystemExit):
        to_gsv_cities.main(flags)
    assert f"--output {tmp_path}/out already exists; remove it" in capsys.readouterr().err


def spread(count, step, each):
    """A street: so many spots, so many metres apart, with so many photos each."""
    return rows_at(*((step * i, 0) for i in range(count)), each=each)


FEW, NEAR, MORE = "(--min_images)", "as many photos or more", "or add photos of the same places"
REMEDIES = {  # header, rows, flags, the largest reason, the remedy, and flags that follow it
    "few photos a place": (
        "path,east,north",
        spread(10, 12, 1),
        "--gap=5",
        FEW,
        "lower --min_images or raise --cell, " + MORE,
        "--cell=60 --gap=5",
    ),
    "few, and fewest already": (
        "path,east,north",
        spread(10, 12, 1),
        "--gap=5 --min_images=2",
        FEW,
        "raise --cell, " + MORE,
        "--cell=30 --min_images=2",
    ),
    "few of a label": (
        "path,east,north,label",
        [f"{row},{row[:2]}" for row in spread(10, 12, 1)],
        "",
        FEW,
        "lower --min_images, " + MORE,
        None,
    ),
    "few in a direction": (
        "path,east,north,heading",
        [f"{row},{90 * i % 360}" for i, row in enumerate(spread(3, 99, 4))],
        "--heading_bins=4",
        FEW,
        "lower --min_images or lower --heading_bins or raise --cell, " + MORE,
        "--heading_bins=1",
    ),
    "near another place": (
        "path,east,north",
        spread(3, 20, 4),
        "",
        NEAR,
        "lower --gap, or add photos from farther away",
        "--gap=15",
    ),
    "more near than few": (
        "path,east,north",
        spread(3, 20, 4) + ["z.jpg,500,0"],
        "",
        NEAR,
        "lower --gap, or add photos from farther away",
        "--gap=15",
    ),
    "near a label": (
        "path,east,north,label",
        [f"{row},{row[:2]}" for row in spread(3, 20, 4)],
        "",
        NEAR,
        "lower --gap, or add photos from farther away",
        "--gap=15",
    ),
    "near what is held out": (
        "path,east,north",
        spread(5, 30, 4),
        "--val_area -1 -1 1 1 --gap=100",
        "held out for val",
        "lower --gap, or hold out a smaller share or area",
        "--val_area -1 -1 1 1 --gap=20",
    ),
    "no heading": (
        "path,east,north,heading",
        [f"{row},{'5' * (i < 4)}" for i, row in enumerate(spread(4, 99, 4))],
        "--heading_bins=4",
        "which --heading_bins asks for",
        "leave out --heading_bins, or give all photos headings",
        "",
    ),
    "no heading at all": (
        "path,east,north",
        spread(2, 99, 4),
        "--heading_bins=4",
        "8 photos: no heading",
        "leave out --heading_bins, or give all photos headings",
        "",
    ),
    "held out": (
        "path,east,north",
        spread(3, 60, 4),
        "--val_area -1 -1 61 1",
        "nothing was dropped",
        "hold out a smaller share or area, or add photos",
        "--val_area -1 -1 1 1",
    ),
    "all held out": (
        "path,east,north",
        spread(3, 60, 4),
        "--val_area -1 -1 500 1",
        "val/database",
        "hold out a smaller share or area, or add photos",
        "--val_area -1 -1 1 1",
    ),
    "one cell": (
        "path,east,north",
        spread(3, 3, 4),
        "",
        "nothing was dropped",
        "lower --cell, or add photos from farther away",
        "--cell=2 --gap=1",
    ),
    "one spot": ("path,east,north", spread(1, 1, 4), "", "nothing was dropped", "add photos of other places", None),
    "one label": (
        "path,label",
        [f"p{i}.jpg,x" for i in range(4)],
        "",
        "nothing was dropped",
        "add photos with another label",
        None,
    ),
    "no position": (
        "path,east,north",
        [*spread(1, 1, 4), *(f"n{i}.jpg,," for i in range(5))],
        "",
        "5 photos: no position",
        "give all photos positions",
        None,
    ),
    "no file": (
        "path,east,north",
        [*spread(1, 1, 4), *(f"gone{i}.jpg,1,1" for i in range(5))],
        "",
        "5 photos: there is no such file",
        "correct the paths in the csv",
        None,
    ),
    "not one file": (
        "path,east,north",
        ["gone0.jpg,1,1"],
        "",
        "1 there is no such file",
        "correct the paths in the csv",
        None,
    ),
}


@pytest.mark.parametrize("kind", REMEDIES)
def test_the_remedy_follows_the_largest_reason(table, tmp_path, capsys, kind):
    """And where it is an option, it helps."""
    header, rows, flags, reason, remedy, better = REMEDIES[kind]
    source = str(table(header, *rows, missing=[f"gone{i}.jpg" for i in range(5)]))
    refused(capsys, tmp_path, [source, *flags.split()], rf"{re.escape(reason)}.*\); {re.escape(remedy)}$")
    if better is not None:
        assert to_gsv_cities.main([source, *better.split(), f"--output={tmp_path}/out"]) == 0


def test_what_is_not_converted_is_said_before_an_error_too(toy_tree, city, tmp_path, capsys, table):
    """As after success: of a tree, other files, and ignored columns; and before errors of reading."""
    tree, _, _ = toy_tree
    (tree / "images/test").symlink_to(city / "toy_city/images/test")
    note = f"{tree}: only its train split is converted; test are for evaluation"
    for flags in ("--min_images=99", "--val_area 0 0 1 1"):
        with pytest.raises(SystemExit, match="^2$"):
            to_gsv_cities.main([str(tree), *flags.split(), f"--output={tmp_path}/out"])
        captured = capsys.readouterr()
        assert captured.out.splitlines() == [note] and "error: " in captured.err
    source = table("path,lat,lon,mood", "a.jpg,48,2,good")
    (tmp_path / "none").mkdir()
    for sources, lines in (
        ([source], [f"{source}: columns ignored: mood"]),
        ([tree, source], [note, f"{source}: columns ignored: mood"]),
        ([tree, tmp_path / "none"], [note]),
    ):
        with pytest.raises(SystemExit, match="^2$"):
            to_gsv_cities.main([*map(str, sources), f"--output={tmp_path}/out"])
        assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("held_out", ["", "--val_share=0.3", "--test_share=0.3"])
def test_the_last_line_is_a_command_that_trains(held_out, table, tmp_path, capsys):
    output = tmp_path / "my city"
    source = table("path,east,north", *spread(12, 99, 4))
    assert to_gsv_cities.main([str(source), f"--output={output}", "--name=Paris", *held_out.split()]) == 0
    wrote, options = capsys.readouterr().out.splitlines()[-1].split("; train with ")
    assert wrote == f"wrote {output}"
    if held_out:
        assert options == f"--eval_datasets_folder='{output}' --eval_dataset_name=Paris"
    else:
        assert options == f"--train_dataset_folder '{output}/gsv_cities'"
    given = parse(TrainOptions, shlex.split(options) + ["--eval_datasets_folder=x"] * (not held_out))
    folders = given.train_dataset_folder or [given.eval_datasets_folder / "gsv_cities"]
    assert [folder / "Dataframes" for folder in folders] == [output / "gsv_cities" / "Dataframes"]
    assert not held_out or (given.eval_datasets_folder / given.eval_dataset_name / "images/val/queries").is_dir()


@pytest.mark.parametrize(
    ("extent", "inches", "stretch"),
    [
        ((500, 500), (10, 10), (1, 1)),
        ((500, 250), (10, 5), (1, 1)),
        ((1000, 30), (10, 2.5), (1, 1102 / 4 / 35)),  # one street, 30 m wide
        ((30, 1000), (2.5, 10), (1102 / 4 / 35, 1)),
        ((1000, 0), (10, 2.5), (1, 10)),
        ((0, 0), (10, 10), (1, 1)),
    ],
)
def test_a_map_has_the_shape_of_its_photos(extent, inches, stretch):
    shape = map_shape(np.array(extent, dtype=float))
    assert np.subtract(shape.inches, (1, 1.2)) == pytest.approx(inches, rel=0.02)
    assert shape.stretch == pytest.approx(stretch)
    for (low, high), metres in zip(shape.limits, extent, strict=True):
        assert low < 0 and high > metres and low + high == pytest.approx(metres)


def test_a_plot_of_one_street_is_wide(table, converted):
    other_side = [f"s{i}.jpg,{99 * i},12" for i in range(12)]
    output, _, _ = converted(table("path,east,north", *spread(12, 99, 4), *other_side))
    width, height = Image.open(output / "places.png").size
    assert 2.5 < width / height < 3.5


TWO = [(1, 0), (100, 0)]
BAD_TABLES = {  # header, rows, flags, what is said
    "one place": ("path,east,north", rows_at((1, 0)), "", "4 photos in 1 cells make 1 place to train on"),
    "one cell": ("path,east,north", rows_at((1, 0), (2, 0), (2, 1)), "", "12 photos in 1 cells make 1 place"),
    "sparse": ("path,east,north", rows_at(*TWO, each=3), "", "make 0 places to train on, .*fewer than 4 photos"),
    "gap": ("path,east,north", rows_at(*TWO), "--gap=100", "make 1 place to train on, .*nearer than --gap"),
    "twice": ("path,east,north", ["a.jpg,1,2", "./a.jpg,1,2"], "", "line 3: .*a.jpg is already in line 2"),
    "no column": (
        "file,east,north",
        rows_at(*TWO),
        "",
        "line 1: 'file,east,north': a csv starts with the columns path",
    ),
    "half a pair": ("path,east,lat", rows_at(*TWO), "", "line 1: 'path,east,lat': a csv starts with"),
    "both pairs": (
        "path,east,north,lat,lon",
        ["a.jpg,1,2,3,4"],
        "",
        "both east,north and lat,lon; keep only the columns",
    ),
    "column twice": ("path,east,north,east", ["a.jpg,1,2,1"], "", "a column appears twice"),
    "semicolons": ("path;east;north", ["a.jpg;1;2"], "", "separated by commas"),
    "no row": ("path,east,north", [], "", "has no row below its header"),
    "fields": ("path,east,north", ["a.jpg,1,2", "b.jpg,1"], "", "line 3: 2 fields for 3 columns"),
    "no path": ("path,east,north", [",1,2"], "", "line 2: no path"),
    "word": ("path,east,north", ["a.jpg,one,2"], "", "line 2: east 'one' is not a number; correct"),
    "underscore": ("path,lat,lon", ["a.jpg,4_8.5,2"], "", "line 2: lat '4_8.5' is not a number; correct"),
    "decimal comma": ("path,lat,lon", ['a.jpg,"48,5","2,3"'], "", "line 2: lat '48,5' is not a number; correct"),
    "infinite": ("path,east,north", ["a.jpg,inf,2"], "", "line 2: east,north inf,2.0 is infinite"),
    "absurd": ("path,east,north", [*rows_at(*TWO), "a.jpg,1e9,2"], "", "a.jpg: east 1e.09, north 2 is beyond any map"),
    "degrees as metres": ("path,east,north", rows_at((48.85, 2.29), (48.86, 2.29)), "", "look like degrees, .*lat,lon"),
    "metres swapped": ("path,east,north", rows_at((5e6, 4e5), (5.1e6, 4e5)), "", "positions look swapped"),
    "degrees swapped": ("path,lat,lon", rows_at((139.7, 35.6)), "", "139.7, longitude 35.6 is out of range; .*swapped"),
    "metres as degrees": ("path,lat,lon", rows_at((4.4e5, 5e6)), "", "is out of range; metres go into columns east"),
    "too wide": ("path,lat,lon", rows_at((48.8, 2.3), (40.7, -74.0)), "", "too far for one map in metres"),
    "no position": ("path,lat,lon", ["a.jpg,,", "b.jpg,0,0"], "", r"no photo of 2 can be used \(2 no position\)"),
    "no file": ("path,east,north", ["gone.jpg,1,2"], "", r"no photo of 1 can be used \(1 there is no such file\)"),
    "bad heading": ("path,east,north,heading", ["a.jpg,1,2,400"], "", "heading 400 is out of range"),
    "no heading": ("path,east,north", rows_at(*TWO), "--heading_bins=4", "no photo is left .*8 photos: no heading"),
    "bad time": ("path,east,north,time", ["a.jpg,1,2,noon"], "", "line 2: time 'noon' is not understood"),
    "some labels": ("path,east,north,label", ["a.jpg,1,2,x", "b.jpg,1,2,"], "", r"no photo .*|make 0 places"),
    "empty area": (
        "path,east,north",
        rows_at(*TWO),
        "--val_area 5 5 6 6",
        "--val_area 5 5 6 6 contains no photo; the photos",
    ),
    "all held out": (
        "path,east,north",
        rows_at(*TWO),
        "--val_area 0 -1 100 1",
        "no photo is left to train on .4 photos: val/.*smaller",
    ),
    "area of labels": ("path,label", ["a.jpg,x", "b.jpg,y"], "--val_area 5 5 6 6", "only labels; use --val_share"),
    "no times": (
        "path,east,north",
        rows_at(*TWO),
        "--val_share=0.4 --queries=time",
        "of 4 photos held out for val have",
    ),
    "share": ("path,east,north", rows_at(*TWO), "--val_share=1.5", "--val_share 1.5 is not a share"),
    "shares of all": (
        "path,east,north",
        rows_at(*TWO),
        "--val_share=0.6 --test_share=0.4",
        "--val_share 0.6 and --test_share 0.4 leave no photo to train on; use shares that add up to less than 1",
    ),
    "nothing left to hold out": (
        "path,east,north",
        rows_at(*TWO),
        "--val_share=0.5 --test_share=0.3 --gap=9000",
        "within --gap 9000 m of it, leave 0 of 8 photos; lower --gap",
    ),
    "share and area": ("path,east,north", rows_at(*TWO), "--val_share=.5 --val_area 1 1 2 2", "give one of them"),
    "queries of nothing": ("path,east,north", rows_at(*TWO), "--queries=time", "--queries time needs held-out photos"),
    "cell": ("path,east,north", rows_at(*TWO), "--cell=0", "--cell 0 is too small"),
    "not a number": ("path,east,north", rows_at(*TWO), "--gap=nan", "--gap nan is too small or not a number"),
    "name": ("path,east,north", rows_at(*TWO), "--name=a/b", "--name 'a/b' becomes part of file names"),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_what_is_refused(table, tmp_path, capsys, kind):
    """In one line, and nothing is left."""
    header, rows, flags, message = BAD_TABLES[kind]
    source = table(header, *rows, missing=("gone.jpg",) if kind != "no row" else ())
    refused(capsys, tmp_path, [str(source), *flags.split()], message)


def refused(capsys, tmp_path, flags, message):
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as exit_:
        to_gsv_cities.main([*flags, f"--output={tmp_path}/out"])
    assert exit_.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1
    assert re.search(message, said[0]), said[0]
    assert {path.name for path in tmp_path.iterdir()} == before


def test_what_is_no_file_and_names_that_are_no_text(table, tmp_path, small_photo, converted):
    """A pipe is not waited for, and folders are named in a line whatever they are called."""
    source = table(
        "path,east,north", *rows_at((1, 0), (100, 0)), "pipe.jpg,1,0", "folder,1,0", missing=("pipe.jpg", "folder")
    )
    os.mkfifo(tmp_path / "in/pipe.jpg")
    (tmp_path / "in/folder").mkdir()
    output, lines, _ = converted(source)
    assert "dropped: 2, there is no such file" in lines
    shutil.rmtree(output)
    odd = os.fsencode(tmp_path) + b"/a\xff\nb"
    os.mkdir(odd)
    for i in range(8):
        shutil.copy(small_photo, odd + b"/@%d@0@%d.jpg" % (100 * (i // 4), i))
    (tmp_path / "in/film.mov").touch()
    shutil.copy(tmp_path / "in/film.mov", odd + b"/film.mov")
    assert converted(os.fsdecode(odd))[1][0].startswith(f"{tmp_path}/a\\udcff\\nb: left out 1 file (1 .mov)")


def test_folders_that_are_refused(tmp_path, small_photo, table, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    refused(capsys, tmp_path, [str(photos)], "no photo in .*photos; put photos there")
    for name in ("none", "none.csv"):
        refused(capsys, tmp_path, [str(tmp_path / name)], f"{name} is neither a folder nor an existing .csv file")
    shutil.copy(small_photo, photos / "a.jpg")
    refused(capsys, tmp_path, [str(photos)], r"no photo of 1 can be used \(1 no GPS position in EXIF data\)")
    shutil.copy(small_photo, photos / "@500100@4000000@.jpg")
    refused(capsys, tmp_path, [str(photos)], r"only 1 of 2 names have UTM coordinates .*, unlike e.g. .*a.jpg")
    (photos / "a.jpg").unlink()
    source = table("path,lat,lon", "a.jpg,48,2")
    refused(capsys, tmp_path, [str(photos), str(source)], "photos has metres, .*photos.csv has degrees, which cannot")
    (photos / "@500100@4000000@.jpg").write_bytes(b"broken")
    refused(capsys, tmp_path, [str(photos)], r"no photo of 1 can be used \(1 cannot be read\)")
    with pytest.raises(SystemExit):
        to_gsv_cities.main([str(photos), f"--output={photos}/out"])
    assert "lies in" in capsys.readouterr().err and not (photos / "out").exists()
    (tmp_path / "utf16.csv").write_text("path,lat,lon\na.jpg,1,2\n", encoding="utf-16")
    refused(capsys, tmp_path, [str(tmp_path / "utf16.csv")], "line 1: not text in UTF-8, but perhaps UTF-16")
