"""GSV-Cities, database/queries trees and transforms."""

import pickle
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor

from datasets.evaluation import database_queries
from datasets.evaluation.database_queries import DatabaseQueries, list_images, utm_positions
from datasets.photos.transforms import evaluation_transform, open_image, read_pixels, to_unit
from datasets.training import gsv_cities, similar_places
from datasets.training.gsv_cities import GSVCities, PlaceBatches, image_name, read_city
from datasets.training.randaugment import RandAugment, TrainingTransform
from utils.retrieval import search

SIDEWAYS = Image.Exif()  # an orientation that neither way of reading applies
SIDEWAYS[0x0112] = 6

HEADER = "place_id,year,month,northdeg,city_id,lat,lon,panoid\n"


def write_table(folder, city, places):
    """A city's csv with the given number of rows for each place id; no images."""
    (folder / "Dataframes").mkdir(exist_ok=True)
    rows = [f"{place},2012,{i % 12 + 1},{i},{city},51.5,-0.12,pano{place}_{i}" for place, n in places for i in range(n)]
    (folder / "Dataframes" / f"{city}.csv").write_text(HEADER + "\n".join(rows) + "\n")


def places_of(folder, transform=pil_to_tensor, **options):
    return GSVCities(folder, transform=transform, **options)


def test_image_name_of_the_documentation():
    row = dict(zip(HEADER.strip().split(","), ["13", "2012", "6", "45", "London", "51.5", "-0.12", "abc"], strict=True))
    assert image_name(**row) == "London_0000013_2012_06_045_51.5_-0.12_abc.jpg"


def test_places_labels_and_paths(tmp_path):
    write_table(tmp_path, "London", [(7, 5), (3, 4), (9, 3)])
    write_table(tmp_path, "Boston", [(3, 4)])
    write_table(tmp_path, "Atlantis", [(1, 6)])
    places = places_of(tmp_path)
    assert places.cities == ["Boston", "London", "Atlantis"]
    assert places.labels.tolist() == [3, 100_003, 100_007, 200_001]
    assert (len(places), places.image_count) == (4, 19)
    assert places.image_paths(1)[2] == str(tmp_path / "Images/London/London_0000003_2012_03_002_51.5_-0.12_pano3_2.jpg")
    assert len(set(places.all_image_paths())) == 19
    assert places_of(tmp_path, cities=["London"]).labels.tolist() == [3, 7]
    assert places_of(tmp_path, images_per_place=3).image_count == 22


def test_missing_cities_are_named(tmp_path, caplog):
    write_table(tmp_path, "London", [(7, 5)])
    places_of(tmp_path)
    assert (
        "22 of the 23" in caplog.text and "Bangkok" in caplog.text and "London" not in caplog.messages[0].split(":")[1]
    )


def test_no_city_is_missing_where_there_are_no_gsv_cities(city, tmp_path, caplog):
    """The toy city, though it goes by two of the names, and somebody's own cities."""
    GSVCities(city / "gsv_cities", transform=None)
    write_table(tmp_path, "Atlantis", [(1, 6)])
    places_of(tmp_path)
    assert "23" not in caplog.text


@pytest.fixture
def three_folders(tmp_path):
    """Two that share a city, and one's own."""
    for name, cities in (("A", ("Boston", "London")), ("B", ("London", "Atlantis")), ("C", ("Zoo", "Ark"))):
        (tmp_path / name).mkdir()
        for city in cities:
            write_table(tmp_path / name, city, [(3, 4), (7, 5)])
    return [tmp_path / name for name in "ABC"]


def test_several_folders_follow_each_other_and_their_labels_never_meet(three_folders, caplog):
    places = places_of(three_folders)
    assert places.cities == ["Boston", "London", "London", "Atlantis", "Ark", "Zoo"]
    assert places.labels.tolist() == [i * 100_000 + place for i in range(6) for place in (3, 7)]
    first = [places.image_paths(place)[0] for place in range(0, 12, 2)]
    assert [path.split("/")[-4:-1] for path in first] == [
        [folder, "Images", city] for folder, city in zip("AABBCC", places.cities, strict=True)
    ]
    assert len(set(places.all_image_paths())) == 54 and str(places) == ("12 places (54 images, 6 cities, 3 folders)")
    # What one folder lacks of the 23 another may have; a name that is there twice is told.
    missing, twice = caplog.messages
    assert missing.startswith(
        f"21 of the 23 cities of GSV-Cities are not in {three_folders[0]} and {three_folders[1]}: Bangkok"
    )
    assert twice.startswith(f"London is in {three_folders[0]} and {three_folders[1]}: read as 2 cities")
    # No place twice in an epoch, and batches go city by city.
    order = PlaceBatches(places, batch_size=4).order(0)
    assert sorted(order) == list(range(12)) and (np.diff(places.labels[order] // 100_000) >= 0).all()


def test_one_folder_is_what_it_was(three_folders):
    alone, listed = places_of(three_folders[2]), places_of(three_folders[2:])
    assert alone.digest == listed.digest == "3336a2e83b67efbb"
    assert alone.labels.tolist() == [3, 7, 100_003, 100_007] and alone.all_image_paths() == listed.all_image_paths()
    assert PlaceBatches(alone, batch_size=2).order(0).tolist() == [1, 0, 2, 3]


def test_cities_are_selected_over_all_folders(three_folders, caplog):
    places = places_of(three_folders, cities=["Zoo", "London"])
    assert places.cities == ["Zoo", "London", "London"]
    assert [path.split("/")[-4] for path in map(places.image_paths, (0, 2, 4)) for path in path[:1]] == ["C", "A", "B"]
    assert [message.split(":")[0].split()[0] for message in caplog.messages] == ["London"]
    places_of(three_folders, cities=["Zoo", "Boston"])
    assert caplog.messages[-1] == f"--cities Zoo Boston uses nothing from {three_folders[1]}"
    with pytest.raises(
        FileNotFoundError, match=r"no table Rome.csv, Oslo.csv in .*A/Dataframes, .*leave Rome Oslo out"
    ):
        places_of(three_folders, cities=["Rome", "Zoo", "Oslo"])
    with pytest.raises(ValueError, match="--train_dataset_folder .*A and .*A/../A are the same folder"):
        places_of([three_folders[0], three_folders[1], three_folders[0] / ".." / "A"])
    with pytest.raises(FileNotFoundError, match="no GSV-Cities in .*nowhere: .*A has no nowhere, only "):
        places_of([three_folders[0], three_folders[0] / "nowhere"])


def test_gsv_cities_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GSV-Cities in"):
        places_of(tmp_path)
    write_table(tmp_path, "London", [(7, 3)])
    with pytest.raises(ValueError, match="no place in .* has 4 images; lower --images_per_place"):
        places_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="Boston"):
        places_of(tmp_path, cities=["Boston"])
    write_table(tmp_path, "London", [(100_000, 4)])
    with pytest.raises(ValueError, match="place_id outside"):
        places_of(tmp_path)
    table = tmp_path / "Dataframes" / "London.csv"
    table.write_text(HEADER + "7,2012,6,45,London,51.5,-0.12,a\n8,x,6,45,London,51.5,-0.12,a\n")
    with pytest.raises(ValueError, match="London.csv, line 3"):
        places_of(tmp_path)
    table.write_text("place_id,year\n7,2012\n")
    with pytest.raises(ValueError, match="London.csv, line 1.*month"):
        places_of(tmp_path)


ROWS = ["7,2012,6,45,London,51.5,-0.12,a", "8,2013,7,46,London,52.0,1.0,b"]
NAMES = [b"London/London_0000007_2012_06_045_51.5_-0.12_a.jpg", b"London/London_0000008_2013_07_046_52.0_1.0_b.jpg"]


@pytest.mark.parametrize(
    "text",
    [
        HEADER + "\n".join(ROWS),
        "\ufeff" + HEADER + "\n".join(ROWS) + "\n",
        (HEADER + "\n".join(ROWS)).replace("\n", "\r\n") + "\r\n",
        (HEADER + "\n".join(ROWS)).replace("\n", "\r"),
        HEADER + f"\n{ROWS[0]}\n   \n\n{ROWS[1]}\n\n",
        HEADER + "\n".join(ROWS).replace("7,2012", '"7",2012'),
        HEADER.replace("\n", ",note\n") + f'{ROWS[0]},"two\nlines, quoted"\n{ROWS[1]},x\n',
        HEADER.replace("\n", ",note\n") + f"{ROWS[0]},a\u2028b\x0cc\x85d\n{ROWS[1]},\x1c\n",
    ],
    ids=["plain", "bom", "crlf", "cr", "blank", "quoted", "newline", "separators"],
)
def test_tables_as_they_come(tmp_path, text):
    (tmp_path / "Dataframes").mkdir()
    (tmp_path / "Dataframes" / "London.csv").write_bytes(text.encode())
    places, names = read_city(tmp_path, "London")
    assert places.tolist() == [7, 8] and names.tolist() == NAMES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            (HEADER + ROWS[0] + "\n" + ROWS[1].replace("b", "Z\u00fcrich")).encode("latin-1"),
            "line 3: .*not UTF-8 .*; save the table as UTF-8",
        ),
        ((HEADER + ROWS[0]).encode("utf-16"), "line 1: .*not UTF-8 .*; save the table as UTF-8"),
        ((HEADER + ROWS[0] + '\n"8\n9",2013').encode(), "line 4"),
        ((HEADER + ROWS[0].replace("7", "1_0", 1)).encode(), "line 2: .*'1_0' is not a whole number"),
        ((HEADER + ROWS[0].replace("7", "7.0", 1)).encode(), "line 2: .*'7.0' is not a whole number"),
        ((HEADER + ROWS[0].replace("51.5", "north")).encode(), "line 2: .*north"),
        ((HEADER + '"' + "x" * 200_000 + '",1').encode(), "line 2: .*field larger"),
        (
            (HEADER + ROWS[0].replace("51.5", "5_1.5")).encode(),
            "line 2: .*5_1.5, -0.12 is not a latitude and longitude",
        ),
        (
            (HEADER + ROWS[0] + "\n" + "\u00fc").replace("\n", "\r").encode("latin-1"),
            "line 3: .*not UTF-8 .*; save the table as UTF-8",
        ),
        ((HEADER + ROWS[0]).replace(",", ";").encode(), "line 1: no column place_id, year, .*separated by commas"),
        (b'"' + b"x" * 200_000, "line 1: field larger"),
        (b"", "line 1: no column place_id"),
    ],
)
def test_tables_that_do_not_follow_the_format(tmp_path, content, message):
    (tmp_path / "Dataframes").mkdir()
    (tmp_path / "Dataframes" / "London.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"London.csv, {message}"):
        read_city(tmp_path, "London")


def test_a_column_of_whole_numbers_is_named_as_the_files_are(tmp_path):
    """GSV-Cities' own loader takes such a column for integers; no published table has one."""
    (tmp_path / "Dataframes").mkdir()
    table = HEADER + "7,2012,6,45,London,51,0,a\n8,2013,7,46,London,52,-1,b\n"
    (tmp_path / "Dataframes" / "London.csv").write_text(table)
    assert read_city(tmp_path, "London")[1][1].endswith(b"_52.0_-1.0_b.jpg")
    (tmp_path / "Images" / "London").mkdir(parents=True)
    (tmp_path / "Images" / "London" / "London_0000007_2012_06_045_51_0_a.jpg").touch()
    assert read_city(tmp_path, "London")[1][1].endswith(b"_52_-1_b.jpg")
    (tmp_path / "Dataframes" / "London.csv").write_text(table + "9,2013,7,46,London,52.5,1,c\n")
    assert read_city(tmp_path, "London")[1][2].endswith(b"_52.5_1.0_c.jpg"), "unless the first file says otherwise"


def test_digests_tell_tables_apart(tmp_path):
    digests = set()
    for rows in ([(7, 5), (3, 4)], [(7, 4), (3, 5)], [(7, 5), (4, 4)]):
        write_table(tmp_path, "London", rows)
        digests.add(places_of(tmp_path).digest)
    assert len(digests) == 3 and places_of(tmp_path).digest in digests


def test_order_goes_city_by_city_and_is_kept_or_redrawn(tmp_path):
    write_table(tmp_path, "London", [(p, 4) for p in range(30)])
    write_table(tmp_path, "Boston", [(p, 4) for p in range(20)])
    places = places_of(tmp_path)
    fixed = PlaceBatches(places, batch_size=12)
    batches = list(fixed)
    assert [len(batch) for batch in batches] == [12, 12, 12, 12, 2] and len(fixed) == 5
    order = [place for batch in batches for _, place in batch]
    assert sorted(order) == list(range(50)) and order != sorted(order)
    assert {places.labels[p] // 100_000 for p in order[:20]} == {0}
    fixed.epoch = 4
    assert [place for batch in fixed for _, place in batch] == order
    assert {epoch for batch in fixed for epoch, _ in batch} == {4}
    reshuffled = PlaceBatches(places, batch_size=12, place_order="reshuffled")
    assert reshuffled.order(0).tolist() == order
    assert sorted(reshuffled.order(1)) == sorted(order) and reshuffled.order(1).tolist() != order
    other_seed = places_of(tmp_path, seed=1)
    assert PlaceBatches(other_seed, batch_size=12).order(0).tolist() != order


def test_cliques_are_of_the_nearest_that_are_left(monkeypatch):
    """Six places on a line at 0, 1, 2 and 10, 11, 12, in cliques of three."""
    monkeypatch.setattr(similar_places, "CLIQUE", 3)
    positions = np.array([0, 10, 1, 11, 2, 12])
    near = np.abs(positions[:, None] - positions).argsort(axis=1, kind="stable")
    for seed in range(5):
        found = similar_places.cliques(near, np.random.default_rng(seed))
        assert sorted(map(sorted, found)) == [[0, 2, 4], [1, 3, 5]]
    # Where only two neighbours are looked at and others were quicker, a clique stays short.
    found = similar_places.cliques(near[:, :2], np.random.default_rng(0))
    assert sorted(sum(found, [])) == list(range(6)) and max(map(len, found)) == 2


def test_how_many_places_are_described():
    """An eighth of an epoch's images, two a place, in whole batches; of few places all that four batches hold."""
    counted = similar_places.count_described
    assert counted(1152, batch_size=32, images_per_place=4) == 288
    assert counted(62_000, batch_size=120, images_per_place=4) == 129 * 120  # 15,480 of 15,500
    assert counted(500_000, batch_size=120, images_per_place=4) == 136 * 120, "16,384 at most"
    assert [counted(n, batch_size=4, images_per_place=4) for n in (3, 4, 5, 16, 19)] == [0, 0, 4, 16, 16]


def test_similar_places_share_batches_and_the_others_keep_their_order():
    """200 places on a circle; the nearest by angle."""
    calls = []

    def nearest(described, k):
        calls.append(described)
        apart = np.abs(described[:, None] - described) % 200
        return np.minimum(apart, 200 - apart).argsort(axis=1, kind="stable")[:, :k]

    order = np.random.default_rng(9).permutation(200)
    settings = {"batch_size": 8, "images_per_place": 4, "nearest": nearest}
    found = similar_places.similar_order(order, **settings, rng=np.random.default_rng(1))
    (described,) = calls
    assert sorted(found) == list(range(200)) and len(set(described)) == 48
    hard = np.isin(found, described).reshape(-1, 8)
    assert (hard.all(axis=1) | ~hard.any(axis=1)).all() and hard.all(axis=1).sum() == 6
    assert not hard[:6].all(), "hard batches are spread over the epoch"
    spread = [np.abs(np.diff(np.sort(batch))).min() for batch in found.reshape(-1, 8)]
    assert np.mean(np.array(spread)[hard.all(axis=1)]) < 6
    again = similar_places.similar_order(order, **settings, rng=np.random.default_rng(1))
    other = similar_places.similar_order(order, **settings, rng=np.random.default_rng(2))
    assert again.tolist() == found.tolist() != other.tolist()
    # A short last batch stays the last.
    short = similar_places.similar_order(np.arange(199), **settings, rng=np.random.default_rng(1))
    assert sorted(short) == list(range(199)) and not np.isin(short[192:], calls[-1]).any()


def test_places_of_similar_descriptors_share_a_batch(tmp_path, monkeypatch, caplog):
    """16 places whose descriptors point in four directions, in batches of four: each batch is of one direction."""
    caplog.set_level("INFO")
    monkeypatch.setattr(similar_places, "CLIQUE", 4)
    write_table(tmp_path, "London", [(place, 4) for place in range(16)])
    batches = PlaceBatches(places_of(tmp_path), batch_size=4, place_order="similar")
    batches.epoch = 1
    asked = []

    def describe(paths):
        asked.append(paths)
        numbers = np.array([int(Path(path).name.split("_")[1]) for path in paths])
        rng = np.random.default_rng(0)
        return (np.eye(4)[numbers % 4] + 0.1 * rng.normal(size=(len(paths), 4))).astype(np.float32)

    order = similar_places.order_by_similarity(batches, describe, torch.device("cpu"))
    assert sorted(order) == list(range(16)) and (order.reshape(4, 4) % 4 == order[::4, None] % 4).all()
    (paths,) = asked
    assert len(set(paths)) == 32, "two photos of a place"
    assert "epoch 2: described 16 of 16 places in " in caplog.text
    assert similar_places.order_by_similarity(batches, describe, torch.device("cpu")).tolist() == order.tolist()


def test_an_order_by_similarity_takes_more_than_one_batch(tmp_path):
    write_table(tmp_path, "London", [(place, 4) for place in range(9)])
    for size, name, asked in [(8, "similar", True), (9, "similar", False), (8, "reshuffled", False)]:
        assert PlaceBatches(places_of(tmp_path), batch_size=size, place_order=name).by_similarity == asked


def test_similar_begins_as_the_others_do(tmp_path):
    write_table(tmp_path, "London", [(place, 4) for place in range(9)])
    first = [PlaceBatches(places_of(tmp_path), batch_size=4, place_order=name) for name in ("fixed", "similar")]
    assert list(first[0]) == list(first[1])
    first[1].mined = np.arange(9)[::-1]
    assert [[place for _, place in batch] for batch in first[1]] == [[8, 7, 6, 5], [4, 3, 2, 1], [0]]


def test_a_place_of_many_images_tends_to_come_early(tmp_path):
    """Rows are shuffled and a place stands where its first row does."""
    write_table(tmp_path, "London", [(0, 200), *((p, 4) for p in range(1, 40))])
    ranks = [PlaceBatches(places_of(tmp_path, seed=s), batch_size=9).order(0).tolist().index(0) for s in range(20)]
    assert np.mean(ranks) < 3


def test_items_depend_on_seed_epoch_and_place_alone(city):
    def items(num_workers, epoch=0, seed=0):
        places = places_of(city / "gsv_cities", TrainingTransform((56, 56), 3), seed=seed)
        batches = PlaceBatches(places, batch_size=4)
        batches.epoch = epoch
        return list(DataLoader(places, batch_sampler=batches, num_workers=num_workers))

    def same(a, b):
        return all(torch.equal(x, y) and torch.equal(m, n) for (x, m), (y, n) in zip(a, b, strict=True))

    plain = items(0)
    assert plain[0][0].shape == (4, 4, 3, 56, 56) and plain[0][0].dtype == torch.uint8
    torch.manual_seed(99)
    assert same(plain, items(0)) and same(plain, items(2))
    assert not same(plain, items(0, epoch=1)) and not same(plain, items(0, seed=1))


def test_drawing_an_item_leaves_the_global_generators_alone(city):
    places = places_of(city / "gsv_cities", TrainingTransform((56, 56), 3))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    places[0, 0]
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_images_of_a_place_are_drawn_anew_without_replacement(city):
    seen = Counter()
    places = places_of(city / "gsv_cities", lambda image: pil_to_tensor(image.resize((8, 8))))
    for epoch in range(20):
        images, label = places[epoch, 3]
        assert label == places.labels[3]
        keys = {image.numpy().tobytes() for image in images}
        assert len(keys) == 4
        seen.update(keys)
    assert len(seen) == 5 and min(seen.values()) >= 10


def test_randaugment_is_torchvisions(city):
    """The same random draws give the same bytes, every operation with either sign."""
    photo = open_image(next((city / "toy_city/images/test/queries").iterdir())).resize((112, 84))
    pickle.dumps(RandAugment(2, (84, 112)))  # as it is sent to workers that are not forked
    ours, theirs = RandAugment(2, (84, 112)), v2.RandAugment(2, interpolation=InterpolationMode.BILINEAR)
    drawn = []
    for index, (operation, level, signed) in enumerate(ours.operations):
        ours.operations[index] = (
            (lambda image, at, i=index, f=operation: drawn.append((i, at > 0)) or f(image, at)),
            level,
            signed,
        )
    for seed in range(250):
        torch.manual_seed(seed)
        expected = theirs(photo)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        assert ours(photo).tobytes() == expected.tobytes(), seed
        assert torch.equal(torch.get_rng_state(), after)
    signed = sum(signed for _, _, signed in ours.operations)
    assert len(set(drawn)) == len(ours.operations) + signed == 23


def test_known_cities():
    assert len(set(gsv_cities.CITIES)) == 23
    assert gsv_cities.CITIES[12] == "Boston" and gsv_cities.CITIES[-1] == "PRS"


def test_tree_is_listed_by_name_in_every_spelling(tmp_path):
    folder = tmp_path / "p@th" / "database"
    (folder / "b").mkdir(parents=True)
    names = ["@3@4@.JPG", "@1@2.5@x@.png", "b/@-5.5@6e3@.jpeg", "@9@9@.PNG"]
    for name in (*names, "notes.txt"):
        (folder / name).touch()
    paths = list_images(folder)
    assert paths == sorted(str(folder / name) for name in names)
    assert utm_positions(paths).tolist() == [[1, 2.5], [3, 4], [9, 9], [-5.5, 6000]]


@pytest.mark.parametrize("name", ["photo.jpg", "@1@.jpg", "@1@x@.jpg", "@@@.jpg", "@nan@1@.jpg"])
def test_names_without_coordinates(name):
    with pytest.raises(ValueError, match=f"2 of 3 file names have no UTM coordinates, e.g. {name}; name photos @<UTM "):
        utm_positions(["@1@2@.jpg", name, name])


def test_missing_and_empty_splits(city, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        DatabaseQueries.from_folder(city, "nowhere", "test")
    shutil.copytree(city / "toy_city", tmp_path / "toy_city")
    for path in (tmp_path / "toy_city/images/test/queries").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no image .* in .*queries"):
        DatabaseQueries.from_folder(tmp_path, "toy_city", "test")


def test_positives_are_a_closed_ball():
    database = np.array([[0.0, 0], [25, 0], [25.001, 0], [15, 20], [500, 0]])
    dataset = DatabaseQueries(
        name="x", database_paths=[""] * 5, queries_paths=["near", "far"], database_positions=database,
        queries_positions=np.array([[0.0, 0], [900, 900]]),
    )  # fmt: skip
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
    dataset = DatabaseQueries(
        name="x", database_paths=[""] * 40, queries_paths=[""] * 30, database_positions=positions[:40],
        queries_positions=positions[40:], geographic=geographic,
    )  # fmt: skip
    monkeypatch.setattr(database_queries, "PAIRS_TOGETHER", 200)
    metres = np.linalg.norm(positions[40:, None] - positions[None, :40], axis=2) * (111_195 if geographic else 1)
    expected = [np.flatnonzero(row <= 25).tolist() for row in metres]
    positives = dataset.positives(25.0)
    assert len(positives) == 30 and any(expected) and [] in expected
    assert [sorted(found.tolist()) for found in positives] == expected
    assert [sorted(found.tolist()) for found in positives] == expected, "a second time"
    assert [sorted(positives[query].tolist()) for query in range(30)] == expected
    assert sorted(positives[-1].tolist()) == expected[-1]
    predictions = np.tile(np.arange(40), (30, 1))
    for together in (1, 7, 10**6):
        monkeypatch.setattr(search, "PAIRS_TOGETHER", together)
        correct = search.correct_among(predictions, positives)
        assert [np.flatnonzero(row).tolist() for row in correct] == expected


def test_dense_positives_do_not_fill_the_memory():
    """4,000 x 4,000, all of them correct: 16 million pairs, of 8 bytes each if they were kept."""
    dataset = DatabaseQueries(
        name="x", database_paths=[""] * 4000, queries_paths=[""] * 4000, database_positions=np.ones((4000, 2)),
        queries_positions=np.ones((4000, 2)),
    )  # fmt: skip
    predictions = np.arange(4000)[:, None]
    tracemalloc.start()
    correct = search.correct_among(predictions, dataset.positives(25.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert correct.all() and peak < 120e6


def test_evaluation_resize_does_not_antialias_unless_asked():
    photo = torch.randint(0, 256, (1, 3, 280, 280), dtype=torch.uint8)
    plain = evaluation_transform((28, 28))(photo)
    smooth = evaluation_transform((28, 28), antialias=True)(photo)
    assert plain.shape == smooth.shape == (1, 3, 28, 28)
    assert plain.std() > 2 * smooth.std()


def test_resizing_before_normalising_changes_nothing():
    """The released code normalises the full-size image first."""
    photo = torch.randint(0, 256, (1, 3, 60, 80), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    full = (to_unit(photo) - mean[:, None, None]) / std[:, None, None]
    expected = torch.nn.functional.interpolate(full, (42, 56), mode="bilinear", align_corners=False)
    torch.testing.assert_close(evaluation_transform((42, 56))(photo), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("read", [open_image, read_pixels])
def test_unreadable_image_is_named(tmp_path, read):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"not a photo")
    with pytest.raises(ValueError, match="cannot read the image .*broken.jpg"):
        read(path)
    Image.new("RGB", (50, 50)).save(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="cannot read the image .*broken.jpg"):
        read(path)
    with pytest.raises(ValueError, match="cannot read the image .*none.jpg"):
        read(tmp_path / "none.jpg")


@pytest.mark.parametrize(
    ("mode", "name", "settings"),
    [
        ("RGB", "a.jpg", {}),
        ("RGB", "a.JPEG", {"progressive": True, "quality": 40}),
        ("RGB", "a.jpg", {"subsampling": 0, "quality": 95}),
        ("RGB", "a.jpg", {"subsampling": 1}),
        ("RGB", "a.jpg", {"exif": SIDEWAYS}),
        ("L", "a.jpg", {}),
        ("CMYK", "a.jpg", {}),
        ("RGB", "a.png", {}),
        ("P", "a.png", {}),
        ("L", "png_in_truth.jpg", {"format": "PNG"}),
    ],
)
def test_pixels_are_those_of_pillow(city, tmp_path, mode, name, settings):
    photo = Image.open(next((city / "toy_city/images/test/queries").iterdir())).resize((97, 61))
    photo.convert(mode).save(tmp_path / name, **settings)
    pixels = read_pixels(tmp_path / name)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 61, 97)
    assert torch.equal(pixels, pil_to_tensor(open_image(tmp_path / name)))


def test_grey_and_palette_images_become_rgb(tmp_path):
    Image.new("L", (8, 8), 7).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (7, 7, 7)
