"""The order that lets similar places share a batch."""

from pathlib import Path

import numpy as np
from test_gsv_cities import places_of, write_table

from datasets.training import similar_places
from datasets.training.gsv_cities import PlaceBatches


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

    def nearest(rows, k):
        return (rows @ rows.T).argsort(axis=1)[:, ::-1][:, :k]

    order = similar_places.order_by_similarity(batches, describe, nearest)
    assert sorted(order) == list(range(16)) and (order.reshape(4, 4) % 4 == order[::4, None] % 4).all()
    (paths,) = asked
    assert len(set(paths)) == 32, "two photos of a place"
    assert "epoch 2: described 16 of 16 places in " in caplog.text
    assert similar_places.order_by_similarity(batches, describe, nearest).tolist() == order.tolist()


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
