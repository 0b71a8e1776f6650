"""What eval.py writes for hloc and COLMAP: pairs of names, and descriptors in hloc's layout."""

import os
import shutil
import sys

import h5py
import numpy as np
import pytest
from helpers import refusal, rows_of

from utils.outputs import pairs


@pytest.fixture
def images(city, tmp_path):
    """An image folder as hloc's users have it, with database and queries below."""
    for side in ("database", "queries"):
        shutil.copytree(city / "toy_city/images/test" / side, tmp_path / "images" / side)
    return tmp_path / "images"


@pytest.fixture
def run(evaluated, images):
    """Runs eval.py on the image folder and returns the run's folder."""
    return lambda *flags: evaluated(*(f"--{side}_folder={images}/{side}" for side in ("database", "queries")), *flags)


def as_hloc_does(h5, count):
    """The `count` most similar photos of the database of each query, by dot product."""
    with h5py.File(h5, "r") as file:
        names = []
        file.visititems(lambda _, part: names.append(part.parent.name[1:]) if isinstance(part, h5py.Dataset) else None)
        sides = {side: sorted(name for name in names if name.startswith(side)) for side in ("queries", "database")}
        rows = {side: np.stack([file[name]["global_descriptor"][:] for name in sides[side]]) for side in sides}
    nearest = np.argsort(-rows["queries"] @ rows["database"].T)[:, :count]
    return {q: [sides["database"][image] for image in row] for q, row in zip(sides["queries"], nearest, strict=True)}


def test_pairs_and_descriptors_say_what_the_predictions_say(images, run, capsys):
    folder = run("--save_pairs=4", "--save_h5", "--recall_values", 1)
    rows = [row for row in rows_of(folder) if int(row["rank"]) <= 4]
    lines = [line.split(" ") for line in (folder / "pairs.txt").read_text().splitlines()]
    assert lines == [[os.path.relpath(row[side], images) for side in ("query", "database")] for row in rows]
    assert len(lines) == 60 and lines[0][0].startswith("queries/@") and lines[0][1].startswith("database/@")
    assert f"60 pairs of 15 queries, names relative to {images}: " in capsys.readouterr().err
    nearest = as_hloc_does(folder / "global_descriptors.h5", 4)
    assert nearest == {query: [image for name, image in lines if name == query] for query, _ in lines}
    with h5py.File(folder / "global_descriptors.h5") as file:
        descriptor = file[lines[0][0]]["global_descriptor"]
        assert descriptor.shape == (384,) and descriptor.dtype == np.float32
        assert np.linalg.norm(descriptor) == pytest.approx(1)


def test_names_are_relative_to_the_folder_that_holds_both(tmp_path, caplog):
    """Whatever lies between, in any language; what an index did not find is left out and counted."""
    caplog.set_level("INFO")
    queries = [f"{tmp_path}/a/q/é.jpg", f"{tmp_path}/a/q/night/2.jpg"]
    database = [f"{tmp_path}/a/b/c/{number}.jpg" for number in range(3)]
    pairs.write_pairs(tmp_path, queries, database, np.array([[2, 0], [1, -1]]))
    expected = "q/é.jpg b/c/2.jpg\nq/é.jpg b/c/0.jpg\nq/night/2.jpg b/c/1.jpg\n"
    assert (tmp_path / "pairs.txt").read_bytes() == expected.encode()
    assert "3 pairs of 2 queries" in caplog.text and "1 matches fewer" in caplog.text
    rows = np.eye(5, dtype=np.float32)
    sides = {
        "database": (database, [(np.array([2, 0, 1]), rows[:3])]),
        "queries": (queries, [(np.arange(2), rows[3:])]),
    }
    pairs.write_h5(tmp_path, sides)
    with h5py.File(tmp_path / "global_descriptors.h5") as file:
        assert file["q/é.jpg"]["global_descriptor"][:].argmax() == 3
        assert [file[f"b/c/{number}.jpg/global_descriptor"][:].argmax() for number in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("name", ["my photo", "tab\there", "odd\u2003space", os.fsdecode(b"\xe9"), "#1"])
def test_names_that_lists_cannot_hold(tmp_path, name):
    with pytest.raises(ValueError, match="^--save_x: .* 1 of 3 .* rename them") as refused:
        pairs.require_names([f"{tmp_path}/{name}", f"{tmp_path}/a.jpg"], [f"{tmp_path}/b.jpg"], flag="--save_x")
    assert repr(name) in str(refused.value) and str(tmp_path) in str(refused.value)


def test_what_cannot_be_is_refused_before_the_extraction(images, run, capsys, caplog, monkeypatch):
    monkeypatch.setattr("eval.extract_images", lambda *_, **__: pytest.fail("extracted"))
    for method in ("nearest_crop", "maj_voting"):
        line = refusal(capsys, lambda method=method: run("--save_h5", f"--test_method={method}"))
        assert "--save_h5" in line and f"--test_method {method}" in line
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "h5py", None)
        assert "pip install h5py" in refusal(capsys, lambda: run("--save_h5"))
    next((images / "queries").iterdir()).rename(images / "queries/my photo.jpg")
    for flag in ("--save_pairs=2", "--save_h5"):
        line = refusal(capsys, lambda flag=flag: run("--no_labels", flag))
        assert line.startswith(f"{flag.partition('=')[0]}: ") and "'queries/my photo.jpg'" in line
    caplog.clear()
    pairs.require_one_each("five_crops", 0)
    pairs.require_one_each("hard_resize", 64)
    (warning,) = caplog.messages
    assert "--save_h5" in warning and "PCA" in warning


def test_a_map_gives_pairs_while_its_photos_are_there(images, run, evaluated, tmp_path, capsys):
    expected = run("--save_pairs=3", "--save_h5", f"--save_map={tmp_path}/map.npz")
    ask = [f"--map={tmp_path}/map.npz", f"--queries_folder={images}/queries", "--save_pairs=3", "--save_h5"]
    by_map = evaluated(*ask)
    assert (by_map / "pairs.txt").read_text() == (expected / "pairs.txt").read_text()
    nearest = [as_hloc_does(folder / "global_descriptors.h5", 5) for folder in (by_map, expected)]
    assert nearest[0] == nearest[1]
    shutil.rmtree(images / "database")
    assert "--save_pairs" in (line := refusal(capsys, lambda: evaluated(*ask))) and "missing" in line
