"""Weight files of every kind; a misfit names the option to change, and no file runs code."""

import errno
import logging
import os
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import same_weights, tiny

from model import BACKBONES, build_model, weights
from model.dinov2 import DINOv2
from model.weights import find_checkpoint, load_checkpoint, load_foundation, read_file


def released_content(model):
    """What the released training script puts into a file."""
    return {
        "epoch_num": 3,
        "model_state_dict": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 5e-5}]},
        "recalls": np.array([91.5, 96.25, 97.0]),
        "best_r5": np.float64(187.75),
        "not_improved_num": 0,
    }


def under_numpy_1(path):
    """Renames NumPy's modules in a file to what they were called when the released files were written."""
    renamed = path.with_suffix(".numpy1.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(renamed, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            new.writestr(item, data)
    return renamed


@pytest.mark.parametrize("numpy", [1, 2])
def test_released_format(tmp_path, numpy):
    saved, model = tiny(crossimage_encoder=True), tiny(crossimage_encoder=True)
    path = tmp_path / "released.pth"
    torch.save(released_content(saved), path)
    if numpy == 1:
        path = under_numpy_1(path)
    content = load_checkpoint(model, path)
    assert same_weights(model, saved)
    assert content["recalls"].tolist() == [91.5, 96.25, 97.0] and content["best_r5"] == 187.75


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["PROOF"],)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name.replace('.attn.', '._orig_mod.attn.')}",
        lambda name: f"_fsdp_wrapped_module.{name.replace('.mlp.', '._checkpoint_wrapped_module.mlp.')}",
    ],
)
def test_bare_state_dicts_of_wrapped_models(tmp_path, wrap):
    model, loaded = tiny(crossimage_encoder=True), tiny(crossimage_encoder=True)
    torch.save({wrap(name): value for name, value in model.state_dict().items()}, tmp_path / "model.pth")
    assert load_checkpoint(loaded, tmp_path / "model.pth") == {}
    assert same_weights(loaded, model)
    backbone = {wrap(f"backbone.{name}"): value for name, value in model.backbone.state_dict().items()}
    torch.save({name.replace("backbone.", ""): value for name, value in backbone.items()}, tmp_path / "dinov2.pth")
    load_foundation(other := tiny().backbone, tmp_path / "dinov2.pth")
    assert same_weights(other, model.backbone)


def test_names_that_a_wrapper_would_give_twice(tmp_path):
    state = tiny().state_dict()
    torch.save({**state, **{f"_orig_mod.{name}": value for name, value in state.items()}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="model.pth holds weights twice"):
        load_checkpoint(tiny(), tmp_path / "model.pth")


def test_a_file_that_needs_code_is_refused_unrun(tmp_path, monkeypatch):
    monkeypatch.setenv("PROOF", str(tmp_path / "ran"))
    torch.save({"model_state_dict": RunsCode()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth holds .*refused"):
        read_file(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weight file at .*none.pth"):
        read_file(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="at SuperVlad; .* SuperVLAD, "):
        find_checkpoint(Path("SuperVlad"))
    path = tmp_path / "whole.pth"
    damages = [b"", b"G", b"Just text", b"(see", b"<html>quota", pickle.dumps({"a": 1})]
    for zipped in (True, False):
        torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization=zipped)
        damages += [path.read_bytes()[:end] for end in (100, 5_000, 200_000, -30)]
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="whole.pth is damaged"):
            read_file(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="whole.pth holds a list"):
        read_file(path)


def test_a_file_that_cannot_be_read_keeps_the_reason(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    for name in ("here.pth", "here.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(OSError, match=rf"{name} cannot be read \(Input/output error\)"):
            read_file(tmp_path / name)


# Of three, the released 1-cluster model; of five, the other released ones.
@pytest.mark.parametrize(("total", "K", "G"), [(1, 1, 0), (3, 1, 2), (5, 4, 1)])
def test_a_misfit_of_clusters_names_the_likeliest(tmp_path, total, K, G):
    """The tensor holds only their sum."""
    torch.save(released_content(tiny(clusters=total, ghost_clusters=0)), tmp_path / "file.pth")
    told = f"70 [+] 1 .*supervlad_clusters={K} ghost_clusters={G}, .* any K [+] G = {total}$"
    with pytest.raises(ValueError, match=told):
        load_checkpoint(tiny(clusters=70, ghost_clusters=1), tmp_path / "file.pth")
    load_checkpoint(tiny(clusters=total, ghost_clusters=0), tmp_path / "file.pth")


def test_our_files_tell_what_they_are_of(tmp_path):
    """Another split of the same sum of clusters would load and be wrong; with an encoder on one side, none does."""
    path = tmp_path / "file.pth"
    written = {"clusters": 4, "ghost_clusters": 1}
    torch.save({"model_state_dict": tiny().state_dict(), "model": written}, path)
    with pytest.raises(ValueError, match="use supervlad_clusters=4 ghost_clusters=1$"):
        load_checkpoint(tiny(clusters=3, ghost_clusters=2), path)
    for of_file, remedy in ((True, "add"), (False, "leave out")):
        torch.save(released_content(tiny(crossimage_encoder=of_file)), path)
        with pytest.raises(ValueError, match=f"{remedy} crossimage_encoder$"):
            load_checkpoint(tiny(crossimage_encoder=not of_file), path)


@pytest.mark.parametrize(
    ("of_file", "asked", "remedy"),
    [
        ({"backbone": "dino_tiny"}, {"backbone": "dinov3_tiny"}, "backbone=dino_tiny"),
        ({"backbone": "dinov3_tiny"}, {"backbone": "dino"}, "backbone=dinov3_tiny"),
        # Its layer is of the features behind the last block.
        ({}, {"backbone_blocks": 7}, "backbone=dinov3_tiny backbone_blocks=12"),
        ({"backbone_blocks": 7}, {}, "backbone=dinov3_tiny backbone_blocks=7"),
        ({"backbone_blocks": 7}, {"backbone_blocks": 5}, "backbone=dinov3_tiny backbone_blocks=7"),
    ],
)
def test_a_file_of_another_backbone(tmp_path, of_file, asked, remedy):
    saved = build_model(**{"backbone": "dinov3_tiny", **of_file})
    torch.save(saved.backbone.state_dict(), tmp_path / "foundation.pth")
    torch.save(saved.state_dict(), tmp_path / "checkpoint.pth")
    with torch.device("meta"):
        model = build_model(**{"backbone": "dinov3_tiny", **asked})
    with pytest.raises(ValueError, match=f"checkpoint.pth has a DINO.* was asked for; use {remedy}$"):
        load_checkpoint(model, tmp_path / "checkpoint.pth")
    if "backbone" in asked:
        with pytest.raises(ValueError, match=f"foundation.pth has a DINO.* was asked for; use {remedy}$"):
            load_foundation(model.backbone, tmp_path / "foundation.pth")


def test_what_a_file_says_of_its_model(tmp_path):
    """Other projects keep the state dict itself there; of an entry that is ours, no word is overlooked."""
    path = tmp_path / "file.pth"
    assert weights.model_of(path, {"model": {"pos_embed": torch.zeros(1)}}) == weights.model_of(path, {}) == {}
    said = {"backbone": "dino_tiny", "clusters": 2}
    assert weights.model_of(path, {"model": said}) == said
    with pytest.raises(ValueError, match="file.pth says 'pooling' of its model"):
        weights.model_of(path, {"model": {**said, "pooling": "gem"}})


def backbone_of(name, **options):
    return tiny(backbone=name, **options).backbone


def test_an_official_file_is_loaded_whole(tmp_path):
    """Its periods have 8 bits; 188 names, as of ViT-S."""
    saved, loaded = backbone_of("dinov3_tiny"), backbone_of("dinov3_tiny")
    state = {name: value.clone() for name, value in saved.state_dict().items()}
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    torch.save(state, tmp_path / "dinov3.pth")
    load_foundation(loaded, tmp_path / "dinov3.pth")
    assert len(state) == len(loaded.state_dict()) == 188
    assert all(torch.equal(value, state[name].float()) for name, value in loaded.state_dict().items())
    del state["blocks.7.attn.qkv.bias_mask"]
    torch.save(state, tmp_path / "dinov3.pth")
    with pytest.raises(ValueError, match=r"^[^\n]*dinov3.pth [^\n]*blocks\.7\.attn\.qkv\.bias_mask[^\n]*$"):
        load_foundation(loaded, tmp_path / "dinov3.pth")


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
    with pytest.raises(ValueError, match="freeze_te 8 .* 7 blocks"):
        loaded.freeze(8)
    torch.save(loaded.state_dict(), tmp_path / "seven.pth")
    load_foundation(backbone_of(name, backbone_blocks=7), tmp_path / "seven.pth")
    for blocks in (None, 9):
        with pytest.raises(ValueError, match=f"was asked for; use backbone={name} backbone_blocks=7$"):
            load_foundation(backbone_of(name, backbone_blocks=blocks), tmp_path / "seven.pth")
    with pytest.raises(ValueError, match=f"backbone_blocks 13: backbone={name} has 12"):
        backbone_of(name, backbone_blocks=13)


FORMS = {
    # Checkpoints, ours and the released ones, whose other parts are left behind.
    **{
        prefix: lambda state, prefix=prefix: {
            "model_state_dict": {
                **{f"{prefix}backbone.{name}": value for name, value in state.items()},
                f"{prefix}aggregation.conv.weight": torch.zeros(5, 96, 1, 1),
            },
            "resize": [56, 56],
        }
        for prefix in ("", "module.")
    },
    "teacher": lambda state: {"teacher": {f"backbone.{name}": value for name, value in state.items()}},
    "teacher.backbone.": lambda state: {
        **{f"student.backbone.{name}": 0 * value for name, value in state.items()},
        **{f"teacher.backbone.{name}": value for name, value in state.items()},
        "teacher.dino_head.mlp.0.weight": torch.zeros(1),
    },
    "encoder.": lambda state: {"state_dict": {f"encoder.{name}": value for name, value in state.items()}, "epoch": 3},
    "chunks": lambda state: {
        re.sub(r"^blocks\.(\d+)", lambda of: f"blocks.{int(of[1]) // 3}.{of[1]}", name): value
        for name, value in state.items()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_foundation_files_of_other_forms(tmp_path, form):
    saved, loaded = tiny().backbone, tiny().backbone
    torch.save(FORMS[form](saved.state_dict()), tmp_path / "other.pth")
    load_foundation(loaded, tmp_path / "other.pth")
    assert same_weights(saved, loaded)


def test_foundation_files_of_timm(tmp_path):
    """With registers, the class token's position is part of the token there: other weights, the same features."""
    size = replace(BACKBONES["dino_tiny"], registers=4)
    saved, loaded = DINOv2(size).eval(), DINOv2(size).eval()
    state = saved.state_dict()
    with torch.no_grad():
        state["register_tokens"].normal_()
        state["cls_token"].normal_()
    theirs = {name: value for name, value in state.items() if name not in ("register_tokens", "mask_token")}
    theirs["reg_token"] = state["register_tokens"]
    theirs["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    theirs["pos_embed"] = state["pos_embed"][:, 1:]
    torch.save(theirs, tmp_path / "timm.pth")
    load_foundation(loaded, tmp_path / "timm.pth")
    images = torch.randn(1, 3, 56, 70)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), saved(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("load", [load_foundation, load_checkpoint])
def test_files_that_fit_nothing(tmp_path, load):
    """Without a backbone under its official names, with a tensor too many, and with values that are not finite."""
    model = tiny()
    module = model.backbone if load is load_foundation else model
    torch.save({"embeddings.cls_token": torch.zeros(1, 1, 96)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth holds no DINOv2 .* --foundation_model_path"):
        load(module, tmp_path / "other.pth")
    torch.save({**model.state_dict(), "backbone.surplus": torch.zeros(1)}, tmp_path / "surplus.pth")
    with pytest.raises(ValueError, match="surplus.pth does not fit the model: .*surplus"):
        load(module, tmp_path / "surplus.pth")
    with torch.no_grad():
        model.backbone.blocks[3].norm1.weight[5] = float("nan")
    torch.save(model.state_dict(), tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"broken.pth .*blocks\.3\.norm1\.weight.*; give another file"):
        load(module, tmp_path / "broken.pth")
