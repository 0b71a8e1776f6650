"""The released code's recalls on real photos, ViT-B included, through eval.py's command line."""

import os
import re
from pathlib import Path

import pytest
import torch
from corridor import RECALLS
from formula import each_batch_once, formula_model
from helpers import only_run, results_of

import eval as eval_script
import train as train_script
from datasets import to_gsv_cities

FOLDER = Path(os.environ.get("SUPERVLAD_REAL_PHOTOS", ""))
UNALIGNED = (20.7, 39.6, 46.8)  # at 1, 5, 10, where the queries' first batch is one of 8
ONE_QUERY = 100 / 111


needs_photos = pytest.mark.skipif(
    not (FOLDER / "corridor").is_dir() or not FOLDER.name,
    reason="SUPERVLAD_REAL_PHOTOS does not name a folder that holds the corridor photos",
)


@needs_photos
def test_the_corridor_is_converted_and_trained_on(tmp_path, capsys):
    """A photo every 10 m on each of two walks: squares of 20 m hold four, and every second one stays."""
    flags = f"{FOLDER}/corridor --output={tmp_path}/own --name=Corridor --cell=20 --gap=20 --val_share=0.2"
    assert to_gsv_cities.main(flags.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    places = int(re.match("222 photos, of which [0-9]+ make ([0-9]+) places to train on", lines[1])[1])
    assert 20 <= places <= 24 and lines[2] == "photos per place: 4 to 4"
    train_script.main(
        f"--eval_datasets_folder={tmp_path}/own --eval_dataset_name=Corridor --backbone=dino_tiny --device=cpu "
        f"--resize 112 112 --train_resize 112 112 --train_batch_size=8 --epochs_num=1 --num_workers=0 "
        f"--save_dir={tmp_path}/run".split()
    )
    shown = capsys.readouterr().err
    assert f"training on {places} places ({4 * places} images, " in shown and "epoch=01" in shown
    assert "Recalls on Corridor test" in shown


@pytest.fixture(scope="module")
def once():
    with each_batch_once():
        yield


@needs_photos
@pytest.mark.parametrize("flags", RECALLS)
def test_recalls_of_the_released_code(once, flags, tmp_path):
    options = {"clusters": 4 if "s=4" in flags else 1, "ghost_clusters": 1 if "s=4" in flags else 2}
    model = formula_model(**options, crossimage_encoder="encoder" in flags)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch_num": 0, "model_state_dict": state}, tmp_path / "released.pth")
    contexts = "file_order unaligned" if "encoder" in flags else "file_order"
    eval_script.main(
        f"--eval_datasets_folder={FOLDER} --eval_dataset_name=corridor --resume={tmp_path}/released.pth "
        f"--backbone=dino {flags} --resize 112 112 --recall_values 1 5 10 20 --save_dir={tmp_path}/run "
        f"--encoder_context {contexts}".split()
    )
    results = results_of(only_run(tmp_path / "run"))
    assert list(results["recalls"].values()) == pytest.approx(RECALLS[flags], abs=ONE_QUERY + 0.05)
    if "encoder" in flags:
        unaligned = [*results["contexts"]["unaligned"]["recalls"].values()]
        assert unaligned[:3] == pytest.approx(UNALIGNED, abs=ONE_QUERY + 0.05)
        assert results["alignment"] == {"warned": True, "queries": 111, "paired": 111, "nearest": 111}
