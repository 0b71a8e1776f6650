"""What a user waits for before anything happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.run import log as run_log
from utils.system import version

ROOT = Path(__file__).parents[2]
SLOW = {"torch", "torchvision", "faiss", "sklearn", "scipy", "matplotlib", "pytorch_metric_learning"}


def run(*command):
    """A process, and the top-level modules that it imported."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    done.stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
    return done, {line.split("|")[-1].strip().split(".")[0] for line in lines if line.startswith("import time:")}


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("train.py --epoch_num=3", 2, "did you mean --epochs_num?"),
        ("eval.py", 2, "--eval_datasets_folder"),
        ("train.py --eval_datasets_folder=D --patience=0", 2, "--patience: 0"),
        ("eval.py --help", 0, ""),
        ("-m model.export --outptu=x.onnx", 2, "did you mean --output?"),
        ("-m datasets.check data --treshold=3", 2, "did you mean --threshold?"),
        ("-m datasets.check --help", 0, ""),
        ("-m datasets.toy_city --ouput=x", 2, "did you mean --output?"),
    ],
)
def test_a_mistake_is_answered_before_anything_slow_is_imported(command, status, message):
    done, imported = run(*command.split())
    assert done.returncode == status and message in done.stderr
    assert "argparse" in imported and not imported & SLOW
    if "toy_city" not in command:
        assert "numpy" not in imported
    shown = done.stdout if status == 0 else done.stderr
    assert shown.startswith("usage: ") and "--help lists all options\n" in shown
    assert status == 0 or len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("program", ["train.py", "eval.py", "-m model.export", "-m datasets.check"])
def test_the_version_is_printed_before_anything_slow_is_imported(program):
    done, imported = run(*program.split(), "--version", "--no_such_option")
    assert (done.returncode, done.stderr) == (0, "") and not imported & {*SLOW, "numpy"}
    assert done.stdout == f"{program.replace('-m', 'python -m')} {(ROOT / 'VERSION').read_text()}"


def test_every_place_has_the_same_version():
    """The citation, the first heading of the changelog, the programs, the log and results.json."""
    number = (ROOT / "VERSION").read_text().strip()
    assert re.fullmatch(r"\d+\.\d+\.\d+", number)
    assert re.findall(r"^version: (.*)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [number]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[?([\d.]+)\]? - \d{4}-\d\d-\d\d$", changes, re.MULTILINE)[0] == number
    assert version.version() == run_log.environment(torch.device("cpu"))["version"] == number


def test_programs_start_without_what_only_some_runs_need():
    """The models of torch.hub, and then the scripts in the same process."""
    code = """
import sys, torch
torch.hub.load('.', 'supervlad', source='local', pretrained=False, backbone='dino_tiny')
print(*sys.modules)
import eval, model.export
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_hub, of_scripts = (set(line.split()) for line in done.stdout.splitlines())
    assert any(name.startswith("_supervlad_") for name in of_hub) and {"torch", "faiss"} <= of_scripts
    some = {"sklearn", "scipy", "matplotlib", "pytorch_metric_learning", "onnx", "safetensors"}
    assert not of_hub & {*some, "faiss"} and not of_scripts & some
