"""GSV-Cities: its tables, the order of its places, also by similarity, the items."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor

from datasets.photos.transforms import open_image
from datasets.training import gsv_cities, randaugment, similar_places
from datasets.training.gsv_cities import GSVCities, PlaceBatches, read_city
from datasets.training.randaugment import TrainingTransform

HEADER = "place_id,year,month,northdeg,city_id,lat,lon,panoid\n"


def write_table(folder, city, places):
    """A city's csv with the given number of rows for each place id; no images."""
    (folder / "Dataframes").mkdir(exist_ok=True)
    rows = [f"{place},2012,{i % 12 + 1},{i},{city},51.5,-0.12,pano{place}_{i}" for place, n in places for i in range(n)]
    (folder / "Dataframes" / f"{city}.csv").write_text(HEADER + "\n".join(rows) + "\n")


def places_of(folder, transform=pil_to_tensor, **options):
    return GSVCities(folder, transform=transform, **options)


def test_places_labels_and_paths(tmp_path):
    assert len(set(gsv_cities.CITIES)) == 23 and gsv_cities.CITIES[12] == "Boston"
    write_table(tmp_path, "London", [(7, 5), (3, 4), (9, 3)])
    write_table(tmp_path, "Boston", [(3, 4)])
    write_table(tmp_path, "Atlantis", [(1, 6)])
    (tmp_path / "Dataframes/._London.csv").write_bytes(b"\x00\x05\xff")  # as macOS leaves
    places = places_of(tmp_path)
    assert places.cities == ["Boston", "London", "Atlantis"]
    assert places.labels.tolist() == [3, 100_003, 100_007, 200_001]
    assert (len(places), places.image_count) == (4, 19)
    assert places.image_paths(1)[2] == str(tmp_path / "Images/London/London_0000003_2012_03_002_51.5_-0.12_pano3_2.jpg")
    assert len(set(places.all_image_paths())) == 19
    assert places_of(tmp_path, cities=["London"]).labels.tolist() == [3, 7]
    assert places_of(tmp_path, images_per_place=3).image_count == 22


def test_no_city_is_missing_in_data_of_ones_own(city, tmp_path, caplog):
    """Nor in the toy city, though it goes by two of the names."""
    places_of(city / "gsv_cities")
    write_table(tmp_path, "Atlantis", [(1, 6)])
    places_of(tmp_path)
    assert not caplog.messages


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
    """And its digest tells its tables from others."""
    alone, listed = places_of(three_folders[2]), places_of(three_folders[2:])
    assert alone.digest == listed.digest == "3336a2e83b67efbb"
    assert alone.labels.tolist() == [3, 7, 100_003, 100_007] and alone.all_image_paths() == listed.all_image_paths()
    assert PlaceBatches(alone, batch_size=2).order(0).tolist() == [1, 0, 2, 3]
    digests = {alone.digest}
    for rows in ([(3, 5), (7, 4)], [(3, 4), (8, 5)]):
        write_table(three_folders[2], "Zoo", rows)
        digests.add(places_of(three_folders[2]).digest)
    assert len(digests) == 3


def test_cities_are_selected_over_all_folders(three_folders, caplog):
    places = places_of(three_folders, cities=["Zoo", "London"])
    assert places.cities == ["Zoo", "London", "London"]
    assert [path.split("/")[-4] for path in map(places.image_paths, (0, 2, 4)) for path in path[:1]] == ["C", "A", "B"]
    assert [message.split(":")[0].split()[0] for message in caplog.messages] == ["London"]
    with pytest.raises(FileNotFoundError, match="cities Oslo Rome in .*A/Dataframes, "):
        places_of(three_folders, cities=["Rome", "Zoo", "Oslo"])
    with pytest.raises(
        ValueError, match="A/../A/.*Boston.csv and .*A/.*Boston.csv share 9 photos.* each train_dataset_folder once"
    ):
        places_of([three_folders[0], three_folders[1], three_folders[0] / ".." / "A"])


def test_gsv_cities_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no GSV-Cities in .*: {tmp_path} has no folder nowhere"):
        places_of(tmp_path / "nowhere")
    write_table(tmp_path, "London", [(7, 3)])
    with pytest.raises(ValueError, match="no place in .* has 4 images; lower images_per_place"):
        places_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="Boston"):
        places_of(tmp_path, cities=["Boston"])
    write_table(tmp_path, "London", [(100_000, 4)])
    with pytest.raises(ValueError, match="place_id outside"):
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
        ((HEADER + ROWS[0] + "\n" + ROWS[1].replace("b", "\u00fc")).encode("latin-1"), "line 3: .*in UTF-8"),
        ((HEADER + ROWS[0]).encode("utf-16"), "line 1: .*UTF-16; save it as UTF-8"),
        ((HEADER + ROWS[0] + '\n"8\n9",2013').encode(), "line 4"),
        ((HEADER + ROWS[0].replace("7", "7.0", 1)).encode(), "line 2: .*'7.0'.* as whole numbers"),
        ((HEADER + "\n".join(ROWS).replace("2013", "x")).encode(), "line 3: .*'x'"),
        ((HEADER + ROWS[0].replace("51.5", "north")).encode(), "line 2: .*north"),
        ((HEADER + '"' + "x" * 200_000 + '",1').encode(), "line 2: .*field larger"),
        ((HEADER + ROWS[0]).replace(",", ";").encode(), "line 1: no column place_id, year, .*separated by commas"),
        (b"place_id,year\n7,2012\n", "line 1: no column month"),
        (b"", "line 0: no column place_id"),
    ],
)
def test_tables_that_do_not_follow_the_format(tmp_path, content, message):
    (tmp_path / "Dataframes").mkdir()
    (tmp_path / "Dataframes" / "London.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"London.csv, {message}"):
        read_city(tmp_path, "London")


def test_a_photo_of_two_tables_is_refused_and_rows_that_repeat_are_counted(tmp_path, caplog):
    """As a browser names a second download: each photo would be its own negative."""
    write_table(tmp_path, "London", [(7, 5), (3, 4)])
    tables = tmp_path / "Dataframes"
    (tables / "London (1).csv").write_bytes((tables / "London.csv").read_bytes())
    with pytest.raises(ValueError, match=r"London \(1\).csv and .*London.csv share 9 photos, .* cities"):
        places_of(tmp_path)
    assert len(places_of(tmp_path, cities=["London"])) == 2
    table = tables / "London.csv"
    table.write_text(table.read_text() + table.read_text().removeprefix(HEADER))
    assert places_of(tmp_path, cities=["London"]).image_count == 18 and f"{table} repeats 9 of its rows" in caplog.text


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

    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    places_of(city / "gsv_cities", TrainingTransform((56, 56), 3))[0, 0]
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    plain = items(0)
    assert plain[0][0].shape == (4, 4, 3, 56, 56) and plain[0][0].dtype == torch.uint8
    torch.manual_seed(99)
    assert same(plain, items(0)) and same(plain, items(2))
    assert not same(plain, items(0, epoch=1)) and not same(plain, items(0, seed=1))


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


def test_randaugment_is_torchvisions(city, monkeypatch):
    """The same random draws give the same bytes, every operation with either sign."""
    photo = open_image(next((city / "toy_city/images/test/queries").iterdir())).resize((56, 42))
    ours, theirs = TrainingTransform((42, 56), 3), v2.RandAugment(3, interpolation=InterpolationMode.BILINEAR)
    drawn, real = set(), randaugment.applied
    monkeypatch.setattr(
        randaugment, "applied", lambda name, image, at: drawn.add((name, at > 0)) or real(name, image, at)
    )
    for seed in range(120):
        torch.manual_seed(seed)
        expected = theirs(photo)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(ours(photo), pil_to_tensor(expected)), seed
        assert torch.equal(torch.get_rng_state(), after)
    assert len(drawn) == len(ours.operations) + sum(signed for _, _, signed in ours.operations) == 23


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
    assert [counted(n, batch_size=4, images_per_place=4) for n in (5, 16, 19)] == [4, 16, 16]


@pytest.fixture
def ordered(tmp_path):
    """The order of places on a circle, of which the nearest are those with the next numbers; and those described."""

    def run(count, epoch=1):
        write_table(tmp_path, "London", [(place, 4) for place in range(count)])
        batches = PlaceBatches(places_of(tmp_path), batch_size=8, place_order="similar")
        batches.epoch = epoch
        described = []

        def describe(paths):
            assert len(set(paths)) == len(paths), "two photos of a place"
            described[:] = numbers = [int(Path(path).name.split("_")[1]) for path in paths]
            return np.float32(numbers)[:, None]

        def nearest(rows, k):
            apart = np.abs(rows - rows.T) % count
            return np.minimum(apart, count - apart).argsort(axis=1, kind="stable")[:, :k]

        order = similar_places.order_by_similarity(batches, describe, nearest)
        assert sorted(order) == list(range(count))
        return order, described[::2]

    return run


def test_similar_places_share_batches_and_the_others_keep_their_order(ordered, caplog):
    caplog.set_level("INFO")
    order, described = ordered(200)
    assert len(set(described)) == 48 and "epoch 2: described 48 of 200 places in " in caplog.text
    hard = np.isin(order, described).reshape(-1, 8)
    assert (hard.all(axis=1) | ~hard.any(axis=1)).all() and hard.all(axis=1).sum() == 6
    assert not hard[:6].all(), "hard batches are spread over the epoch"
    spread = [np.abs(np.diff(np.sort(batch))).min() for batch in order.reshape(-1, 8)]
    assert np.mean(np.array(spread)[hard.all(axis=1)]) < 6
    assert ordered(200)[0].tolist() == order.tolist() != ordered(200, epoch=2)[0].tolist()
    # A short last batch stays the last.
    short, described = ordered(199)
    assert not np.isin(short[192:], described).any()


def test_similar_begins_as_the_others_do_and_takes_more_than_one_batch(tmp_path):
    write_table(tmp_path, "London", [(place, 4) for place in range(9)])
    fixed, similar, whole = (
        PlaceBatches(places_of(tmp_path), batch_size=size, place_order=name)
        for size, name in ((4, "fixed"), (4, "similar"), (9, "similar"))
    )
    assert list(fixed) == list(similar)
    assert [batches.by_similarity for batches in (fixed, similar, whole)] == [False, True, False]
    similar.mined = np.arange(9)[::-1]
    assert [[place for _, place in batch] for batch in similar] == [[8, 7, 6, 5], [4, 3, 2, 1], [0]]
