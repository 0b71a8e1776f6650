"""What tests of several rooms share: the small network's options, what a run left, the line that a refusal is."""

import csv
import json
from pathlib import Path

import pytest
import torch

from model import build_model

SMALL = "--backbone=dino_tiny --device=cpu --num_workers=0 --resize 56 56".split()
MODEL = {"backbone": "dino_tiny", "clusters": 4, "ghost_clusters": 1, "crossimage_encoder": False}


def save_weights(path, *, seed=1, **options):
    """A file with the state dict of a `dino_tiny` network with random weights, all of them equal for equal seeds."""
    torch.manual_seed(seed)
    torch.save(build_model(**MODEL | options).state_dict(), path)
    return path


def tiny(**options):
    """A small network with random weights, in evaluation mode."""
    return build_model(**MODEL | options).eval()


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def only_run(save_dir):
    """The folder of the one run below it; `latest` is a link to it, and a killed run leaves its lock too."""
    (folder,) = [path for path in Path(save_dir).iterdir() if path.is_dir() and not path.is_symlink()]
    return folder


def results_of(folder):
    """A run's results.json."""
    return json.loads((folder / "results.json").read_text())


def rows_of(folder, name="predictions.csv"):
    """The rows of a run's table, by its header."""
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def refusal(capsys, call, status=2):
    """The one line with which a command that `call` starts in this process ends, without its mark."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call()
    shown = capsys.readouterr().err
    assert ended.value.code == status and "Traceback" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("ERROR: ") or " error: " in line]
    return line.partition("error: ")[2] or line.removeprefix("ERROR: ")
