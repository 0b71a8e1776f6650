"""On a device that is not the CPU, nothing is left on the other side, and the results are the CPU's."""

import json

import numpy as np
import pytest
import torch
import warm
from helpers import SMALL, only_run, rows_of
from PIL import Image

import hubconf
import train as train_script

pytestmark = pytest.mark.slow


def on_shadow(script, *arguments):
    done = warm.run("shadow.py", script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("epochs", "recipe"),
    [
        ((1, 2), "--backbone=dino_tiny --backbone_blocks=2 --freeze_te=none --resize 56 56 --train_resize 56 56"),
        (
            (2,),
            "--backbone=dinov3_tiny --backbone_blocks=2 --freeze_te=0 --resize 64 64 --train_resize 64 64 "
            "--grad_cache_chunk=8 --activation_checkpointing --encoder_training=every_step --place_order=similar",
        ),
    ],
    ids=["released", "DINOv3 and memory switches"],
)
def test_training_and_its_resume(city, tmp_path, epochs, recipe):
    """Two steps an epoch."""
    flags = [*"--device=cpu --num_workers=0 --crossimage_encoder --train_batch_size=8 --lr=0.001".split()]
    flags += [f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city", *recipe.split(), "--resume=auto"]
    for end in epochs:
        on_shadow("train", *flags, "--deterministic", f"--epochs_num={end}", f"--save_dir={tmp_path}/shadow")
    train_script.main([*flags, "--epochs_num=2", f"--save_dir={tmp_path}/cpu"])
    runs = [only_run(tmp_path / side) for side in ("shadow", "cpu")]
    losses = [[float(row["loss"]) for row in rows_of(run, "metrics.csv") if row["steps"] == "2"] for run in runs]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    there, here = (torch.load(run / "last_model.pth")["model_state_dict"] for run in runs)
    for name, value in there.items():
        torch.testing.assert_close(value, here[name], atol=2e-3, rtol=0, msg=name)


def test_evaluation_a_map_and_the_models_of_the_hub(city, weights, tmp_path, evaluated):
    flags = "--encoder_context independent file_order --test_method=five_crops --pca_dim=4".split()
    flags += [f"--eval_datasets_folder={city}", "--eval_dataset_name=toy_city", "--save_predictions=3"]
    flags += ["--pca_dataset_folder=toy_city/images/test/database", "--save_assignments=2"]
    here = rows_of(evaluated(*flags, model="says"))
    shadow = [*SMALL, *flags, f"--resume={weights}/says.pth", f"--save_dir={tmp_path}/shadow"]
    on_shadow("eval", *shadow, f"--save_map={tmp_path}/city.npz")
    there = rows_of(only_run(tmp_path / "shadow"))
    name = "squared_descriptor_distance"
    distances = [[float(row[name]) for row in rows] for rows in (there, here)]
    np.testing.assert_allclose(*distances, atol=1e-5)
    assert [row["database"] for row in there if row["rank"] == "1"] == [
        row["database"] for row in here if row["rank"] == "1"
    ]

    photo = next((city / "toy_city/images/test/queries").iterdir())
    said = json.loads(on_shadow("hub", weights / "says.pth", tmp_path / "city.npz", photo).splitlines()[-1])
    with torch.inference_mode():
        descriptor = hubconf.checkpoint(weights / "says.pth")(hubconf.prepare((56, 56))(photo)[None])[0]
    np.testing.assert_allclose(said["descriptor"], descriptor.numpy(), atol=1e-5)
    place = hubconf.place_map(tmp_path / "city.npz", weights / "says.pth").locate(np.asarray(Image.open(photo)))
    assert said["path"] == place.path and said["distance"] == pytest.approx(place.distance, abs=1e-5)
