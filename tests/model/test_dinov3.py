"""DINOv3 backbones, and what works on DINOv2 works on them: a small one of the same shape, from file to recall."""

import json
import logging
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

import eval as eval_script
import train as train_script
from datasets.photos.transforms import evaluation_transform
from model import BACKBONES, build_model, export
from model.dinov3 import DINOv3
from model.vit import Attention, rotated
from model.weights import FOUNDATION_FILES, GATED_FILES, load_checkpoint, load_foundation, read_file
from parser import EvalOptions, parse
from utils.system.device import autocast, cast_products

TOY = "--eval_dataset_name=toy_city --device=cpu --num_workers=0".split()
TRAIN = "--backbone=dinov3_tiny --resize 64 64 --train_resize 64 64 --train_batch_size=8 --epochs_num=1".split()
REPOSITORY = str(Path(__file__).parents[2])


def tiny(**options):
    return build_model(backbone="dinov3_tiny", **options)


def backbone_of(name="dinov3_tiny", **options):
    return build_model(backbone=name, **options).backbone


@pytest.fixture
def backbone():
    return backbone_of().eval()


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


def test_attention_follows_the_distance_of_patches():
    """Without any difference but their places, patches attend by how far they are from each other."""
    attention, rope = Attention(32, 2), backbone_of().rope_embed
    x = torch.randn(1, 1, 32).expand(1, 6, 32)
    q, k, _ = attention.qkv(x).view(1, 6, 3, 2, 16).permute(2, 0, 3, 1, 4)
    rotation = rope(1, 6, unmoved=0)
    scores = rotated(q, rotation) @ rotated(k, rotation).transpose(-2, -1)
    for offset in range(-5, 6):
        diagonal = scores.diagonal(offset, dim1=-2, dim2=-1)
        torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[..., 0, 0], scores[..., 0, 1])


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


def test_features_lie_where_their_patches_do(backbone):
    images = torch.zeros(2, 3, 64, 96)
    images[1, :, 16:32, 80:96] = 3.0  # row 1, column 5
    with torch.no_grad():
        features = backbone(images)
    difference = (features[1] - features[0]).norm(dim=0)
    assert features.shape == (2, 96, 4, 6) and divmod(difference.argmax().item(), 6) == (1, 5)
    with pytest.raises(ValueError, match="64x90 is not a multiple of the 16-pixel patch; use e.g. --resize 320 320"):
        backbone(images[..., :90])


@pytest.mark.parametrize("freeze_te", [0, 8, 12, None])
def test_what_is_frozen_keeps_no_activations(backbone, freeze_te):
    backbone.freeze(freeze_te)
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    expected = {name for name, _ in backbone.named_parameters() if not name.startswith("blocks.")}
    expected |= {f"blocks.{n}" for n in range(freeze_te or 0)}
    expected = {"mask_token"} if freeze_te is None else expected
    assert {name if name in expected else ".".join(name.split(".")[:2]) for name in frozen} == expected
    kept = []
    before = [0] * 13
    for index, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda *_, i=index: before.__setitem__(i + 1, len(kept)))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(0) or tensor, lambda tensor: tensor):
        backbone(torch.randn(1, 3, 32, 32))
    for index in range(12):
        assert (before[index + 1] > before[index]) == (freeze_te is None or index >= freeze_te), index


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_cast_once_give_what_autocast_gives(backbone, precision):
    images = torch.randn(2, 3, 64, 48)
    with torch.inference_mode(), autocast(torch.device("cpu"), precision):
        expected = backbone(images)
        cast_products(backbone, precision)
        assert torch.equal(backbone(images), expected)
    assert backbone.rope_embed.periods.dtype == torch.float32


def test_an_official_file_is_loaded_whole(tmp_path, caplog):
    """Its periods have 8 bits; 188 names, as of ViT-S."""
    saved, loaded = backbone_of(), backbone_of()
    state = {name: value.clone() for name, value in saved.state_dict().items()}
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    torch.save(state, tmp_path / "dinov3.pth")
    load_foundation(loaded, tmp_path / "dinov3.pth")
    assert len(state) == len(loaded.state_dict()) == 188
    assert all(torch.equal(value, state[name].float()) for name, value in loaded.state_dict().items())
    del state["blocks.7.attn.qkv.bias_mask"]
    torch.save(state, tmp_path / "dinov3.pth")
    with pytest.raises(ValueError, match=r"does not fit the model: .*blocks\.7\.attn\.qkv\.bias_mask") as error:
        load_foundation(loaded, tmp_path / "dinov3.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("of_file", "asked", "message"),
    [
        ("dino_tiny", "dinov3_tiny", "a DINOv2 backbone, but a DINOv3 one was asked for; use --backbone=dino_tiny"),
        ("dinov3_tiny", "dino_tiny", "a DINOv3 backbone, but a DINOv2 one was asked for; use --backbone=dinov3_tiny"),
        (
            "dinov3_tiny",
            "dinov3_small",
            "a backbone of 96 channels, 12 blocks and 4 registers, but one of 384, 12 and 4 was asked for; "
            "use --backbone=dinov3_tiny",
        ),
    ],
)
def test_a_file_of_another_backbone_is_told_in_a_line(tmp_path, of_file, asked, message):
    saved = build_model(backbone=of_file)
    torch.save(saved.backbone.state_dict(), tmp_path / "foundation.pth")
    torch.save(saved.state_dict(), tmp_path / "checkpoint.pth")
    with torch.device("meta"):
        model = build_model(backbone=asked)
    for load, name in ((lambda path: load_foundation(model.backbone, path), "foundation"), (None, "checkpoint")):
        with pytest.raises(ValueError) as error:
            (load or (lambda path: load_checkpoint(model, path)))(tmp_path / f"{name}.pth")
        assert str(error.value) == f"{tmp_path}/{name}.pth has {message}"


def test_files_of_neither_family(tmp_path):
    for state, told in (
        ({"patch_embed.proj.weight": torch.zeros(96, 3, 16, 16)}, "--foundation_model_path$"),
        (
            {"embeddings.cls_token": torch.zeros(1, 1, 96)},
            "names in this file are those of Hugging Face's transformers",
        ),
    ):
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=f"holds no DINOv3 backbone: a checkpoint for .*{told}"):
            load_foundation(backbone_of(), tmp_path / "other.pth")


@pytest.fixture
def refused(city, tmp_path, capsys):
    """Runs a script and returns the one line that it refuses with; it leaves no folder."""

    def run(script, *flags):
        with pytest.raises(SystemExit) as exit_:
            script.main([*TOY, f"--eval_datasets_folder={city}", f"--save_dir={tmp_path}/run", *map(str, flags)])
        shown = capsys.readouterr().err
        assert exit_.value.code == 2 and "Traceback" not in shown and not (tmp_path / "run").exists()
        (message,) = [line for line in shown.splitlines() if "ERROR" in line or "error:" in line]
        return message

    return run


@pytest.mark.parametrize("name", GATED_FILES)
def test_gated_weights_are_not_fetched(refused, monkeypatch, name):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("nothing to be fetched"))
    message = refused(train_script, f"--backbone={name}", "--backbone_blocks=1", "--freeze_te=0")
    assert f"--backbone={name} starts from DINOv3's weights, which are not downloaded" in message
    assert (
        "those who accept the DINOv3 License" in message
        and "https://github.com/facebookresearch/dinov3 for " in message
    )
    assert f"{GATED_FILES[name]}, and give the file as --foundation_model_path" in message
    assert not GATED_FILES.keys() & FOUNDATION_FILES.keys() and "dinov3_tiny" not in GATED_FILES


@pytest.mark.parametrize("name", ["dino_tiny", "dinov3_tiny"])
def test_the_first_blocks_of_a_file(tmp_path, caplog, name):
    """Of an official one and of a checkpoint's backbone; the norm behind them is the file's."""
    saved = build_model(backbone=name)
    with torch.no_grad():
        saved.backbone.norm.weight.normal_()
    torch.save(saved.backbone.state_dict(), tmp_path / "official.pth")
    torch.save({"model_state_dict": saved.state_dict()}, tmp_path / "checkpoint.pth")
    images = torch.randn(1, 3, 112, 112)
    x = []
    saved.backbone.blocks[6].register_forward_hook(lambda *arguments: x.append(arguments[2]))
    with torch.no_grad():
        saved.backbone(images)
        expected = saved.backbone.norm(x[0])
    for file in ("official", "checkpoint"):
        loaded = backbone_of(name, backbone_blocks=7)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            load_foundation(loaded, tmp_path / f"{file}.pth")
        assert f"{file}.pth: the first 7 of its 12 blocks are taken (--backbone_blocks)" in caplog.text
        with torch.no_grad():
            torch.testing.assert_close(loaded.tokens(images), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="--freeze_te 8 freezes more than the 7 blocks of this backbone"):
        loaded.freeze(8)
    torch.save(loaded.state_dict(), tmp_path / "seven.pth")
    load_foundation(backbone_of(name, backbone_blocks=7), tmp_path / "seven.pth")
    for blocks in (None, 9):
        with pytest.raises(ValueError, match=r"96, (12|9) and [04] was asked for; use --backbone_blocks=7$"):
            load_foundation(backbone_of(name, backbone_blocks=blocks), tmp_path / "seven.pth")
    assert backbone_of(name, backbone_blocks=12).size == BACKBONES[name]
    with pytest.raises(ValueError, match=f"--backbone_blocks 13: --backbone={name} has 12 blocks; use 1 to 12"):
        backbone_of(name, backbone_blocks=13)


@pytest.mark.parametrize(
    ("blocks_of_file", "asked", "remedy"),
    [(None, 7, "leave out --backbone_blocks"), (7, None, "use --backbone_blocks=7"), (7, 5, "use --backbone_blocks=7")],
)
def test_a_checkpoint_fits_its_number_of_blocks_only(tmp_path, blocks_of_file, asked, remedy):
    """Its layer is of the features behind the last of them."""
    torch.save(tiny(backbone_blocks=blocks_of_file).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=f"was asked for; {remedy}$"):
        load_checkpoint(tiny(backbone_blocks=asked), tmp_path / "model.pth")


@pytest.fixture(scope="module")
def trained(city, tmp_path_factory):
    """A run of a DINOv3-shaped backbone of which 9 blocks are kept, from an official-shaped file of 12."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    torch.save(backbone_of().state_dict(), folder / "dinov3.pth")
    flags = f"--foundation_model_path={folder}/dinov3.pth --backbone_blocks=9 --freeze_te=7 --crossimage_encoder"
    more = f"--eval_datasets_folder={city} --save_dir={folder}/run --grad_cache_chunk=8 --activation_checkpointing"
    train_script.main([*TOY, *TRAIN, *flags.split(), *more.split()])
    (run,) = (folder / "run").iterdir()
    return run


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def evaluated(city, folder, file, *flags):
    """What eval.py finds with a file, and its log."""
    eval_script.main([*TOY, f"--eval_datasets_folder={city}", f"--resume={file}", f"--save_dir={folder}", *flags])
    (run,) = folder.iterdir()
    return results_of(run), (run / "info.log").read_text()


def test_training_and_evaluation_without_options(city, trained, tmp_path):
    """The backbone, its blocks and the size are in the checkpoint, and in files exported from it."""
    content, start = read_file(trained / "best_model.pth"), read_file(trained.parents[1] / "dinov3.pth")
    assert content["model"]["backbone"] == "dinov3_tiny" and content["model"]["backbone_blocks"] == 9
    assert content["resize"] == [64, 64]
    state = read_file(trained / "last_model.pth")["model_state_dict"]
    moved = {name for name, value in start.items() if not torch.equal(state.get(f"backbone.{name}", value), value)}
    assert moved and all(name.startswith(("blocks.7.", "blocks.8.")) for name in moved)
    assert "the first 9 of its 12 blocks are taken" in (trained / "info.log").read_text()
    options = results_of(trained)["options"]
    assert (options["backbone_blocks"], options["resize"]) == (9, [64, 64])

    found, log = evaluated(city, tmp_path / "own", trained / "best_model.pth", "--save_assignments=1")
    assert found["recalls"] == results_of(trained)["recalls"]
    assert "from the checkpoint: --backbone dinov3_tiny, --backbone_blocks 9, " in log and ", --resize 64 64\n" in log
    assert (found["options"]["backbone_blocks"], found["options"]["resize"]) == (9, [64, 64])
    assert len(list(tmp_path.glob("own/*/assignments/*.png"))) == 1
    export.main([f"--resume={trained}/best_model.pth", f"--output={tmp_path}/model.safetensors"])
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert json.loads(file.metadata()["model"])["backbone_blocks"] == 9
        assert json.loads(file.metadata()["resize"]) == [64, 64]
    exported, _ = evaluated(city, tmp_path / "exported", tmp_path / "model.safetensors")
    assert exported["recalls"] == found["recalls"]


def test_other_sizes_and_shapes_of_a_checkpoint(city, trained, tmp_path, refused):
    """Without --backbone, since the file says it: multiples of 16, and photos cropped to whole patches of it."""
    file = trained / "best_model.pth"
    message = refused(eval_script, f"--resume={file}", "--resize", "56", "56")
    assert "--resize 56 56: 56 is not a multiple of the 16-pixel patch; use e.g. 64" in message
    message = refused(eval_script, f"--resume={file}", "--backbone=dinov3_tiny", "--backbone_blocks=8")
    assert "9 blocks and 4 registers, but one of 96, 8 and 4 was asked for; use --backbone_blocks=9" in message
    found, log = evaluated(city, tmp_path / "a", file, "--resize", "48", "70", "--test_method=single_query")
    assert found["options"]["resize"] == [48, 64] and "--resize 48 70 is rounded to whole patches, 48 64" in log


def test_the_size_is_the_backbones_own_where_the_file_has_none(tmp_path, caplog):
    (tmp_path / "model.pth").touch()
    options = parse(EvalOptions, [f"--resume={tmp_path}/model.pth", "--eval_datasets_folder=D"])
    assert options.resize is None
    for name, resize, blocks in (
        ("dinov3_tiny", (320, 320), 9),
        ("dinov3_large", (320, 320), 24),
        ("dino", (322, 322), 12),
    ):
        model = {"backbone": name, **({"backbone_blocks": blocks} if blocks == 9 else {})}
        with caplog.at_level(logging.INFO):
            completed = options.completed(model, size=None, validated_at=None, prepared={})
        assert (completed.backbone, completed.resize, completed.backbone_blocks) == (name, resize, blocks)
        assert f", --resize {resize[0]} {resize[1]} (its backbone's own)" in caplog.messages[-1]
    bare = options.completed({}, size=None, validated_at=None, prepared={})
    assert (bare.backbone, bare.resize, bare.backbone_blocks) == ("dino", (322, 322), 12)


def test_single_query_crops_to_the_backbones_patches():
    pixels = torch.randint(0, 256, (1, 3, 60, 110), dtype=torch.uint8)
    for patch_size, side, expected in ((16, 64, (64, 112)), (14, 56, (56, 98))):
        transform = evaluation_transform((side, side), False, "single_query", patch_size=patch_size)
        assert transform(pixels).shape[-2:] == expected
        square = evaluation_transform((side, side), False, "five_crops", patch_size=patch_size)
        assert square(pixels).shape[-2:] == (side, side)


def test_onnx(tmp_path, capsys):
    """Of a grid that is no square; nothing is left behind on the backbone."""
    model = tiny(backbone_blocks=3, crossimage_encoder=True).eval()
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    flags = "--backbone=dinov3_tiny --backbone_blocks=3 --crossimage_encoder --resize 48 80".split()
    export.main([f"--resume={tmp_path}/bare.pth", f"--output={tmp_path}/model.onnx", *flags])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 4):
        images = torch.randn(count, 3, 48, 80)
        with torch.inference_mode():
            expected = model(images).numpy()
        (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    written = json.loads(session.get_modelmeta().custom_metadata_map["model"])
    assert written["backbone"] == "dinov3_tiny" and written["backbone_blocks"] == 3


def test_sizes_in_an_export(tmp_path, capsys):
    """The file says of which backbone it is, and so what --resize may be; the backbone's own by default."""
    torch.save({"model_state_dict": tiny().state_dict(), "model": {"backbone": "dinov3_tiny"}}, tmp_path / "m.pth")
    command = [f"--resume={tmp_path}/m.pth", f"--output={tmp_path}/m.safetensors"]
    for more in ([], ["--backbone=dinov3_tiny"]):
        with pytest.raises(SystemExit) as exit_:
            export.main([*command, "--resize", "322", "322", *more])
        message = "--resize 322 322 is not a multiple of the 16-pixel patch; use e.g. 320 320"
        assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()
    export.main(command)
    assert "exported at 320 320 (--resize)" in capsys.readouterr().out


def test_torch_hub(tmp_path):
    load = lambda entry, **settings: torch.hub.load(REPOSITORY, entry, source="local", **settings)  # noqa: E731
    model = load("supervlad", pretrained=False, backbone="dinov3_tiny", backbone_blocks=2)
    assert model(torch.randn(1, 3, 32, 48)).shape == (1, 4 * 96) and len(model.backbone.blocks) == 2
    assert load("prepare", backbone="dinov3").keywords["transform"].keywords["size"] == (320, 320)
    assert load("prepare").keywords["transform"].keywords["size"] == (322, 322)
    assert load("prepare", backbone="dinov3_tiny", resize=[16, 32]) is not None
    with pytest.raises(ValueError, match=r"multiples of the 16-pixel patch, at least 16; use e.g. \(320, 320\)"):
        load("prepare", backbone="dinov3", resize=(322, 322))
    with pytest.raises(ValueError, match="unknown backbone 'resnet'; use one of dino, "):
        load("prepare", backbone="resnet")


def test_a_training_on_a_cpu_is_warned_of(city, tmp_path, caplog, monkeypatch):
    """By the real estimate, of so small a backbone nothing; and no weights are looked for when there is a file."""
    monkeypatch.setattr(train_script, "GATED_FILES", {"dinov3_tiny": "x"})
    torch.save(backbone_of().state_dict(), tmp_path / "x.pth")
    flags = f"--foundation_model_path={tmp_path}/x.pth --eval_datasets_folder={city} --save_dir={tmp_path}/run"
    train_script.main([*TOY, *TRAIN, *flags.split()])
    assert "training dinov3_tiny on a CPU takes about 0 hours" in caplog.text


def test_descriptors_are_of_the_network():
    """Layer and assignments sit on the map of patches; registers and class token have no part in it."""
    model = tiny(clusters=3, ghost_clusters=2).eval()
    assert isinstance(model.backbone, DINOv3)
    images = torch.randn(2, 3, 64, 80)
    with torch.inference_mode():
        assignments = model.assignments(images)
        assert assignments.shape == (2, 5, 4, 5)
        features = F.normalize(model.backbone(images), dim=1)
        vectors = torch.einsum("bkhw,bdhw->bkd", assignments[:, :3], features)
        vectors = F.normalize(F.normalize(vectors, dim=2).flatten(1), dim=1)
        torch.testing.assert_close(model(images), vectors, rtol=0, atol=1e-6)
