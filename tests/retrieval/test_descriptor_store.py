"""Descriptors on disk: given back as written, gone on with, and refused in words where they do not match."""

import numpy as np
import pytest
import torch

from model.weights import state_digest
from utils.retrieval.descriptor_store import DescriptorStore, digest


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_store_gives_back_what_was_written(tmp_path, dtype):
    rows = np.random.default_rng(0).standard_normal((9, 2, 3)).astype(dtype).astype("f")
    settings = {"shape": (9, 2, 3), "dtype": dtype, "fingerprint": {"weights": "a"}}
    store = DescriptorStore(tmp_path / "s", "database", **settings)
    assert store.missing().tolist() == list(range(9)) and len(store) == 9
    store.write(np.array([4, 5, 8]), rows[[4, 5, 8]])
    again = DescriptorStore(tmp_path / "s", "database", **settings)
    assert again.missing().tolist() == [0, 1, 2, 3, 6, 7]
    again.write(again.missing(), rows[again.missing()])
    for indices in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 3, 4, 5, 0], [2]):
        np.testing.assert_array_equal(again.read(np.array(indices)), rows[indices])
    kept = np.load(tmp_path / "s" / "database.npy")
    np.testing.assert_array_equal(kept, rows)
    assert kept.dtype == dtype
    for change, words in (
        ({"shape": (8, 2, 3)}, "the shape was 9 2 3 and is now 8 2 3"),
        ({"dtype": "int8"}, f"--descriptor_dtype was {dtype} and is now int8"),
        ({"fingerprint": {"weights": "b"}}, "the weights are those of another model"),
    ):
        with pytest.raises(ValueError, match=f"database.npy does not match: {words}; .*another --descriptors_folder"):
            DescriptorStore(tmp_path / "s", "database", **{**settings, **change})
    assert not DescriptorStore(tmp_path / "s", "database", **settings).missing().size, "refusing touched nothing"


def test_a_store_without_a_fingerprint_starts_empty(tmp_path):
    for _ in range(2):
        store = DescriptorStore(tmp_path, "x", (3, 2))
        assert len(store.missing()) == 3
        store.write(np.arange(3), np.ones((3, 2), dtype="f"))


def test_what_changed_since_descriptors_were_kept_is_said_in_words(tmp_path):
    """Without digests."""
    was = {"weights": "1f", "images": "2e", "resize": [56, 56]}
    DescriptorStore(tmp_path, "pca", (9, 2), fingerprint=was)
    changed = "the weights are those of another model; the PCA photos have changed; --resize was 56 56 and is now 56 70"
    with pytest.raises(ValueError, match=changed):
        DescriptorStore(tmp_path, "pca", (9, 2), fingerprint={"weights": "0a", "images": "3d", "resize": [56, 70]})


def test_digests_tell_weights_and_paths_apart():
    state = {"a": torch.ones(2), "b": torch.zeros(1, dtype=torch.int64)}
    assert state_digest(state) == state_digest({name: value.clone() for name, value in state.items()})
    weights = [state_digest(each) for each in (state, {**state, "a": torch.tensor([1.0, 2.0])})]
    assert len({*weights, digest(["x", "y"]), digest(["xy"])}) == 4
