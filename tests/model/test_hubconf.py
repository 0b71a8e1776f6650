"""torch.hub entry points, inside a program that has modules of the same names as ours."""

import itertools
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import same_weights, tiny
from PIL import ExifTags, Image

from datasets.photos.transforms import evaluation_transform, read_pixels

REPOSITORY = str(Path(__file__).parents[2])
NAMES = ("model", "utils", "datasets")


def load(entry, **settings):
    return torch.hub.load(REPOSITORY, entry, source="local", **settings)


@pytest.fixture
def strangers(monkeypatch, tmp_path):
    """Somebody else's `model`, `utils` and `datasets`, and an empty cache of torch.hub."""
    for name in [name for name in sys.modules if name.split(".")[0] in NAMES]:
        monkeypatch.delitem(sys.modules, name)
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path / "checkpoints"
    for name in [name for name in sys.modules if name.startswith("_supervlad_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("entry", "settings", "dim"),
    [
        ("supervlad", {}, 4 * 96),
        ("supervlad", {"crossimage_encoder": True}, 4 * 96),
        ("supervlad_crossimage", {"backbone": "dinov3_tiny", "backbone_blocks": 2}, 4 * 96),
        ("vlad_1cluster", {}, 96),
    ],
)
def test_entry_points(strangers, entry, settings, dim):
    before = {name: sys.modules[name] for name in NAMES}
    model = load(entry, pretrained=False, **{"backbone": "dino_tiny", **settings})
    assert not model.training and (model.encoder is not None) == ("encoder" in str(settings) or "cross" in entry)
    assert len(model.backbone.blocks) == settings.get("backbone_blocks", 12)
    descriptors = model(torch.rand(2, 3, 112, 224))
    assert descriptors.shape == (2, dim)
    torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(2))
    assert all(sys.modules[name] is module for name, module in before.items())


def test_errors_name_parameters(strangers, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    told = f"https://drive.google.com/uc.id=1pQ.* {strangers}/1-ClusterVLAD.pth"
    with pytest.raises(ValueError, match=told):
        load("vlad_1cluster", backbone="dino_tiny")
    torch.save(tiny(clusters=2).state_dict(), strangers / "SuperVLAD.pth")
    with pytest.raises(ValueError, match="use supervlad_clusters=1 ghost_clusters=2, or "):
        load("supervlad", backbone="dino_tiny")
    for entry in ("supervlad", "prepare"):
        with pytest.raises(ValueError, match="unknown backbone 'resnet'; use one of dino, "):
            load(entry, backbone="resnet")


def test_photos_are_prepared_as_eval_prepares_them(strangers, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).resize((400, 300)).save(tmp_path / "photo.jpg", exif=exif)
    for antialias, upright in ((True, True), (False, False), (True, False)):
        settings = {} if antialias and upright else {"antialias": antialias, "upright": upright}
        prepare = load("prepare", resize=(56, 70), **settings)
        images = evaluation_transform((56, 70), antialias)(read_pixels(tmp_path / "photo.jpg", upright=upright)[None])
        assert prepare(str(tmp_path / "photo.jpg")).shape == (3, 56, 70)
        assert torch.equal(prepare(tmp_path / "photo.jpg"), images[0])
        with Image.open(tmp_path / "photo.jpg") as photo:
            assert torch.equal(prepare(photo), images[0])


def test_released_weights_and_ones_own_are_loaded(strangers, tmp_path):
    saved = tiny(clusters=1, ghost_clusters=2)
    torch.save({"model_state_dict": saved.state_dict()}, strangers / "1-ClusterVLAD.pth")
    assert same_weights(load("vlad_1cluster", backbone="dino_tiny"), saved)
    written = {"backbone": "dino_tiny", "backbone_blocks": 9, "clusters": 2, "crossimage_encoder": True}
    saved = tiny(**written)
    torch.save({"model_state_dict": saved.state_dict(), "model": written}, tmp_path / "best_model.pth")
    model = load("checkpoint", path=tmp_path / "best_model.pth")
    assert not model.training and model.descriptor_dim == saved.descriptor_dim and same_weights(model, saved)
    torch.save(saved.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="bare.pth does not say what its model is; .*use supervlad "):
        load("checkpoint", path=str(tmp_path / "bare.pth"))
    with pytest.raises(FileNotFoundError, match="none.pth"):
        load("checkpoint", path=tmp_path / "none.pth")


def test_size_and_preparation_follow_the_checkpoint(strangers, tmp_path):
    model = tiny()
    content = {"model_state_dict": model.state_dict(), "model": {"backbone": "dino_tiny"}}
    best, told, sizeless = (tmp_path / name for name in ("best_model.pth", "told.pth", "sizeless.pth"))
    torch.save({**content, "resize": [56, 70]}, best)
    torch.save({**content, "resize": [42, 42], "antialias": False, "upright": False}, told)
    torch.save({**content, "model": {"backbone": "dinov3_tiny"}}, sizeless)
    torch.save(model.state_dict(), strangers / "SuperVLAD.pth")
    for settings, expected in (
        ({}, ((322, 322), True, True)),
        ({"backbone": "dinov3"}, ((320, 320), True, True)),
        ({"backbone": "dinov3_tiny", "resize": [16, 32]}, ((16, 32), True, True)),
        ({"resume": best}, ((56, 70), True, True)),
        ({"resume": str(told)}, ((42, 42), False, False)),
        ({"resume": told, "resize": (14, 28), "antialias": True, "upright": True}, ((14, 28), True, True)),
        ({"resume": sizeless}, ((320, 320), True, True)),
        ({"resume": "SuperVLAD"}, ((322, 322), True, True)),
    ):
        call = load("prepare", **settings).keywords
        transform = call["transform"].keywords
        assert (tuple(transform["size"]), transform["antialias"], call["upright"]) == expected
    with pytest.raises(ValueError, match="resize 322 322 .* use e.g. 320 320"):
        load("prepare", backbone="dinov3", resize=(322, 322))


def test_two_copies_in_one_process(strangers, tmp_path):
    """Each runs its own code, one that takes another's place too (force_reload), and after an import that broke off."""

    def copy(name, default):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(Path(REPOSITORY) / "model", tmp_path / name / "model", ignore=shutil.ignore_patterns("*.pyc"))
        shutil.copy(Path(REPOSITORY) / "hubconf.py", tmp_path / name)
        os.utime(tmp_path / name / "hubconf.py", ns=(0, next(times)))
        sizes = tmp_path / name / "model" / "sizes.py"
        sizes.write_text(sizes.read_text().replace("_TINY = BackboneSize(channels=96", f"_TINY = {default}"))

    def channels(name):
        settings = {"pretrained": False, "backbone": "dino_tiny"}
        return torch.hub.load(str(tmp_path / name), "supervlad", source="local", **settings).backbone.channels

    times = itertools.count(10**18)
    copy("a", "BackboneSize(channels=96")
    copy("b", "BackboneSize(channels=48")
    assert [channels("a"), channels("b"), channels("a")] == [96, 48, 96]
    copy("a", "BackboneSize(channels=24")
    assert [channels("a"), channels("b")] == [24, 48]
    copy("c", "stopped(channels=12")
    with pytest.raises(NameError, match="stopped"):
        channels("c")
    sizes = tmp_path / "c" / "model" / "sizes.py"
    sizes.write_text(sizes.read_text().replace("stopped(", "BackboneSize("))
    assert channels("c") == 12
