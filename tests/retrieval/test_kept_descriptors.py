"""`--descriptors_folder`: right whatever became of the photos, the files and the disk in between."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import eval as eval_script
import test as evaluation
from datasets.evaluation.database_queries import DatabaseQueries
from model import build_model
from utils.retrieval import descriptor_store
from utils.retrieval.descriptor_store import DescriptorStore, RowFile
from utils.system.lock import FolderLock

SMALL = "--backbone=dino_tiny --device=cpu --num_workers=0 --resize 56 56".split()


@pytest.fixture
def photos(tmp_path):
    """Two plain folders of photos, uncompressed ones among them."""
    for side, count in (("known", 4), ("asked", 2)):
        (tmp_path / side).mkdir()
        for n in range(count):
            pixels = np.random.default_rng(n).integers(0, 256, (80, 60, 3), dtype=np.uint8)
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = 1
            Image.fromarray(pixels).save(tmp_path / side / f"{n}.png", compress_level=0, exif=exif)
    return tmp_path / "known", tmp_path / "asked"


@pytest.fixture
def evaluate(photos, tmp_path, capsys):
    """Runs eval.py on the photos with a folder for descriptors; returns the exit status and what it said."""
    torch.manual_seed(1)
    torch.save(build_model(backbone="dino_tiny").state_dict(), tmp_path / "model.pth")

    def run(*flags, kept=None):
        status = 0
        try:
            eval_script.main(
                [
                    *SMALL,
                    "--no_labels",
                    f"--resume={tmp_path}/model.pth",
                    f"--save_dir={tmp_path}/runs",
                    f"--database_folder={photos[0]}",
                    f"--queries_folder={photos[1]}",
                    f"--descriptors_folder={kept or tmp_path / 'kept'}",
                    *flags,
                ]
            )
        except SystemExit as exit_:
            status = exit_.code
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return status, said

    return run


@pytest.fixture
def passed(monkeypatch):
    """The photos that pass the backbone."""
    seen = []
    real = evaluation.image_batches
    monkeypatch.setattr(
        evaluation, "image_batches", lambda paths, **settings: seen.extend(paths) or real(paths, **settings)
    )
    return seen


def files_of(tmp_path):
    return {path: path.read_bytes() for path in sorted((tmp_path / "kept").rglob("*.npy"))}


def turn(path):
    """Another orientation in the EXIF data, in place: the same size."""
    content = path.read_bytes()
    with Image.open(path) as image:
        exif = image.info["exif"]
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    at = content.index(exif.removeprefix(b"Exif\0\0"))
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(turned.tobytes().removeprefix(b"Exif\0\0"))
    assert path.stat().st_size == len(content) and path.read_bytes() != content


def another_picture(path):
    Image.fromarray(np.full((80, 60, 3), 99, dtype=np.uint8)).save(
        path, compress_level=0, exif=Image.open(path).getexif()
    )


def middle_byte(path):
    """One byte in the middle, and the old modification time."""
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(stat.st_size // 2)
        byte = file.read(1)[0]
        file.seek(stat.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [turn, another_picture, middle_byte])
@pytest.mark.parametrize("side", [0, 1])
def test_pictures_that_changed_in_place_are_refused(photos, evaluate, change, side):
    assert evaluate()[0] == 0
    size = (photos[side] / "1.png").stat().st_size
    change(photos[side] / "1.png")
    assert (photos[side] / "1.png").stat().st_size == size
    status, said = evaluate()
    what = ("database", "query")[side]
    assert status == 2 and f"the {what} photos have changed" in said and "another --descriptors_folder" in said


def test_pictures_that_were_copied_or_touched_are_the_same(photos, evaluate, passed, tmp_path, monkeypatch):
    assert evaluate()[0] == 0 and len(passed) == 6
    shutil.copytree(photos[0], tmp_path / "copy")
    shutil.rmtree(photos[0])
    shutil.move(tmp_path / "copy", photos[0])
    for path in photos[1].iterdir():
        os.utime(path, (1, 1))
    assert evaluate()[0] == 0 and len(passed) == 6
    # What is known by its times is not read again.
    monkeypatch.setattr(descriptor_store, "_contents_digest", None)
    assert evaluate()[0] == 0


def test_a_store_of_the_version_before_is_refused(evaluate, tmp_path):
    evaluate()
    for record in (tmp_path / "kept").rglob("*.json"):
        written = json.loads(record.read_text())
        del written["files"]
        record.write_text(json.dumps({**written, "images": "0123456789abcdef"}))
    status, said = evaluate()
    assert status == 2 and "was made by an earlier version, which did not compare the photos; remove " in said
    shutil.rmtree(said.split("; remove ")[1].split(", or name")[0])
    assert evaluate()[0] == 0


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def garbled(path):
    path.write_bytes(b"\xff\0garbage")


@pytest.mark.parametrize("name", ["database.done", "database.json", "queries.npy"])
@pytest.mark.parametrize("damage", [cut, garbled, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_damaged_files_are_begun_anew(evaluate, passed, tmp_path, name, damage):
    assert evaluate()[0] == 0
    right = files_of(tmp_path)
    passed.clear()
    (path,) = (tmp_path / "kept").rglob(name)
    damage(path)
    status, said = evaluate()
    assert status == 0 and len([line for line in said.splitlines() if "computed again" in line]) == 1
    assert files_of(tmp_path) == right
    assert {os.path.dirname(path)[-5:] for path in passed} == {"known" if "database" in name else "asked"}


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{}", '{"shape": 3}', "[" * 100_000])
def test_a_record_that_is_none(evaluate, tmp_path, text):
    evaluate()
    (path,) = (tmp_path / "kept").rglob("database.json")
    path.write_text(text)
    status, said = evaluate()
    assert ("computed again" in said) == (status == 0) and ("remove" in said) == (status == 2)


def test_a_longer_file_is_begun_anew(evaluate, tmp_path):
    evaluate()
    for name in ("database.done", "queries.npy"):
        (path,) = (tmp_path / "kept").rglob(name)
        with open(path, "ab") as file:
            file.write(b"\1" * 9)
    status, said = evaluate()
    assert status == 0 and said.count("computed again") == 2


def test_a_cut_file_can_be_removed_as_its_message_says(tmp_path):
    settings = {"shape": (3, 2), "fingerprint": {"weights": "a"}}
    store = DescriptorStore(tmp_path, "x", **settings)
    store.write(np.arange(3), np.ones((3, 2), dtype="f"))
    os.truncate(store.path, store.path.stat().st_size - 4)
    with pytest.raises(OSError, match="x.npy is cut short; remove it and start again"):
        store.read(np.arange(3))
    store.path.unlink()
    assert len(DescriptorStore(tmp_path, "x", **settings).missing()) == 3


def test_a_folder_that_is_none(evaluate, tmp_path):
    (tmp_path / "kept").write_text("a file")
    status, said = evaluate()
    (error,) = [line for line in said.splitlines() if line.startswith("ERROR")]
    assert status == 2 and "cannot keep descriptors in" in error and "name another --descriptors_folder" in error


def test_the_files_of_somebody_else_stay(evaluate, tmp_path):
    folder = tmp_path / "kept" / "asked_in_known"
    folder.mkdir(parents=True)
    np.save(folder / "database.npy", np.arange(5))
    status, said = evaluate()
    assert status == 2 and "was not made by --descriptors_folder" in said
    assert np.load(folder / "database.npy").tolist() == [0, 1, 2, 3, 4]


def test_a_full_disk_and_the_same_command_again(evaluate, passed, tmp_path, monkeypatch):
    real, left = RowFile.write, [3]

    def write(self, indices, rows):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, indices, rows)

    monkeypatch.setattr(RowFile, "write", write)
    status, said = evaluate("--extraction_batch_size=1")
    (error,) = [line for line in said.splitlines() if line.startswith("ERROR")]
    assert status == 2 and "(No space left on device); free space there and run the same command again" in error
    monkeypatch.setattr(RowFile, "write", real)
    passed.clear()
    assert evaluate("--extraction_batch_size=1")[0] == 0
    assert sorted(map(os.path.basename, passed)) == ["0.png", "1.png", "2.png", "3.png"], "two were there"
    kept = files_of(tmp_path)
    shutil.rmtree(tmp_path / "kept")
    evaluate("--extraction_batch_size=1")
    assert files_of(tmp_path) == kept


@pytest.mark.parametrize("failing", ["create", "_write_record"])
def test_a_disk_that_is_full_from_the_start(evaluate, tmp_path, monkeypatch, failing):
    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RowFile if failing == "create" else DescriptorStore, failing, fails)
    status, said = evaluate()
    assert status == 2 and "database.npy (No space left on device); free space" in said
    monkeypatch.undo()
    assert evaluate()[0] == 0


def test_two_runs_do_not_share_a_folder(evaluate, tmp_path):
    with FolderLock(tmp_path / "kept/asked_in_known", "--descriptors_folder"):
        status, said = evaluate()
    assert status == 2 and f"is in use by this process ({os.getpid()})" in said and "--descriptors_folder" in said
    assert evaluate()[0] == 0 and evaluate()[0] == 0


def test_a_dataset_in_other_words(city, tmp_path):
    """Paths below another folder, the same photos: what is kept is used."""
    dataset = DatabaseQueries.from_folder(city, "toy_city", "test")
    settings = {"shape": (15, 2), "fingerprint": {"weights": "a"}}
    DescriptorStore(tmp_path, "x", **settings, photos=dataset.database_paths)
    shutil.copytree(city / "toy_city", tmp_path / "town")
    moved = DatabaseQueries.from_folder(tmp_path, "town", "test").database_paths
    DescriptorStore(tmp_path, "x", **settings, photos=moved)
    with pytest.raises(ValueError, match="the x photos have changed"):
        DescriptorStore(tmp_path, "x", **settings, photos=moved[1:] + moved[:1])
    record = json.loads((tmp_path / "x.json").read_text())
    del record["images"]
    (tmp_path / "x.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="the x photos have changed"):
        DescriptorStore(tmp_path, "x", **settings, photos=moved)


def test_rows_that_a_power_cut_left_as_zeros_are_computed_anew(evaluate, tmp_path):
    assert evaluate()[0] == 0
    (kept,) = tmp_path.glob("kept/*/database.npy")
    content = kept.read_bytes()
    row = (len(content) - 128) // 4
    kept.write_bytes(content[: 128 + row] + bytes(2 * row) + content[128 + 3 * row :])
    status, said = evaluate()
    assert status == 0 and f"2 rows of {kept} are zeros, as after a power cut: computed again" in said
    assert kept.read_bytes() == content
    assert "zeros" not in evaluate()[1]


@pytest.mark.parametrize("flag", ["save_dir", "descriptors_folder"])
@pytest.mark.parametrize("below", ["", "deep/er", "link"])
def test_nothing_is_written_among_photos(evaluate, photos, tmp_path, flag, below):
    (photos[0] / "here").mkdir()
    (tmp_path / "link").symlink_to(photos[0] / "here")
    place = tmp_path / "link" if below == "link" else photos[0] / below
    status, said = evaluate(f"--{flag}={place}")
    assert status == 2 and f"{place} lies in {photos[0]}, so later runs would read what is written there as" in said
    assert not list((photos[0] / "here").iterdir()) and not (photos[0] / "deep").exists()
