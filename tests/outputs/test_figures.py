"""Figures: curves of a run, which need no backend."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from datasets import to_gsv_cities
from datasets.own import conversion
from utils.outputs import figures
from utils.run import metrics

DRAW = """
import os, sys
from pathlib import Path
from utils.outputs.figures import draw_recalls
draw_recalls(Path(sys.argv[1]), "town", {"independent": [40.0, 60.0]})
print(os.environ["MPLBACKEND"])
"""


@pytest.mark.drawn
def test_the_curves_of_a_training_run(tmp_path):
    for epoch in (1, 2):
        metrics.append_row(tmp_path, {"epoch": epoch, "steps": 4, "loss": 1 / epoch, "lr": 1e-5, "R@1": 40.0 * epoch})
        figures.draw_training(tmp_path)
    with Image.open(tmp_path / "training.png") as image:
        assert image.size == (1080, 432) and len(image.convert("RGB").getcolors(100_000)) > 10


@pytest.mark.slow
def test_figures_need_no_backend(tmp_path):
    """A notebook's kernel names its own, which is missing here, to the programs that it starts."""
    command, root = [sys.executable, "-c", DRAW, str(tmp_path)], Path(__file__).parents[2]
    backend = "module://matplotlib_inline.backend_inline"
    job = subprocess.run(command, cwd=root, env={"MPLBACKEND": backend}, capture_output=True, text=True)
    assert job.returncode == 0 and job.stdout.split()[-1] == backend, job.stderr
    assert (tmp_path / "recalls.png").stat().st_size > 1000


def test_recalls_have_a_band(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, *_, **__: drawn.append(figure))
    figures.draw_recalls(tmp_path, "town", {"independent": [40.0, 60.0], "shuffled": [0.0, 100.0]}, queries=100)
    first, second = (band.get_paths()[0].vertices for band in drawn[0].axes[0].collections)
    at_one = first[first[:, 0] == 1, 1]
    assert (at_one.min(), at_one.max()) == pytest.approx((30.940, 49.800), abs=1e-3)
    assert second[:, 1].min() == pytest.approx(0) and second[:, 1].max() == pytest.approx(100)
    figures.draw_recalls(tmp_path, "town", {"independent": [40.0]})
    assert not drawn[1].axes[0].collections


def test_a_plot_that_fails_keeps_the_converted_photos(city, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conversion, "draw_map", lambda *_: 1 / 0)
    photos = city / "toy_city/images/train/database"
    assert to_gsv_cities.main([str(photos), f"--output={tmp_path}/own", "--min_images=2", "--cell=100"]) == 0
    assert "no plot: division by zero" in capsys.readouterr().out
    assert list((tmp_path / "own/gsv_cities/Images").rglob("*.jpg"))
