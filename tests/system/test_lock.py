"""A folder belongs to one live process."""

import os
import signal
import time

import pytest

from utils.system import lock
from utils.system.lock import FolderLock, is_held


def hold(folder):
    """Starts a process that locks a folder and keeps it for a minute; its number."""
    begins, held = os.pipe()
    if (child := os.fork()) == 0:
        try:
            FolderLock(folder, "--save_dir")
            os.write(held, b"held")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(held)
    assert os.read(begins, 4) == b"held"
    return child


def end(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_process_is_told_who_has_the_folder(tmp_path):
    holder = hold(tmp_path / "run")
    assert is_held(tmp_path / "run")
    pattern = rf"run .* process {holder} on {os.uname().nodename} since 20..-..-.. .* --save_dir"
    with pytest.raises(ValueError, match=pattern):
        FolderLock(tmp_path / "run", "--save_dir")
    end(holder)
    assert not is_held(tmp_path / "run")
    with FolderLock(tmp_path / "run", "--save_dir"):
        assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {os.getpid()} on")


def test_a_forked_process_does_not_keep_the_folder(tmp_path):
    with FolderLock(tmp_path, "--save_dir"):
        ends, begins = os.pipe()
        if (child := os.fork()) == 0:
            os.read(ends, 1)
            os._exit(0)
    end(hold(tmp_path))
    os.write(begins, b"x")
    os.waitpid(child, 0)


def test_the_same_process_counts_too_until_it_lets_go(tmp_path):
    with FolderLock(tmp_path, "--save_dir"):
        (tmp_path / "link").symlink_to(tmp_path)
        assert is_held(tmp_path / "link")
        with pytest.raises(ValueError, match=rf"in use by this process \({os.getpid()}\)"):
            FolderLock(tmp_path / "link", "--save_dir")
    assert not is_held(tmp_path) and not is_held(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=rf"{folder} .* --save_dir"):
            FolderLock(folder, "--save_dir")


def test_nothing_is_left_of_a_lock(tmp_path):
    with FolderLock(tmp_path / "made", "--save_dir"), FolderLock(tmp_path, "--save_dir"):
        assert {path.name for path in tmp_path.iterdir()} == {"made", ".lock"}
    assert not list(tmp_path.iterdir())
    with FolderLock(tmp_path / "made", "--save_dir"):
        (tmp_path / "made" / "results.json").touch()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["results.json"]


def test_a_lock_on_a_file_that_its_holder_just_removed_is_none(tmp_path, monkeypatch):
    real, removed = lock.fcntl.lockf, []

    def late(descriptor, how):
        real(descriptor, how)
        if not removed:  # as if the holder had let go between our opening and locking the file
            removed.append((tmp_path / ".lock").unlink())

    monkeypatch.setattr(lock.fcntl, "lockf", late)
    with FolderLock(tmp_path, "--save_dir"):
        assert (tmp_path / ".lock").exists() and removed


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with FolderLock(tmp_path, "--save_dir"):
        assert "cannot be locked (No locks available), so a second run could use it too" in caplog.text
