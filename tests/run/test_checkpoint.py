"""Checkpoints and the table of epochs: written whole or not at all, the furthest whole one found, no row twice."""

import os
import resource
import signal

import pytest
import torch

from model.weights import read_file
from utils.run import checkpoint, metrics


@pytest.mark.parametrize("full_disk", [False, True])
def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch, full_disk):
    path = tmp_path / "last_model.pth"
    checkpoint.save(path, {"epoch_num": 1})

    def dies(content, file):
        file.write(b"half")
        raise OSError("no space left")

    if full_disk:  # for real: /dev/full refuses every write
        (tmp_path / "last_model.tmp.pth").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="cannot write .*last_model.pth .*--resume auto, since earlier files are intact"):
        checkpoint.save(path, {"weights": torch.zeros(100_000)})
    assert torch.load(path, weights_only=True) == {"epoch_num": 1}
    assert full_disk or [p.name for p in tmp_path.iterdir()] == ["last_model.pth"]


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    def flip(path, place):
        data = bytearray(path.read_bytes())
        data[int(place * len(data))] ^= 1
        path.write_bytes(bytes(data))

    old, new = tmp_path / "a", tmp_path / "b"
    assert checkpoint.newest([old, new], read=read_file) is None
    for number, folder in enumerate((old, new, new)):
        folder.mkdir(exist_ok=True)
        checkpoint.save(folder / "last_model.pth", {"number": number, "weights": torch.randn(5000)})
    taken = []
    for damaged in (None, new / "last_model.pth", new / "previous_model.pth", old / "last_model.pth"):
        if damaged:
            flip(damaged, 0.5)
        path = checkpoint.newest([old, new], read=read_file)
        taken.append(path and read_file(path)["number"])
    assert taken == [2, 1, 0, None]


def test_how_far_a_checkpoint_has_come_decides_not_the_clock(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for epoch, losses in ((1, [0.5]), (1, [0.5, 0.4])):
        checkpoint.save(folder / "last_model.pth", {"epoch_num": epoch, "losses": losses})
    os.utime(folder / "last_model.pth", (1, 1))  # as after a clock that went back
    assert checkpoint.newest([folder], read=read_file) == folder / "last_model.pth"
    (folder / "last_model.pth").rename(folder / "x")
    (folder / "previous_model.pth").rename(folder / "last_model.pth")
    (folder / "x").rename(folder / "previous_model.pth")
    assert checkpoint.newest([folder], read=read_file) == folder / "previous_model.pth"
    other = tmp_path / "other"  # a later run, however far
    other.mkdir()
    checkpoint.save(other / "last_model.pth", {"epoch_num": 0, "losses": []})
    assert checkpoint.newest([folder, other], read=read_file) == other / "last_model.pth"


def test_rows_past_a_checkpoint_go_and_lost_ones_are_told(tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    for epoch, loss in ((1, 0.1), (2, 0.2), (3, 0.3)):
        metrics.append_row(tmp_path, {"epoch": epoch, "loss": loss})
    before = path.stat().st_ino
    metrics.cut_rows(tmp_path, 3)
    assert path.stat().st_ino == before, "one that is right is left alone"
    metrics.cut_rows(tmp_path, 1)
    metrics.append_row(tmp_path, {"epoch": 2, "loss": 0.5})
    assert path.read_bytes() == b"epoch,loss\r\n1,0.1\r\n2,0.5\r\n" and not caplog.text
    metrics.cut_rows(tmp_path, 5)
    assert "lacks rows for 3 of the 5 epochs" in caplog.text
    metrics.cut_rows(tmp_path, 0)
    assert path.read_text() == "epoch,loss\n"
    metrics.cut_rows(tmp_path / "nowhere", 3)


@pytest.mark.parametrize(
    ("left", "kept"),  # by a run of 1.0.0, which did not write rows whole
    [
        (b"", b""),
        (b"epoch,l", b""),
        (b"epoch,loss\r\n1,0.1\r\n2,", b"epoch,loss\r\n1,0.1\r\n"),
        (b"epoch,loss\r\n4,0.4\r\n", b"epoch,loss\r\n"),
    ],
)
def test_half_a_row_goes(tmp_path, caplog, left, kept):
    (tmp_path / "metrics.csv").write_bytes(left)
    metrics.cut_rows(tmp_path, 2)
    assert (tmp_path / "metrics.csv").read_bytes() == kept and "lacks rows for" in caplog.text
    metrics.append_row(tmp_path, {"epoch": 3, "loss": 0.3})
    assert (tmp_path / "metrics.csv").read_bytes() == (kept or b"epoch,loss\r\n") + b"3,0.3\r\n"


def test_a_row_is_written_whole_or_not_at_all(tmp_path):
    """For real: the process may write no file beyond some bytes."""
    metrics.append_row(tmp_path, {"epoch": 1, "loss": 0.1})
    before = (tmp_path / "metrics.csv").read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*metrics.csv .*--resume auto"):
            metrics.append_row(tmp_path, {"epoch": 2, "loss": 0.2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    metrics.append_row(tmp_path, {"epoch": 2, "loss": 0.2})
    (tmp_path / "metrics.tmp.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot write .*metrics.csv .*--resume auto"):
        metrics.cut_rows(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    assert (tmp_path / "metrics.csv").read_bytes() == before + b"2,0.2\r\n"
