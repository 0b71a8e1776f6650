"""DINOv3 backbones, and what works on DINOv2 works on them: a small one of the same shape, from file to recall."""

from functools import partial

import helpers
import numpy as np
import pytest
import torch
from helpers import only_run, refusal, results_of

import eval as eval_script
import train as train_script
from datasets.photos.transforms import evaluation_transform
from model import export
from model.vit import rotated
from model.weights import read_file
from utils.system.device import autocast, cast_weights

TOY = "--eval_dataset_name=toy_city --device=cpu --num_workers=0".split()
TRAIN = "--backbone=dinov3_tiny --resize 64 64 --train_resize 64 64 --train_batch_size=8 --epochs_num=1".split()


tiny = partial(helpers.tiny, backbone="dinov3_tiny")


@pytest.fixture
def backbone():
    return tiny().backbone


def test_rotation_against_complex_numbers(backbone):
    """By loops: a patch turns its pairs of channels by angles of its row, then of its column; other tokens stay."""
    h, w, hs, front = 2, 3, 16, 5
    x = torch.randn(1, 2, front + h * w, hs)
    expected = x.clone()
    for i in range(h):
        for j in range(w):
            token = front + i * w + j
            for k in range(hs // 4):
                period = 100 ** (2 * k / (hs / 2))
                for at, coordinate in ((k, 2 * (i + 0.5) / h - 1), (k + hs // 4, 2 * (j + 0.5) / w - 1)):
                    pair = torch.complex(x[0, :, token, at], x[0, :, token, at + hs // 2])
                    pair = pair * np.exp(2j * np.pi * coordinate / period)
                    expected[0, :, token, at], expected[0, :, token, at + hs // 2] = pair.real, pair.imag
    rotation = backbone.rope_embed(h, w, unmoved=front)
    torch.testing.assert_close(rotated(x, rotation), expected, rtol=0, atol=1e-5)
    assert torch.equal(rotated(x, rotation)[:, :, :front], x[:, :, :front])
    half = rotated(x.bfloat16(), rotation)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rotated(x.bfloat16().float(), rotation).bfloat16()), "angles and sums are fp32"


def test_the_bias_counts_times_its_mask(backbone):
    images = torch.randn(1, 3, 32, 48)
    masks = [block.attn.qkv.bias_mask for block in backbone.blocks]
    assert all(mask.view(3, -1).unique(dim=1).flatten().tolist() == [1, 0, 1] for mask in masks)
    with torch.no_grad():
        for block in backbone.blocks:
            block.attn.qkv.bias.normal_()
        before = backbone(images)
        for block in backbone.blocks:
            block.attn.qkv.bias[96:192] += 7
        assert torch.equal(backbone(images), before), "keys have none"
        masks[3][200:210] = 0
        masked = backbone(images)
        backbone.blocks[3].attn.qkv.bias[200:210] = 0
        masks[3][200:210] = 1
        assert torch.equal(backbone(images), masked) and not torch.equal(masked, before)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_cast_once_give_what_autocast_gives(backbone, precision):
    images = torch.randn(2, 3, 64, 48)
    with torch.inference_mode(), autocast(torch.device("cpu"), precision):
        expected = backbone(images)
        cast_weights(backbone, precision)
        assert torch.equal(backbone(images), expected)
    assert backbone.rope_embed.periods.dtype == torch.float32


@pytest.fixture(scope="module")
def trained(city, tmp_path_factory):
    """A run of a DINOv3-shaped backbone of which 9 blocks are kept, from an official-shaped file of 12."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    torch.save(tiny().backbone.state_dict(), folder / "dinov3.pth")
    flags = f"--foundation_model_path={folder}/dinov3.pth --backbone_blocks=9 --freeze_te=7 --crossimage_encoder"
    more = f"--eval_datasets_folder={city} --save_dir={folder}/run --grad_cache_chunk=8 --activation_checkpointing"
    with pytest.MonkeyPatch.context() as patch:  # as a published one, which a CPU trains for days
        patch.setattr(train_script, "GATED_FILES", {"dinov3_tiny": "dinov3.pth"})
        train_script.main([*TOY, *TRAIN, *flags.split(), *more.split()])
    return only_run(folder / "run")


def evaluated(city, folder, file, *flags):
    """What eval.py finds with a file, and its log."""
    eval_script.main([*TOY, f"--eval_datasets_folder={city}", f"--resume={file}", f"--save_dir={folder}", *flags])
    return results_of(only_run(folder)), (only_run(folder) / "info.log").read_text()


def test_training_and_evaluation_without_options(city, trained, tmp_path):
    """The backbone, its blocks and the size are in the checkpoint, and in files exported from it."""
    content, start = read_file(trained / "best_model.pth"), read_file(trained.parents[1] / "dinov3.pth")
    assert content["model"]["backbone"] == "dinov3_tiny" and content["model"]["backbone_blocks"] == 9
    state = read_file(trained / "last_model.pth")["model_state_dict"]
    moved = {name for name, value in start.items() if not torch.equal(state.get(f"backbone.{name}", value), value)}
    assert moved and all(name.startswith(("blocks.7.", "blocks.8.")) for name in moved)
    log = (trained / "info.log").read_text()
    assert "the first 9 of its 12 blocks are taken" in log
    ours, log = evaluated(city, tmp_path / "own", trained / "best_model.pth", "--save_assignments=1")
    assert "from the checkpoint: backbone dinov3_tiny, backbone_blocks 9, " in log
    assert (ours["model"]["backbone_blocks"], ours["resize"]) == (9, [64, 64])
    assert len(list(only_run(tmp_path / "own").glob("assignments/*.png"))) == 1
    export.main([f"--resume={trained}/best_model.pth", f"--output={tmp_path}/model.safetensors"])
    exported, _ = evaluated(city, tmp_path / "exported", tmp_path / "model.safetensors")
    assert exported["recalls"] == ours["recalls"] == results_of(trained)["recalls"]


def test_other_sizes_and_shapes_of_a_checkpoint(city, trained, tmp_path, capsys):
    """Without --backbone, since the file says it: multiples of 16, and photos cropped to whole patches of it."""
    file = trained / "best_model.pth"
    for flags, told in (
        (["--resize", "56", "56"], "16-pixel patch; use e.g. "),
        (["--backbone=dinov3_tiny", "--backbone_blocks=8"], "use --backbone=dinov3_tiny --backbone_blocks=9"),
    ):
        assert told in refusal(capsys, lambda flags=flags: evaluated(city, tmp_path / "refused", file, *flags))
        assert not (tmp_path / "refused").exists()
    results, log = evaluated(city, tmp_path / "a", file, "--resize", "48", "70", "--test_method=single_query")
    assert results["options"]["resize"] == [48, 64] and "--resize 48 70 is rounded to whole patches, 48 64" in log


def test_single_query_crops_to_the_backbones_patches():
    pixels = torch.randint(0, 256, (1, 3, 60, 110), dtype=torch.uint8)
    for patch_size, side, expected in ((16, 64, (64, 112)), (14, 56, (56, 98))):
        transform = evaluation_transform((side, side), False, "single_query", patch_size=patch_size)
        assert transform(pixels).shape[-2:] == expected
        square = evaluation_transform((side, side), False, "five_crops", patch_size=patch_size)
        assert square(pixels).shape[-2:] == (side, side)
