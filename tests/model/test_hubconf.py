"""torch.hub entry points, inside a program that has modules of the same names as ours."""

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from datasets.photos.batches import ImageList
from datasets.photos.transforms import evaluation_transform
from model import build_model

REPOSITORY = str(Path(__file__).parents[2])


@pytest.fixture
def strangers(monkeypatch, tmp_path):
    """Somebody else's `model`, `utils` and `datasets`, and an empty cache of torch.hub."""
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("model", "utils", "datasets", "_supervlad_model")
    ]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("model", "utils", "datasets"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    yield tmp_path / "checkpoints"
    for name in [name for name in sys.modules if name.startswith("_supervlad_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("entry", "settings", "dim"),
    [
        ("supervlad", {}, 4 * 96),
        ("supervlad", {"crossimage_encoder": True}, 4 * 96),
        ("supervlad_crossimage", {}, 4 * 96),
        ("vlad_1cluster", {}, 96),
    ],
)
def test_entry_points(strangers, entry, settings, dim):
    before = {name: sys.modules[name] for name in ("model", "utils", "datasets")}
    model = torch.hub.load(REPOSITORY, entry, source="local", pretrained=False, backbone="dino_tiny", **settings)
    assert not model.training and (model.encoder is not None) == ("encoder" in str(settings) or "cross" in entry)
    descriptors = model(torch.rand(2, 3, 56, 70))
    assert descriptors.shape == (2, dim)
    torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(2))
    assert all(sys.modules[name] is module for name, module in before.items())


def test_errors_do_not_speak_of_a_command_line(strangers, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(ValueError) as error:
        torch.hub.load(REPOSITORY, "vlad_1cluster", source="local", backbone="dino_tiny")
    message = str(error.value)
    assert message.startswith("1-ClusterVLAD could not be downloaded (") and "--" not in message
    assert "https://drive.google.com/uc?id=1pQ" in message and f"put it at {strangers}/1-ClusterVLAD.pth" in message
    torch.save(build_model(backbone="dino_small").state_dict(), strangers / "SuperVLAD.pth")
    with pytest.raises(ValueError, match="one of 96, 12 and 0 was asked for; use backbone=dino_small$"):
        torch.hub.load(REPOSITORY, "supervlad", source="local", backbone="dino_tiny")
    torch.save(build_model(backbone="dino_tiny", clusters=2).state_dict(), strangers / "SuperVLAD.pth")
    with pytest.raises(ValueError, match="use supervlad_clusters=1 ghost_clusters=2 or "):
        torch.hub.load(REPOSITORY, "supervlad", source="local", backbone="dino_tiny")
    with pytest.raises(ValueError, match="unknown backbone 'resnet'; use one of dino, "):
        torch.hub.load(REPOSITORY, "supervlad", source="local", backbone="resnet")


def test_photos_are_prepared_as_eval_prepares_them(strangers, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).resize((400, 300)).save(tmp_path / "photo.jpg", exif=exif)
    for antialias, upright in ((True, True), (False, False), (True, False)):
        load = partial(torch.hub.load, REPOSITORY, "prepare", source="local", resize=(56, 70))
        prepare = load() if antialias and upright else load(antialias=antialias, upright=upright)
        images = ImageList([tmp_path / "photo.jpg"], evaluation_transform((56, 70), antialias), upright=upright)
        assert prepare(str(tmp_path / "photo.jpg")).shape == (3, 56, 70)
        assert torch.equal(prepare(tmp_path / "photo.jpg"), images[0])
        with Image.open(tmp_path / "photo.jpg") as photo:
            assert torch.equal(prepare(photo), images[0])
    assert torch.hub.load(REPOSITORY, "prepare", source="local")(tmp_path / "photo.jpg").shape == (3, 322, 322)


def test_released_weights_are_loaded(strangers):
    saved = build_model(backbone="dino_tiny", clusters=1, ghost_clusters=2)
    strangers.mkdir()
    torch.save(
        {"model_state_dict": {f"module.{name}": value for name, value in saved.state_dict().items()}},
        strangers / "1-ClusterVLAD.pth",
    )
    model = torch.hub.load(REPOSITORY, "vlad_1cluster", source="local", backbone="dino_tiny")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), saved.state_dict().values(), strict=True))


def test_a_checkpoint_of_ones_own_is_loaded(strangers, tmp_path):
    written = {
        "backbone": "dino_tiny",
        "backbone_blocks": 9,
        "clusters": 2,
        "ghost_clusters": 1,
        "crossimage_encoder": True,
    }
    saved = build_model(**written)
    torch.save({"model_state_dict": saved.state_dict(), "model": written}, tmp_path / "best_model.pth")
    load = partial(torch.hub.load, REPOSITORY, "checkpoint", source="local")
    model = load(path=tmp_path / "best_model.pth")
    assert not model.training and model.descriptor_dim == saved.descriptor_dim
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), saved.state_dict().values(), strict=True))
    torch.save(saved.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="bare.pth does not say what its model is; use supervlad, "):
        load(path=str(tmp_path / "bare.pth"))
    with pytest.raises(FileNotFoundError, match="no file .*none.pth; name a best_model.pth"):
        load(path=tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "best_model.pth").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut.pth"):
        load(path=tmp_path / "cut.pth")


@pytest.mark.parametrize("resize", [(322, 320), (0, 14), (-14, 14), (13, 13), (322,), (14, 14, 14), 322, (14.0, 14)])
def test_a_size_that_the_model_does_not_take(strangers, resize):
    with pytest.raises(ValueError, match="multiples of the 14-pixel patch, at least 14; use e.g."):
        torch.hub.load(REPOSITORY, "prepare", source="local", resize=resize)
    assert torch.hub.load(REPOSITORY, "prepare", source="local", resize=[14, 28]) is not None
