"""Two processes (torchrun, Gloo) compute what one does."""

import pytest
import torch
import warm
from helpers import SMALL, only_run, results_of
from recorded import record

pytestmark = pytest.mark.slow

FLAGS = SMALL + "--backbone_blocks=2 --eval_dataset_name=toy_city --train_resize 56 56 --lr=0.0001".split()
FLAGS += ["--epochs_num=2"]


def gathered(steps, name):
    return torch.cat([tensor.flatten() for tensor in steps[name]])


@pytest.mark.parametrize(
    ("processes", "places", "flags"),
    [
        (3, 7, "--freeze_te=none"),  # 7, 7 and 2 of 16 places: uneven, and one process has no place of the last batch
        (2, 7, "--freeze_te=1 --crossimage_encoder --encoder_training=every_step --place_order=similar"),
        (
            2,
            6,
            "--backbone=dinov3_tiny --backbone_blocks=3 --freeze_te=0 --resize 64 64 --train_resize 64 64 "
            "--crossimage_encoder --grad_cache_chunk=5 --activation_checkpointing",
        ),
    ],
)
def test_several_processes_take_the_steps_of_one(city, tmp_path, processes, places, flags):
    flags = [*FLAGS, f"--eval_datasets_folder={city}", f"--train_batch_size={places}", *flags.split()]
    several = [tmp_path / "steps", *flags, f"--save_dir={tmp_path}/several"]
    run = warm.torchrun("recorded.py", *several, processes=processes)
    assert run.returncode == 0, run.stderr
    halves = 2 * [4 * -(-min(places, 16 - start) // 2) for start in range(0, 16, places)]
    one = record([*flags, f"--save_dir={tmp_path}/one"], halves=halves)
    several = [torch.load(f"{tmp_path}/steps.{rank}") for rank in range(processes)]
    assert len(one) == len(halves) >= 6
    for rank_steps in several:
        for step, expected in zip(rank_steps, one, strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5) and step["loss"] > 0
            difference = gathered(step, "gradients") - gathered(expected, "gradients")
            assert difference.norm() < 1e-4 * gathered(expected, "gradients").norm()
    # Only one process wrote, and validation and test came to the same.
    a, b = only_run(tmp_path / "several"), only_run(tmp_path / "one")
    assert {path.name for path in a.iterdir()} == {path.name for path in b.iterdir()}
    assert results_of(a)["recalls"] == results_of(b)["recalls"] and recalls_of(a) == recalls_of(b)
    assert run.stderr.count("epoch=01") == 1


def recalls_of(folder):
    return [line.split(",")[4:] for line in (folder / "metrics.csv").read_text().split()]


def test_a_batch_too_small_for_the_processes(city, tmp_path):
    flags = [
        *FLAGS,
        f"--eval_datasets_folder={city}",
        "--freeze_te=1",
        "--train_batch_size=1",
        f"--save_dir={tmp_path}/run",
    ]
    run = warm.torchrun("recorded.py", tmp_path / "steps", *flags)
    assert run.returncode != 0 and "--train_batch_size 1 is too small for 2 processes" in run.stderr
    assert not (tmp_path / "run").exists()
