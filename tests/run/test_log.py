"""A run's log: one line and status 2 for bad input, the rest in files; what a run records of itself."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from utils.run import log as run_log
from utils.system import distributed


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_, run_log.RunLog() as log:
        logging.getLogger("anything").info("before the folder")
        folder = log.open(tmp_path / "x")
        logging.getLogger("anything").info("in the folder, of a name that is not UTF-8: \udcff")
        raise ValueError("the value, the rule, the remedy")
    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert "ERROR: the value, the rule, the remedy" in shown and "Traceback" not in shown
    info = (folder / "info.log").read_text()
    assert info.index("before the folder") < info.index("UTF-8: \\udcff") and "Traceback" not in info
    assert "Traceback" in (folder / "debug.log").read_text()


def test_bad_input_before_the_folder_makes_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit), run_log.RunLog():
        raise ValueError("no")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_, run_log.RunLog() as log:
        log.open(tmp_path / "file")
    assert exit_.value.code == 2 and "--save_dir" in capsys.readouterr().err


def test_other_errors_pass_and_are_in_the_log(tmp_path):
    with pytest.raises(RuntimeError, match="no such thing"), run_log.RunLog() as log:
        folder = log.open(tmp_path)
        raise RuntimeError("no such thing")
    assert "no such thing" in (folder / "debug.log").read_text()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee ..."), "Tried to allocate 2 GiB"),
        (MemoryError(), "--activation"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--extraction_batch_size"),
    ],
)
def test_out_of_memory_is_one_line(tmp_path, capsys, error, words):
    with pytest.raises(SystemExit) as exit_, run_log.RunLog() as log:
        folder = log.open(tmp_path)
        raise error
    shown = capsys.readouterr().err
    assert exit_.value.code == 1 and shown.startswith("ERROR: out of memory (") and shown.count("\n") == 1
    assert words in shown and "Traceback" in (folder / "debug.log").read_text()


def test_runs_of_the_same_second_have_folders_of_their_own_and_latest_leads_to_the_newest(tmp_path, monkeypatch):
    """A folder named `latest` is left alone."""
    monkeypatch.chdir(tmp_path)
    latest = Path("logs/mine/latest")  # where a relative --save_dir lies
    for number in range(1, 4):
        with run_log.RunLog() as log:
            folder = log.open(Path("mine"))
        assert latest.readlink() == Path(folder.name)
        assert len(run_log.runs_of(Path("mine"))) == number == len(list(latest.parent.iterdir())) - 1
    latest.unlink()
    latest.mkdir()
    with run_log.RunLog() as log:
        log.open(Path("mine"))
    assert not list(latest.iterdir()) and len(list(latest.parent.iterdir())) == 5


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    """For real: /dev/full refuses every write."""
    (tmp_path / "info.log").symlink_to("/dev/full")
    with run_log.RunLog() as log:
        log.open(tmp_path, tmp_path)
        for number in range(20):
            logging.getLogger("utils").info("line %d", number)
    shown = capsys.readouterr().err
    assert "line 19" in shown and "Traceback" not in shown
    assert shown.count(f"WARNING: cannot write {tmp_path}/info.log (") == shown.count("WARNING") == 1
    assert "line 19" in (tmp_path / "debug.log").read_text()


def test_an_error_in_another_process_has_a_log_and_a_line_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    monkeypatch.setattr(distributed, "broadcast", lambda value: tmp_path / "run")
    with pytest.raises(SystemExit) as exit_, run_log.RunLog() as log:
        logging.getLogger("utils").info("before the folder")
        log.open(tmp_path)
        sys.stderr.write("epoch 1:  50%|#####     |")  # the main process's bar, on the same terminal
        raise ValueError("the value, the rule, the remedy")
    assert exit_.value.code == 2
    assert "\nrank 3: ERROR: the value, the rule, the remedy\n" in capsys.readouterr().err
    text = (tmp_path / "run" / "rank3.log").read_text()
    assert "before the folder" in text and "Traceback" in text and "ERROR the value, the rule" in text
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["rank3.log"]


@pytest.mark.parametrize(
    "error", ["[gloo/transport/tcp/pair.cc] Connection closed by peer [::1]", "NCCL: remote process exited"]
)
def test_an_error_that_only_says_that_another_process_ended_is_one_line(tmp_path, monkeypatch, capsys, error):
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as exit_, run_log.RunLog() as log:
        folder = log.open(tmp_path)
        patched.setattr(distributed, "world_size", lambda: 2)
        raise RuntimeError(error)
    assert exit_.value.code == 1 and error in (folder / "debug.log").read_text()
    assert capsys.readouterr().err == "ERROR: another process of the run has ended, so this one ends too\n"


def test_a_line_moves_the_progress_bar_out_of_its_way(capsys):
    with run_log.RunLog(), tqdm(total=9, desc="epoch 1", file=sys.stderr, mininterval=0) as bar:
        bar.update(3)
        logging.getLogger("utils").info("a line")
    assert "\ra line\n" in capsys.readouterr().err.replace(" ", "").replace("aline", "a line")


def test_results_hold_what_they_depend_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # without git
    run_log.write_results(
        tmp_path, {"recalls": {1: 27.0}}, SimpleNamespace(flat={"seed": 0, "path": tmp_path}), torch.device("cpu")
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["recalls"] == {"1": 27.0} and results["options"] == {"seed": 0, "path": str(tmp_path)}
    assert {"torch", "faiss", "device", "version"} <= results["environment"].keys()
    assert results["environment"]["git"] == "unknown"
