"""Anyone's photos in GSV-Cities' form: from trees, phones and tables, with what is held out, and what is refused."""

import csv
import os
import re
import resource
import shlex
import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refusal, rows_of
from PIL import ExifTags, Image
from test_own_photos import gps_exif

import train as train_script
from datasets import to_gsv_cities
from datasets.check import main as check
from datasets.evaluation.tree import DatabaseQueries
from datasets.own.photos import parse_time
from datasets.own.places import apart, cells_of, chains, connected_share, heading_bins
from datasets.own.utm import to_utm
from datasets.photos import transforms
from datasets.training import randaugment
from datasets.training.gsv_cities import GSVCities, PlaceBatches
from parser import TrainOptions, parse

ROOT = Path(to_gsv_cities.__file__).parents[1]
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
        shutil.rmtree(output, ignore_errors=True)
        assert to_gsv_cities.main([str(source), f"--output={output}", *flags]) == 0
        with open(output / "photos.csv", newline="", errors="surrogateescape") as file:
            fates = {os.path.basename(row["path"]): (row["use"], row["place"]) for row in csv.DictReader(file)}
        lines = capsys.readouterr().out.splitlines()
        assert lines[:-1] == (output / "summary.txt").read_text().splitlines()
        return output, lines, fates

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """Asserts that a conversion ends in one line, that matches a pattern, and that nothing is left."""

    def check(message, *flags):
        before = sorted(tmp_path.rglob("*"))
        line = refusal(capsys, lambda: to_gsv_cities.main([*map(str, flags), f"--output={tmp_path}/out"]))
        assert re.search(message, line), line
        assert sorted(tmp_path.rglob("*")) == before

    return check


def rows_at(*places, each=4):
    """Rows path,east,north of so many photos at each position."""
    return [f"p{i}_{j}.jpg,{x},{y}" for i, (x, y) in enumerate(places) for j in range(each)]


@pytest.fixture
def toy_tree(city, tmp_path):
    """The toy city's training photos of London as a tree, and the place of each by file name."""
    places = {}
    rows = rows_of(city / "gsv_cities/Dataframes", "London.csv")
    degrees = np.array([(float(row["lat"]), float(row["lon"])) for row in rows])
    for row, (east, north) in zip(rows, to_utm(degrees), strict=True):
        (source,) = (city / "gsv_cities/Images/London").glob(f"*{row['panoid']}.jpg")
        date = f"{row['year']}{int(row['month']):02d}"
        where = f"@{east:.2f}@{north:.2f}@30@U@{row['lat']}@{row['lon']}@{row['panoid']}"
        name = f"{where}@@{row['northdeg']}@@@@{date}@@.jpg"
        target = tmp_path / "tree/images/train" / ("database" if len(places) % 2 else "queries") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
        places[name] = row["place_id"]
    return tmp_path / "tree", places, rows


def test_the_toy_city_as_a_tree_comes_back_as_its_own_places(toy_tree, city, converted, capsys):
    tree, own, rows = toy_tree
    output, lines, fates = converted(tree, "--gap=10", "--name=London")
    assert {use for use, _ in fates.values()} == {"train"}
    assert len({(own[name], place) for name, (_, place) in fates.items()}) == len(set(own.values())) == 8
    assert lines[:2] == ["40 photos, of which 40 make 8 places to train on", "photos per place: 5 to 5"]
    # The same photos, months and directions as in its own form, read as the 23 cities are.
    mine, theirs = (GSVCities(f / "gsv_cities", cities=["London"], transform=None) for f in (output, city))
    assert len(mine) == 8
    groups = [
        {frozenset(os.path.realpath(path) for path in places.image_paths(i)) for i in range(8)}
        for places in (mine, theirs)
    ]
    assert groups[0] == groups[1]
    table = rows_of(output / "gsv_cities/Dataframes", "London.csv")
    kept = ("year", "month", "northdeg", "lat", "lon")
    values = [Counter(tuple(float(row[name]) for name in kept) for row in of) for of in (table, rows)]
    assert values[0] == values[1]
    assert check([f"{output}/gsv_cities", "--workers=1"]) == 0, capsys.readouterr().out
    assert all(os.path.islink(path) for path in mine.all_image_paths())


def test_the_toy_city_as_a_table_is_trained_on_to_the_same_bits(city, tmp_path, converted):
    """With its places as labels and its photos in their order: the same labels, order of batches and images drawn."""
    own = GSVCities(city / "gsv_cities", cities=["Boston"], transform=randaugment.TrainingTransform((14, 14), 3))
    rows = rows_of(city / "gsv_cities/Dataframes", "Boston.csv")
    paths = [path for place in range(len(own)) for path in own.image_paths(place)]
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
    np.testing.assert_allclose(to_utm(np.array([[43.642567, -79.387139]])), [[630084, 4833438]], atol=1)
    np.testing.assert_allclose(to_utm(np.array([[0.0, 3.0]])), [[500_000, 0]], atol=1e-6)
    np.testing.assert_allclose(to_utm(np.array([[0.0, 4.0]])), [[611_280.4, 0]], atol=1)  # by tables
    np.testing.assert_allclose(to_utm(np.array([[-33.856784, 151.215297]])), [[334_896, 6_252_292]], atol=5)


def test_cells_are_what_stands_together_and_squares_of_what_does_not():
    """Clumps that a grid would cut stay whole; a street of a photo a metre is cut every 10 m."""
    clumps = np.array([(x + dx, dy) for x in (0, 25, 50) for dx in (-2.4, 0.1, 2.4) for dy in (-1, 1)], dtype=float)
    assert np.unique(cells_of(clumps, 10.0), return_counts=True)[1].tolist() == [6, 6, 6]
    street = np.column_stack((np.arange(40.0), np.full(40, 100.0)))
    cells = cells_of(np.concatenate((clumps, street)), 10.0)
    assert np.unique(cells[18:], return_counts=True)[1].tolist() == [10] * 4
    assert not set(cells[:18]) & set(cells[18:])


@pytest.mark.parametrize("seed", range(4))
def test_chains_are_those_of_a_plain_search(seed):
    """Of scattered positions and of a grid whose steps are just as long as a chain may reach."""
    rng = np.random.default_rng(seed)
    metres = rng.uniform(0, 60, (80, 2)) if seed % 2 else rng.integers(0, 12, (50, 2)) * 5.0 + (5e5, 4e6)
    expected = np.full(len(metres), -1)
    for start in range(len(metres)):
        waiting, number = [start] * int(expected[start] < 0), expected.max() + 1
        while waiting:
            expected[here := waiting.pop()] = number
            near = ((metres - metres[here]) ** 2).sum(axis=1) <= 25
            waiting += np.flatnonzero(near & (expected < 0)).tolist()
    assert chains(metres, 5.0).tolist() == expected.tolist()


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_twenty_thousand_photos_at_one_spot_take_no_more_memory_than_elsewhere(noise):
    """Of a parked robot, beside a walk: 4 GB when each was listed as a neighbour of each."""
    parked = np.random.default_rng(0).normal(0, noise, (20_000, 2))
    walk = np.column_stack((100 + 30 * np.arange(20.0), np.zeros(20)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cells = cells_of(metres := np.concatenate((parked, walk)), 20.0)
    assert np.unique(cells).size == 21 and (cells[:20_000] == cells[0]).all()
    stays = apart(metres, cells, np.zeros(len(cells), dtype=int), 50.0, 1)
    assert stays[:20_000].all() and stays[20_000:].sum() == 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # in KiB


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
    headings = np.array([0, 44.9, 45, 134, 225, 315, 359, np.nan])
    assert heading_bins(headings, 4).tolist() == [0, 0, 1, 1, 3, 0, 0, -1]
    assert heading_bins(headings, 1).tolist() == [0] * 8


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


@pytest.mark.parametrize("seed", [1, 4, 6])
def test_a_share_does_not_take_a_spot_that_holds_most_photos(seed):
    """200 photos at one spot and 5 at each of 20 others: 45 are wanted, and 45 it is."""
    cells = np.concatenate((np.zeros(200, dtype=int), np.repeat(np.arange(1, 21), 5)))
    metres = np.column_stack((100.0 * cells, np.zeros(len(cells))))
    held = connected_share(metres, cells, 0.15, 50.0, np.random.default_rng(seed))
    assert held.sum() == 45 and not held[:200].any()


def test_a_share_that_cannot_be_reached_is_said(table, converted):
    """Two spots with most photos, and of the others less than half of what is wanted."""
    rows = rows_at((0, 0), (200, 0), each=40) + [f"q{i}.jpg,{400 + 200 * (i // 2)},0" for i in range(8)]
    _, lines, _ = converted(table("path,east,north", *rows), "--val_share=0.2")
    assert any(line.startswith("--val_share 0.2: 9% of the photos") and "40 of 88" in line for line in lines)


NOON, NOON_UTC = datetime(2024, 5, 31, 12, 34, 56), datetime(2024, 5, 31, 12, 34, 56, tzinfo=UTC)
TIMES = {
    **dict.fromkeys(("2024:05:31 12:34:56", "20240531_123456", "20240531123456"), NOON),
    **dict.fromkeys(("2024:05:31 14:34:56+02:00", "2024-05-31T14:34:56+02:00"), NOON_UTC),
    **dict.fromkeys(("1717158896", "1717158896000", "1717158896000000000"), NOON_UTC),
    "2024-05-31": datetime(2024, 5, 31),
    **dict.fromkeys(("20241201", "202412", "2024-12"), datetime(2024, 12, 1)),
    "2024": datetime(2024, 1, 1),
}


def test_times():
    assert {text: parse_time(text) for text in TIMES} == TIMES
    for text in ("13", "nan", "17171588960"):
        with pytest.raises(ValueError):
            parse_time(text)


def test_phone_photos(tmp_path, small_photo, converted):
    """Two places 110 m apart; photos on the side, without a position, broken, there twice; and a video."""
    folder = tmp_path / "phone" / "2024"
    folder.mkdir(parents=True)
    image = Image.open(small_photo)
    for place in range(2):
        for i in range(4):
            exif = gps_exif(48.8580 + place * 0.001, 2.2945, GPSImgDirection=350.6 if i else None)
            exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = f"2024:0{1 + i}:02 03:04:05"
            exif[ExifTags.Base.Orientation] = 6 if (place, i) == (1, 2) else 1
            image.save(folder / f"p{place}_{i}.{'jpg' if i else 'png'}", exif=exif)
    image.save(folder / "nowhere.jpg")
    image.save(folder / "zero.jpg", exif=gps_exif(0.0, 0.0))
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
    paths = list((output / "gsv_cities/Images/Paris").iterdir())
    assert len(paths) == 8 and any("_2024_02_351_48.858_2.2945_" in path.name for path in paths)
    assert any("_2024_01_000_48.858_2.2945_" in path.name for path in paths), "an unknown heading is 0"
    (turned,) = [path for path in paths if not path.is_symlink()]
    assert Image.open(turned).size == (24, 32)
    upright = transforms.read_pixels(folder / "p1_2.jpg", upright=True).float()
    assert (transforms.read_pixels(turned).float() - upright).abs().mean() < 20


def test_a_table_with_degrees_headings_and_times(table, converted):
    """One spot seen to the north and to the south is two places, which may stay together; longitudes of 0 to 360, a
    heading that is not a number, and a time with a zone are read."""
    rows = [
        f"{side}{i}.jpg,52.5,358.1,{heading},2020-0{i + 1}-01{'T12:00:00Z' * (i == 3)}"
        for side, heading in (("n", 5), ("s", 178))
        for i in range(4)
    ]
    rows += [f"w{i}.jpg,52.5,358.1,{heading},2021-01-01" for i, heading in enumerate((44, 46, "", "nan", 300))]
    source = table("Path,Lat,Lon,Heading,Time,Note", *(f"{row},x" for row in rows))
    output, lines, fates = converted(source, "--heading_bins=4")
    assert "columns ignored: note" in lines[0] and lines[1].startswith("2 of 13 times have a zone, the others none")
    assert {fates[f"n{i}.jpg"] for i in range(4)} == {("train", "0")} == {fates["w0.jpg"]}
    assert {fates[f"s{i}.jpg"] for i in range(4)} == {("train", "1")}
    assert {fates[f"w{i}.jpg"][0] for i in (2, 3)} == {"no heading, which --heading_bins asks for"}
    assert fates["w1.jpg"][0].startswith("a place of fewer than 4")
    assert "\n0,2020,1,5,Mine,52.5000000,-1.9000000," in (output / "gsv_cities/Dataframes/Mine.csv").read_text()
    with pytest.raises(SystemExit):  # one place, where directions do not count
        converted(source)


def test_of_a_dataset_the_train_split_alone_is_converted(toy_tree, city, tmp_path, converted, table, capsys):
    """Which is said before an error too, of reading or of too few places, as are ignored columns."""
    tree, own, _ = toy_tree
    (tree / "images/test").symlink_to(city / "toy_city/images/test")
    assert set(converted(tree, "--gap=10")[2]) == set(own)
    note = f"{tree}: only its train split is converted; test are for evaluation"
    source = table("path,lat,lon,mood", "a.jpg,48,2,good")
    for arguments, notes in (
        (["--min_images=99"], [note]),
        ([source], [note, f"{source}: columns ignored: mood"]),
    ):
        with pytest.raises(SystemExit, match="^2$"):
            to_gsv_cities.main([*map(str, (tree, *arguments)), f"--output={tmp_path}/none"])
        assert capsys.readouterr().out.splitlines() == notes
    (tmp_path / "only/images").mkdir(parents=True)
    (tmp_path / "only/images/test").symlink_to(city / "toy_city/images/test")
    _, lines, _ = converted(tmp_path / "only", "--gap=5", "--min_images=2")
    assert lines[0] == f"{tmp_path}/only has no train split: do not evaluate models trained on it on its test"
    assert any("places have fewer than 4 photos: train.py leaves them out unless" in line for line in lines)


def test_zones_are_not_on_one_map(tmp_path, small_photo, refused, converted):
    """The same metres in London and in Sydney; two letters of one zone are one map."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for zone, east in (("30@U", 700_000), ("30@T", 700_100), ("56@H", 700_000)):
        for i in range(4):
            shutil.copy(small_photo, folder / f"@{east}.0@5700000.{i}@{zone}@@@{zone[-1]}{i}@.jpg")
    refused("zones 30 and 56 and both hemispheres.*convert each apart", folder)
    for path in folder.glob("*@56@*"):
        path.unlink()
    assert converted(folder)[1][0] == "8 photos, of which 8 make 2 places to train on"


def test_labels_do_without_positions(table, converted):
    source = table("path,label", *(f"{name}{i}.jpg,{name}" for name in "abcd" for i in range(4)), "e.jpg,", "f.jpg,f")
    output, lines, fates = converted(source, "--val_share=0.2")
    assert fates["e.jpg"][0] == "no label" and fates["f.jpg"][0].startswith(("a place of fewer", "val"))
    assert any(line.startswith("no plot: there are only labels") for line in lines)
    assert len({place for use, place in fates.values() if use == "train"}) == 3
    dataset = DatabaseQueries.from_folder(output, "Mine", "test")
    assert all(len(near) for near in list(dataset.positives(25.0))[:2]) and len(dataset.queries_paths) >= 2


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


def test_areas_and_shares_that_meet(table, converted):
    """Validation has its area; 2 photos at 150 m lie within the gap around it, and those at 200 m are the test's."""
    rows = [f"p{i}.jpg,{50 * (i // 2)},5000,{2020 + i % 2}-05" for i in range(28)]
    area = ["--val_area", "0", "4999", "120", "5001", "--min_images=2", "--gap=60"]
    source = table("path,east,north,time", *rows)
    _, lines, fates = converted(source, *area, "--test_area", "50", "4999", "220", "5001")
    assert "6 photos in --test_area are not in test: they are in val or near it" in lines
    uses = [fates[f"p{i}.jpg"][0] for i in range(10)]
    assert uses[:6] == ["val/database", "val/queries"] * 3 and uses[8:] == ["test/database", "test/queries"]
    assert uses[6:8] == ["nearer than --gap to what is held out for val"] * 2
    _, lines, fates = converted(source, *area, "--test_share=0.2", "--seed=3", "--queries=random")
    uses = Counter(use for use, _ in fates.values())
    assert (uses["val/database"], uses["val/queries"], uses["test/database"], uses["test/queries"]) == (3, 3, 3, 3)
    assert any(line.startswith("test: 3 database photos and 3 queries, drawn at random") for line in lines)


@pytest.mark.parametrize("output", ["in/photos.csv/below/out", "x" * 300, "/proc/none/out"])
def test_an_output_that_cannot_be_made_is_refused_before_photos_are_read(output, table, tmp_path, capsys, monkeypatch):
    source = table("path,east,north", *rows_at((0, 5000), (200, 5000), (400, 5000)))
    monkeypatch.setattr("datasets.own.conversion.collect", lambda *_: pytest.fail("photos were read"))
    before, output = sorted(tmp_path.rglob("*")), tmp_path / output
    assert f"--output {output}" in refusal(capsys, lambda: to_gsv_cities.main([str(source), f"--output={output}"]))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_is_there_whole_or_not_at_all(table, tmp_path, monkeypatch, capsys):
    source = table("path,east,north", *rows_at((1, 0), (100, 0)))
    flags = [str(source), f"--output={tmp_path}/out"]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("datasets.own.conversion.place_photo", full)
        line = refusal(capsys, lambda: to_gsv_cities.main(flags))
    assert f"No space left on device; nothing was written to --output {tmp_path}/out" in line
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    (tmp_path / "out.tmp" / "gsv_cities").mkdir(parents=True)  # of one that was killed
    assert to_gsv_cities.main(flags) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    assert f"--output {tmp_path}/out already exists" in refusal(capsys, lambda: to_gsv_cities.main(flags))


def spread(count, step, each):
    """A street: so many spots, so many metres apart, with so many photos each."""
    return rows_at(*((step * i, 0) for i in range(count)), each=each)


AREA = "--val_area -1 -1 1 1"
TOO_FEW = {  # rows, flags, reasons in their order, and flags that help
    "few photos a place": (spread(10, 12, 1), "--gap=5", ["10 photos: .*--min_images"], "--cell=60 --gap=5"),
    "near": ([*spread(3, 20, 4), "z.jpg,500,0"], "", ["8 .*--gap", "1 photos: .*--min_images"], "--gap=15"),
    "held out": (spread(5, 30, 4), f"{AREA} --gap=100", ["12 .*for val", "2 .*val/"], f"{AREA} --gap=20"),
    "one cell": (spread(3, 3, 4), "", ["none dropped"], "--cell=2 --gap=1"),
}


@pytest.mark.parametrize("kind", TOO_FEW)
def test_too_few_places_are_told_with_what_was_dropped(kind, table, refused, converted):
    """And the options that are named help."""
    rows, flags, reasons, better = TOO_FEW[kind]
    source = table("path,east,north", *rows)
    message = rf"place.* to train on.*\({'.*'.join(reasons)}.*\); .*--min_images, --heading_bins or --gap, .*--cell"
    refused(message, source, *flags.split())
    converted(source, *better.split())


@pytest.mark.parametrize("held_out", ["", "--test_share=0.3"])
def test_the_last_line_is_a_command_that_trains(held_out, table, tmp_path, capsys):
    output = tmp_path / "my city"
    source = table("path,east,north", *spread(12, 99, 4))
    assert to_gsv_cities.main([str(source), f"--output={output}", "--name=Paris", *held_out.split()]) == 0
    wrote, options = capsys.readouterr().out.splitlines()[-1].split("; train with ")
    assert wrote == f"wrote {output}"
    given = parse(TrainOptions, shlex.split(options) + ["--eval_datasets_folder=x"] * (not held_out)).data
    folders = given.train_dataset_folder or [given.eval_datasets_folder / "gsv_cities"]
    assert [folder / "Dataframes" for folder in folders] == [output / "gsv_cities" / "Dataframes"]
    assert not held_out or (given.eval_datasets_folder / given.eval_dataset_name / "images/val/queries").is_dir()


TWO = rows_at((1, 0), (100, 0))
EN, LATLON = "path,east,north", "path,lat,lon"
BAD_TABLES = [  # header, rows, flags, what is said
    ("file,east,north", TWO, "", "line 1: 'file,east,north': .*path, and east,north or lat,lon or label"),
    ("path,east,north,lat,lon", ["a.jpg,1,2,3,4"], "", "both east,north and lat,lon.*; keep"),
    ("path;east;north", ["a.jpg;1;2"], "", "line 1: .*separated by commas"),
    (EN, [], "", "photos.csv has no row"),
    (EN, ["a.jpg,1,2", "b.jpg,1"], "", "line 3: 2 fields for 3 columns"),
    (LATLON, ['a.jpg,"48,5","2,3"'], "", "line 2: lat '48,5'"),
    (EN, [*TWO, "a.jpg,1e9,2"], "", r"1e\+09, 2 of .*a.jpg is beyond any map"),
    (EN, rows_at((48.85, 2.29), (48.86, 2.29)), "", "48.85, 2.29 of .*p0_0.jpg, .*lat,lon"),
    (LATLON, rows_at((139.7, 35.6)), "", "139.7, 35.6 of .*p0_0.jpg is out of range; .*lat,lon"),
    (LATLON, [*rows_at((48.8, 2.3)), "far.jpg,-33,151"], "", "-33.0000 to 48.8000 .*one region .*is .*/in/far.jpg$"),
    (LATLON, ["a.jpg,,", "b.jpg,0,0"], "", r"no photo of 2 can be used \(2 no position\); .*csv"),
    ("path,east,north,heading", ["a.jpg,1,2,400"], "", "line 2: heading 400 .*0 to 360"),
    ("path,east,north,time", ["a.jpg,1,2,noon"], "", "line 2: time 'noon'.*2024-05-31T12:00:00"),
    (EN, TWO, "--val_area 5 5 6 6", "--val_area .5.0, 5.0, 6.0, 6.0. contains .* .1.0, 0.0. and .100.0, 0.0."),
    ("path,label", ["a.jpg,x", "b.jpg,y"], "--val_area 5 5 6 6", "--val_area .*use --val_share"),
    (EN, TWO, "--val_share=0.4 --queries=time", "4 of 4 photos held out for val .*--queries random"),
    (EN, TWO, "--val_share=0.5 --test_share=0.3 --gap=9000", "9000 m .*0 of 8 photos; lower --gap"),
    (EN, TWO, "--val_share=.5 --val_area 1 1 2 2", "--val_area and --val_share .*give one of them"),
    (EN, TWO, "--gap=nan", "--gap: nan is out of range"),
    (EN, TWO, "--cell=inf", "--cell inf .*finite"),
    (EN, TWO, "--queries=random", "--queries random needs held-out photos; .*--val_share"),
    (EN, TWO, "--val_share=0.5 --test_share=0.6", "--val_share and --test_share, 1.1, .*less than 1"),
    (EN, TWO, "--name=a/b", "--name 'a/b' .*letters, digits and -"),
]


@pytest.mark.parametrize(("header", "rows", "flags", "message"), BAD_TABLES)
def test_what_is_refused(header, rows, flags, message, table, refused):
    refused(message, table(header, *rows), *flags.split())


def test_what_is_no_file_and_names_that_are_no_text(table, tmp_path, small_photo, converted):
    """A pipe is not waited for, and folders are named in a line whatever they are called."""
    rows = [*TWO, "./p0_0.jpg,1,0", "pipe.jpg,1,0", "folder,1,0"]
    source = table(EN, *rows, missing=("./p0_0.jpg", "pipe.jpg", "folder"))
    os.mkfifo(tmp_path / "in/pipe.jpg")
    (tmp_path / "in/folder").mkdir()
    lines = converted(source)[1]
    assert "dropped: 2, there is no such file" in lines and "dropped: 1, the same file as another photo" in lines
    odd = os.fsencode(tmp_path) + b"/a\xff\nb"
    os.mkdir(odd)
    for i in range(8):
        shutil.copy(small_photo, odd + b"/@%d@0@%d.jpg" % (100 * (i // 4), i))
    os.mknod(odd + b"/film.mov")
    assert converted(os.fsdecode(odd))[1][0].startswith(f"{tmp_path}/a\\udcff\\nb: left out 1 file (1 .mov)")


def test_folders_that_are_refused(tmp_path, small_photo, table, refused, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    refused("no photo in .*photos; put photos there", photos)
    refused("none.csv is neither a folder nor an existing .csv file", tmp_path / "none.csv")
    shutil.copy(small_photo, photos / "a.jpg")
    shutil.copy(small_photo, photos / "@500100@4000000@.jpg")
    refused(r"only 1 of 2 names have UTM coordinates .*, unlike e.g. .*a.jpg", photos)
    (photos / "a.jpg").unlink()
    source = table("path,lat,lon", "a.jpg,48,2")
    refused("photos has metres, .*photos.csv has degrees, which cannot", photos, source)
    line = refusal(capsys, lambda: to_gsv_cities.main([str(photos), f"--output={photos}/out"]))
    assert f"--output {photos}/out lies in" in line and not (photos / "out").exists()
    (tmp_path / "utf16.csv").write_text("path,lat,lon\na.jpg,1,2\n", encoding="utf-16")
    refused("line 1: not text in UTF-8, but perhaps UTF-16", tmp_path / "utf16.csv")
