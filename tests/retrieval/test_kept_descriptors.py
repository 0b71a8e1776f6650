"""`--descriptors_folder`: right whatever became of the photos, the files and the disk in between."""

import errno
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from helpers import SMALL
from PIL import Image

import eval as eval_script
from utils.retrieval import descriptor_store
from utils.retrieval.descriptor_store import DescriptorStore, RowFile
from utils.retrieval.place_map import PlaceMap
from utils.system.lock import FolderLock


@pytest.fixture
def photos(tmp_path):
    """Two plain folders of photos, uncompressed ones among them."""
    for side, count in (("known", 4), ("asked", 2)):
        (tmp_path / side).mkdir()
        for n in range(count):
            pixels = np.random.default_rng(n).integers(0, 256, (80, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / side / f"{n}.png", compress_level=0)
    return tmp_path / "known", tmp_path / "asked"


@pytest.fixture
def evaluate(photos, weights, tmp_path, capsys):
    """Runs eval.py on the photos with a folder for descriptors; returns the exit status and what it said."""
    flags = [*SMALL, "--no_labels", f"--resume={weights}/plain.pth", f"--save_dir={tmp_path}/runs"]
    flags += [f"--database_folder={photos[0]}", f"--queries_folder={photos[1]}"]
    flags += [f"--descriptors_folder={tmp_path}/kept"]

    def run(*more):
        status = 0
        try:
            eval_script.main([*flags, *more])
        except SystemExit as exit_:
            status = exit_.code
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return status, said

    return run


def files_of(tmp_path):
    return {path: path.read_bytes() for path in sorted((tmp_path / "kept").rglob("*.npy"))}


@pytest.mark.parametrize(("side", "what"), [(0, "database"), (1, "queries")])
def test_pictures_that_changed_in_place_are_refused(photos, evaluate, side, what):
    """By one byte, with the old size and time of modification."""
    assert evaluate()[0] == 0
    path = photos[side] / "1.png"
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    status, said = evaluate()
    assert status == 2 and f"the photos of {what} have changed" in said and "another --descriptors_folder" in said


def test_pictures_that_were_copied_or_touched_are_the_same(photos, evaluate, passed, tmp_path, monkeypatch):
    assert evaluate()[0] == 0 and len(passed) == 6
    shutil.copytree(photos[0], tmp_path / "copy")
    shutil.rmtree(photos[0])
    shutil.move(tmp_path / "copy", photos[0])
    for path in photos[1].iterdir():
        os.utime(path, (1, 1))
    assert evaluate()[0] == 0 and len(passed) == 6
    # What is known by its times is not read again, and no file is written.
    monkeypatch.setattr(descriptor_store, "_contents_digest", None)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.*")}
    assert evaluate()[0] == 0 and before == {path: path.stat().st_mtime_ns for path in before}


def test_photos_of_a_run_s_own_store_are_told_by_their_times(photos, tmp_path):
    """It notes no bytes, so only untouched photos are the same; who goes on from it notes them."""
    paths = sorted(map(str, photos[0].iterdir()))
    settings = {"shape": (4, 2), "fingerprint": {"weights": "a"}, "photos": paths}
    store = DescriptorStore(tmp_path / "a", "database", **settings)
    store.write(np.arange(4), np.ones((4, 2), dtype="f"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert not len(DescriptorStore(tmp_path / "b", "database", **settings, kept=True).missing())
    os.utime(paths[2], (1, 1))
    assert not len(DescriptorStore(tmp_path / "b", "database", **settings, kept=True).missing())
    with pytest.raises(ValueError, match="photos of database were changed, moved or copied.*--descriptors_folder"):
        DescriptorStore(tmp_path / "a", "database", **settings)
    with pytest.raises(ValueError, match="the photos of database have changed"):
        DescriptorStore(tmp_path / "b", "database", **settings | {"photos": paths[::-1]})


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


@pytest.fixture
def store(tmp_path):
    """Opens a store of five rows; the first time, they are written."""

    def open_store():
        there = (tmp_path / "store").exists()
        opened = DescriptorStore(tmp_path / "store", "x", (5, 2), fingerprint={"weights": "a"})
        if not there:
            opened.write(np.arange(5), ROWS)
        return opened

    return open_store


ROWS = np.arange(1, 11, dtype="f").reshape(5, 2)


@pytest.mark.parametrize("kind", ["done", "json", "npy"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(path.read_bytes() + b"\1" * 9),
        lambda path: path.write_bytes(b"\xff\0garbage"),
        lambda path: path.write_bytes(b"[" * 100_000),
        Path.unlink,
    ],
)
def test_damaged_files_are_begun_anew(store, caplog, kind, damage):
    damage(store().path.with_suffix(f".{kind}"))
    assert len(store().missing()) == 5
    (line,) = caplog.messages
    assert "computed again" in line


def test_a_record_of_something_else(store):
    store().path.with_suffix(".json").write_text('{"shape": 3}')
    with pytest.raises(ValueError, match="another --descriptors_folder"):
        store()


def test_an_error_of_reading_is_no_damage(evaluate, tmp_path, monkeypatch):
    """It ends the run with its own words, and what is kept stays."""
    evaluate()
    kept, real, number = files_of(tmp_path), open, errno.EIO

    def fails(path, *given, **settings):
        if str(path).endswith(("queries.npy", "map.npz")):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *given, **settings)

    monkeypatch.setattr(descriptor_store, "open", fails, raising=False)
    status, said = evaluate()
    assert status == 2 and os.strerror(number) in said and "damaged" not in said and "computed again" not in said
    assert files_of(tmp_path) == kept
    (tmp_path / "map.npz").write_bytes(b"")
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", fails)
        with pytest.raises(OSError, match=f"map.npz cannot be read .{os.strerror(number)}") as error:
            PlaceMap(tmp_path / "map.npz")
        assert "damaged" not in str(error.value)


def test_a_folder_that_is_somebody_else_s(evaluate, tmp_path):
    folder = tmp_path / "kept" / "asked_in_known"
    folder.mkdir(parents=True)
    np.save(folder / "database.npy", np.arange(5))
    status, said = evaluate()
    assert status == 2 and "was not made by --descriptors_folder" in said
    assert np.load(folder / "database.npy").tolist() == [0, 1, 2, 3, 4]
    shutil.rmtree(folder.parent)
    with FolderLock(folder, "--descriptors_folder"):
        status, said = evaluate()
    assert status == 2 and f"is in use by this process ({os.getpid()})" in said and "--descriptors_folder" in said
    shutil.rmtree(folder.parent)
    folder.parent.write_text("a file")
    status, said = evaluate()
    assert status == 2 and "cannot write in" in said and "name another --descriptors_folder" in said


def test_a_full_disk_and_the_same_command_again(evaluate, passed, tmp_path, monkeypatch):
    real, left = RowFile.write, [3]

    def write(self, indices, rows):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, indices, rows)

    monkeypatch.setattr(RowFile, "write", write)
    status, said = evaluate("--extraction_batch_size=1")
    assert status == 2 and "(No space left on device); free space there" in said
    monkeypatch.setattr(RowFile, "write", real)
    passed.clear()
    assert evaluate("--extraction_batch_size=1")[0] == 0
    assert sorted(map(os.path.basename, passed)) == ["0.png", "1.png", "2.png", "3.png"], "two were there"
    kept = files_of(tmp_path)
    shutil.rmtree(tmp_path / "kept")
    evaluate("--extraction_batch_size=1")
    assert files_of(tmp_path) == kept


@pytest.mark.parametrize(("owner", "failing"), [(RowFile, "create"), (DescriptorStore, "_write_record")])
def test_a_disk_that_is_full_from_the_start(store, monkeypatch, owner, failing):
    with monkeypatch.context() as full:
        full.setattr(owner, failing, Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match=r"x.npy \(No space left on device\); free space"):
            store()
    np.testing.assert_array_equal(store().read(np.arange(5)), ROWS)


def test_rows_that_a_power_cut_left_as_zeros_are_computed_anew(store, caplog):
    opened = store()
    content = opened.path.read_bytes()
    opened.path.write_bytes(content[:136] + bytes(16) + content[152:])
    opened = store()
    assert opened.missing().tolist() == [1, 2]
    assert f"2 rows of {opened.path} are zeros, as after a power cut: computed again" in caplog.text


@pytest.mark.parametrize("flag", ["save_dir", "descriptors_folder"])
@pytest.mark.parametrize("below", ["", "deep/er", "link"])
def test_nothing_is_written_among_photos(evaluate, photos, tmp_path, flag, below):
    (photos[0] / "here").mkdir()
    (tmp_path / "link").symlink_to(photos[0] / "here")
    place = tmp_path / "link" if below == "link" else photos[0] / below
    status, said = evaluate(f"--{flag}={place}")
    assert status == 2 and f"{place} lies in {photos[0]}, so later runs would read what is written there as" in said
    assert not list((photos[0] / "here").iterdir()) and not (photos[0] / "deep").exists()
