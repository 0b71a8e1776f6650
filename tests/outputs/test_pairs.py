"""What eval.py writes for hloc and COLMAP: pairs of names, and descriptors in hloc's layout."""

import csv
import os
import shutil
import sys

import h5py
import numpy as np
import pytest
import torch

import eval as eval_script
from model import build_model
from utils.outputs import pairs
from utils.retrieval import contexts as retrieval

SMALL = "--backbone=dino_tiny --device=cpu --num_workers=0 --resize 56 56".split()


@pytest.fixture
def images(city, tmp_path):
    """An image folder as hloc's users have it, with database and queries below."""
    for side in ("database", "queries"):
        shutil.copytree(city / "toy_city/images/test" / side, tmp_path / "images" / side)
    return tmp_path / "images"


@pytest.fixture
def run(tmp_path):
    """Runs eval.py on the image folder and returns the run's folder."""
    torch.manual_seed(1)
    torch.save(build_model(backbone="dino_tiny").state_dict(), tmp_path / "plain.pth")

    def run(*flags, sides=("database", "queries")):
        save_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        flags = [*SMALL, f"--save_dir={save_dir}", f"--resume={tmp_path}/plain.pth", *map(str, flags)]
        if sides:
            flags += [f"--{side}_folder={tmp_path}/images/{side}" for side in sides]
        eval_script.main(flags)
        (folder,) = save_dir.iterdir()
        return folder

    return run


def refusal(capsys, call):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def as_hloc_does(h5, count):
    """The `count` most similar photos of the database of each query, by dot product."""
    found = {}
    with h5py.File(h5, "r") as file:
        names = []
        file.visititems(lambda _, part: names.append(part.parent.name[1:]) if isinstance(part, h5py.Dataset) else None)
        of = {side: sorted(name for name in names if name.startswith(side)) for side in ("queries", "database")}
        rows = {side: np.stack([file[name]["global_descriptor"][:] for name in of[side]]) for side in of}
    for query, similarities in zip(of["queries"], rows["queries"] @ rows["database"].T, strict=True):
        found[query] = [of["database"][image] for image in np.argsort(-similarities)[:count]]
    return found


def test_pairs_and_descriptors_say_what_the_predictions_say(images, run, tmp_path, capsys):
    folder = run("--save_pairs=4", "--save_h5", "--recall_values", "1")
    with open(folder / "predictions.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["rank"]) <= 4]
    lines = [line.split(" ") for line in (folder / "pairs.txt").read_text().splitlines()]
    assert lines == [[os.path.relpath(row[side], images) for side in ("query", "database")] for row in rows]
    assert len(lines) == 60 and lines[0][0].startswith("queries/@") and lines[0][1].startswith("database/@")
    assert f"60 pairs of 15 queries, names relative to {images}: " in capsys.readouterr().err
    found = as_hloc_does(folder / "global_descriptors.h5", 4)
    assert found == {query: [image for name, image in lines if name == query] for query, _ in lines}
    with h5py.File(folder / "global_descriptors.h5") as file:
        descriptor = file[lines[0][0]]["global_descriptor"]
        assert descriptor.shape == (384,) and descriptor.dtype == np.float32
        assert np.linalg.norm(descriptor) == pytest.approx(1)


def test_what_an_index_did_not_find_is_left_out_and_counted(images, run, monkeypatch, capsys):
    real = retrieval.Search.run

    def lossy(self, *args, **given):
        ((distances, predictions),) = real(self, *args, **given)
        predictions[0, 1:] = predictions[3, 2] = -1
        return [(distances, predictions)]

    monkeypatch.setattr(retrieval.Search, "run", lossy)
    folder = run("--save_pairs=3")
    lines = (folder / "pairs.txt").read_text().splitlines()
    assert len(lines) == 45 - 3 and len([line for line in lines if line.startswith(lines[0].split()[0])]) == 1
    assert "42 pairs of 15 queries" in (shown := capsys.readouterr().err)
    assert "3 matches fewer than requested, which the index did not find" in shown


def test_names_are_relative_to_the_folder_that_holds_both(tmp_path):
    """Whatever lies between, in any language."""
    queries = [f"{tmp_path}/a/q/é.jpg", f"{tmp_path}/a/q/night/2.jpg"]
    database = [f"{tmp_path}/a/b/c/{number}.jpg" for number in range(3)]
    pairs.write_pairs(tmp_path, queries, database, np.array([[2, 0], [1, -1]]))
    expected = "q/é.jpg b/c/2.jpg\nq/é.jpg b/c/0.jpg\nq/night/2.jpg b/c/1.jpg\n"
    assert (tmp_path / "pairs.txt").read_bytes() == expected.encode()
    rows = np.eye(5, dtype=np.float32)
    sides = {
        "database": (database, [(np.array([2, 0, 1]), rows[:3])]),
        "queries": (queries, [(np.arange(2), rows[3:])]),
    }
    pairs.write_h5(tmp_path, sides)
    with h5py.File(tmp_path / "global_descriptors.h5") as file:
        assert file["q/é.jpg"]["global_descriptor"][:].argmax() == 3
        assert [file[f"b/c/{number}.jpg/global_descriptor"][:].argmax() for number in range(3)] == [1, 2, 0]


def test_names_that_lists_cannot_hold_are_refused_before_the_extraction(images, run, capsys, monkeypatch):
    monkeypatch.setattr("test.extract", lambda *_: pytest.fail("extracted"))
    first, second, third, fourth = sorted((images / "queries").iterdir())[:4]
    first.rename(first.with_name("my photo.jpg"))
    second.rename(second.with_name("tab\there.jpg"))
    third.rename(third.with_name("odd\u2003space.jpg"))
    fourth.rename(fourth.with_name(os.fsdecode(b"\xe9.jpg")))
    for flag in ("--save_pairs=2", "--save_h5"):
        message = refusal(capsys, lambda flag=flag: run("--no_labels", flag))
        assert message.startswith(
            f"ERROR: {flag.split('=')[0]}: 4 of 30 photo names below {images} have spaces, a leading #, or"
        )
        assert "e.g. 'queries/my photo.jpg'; hloc and COLMAP cannot read these from a list: rename them" in message
    for path in (images / "queries").glob("[!@]*"):
        path.unlink()
    (images / "queries").rename(images / "#queries")
    message = refusal(
        capsys,
        lambda: run(
            f"--database_folder={images}/database", f"--queries_folder={images}/#queries", "--save_pairs=2", sides=()
        ),
    )
    assert "11 of 26 photo names" in message and "e.g. '#queries/@" in message


def test_what_cannot_be_is_refused_before_the_extraction(images, run, capsys, monkeypatch):
    monkeypatch.setattr("test.extract", lambda *_: pytest.fail("extracted"))
    for flags, told in (
        (("--save_pairs=-1",), "--save_pairs -1 is negative; use 0 for none"),
        (
            ("--save_pairs=6", "--test_method=maj_voting", "--recall_values", "1", "5"),
            "--save_pairs 6: what maj_voting finds depends on the search depth, the largest of --recall_values (5)",
        ),
        (
            ("--save_h5", "--test_method=nearest_crop"),
            "--save_h5 writes one descriptor per photo, but --test_method nearest",
        ),
        (("--save_h5", "--test_method=maj_voting"), "--test_method maj_voting has one per crop"),
    ):
        assert told in refusal(capsys, lambda flags=flags: run(*flags))
    monkeypatch.setitem(sys.modules, "h5py", None)
    message = refusal(capsys, lambda: run("--save_h5"))
    assert message == "ERROR: --save_h5 needs the package h5py, which is missing; pip install h5py"


def test_where_hloc_would_rank_otherwise_that_is_said(caplog):
    pairs.require_one_each("five_crops", 0)
    assert not caplog.messages
    pairs.require_one_each("hard_resize", 64)
    assert caplog.messages == [
        "--save_h5: hloc ranks by dot product, which differs from the order of distances after a PCA"
    ]


def test_a_map_gives_pairs_while_its_photos_are_there(images, run, tmp_path, capsys):
    expected = run("--save_pairs=3", "--save_h5", f"--save_map={tmp_path}/map.npz")
    ask = [f"--map={tmp_path}/map.npz", f"--queries_folder={images}/queries", "--save_pairs=3", "--save_h5"]
    asked = run(*ask, sides=())
    assert (asked / "pairs.txt").read_text() == (expected / "pairs.txt").read_text()
    found = [as_hloc_does(folder / "global_descriptors.h5", 5) for folder in (asked, expected)]
    assert found[0] == found[1]
    shutil.rmtree(images / "database")
    message = refusal(capsys, lambda: run(*ask, sides=()))
    assert "--save_pairs is for programs that read the photos, but those of the map are missing" in message
