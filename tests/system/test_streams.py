"""What programs say arrives, whatever names are in it and whatever the stream can write."""

import io
import logging
from contextlib import redirect_stderr, redirect_stdout

import eval as eval_script
from datasets import check
from utils.run.log import RunLog
from utils.system.command_line import Parser

ODD = "é\udcff"  # a letter that ASCII lacks, and a byte that is not UTF-8
SHOWN = "\\xe9\\udcff"


def written(call):
    """Calls with standard output and error redirected to files of ASCII; what they got, and the exit status."""
    files, status = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)], 0
    with redirect_stdout(files[0]), redirect_stderr(files[1]):
        try:
            status = call()
        except SystemExit as ended:
            status = ended.code
    for file in files:
        file.flush()
    return *(file.buffer.getvalue().decode() for file in files), status


def test_a_name_does_not_silence_what_comes_after_it():
    def run():
        with RunLog():
            logging.getLogger("utils").warning("cannot read %s", ODD)
            raise ValueError("the end")

    _, shown, status = written(run)
    assert status == 2 and shown.splitlines() == [f"WARNING: cannot read {SHOWN}", "ERROR: the end"]


def test_programs_end_with_their_own_words(tmp_path):
    (tmp_path / ODD).mkdir()
    (tmp_path / ODD / "1.jpg").write_bytes(b"no image")
    shown, _, status = written(lambda: check.main([str(tmp_path / ODD), "--workers=1"]))
    assert status == 1 and SHOWN in shown and shown.splitlines()[-1].startswith("1 fault")
    _, shown, status = written(lambda: Parser(prog="x").parse([f"--{ODD}"]))
    assert status == 2 and f"unknown option --{SHOWN}" in shown
    flags = [f"--eval_datasets_folder={tmp_path}", f"--resume={tmp_path}/{ODD}.pth", "--device=cpu"]
    _, shown, status = written(lambda: eval_script.main(flags))
    assert status == 2 and SHOWN in shown.splitlines()[-1]
